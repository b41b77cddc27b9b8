"""`zoo sample`: films from a trained run, longer than those it was trained on."""

from __future__ import annotations

import json
import random
import shutil
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from matplotlib import image
from test_cli import zoo
from tiny import BASE

from experiments.config.resolve import load
from experiments.execution.run import run
from experiments.inspection.sample import Drawing, write_film
from experiments.tracking.mlflow_logger import Tracker
from experiments.tracking.store import Cell
from lit_modules import LitVideoDiT


class Nobody:
    def started(self, *_: object) -> None: ...
    def step(self, *_: object) -> None: ...
    def ended(self, *_: object) -> None: ...
    def note(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ZOO_HOME", str(home))
        patched.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
        scheduled = {"name": "moc", "causal": "strict", "schedule": {"top_k": {1: 2}}}
        config = load([BASE, {"attention": scheduled}, "data.val_films=3", "data.batch_size=2", "trainer.max_steps=1"])
        result = run(Cell("moc", config), "train", Tracker("train", print), Nobody())
    assert result.status == "finished", result.traceback
    return Path(result.folder)


@pytest.mark.slow
def test_films_longer_than_trained_on(trained: Path, tmp_path: Path) -> None:
    asked = [
        "data.returns=3",
        "--context",
        "1",
        "--films",
        "3",
        "--given",
        "1",
        "--steps",
        "2",
        "--out",
        tmp_path / "out",
        "--plot",
        tmp_path / "drift.png",
    ]
    result = zoo("sample", trained, *asked, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert image.imread(found.pop("plot")).shape[1] == 1300
    assert (found["by_shot"]["shot"], found["by_shot"]["films"]) == ([0, 1, 2, 3], [3] * 4)
    assert found["by_shot"]["window_error"][0] < 1e-6 < min(found["by_shot"]["window_error"][1:])  # the first is given
    assert found["by_shot"]["same_as_introduction"][0] is None
    assert found == json.loads((tmp_path / "out" / "sample.json").read_text())
    assert (found["step"], found["data"]["returns"]) == (1, 3)
    assert found["sampling"] == {"steps": 2, "guidance": 1.0, "order": "shots", "context": 1}
    assert "identity_recall" in found["metrics"]
    assert not [name for name in found["metrics"] if name.startswith("whole_")]  # a shot was given
    assert [film["name"] for film in found["films"]] == ["validation 0", "validation 1", "validation 2"]
    for number, film in enumerate(found["films"]):
        assert (film["shots"], film["given"], list(film["taken"])) == (4, 1, ["1", "2", "3"])
        assert [len(film["taken"][str(shot)]) for shot in (1, 2, 3)] == [1, 1, 1]
        assert Path(film["strip"]) == tmp_path / "out" / f"film_{number:03d}.png"
        strip = image.imread(film["strip"])
        assert strip.shape[0] == 220  # three rows of 6 pixels and two gaps of 2, drawn ten times as large
        real, drawn = strip[:60], strip[-60:]
        assert (real[:, :60] == drawn[:, :60]).all()  # the shot that is given
        for shot in (1, 2, 3):
            place = slice(90 * shot, 90 * shot + 60)
            assert (real[:, place] == drawn[:, place]).mean() < 0.9


def test_output_shows_the_context_of_each_generated_shot(trained: Path) -> None:
    result = zoo("sample", trained, "--films", "1", "--steps", "1", "--context", "4")
    assert "0: –; 1: 0" in result.stdout
    assert "film_000.png" in result.stdout
    assert "identity_recall" in result.stdout
    assert "context 4 takes every earlier shot; the longest film has 2 shots" in result.stderr
    (folder,) = (trained / "samples").iterdir()
    assert str(folder) in result.stdout
    assert "each shot beside" not in zoo("sample", trained, "--films", "1", "--steps", "1", "--order", "shots").stdout


def test_fewer_films_than_asked_for_are_named(trained: Path, tmp_path: Path) -> None:
    """The run has three validation films."""
    line = "9 films were asked for, and the validation has 3; data.val_films=9 may give more"
    assert line in zoo("sample", trained, "--films", "9", "--steps", "1").stderr
    assert line in zoo("ladder", trained, "--films", "9", "--plot", tmp_path / "ladder.png").stderr
    assert line in zoo("capture", trained, "--films", "9", "--out", tmp_path / "calls.safetensors").stderr
    assert "were asked for" not in zoo("sample", trained, "--films", "3", "--steps", "1").stderr


def test_settings_not_given_are_the_runs_and_the_model_gets_its_step(trained: Path, tmp_path: Path) -> None:
    (checkpoint,) = trained.glob("checkpoints/*.ckpt")
    drawing = Drawing(checkpoint, [], films=3, given=0, sampling={})
    assert (drawing.euler.order, drawing.euler.steps, drawing.euler.context) == ("film", 1, None)
    assert [len(batch["text"]) for batch in drawing.batches] == [2, 1]
    average = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert torch.equal(drawing.module.model.final.weight, average["model.final.weight"])
    steps = []
    drawing.module.model.blocks[0].register_forward_pre_hook(lambda _, args: steps.append(args[1].step))
    ticks: list[int] = []
    drawn = drawing.draw(tmp_path, lambda: ticks.append(1))
    assert set(steps) == {1}
    assert len(ticks) == drawing.steps == 2
    assert drawn.films[0]["taken"] is None
    assert {"identity_recall", "whole_identity_recall", "whole_identity_chance"} <= drawn.metrics.keys()
    assert isinstance(drawing.module, LitVideoDiT)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["model.dim=3"], "only data can be changed, the rest is the checkpoint's; got 'model.dim=3'"),
        (["data.return=3"], "did you mean 'returns'"),
        (["data.patch=[1,4,4]"], "films have patches of (1, 4, 4), the model of (1, 3, 3)"),
        (["data.tags=5"], "token ids, the model"),
        (["--order", "shot"], "did you mean 'shots'"),
        (["--order", "film", "--context", "1"], "context is for order 'shots'"),
        (["--given", "9"], "nothing left to draw"),
    ],
)
def test_what_does_not_fit_is_refused(trained: Path, asked: list[str], message: str) -> None:
    result = zoo("sample", trained, *asked)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


@pytest.mark.slow
def test_a_run_without_a_checkpoint_is_refused(trained: Path, tmp_path: Path) -> None:
    assert "no such run or checkpoint" in zoo("sample", tmp_path / "none").stderr
    assert "holds no checkpoints/*.ckpt" in zoo("sample", tmp_path).stderr
    (checkpoint,) = trained.glob("checkpoints/*.ckpt")
    alone = Path(shutil.copy(checkpoint, tmp_path / "alone.ckpt"))
    assert "not in a run directory" in zoo("sample", alone).stderr
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(trained / "result.json", tmp_path)
    torch.save({"weights": 1}, tmp_path / "checkpoints" / "other.ckpt")
    assert "is no checkpoint of a run: KeyError: 'global_step'" in zoo("sample", tmp_path).stderr
    for damaged in (checkpoint.read_bytes()[:3000], b"", random.Random(0).randbytes(3000)):
        (tmp_path / "checkpoints" / "other.ckpt").write_bytes(damaged)
        told = zoo("sample", tmp_path)
        assert (told.exit_code, len(told.stderr.splitlines())) == (2, 1)
        assert "other.ckpt is damaged: " in told.stderr
    (tmp_path / "result.json").write_text("{")
    assert "result.json cannot be read" in zoo("sample", tmp_path).stderr


def test_latents_are_decoded_into_a_film_one_shot_at_a_time(tmp_path: Path) -> None:
    shots, alive, most = 200, set[int](), []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        video = (latents[:, :3] / shots).repeat_interleave(8, 2).repeat_interleave(8, 3).clone()
        alive.add(id(video))
        weakref.finalize(video, alive.discard, id(video))
        most.append(len(alive))
        return video

    films = [[torch.full((5, 4, 2, 2), float(sign * shot)) for shot in range(shots)] for sign in (1, 0, -1)]
    strip, film = write_film(tmp_path / "new" / "film", films, decode, 8.0, ["a film", *map(str, range(shots))])
    assert max(most) <= 3  # beside the one that is decoded, the first and the one before
    assert len(most) == 200 + 2 * 64  # of the versions that are not written, only what the strip shows
    with av.open(str(film)) as file:
        levels = [float(frame.to_ndarray(format="gray").mean()) for frame in file.decode(video=0)]
    assert len(levels) == 5 * shots
    assert np.corrcoef(levels, np.arange(5 * shots))[0, 1] < -0.99
    assert film.with_suffix(".vtt").read_text().endswith("00:02:04.375 --> 00:02:05.000\n199\n")
    picture = image.imread(strip)
    zoom, gaps = 4, 3 * 63  # rows of 16 pixels; a gap at each cut
    assert picture.shape[:2] == (zoom * (3 * 16 + 2 * 2), zoom * (64 * 16 + gaps))
    assert picture[:64, -4:, 0].mean() > 0.99  # the last shot is shown
