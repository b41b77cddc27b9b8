"""What a sweep file can say beyond axes, cells and seeds, and how a file that cannot mean anything is refused."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from tiny import BASE, OWN_AND_PREVIOUS, write_sweep

from experiments.config.resolve import load
from experiments.sweep.expand import read
from experiments.sweep.grid import grid, matches, varying_settings
from sparse_zoo.errors import ZooError

MOC = {"name": "moc"}


def refused(path: Path) -> str:
    with pytest.raises(ZooError) as caught:
        read(path)
    return str(caught.value)


def test_axes_and_zips_multiply() -> None:
    """Against plain loops."""
    axes = {"a": [1, 2], "b": {"one": [1], "two": [2]}}
    zips = [{"c": [10, 20, 30], "d.e": ["x", "y", "z"]}, {"f": [True, False]}]
    want = []
    for a, (name, b), (c, e), f in product(
        [1, 2], [("one", [1]), ("two", [2])], [(10, "x"), (20, "y"), (30, "z")], [True, False]
    ):
        want.append((f"a={a}-{name}-c={c}-{e}-f={f}", {"a": a, "b": b, "c": c, "d.e": e, "f": f}))
    assert grid(axes, zips) == want
    assert grid({}, []) == []


def test_a_zip_is_walked_in_step(tmp_path: Path) -> None:
    zips = {"attention.chunk_tokens": [4, 8, 16], "attention.top_k": [4, 2, 1]}
    base = {**BASE, "attention": {"name": "moc", "chunk": "tokens"}}
    sweep = read(write_sweep(tmp_path / "z.yaml", base=base, axes={"optim.lr": [0.1, 0.2]}, zip=zips, seeds=2))
    found = [
        (cell.config["optim"]["lr"], cell.config["attention"]["chunk_tokens"], cell.config["attention"]["top_k"])
        for cell in sweep.cells
    ]
    assert found == [(lr, *pair) for lr in (0.1, 0.2) for pair in ((4, 4), (8, 2), (16, 1)) for _ in range(2)]
    assert sweep.cells[0].name == "lr=0.1-chunk_tokens=4-top_k=4-s0"
    assert sweep.cells[0].group == "lr=0.1-chunk_tokens=4-top_k=4"
    two = read(
        write_sweep(tmp_path / "zz.yaml", base=base, zip=[zips, {"optim.lr": [0.1, 0.2], "model.dim": [16, 32]}])
    )
    assert len(two.cells) == 6
    assert {(cell.config["optim"]["lr"], cell.config["model"]["dim"]) for cell in two.cells} == {(0.1, 16), (0.2, 32)}


def test_excluded_cells_are_left_out(tmp_path: Path) -> None:
    names, rates = ["dense", "moc", "window"], [0.1, 0.2, 0.3]
    axes = {"attention": names, "optim.lr": rates, "seed": [0, 1]}
    exclude = [
        {"attention": "dense", "optim.lr": [0.1, 0.3]},  # a list means one of these
        {"attention.name": "moc", "seed": 1},
        {"data.seed": 0, "optim.lr": 0.2},  # the resolved setting: it follows the seed
    ]
    configs = [cell.config for cell in read(write_sweep(tmp_path / "e.yaml", axes=axes, exclude=exclude)).cells]
    found = [(config["attention"]["name"], config["optim"]["lr"], config["seed"]) for config in configs]
    left_out = {("dense", lr, seed) for lr in (0.1, 0.3) for seed in (0, 1)}
    left_out |= {("moc", lr, 1) for lr in rates} | {(name, 0.2, 0) for name in names}
    assert found == [cell for cell in product(names, rates, [0, 1]) if cell not in left_out]


def test_a_cell_that_is_left_out_need_not_be_possible(tmp_path: Path) -> None:
    axes = {"attention": {"moc": MOC, "dense": {"name": "dense"}}, "attention.top_k": [1, 2]}
    assert "top_k" in refused(write_sweep(tmp_path / "e.yaml", axes=axes))
    left = read(write_sweep(tmp_path / "e.yaml", axes=axes, exclude={"attention": "dense"})).cells
    assert [cell.config["attention"] for cell in left] == [MOC | {"top_k": 1}, MOC | {"top_k": 2}]


@pytest.mark.parametrize(
    ("rule", "met"),
    [
        ({"a.b": 1}, True),
        ({"a.b": [2, 1]}, True),
        ({"a.b": 2}, False),
        ({"a.b": 1, "c": None}, True),
        ({"a.b": 1, "c": 0}, False),
        ({"a.x": None}, False),  # a setting left out is not one that is null
        ({"l": ["p", "q"]}, True),  # the list itself
        ({"l": [["p"], ["p", "q"]]}, True),
        ({"l": "p"}, False),
        ({"m": "moc"}, True),  # a part by its name
        ({"m": {"name": "moc", "top_k": 1}}, True),
        ({"m": {"name": "moc"}}, False),
    ],
)
def test_a_rule_is_met_where_every_setting_is(rule: dict[str, Any], met: bool) -> None:
    config = {"a": {"b": 1}, "c": None, "l": ["p", "q"], "m": {"name": "moc", "top_k": 1}}
    assert matches(config, rule) is met


def test_settings_that_differ_are_named_by_dotted_keys() -> None:
    one = {"a": {"b": 1, "c": 2}, "l": [1]}
    assert varying_settings([one, {"a": {"b": 1, "c": 3}, "l": [1]}]) == [{"a.c": 2}, {"a.c": 3}]
    assert varying_settings([one, {"a": {"b": 1}, "l": [1]}, {"a": {"b": 1, "c": None}, "l": [2]}]) == [
        {"a.c": 2, "l": [1]}, {"l": [1]}, {"a.c": None, "l": [2]}
    ]  # fmt: skip
    assert varying_settings([one]) == [{}]


@pytest.mark.parametrize(
    ("parts", "messages"),
    [
        (
            {"axes": {"attention": [MOC], "attention.topk": [1, 2], "optim.warmup": [1]}, "zip": {"sead": [1]}},
            [
                "unknown axis 'attention.topk'; did you mean 'attention.top_k'?",
                "unknown axis 'optim.warmup'; did you mean 'optim.warmup_steps'?",
                "unknown axis 'sead'; did you mean 'seed'?",
            ],
        ),
        ({"axes": {"atention.top_k": [1]}, "base": {**BASE, "attention": MOC}}, ["did you mean 'attention.top_k'"]),
        ({"axes": {"lr": [1]}}, ["unknown axis 'lr'", "optim.lr"]),
        # The cells are judged without it.
        (
            {"axes": {"attention.topk": [1]}, "cells": {"bad": {"attention": "mocc"}}},
            ["unknown axis 'attention.topk'", "cell bad: unknown method 'mocc'"],
        ),
        ({"base": {**BASE, "sead": 1}, "axes": {"seed": [0, 1]}}, ["every cell: unknown config key 'sead'"]),
        ({"zip": {"seed": [0, 1], "optim.lr": [0.1]}}, ["seed has 2, optim.lr has 1"]),
        ({"zip": {"seed": 3}}, ["zip 'seed' must be a list that is not empty, got 3"]),
        ({"zip": [{"seed": []}]}, ["zip 'seed' must be a list that is not empty, got []"]),
        ({"zip": [[1]]}, ["zip must hold mappings that are not empty, got [1]"]),
        ({"zip": 7}, ["zip must be a mapping or a list of them, got 7"]),
        ({"axes": {"seed": [0]}, "zip": {"seed": [1]}}, ["seed is varied twice"]),
        ({"exclude": [{}]}, ["exclude must hold mappings that are not empty"]),
        ({"axes": {"seed": [0, 1]}, "exclude": {"seed": 7}}, ["exclude {'seed': 7} leaves out no cell"]),
        ({"axes": {"seed": [0, 1]}, "exclude": {"sead": 1}}, ["unknown key of exclude 'sead'; did you mean 'seed'"]),
        ({"axes": {"seed": [0, 1]}, "exclude": {"seed": [0, 1]}}, ["exclude leaves out every cell"]),
        ({"match": 0.16}, ["match must be a mapping or null, got 0.16"]),
    ],
)
def test_what_a_file_cannot_mean_is_refused(tmp_path: Path, parts: dict[str, Any], messages: list[str]) -> None:
    said = refused(write_sweep(tmp_path / "bad.yaml", **parts))
    for message in messages:
        assert message in said
    for axis in parts.get("axes", {}):
        assert said.count(f"unknown axis {axis!r}") <= 1  # once for the file, not once a cell
        assert "." not in axis or axis.rpartition(".")[2] not in said.split("'")  # as a cell would say it


def test_one_axis_that_some_cells_do_not_know_is_their_own_fault(tmp_path: Path) -> None:
    said = refused(
        write_sweep(tmp_path / "s.yaml", axes={"attention": {"m": MOC, "d": "dense"}, "attention.top_k": [1]})
    )
    assert "unknown axis" not in said
    assert "cell d-top_k=1: " in said
    assert "cell m-top_k=1: " not in said


def test_files_extend_each_other_in_a_chain_and_by_name(tmp_path: Path) -> None:
    def write(name: str, **parts: Any) -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(parts))
        return path

    low = tmp_path / "low"
    low.mkdir()
    (low / "mine.py").write_text(OWN_AND_PREVIOUS)
    write_sweep(low / "low.yaml", plugins=["mine.py"], seeds=2, axes={"seed": [7]}, match={"density": 0.5})
    write("low/mid.yaml", extends="low.yaml", match=None, base={"optim.lr": 0.5})
    cells = read(
        write("top.yaml", extends="low/mid.yaml", cells={"own": {"attention": "own_and_previous_shots"}})
    ).cells
    assert [cell.name for cell in cells] == ["own-s0", "own-s1"]  # the plug-in lies beside the file that names it
    assert cells[0].config["optim"]["lr"] == 0.5
    assert cells[0].config["data"]["name"] == "shot_world"
    assert "match" not in cells[0].config
    named = read(write("named.yaml", extends="recall", cells={"null": {"attention": "own_shot"}})).cells
    assert [cell.config["model"]["dim"] for cell in named] == [96] * 3
    assert "extends itself" in refused(write("loop.yaml", extends="loop.yaml"))
    assert "did you mean 'recall'" in refused(write("lost.yaml", extends="recal"))


def test_a_config_without_a_budget_keeps_its_id() -> None:
    """A run is the same whether or not there could have been a budget."""
    assert "match" not in load([BASE])
    assert "match" not in load([BASE, {"match": None}])
    assert load([BASE, {"match": {"density": 0.5}}])["match"] == {"density": 0.5}
    assert json.dumps(load([BASE, {"match": {"density": 0.5}}, {"match": None}])) == json.dumps(load([BASE]))
