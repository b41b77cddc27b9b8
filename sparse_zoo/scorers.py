"""Scorers: what a block of queries makes of each block of keys, in slices of rows, without gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparse_zoo.blocks import film_by_film, members, pooled, products, slice_of
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
def sub_blocks(q: Tensor, k: Tensor, blocks: Partition, parts: tuple[Partition, Partition]) -> Scores:
    """log Σ exp(mean(Q_ia) · mean(K_jb) / √D) over the parts a, b that blocks i and j are cut into.

    Args:
        q: (B, H, L, D).
        k: (B, Hk, L, D).
        blocks: The blocks of queries and of keys.
        parts: The pieces that blocks of queries, and those of keys, are cut into.

    Returns:
        Slices of float32 scores (B, H, rows, blocks).
    """
    (of_q, no_q), (of_k, no_k) = (inside(blocks, pieces) for pieces in parts)
    q = _tabled(pooled(parts[0], q) * q.shape[-1] ** -0.5, of_q)
    k = _tabled(pooled(parts[1], k), of_k).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    for some, scores in _tables(q, k):
        scores = scores.masked_fill(no_q[some][:, :, None, None] | no_k, -torch.inf)
        yield some, scores.logsumexp((3, 5))


@torch.no_grad()
def maxima(q: Tensor, k: Tensor, queries: Partition, keys: Partition, *, every: int) -> Scores:
    """The largest of (q · k - max over all keys of the film) / √D over the tokens of both blocks, always below 0.

    Pyramid sparse attention ranks blocks by it: how near a block of keys comes to being the best of any query.

    Args:
        q: (B, H, L, D).
        k: (B, Hk, L, D).
        queries: The blocks of queries.
        keys: The blocks of keys.
        every: One token in so many of each block is looked at.

    Returns:
        Slices of float32 scores (B, H, rows, keys).
    """
    (of_q, no_q), (of_k, no_k) = (_every(pieces, every) for pieces in (queries, keys))
    film = queries.sample[:, None] == keys.sample
    q = _tabled(q * q.shape[-1] ** -0.5, of_q)
    k = _tabled(k, of_k).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    for some, scores in _tables(q, k):
        best = scores.masked_fill(no_k, -torch.inf).amax(5)  # (B, H, rows, tokens, keys)
        best = best.masked_fill(~film[some][:, None], -torch.inf)
        best = best - best.amax(-1, keepdim=True)
        yield some, best.masked_fill(no_q[some][:, :, None], -torch.inf).amax(3)


@torch.no_grad()
def antidiagonals(q: Tensor, k: Tensor, blocks: Partition, stride: int) -> Scores:
    """How much attention a block gives to a block: Σ over their groups of the softmax of antidiagonal sums.

    A group is `stride` neighbours of a block; a group of queries scores one of keys by
    Σ_i q[stride - 1 - i] · k[i] / (stride · √D), and the softmax runs over all groups of keys of the film.

    Args:
        q: (B, H, L, D).
        k: (B, Hk, L, D).
        blocks: The blocks of queries and of keys.
        stride: Tokens of a group; the last of a block may have fewer, whose products are 0.

    Returns:
        Slices of float32 scores (B, H, rows, blocks), at least 0; -inf for blocks of other films.
    """
    batch, heads, _, dim = q.shape
    for film, slots in groups(blocks, stride):
        count, most, _ = slots.shape
        keys = _side_by_side(k, slots).repeat_interleave(heads // k.shape[1], dim=1).transpose(-1, -2)
        empty = slots[..., 0] < 0
        step = max(1, slice_of(q) // (batch * heads * count * most * most))
        for start in range(0, count, step):
            rows = slots[start : start + step]
            with torch.autocast(q.device.type, enabled=False):
                scores = _side_by_side(q, rows.flip(-1)) @ keys / (stride * dim**0.5)
            held = scores.masked_fill(empty.flatten(), -torch.inf).softmax(-1)
            held = held.masked_fill(empty[start : start + step].flatten()[:, None], 0)
            found = held.new_full((batch, heads, len(rows), blocks.count), -torch.inf)
            found[..., film] = held.view(batch, heads, -1, most, count, most).sum((3, 5))
            yield slice(film.start + start, film.start + start + len(rows)), found


@remembered(64)
def groups(blocks: Partition, stride: int) -> list[tuple[slice, Tensor]]:
    """For each film with blocks: which they are, and the tokens of their groups of `stride` neighbours.

    Tokens are int64 (blocks, groups, stride), -1 where a group or block has fewer.
    """
    table = members(blocks)
    table = torch.nn.functional.pad(table, (0, -table.shape[1] % stride), value=-1).unflatten(1, (-1, stride))
    return [(film, table[film]) for film in film_by_film(blocks)]


def _side_by_side(x: Tensor, slots: Tensor) -> Tensor:
    """The tokens of each group side by side, 0 where there is none: (B, H, L, D) -> float32 (B, H, groups, S · D)."""
    found = x[:, :, slots.clamp(min=0)].float().masked_fill(slots[..., None] < 0, 0)
    return found.flatten(4).flatten(2, 3)


class Pruned(NamedTuple):
    """Which queries of each block are kept, and what the others read.

    Attributes:
        tokens: bool (B, H, L), which tokens are kept.
        rows: int64 (B, H, L), the row that each token reads: the kept token of its block nearest to it in order.
        means: float32 (B, H, blocks, D), the means of the kept queries.
    """

    tokens: Tensor
    rows: Tensor
    means: Tensor


@torch.no_grad()
def pruned(q: Tensor, blocks: Partition, share: float) -> Pruned:
    """Keep the queries of each block that are least like the one in its middle, by cosine.

    Args:
        q: (B, H, L, D).
        blocks: The blocks.
        share: Share of a block's queries that is kept, rounded down, at least one.
    """
    (batch, heads, length, _), table = q.shape, members(blocks)
    held, size = table >= 0, blocks.sizes[0, 0]
    own = _tabled(q, table.clamp(min=0))
    middle = own.gather(3, (size // 2)[:, None, None].expand(*own.shape[:3], 1, own.shape[-1]))
    likeness = (normalize(own, dim=-1) * normalize(middle, dim=-1)).sum(-1).masked_fill(~held, torch.inf)
    place = likeness.argsort(dim=-1, stable=True).argsort(dim=-1)
    kept = (place < (size.double() * share).long().clamp(min=1)[:, None]) & held
    means = (own * kept[..., None]).sum(3) / kept.sum(-1, keepdim=True)
    # The kept token nearest to each: the last one up to it, or the next one if that is nearer.
    step = torch.arange(table.shape[1], device=q.device)
    far = 2 * table.shape[1]
    before = torch.where(kept, step, -far).cummax(-1).values
    after = torch.where(kept, step, far).flip(-1).cummin(-1).values.flip(-1)
    nearest = torch.where(step - before <= after - step, before, after)
    source = table.clamp(min=0).expand(batch, heads, -1, -1).gather(3, nearest.clamp(0, table.shape[1] - 1))
    place = table.where(held, length).expand(batch, heads, -1, -1).flatten(2)  # what is no token goes past the last
    tokens = torch.zeros(batch, heads, length + 1, dtype=torch.bool, device=q.device)
    rows = torch.arange(length + 1, device=q.device).repeat(batch, heads, 1)
    tokens.scatter_(2, place, kept.flatten(2))
    rows.scatter_(2, place, source.flatten(2))
    return Pruned(tokens[..., :-1], rows[..., :-1], means)


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
    rows = max(1, slice_of(q) // max(1, batch * heads * inner * columns.shape[2]))
    for start in range(0, q.shape[2], rows):
        some = slice(start, start + rows)
        with torch.autocast(q.device.type, enabled=False):
            scores = q[:, :, some].flatten(2, 3) @ columns.mT
        yield some, scores.unflatten(3, k.shape[2:4]).unflatten(2, (-1, inner))
