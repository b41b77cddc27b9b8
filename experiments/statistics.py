"""What a few seeds can tell: intervals of means, paired tests between methods, the front of quality against cost.

The seed is the unit of every claim about methods: runs of one seed share their films, their noise and, where shapes are
alike, their first weights, so methods are compared within seeds. Films are the unit of claims about the trained models
at hand only: more films make those surer, never the claims about methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from string import ascii_lowercase

import numpy as np
from scipy import stats

ALPHA = 0.05


@dataclass(frozen=True)
class Figure:
    """Mean over `n` runs, their sample standard deviation (n - 1 below the line), and the mean's 95 % interval.

    The interval is Student's, cut at the measure's bounds. It and `sd` are None of one run.
    """

    mean: float
    sd: float | None
    n: int
    low: float | None = None
    high: float | None = None

    @staticmethod
    def of(
        values: Sequence[float | None], bounds: tuple[float, float] = (-float("inf"), float("inf"))
    ) -> Figure | None:
        """Of the runs that measured it; None if none did."""
        measured = np.array([value for value in values if value is not None])
        if not measured.size:
            return None
        mean, n = float(measured.mean()), len(measured)
        if n == 1:
            return Figure(mean, None, 1)
        whole = Figure(mean, float(measured.std(ddof=1)), n)
        return replace(whole, low=max(mean - whole.half, bounds[0]), high=min(mean + whole.half, bounds[1]))

    @property
    def half(self) -> float:
        """Half of the interval before it is cut; NaN of one run."""
        if self.sd is None:
            return float("nan")
        return float(stats.t.ppf(1 - ALPHA / 2, self.n - 1)) * self.sd / math.sqrt(self.n)


@dataclass(frozen=True)
class Difference:
    """`a` less `b` over the `n` seeds that both have: the mean and its 95 % interval, alone, not one among many.

    `p` is the paired t test's, two-sided; `p_exact` that of flipping the signs of the differences, which assumes no
    normal distribution and cannot fall below 2 / 2^n; `p_holm` is `p` corrected for all pairs that were tested. Where
    the differences have no spread at all, t is not defined and `p` is `p_exact`. All None with fewer than two seeds.
    """

    a: str
    b: str
    n: int
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_exact: float | None = None
    p_holm: float | None = None

    @property
    def holds(self) -> bool:
        """Whether chance is ruled out at 5 % over all pairs together."""
        return self.p_holm is not None and self.p_holm < ALPHA


def differences(values: Mapping[str, Mapping[int, float]]) -> list[Difference]:
    """Every pair of methods, in their order, paired by seed; `values` are name -> seed -> value."""
    found = [_paired(a, b, values[a], values[b]) for a, b in combinations(values, 2)]
    return _corrected(found)


def _paired(a: str, b: str, of_a: Mapping[int, float], of_b: Mapping[int, float]) -> Difference:
    shared = sorted(of_a.keys() & of_b.keys())
    gaps = np.array([of_a[seed] - of_b[seed] for seed in shared])
    n = len(gaps)
    if n < 2:
        return Difference(a, b, n)
    # Exact up to 2^13 sign patterns, then 9999 of them drawn.
    exact = stats.permutation_test((gaps,), np.mean, permutation_type="samples", n_resamples=9999, rng=0)
    p_exact = float(exact.pvalue)
    if np.allclose(gaps, gaps[0], rtol=1e-9, atol=1e-15):
        return Difference(a, b, n, float(gaps[0]), None, None, p_exact if gaps[0] else 1.0, p_exact)
    test = stats.ttest_1samp(gaps, 0.0)  # on differences: the paired test
    low, high = test.confidence_interval(1 - ALPHA)
    return Difference(a, b, n, float(gaps.mean()), float(low), float(high), float(test.pvalue), p_exact)


@dataclass(frozen=True)
class Films:
    """How often the models of `a` did better than those of `b` on the same film, and worse; the others are ties.

    Of each film the mean over the `seeds` that both have. `p` is the exact sign test's over films, two-sided, which at
    one seed of hits and misses is McNemar's; `p_holm` is corrected for all pairs.
    """

    a: str
    b: str
    seeds: int
    films: int
    better: int
    worse: int
    p: float
    p_holm: float = 1.0

    @property
    def holds(self) -> bool:
        return self.p_holm < ALPHA


def over_films(values: Mapping[str, Mapping[int, Sequence[float]]]) -> list[Films]:
    """Every pair of methods that judged equally many films; `values` are name -> seed -> a value per film, in order."""
    found = []
    for a, b in combinations(values, 2):
        seeds = sorted(values[a].keys() & values[b].keys())
        seeds = [seed for seed in seeds if len(values[a][seed]) == len(values[b][seed]) == len(values[a][seeds[0]])]
        if seeds:
            gaps = np.mean([np.subtract(values[a][seed], values[b][seed]) for seed in seeds], axis=0)
            better, worse = int((gaps > 0).sum()), int((gaps < 0).sum())
            p = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
            found.append(Films(a, b, len(seeds), len(gaps), better, worse, float(p)))
    corrected = holm([one.p for one in found])
    return [replace(one, p_holm=p) for one, p in zip(found, corrected, strict=True)]


def _corrected(found: Sequence[Difference]) -> list[Difference]:
    """With Holm's correction over the pairs that could be tested."""
    corrected = iter(holm([one.p for one in found if one.p is not None]))
    return [one if one.p is None else replace(one, p_holm=next(corrected)) for one in found]


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for each other (Holm 1979), in their order: at 5 %, any false verdict in 5 % of reports."""
    corrected, least = [1.0] * len(ps), 0.0
    for rank, i in enumerate(np.argsort(ps, kind="stable")):
        least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = least
    return corrected


def letters(names: Sequence[str], told_apart: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Letters for each name: two share one exactly if they were not told apart (a compact letter display).

    By inserting and absorbing: each pair told apart splits every set that holds both; sets within others go.
    """
    sets = [set(names)]
    for a, b in told_apart:
        split = [part for one in sets for part in ([one - {a}, one - {b}] if {a, b} <= one else [one])]
        sets = [
            one
            for i, one in enumerate(split)
            if not any(one < two or (one == two and j < i) for j, two in enumerate(split))
        ]
    sets.sort(key=lambda one: sorted(names.index(name) for name in one))
    marks = [ascii_lowercase[i % 26] * (i // 26 + 1) for i in range(len(sets))]
    return {name: "".join(mark for mark, one in zip(marks, sets, strict=True) if name in one) for name in names}


def detectable(n: int, pairs: int) -> float:
    """How many standard deviations of the paired differences the mean must pass for the first of `pairs` to hold."""
    return float(stats.t.ppf(1 - ALPHA / 2 / pairs, n - 1)) / math.sqrt(n)


def front(costs: Mapping[str, float], rank: Callable[[str], float]) -> list[str]:
    """The names that no other beats in cost or in rank (smaller is better) without losing in the other, by cost."""

    def beaten(name: str) -> bool:
        mine = (costs[name], rank(name))
        return any(
            (theirs := (costs[other], rank(other))) != mine and theirs[0] <= mine[0] and theirs[1] <= mine[1]
            for other in costs
        )

    return sorted((name for name in costs if not beaten(name)), key=lambda name: costs[name])
