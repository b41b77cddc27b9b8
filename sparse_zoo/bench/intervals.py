"""A distribution-free confidence interval of the median: exact, by order statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95
NARROW = 0.1
"""Width of an interval of attained ÷ bound above which the machine was too noisy to tell."""


class Interval(NamedTuple):
    """The ends of an interval, and the confidence with which it holds the median."""

    low: float
    high: float
    confidence: float

    @property
    def width(self) -> float:
        """The difference of the ends."""
        return self.high - self.low


def median_interval(values: Sequence[float]) -> Interval | None:
    """The narrowest pair of order statistics x(i), x(n + 1 - i) that holds the median with a confidence of 95 %.

    The number of n values below the median is binomial with p = 1/2, whatever their distribution. Fewer than six values
    cannot give 95 %: the result is then their range, with its confidence; None for fewer than two.
    """
    n = len(values)
    if n < 2:
        return None
    ordered = sorted(values)
    below, kept = 0.0, 0  # P(fewer than i + 1 values lie below the median), for the last i that keeps the confidence
    tail = 0.0
    for i in range(n // 2):
        tail += math.comb(n, i) / 2.0**n
        if i == 0 or 1 - 2 * tail >= CONFIDENCE:
            below, kept = tail, i
    return Interval(ordered[kept], ordered[n - 1 - kept], 1 - 2 * below)
