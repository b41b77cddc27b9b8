"""How many seeds a comparison needs: the report's own tests, simulated with the spread over seeds of a pilot.

The seeds of a pilot say how much the difference of two methods varies from seed to seed. With that spread whole sweeps
are simulated: one method is better than all others by a certain difference, the others are alike, and the seeds are
normal. Power is the share of the true differences that the paired t tests find after Holm's correction over all pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np

from experiments.analysis.significance import ALPHA, holm_rows, t_test_p

PROBABILITY = 0.8  # with which a difference is to be found
DRAWS, FEWEST = 1000, 100  # simulated sweeps: of many methods fewer, because each has many pairs
TABLE = 100_000  # tests of all simulated sweeps together, while those are more than `FEWEST`
MOST_SEEDS = 200  # that are considered
STEPS = 14  # of the bisection for a difference: to 1 part in 16,000 of the range


@dataclass(frozen=True)
class Spread:
    """The standard deviation over seeds of the difference of two methods.

    `sd` is the root of the mean variance of all pairs, weighted by the seeds of each but one; `most` that of the pair
    that varies most, `widest`. `seeds` is the largest number that a pair has in common.
    """

    sd: float
    most: float
    widest: tuple[str, str]
    seeds: int

    @staticmethod
    def of(values: Mapping[str, Mapping[int, float]]) -> Spread | None:
        """Return the spread of methods, name -> seed -> value; None where no two have two seeds in common."""
        found: list[tuple[float, int, tuple[str, str]]] = []
        for a, b in combinations(values, 2):
            gaps = [values[a][seed] - values[b][seed] for seed in values[a].keys() & values[b].keys()]
            if len(gaps) > 1:
                found.append((float(np.var(gaps, ddof=1)), len(gaps), (a, b)))
        if not found:
            return None
        weights = sum(n - 1 for _, n, _ in found)
        mean = math.fsum(variance * (n - 1) for variance, n, _ in found) / weights
        most, _, widest = max(found, key=lambda one: one[0])
        return Spread(math.sqrt(mean), math.sqrt(most), widest, max(n for _, n, _ in found))


def power(effect: float, seeds: int, methods: int) -> float:
    """Return the probability that a true difference is significant in a report.

    Args:
        effect: The difference of one method from each of the others, in standard deviations over seeds of a difference.
        seeds: The seeds that every method has, at least 2.
        methods: How many methods are compared, at least 2; all pairs are tested.
    """
    means, errors = _simulated(seeds, methods)
    first, _ = np.triu_indices(methods, 1)
    shifted = means + effect * (first == 0)
    found = holm_rows(t_test_p(shifted, errors, seeds)) < ALPHA
    return float(found[:, first == 0].mean())


@cache
def smallest_effect(seeds: int, methods: int, probability: float = PROBABILITY) -> float:
    """Return the smallest effect, as `power` takes it, that is found with this probability."""
    low, high = 0.0, 1.0
    while power(high, seeds, methods) < probability:
        low, high = high, 2 * high
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, seeds, methods) >= probability else (middle, high)
    return high


@cache
def seeds_needed(effect: float, methods: int, probability: float = PROBABILITY) -> int | None:
    """Return the smallest number of seeds with which an effect is found; None if more than `MOST_SEEDS` are needed."""
    few, many = 1, 2
    while power(effect, many, methods) < probability:
        if many == MOST_SEEDS:
            return None
        few, many = many, min(2 * many, MOST_SEEDS)
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if power(effect, middle, methods) >= probability else (middle, many)
    return many


@cache
def _simulated(seeds: int, methods: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean difference and standard error of all pairs of alike methods, (draws, pairs), in units of `Spread.sd`."""
    rng = np.random.default_rng(0)
    first, second = np.triu_indices(methods, 1)
    draws = max(FEWEST, min(DRAWS, TABLE // len(first)))
    runs = rng.standard_normal((draws, methods, seeds)) / math.sqrt(2)
    centred = runs - runs.mean(-1, keepdims=True)
    covariance = centred @ centred.swapaxes(1, 2) / (seeds - 1)  # (draws, methods, methods)
    own = np.diagonal(covariance, axis1=1, axis2=2)
    variance = own[:, first] + own[:, second] - 2 * covariance[:, first, second]
    means = runs.mean(-1)
    return means[:, first] - means[:, second], np.sqrt(variance / seeds)


@dataclass(frozen=True)
class SeedPlan:
    """What the seeds of a comparison can show, and how many more it needs.

    `difference` is the smallest true difference that is found with `probability` by `spread.seeds` seeds of `methods`
    methods. `needed` is the number of seeds that finds `target`, `needed_widest` the same if all pairs varied as much
    as the one that varies most; None where more than `MOST_SEEDS` are needed. Without a target both are None.
    """

    spread: Spread
    methods: int
    probability: float
    difference: float
    target: float | None
    needed: int | None
    needed_widest: int | None

    @staticmethod
    def of(
        values: Mapping[str, Mapping[int, float]],
        methods: int | None = None,
        target: float | None = None,
        probability: float = PROBABILITY,
    ) -> SeedPlan | None:
        """Return the plan that a pilot gives.

        Args:
            values: Name -> seed -> value, of the methods whose spread counts.
            methods: How many methods are compared; by default those of `values`.
            target: The difference that is to be found.
            probability: With which it is to be found.

        Returns:
            The plan; None where no two methods have two seeds in common, or where no difference varies at all.
        """
        spread = Spread.of(values)
        if spread is None or not spread.sd:
            return None
        count = methods or len(values)
        difference = spread.sd * smallest_effect(spread.seeds, count, probability)
        needed = [
            None if target is None else seeds_needed(target / sd, count, probability) for sd in (spread.sd, spread.most)
        ]
        return SeedPlan(spread, count, probability, difference, target, *needed)

    def curve(self, seeds: Sequence[int]) -> dict[int, float]:
        """Return the smallest difference that is found with each of these numbers of seeds."""
        return {n: self.spread.sd * smallest_effect(n, self.methods, self.probability) for n in seeds}
