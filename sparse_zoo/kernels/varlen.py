"""The `torch` engine: torch's own variable-length flash attention on CUDA, rectangles as segments."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_zoo.kernels.grouped import Grouped, Rows
from sparse_zoo.kernels.rectangles import Rectangles, rectangles
from sparse_zoo.plan import Plan

SEGMENTS = 32_768
"""Segments a call: flash attention numbers them in a grid dimension that stops at 65,535."""
TILE = 128

flash_forward = torch.ops.aten._flash_attention_forward
flash_backward = torch.ops.aten._flash_attention_backward


class TorchVarlen(Grouped):
    """Rectangles are gathered and go through `aten._flash_attention_forward` and `_backward` as segments."""

    name = "torch"

    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:
        reasons = []
        if not torch.cuda.is_available():
            reasons.append("needs a CUDA device, torch sees none")
        elif torch.cuda.get_device_capability() < (8, 0):
            reasons.append(
                f"needs compute capability 8.0 or newer, this device has {torch.cuda.get_device_capability()}"
            )
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
        for some in _segments(rects):
            q_rows, k_rows, ends = _flat(some, at)
            out, lse, *_ = flash_forward(
                *(x[rows][:, None] for rows, x in ((q_rows, q), (k_rows, k), (k_rows, v))),
                *ends,
                0.0,
                False,
                False,
                scale=scale,
            )
            yield q_rows, out[:, 0], lse[0]

    def backward(
        self, rects: Rectangles, at: Rows, saved: tuple[Tensor, ...], grad: Tensor, scale: float
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        q, k, v, out, lse = saved
        for some in _segments(rects):
            q_rows, k_rows, ends = _flat(some, at)
            unused = torch.empty(0, dtype=torch.int64, device=q.device)  # the state of a dropout that is off
            dq, dk, dv = flash_backward(
                *(
                    x[rows][:, None]
                    for rows, x in ((q_rows, grad), (q_rows, q), (k_rows, k), (k_rows, v), (q_rows, out))
                ),
                lse[q_rows][None],
                *ends,
                0.0,
                False,
                unused,
                unused,
                scale=scale,
            )
            yield q_rows, dq[:, 0], k_rows, dk[:, 0], dv[:, 0]


def _segments(rects: Rectangles) -> Iterator[Rectangles]:
    for start in range(0, len(rects), SEGMENTS):
        yield rects.select(slice(start, start + SEGMENTS))


def _flat(rects: Rectangles, at: Rows) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, int, int]]:
    """Rows of all segments one after the other, and (ends of queries, ends of keys, longest, longest)."""
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
    return rows[0], rows[1], (ends[0], ends[1], int(rects.q_size.max()), int(rects.k_size.max()))
