"""Rectangles as segments of one long stream, for variable-length flash attention; and the engine that torch has."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_zoo.errors import refuse
from sparse_zoo.kernels.grouped import Gather, Grouped, Rows, Weigh
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


CARRIERS = 8
"""Channels added to rows that carry log-weights: head dims are multiples of 8."""
TERMS = 3
"""Numbers in half precision whose sum is a log-weight as exactly as float32 holds it."""


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
        """Name each unmet need: package, CUDA device, half precision, one head dim, a multiple of 8 up to 256."""
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
        """Count the pairs of each rectangle, both of its sides padded to a multiple of `TILE`."""
        total = 0
        for rects in rectangles(plan, batch, heads):
            total += int((-(-rects.q_size // TILE) * -(-rects.k_size // TILE)).sum()) * TILE**2
        return total

    def forward(
        self, rects: Rectangles, at: Rows, q: Tensor, k: Tensor, v: Tensor, scale: float, weigh: Weigh | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Pack rectangles as segments, for one call of the engine at a time, and attend."""
        for some in _calls(rects):
            q_rows, k_rows, segments, weight = _packed(some, at, weigh)
            queries, keys, values = q[q_rows, None], k[k_rows, None], v[k_rows, None]
            if weight is not None:
                queries, keys, values = _carrying(queries, keys, values, weight / scale)
            out, lse = self.attend(queries, keys, values, segments, scale)
            yield q_rows, out[:, 0, : q.shape[-1]], lse[0]

    def backward(
        self, rects: Rectangles, at: Rows, saved: tuple[Tensor, ...], grad: Gather, scale: float, weigh: Weigh | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Pack rectangles as segments, for one call of the engine at a time, and compute their gradients."""
        q, k, v, out, lse = saved
        for some in _calls(rects):
            q_rows, k_rows, segments, weight = _packed(some, at, weigh)
            some_grad, some_out = grad(q_rows)[:, None], out[q_rows, None]
            queries, keys, values = q[q_rows, None], k[k_rows, None], v[k_rows, None]
            if weight is not None:
                queries, keys, values = _carrying(queries, keys, values, weight / scale)
                some_grad, some_out = (pad(x, (0, CARRIERS)) for x in (some_grad, some_out))
            found = self.gradients(some_grad, queries, keys, values, some_out, lse[None, q_rows], segments, scale)
            dq, dk, dv = (x[:, 0, : q.shape[-1]] for x in found)
            yield q_rows, dq, k_rows, dk, dv


class TorchVarlen(Varlen):
    """Torch's own: `aten._flash_attention_forward` and `_backward`, which the public `varlen_attn` calls too.

    That function is no choice here: its backward takes no lse but its own.
    """

    name = "torch"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
        """Call `aten._flash_attention_forward`, without dropout or a causal mask."""
        out, lse, *_ = flash_forward(q, k, v, *segments, 0.0, False, False, scale=scale)
        return out, lse

    def gradients(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Call `aten._flash_attention_backward` with the given out and lse, without dropout or a causal mask."""
        random = torch.zeros(2, dtype=torch.uint64, device=q.device)  # read with dropout only, which is off
        unused = torch.empty(0, device=q.device)
        dq, dk, dv = flash_backward(grad, q, k, v, out, lse, *segments, 0.0, False, random, unused, scale=scale)
        return dq, dk, dv


def _carrying(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (n, 1, D), k, v (m, 1, D) with more channels, which add `bias` (m,) to the products of each key.

    The engines have no argument for it. `TERMS` of the channels hold 1 in q, and in k numbers that sum to `bias`. The
    others are 0, as are all of those of v.
    """
    dim, most = q.shape[-1], 256 - CARRIERS
    refuse(
        "log-weights", [f"head dim {dim}; at most {most}: {CARRIERS} more channels carry them"] if dim > most else []
    )
    terms = torch.zeros(len(k), CARRIERS, dtype=k.dtype, device=k.device)
    for i in range(TERMS):
        terms[:, i] = bias
        bias = bias - terms[:, i].to(bias.dtype)
    ones = (torch.arange(CARRIERS, device=q.device) < TERMS).to(q.dtype).expand(len(q), 1, -1)
    return torch.cat([q, ones], dim=-1), torch.cat([k, terms[:, None]], dim=-1), pad(v, (0, CARRIERS))


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


def _packed(rects: Rectangles, at: Rows, weigh: Weigh | None) -> tuple[Tensor, Tensor, Segments, Tensor | None]:
    """Rows of queries and of keys of all segments one after the other, the segments' bounds, and what keys weigh."""
    rows, ends = [], []
    for listed, start, size, to_row in (
        (rects.q_list, rects.q_start, rects.q_size, at.of_queries),
        (rects.k_list, rects.k_start, rects.k_size, at.of_keys),
    ):
        end = pad(size.cumsum(0), (1, 0))
        total = int(end[-1])
        shift = (start - end[:-1]).repeat_interleave(size, output_size=total)
        place = shift + torch.arange(total, device=size.device)
        group, token = rects.group.repeat_interleave(size, output_size=total), listed[place].long()
        rows.append(to_row(group, token))
        ends.append(end.int())
    segments = Segments(ends[0], ends[1], int(rects.q_size.max()), int(rects.k_size.max()))
    return rows[0], rows[1], segments, None if weigh is None else weigh(group, token)
