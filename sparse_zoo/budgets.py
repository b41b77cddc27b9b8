"""Selection under one budget from more scores than memory holds: no sort, exact in whole numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparse_zoo.blocks import products
from sparse_zoo.selectors import heaviest, largest

DIGIT = 12
ONE = 1 << 2 * DIGIT
"""The highest score of a budget as a weight: two digits, as fine as float32 is just below 1."""

Slices = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def kept_pairs(
    q: Tensor, means: Tensor, own: Tensor, *, scope: str, share: float | None, count: int
) -> Iterator[Tensor]:
    """The pairs of a query and a block that are kept, the own block of each query before all others.

    Args:
        q: Queries (B, H, n, D) of one film.
        means: Means of the keys of its blocks (B, Hk, C, D).
        own: int64 (n,), the block of each query, below 0 for none.
        scope: Where pairs compete: "query", "head", or "global" (all heads).
        share: Share of the scope's similarity that is kept, or None for `count`.
        count: Blocks for each query, on average over the scope.

    Yields:
        bool (B, H, rows, C), slice by slice.
    """
    batch, heads, length, _ = q.shape
    across = scope == "global"

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for rows, scores in products(q, means):
            mine = own[rows, None] == torch.arange(scores.shape[-1], device=own.device)
            yield scores, mine.expand_as(scores)

    if scope == "query":
        for scores, mine in pairs():
            if share is None:
                yield largest(scores.masked_fill(mine, torch.inf), count)
            else:
                scale = weights(scores, scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True))
                yield heaviest(scale, share, first=mine)
        return

    def slices() -> Iterator[tuple[Tensor, Tensor]]:
        for pair in pairs():
            a, b = (x.transpose(1, 2).flatten(1) if across else x.flatten(2).flatten(0, 1) for x in pair)
            yield a, b

    total = count * length * (heads if across else 1)
    for kept in within_budget(slices, share=share, count=total):
        order = (batch, -1, heads, means.shape[2]) if across else (batch, heads, -1, means.shape[2])
        yield kept.view(order).transpose(1, 2) if across else kept.view(order)


def weights(scores: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Scores on a scale from 0 at `low` to `ONE` at `high`: int64, shaped as scores; `ONE` where the two are equal."""
    return (((scores - low) / (high - low)).nan_to_num(nan=1.0).clamp(0, 1) * ONE).round().long()


def within_budget(slices: Slices, *, share: float | None = None, count: int = 0) -> Iterator[Tensor]:
    """The largest entries of each row that fit a budget, read and returned in slices.

    Row r of all slices together has one budget: a `share` in (0, 1] of the sum of its `weights`, or `count` entries.
    Entries in `first` use the budget before all others. The others follow from the largest down, ties to the earlier,
    until the budget is reached. With a share of 1 everything is kept.

    The smallest kept weight is found digit by digit, in histograms: sums of whole numbers, so that the order of
    addition does not matter. This takes four passes over the slices.

    Args:
        slices: Returns an iterator over scores, float32 (R, n), and `first`, bool (R, n), the same in every call.
        share: Share of the weights, or None for `count`.
        count: Number of entries.

    Yields:
        bool (R, n), the kept entries of each slice.
    """
    if share == 1:
        yield from (torch.ones_like(first) for _, first in slices())
        return
    bounds = [scores.aminmax(dim=-1, keepdim=True) for scores, _ in slices()]
    low, high = torch.stack([x.min for x in bounds]).amin(0), torch.stack([x.max for x in bounds]).amax(0)

    def weighed() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Weights of the others (-1 elsewhere), what of the budget each takes, and `first`."""
        for scores, first in slices():
            weight = weights(scores, low, high)
            yield weight.masked_fill(first, -1), torch.ones_like(weight) if share is None else weight, first

    rows = len(low)
    spent = low.new_zeros((rows, 1), dtype=torch.int64)
    upper = spent.new_zeros(rows, (ONE >> DIGIT) + 1)
    for weight, price, first in weighed():
        spent += price.where(first, 0).sum(-1, keepdim=True)
        upper.scatter_add_(-1, weight.clamp(min=0) >> DIGIT, price.where(~first, 0))
    budget = (
        share * (spent + upper.sum(-1, keepdim=True)).double() if share is not None else spent.double().fill_(count)
    )
    digit, spent = _reach(upper, spent, budget)
    lower = spent.new_zeros(rows, 1 << DIGIT)
    for weight, price, _ in weighed():
        inside = weight >> DIGIT == digit
        lower.scatter_add_(-1, weight % (1 << DIGIT), price.where(inside, 0))
    last, spent = _reach(lower, spent, budget)
    least = (digit << DIGIT) + last
    # Of those at the least weight, as many as it takes to reach the budget.
    places = ((budget - spent) / (1 if share is None else least.clamp(min=1))).ceil()
    taken = torch.zeros_like(spent)
    for weight, _, first in weighed():
        tie = weight == least
        yield first | (weight > least) | (tie & (taken + tie.cumsum(-1) <= places))
        taken += tie.sum(-1, keepdim=True)


def _reach(spending: Tensor, spent: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """The digit at which the budget is reached, from the largest down, and what is used before it: int64 (R, 1) each.

    `spending` is (R, digits). Where `spent` already equals the budget, the digit is one above the highest.
    """
    before = torch.cat([spent + spending.sum(-1, keepdim=True) - spending.cumsum(-1), spent], dim=-1)
    digit = (before[:, :-1] >= budget).sum(-1, keepdim=True)
    return digit, before.gather(-1, digit)
