"""What a setting does is told with all else equal, or it is said that it is not."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.analysis.ablations import AblationCell, MainEffect, main_effects
from experiments.analysis.metrics import Measure

RECALL = Measure.of("identity_recall")


def cell(name: str, attention: Any, values: dict[int, float], **config: Any) -> AblationCell:
    return AblationCell(name, {"seed": 0, "attention": attention, **config}, values)


def of(found: list[MainEffect], name: str) -> MainEffect:
    (one,) = [effect for effect in found if effect.name == name]
    return one


def means(effect: MainEffect) -> dict[Any, float]:
    return {level.value[0]: level.estimate.mean for level in effect.levels}


def test_a_full_grid_is_averaged_over_all_else() -> None:
    grid = [
        cell(f"{k}-{lr}", {"name": "moc", "top_k": k}, {0: k / 10 + 100 * lr, 1: k / 10}, optim={"lr": lr})
        for k in (4, 1, 2)
        for lr in (1e-3, 2e-3)
    ]
    found = main_effects(grid, Measure.of("val_loss"))
    assert [effect.name for effect in found] == ["optim.lr", "moc: top_k"]
    top_k = of(found, "moc: top_k")
    assert means(top_k) == pytest.approx({1: 0.175, 2: 0.275, 4: 0.475})
    assert [level.value for level in top_k.levels] == [(1,), (2,), (4,)]  # numbers in order
    assert (top_k.crossed, top_k.combinations) == (2, 2)
    assert top_k.levels[0].cells == ("1-0.001", "1-0.002")
    # The seed is the unit: its mean over the cells, two of them.
    assert top_k.levels[0].estimate.n == 2
    assert top_k.levels[0].estimate.sd == pytest.approx(0.15 / 2**0.5)
    assert len(top_k.levels[0].values) == 4


def test_single_changes_are_held_against_what_they_change() -> None:
    """As in the quickstart: a method, and variants that change one setting each; defaults count."""
    found = main_effects(
        [
            cell("dense", {"name": "dense"}, {0: 0.9}),
            cell("moc", {"name": "moc", "top_k": 3}, {0: 0.5}),
            cell("k1", {"name": "moc", "top_k": 1}, {0: 0.4}),
            cell("bare", {"name": "moc", "top_k": 3, "anchors": []}, {0: 0.1}),
        ],
        RECALL,
    )
    top_k, anchors = of(found, "moc: top_k"), of(found, "moc: anchors")
    assert means(top_k) == {1: 0.4, 3: 0.5}  # bare is left out: it has no twin of top_k 1
    assert (top_k.crossed, top_k.combinations) == (1, 2)
    assert {str(level.value[0]): level.estimate.mean for level in anchors.levels} == {
        "['text', 'shot']": 0.5,
        "[]": 0.1,
    }
    method = of(found, "method")
    assert means(method) == pytest.approx({"dense": 0.9, "moc": (0.5 + 0.4 + 0.1) / 3})
    assert (method.crossed, method.combinations) == (1, 1)  # its variants are inside a method, not beside it


def test_settings_of_methods_are_apart() -> None:
    found = main_effects(
        [
            cell(f"{name}{k}", {"name": name, "top_k": k}, {0: value})
            for name, k, value in (("moc", 1, 0.1), ("moc", 2, 0.2), ("other", 1, 0.5), ("other", 2, 0.9))
        ],
        RECALL,
    )
    assert means(of(found, "moc: top_k")) == {1: 0.1, 2: 0.2}
    assert means(of(found, "other: top_k")) == {1: 0.5, 2: 0.9}  # not registered: as given
    assert means(of(found, "method")) == pytest.approx({"moc": 0.15, "other": 0.7})


def solved(name: str, top_k: int, value: float, density: float | None = 0.375, **settings: Any) -> AblationCell:
    match = None if density is None else {"density": density, "also": {}, "set": {"top_k": top_k}}
    return cell(name, {"name": "moc", "top_k": top_k, **settings}, {0: value}, match=match)


def test_what_one_budget_was_solved_to_is_no_setting() -> None:
    """Causality at equal cost, whatever top_k it took."""
    rows = solved("rows", 6, 0.9, chunk_tokens=3, causal=None)
    causal = solved("causal", 8, 0.5, chunk_tokens=3, causal="routing")
    longer = solved("longer", 4, 0.8, chunk_tokens=5, causal=None)
    found = main_effects([rows, causal, longer], RECALL)
    assert {effect.name for effect in found} == {"moc: causal", "moc: chunk_tokens"}
    effect = of(found, "moc: causal")
    assert (means(effect), effect.crossed, effect.combinations) == ({None: 0.9, "routing": 0.5}, 1, 2)

    # Of two budgets, and beside a cell that has none, it is what differs.
    wider = solved("wider", 12, 0.95, 0.75, chunk_tokens=3, causal=None)
    assert means(of(main_effects([rows, wider], RECALL), "moc: top_k")) == {6: 0.9, 12: 0.95}
    given = solved("given", 2, 0.6, None, chunk_tokens=3, causal=None)
    assert means(of(main_effects([rows, given], RECALL), "moc: top_k")) == {2: 0.6, 6: 0.9}


def test_settings_that_change_together_are_one() -> None:
    found = main_effects(
        [
            cell("off", {"name": "moc"}, {0: 0.9}, match={"set": {"top_k": 1}}),
            cell("on", {"name": "moc", "drop_off": 1.0, "drop_in": 0.5}, {0: 0.4}, match={"set": {"top_k": 2}}),
        ],
        RECALL,
    )
    assert [effect.name for effect in found] == ["moc: drop_off, drop_in"]
    assert [level.value for level in found[0].levels] == [(0.0, 0.0), (1.0, 0.5)]


def test_what_was_never_run_alike_is_called_unbalanced() -> None:
    corners = [
        cell("a", {"name": "moc", "top_k": 1}, {0: 0.1}, optim={"lr": 1.0}, x=1),
        cell("b", {"name": "moc", "top_k": 2}, {0: 0.2}, optim={"lr": 2.0}, x=1),
        cell("c", {"name": "moc", "top_k": 2}, {0: 0.6}, optim={"lr": 3.0}, x=2),
    ]
    top_k = of(main_effects(corners, RECALL), "moc: top_k")
    assert top_k.crossed == 0
    assert means(top_k) == pytest.approx({1: 0.1, 2: 0.4})


def test_a_seed_that_a_cell_lacks_is_left_out_of_its_level() -> None:
    grid = [
        cell(f"{k}{lr}", {"name": "moc", "top_k": k}, values, optim={"lr": lr})
        for (k, lr), values in {
            (1, 1): {0: 0.1, 1: 0.3},
            (1, 2): {0: 0.3},  # seed 1 failed
            (2, 1): {0: 0.5, 1: 0.5},
            (2, 2): {0: 0.7, 1: 0.7},
        }.items()
    ]
    top_k = of(main_effects(grid, RECALL), "moc: top_k")
    assert means(top_k) == pytest.approx({1: 0.2, 2: 0.6})
    assert [level.estimate.n for level in top_k.levels] == [1, 2]


def test_layers_that_differ_are_one_value() -> None:
    mixed = [{"name": "dense"}, {"name": "moc"}]
    (only,) = main_effects([cell("a", mixed, {0: 0.1}), cell("b", {"name": "dense"}, {0: 0.2})], RECALL)
    assert [level.value for level in only.levels] == [(mixed,), ("dense",)]
    assert main_effects([cell("a", mixed, {0: 0.1})], RECALL) == []
