"""Pretrained pipelines from the command line: compared, captured, replayed."""

import json
from pathlib import Path

import av
import pytest
from typer.testing import CliRunner

from experiments.cli import app
from experiments.config.names import parse_methods
from experiments.inspection import pretrained
from experiments.inspection.capture import load
from experiments.tools.tiny_models import write
from sparse_zoo.errors import ZooError

SIZE = ["--size", "9x64x96", "--steps", "2", "--shots", "1,2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models"), ["wan"])[0]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("# two\na red ball\n\n<b>a blue cube\n")
    return path


def test_methods_are_compared_from_the_same_noise(model: Path, prompts: Path, tmp_path: Path):
    out = tmp_path / "page"
    asked = [
        "compare",
        "--methods",
        "moc:top_k=1,moc:top_k=9,causal=null",
        "--model",
        str(model),
        "--prompts",
        str(prompts),
    ]
    done = CliRunner().invoke(app, [*asked, *SIZE, "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads((out / "compare.json").read_text())
    dense, sparse, all_chunks = found["rows"]
    assert (dense["method"], dense["density"], dense["psnr"]) == ("dense", 1.0, None)
    # A frame of 24 tokens in a shot of one, and two in a shot of two: MoC's top chunk is one of the others.
    assert 0 < sparse["density"] < 1
    assert all_chunks["density"] == 1
    # From one noise both are one video but for the order of sums: below half a step of 8 bits, 20·log10(2·255) = 54 dB.
    assert all_chunks["psnr"] is None or all_chunks["psnr"] > 54
    assert all_chunks["ssim"] == pytest.approx(1)
    assert 10 < sparse["psnr"] < 60
    page = (out / "index.html").read_text()
    for row in found["rows"]:
        assert len(row["videos"]) == 2
        for name in row["videos"]:
            assert f'src="{name}"' in page
            with av.open(str(out / name)) as file:
                frames = list(file.decode(video=0))
                assert (len(frames), frames[0].width, frames[0].height) == (9, 96, 64)
                assert file.streams.video[0].codec_context.name == "h264"
    assert "&lt;b&gt;a blue cube" in page  # what a prompt holds is text


def test_a_list_of_methods_is_split_between_methods_only():
    found = parse_methods(["moc:top_k=2,anchors=[text,shot],causal=null,sta:tile=[1,[2,3]],radial", "moga"])
    moc = {"top_k": 2, "anchors": ["text", "shot"], "causal": None}
    assert found == [("moc", moc), ("sta", {"tile": [1, [2, 3]]}), ("radial", {}), ("moga", {})]


@pytest.mark.slow
def test_videos_are_sampled_with_a_method(model: Path, prompts: Path, tmp_path: Path):
    """As comparing samples them: the same files, prompt by prompt."""
    asked = ["--model", str(model), "--prompts", str(prompts), *SIZE]
    ways = {"moc": ["--method", "moc:top_k=1"], "dense": []}
    for name, given in ways.items():
        done = CliRunner().invoke(app, ["sample", *asked, *given, "--out", str(tmp_path / name), "--json"])
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert found["method"] == name
        assert [video["prompt"] for video in found["videos"]] == ["a red ball", "<b>a blue cube"]
        assert (found["density"] < 1) is (name == "moc")
        for video in found["videos"]:
            with av.open(video["file"]) as file:
                assert len(list(file.decode(video=0))) == 9
    page = tmp_path / "page"
    done = CliRunner().invoke(app, ["compare", "--methods", "moc:top_k=1", *asked, "--out", str(page)])
    for name, folder in (("dense", "0-dense"), ("moc", "1-moc")):
        for i in range(2):
            assert (page / folder / f"{i}.mp4").read_bytes() == (tmp_path / name / f"{i}.mp4").read_bytes()
    assert (tmp_path / "moc" / "0.mp4").read_bytes() != (tmp_path / "dense" / "0.mp4").read_bytes()


@pytest.mark.slow
def test_methods_are_compared_at_one_density(model: Path, prompts: Path, tmp_path: Path):
    asked = [
        "compare",
        "--methods",
        "moc,sta",
        "--match",
        "density=0.78",
        "--model",
        str(model),
        "--prompts",
        str(prompts),
    ]
    done = CliRunner().invoke(app, [*asked, *SIZE, "--out", str(tmp_path / "page")])
    rows = {row["method"]: row for row in json.loads((tmp_path / "page" / "compare.json").read_text())["rows"]}
    assert rows["moc"]["density"] == pytest.approx(0.78, rel=0.05)
    if rows["sta"]["failed"]:  # its reason is on the screen, and the exit code says so
        assert done.exit_code == 1
        assert "sta" in done.output
    else:
        assert rows["sta"]["density"] == pytest.approx(0.78, rel=0.05)


@pytest.mark.slow
def test_a_pipeline_is_captured_and_replayed(model: Path, prompts: Path, tmp_path: Path):
    file = tmp_path / "calls.safetensors"
    asked = ["capture", "--model", str(model), "--prompts", str(prompts), "--size", "9x64x96", "--steps", "4"]
    done = CliRunner().invoke(
        app, [*asked, "--shots", "1,2", "--layers", "1", "--times", "0.9", "--times", "0.5", "--out", str(file)]
    )
    assert done.exit_code == 0, done.output
    calls = [one.call for one in load(file)]
    assert len(calls) == 2 * 2  # prompts and times, of one layer
    assert {call.layer for call in calls} == {1}
    noises = [float(call.noise.max()) for call in calls]
    assert noises[0] <= 0.9
    assert noises[1] <= 0.5
    assert noises[0] > noises[1]
    replayed = CliRunner().invoke(app, ["replay", str(file), "dense", "moc", "--match", "density=0.78", "--json"])
    assert replayed.exit_code == 0, replayed.output
    assert {row["method"] for row in json.loads(replayed.stdout)["rows"]} == {"dense", "moc"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["capture"], "give RUN, a run's folder, or --model"),
        (["capture", "--model", "x"], "--model needs --prompts"),
        (["capture", "run", "--model", "x", "--prompts", "y", "--size", "9x64"], "not both"),
        (["sample"], "give RUN, a run's folder, or --model"),
        (["sample", "--model", "x"], "--model needs --prompts"),
        (["sample", "run", "--model", "x", "--prompts", "y"], "not both"),
        (["sample", "run", "--method", "moc", "--prompts", "y"], "--method is for --model"),
        (["sample", "--model", "x", "--prompts", "y", "--films", "2", "--order", "shots"], "--films, --order"),
        (["sample", "--model", "x", "--prompts", "y", "--method", "mocc", "--size", "9"], "--size must be"),
        (["sample", "--model", "x", "--prompts", "y", "--method", "mocc"], "did you mean 'moc'"),
        (["compare", "--methods", "moc", "--model", "x", "--prompts", "no/such"], "no such file: no/such"),
        (["compare", "--methods", "moc,mocc", "--model", "x", "--prompts", "y"], "did you mean 'moc'"),
        (["compare", "--methods", "moc", "--model", "x", "--prompts", "y", "--shots", "1,b"], "--shots"),
    ],
)
def test_impossible_settings_are_refused(asked, message):
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2, done.output
    assert message in done.output


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path):
    with pytest.raises(ZooError, match=r"model_index\.json is missing"):
        pretrained.load_pipeline(tmp_path)
    (tmp_path / "none.txt").write_text("# nothing\n")
    with pytest.raises(ZooError, match="has no prompt"):
        pretrained.read_prompts(tmp_path / "none.txt")


def test_a_pipeline_whose_classes_or_packages_are_not_here_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import diffusers

    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline", "_diffusers_version": "0.42.0"}')
    with pytest.raises(ZooError, match=r"model .*: it does not load: .*NoSuchPipeline"):
        pretrained.load_pipeline(tmp_path)
    # Cosmos asks for its checker when it is made of its parts.
    made = diffusers.CosmosTextToWorldPipeline
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_, **__: made(*[None] * 5))
    with pytest.raises(ZooError, match=r"it does not load: .*cosmos_guardrail"):
        pretrained.load_pipeline(tmp_path)
