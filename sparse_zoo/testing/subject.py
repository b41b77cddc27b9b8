"""What a check is given: a method with settings, films of awkward sizes, and ways to make inputs and run it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sparse_zoo.attention import Attention, Call
from sparse_zoo.kernels import get, kernels
from sparse_zoo.kernels.base import Kernel
from sparse_zoo.layout import Layout, Shot
from sparse_zoo.registry import build

BATCH, HEADS, KV_HEADS, HEAD_DIM, DIM = 2, 4, 2, 8, 6

STORY = Layout.film([Shot(3, 4, 4, 3), Shot(1, 5, 3), Shot(2, 3, 4, 2)], caption=2)
PACKED = Layout.pack(
    [Layout.film([Shot(3, 3, 4, 2), Shot(2, 2, 5, 1)], caption=1), Layout.film([Shot(1, 3, 3), Shot(2, 4, 4, 1)])]
)
SILENT = Layout.film([Shot(3, 4, 4), Shot(2, 3, 3)])
RAGGED = {
    "one-frame shots": Layout.film([Shot(1, 3, 3, 1) for _ in range(4)]),
    "empty captions": Layout.film([Shot(2, 3, 3), Shot(2, 2, 2, 1), Shot(1, 2, 3)]),
    "one token": Layout.film([Shot(1, 1, 1)]),
    "text alone": Layout.film([], caption=3),
    "sizes that no tile divides": Layout.film([Shot(5, 3, 7, 1), Shot(3, 5, 1)], caption=1),
    "one line of tokens": Layout.film([Shot(7, 1, 1), Shot(1, 1, 6, 2)]),
    "a long film beside a short one": Layout.pack([STORY, Layout.film([Shot(1, 1, 1)])]),
}
FILMS = {"story": STORY, "packed": PACKED, "silent": SILENT, **RAGGED}

LONG = Layout.film(
    [
        Shot(18, 4, 4, 3),
        Shot(1, 5, 6),
        Shot(2, 4, 5, 2),
        Shot(3, 5, 5, 1),
        Shot(1, 3, 5),
        Shot(1, 4, 6, 1),
        Shot(2, 4, 5, 2),
        Shot(1, 5, 6, 1),
    ],
    caption=3,
)
"""More than 512 tokens of video, 16 frames in a shot and 3 shots back."""
CROWD = Layout.pack(
    [
        Layout.film([Shot(2, 2, 3, 1), Shot(1, 2, 2)], caption=1),
        Layout.film([Shot(1, 3, 3)]),
        Layout.film([Shot(1, 1, 4, 1), Shot(2, 2, 2), Shot(1, 1, 2)]),
        Layout.film([Shot(1, 1, 1)], caption=2),
        Layout.film([Shot(3, 2, 2, 1)]),
        Layout.film([Shot(1, 2, 3), Shot(1, 2, 2, 1)], caption=1),
    ]
)
"""More than 4 films in a stream."""


@dataclass(frozen=True)
class Case:
    """A call unlike the small ones: its film, its sizes, how large its scores are, and what else a `Call` holds.

    Together the cases go beyond each size at which a fault may begin to show: tokens, frames, shots, films, batch
    items, heads, query heads per key head, head dim, layer, step, and noise near 0 and 1.
    """

    layout: Layout
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = HEAD_DIM
    q_scale: float = 1.0
    k_offset: float = 0.0
    context: Mapping[str, Any] = field(default_factory=dict)

    def call(self, **changes: Any) -> Call:
        """The call on random inputs; `changes` are keyword arguments of `make`."""
        sizes = {name: getattr(self, name) for name in ("batch", "heads", "kv_heads", "head_dim")}
        call = make(self.layout, **sizes | dict(self.context) | changes)
        with torch.no_grad():
            call.q.mul_(self.q_scale)
            call.k.mul_(0.1 if self.k_offset else 1.0).add_(self.k_offset)
        return call


CASES = {
    "a long film": Case(LONG, context={"layer": 9, "layers": 12, "step": 1001, "noise": 0.9995}),
    "many films, items and heads": Case(
        CROWD,
        batch=5,
        heads=10,
        kv_heads=2,
        head_dim=80,
        context={"layer": 22, "layers": 40, "step": 123_457, "noise": 1e-4},
    ),
    "large scores": Case(
        STORY, heads=5, q_scale=40.0, context={"layer": 14, "layers": 16, "step": 5_000_000, "noise": 1.0}
    ),
    "faint queries, close keys": Case(
        SILENT, q_scale=1e-3, k_offset=1.0, context={"layer": 60, "layers": 61, "step": 0, "noise": 0.0}
    ),
}


AUTO = {"kernel": "auto"}
"""A change of settings: the kernel that a user gets."""


@dataclass(frozen=True)
class Subject:
    """A method under test: its class, and the settings it is judged with."""

    name: str
    cls: type[Attention]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def build(
        self,
        changes: Mapping[str, Any] = MappingProxyType({}),
        *,
        heads: int = HEADS,
        head_dim: int = HEAD_DIM,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        start: int = 1,
    ) -> Attention:
        """The method with some settings changed, in eval mode.

        It attends by the dense mask unless told otherwise (`AUTO`): what judges a choice needs no kernel. Parameters
        are the same for the same `start`, and none is left at zero.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(start)
            given = {"kernel": "reference"} | dict(self.cls.small) | dict(self.settings) | dict(changes)
            # A schedule is no setting of the class: the registry makes one of its classes for each phase.
            make = partial(build, self.name) if "schedule" in given else self.cls
            attention = make(heads=heads, head_dim=head_dim, dim=DIM, **given)
            with torch.no_grad():
                for parameter in attention.parameters():
                    parameter.add_(0.5 * torch.randn_like(parameter))
        return attention.eval().to(device=device, dtype=dtype)

    def build_for(self, case: Case, changes: Mapping[str, Any] = MappingProxyType({}), **given: Any) -> Attention:
        """The method for the heads of a case; further arguments as `build`."""
        return self.build(changes, heads=case.heads, head_dim=case.head_dim, **given)


def make(
    layout: Layout,
    *,
    batch: int = BATCH,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    head_dim: int = HEAD_DIM,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 2,
    grad: bool = False,
    **context: Any,
) -> Call:
    """A call on random q, k, v, hidden; the same numbers for the same seed and sizes, whatever the dtype."""
    length = len(layout)
    shapes = *((batch, h, length, head_dim) for h in (heads, kv_heads, kv_heads)), (batch, length, DIM)
    q, k, v, hidden = (x.to(device=device, dtype=dtype, copy=True).requires_grad_(grad) for x in _normal(seed, shapes))
    return Call(q, k, v, layout.to(device), hidden=hidden, **context)


@lru_cache(32)
def _normal(seed: int, shapes: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    """Normal numbers in float64."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]


def usable() -> Iterator[tuple[str, str, torch.dtype, int]]:
    """Every kernel that runs here, with the device, the widest dtype and the smallest head dim that it takes.

    But for those that compile for each shape: on films of all sizes that would take minutes.
    """
    for name in kernels():
        found = place(get(name))
        if found is not None and not get(name).compiles_each_shape:
            yield name, *found


def place(kernel: Kernel) -> tuple[str, torch.dtype, int] | None:
    """The device, a GPU first, the widest dtype and smallest head dim with which a kernel runs forward and backward.

    None if it does nowhere here.
    """
    for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            for head_dim in (HEAD_DIM, 16, 32, 64, 128):
                x = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device, requires_grad=True)
                if not kernel.why_not(x, x):
                    return device, dtype, head_dim
    return None
