"""Measures of videos: what they are by definition, and what is said where they cannot be computed."""

import hashlib
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


@pytest.fixture
def alexnet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Random weights of AlexNet where torchvision's would be, which count as its file; and what is in it."""
    draws = torch.Generator().manual_seed(0)
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    held = {}
    for i, shape in shapes.items():
        held[f"features.{i}.weight"] = torch.randn(shape, generator=draws) / math.prod(shape[1:]) ** 0.5
        held[f"features.{i}.bias"] = torch.randn(shape[0], generator=draws)
    held |= {"classifier.1.weight": torch.zeros(1, 1)}
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / video_quality.ALEXNET
    path.parent.mkdir()
    torch.save(held, path)
    monkeypatch.setattr(video_quality, "ALEXNET_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    return held


def test_lpips_is_left_out_without_the_weights_of_alexnet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / video_quality.ALEXNET
    assert video_quality.lpips_missing().endswith(f"are not at {path}")
    path.parent.mkdir()
    torch.save({"features.0.weight": torch.zeros(1)}, path)  # as a backbone at random would be
    assert "its SHA-256 must begin with 7be5be79" in video_quality.lpips_missing()
    assert video_quality.fidelity(videos(), videos(1))["lpips"] is None
    with pytest.raises(ZooError, match="is not torchvision's file"):
        video_quality.Lpips()


def test_lpips_is_that_of_its_definition(alexnet: dict[str, torch.Tensor]):
    """Section 3 of its paper, in float64, on AlexNet written out; heads are those that its authors trained."""
    import torchmetrics.functional.image.lpips as published

    heads = torch.load(
        Path(published.__file__).parent / "lpips_models" / "alex.pth", map_location="cpu", weights_only=True
    )
    shift = torch.tensor([-0.030, -0.088, -0.188]).double()[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450]).double()[:, None, None]

    def activations(frame: torch.Tensor) -> list[torch.Tensor]:
        x = ((2 * frame.double() - 1 - shift) / scale)[None]
        found = []
        for i, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
            if i in (3, 6):
                x = torch.nn.functional.max_pool2d(x, 3, 2)
            weight, bias = (alexnet[f"features.{i}.{name}"].double() for name in ("weight", "bias"))
            x = torch.nn.functional.conv2d(x, weight, bias, stride, padding).clamp(min=0)
            found.append(x[0])
        return found

    own, dense = videos(), videos(1)
    wanted = []
    for a, b in zip(torch.cat(own), torch.cat(dense), strict=True):
        distance = 0.0
        for i, (x, y) in enumerate(zip(activations(a), activations(b), strict=True)):
            difference = (x / x.norm(dim=0).clamp(min=1e-12) - y / y.norm(dim=0).clamp(min=1e-12)).square()
            distance += float((heads[f"lin{i}.model.1.weight"].double()[0] * difference).sum(0).mean())
        wanted.append(distance)
    found = video_quality.fidelity(own, dense)["lpips"]
    assert found == pytest.approx(sum(wanted) / len(wanted), rel=1e-4)
    assert found > 0.01
    assert video_quality.fidelity(own, own)["lpips"] == 0


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
