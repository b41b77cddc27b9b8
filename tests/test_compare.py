"""Pretrained pipelines from the command line: compared, captured, replayed."""

import json
import math
from pathlib import Path

import av
import pytest
import torch
from typer.testing import CliRunner

from experiments.cli import app
from experiments.inspection import pretrained
from experiments.inspection.capture import load
from experiments.tools.tiny_models import write
from sparse_zoo.errors import ZooError

SIZE = ["--frames", "9", "--height", "64", "--width", "96", "--steps", "2", "--shots", "1,2"]


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
    asked = ["compare", "moc:top_k=1", "moc:top_k=9,causal=null", "--model", str(model), "--prompts", str(prompts)]
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


def test_psnr_is_that_of_its_definition():
    draws = torch.Generator().manual_seed(0)
    dense = [torch.rand(3, 3, 16, 16, generator=draws) for _ in range(2)]
    own = [(x + 0.1 * torch.randn(x.shape, generator=draws)).clamp(0, 1) for x in dense]
    wanted = -10 * math.log10((torch.cat(own).double() - torch.cat(dense).double()).square().mean())
    assert pretrained._judged(own, dense)["psnr"] == pytest.approx(wanted, rel=1e-5)
    assert pretrained._judged(dense, dense) == {"psnr": None, "ssim": pytest.approx(1)}


def test_methods_are_compared_at_one_density(model: Path, prompts: Path, tmp_path: Path):
    asked = ["compare", "moc", "sta", "--match", "density=0.78", "--model", str(model), "--prompts", str(prompts)]
    done = CliRunner().invoke(app, [*asked, *SIZE, "--out", str(tmp_path / "page")])
    rows = {row["method"]: row for row in json.loads((tmp_path / "page" / "compare.json").read_text())["rows"]}
    assert rows["moc"]["density"] == pytest.approx(0.78, rel=0.05)
    if rows["sta"]["failed"]:  # its reason is on the screen, and the exit code says so
        assert done.exit_code == 1
        assert "sta" in done.output
    else:
        assert rows["sta"]["density"] == pytest.approx(0.78, rel=0.05)


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
        (["compare", "moc", "--model", "x", "--prompts", "no/such"], "no such file: no/such"),
        (["compare", "mocc", "--model", "x", "--prompts", "y"], "did you mean 'moc'"),
        (["compare", "moc", "--model", "x", "--prompts", "y", "--shots", "1,b"], "--shots"),
    ],
)
def test_what_cannot_be_is_refused(asked, message):
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2, done.output
    assert message in done.output


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path):
    with pytest.raises(ZooError, match=r"model_index\.json is missing"):
        pretrained.load_pipeline(tmp_path)
    (tmp_path / "none.txt").write_text("# nothing\n")
    with pytest.raises(ZooError, match="has no prompt"):
        pretrained.read_prompts(tmp_path / "none.txt")
