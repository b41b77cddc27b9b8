"""Choosing under one budget from more scores than memory holds: no sort, exact in whole numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

DIGIT = 12
ONE = 1 << 2 * DIGIT
"""The highest score of a budget as a weight: two digits, as fine as float32 is just below 1."""

Slices = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def weights(scores: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Scores on a scale from `low`, 0, to `high`, `ONE`: int64, as scores are shaped; `ONE` where the two are equal."""
    return (((scores - low) / (high - low)).nan_to_num(nan=1.0).clamp(0, 1) * ONE).round().long()


def within_budget(slices: Slices, *, share: float | None = None, count: int = 0) -> Iterator[Tensor]:
    """The largest of each row that fit a budget, given and answered in slices.

    `slices()` gives, anew each time and the same each time, scores, float32 (R, n), and `first`, bool (R, n): what is
    kept whatever it scores. Row r of all slices together has one budget: a `share` in (0, 1] of the sum of its
    `weights`, or, without one, `count` places. `first` spends of it before all others, which follow from the largest
    down, ties to the earlier, as long as the budget is not yet reached. Yields what is kept, bool (R, n), of slice
    after slice. With a share of 1 that is everything.

    The least weight that is kept is found digit by digit, in histograms: sums of whole numbers, so that the order of
    addition does not matter. Four passes over the slices.
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
    """The digit at which the budget is reached, from the largest down, and what is spent before it: int64 (R, 1) each.

    spending (R, digits), by digit. Where `spent` is the budget already, the digit is one too high to exist.
    """
    before = torch.cat([spent + spending.sum(-1, keepdim=True) - spending.cumsum(-1), spent], dim=-1)
    digit = (before[:, :-1] >= budget).sum(-1, keepdim=True)
    return digit, before.gather(-1, digit)
