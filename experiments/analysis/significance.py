"""Statistics over a few seeds: intervals of means, paired tests between methods, the Pareto front of quality and cost.

The seed is the unit of every claim about methods. Runs of one seed share their films, their noise and, where shapes are
equal, their initial weights, so methods are compared within seeds. Films are the unit of claims about the trained
models only: more films sharpen those, never the claims about methods.
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
EXACT, DRAWN = 13, 9999  # up to EXACT differences all patterns of signs are tried, beyond it DRAWN random ones
MOST_SETS = 52  # sets of groups that have letters: two alphabets
TABLE = 1 << 22  # numbers in one table of pairs × patterns of signs


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` runs, their sample standard deviation (divided by n - 1), and the mean's 95 % interval.

    The interval is Student's, cut at the measure's bounds. It and `sd` are None for one run.
    """

    mean: float
    sd: float | None
    n: int
    low: float | None = None
    high: float | None = None

    @staticmethod
    def of(
        values: Sequence[float | None], bounds: tuple[float, float] = (-float("inf"), float("inf"))
    ) -> Estimate | None:
        """Return the estimate over the values that are not None; None if there are none."""
        measured = [value for value in values if value is not None]
        n = len(measured)
        if n == 0:
            return None
        mean = math.fsum(measured) / n
        if n == 1:
            return Estimate(mean, None, 1)
        sd = math.sqrt(math.fsum((value - mean) ** 2 for value in measured) / (n - 1))
        half = _critical(n) * sd / math.sqrt(n)
        return Estimate(mean, sd, n, max(mean - half, bounds[0]), min(mean + half, bounds[1]))

    @property
    def half(self) -> float:
        """Half of the interval before it is cut; NaN for one run."""
        if self.sd is None:
            return float("nan")
        return _critical(self.n) * self.sd / math.sqrt(self.n)


@cache
def _critical(n: int) -> float:
    """The half-width of a 95 % interval of n values, in standard errors."""
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
    def significant(self) -> bool:
        """Whether the difference is significant at 5 % after the correction for all pairs."""
        return self.p_holm is not None and self.p_holm < ALPHA


def paired_differences(values: Mapping[str, Mapping[int, float]]) -> list[Difference]:
    """Test every pair of methods.

    Args:
        values: Name -> seed -> value. Only seeds that both methods of a pair have count.

    Returns:
        The pairs in the order of the names, the first name as `a`.
    """
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
    plain = np.where(np.isnan(tested), None, tested).tolist()  # type: ignore[call-overload]
    pairs = zip(first.tolist(), second.tolist(), counts, plain, strict=True)
    return [Difference(names[a], names[b], n, *figures) for a, b, n, figures in pairs]


def _paired(gaps: np.ndarray) -> np.ndarray:
    """Mean, low, high, p and p_exact of each row of differences (pairs, n), as in `Difference`; NaN for None."""
    n = gaps.shape[1]
    if n < 2:
        return np.full((len(gaps), 5), np.nan)
    means, exact = gaps.mean(1), sign_flip_p(gaps)
    alike = np.isclose(gaps, gaps[:, :1], rtol=1e-9, atol=1e-15).all(1)
    errors = np.where(alike, 1.0, gaps.std(1, ddof=1) / math.sqrt(n))  # of pairs that are alike t is not defined
    p = t_test_p(means, errors, n)
    means = np.where(alike, gaps[:, 0], means)
    half = np.where(alike, np.nan, _critical(n) * errors)
    p = np.where(alike, np.where(means == 0, 1.0, exact), p)
    return np.stack([means, means - half, means + half, p, exact], axis=1)


def t_test_p(means: np.ndarray, errors: np.ndarray, n: int) -> np.ndarray:
    """Return the two-sided p of the paired t test, of mean differences over n seeds and their standard errors."""
    p: np.ndarray = 2 * stdtr(n - 1, -np.abs(means / errors))
    return p


def sign_flip_p(gaps: np.ndarray) -> np.ndarray:
    """Return the two-sided p of the sign-flip test for each row of differences (pairs, n).

    All 2^n patterns of signs up to n = 13, beyond it 9999 random ones, the same for all rows.
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
class FilmComparison:
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
    def significant(self) -> bool:
        """Whether the trained models differ at 5 % after the correction for all pairs."""
        return self.p_holm < ALPHA


def compare_films(values: Mapping[str, Mapping[int, Sequence[float]]]) -> list[FilmComparison]:
    """Compare every pair of methods that judged equally many films.

    Args:
        values: Name -> seed -> one value a film, in the order of the films.
    """
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
                FilmComparison(a, b, len(seeds), len(of_a[seeds[0]]), better, worse, _sign_test(better, better + worse))
            )
    corrected = holm([one.p for one in found])
    return [replace(one, p_holm=p) for one, p in zip(found, corrected, strict=True)]


@cache
def _sign_test(better: int, unequal: int) -> float:
    """The exact two-sided sign test."""
    return min(1.0, 2 * float(bdtr(min(better, unequal - better), unequal, 0.5)))


def holm(ps: Sequence[float] | np.ndarray) -> list[float]:
    """Correct p values for multiple tests (Holm 1979), in their order: at 5 %, 1 report in 20 has a false positive."""
    return [float(p) for p in holm_rows(np.asarray(ps, float))]


def holm_rows(values: np.ndarray) -> np.ndarray:
    """Correct each row of p values, (..., tests), for the tests of that row: `holm` for many reports at once."""
    order = np.argsort(values, axis=-1, kind="stable")
    ranked = np.take_along_axis(values, order, -1) * np.arange(values.shape[-1], 0, -1)
    corrected = np.empty_like(values)
    np.put_along_axis(corrected, order, np.maximum.accumulate(np.minimum(1.0, ranked), axis=-1), -1)
    return corrected


def compact_letters(names: Sequence[str], significant_pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return letters for each name: two names share one exactly if they do not differ significantly.

    This is the compact letter display, by insertion and absorption: each significant pair splits every set that holds
    both, and sets within other sets are dropped. Empty if more than `MOST_SETS` sets are needed, which nobody can read.
    """
    sets = [set(names)]
    for a, b in significant_pairs:
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


def detectable_effect(n: int, pairs: int) -> float:
    """Return how large the mean of n paired differences must be for the first of `pairs` to be significant.

    In standard deviations of the differences.
    """
    return float(stdtrit(n - 1, 1 - ALPHA / 2 / pairs)) / math.sqrt(n)


def pareto_front(costs: Mapping[str, float], rank: Callable[[str], float]) -> list[str]:
    """Return the Pareto front, cheapest first: the names that no other beats in cost and rank (smaller is better)."""
    places = sorted((costs[name], rank(name), i, name) for i, name in enumerate(costs))
    kept: list[tuple[float, float, int, str]] = []
    for place in places:
        if not kept or place[1] < kept[-1][1] or place[:2] == kept[-1][:2]:
            kept.append(place)
    return [name for *_, name in kept]
