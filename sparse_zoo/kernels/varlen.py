"""Rectangles as segments of one long stream, for variable-length flash attention; and the engine that torch has."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_zoo.kernels.grouped import Gather, Grouped, Rows
from sparse_zoo.kernels.rectangles import Rectangles, rectangles
from sparse_zoo.plan import Plan

TILE = 128
ROWS_OF_A_CALL = 1 << 20
"""Rows of queries and keys in one call, a tile of padding for each side of each segment counted in.

Bounds the copies (at head dim 128 about 1.5 GB, backward included), and keeps segments below the 65,535 that the
grid of flash attention 2 ends at.
"""

flash_forward = torch.ops.aten._flash_attention_forward
flash_backward = torch.ops.aten._flash_attention_backward


class Segments(NamedTuple):
    """Bounds of S segments, int32 (S + 1,) from 0 on, of queries and of keys, and the longest of each."""

    q_ends: Tensor
    k_ends: Tensor
    q_most: int
    k_most: int


class Varlen(Grouped):
    """Rectangles are gathered and attended as segments. Engines differ in the two calls and in what they need."""

    lowest = (8, 0)
    """The compute capability that it needs."""

    def missing(self) -> list[str]:
        """Why its package cannot be used."""
        return []

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
        """q (n, 1, D), k, v (m, 1, D) -> out (n, 1, D), lse (1, n) natural log, float32."""

    @abstractmethod
    def gradients(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv, shaped as q, k, v, from the out and lse of all keys of each query, not of this segment alone."""

    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:
        reasons = self.missing()
        if not torch.cuda.is_available():
            reasons.append("needs a CUDA device, torch sees none")
        elif (capability := torch.cuda.get_device_capability()) < self.lowest:
            reasons.append(f"needs compute capability {self.lowest} or newer, this device has {capability}")
        if q is None or v is None:
            return reasons
        dim = q.shape[-1]
        return reasons + [
            reason
            for reason in (
                f"tensors are on {q.device}" if q.device.type != "cuda" else "",
                f"dtype {q.dtype} is not float16 or bfloat16" if q.dtype not in (torch.float16, torch.bfloat16) else "",
                f"head dim {dim} is not a multiple of 8 up to 256" if dim % 8 or dim > 256 else "",
                f"head dim of v ({v.shape[-1]}) differs from that of q ({dim})" if v.shape[-1] != dim else "",
            )
            if reason
        ]

    def executed(self, plan: Plan, batch: int, heads: int) -> int:
        total = 0
        for rects in rectangles(plan, batch, heads):
            total += int((-(-rects.q_size // TILE) * -(-rects.k_size // TILE)).sum()) * TILE**2
        return total

    def forward(
        self, rects: Rectangles, at: Rows, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for some in _calls(rects):
            q_rows, k_rows, segments = _packed(some, at)
            out, lse = self.attend(q[q_rows, None], k[k_rows, None], v[k_rows, None], segments, scale)
            yield q_rows, out[:, 0], lse[0]

    def backward(
        self, rects: Rectangles, at: Rows, saved: tuple[Tensor, ...], grad: Gather, scale: float
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        q, k, v, out, lse = saved
        for some in _calls(rects):
            q_rows, k_rows, segments = _packed(some, at)
            some_grad, some_q, some_out = grad(q_rows)[:, None], q[q_rows, None], out[q_rows, None]
            dq, dk, dv = self.gradients(
                some_grad, some_q, k[k_rows, None], v[k_rows, None], some_out, lse[None, q_rows], segments, scale
            )
            yield q_rows, dq[:, 0], k_rows, dk[:, 0], dv[:, 0]


class TorchVarlen(Varlen):
    """Torch's own: `aten._flash_attention_forward` and `_backward`, which the public `varlen_attn` calls too.

    That function is no choice here: its backward takes no lse but its own.
    """

    name = "torch"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = flash_forward(q, k, v, *segments, 0.0, False, False, scale=scale)
        return out, lse

    def gradients(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        random = torch.zeros(2, dtype=torch.uint64, device=q.device)  # read with dropout only, which is off
        unused = torch.empty(0, device=q.device)
        dq, dk, dv = flash_backward(grad, q, k, v, out, lse, *segments, 0.0, False, random, unused, scale=scale)
        return dq, dk, dv


def _calls(rects: Rectangles) -> Iterator[Rectangles]:
    """Runs of rectangles of bounded size; one that passes the bound alone goes alone."""
    start, held = 0, 0
    for place, size in enumerate((rects.q_size + rects.k_size + 2 * TILE).tolist()):
        if held and held + size > ROWS_OF_A_CALL:
            yield rects.select(slice(start, place))
            start, held = place, 0
        held += size
    if held:
        yield rects.select(slice(start, len(rects)))


def _packed(rects: Rectangles, at: Rows) -> tuple[Tensor, Tensor, Segments]:
    """Rows of queries and of keys of all segments one after the other, and the segments' bounds."""
    rows, ends = [], []
    for listed, start, size, to_row in (
        (rects.q_list, rects.q_start, rects.q_size, at.of_queries),
        (rects.k_list, rects.k_start, rects.k_size, at.of_keys),
    ):
        end = pad(size.cumsum(0), (1, 0))
        total = int(end[-1])
        shift = (start - end[:-1]).repeat_interleave(size, output_size=total)
        place = shift + torch.arange(total, device=size.device)
        rows.append(to_row(rects.group.repeat_interleave(size, output_size=total), listed[place].long()))
        ends.append(end.int())
    return rows[0], rows[1], Segments(ends[0], ends[1], int(rects.q_size.max()), int(rects.k_size.max()))
