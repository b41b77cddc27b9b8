"""Rectangles by plain matrix products, in blocks: any device, any head dim, float32 without TF32. Not for speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparse_zoo.kernels.grouped import Gather, Grouped, Rows, Weigh
from sparse_zoo.kernels.rectangles import Rectangles, rectangles
from sparse_zoo.plan import Plan

PAIRS = 1 << 24
"""Scores that are held at a time: 64 MiB in float32."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Exact(Grouped):
    """What runs where no flash attention does, float32 on CUDA above all. Half precision is computed in float32."""

    name = "exact"

    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:
        """Name each unmet need: a CUDA device, a dtype of `FLOATS`, the same head dim for q and v."""
        reasons = [] if torch.cuda.is_available() else ["needs a CUDA device, torch sees none (cpu is as exact)"]
        if q is None or v is None:
            return reasons
        reasons += [
            f"tensors are on {q.device}, not cuda" if q.device.type != "cuda" else "",
            f"head dim of v ({v.shape[-1]}) differs from that of q ({q.shape[-1]})"
            if v.shape[-1] != q.shape[-1]
            else "",
            f"dtype {q.dtype} is none of {', '.join(map(str, FLOATS))}" if q.dtype not in FLOATS else "",
        ]
        return [reason for reason in reasons if reason]

    def executed(self, plan: Plan, batch: int, heads: int) -> int:
        """Count the pairs of all rectangles: no padding is added."""
        return sum(int((rects.q_size * rects.k_size).sum()) for rects in rectangles(plan, batch, heads))

    def forward(
        self, rects: Rectangles, at: Rows, q: Tensor, k: Tensor, v: Tensor, scale: float, weigh: Weigh | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Attend by plain matrix products in float32 or wider, to some queries of a rectangle at a time."""
        for q_rows, k_rows, weight in _blocks(rects, at, weigh):
            with _in_full(q.device):
                scores = _wide(q, q_rows) @ _wide(k, k_rows).mT * scale + weight
                lse = scores.logsumexp(-1)
                out = (scores - lse[:, None]).exp() @ _wide(v, k_rows)
            yield q_rows, out.to(q.dtype), lse

    def backward(
        self, rects: Rectangles, at: Rows, saved: tuple[Tensor, ...], grad: Gather, scale: float, weigh: Weigh | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Compute the weights again from the saved lse, and the gradients from them, in float32 or wider."""
        q, k, v, out, lse = saved
        for q_rows, k_rows, weight in _blocks(rects, at, weigh):
            with _in_full(q.device):
                queries, keys, values = _wide(q, q_rows), _wide(k, k_rows), _wide(v, k_rows)
                asked = grad(q_rows).to(queries.dtype)
                weights = (queries @ keys.mT * scale + weight - lse[q_rows, None]).exp()
                delta = (asked * _wide(out, q_rows)).sum(-1, keepdim=True)
                scores = weights * (asked @ values.mT - delta) * scale
                found = scores @ keys, scores.mT @ queries, weights.mT @ asked
            yield q_rows, found[0], k_rows, found[1], found[2]


def _blocks(rects: Rectangles, at: Rows, weigh: Weigh | None) -> Iterator[tuple[Tensor, Tensor, Tensor | float]]:
    """Rows of queries and of keys of each rectangle, some queries at a time, and the keys' log-weights."""
    table = [x.tolist() for x in (rects.group, rects.q_start, rects.q_size, rects.k_start, rects.k_size)]
    for i, (_, q_start, q_size, k_start, k_size) in enumerate(zip(*table, strict=True)):
        group = rects.group[i]
        tokens = rects.k_list[k_start : k_start + k_size]
        keys, weight = at.of_keys(group, tokens), 0.0 if weigh is None else weigh(group, tokens)
        for queries in rects.q_list[q_start : q_start + q_size].split(max(1, PAIRS // k_size)):
            yield at.of_queries(group, queries), keys, weight


def _wide(x: Tensor, rows: Tensor) -> Tensor:
    found = x[rows]
    return found if found.dtype == torch.float64 else found.float()


@contextmanager
def _in_full(device: torch.device) -> Iterator[None]:
    """Products in the precision of their factors: neither TF32 nor what autocast would narrow them to."""
    # Never by `allow_tf32` too: torch raises where the old setting and the new one are both used.
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        products.fp32_precision = before
