"""What a few seeds can tell: intervals of means, paired tests between methods, the front of quality against cost.

The seed is the unit of every claim about methods: runs of one seed share their films, their noise and, where shapes are
alike, their first weights, so methods are compared within seeds. Films are the unit of claims about the trained models
at hand only: more films make those surer, never the claims about methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from string import ascii_lowercase

import numpy as np
from scipy.special import bdtr, stdtr, stdtrit  # of scipy.stats, which takes a second to import, all that is used

ALPHA = 0.05
EXACT, DRAWN = 13, 9999  # signs of so many differences are flipped in all ways, of more in so many that are drawn
MOST_SETS = 52  # that have letters: two alphabets
TABLE = 1 << 22  # numbers in one table of pairs × patterns of signs


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
        measured = [value for value in values if value is not None]
        n = len(measured)
        if n == 0:
            return None
        mean = math.fsum(measured) / n
        if n == 1:
            return Figure(mean, None, 1)
        sd = math.sqrt(math.fsum((value - mean) ** 2 for value in measured) / (n - 1))
        half = _critical(n) * sd / math.sqrt(n)
        return Figure(mean, sd, n, max(mean - half, bounds[0]), min(mean + half, bounds[1]))

    @property
    def half(self) -> float:
        """Half of the interval before it is cut; NaN of one run."""
        if self.sd is None:
            return float("nan")
        return _critical(self.n) * self.sd / math.sqrt(self.n)


@cache
def _critical(n: int) -> float:
    """How many standard errors a 95 % interval of n values reaches to each side."""
    return float(stdtrit(n - 1, 1 - ALPHA / 2))


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
    names, seeds = [*values], sorted(set().union(*values.values()))
    table = np.full((len(names), len(seeds)), np.nan)
    for own, name in zip(table, names, strict=True):
        own[:] = [values[name].get(seed, np.nan) for seed in seeds]
    first, second = np.triu_indices(len(names), 1)
    gaps = table[first] - table[second]  # (pairs, seeds)
    which, patterns = np.unique(~np.isnan(gaps), axis=0, return_inverse=True)
    tested = np.full((len(gaps), 6), np.nan)  # what `_paired` gives, and p corrected
    for number, shared in enumerate(which):
        rows = np.flatnonzero(patterns.reshape(-1) == number)
        tested[rows, :5] = _paired(gaps[rows][:, shared])
    known = ~np.isnan(tested[:, 3])
    tested[known, 5] = holm(tested[known, 3])
    counts = (~np.isnan(gaps)).sum(1).tolist()
    plain = [[None if math.isnan(x) else x for x in row] for row in tested.tolist()]
    pairs = zip(first.tolist(), second.tolist(), counts, plain, strict=True)
    return [Difference(names[a], names[b], n, *figures) for a, b, n, figures in pairs]


def _paired(gaps: np.ndarray) -> np.ndarray:
    """Of each row of differences (pairs, n) its mean, low, high, p, p_exact as `Difference` has them; NaN for None."""
    n = gaps.shape[1]
    if n < 2:
        return np.full((len(gaps), 5), np.nan)
    means, exact = gaps.mean(1), flipped(gaps)
    alike = np.isclose(gaps, gaps[:, :1], rtol=1e-9, atol=1e-15).all(1)
    errors = np.where(alike, 1.0, gaps.std(1, ddof=1) / math.sqrt(n))  # of pairs that are alike t is not defined
    p = 2 * stdtr(n - 1, -np.abs(means / errors))
    means = np.where(alike, gaps[:, 0], means)
    half = np.where(alike, np.nan, _critical(n) * errors)
    p = np.where(alike, np.where(means == 0, 1.0, exact), p)
    return np.stack([means, means - half, means + half, p, exact], axis=1)


def flipped(gaps: np.ndarray) -> np.ndarray:
    """The two-sided p of flipping the signs of each row of differences (pairs, n).

    All 2^n patterns of signs up to n = 13, beyond it 9999 that are drawn, the same for all rows.
    """
    n = gaps.shape[1]
    exact = n <= EXACT
    if exact:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)  # (patterns, n)
    else:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (DRAWN, n))
    found = []
    for some in np.array_split(gaps, max(1, gaps.shape[0] * len(signs) // TABLE)):
        sums, own = some @ signs.T, some.sum(1, keepdims=True)
        near = 1e-12 * np.abs(some).sum(1, keepdims=True)  # equal but for rounding
        less, more = (sums <= own + near).sum(1), (sums >= own - near).sum(1)
        fewest = np.minimum(less, more)
        found.append(np.minimum(1.0, 2 * fewest / len(signs) if exact else 2 * (fewest + 1) / (DRAWN + 1)))
    return np.concatenate(found)


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
    arrays = {name: {seed: np.asarray(each, float) for seed, each in runs.items()} for name, runs in values.items()}
    found = []
    for a, b in combinations(arrays, 2):
        of_a, of_b = arrays[a], arrays[b]
        seeds = sorted(of_a.keys() & of_b.keys())
        seeds = [seed for seed in seeds if len(of_a[seed]) == len(of_b[seed]) == len(of_a[seeds[0]])]
        if seeds:
            gaps = sum(of_a[seed] - of_b[seed] for seed in seeds)
            better, worse = int(np.count_nonzero(gaps > 0)), int(np.count_nonzero(gaps < 0))
            found.append(
                Films(a, b, len(seeds), len(of_a[seeds[0]]), better, worse, _sign_test(better, better + worse))
            )
    corrected = holm([one.p for one in found])
    return [replace(one, p_holm=p) for one, p in zip(found, corrected, strict=True)]


@cache
def _sign_test(better: int, unequal: int) -> float:
    """The exact two-sided sign test."""
    return min(1.0, 2 * float(bdtr(min(better, unequal - better), unequal, 0.5)))


def holm(ps: Sequence[float] | np.ndarray) -> list[float]:
    """p values corrected for each other (Holm 1979), in their order: at 5 %, any false verdict in 5 % of reports."""
    values = np.asarray(ps, float)
    order = np.argsort(values, kind="stable")
    corrected = np.empty(len(values))
    steps = np.minimum(1.0, np.arange(len(values), 0, -1) * values[order])
    corrected[order] = np.maximum.accumulate(steps)
    return [float(p) for p in corrected]


def letters(names: Sequence[str], told_apart: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Letters for each name: two share one exactly if they were not told apart (a compact letter display).

    By inserting and absorbing: each pair told apart splits every set that holds both; sets within others go. Empty
    where more than `MOST_SETS` sets are needed, which nobody could read.
    """
    sets = [set(names)]
    for a, b in told_apart:
        split = [part for one in sets for part in ([one - {a}, one - {b}] if {a, b} <= one else [one])]
        sets = [
            one
            for i, one in enumerate(split)
            if not any(one < two or (one == two and j < i) for j, two in enumerate(split))
        ]
        if len(sets) > MOST_SETS:
            return {}
    sets.sort(key=lambda one: sorted(names.index(name) for name in one))
    marks = [ascii_lowercase[i % 26] * (i // 26 + 1) for i in range(len(sets))]
    return {name: "".join(mark for mark, one in zip(marks, sets, strict=True) if name in one) for name in names}


def detectable(n: int, pairs: int) -> float:
    """How many standard deviations of the paired differences the mean must pass for the first of `pairs` to hold."""
    return float(stdtrit(n - 1, 1 - ALPHA / 2 / pairs)) / math.sqrt(n)


def front(costs: Mapping[str, float], rank: Callable[[str], float]) -> list[str]:
    """The names that no other beats in cost or in rank (smaller is better) without losing in the other, by cost."""
    places = sorted((costs[name], rank(name), i, name) for i, name in enumerate(costs))
    kept: list[tuple[float, float, int, str]] = []
    for place in places:
        if not kept or place[1] < kept[-1][1] or place[:2] == kept[-1][:2]:
            kept.append(place)
    return [name for *_, name in kept]
