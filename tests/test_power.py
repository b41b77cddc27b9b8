"""The number of seeds that finds a difference, against closed forms and against slow tests of simulated sweeps."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from experiments.analysis.power import DRAWS, Spread, power, seeds_needed, smallest_effect
from experiments.analysis.significance import holm, holm_rows, paired_differences

ERROR = 4 * (0.25 / DRAWS) ** 0.5  # four standard errors of a simulated share


@pytest.mark.parametrize(("effect", "seeds"), [(0.5, 10), (1.0, 5), (1.0, 10), (2.0, 4), (0.0, 6)])
def test_two_methods_have_the_power_of_one_paired_t_test(effect: float, seeds: int) -> None:
    critical, centre = stats.t.ppf(0.975, seeds - 1), effect * seeds**0.5
    exact = stats.nct.sf(critical, seeds - 1, centre) + stats.nct.cdf(-critical, seeds - 1, centre)
    assert power(effect, seeds, 2) == pytest.approx(exact, abs=ERROR)


def test_seeds_for_two_methods_are_those_of_the_textbook() -> None:
    """G*Power's example: a paired t test of effect .5 at 5 % needs 34 pairs for 80 %."""
    assert seeds_needed(0.5, 2) == pytest.approx(34, abs=2)
    assert power(0.5, 34, 2) == pytest.approx(0.8078, abs=ERROR)


def test_several_methods_have_the_power_of_the_report() -> None:
    effect, seeds, methods, rng = 1.6, 6, 4, np.random.default_rng(1)
    found = []
    for _ in range(400):
        runs = rng.normal(size=(methods, seeds)) / 2**0.5 + 5 * rng.normal(size=seeds)  # what a seed shifts cancels
        runs[0] += effect
        values = {str(i): dict(enumerate(row)) for i, row in enumerate(runs.tolist())}
        found += [pair.significant for pair in paired_differences(values) if pair.a == "0"]
    assert power(effect, seeds, methods) == pytest.approx(np.mean(found), abs=0.08)
    assert power(effect, seeds, methods) < power(effect, seeds, 2)  # the correction costs power


def test_the_smallest_effect_and_the_seeds_agree() -> None:
    for methods in (2, 9):
        effect = smallest_effect(7, methods)
        assert power(effect, 7, methods) == pytest.approx(0.8, abs=0.01)
        assert seeds_needed(effect, methods) in (6, 7, 8)
    assert seeds_needed(1e-3, 2) is None
    assert smallest_effect(3, 9) > smallest_effect(5, 9) > smallest_effect(9, 9)


def test_the_spread_is_that_of_differences_within_seeds() -> None:
    rng = np.random.default_rng(0)
    runs = rng.normal(size=(5, 4)) + 10 * rng.normal(size=4)
    values = {str(i): dict(enumerate(row)) for i, row in enumerate(runs.tolist())}
    spread = Spread.of(values)
    assert spread is not None
    residual = runs - runs.mean(0) - runs.mean(1, keepdims=True) + runs.mean()
    assert spread.sd**2 == pytest.approx(2 * (residual**2).sum() / (4 * 3))  # of the two-way analysis of variance
    sds = {(a, b): np.std(runs[int(a)] - runs[int(b)], ddof=1) for a, b in combinations(values, 2)}
    assert spread.widest == max(sds, key=lambda pair: sds[pair])
    assert spread.most == pytest.approx(max(sds.values()))
    assert spread.seeds == 4


def test_methods_that_share_no_two_seeds_have_no_spread() -> None:
    assert Spread.of({"a": {0: 0.5}, "b": {0: 0.25}}) is None
    assert Spread.of({"a": {0: 0.5, 1: 0.4}, "b": {1: 0.25, 2: 0.5}}) is None


def test_rows_of_p_values_are_corrected_like_one() -> None:
    rows = np.random.default_rng(0).random((20, 7)) ** 3
    assert [holm(row) for row in rows] == holm_rows(rows).tolist()
