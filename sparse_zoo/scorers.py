"""Scorers: what a block of queries makes of each block of keys, in slices of rows, without gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparse_zoo.blocks import SLICE, members, pooled, products
from sparse_zoo.partition import Partition
from sparse_zoo.remember import remembered
from sparse_zoo.selectors import Scores


@torch.no_grad()
def means(q: Tensor, k: Tensor, queries: Partition, keys: Partition, *, scale: float = 1.0) -> Scores:
    """scale · mean(Q_i) · mean(K_j), the usual proxy.

    Args:
        q: (B, H, L, D).
        k: (B, Hk, L, D).
        queries: The blocks of queries.
        keys: The blocks of keys.
        scale: Factor of the products.

    Returns:
        Slices of float32 scores (B, H, rows, keys).
    """
    yield from products(pooled(queries, q) * scale, pooled(keys, k))


@torch.no_grad()
def sub_blocks(q: Tensor, k: Tensor, blocks: Partition, parts: tuple[Partition, Partition], *, scale: float) -> Scores:
    """log Σ exp(scale · mean(Q_ia) · mean(K_jb)) over the parts a, b that blocks i and j are cut into.

    Args:
        q: (B, H, L, D).
        k: (B, Hk, L, D).
        blocks: The blocks of queries and of keys.
        parts: The pieces that blocks of queries, and those of keys, are cut into.
        scale: That of attention.

    Returns:
        Slices of float32 scores (B, H, rows, blocks).
    """
    (of_q, no_q), (of_k, no_k) = (inside(blocks, pieces) for pieces in parts)
    q = _tabled(pooled(parts[0], q) * scale, of_q)
    k = _tabled(pooled(parts[1], k), of_k).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    for some, scores in _tables(q, k):
        scores = scores.masked_fill(no_q[some][:, :, None, None] | no_k, -torch.inf)
        yield some, scores.logsumexp((3, 5))


@torch.no_grad()
def maxima(q: Tensor, k: Tensor, queries: Partition, keys: Partition, *, every: int, scale: float) -> Scores:
    """The largest of scale · (q · k - max over all keys of the film) over the tokens of both blocks, always below 0.

    Pyramid sparse attention ranks blocks by it: how near a block of keys comes to being the best of any query.

    Args:
        q: (B, H, L, D).
        k: (B, Hk, L, D).
        queries: The blocks of queries.
        keys: The blocks of keys.
        every: One token in so many of each block is looked at.
        scale: That of attention.

    Returns:
        Slices of float32 scores (B, H, rows, keys).
    """
    (of_q, no_q), (of_k, no_k) = (_every(pieces, every) for pieces in (queries, keys))
    film = queries.sample[:, None] == keys.sample
    q = _tabled(q * scale, of_q)
    k = _tabled(k, of_k).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    for some, scores in _tables(q, k):
        best = scores.masked_fill(no_k, -torch.inf).amax(5)  # (B, H, rows, tokens, keys)
        best = best.masked_fill(~film[some][:, None], -torch.inf)
        best = best - best.amax(-1, keepdim=True)
        yield some, best.masked_fill(no_q[some][:, :, None], -torch.inf).amax(3)


@remembered(64)
def inside(blocks: Partition, parts: Partition) -> tuple[Tensor, Tensor]:
    """The parts that lie in each block: int64 (blocks, most), and where a block has fewer, bool."""
    table = members(Partition.from_labels(parts.of(blocks.piece_of[0, 0]), blocks.count))
    return table.clamp(min=0), table < 0


def _every(pieces: Partition, every: int) -> tuple[Tensor, Tensor]:
    table = members(pieces)[:, ::every]
    return table.clamp(min=0), table < 0


def _tabled(x: Tensor, table: Tensor) -> Tensor:
    """Rows of x (B, H, n, D) by a table (P, m): float32 (B, H, P, m, D)."""
    return x[:, :, table].float()


def _tables(q: Tensor, k: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Products of q (B, H, Q, a, D) and k (B, H, K, b, D), some rows at a time: (B, H, rows, a, K, b)."""
    batch, heads, _, inner, _ = q.shape
    columns = k.flatten(2, 3)
    rows = max(1, SLICE // max(1, batch * heads * inner * columns.shape[2]))
    for start in range(0, q.shape[2], rows):
        some = slice(start, start + rows)
        with torch.autocast(q.device.type, enabled=False):
            scores = q[:, :, some].flatten(2, 3) @ columns.mT
        yield some, scores.unflatten(3, k.shape[2:4]).unflatten(2, (-1, inner))
