"""Every check catches the mutants made for it, by what it says and not by a crash; unbroken bases pass."""

from dataclasses import replace
from typing import Any

import pytest

import sparse_zoo as zoo
from sparse_zoo import testing
from sparse_zoo.kernels.base import Kernel
from sparse_zoo.testing import kernels, methods
from sparse_zoo.testing.mutants import MUTANTS, Mutant
from sparse_zoo.testing.mutants.kernels import Plain
from sparse_zoo.testing.mutants.moc import Dropping, Noisy, Open
from sparse_zoo.testing.mutants.segments import Weighing
from sparse_zoo.testing.mutants.sizes import Unruled
from sparse_zoo.testing.mutants.tiles import OpenReach


def one_for_each_check() -> set[str]:
    """Names of mutants: for each check one that it catches."""
    caught: set[str] = set()
    names = set()
    for mutant in MUTANTS:
        if not caught.issuperset(mutant.caught_by):
            names.add(mutant.name)
            caught.update(mutant.caught_by)
    return names


QUICK = one_for_each_check()


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(mutant, id=mutant.name, marks=[] if mutant.name in QUICK else pytest.mark.slow)
        for mutant in MUTANTS
    ],
)
def test_each_mutant_is_caught_by_the_checks_named(mutant: Mutant) -> None:
    outcomes = mutant.outcomes()
    assert {outcome.check for outcome in outcomes} == set(mutant.caught_by)
    for outcome in outcomes:
        assert outcome.status == "failed", outcome
        assert "expected no error while checking" not in outcome.reason, outcome


def test_every_check_has_a_mutant() -> None:
    caught = {check for mutant in MUTANTS for check in mutant.caught_by}
    assert caught == set(testing.checks()) | set(testing.kernel_checks())
    assert len(MUTANTS) >= 30
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert all(mutant.broken.endswith(".") for mutant in MUTANTS)


@pytest.mark.parametrize(
    "base", [Dropping, Noisy, Unruled, *(pytest.param(x, marks=pytest.mark.slow) for x in (Open, OpenReach))]
)
def test_unbroken_base_passes_the_checks_that_catch_its_mutants(base: type[zoo.Attention]) -> None:
    only = {check for mutant in MUTANTS if issubclass(mutant.cls, base) for check in mutant.caught_by}
    assert {outcome.status for outcome in testing.check_method(base, only=only)} == {"passed"}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [Plain(), Weighing()], ids=lambda kernel: kernel.name)
def test_unbroken_kernel_passes_every_check(kernel: Kernel) -> None:
    others = {outcome.check: outcome.status for outcome in testing.check_kernel(kernel) if outcome.status != "passed"}
    assert others == ({} if kernel.weighs_keys else {"kernel_log_weights": "skipped"})


@pytest.mark.slow
@pytest.mark.parametrize("name", [*testing.checks(), *testing.kernel_checks()])
def test_an_emptied_check_lets_its_mutants_through(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    every: dict[str, Any] = methods._all if name in methods._all else kernels._all
    monkeypatch.setitem(every, name, replace(every[name], function=lambda _: None))
    mutants = [replace(mutant, caught_by=(name,)) for mutant in MUTANTS if name in mutant.caught_by]
    assert {outcome.status for mutant in mutants for outcome in mutant.outcomes()} == {"passed"}
