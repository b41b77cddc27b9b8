"""A plan as few large rectangles: lists of query tokens × lists of key tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_zoo.partition import Partition
from sparse_zoo.plan import Part, Plan


@dataclass(frozen=True)
class Rectangles:
    """R rectangles of one part, none of them empty.

    Rectangle r is `q_list[q_start[r] : q_start[r] + q_size[r]]` × the same of the keys: token numbers, for batch item
    and head `group[r]` = b · heads + h. Lists are int32 and shared by all groups where the part is; the rest is int64
    (R,), `group` ascending.
    """

    q_list: Tensor
    k_list: Tensor
    q_start: Tensor
    q_size: Tensor
    k_start: Tensor
    k_size: Tensor
    group: Tensor

    def __len__(self) -> int:
        return len(self.group)

    def select(self, which: Tensor | slice) -> Rectangles:
        """Some of the rectangles."""
        rows = {name: getattr(self, name)[which] for name in ("q_start", "q_size", "k_start", "k_size", "group")}
        return replace(self, **rows)

    def of_groups(self, low: int, high: int) -> Rectangles:
        """The rectangles of groups low … high - 1."""
        bounds = torch.searchsorted(self.group, torch.tensor([low, high], device=self.group.device))
        return self.select(slice(int(bounds[0]), int(bounds[1])))


Cost = Callable[[Tensor, Tensor], Tensor]
"""Numbers of queries and of keys, float64 (R,), of some rectangles -> what an engine pays for each."""


def alike(q_size: Tensor, k_size: Tensor) -> Tensor:  # noqa: ARG001
    """The same for every rectangle: the fewest are the best."""
    return torch.ones_like(q_size)


def rectangles(plan: Plan, batch: int, heads: int, cost: Cost = alike) -> list[Rectangles]:
    """The rectangles of each part of a plan, those that cost less of the two ways; remembered with the part."""
    return [_of_part(part, batch, heads, cost) for part in plan.parts]


def slabs(lists: list[Rectangles], groups: int, most: int) -> Iterator[tuple[int, int]]:
    """Runs low … high of groups whose query lists together hold at most `most` rows (or one group)."""
    rows = torch.zeros(groups, dtype=torch.int64)
    for rects in lists:
        rows.index_add_(0, rects.group.cpu(), rects.q_size.cpu())
    low, held = 0, 0
    for group, size in enumerate(rows.tolist()):
        if group > low and held + size > most:
            yield low, group
            low, held = group, 0
        held += size
    yield low, groups


@torch.inference_mode(False)  # remembered with the part
def _of_part(part: Part, batch: int, heads: int, cost: Cost) -> Rectangles:
    known: dict[tuple[int, int, Cost], Rectangles] = part.__dict__.setdefault("_rectangles", {})
    key = batch, heads, cost
    if key not in known:
        shared = part.batch_heads == (1, 1)
        known[key] = _shared(part, batch * heads, cost) if shared else _each(part, batch, heads, cost)
    return known[key]


def _shared(part: Part, groups: int, cost: Cost) -> Rectangles:
    one = _each(_coarse(part) if part.by_table else part, 1, 1, cost)
    again = {name: getattr(one, name).repeat(groups) for name in ("q_start", "q_size", "k_start", "k_size")}
    group = torch.arange(groups, device=one.group.device).repeat_interleave(len(one))
    return replace(one, **again, group=group)


def _coarse(part: Part) -> Part:
    """The same pairs, with query pieces that attend to the same keys made one, and key pieces of the same queries."""
    if not part.edges.numel():  # which `unique` refuses
        return part
    table = part.edges[0, 0]
    queries, table = _merged(part.queries, table, 0)
    keys, table = _merged(part.keys, table, 1)
    return Part(queries, keys, table[None, None])


def _merged(pieces: Partition, table: Tensor, dim: int) -> tuple[Partition, Tensor]:
    found, of = torch.unique(table, dim=dim, return_inverse=True)
    if len(of) == found.shape[dim]:
        return pieces, table
    piece = pieces.piece_of
    labels = torch.where(piece < 0, -1, of[piece.clamp(min=0)])
    return Partition.from_labels(labels, found.shape[dim]), found


def _each(part: Part, batch: int, heads: int, cost: Cost) -> Rectangles:
    """One rectangle for each query piece and all its keys, or each key piece and all its queries: whichever cost less.

    Keys gathered per query piece need no merge afterwards, so a tie goes to them.
    """
    edges = part.edges.expand(batch, heads, -1, -1)
    found = (edges if part.by_table else edges >= 0).nonzero()
    group, query = found[:, 0] * heads + found[:, 1], found[:, 2]
    key = found[:, 3] if part.by_table else edges[tuple(found.T)].long()
    q_size, k_size = _per_group(part.queries.sizes, batch, heads), _per_group(part.keys.sizes, batch, heads)
    real = (q_size[group, query] > 0) & (k_size[group, key] > 0)
    group, query, key = group[real], query[real], key[real]
    by_query, by_key = group * part.queries.count + query, group * part.keys.count + key
    q_most, k_most = (
        torch.bincount(x, sizes[group, y].double(), batch * heads * n)
        for x, sizes, y, n in ((by_key, q_size, query, part.keys.count), (by_query, k_size, key, part.queries.count))
    )
    if _total(cost, q_most, k_size.flatten()) < _total(cost, q_size.flatten(), k_most):
        order = by_key.argsort(stable=True)
        (q_list, q_start, q_size), (k_list, k_start, k_size), group = _collect(
            part.queries, part.keys, group[order], query[order], key[order], batch, heads
        )
    else:
        (k_list, k_start, k_size), (q_list, q_start, q_size), group = _collect(
            part.keys, part.queries, group, key, query, batch, heads
        )
    return Rectangles(q_list, k_list, q_start, q_size, k_start, k_size, group)


Lists = tuple[Tensor, Tensor, Tensor]


def _collect(
    many: Partition, one: Partition, group: Tensor, of_many: Tensor, of_one: Tensor, batch: int, heads: int
) -> tuple[Lists, Lists, Tensor]:
    """Edges sorted by (group, piece of `one`) -> for each such piece, the tokens of all its pieces of `many`."""
    ids, edges = torch.unique_consecutive(group * one.count + of_one, return_counts=True)
    groups = torch.div(ids, one.count, rounding_mode="floor")
    tokens, sizes = _tokens(many, group, of_many, batch, heads)
    ends = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))[torch.nn.functional.pad(edges.cumsum(0), (1, 0))]
    once, once_sizes = _tokens(one, groups, ids % one.count, batch, heads)
    return (tokens, ends[:-1], ends.diff()), (once, once_sizes.cumsum(0) - once_sizes, once_sizes), groups


def _tokens(pieces: Partition, group: Tensor, piece: Tensor, batch: int, heads: int) -> tuple[Tensor, Tensor]:
    """The tokens of a list of pieces one after the other, int32, and how many each has."""
    if pieces.is_singles:
        return piece.int(), torch.ones_like(piece)
    starts = _per_group(pieces.offsets[..., :-1].long(), batch, heads)[group, piece]
    sizes = _per_group(pieces.sizes, batch, heads)[group, piece]
    total = int(sizes.sum())
    within = torch.arange(total, device=sizes.device) - (sizes.cumsum(0) - sizes).repeat_interleave(
        sizes, output_size=total
    )
    place = starts.repeat_interleave(sizes, output_size=total) + within
    if pieces.order is None:
        return place.int(), sizes
    if pieces.order.shape[:2] == (1, 1):
        return pieces.order[0, 0][place], sizes
    owner = group.repeat_interleave(sizes, output_size=total)
    return _per_group(pieces.order, batch, heads)[owner, place], sizes


def _per_group(x: Tensor, batch: int, heads: int) -> Tensor:
    """(B|1, H|1, n) -> (B · H, n)."""
    return x.expand(batch, heads, -1).flatten(0, 1)


def _total(cost: Cost, q_size: Tensor, k_size: Tensor) -> float:
    real = (q_size > 0) & (k_size > 0)
    return float(cost(q_size[real].double(), k_size[real].double()).sum())
