"""Gathers and sums by index whose results and gradients do not depend on the order in which threads finish.

Floating-point addition is not associative, so rows that share an index must be added in a fixed order, or two equal
runs differ in the last bit. Which operator does so depends on the device:

- CPU: `index_add` adds one row after the other. The backward of advanced indexing, `x[:, index]`, does not: threads add
  to the same row in any order.
- CUDA: `index_put(accumulate=True)`, also the backward of advanced indexing, sorts the index first. `index_add`, also
  the backward of `index_select`, uses atomic additions in any order.
- meta: as CUDA, for which it stands in.
"""

from __future__ import annotations

import torch
from torch import Tensor


def take(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Rows of `x` along `dim`; the gradient adds rows that were taken more than once in a fixed order.

    Args:
        x: Any shape.
        dim: The dimension that is indexed.
        index: int64, any shape, which replaces `dim` in the result.
    """
    if x.device.type != "cpu":
        return x[(slice(None),) * (dim % x.dim()) + (index,)]
    rows: Tensor = x.index_select(dim, index.flatten()).unflatten(dim, index.shape)
    return rows


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x (B, H, n, D), 0 for row -1.

    Args:
        x: (B, H, n, D).
        rows: int64 (m,), or (B|1, H|1, m) where batch items or heads take different ones.
    """
    at, none = rows.clamp(min=0), (rows < 0)[..., None]
    if rows.dim() == 1:
        return take(x, 2, at).masked_fill(none, 0)
    batch, heads, length, _ = x.shape
    first = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * length
    return take(x.flatten(0, 2), 0, first + at).masked_fill(none, 0)


def add_at(x: Tensor, dim: int, index: Tensor, rows: Tensor) -> Tensor:
    """`x.index_add(dim, index, rows)` that adds rows with the same index in a fixed order."""
    if x.device.type != "cpu":
        summed: Tensor = torch.ops.aten.index_put(x, [*[None] * (dim % x.dim()), index], rows, True)
        return summed
    return x.index_add(dim, index, rows)
