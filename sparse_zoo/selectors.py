"""Selectors: what to keep of scores. Each maps scores (..., K) to bool (..., K); ties go to the earlier entry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sparse_zoo.blocks import members, products, slice_of
from sparse_zoo.partition import Partition
from sparse_zoo.plan import named

Scores = Iterator[tuple[slice, Tensor]]
"""Some rows of queries, and float32 scores (B, H, rows, K) for them; all rows, one slice after the other."""
Rule = Callable[[Tensor, Tensor], Tensor]
"""Scores with -inf where not legal, and what is legal, bool, -> what is kept, bool; all (B, H, rows, K)."""
Counts = Callable[[Tensor], Sequence[Tensor]]
"""What is legal, bool (B, H, rows, K) -> numbers of entries of each row, int64 (B, H, rows, 1) each."""

FEW = 16
"""Up to so many, looking for the largest again and again is faster than a sort."""


@torch.no_grad()
def choose(scores: Scores, legal: Tensor, shape: Sequence[int], rule: Rule, most: int | None = None) -> Tensor:
    """What a rule keeps of scores that come in slices, so that no whole table of them is held.

    Args:
        scores: Slices of rows.
        legal: bool, broadcasts to `shape`; what is not legal is never kept.
        shape: (B, H, Q, K).
        rule: See `Rule`.
        most: The rule keeps no more of any row. Indices take less room than a table, here and in the kernels.

    Returns:
        bool (B, H, Q, K); with `most` indices, int64 (B, H, Q, most), ascending, then -1.
    """
    legal = legal.expand(*shape)
    width, dtype = (shape[3], torch.bool) if most is None else (min(most, shape[3]), torch.int64)
    kept = torch.empty((*shape[:3], width), dtype=dtype, device=legal.device)
    for some, score in scores:
        score = score.masked_fill(~legal[:, :, some], -torch.inf)
        table = rule(score, legal[:, :, some]) & legal[:, :, some]
        kept[:, :, some] = table if most is None else named(table, width)
    return kept


def chosen(queries: Tensor, keys: Tensor, legal: Tensor, rule: Rule, most: int | None = None) -> Tensor:
    """What a rule keeps of the products of pooled queries (B, H, Q, D) and keys (B, Hk, K, D), as `choose` gives it."""
    return choose(products(queries, keys), legal, (*queries.shape[:3], keys.shape[2]), rule, most)


def largest(scores: Tensor, count: int | Tensor) -> Tensor:
    """Top-k: the `count` largest of each row, none at -inf.

    Args:
        scores: (..., K).
        count: One number, or a tensor (..., 1) with one for each row.

    Returns:
        bool (..., K).
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    taken = torch.arange(scores.shape[-1], device=scores.device) < count
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, taken.expand(order.shape))
    return kept & (scores > -torch.inf)


def first_largest(scores: Tensor, count: int) -> Tensor:
    """Top-k as indices: best first, -1 for those at -inf; overwrites scores.

    Args:
        scores: (..., K).
        count: How many, at most K.

    Returns:
        int64 (..., count).
    """
    if count > FEW:
        best, index = scores.sort(dim=-1, descending=True, stable=True)
        return index[..., :count].masked_fill(best[..., :count] == -torch.inf, -1)
    rows = scores.view(-1, scores.shape[-1])
    every = torch.arange(len(rows), device=scores.device)
    found = []
    for _ in range(count):
        # max gives the first of equals, which topk does not promise; for few it is also faster than a sort.
        best, index = rows.max(dim=-1)
        rows[every, index] = -torch.inf
        found.append(index.masked_fill(best == -torch.inf, -1))
    return torch.stack(found, dim=-1).view(*scores.shape[:-1], count)


@torch.no_grad()
def ranked(scores: Scores, legal: Tensor, shape: Sequence[int], counts: Counts) -> Tensor:
    """In which of several shares of its row each entry is, largest first.

    Args:
        scores: Slices of rows.
        legal: bool, broadcasts to `shape`.
        shape: (B, H, Q, K).
        counts: How many legal entries the first share holds, the first two, and so on: it maps bool (B, H, rows, K) to
            int64 (B, H, rows, 1) each, ascending.

    Returns:
        uint8 (B, H, Q, K): 0 for the first share, …, the number of shares for the rest and for what is not legal.
    """
    legal = legal.expand(*shape)
    found = torch.empty(tuple(shape), dtype=torch.uint8, device=legal.device)
    for some, score in scores:
        allowed = legal[:, :, some]
        score = score.masked_fill(~allowed, -torch.inf)
        inside = [largest(score, count) for count in counts(allowed)]
        found[:, :, some] = len(inside) - torch.stack(inside).sum(0, dtype=torch.uint8)
    return found


def heaviest(weights: Tensor, share: float, first: Tensor | None = None) -> Tensor:
    """Top-p: the fewest of each row, largest first, that hold `share` of its sum.

    Args:
        weights: (..., K), at least 0. Of a row that sums to 0 nothing is kept.
        share: Between 0 and 1; with 1 everything is kept.
        first: bool (..., K), what is kept whatever it weighs; the rest only fills up the share.

    Returns:
        bool (..., K).
    """
    if share >= 1:
        return torch.ones_like(weights, dtype=torch.bool)
    weights = weights.double()
    ranks = weights if first is None else weights.masked_fill(first, torch.inf)
    order = ranks.argsort(dim=-1, descending=True, stable=True)
    ordered = weights.gather(-1, order)
    enough = ordered.cumsum(-1) - ordered < share * ordered.sum(-1, keepdim=True)
    kept = torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order, enough)
    return kept if first is None else kept | first


def fraction_of(legal: Tensor, share: float) -> Tensor:
    """How many of the legal entries of each row are `share` of them, rounded up: int64 (..., 1), at least 1."""
    return (legal.sum(-1, keepdim=True).double() * share).ceil().long().clamp(min=1)


def heaviest_logits(scores: Tensor, share: float) -> Tensor:
    """Top-p of the softmax of each row of scores (..., K), -inf for what is no candidate."""
    return heaviest(scores.softmax(-1).nan_to_num(0.0), share)


def above_mean(scores: Tensor, legal: Tensor, deviations: float | Tensor) -> Tensor:
    """Threshold: what passes the mean of the legal scores of its row by `deviations`, a number or (..., 1)."""
    count = legal.sum(-1, keepdim=True).clamp(min=1)
    mean = scores.masked_fill(~legal, 0).sum(-1, keepdim=True) / count
    return (scores > mean + deviations) & legal


@torch.no_grad()
def hierarchical(
    queries: Sequence[Tensor], keys: Sequence[Tensor], parents: Sequence[Partition], legal: Tensor, top_k: int
) -> list[Tensor]:
    """Hierarchical top-k: at each level, finest last, the `top_k` best among the children of what was chosen above.

    Args:
        queries: Pooled queries of each level, coarsest first, (B, H, P, D).
        keys: Pooled keys of each level (B, Hk, P, D).
        parents: For each level but the first, which of its pieces each piece of the level above holds.
        legal: bool (P, P), what the pieces of the coarsest level may choose.
        top_k: How many each piece of queries chooses at each level.

    Returns:
        For each level what each of its pieces of queries chose: int64 (B, H, P, top_k, or fewer where there are fewer
        candidates), ascending, then -1.
    """
    found: list[Tensor] = []
    for level, (q, k) in enumerate(zip(queries, keys, strict=True)):
        if level:
            # Only children of chosen pieces are multiplied: (pieces, top_k · children) products, not pieces².
            found.append(_among_children(q, k, found[-1], parents[level - 1], top_k))
        else:
            found.append(chosen(q, k, legal, lambda scores, _: largest(scores, top_k), top_k))
    return found


def _among_children(q: Tensor, k: Tensor, above: Tensor, parents: Partition, top_k: int) -> Tensor:
    batch, heads, pieces, _ = q.shape
    children, parent = members(parents), parents.piece_of[0, 0]
    keys = k.float().repeat_interleave(heads // k.shape[1], dim=1)
    width = above.shape[-1] * children.shape[1]
    step = max(1, slice_of(q) // max(1, batch * heads * width * k.shape[3]))
    kept = []
    for start in range(0, pieces, step):
        ours = above[:, :, parent[start : start + step]]
        some = children[ours.clamp(min=0)].masked_fill(ours[..., None] < 0, -1).flatten(-2)
        place = some.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, k.shape[3])
        own = keys.gather(2, place).view(*some.shape, -1)
        with torch.autocast(q.device.type, enabled=False):
            scores = (own @ q[:, :, start : start + step].float()[..., None])[..., 0]
        best = named(largest(scores.masked_fill(some < 0, -torch.inf), top_k), min(top_k, width))
        kept.append(some.gather(-1, best.clamp(min=0)).masked_fill(best < 0, -1))
    return torch.cat(kept, dim=2)
