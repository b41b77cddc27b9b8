"""Intervals, paired tests, their correction and their display, against scipy, brute force and hands."""

from __future__ import annotations

from itertools import chain, combinations, product

import numpy as np
import pytest
from scipy import stats

from experiments.analysis.significance import (
    Estimate,
    compact_letters,
    compare_films,
    detectable_effect,
    holm,
    paired_differences,
    pareto_front,
)


def test_the_interval_is_students() -> None:
    values = [0.9, 0.7, 0.8]
    figure = Estimate.of([*values, None])
    assert figure is not None
    assert (figure.mean, figure.sd, figure.n) == (pytest.approx(0.8), pytest.approx(0.1), 3)  # n - 1 below the line
    wide = 4.302652729911275 * 0.1 / 3**0.5  # the t table at .975 and two degrees of freedom
    assert (figure.low, figure.high) == (pytest.approx(0.8 - wide), pytest.approx(0.8 + wide))
    cut = Estimate.of(values, (0.0, 1.0))
    assert cut is not None
    assert (cut.low, cut.high) == (pytest.approx(0.8 - wide), 1.0)
    assert cut.half == pytest.approx(wide)
    assert Estimate.of([0.3]) == Estimate(0.3, None, 1)
    assert Estimate.of([None]) is None


def test_pairs_share_their_seeds() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=7), rng.normal(0.5, size=7)
    by_seed = {"a": dict(enumerate(a)), "b": {**dict(list(enumerate(b))[1:]), 9: 100.0}, "c": {3: 1.0}}
    pair, lone, other = paired_differences(by_seed)
    want = stats.ttest_rel(a[1:], b[1:])
    interval = want.confidence_interval()
    assert (pair.a, pair.b, pair.n) == ("a", "b", 6)
    assert pair.mean == pytest.approx(np.mean(a[1:] - b[1:]))
    assert pair.p == pytest.approx(want.pvalue)
    assert (pair.low, pair.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    gaps = a[1:] - b[1:]
    sign_flip_p = [abs(np.mean(gaps * signs)) for signs in product((1, -1), repeat=6)]
    assert pair.p_exact == pytest.approx(np.mean(np.array(sign_flip_p) >= abs(gaps.mean()) - 1e-12))
    assert pair.p_holm == pair.p  # the only one that could be tested
    for untested in (lone, other):
        assert (untested.n, untested.p, untested.p_holm, untested.significant) == (1, None, None, False)


def test_differences_without_spread_are_no_proof() -> None:
    """Three runs that differ by one film each have no spread, by chance: t would be infinite."""
    always = {"a": {0: 0.998, 1: 1.0, 2: 0.996}, "b": {0: 0.996, 1: 0.998, 2: 0.994}, "c": {0: 0.998, 1: 1.0, 2: 0.996}}
    ab, ac, _ = paired_differences(always)
    assert ab.mean == pytest.approx(0.002)
    assert (ab.p, ab.low, ab.significant) == (0.25, None, False)
    assert (ac.p, ac.mean, ac.significant) == (1.0, 0.0, False)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_letters_are_shared_exactly_where_no_difference_is_significant() -> None:
    rng = np.random.default_rng(1)
    for size in (1, 2, 4, 6):
        names = [f"m{i}" for i in range(size)]
        for _ in range(20):
            apart = [pair for pair in combinations(names, 2) if rng.random() < 0.5]
            marks = compact_letters(names, apart)
            for a, b in combinations(names, 2):
                assert bool(set(marks[a]) & set(marks[b])) == ((a, b) not in apart)
            subsets = chain.from_iterable(combinations(names, k) for k in range(1, size + 1))
            alike = [set(s) for s in subsets if not any(pair in apart for pair in combinations(s, 2))]
            largest = [s for s in alike if not any(s < other for other in alike)]
            assert len(set("".join(marks.values()))) == len(largest)  # not a letter more than needed
    assert compact_letters(["best", "mid", "worst"], [("best", "worst")]) == {"best": "a", "mid": "ab", "worst": "b"}


def test_films_are_compared_as_mcnemar_does() -> None:
    a, b = [1] * 8 + [0] * 2 + [1] * 30, [0] * 8 + [1] * 2 + [1] * 30
    (one,) = compare_films({"a": {0: a}, "b": {0: b}})
    assert (one.films, one.better, one.worse, one.seeds) == (40, 8, 2, 1)
    assert one.p == pytest.approx(2 * sum(stats.binom.pmf(k, 10, 0.5) for k in range(3)))
    # A film that both models of the other seed judge the other way round is a tie: films count, not runs.
    (two,) = compare_films({"a": {0: a, 1: b}, "b": {0: b, 1: a}})
    assert (two.films, two.better, two.worse, two.p) == (40, 0, 0, 1.0)
    assert compare_films({"a": {0: a}, "b": {1: b}}) == []
    assert compare_films({"a": {0: a}, "b": {0: b[:-1]}}) == []


def test_films_are_corrected_for_each_other() -> None:
    hits, misses = [1.0] * 8, [0.0] * 8
    found = compare_films({"a": {0: hits}, "b": {0: misses}, "c": {0: misses}})
    assert [one.p for one in found] == pytest.approx([2 / 2**8, 2 / 2**8, 1.0])
    assert [one.p_holm for one in found] == pytest.approx([6 / 2**8, 6 / 2**8, 1.0])


def test_detectable_is_where_the_first_pair_holds() -> None:
    for n, others in ((3, 1), (5, 3)):
        gaps = np.arange(n, dtype=float)
        gaps = (gaps - gaps.mean()) / gaps.std(ddof=1)
        for factor, holds in ((0.99, False), (1.01, True)):
            shift = factor * detectable_effect(n, others + 1)
            p = stats.ttest_1samp(gaps + shift, 0.0).pvalue
            assert (holm([p] + [1.0] * others)[0] < 0.05) == holds


def test_front_is_what_no_other_beats() -> None:
    costs = {"cheap": 1.0, "mid": 2.0, "twin": 2.0, "dear": 4.0, "waste": 5.0, "dull": 3.0}
    quality = {"cheap": 0.1, "mid": 0.5, "twin": 0.5, "dear": 0.9, "waste": 0.9, "dull": 0.4}
    assert pareto_front(costs, lambda name: -quality[name]) == ["cheap", "mid", "twin", "dear"]
    assert pareto_front(costs, lambda name: quality[name]) == ["cheap"]


def test_nulls_are_called_differences_at_the_nominal_rate() -> None:
    """Methods do not differ, seeds do: one verdict is false in 5 % of cases, any of six in at most 5 %."""
    rng, alone, any_of_six, covered = np.random.default_rng(2), 0, 0, 0
    times = 400
    for _ in range(times):
        seeds = rng.normal(scale=5, size=4)  # what runs of one seed share must drop out
        runs = {name: dict(enumerate(seeds + rng.normal(size=4))) for name in "abcd"}
        found = paired_differences(runs)
        first = found[0]
        assert first.p is not None
        assert first.low is not None
        assert first.high is not None
        alone += first.p < 0.05
        covered += first.low <= 0 <= first.high
        any_of_six += any(pair.significant for pair in found)
    # Within three standard errors of 5 %; Holm over dependent pairs may be rarer.
    slack = 3 * (0.05 * 0.95 / times) ** 0.5
    assert abs(alone / times - 0.05) < slack
    assert covered == times - alone
    assert 0 < any_of_six / times < 0.05 + slack


def test_what_seeds_share_does_not_hide_a_difference() -> None:
    seeds = np.array([0.1, 5.0, 9.0, 2.0, 7.0])
    runs = {"a": dict(enumerate(seeds + 1 + np.array([0, 0.05, -0.05, 0.02, 0]))), "b": dict(enumerate(seeds))}
    (pair,) = paired_differences(runs)
    assert pair.significant
    assert stats.ttest_ind([*runs["a"].values()], [*runs["b"].values()]).pvalue > 0.5  # unpaired it would be hidden
