"""Rectangles by batched matrix products: any device, any head dim, float32 without TF32. Not for speed.

Rectangles of about one size are padded to one shape and multiplied together: the number of launches depends on how
many sizes there are, not on how many rectangles. On CUDA, contributions to a row that is in several rectangles are
added in no fixed order, so that last bits may differ between runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from sparse_zoo.kernels.grouped import Gather, Grouped, Rows, Weigh, pad_rectangles
from sparse_zoo.kernels.rectangles import Rectangles, rectangles
from sparse_zoo.plan import Plan

ELEMENTS = 1 << 24
"""Scores and elements of gathered rows that a batch holds at most: 64 MiB in float32."""
GRID = 65_535
"""Most rectangles in a batch: where a grid dimension of CUDA ends, which batched products may put them in."""
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
        """Count the pairs of all rectangles, each padded to the most queries and the most keys of its size class."""
        return sum(
            len(some) * int(some.q_size.max()) * int(some.k_size.max())
            for rects in rectangles(plan, batch, heads)
            for some in _size_classes(rects)
        )

    def forward(
        self, rects: Rectangles, at: Rows, q: Tensor, k: Tensor, v: Tensor, scale: float, weigh: Weigh | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Attend by batched matrix products in float32 or wider, to one padded batch of rectangles at a time."""
        for q_rows, q_mask, k_rows, k_mask in _batches(rects, at, q, weigh):
            with _in_full(q.device):
                scores = _wide(q, q_rows) @ _wide(k, k_rows).mT * scale + k_mask
                lse = scores.logsumexp(-1)
                out = (scores - lse[..., None]).exp() @ _wide(v, k_rows)
            yield q_rows.flatten(), out.flatten(0, 1).to(q.dtype), (lse + q_mask).flatten()

    def backward(
        self, rects: Rectangles, at: Rows, saved: tuple[Tensor, ...], grad: Gather, scale: float, weigh: Weigh | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Compute the weights again from the saved lse, and the gradients from them, in float32 or wider."""
        q, k, v, out, lse = saved
        for q_rows, q_mask, k_rows, k_mask in _batches(rects, at, q, weigh):
            with _in_full(q.device):
                queries, keys, values = _wide(q, q_rows), _wide(k, k_rows), _wide(v, k_rows)
                out_grad = grad(q_rows).to(queries.dtype)
                # A query that is there for padding gives every key the weight exp(-inf), so it adds no gradient.
                weights = (queries @ keys.mT * scale + k_mask - (lse[q_rows] - q_mask)[..., None]).exp()
                delta = (out_grad * _wide(out, q_rows)).sum(-1, keepdim=True)
                d_scores = weights * (out_grad @ values.mT - delta) * scale
                dq, dk, dv = d_scores @ keys, d_scores.mT @ queries, weights.mT @ out_grad
            yield q_rows.flatten(), dq.flatten(0, 1), k_rows.flatten(), dk.flatten(0, 1), dv.flatten(0, 1)


def _size_classes(rects: Rectangles) -> Iterator[Rectangles]:
    """The rectangles whose numbers of queries and of keys round up to the same powers of two, for each such pair."""
    q_class, k_class = (size.double().log2().ceil() for size in (rects.q_size, rects.k_size))
    size_class, order = (q_class * 64 + k_class).sort(stable=True)
    counts = size_class.unique_consecutive(return_counts=True)[1].tolist()
    rects = rects.select(order)
    for count, end in zip(counts, accumulate(counts), strict=True):
        yield rects.select(slice(end - count, end))


def _batches(
    rects: Rectangles, at: Rows, q: Tensor, weigh: Weigh | None
) -> Iterator[tuple[Tensor, Tensor | float, Tensor, Tensor | float]]:
    """Rows of queries (R, n) and of keys (R, m) of R rectangles of one size class, each followed by its mask.

    The masks, 0 or (R, n) and (R, 1, m), are -inf for padding; that of the keys has their log-weights.
    """
    dim = q.shape[-1]
    for some in _size_classes(rects):
        of_query = int(some.k_size.max()) + dim  # elements that a query adds
        of_rectangle = int(some.q_size.max()) * of_query + int(some.k_size.max()) * dim
        most = max(1, min(GRID, ELEMENTS // of_rectangle))
        for first in range(0, len(some), most):
            q_rows, q_pad, k_rows, k_mask = pad_rectangles(some.select(slice(first, first + most)), at, q.dtype, weigh)
            q_mask = 0.0 if q_pad is None else torch.where(q_pad, -torch.inf, 0.0)
            # A rectangle too large for one batch is alone, hence without padding, and is cut between queries.
            for rows in q_rows.split(max(1, ELEMENTS // (most * of_query)), dim=1):
                yield rows, q_mask, k_rows, 0.0 if k_mask is None else k_mask[:, 0]


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
