"""Small ragged films and models that several tests share."""

from typing import Any

import torch

import sparse_zoo as zoo
from lit_modules import VideoDiT

PATCH = (2, 2, 2)
VOCABULARY = 20
FIRST = zoo.Layout.film([zoo.Shot(2, 3, 3, 4), zoo.Shot(3, 3, 3, 2)], caption=3)
SECOND = zoo.Layout.film([zoo.Shot(1, 2, 4), zoo.Shot(2, 3, 2, 1), zoo.Shot(1, 1, 1, 1)])
SILENT = zoo.Layout.film([zoo.Shot(2, 2, 2), zoo.Shot(1, 2, 3)])
PACKED = zoo.Layout.pack([FIRST, SECOND, SILENT])

SETTINGS: dict[str, dict[str, Any]] = {
    "moc": {"top_k": 1, "chunk": "frame"},
    "moc_fixed": {"top_k": 2, "chunk_tokens": 8},
    "moga": {"groups": 2},
    "window": {"tile": [1, 2, 2], "window": [3, 1, 1]},
}
METHODS: dict[str, dict[str, Any]] = {
    name: SETTINGS.get(name, dict(zoo.get(name).small))
    for name in zoo.names()
    if zoo.get(name).__module__.startswith("sparse_zoo.methods.")
}


def attention(name: str) -> dict[str, Any]:
    return {"name": name, **METHODS[name]}


def batch(layout: zoo.Layout, size: int = 1, seed: int = 0) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(seed)
    f, h, w = PATCH
    shots = [shot for film in layout.films for shot in film.shots]
    return {
        "layout": layout,
        "clips": [torch.rand(size, s.frames * f, 3, s.rows * h, s.cols * w, generator=draws) * 2 - 1 for s in shots],
        "text": torch.randint(VOCABULARY, (size, int(layout.is_text.sum())), generator=draws),
    }


def arguments(**changes: Any) -> dict[str, Any]:
    return {
        "dim": 32,
        "depth": 2,
        "heads": 2,
        "channels": 3,
        "patch": PATCH,
        "vocabulary": VOCABULARY,
        "attention": {"name": "dense"},
    } | changes


def open_model(**changes: Any) -> VideoDiT:
    """A model whose gates are open: at its start a DiT gives 0, whatever its attention does."""
    torch.manual_seed(0)
    model = VideoDiT(**arguments(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return model
