"""Pictures of plans as files: of a small film for `zoo map`, of the plans that a run ended with for its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparse_zoo as zoo
from sparse_zoo.picture import PAPER, picture

HEADS, HEAD_DIM = 2, 16
FILM = zoo.Layout.film([zoo.Shot(frames, 4, 6, text=8) for frames in (4, 2, 5, 3)], caption=6)


@dataclass(frozen=True)
class Map:
    """One method's plans on the small film: branches side by side, uint8 (H, W, 3); densities by branch and in all."""

    image: Tensor
    tokens: int
    densities: list[float]
    density: float


def sample_map(method: str, settings: Mapping[str, Any]) -> Map:
    """Draw a method's first head on the small film; raises `ZooError` as `zoo.build` does."""
    attention = zoo.build(method, heads=HEADS, head_dim=HEAD_DIM, dim=HEADS * HEAD_DIM, **settings)
    draws = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, len(FILM), HEAD_DIM, generator=draws)
    hidden = torch.randn(1, len(FILM), HEADS * HEAD_DIM, generator=draws)
    with torch.no_grad():
        result = attention.eval()(q, k, v, FILM, hidden=hidden, step=0)
    images = [picture(plan, FILM, pixels=512) for plan in result.plans]
    densities = [plan.cost(HEAD_DIM, layout=FILM, batch=1, heads=HEADS).density for plan in result.plans]
    return Map(side_by_side(images), len(FILM), densities, result.cost().density)


def of_results(results: Sequence[zoo.Result], folder: Path) -> list[dict[str, str]]:
    """Write the plans of every layer's branches, first batch item and head: [{"file", "label"}], in order."""
    written = []
    for layer, result in enumerate(results):
        for branch, plan in enumerate(result.plans):
            label = f"layer {layer + 1}" + (f", branch {branch + 1}" if len(result.plans) > 1 else "")
            path = save(picture(plan, result.layout), folder / f"plan-{layer + 1}-{branch + 1}.png")
            written.append({"file": path.name, "label": label})
    return written


def side_by_side(images: Sequence[Tensor], gap: int = 12) -> Tensor:
    """Images of one height, uint8 (H, W, 3), in a row."""
    space = torch.tensor(PAPER, dtype=torch.uint8).expand(images[0].shape[0], gap, 3)
    pieces = [piece for image in images for piece in (space, image)]
    return torch.cat(pieces[1:], dim=1)


def save(image: Tensor, path: Path) -> Path:
    """A uint8 (H, W, 3) tensor as PNG."""
    from matplotlib.image import imsave

    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, image.numpy())
    return path
