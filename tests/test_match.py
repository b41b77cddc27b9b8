"""Equal budgets: a knob is turned until the measured cost is what was asked, or it is said why it cannot be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiers import cases
from tiny import BASE, write_sweep
from typer.testing import CliRunner

import sparse_zoo as zoo
from experiments.cli import app
from experiments.config.datamodule import build
from experiments.config.resolve import Config, cell, load
from experiments.sweep import budget, preflight
from experiments.sweep.budget import Budget, Solution, solve, solved
from experiments.sweep.expand import read
from experiments.tracking import store
from lit_modules import RectifiedFlow, VideoDiT
from lit_modules.flow import generator
from sparse_zoo.errors import ZooError
from sparse_zoo.testing.declarations import between

RAGGED: dict[str, Any] = {  # films of 2 to 6 shots of 1 to 3 frames, packed
    **BASE,
    "data": {
        "name": "shot_world",
        "subjects": [1, 3],
        "frames_per_shot": [1, 3],
        "grid": [2, 3],
        "patch": [1, 3, 3],
        "batch_size": 3,
        "films_per_epoch": 30,
    },
    "model": {"dim": 24, "depth": 2, "heads": 2},
}


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    preflight._run_preflight.cache_clear()
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "runs"))


def found_on_a_line(knob: zoo.Knob, cost: Callable[[Any], float], goal: float, **more: Any) -> tuple[Solution, int]:
    """The solution where cost depends on the knob alone, and how often it was asked for."""
    asked: list[Any] = []

    def measure(settings: dict[str, Any]) -> float:
        asked.append(settings)
        return cost(settings[knob.setting])

    return solve(knob, measure, goal, **more), len(asked)


# -- the search by itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", [0.021, 0.16, 0.333, 0.5, 0.99])
@pytest.mark.parametrize("ends", [(1, 64), (64, 1)])
def test_a_whole_number_is_the_nearest_of_all(ends: tuple[int, int], goal: float) -> None:
    low, high = ends
    cost = (lambda x: x / 64) if high > low else (lambda x: (65 - x) / 64)
    found, asked = found_on_a_line(zoo.Knob("k", low, high), cost, goal)
    best = min(range(1, 65), key=lambda x: abs(cost(x) - goal))
    assert found.settings == {"k": best}
    assert asked <= 8 + 2 * budget.AROUND  # bisection, and where it does not hit, a look around
    assert found.reached == (abs(cost(best) - goal) <= 0.02 * goal)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0), (1e-6, 1.0), (1.0, 1e-6)])
def test_a_fraction_is_bisected(ends: tuple[float, float]) -> None:
    low, high = ends
    rising = high > low
    found, asked = found_on_a_line(zoo.Knob("p", low, high), lambda p: p**3 if rising else (1 - p) ** 0.5, 0.16)
    assert found.error < 0.005
    assert asked < 64
    assert found.settings["p"] == float(f"{found.settings['p']:.5g}")  # a number that reads well in a config


def test_a_wide_range_is_searched_by_factors() -> None:
    found, _ = found_on_a_line(zoo.Knob("threshold", 1.0, 1e-6), lambda p: -math.log10(p) / 6, 0.9)
    assert found.settings["threshold"] == pytest.approx(10**-5.4, rel=0.01)
    assert found.error < 0.001


def test_first_value_of_a_plateau_is_chosen() -> None:
    """A film of few chunks: from some top_k on, all of them are taken."""
    found, _ = found_on_a_line(zoo.Knob("top_k", 1, 64), lambda k: min(k // 4, 3) / 4, 0.75)
    assert found.settings == {"top_k": 12}
    below, _ = found_on_a_line(zoo.Knob("top_k", 1, 64), lambda k: min(k // 4, 3) / 4, 0.26)
    assert below.settings == {"top_k": 4}
    ended, _ = found_on_a_line(zoo.Knob("top_k", 1, 64), lambda k: min(k // 4, 3) / 4, 0.9)
    assert ended.settings == {"top_k": 12}
    assert not ended.reached


def test_a_window_is_the_nearest_of_all_triples() -> None:
    knob = zoo.Knob("window", (1, 1, 1), (9, 9, 9))
    tiles = (3, 9, 5)

    def cost(window: list[int]) -> float:
        a, b, c = (min(size, most) / most for size, most in zip(window, tiles, strict=True))
        return a * b * c

    odd = [(a, b, c) for a in (1, 3) for b in (1, 3, 5, 7, 9) for c in (1, 3, 5)]
    for goal in (0.02, 0.1, 0.16, 0.3, 0.55, 1.0):
        found, _ = found_on_a_line(knob, cost, goal, accepts=lambda own: all(size % 2 for size in own["window"]))
        assert found.cost == min((cost(list(triple)) for triple in odd), key=lambda x: abs(x - goal))
        assert isinstance(found.settings["window"], list)  # as a config has it
        assert all(size % 2 for size in found.settings["window"])
    # Of triples that cost the same the most even one, and no larger than the film.
    even, _ = found_on_a_line(knob, lambda w: sum(min(size, 3) for size in w), 5)
    assert even.settings == {"window": [2, 2, 1]} or sorted(even.settings["window"]) == [1, 2, 2]


def test_a_second_setting_is_tried_in_the_order_given() -> None:
    asked: list[dict[str, Any]] = []

    def measure(own: dict[str, Any]) -> float:
        asked.append(own)
        return float(own["top_k"] * own["chunk_tokens"] / 100)

    knob = zoo.Knob("top_k", 1, 10)
    found = solve(knob, measure, 0.17, {"chunk_tokens": [30, 17, 1]})
    assert found.settings == {"chunk_tokens": 17, "top_k": 1}
    assert not any(own["chunk_tokens"] == 1 for own in asked)  # the first that comes near enough is taken
    none = solve(knob, measure, 0.17, {"chunk_tokens": [30, 25]})
    assert none.settings == {"chunk_tokens": 25, "top_k": 1}
    assert not none.reached
    both = solve(knob, lambda own: own["a"] * own["b"] * own["top_k"] / 1000, 0.022, {"a": [1, 11], "b": [2, 7]})
    assert both.settings == {"a": 11, "b": 2, "top_k": 1}


def test_a_cost_that_falls_now_and_then_is_looked_around() -> None:
    """As with a random router: it rises in the mean alone."""
    costs = [0.10, 0.12, 0.20, 0.15, 0.16, 0.22, 0.19, 0.30, 0.31, 0.32]
    found, _ = found_on_a_line(zoo.Knob("k", 0, 9), lambda k: costs[k], 0.16)
    assert found.settings == {"k": 4}


def test_the_reasons_name_what_ends() -> None:
    knob = zoo.Knob("top_k", 1, 4)
    reach = "it can reach 0.1 to 0.4, with top_k from 1 to 4"
    for goal, said in (
        (0.9, f"moc cannot reach density 0.9: the closest is 0.4 at top_k=4, its upper bound; {reach}"),
        (0.01, f"moc cannot reach density 0.01: the closest is 0.1 at top_k=1, its lower bound; {reach}"),
        (
            0.25,
            "moc cannot reach density 0.25: the closest is 0.2 at top_k=2, not within 0.02 of it "
            f"(0.2 at top_k=2, 0.3 at top_k=3); {reach}. Vary another",
        ),
    ):
        found, _ = found_on_a_line(knob, lambda k: k / 10, goal)
        assert found.why_not(knob, "moc", "density", "Vary another") == said
    falling = zoo.Knob("groups", 64, 4)  # more groups cost less
    found, _ = found_on_a_line(falling, lambda groups: 1 / groups, 0.01)
    assert found.why_not(falling, "moga", "density", "").startswith(
        "moga cannot reach density 0.01: the closest is 0.01562 at groups=64, its upper bound; it can reach 0.01562 to"
    )


def test_the_tolerance_is_a_setting() -> None:
    knob = zoo.Knob("top_k", 1, 4)

    def cost(own: dict[str, Any]) -> float:
        return float(own["top_k"] / 10)

    assert not solve(knob, cost, 0.28).reached
    assert solve(knob, cost, 0.28, within=0.1).reached
    assert solve(knob, cost, 0.28, within=0.1).settings == {"top_k": 3}
    assert Budget.of({"density": 0.5}).within == 0.02
    assert Budget.of({"density": 0.5, "within": 0.1}).within == 0.1
    for wrong in (0, 1, -0.1, "much", True, float("nan"), None):
        with pytest.raises(ZooError, match=r"match.within must be a number between 0 and 1, .* got"):
            Budget.of({"density": 0.5, "within": wrong})


# -- measured on the films of a config ---------------------------------------------------------------------------------


def of_masks(config: Config) -> float:
    """Density by plain counting: real attention on whole batches, the dense mask of every plan, heads and items."""
    data = build(config["data"])
    torch.manual_seed(config["seed"])
    shape: dict[str, Any] = {"channels": data.channels, "patch": data.patch, "vocabulary": data.vocabulary}
    model = VideoDiT(**config["model"], **shape, attention=config["attention"])
    attended = possible = 0
    for number, batch in zip(range(4), data.train_dataloader(), strict=False):
        draws, seed = generator("train", 0, 0, number), generator("attention", 0, 0, number).initial_seed()
        flow = RectifiedFlow(**config["flow"])
        sample = batch["layout"].sample
        for result in flow.training_loss(model, batch, draws, step=0, seed=seed).output.results:
            heads = config["model"]["heads"]
            attended += sum(int(plan.dense_mask().expand(1, heads, -1, -1).sum()) for plan in result.plans)
            possible += heads * int((sample[:, None] == sample).sum())
    return attended / possible


@pytest.mark.parametrize(
    ("attention", "target"),
    [
        ({"name": "moc", "anchors": ["shot"], "causal": None}, 0.5),
        ({"name": "moc", "anchors": ["shot"], "causal": None, "text_reads": "text", "drop_off": 0.5}, 0.42),
        ({"name": "moga", "mix": ["group"]}, 0.6),
        pytest.param({"name": "window", "tile": [1, 1, 1]}, 0.75, marks=pytest.mark.slow),
    ],
    ids=["moc", "moc dropping", "moga", "window"],
)
def test_the_target_is_hit_on_ragged_films(attention: dict[str, Any], target: float) -> None:
    config = solved(load([RAGGED, {"attention": attention, "match": {"density": target}}]))
    knob = zoo.get(attention["name"]).knob
    assert knob is not None
    assert config["attention"] == attention | config["match"]["set"]
    assert config["match"]["set"].keys() == {knob.setting}
    assert of_masks(config) == pytest.approx(target, rel=0.02)
    preflight._run_preflight.cache_clear()
    assert solved(load([RAGGED, {"attention": attention, "match": {"density": target}}])) == config


@pytest.mark.parametrize(
    "name", cases([name for name in zoo.names() if zoo.get(name).knob is not None], ["moc", "moga", "window", "vmoba"])
)
def test_what_a_knob_can_buy_is_found(name: str) -> None:
    """For every method: the density at a value of its knob is asked for, and reached again."""
    knob = zoo.get(name).knob
    assert knob is not None
    own = {key: value for key, value in zoo.get(name).small.items() if key != knob.setting}
    own = json.loads(json.dumps({"name": name, **own}))
    value = json.loads(json.dumps(between(knob)[1]))
    there = preflight.run_preflight(load([RAGGED, {"attention": own | {knob.setting: value}}])).density
    config = solved(load([RAGGED, {"attention": own, "match": {"density": there}}]))
    assert preflight.run_preflight(config).density == pytest.approx(there, rel=0.02)


def test_flops_and_seconds_are_budgets_too(monkeypatch: pytest.MonkeyPatch) -> None:
    moc = {"name": "moc", "anchors": ["shot"], "causal": None}
    asked = preflight.run_preflight(load([RAGGED, {"attention": moc | {"top_k": 3}}])).attention_flops
    config = solved(load([RAGGED, {"attention": moc, "match": {"flops": asked}}]))
    assert preflight.run_preflight(config).attention_flops == pytest.approx(asked, rel=0.02)
    monkeypatch.setattr(budget, "step_seconds", lambda config: 0.1 + 0.01 * config["attention"]["top_k"])
    config = solved(load([RAGGED, {"attention": moc, "match": {"seconds": 0.4}}]))
    assert config["match"] == {"seconds": 0.4, "set": {"top_k": config["attention"]["top_k"]}}
    assert 0.392 <= 0.1 + 0.01 * config["attention"]["top_k"] <= 0.408


@pytest.mark.slow
def test_layers_share_what_those_without_a_knob_leave() -> None:
    moc = {"name": "moc", "anchors": ["shot"], "causal": None}
    layers = [{"name": "dense"}, moc, {"name": "window", "tile": [1, 1, 1]}, moc]
    config = solved(load([RAGGED, {"model.depth": 4, "attention": layers, "match": {"density": 0.7675}}]))
    found = preflight.run_preflight(config)
    assert found.density == pytest.approx(0.7675, rel=0.02)
    assert found.layers[0].density == 1
    for layer in found.layers[1:]:
        assert layer.density == pytest.approx((4 * 0.7675 - 1) / 3, rel=0.02)
    assert [list(own) for own in config["match"]["set"]] == [[], ["top_k"], ["window"], ["top_k"]]
    assert config["attention"][1] == config["attention"][3] == moc | config["match"]["set"][1]
    with pytest.raises(ZooError, match="take it all"):
        solved(load([RAGGED, {"model.depth": 4, "attention": layers, "match": {"density": 0.2}}]))
    with pytest.raises(ZooError, match="only one of several methods may have a knob"):
        solved(load([RAGGED, {"model.depth": 4, "attention": layers, "match": {"seconds": 1}}]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention": "moc", "attention.top_k": 3}, "top_k of moc is to be solved: leave it out"),
        ({"attention": "dense"}, "its density is always 1, got match.density 0.3; `match: null` in a cell excludes it"),
        (
            {"attention": "dense", "match": {"density": 2}},
            "has no knob that sets its cost: its density is always 1, got match.density 2",
        ),
        ({"attention": {"name": "moc", "schedule": {"causal": {0: None, 5: "routing"}}}}, "has a schedule"),
        ({"attention": "moc", "match": {"density": 5.0}}, "; it can reach 0.5135 to 0.727, with top_k from 1 to 64"),
        ({"match": {"densty": 0.1}}, "unknown key of match 'densty'; did you mean 'density'"),
        ({"match": {"density": 0.1, "flops": 3}}, "match needs one of density, flops, seconds, got density, flops"),
        ({"match": {"density": "much"}}, "match.density must be a number above 0, got 'much'"),
        ({"match": 0.16}, "match must be a mapping or null, got 0.16"),
        ({"match": {"density": 0.1, "also": {"mocc": {}}}}, "unknown method under match.also 'mocc'"),
        ({"match": {"density": 0.1, "also": {"moc": {"topk": [1]}}}}, "match.also.moc: unknown setting 'topk'"),
        ({"match": {"density": 0.1, "also": {"moc": {"chunk": "shot"}}}}, "match.also.moc.chunk must be a list"),
        ({"match": {"density": 0.1, "also": [3]}}, "match.also must be {method: {setting: candidates}}"),
    ],
)
def test_what_cannot_be_matched_says_why(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError) as caught:
        solved(load([RAGGED, {"match": {"density": 0.3}}, overrides]))
    assert message in str(caught.value)


# -- in a sweep --------------------------------------------------------------------------------------------------------

MOC = {"name": "moc", "anchors": ["shot"], "causal": None}
MOGA = {"name": "moga", "mix": ["group"]}
BUDGET: dict[str, Any] = {
    "base": RAGGED,
    "match": {"density": 0.5},
    "seeds": 3,
    "axes": {"attention": {"moc": MOC, "moga": MOGA}},
    "cells": {"dense": {"attention": "dense", "match": None}},
}


@pytest.mark.slow
def test_seeds_share_one_solution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    solving = budget._solve
    monkeypatch.setattr(budget, "_solve", lambda config, *rest: asked.append(config["seed"]) or solving(config, *rest))
    told: list[str] = []
    sweep = read(write_sweep(tmp_path / "s.yaml", **BUDGET), told=told.append)
    assert asked == [0, 0]
    assert told == ["moc", "moga"]
    cells = {cell.name: cell for cell in sweep.cells}
    top_k = cells["moc-s0"].config["attention"]["top_k"]
    for seed in range(3):
        config = cells[f"moc-s{seed}"].config
        assert config["attention"] == MOC | {"top_k": top_k}
        assert config["match"] == {"density": 0.5, "set": {"top_k": top_k}}
        assert config["seed"] == seed
        assert cells[f"moc-s{seed}"].id == cell("of any name", config).id
        assert "match" not in cells[f"dense-s{seed}"].config
    assert len({cell.id for cell in sweep.cells}) == 9


@pytest.mark.slow
def test_a_solution_is_kept_as_long_as_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_sweep(tmp_path / "kept.yaml", **BUDGET)
    sweep = read(path)
    store.write_sweep("kept", store.SweepRequest("", sweep.cells))
    with monkeypatch.context() as patched:
        patched.setattr(budget, "_solve", lambda *_: pytest.fail("it was solved before"))
        assert read(path) == sweep
        assert read(path, [{"trainer.max_steps": 1}]).cells[0].config["match"] == sweep.cells[0].config["match"]
        with pytest.raises(pytest.fail.Exception):
            read(path, [{"match": {"density": 0.6}}])  # another question
    # What a changed method made of it is no answer any more.
    far = [budget.with_settings(cell.config, {"top_k": 1}) for cell in sweep.cells[:3]]
    stale = tuple(store.Cell(cell.name, config, cell.group) for cell, config in zip(sweep.cells, far, strict=False))
    store.write_sweep("kept", store.SweepRequest("", stale))
    assert read(path) == sweep


@pytest.mark.slow
def test_every_cell_that_misses_is_named_at_once(tmp_path: Path) -> None:
    cells = {"dense": {"attention": "dense"}, "other": {"attention": "moc", "attention.top_k": 2}}
    with pytest.raises(ZooError) as caught:
        read(write_sweep(tmp_path / "s.yaml", **BUDGET | {"match": {"density": 0.01}, "cells": cells}))
    for part in (
        "cell moc: moc cannot reach density 0.01: ",
        "at top_k=1, its lower bound",
        "cell moga: moga cannot reach density 0.01: ",
        "with groups from 64 to 1",
        "cell dense: ",
        "no knob",
        "cell other: ",
    ):
        assert part in str(caught.value)
    # The range that all cells with a knob can reach, against plain measuring at the knobs' ends.
    ends = []
    for attention, low, high in ((MOC, {"top_k": 1}, {"top_k": 64}), (MOGA, {"groups": 64}, {"groups": 1})):
        ends.append(
            [preflight.run_preflight(load([RAGGED, {"attention": attention | own}])).density for own in (low, high)]
        )
    low, high = max(end[0] for end in ends), min(end[1] for end in ends)
    assert f"all cells can reach density {low:.4g} to {high:.4g}" in str(caught.value)


def test_a_tolerance_holds_in_a_sweep(tmp_path: Path) -> None:
    """What 2 % refuses a wider tolerance takes, and the solution is kept."""
    alone: dict[str, Any] = {"base": RAGGED, "cells": {"moc": {"attention": MOC}}}
    few, more = (preflight.run_preflight(load([RAGGED, {"attention": MOC | {"top_k": k}}])).density for k in (1, 2))
    asked = {"density": (few + more) / 2}
    with pytest.raises(ZooError, match=r"cannot reach density .* not within 0.02 of it .* Widen match.within"):
        read(write_sweep(tmp_path / "s.yaml", **alone, match=asked))
    (cell,) = read(write_sweep(tmp_path / "s.yaml", **alone, match=asked | {"within": 0.5})).cells
    assert cell.config["match"].keys() == {"density", "within", "set"}


def test_a_size_and_an_axis_may_ask_for_other_budgets(tmp_path: Path) -> None:
    sizes = {"large": {"match": {"density": 0.7}}, "free": {"match": None}}
    path = write_sweep(tmp_path / "s.yaml", base=RAGGED, match={"density": 0.5}, sizes=sizes, axes={"attention": [MOC]})
    named = {size: read(path, size=size).cells[0].config for size in (None, "large", "free")}
    assert named["large"]["attention"]["top_k"] > named[None]["attention"]["top_k"]
    assert named["free"]["attention"] == MOC
    axes = {"attention": {"moc": MOC}, "match.density": [0.5, 0.7]}
    cells = read(write_sweep(tmp_path / "t.yaml", base=RAGGED, axes=axes)).cells
    assert [cell.name for cell in cells] == ["moc-density=0.5", "moc-density=0.7"]
    assert [cell.config["attention"] for cell in cells] == [named[x]["attention"] for x in (None, "large")]


# -- from the command line ---------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.slow
def test_cost_turns_the_knob() -> None:
    size = [
        "--shots",
        "4",
        "--frames",
        "3",
        "--rows",
        "6",
        "--cols",
        "5",
        "--dim",
        "24",
        "--heads",
        "2",
        "--depth",
        "2",
    ]
    own = ["moc", "anchors=[shot]", "causal=null"]
    there = json.loads(run("cost", *own, "top_k=5", *size, "--json").stdout)["cost"]
    flops = there["flops"]["forward_backward"]
    for asked in (f"density={there['density']}", f"flops={flops['attention'] + flops['routing']}"):
        found = json.loads(run("cost", *own, "--match", asked, *size, "--json").stdout)
        assert found["settings"] == {"anchors": ["shot"], "causal": None, "top_k": 5}
        assert "top_k 5" in run("cost", *own, "--match", asked, *size).stdout
    for wrong, said in (
        ("density=7", "at top_k=9; it can reach 0.6205 to 0.7703, with top_k from 1 to 64"),
        ("seconds=1", "in zoo train and zoo sweep alone"),
        ("density=0", "above 0"),
    ):
        refused = run("cost", "moc", "--match", wrong, *size)
        assert refused.exit_code == 2
        assert said in refused.stderr
    assert "no knob" in run("cost", "dense", "--match", "density=.5", *size).stderr
