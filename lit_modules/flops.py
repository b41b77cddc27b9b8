"""FLOPs of a VideoDiT without its registered attention, from its shape alone."""

from __future__ import annotations

from dataclasses import dataclass

import sparse_zoo as zoo
from lit_modules.dit import TEXT, own_captions
from lit_modules.stream import stream, video_only
from sparse_zoo.errors import refuse, unknown


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, a multiply and an add counted as two; they can be added."""

    forward: int
    backward: int

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    @property
    def both(self) -> int:
        """Forward plus backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class ModelShape:
    """The arguments of a `VideoDiT` that determine its FLOPs; `patch_size` is the number of values in a patch."""

    dim: int = 1536
    depth: int = 30
    heads: int = 12
    mlp_ratio: float = 4.0
    text: str = "joint"
    patch_size: int = 64

    def __post_init__(self) -> None:
        sizes = {"dim": self.dim, "depth": self.depth, "heads": self.heads, "patch_size": self.patch_size}
        refuse(
            "model",
            [f"{name} must be at least 1, got {size}" for name, size in sizes.items() if size < 1]
            + ([f"mlp_ratio must be more than 0, got {self.mlp_ratio}"] if self.mlp_ratio <= 0 else [])
            + ([f"heads must divide dim, got dim {self.dim} and {self.heads} heads"] if self._uneven else [])
            + ([unknown("text mode", self.text, TEXT)] if self.text not in TEXT else []),
        )

    @property
    def _uneven(self) -> bool:
        return self.heads >= 1 and self.dim % self.heads != 0

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.dim // self.heads


def inner(shape: ModelShape, layout: zoo.Layout) -> zoo.Layout:
    """The stream that the registered attention sees: the whole layout, or with cross-attention its video."""
    return layout if shape.text == "joint" else video_only(layout)


def linear_flops(shape: ModelShape, layout: zoo.Layout, batch: int) -> Flops:
    """FLOPs of every linear layer, 2 · rows · in · out forward; `layout` is the joint one, captions included.

    Backward takes as much for the weights and as much for the input. Two layers need no gradient of the input: that of
    the patches and the first of the noise time.
    """
    dim, hidden = shape.dim, int(shape.mlp_ratio * shape.dim)
    table = stream(layout)
    video, words, length = len(table.video), len(table.text), len(inner(shape, layout))
    conditions = len(table.film_of_shot) + len(table.shots_of_film)  # one for each shot and each global caption
    block = [(length, dim, 3 * dim), (length, dim, dim), (conditions, dim, 6 * dim)]  # qkv, out, modulation
    block += [(length, dim, hidden), (length, hidden, dim)]
    if shape.text == "cross" and words:
        block += [(video, dim, dim), (words, dim, 2 * dim), (video, dim, dim)]  # q, kv, out
    rest = [
        (conditions, dim, dim),
        (conditions, dim, 2 * dim),
        (video, dim, shape.patch_size),
    ]  # time, modulation, final
    first = [(video, shape.patch_size, dim), (conditions, dim, dim)]  # patches, time

    def count(layers: list[tuple[int, int, int]]) -> int:
        return 2 * batch * sum(rows * given * made for rows, given, made in layers)

    inside, outside = shape.depth * count(block) + count(rest), count(first)
    return Flops(inside + outside, 2 * inside + outside)


def caption_flops(shape: ModelShape, layout: zoo.Layout, batch: int) -> Flops:
    """FLOPs of cross-attention to captions, without its linear layers: 4 and 10 · pairs · dim; 0 in a joint stream."""
    if shape.text == "joint" or not bool(layout.is_text.any()):
        return Flops(0, 0)
    pairs = int(own_captions(layout, inner(shape, layout)).pairs.sum())
    return Flops(4 * shape.depth * batch * pairs * shape.dim, 10 * shape.depth * batch * pairs * shape.dim)
