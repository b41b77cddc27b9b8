"""A leaderboard that is read by pairs, by FLOPs with all that belongs to attention, and by seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up import finished, write_sweep_of
from markupsafe import escape
from typer.testing import CliRunner

from experiments.cli import app
from experiments.reporting import tables
from experiments.reporting.html import html
from experiments.reporting.report import build_report
from experiments.reporting.report_json import to_json
from experiments.tracking.schema import TuningFile
from experiments.tracking.store import Cell, SweepRequest, write_sweep

# recall, density, FLOPs (forward, backward, routing), seconds: `linear` attends to few pairs, and pays in its terms.
METHODS: dict[str, tuple[float, float, tuple[float, float, float], float]] = {
    "dense": (0.98, 1.0, (4e9, 10e9, 0.0), 0.3),
    "moc": (0.90, 0.3, (1.2e9, 3e9, 0.3e9), 0.5),
    "linear": (0.80, 0.2, (5e9, 11e9, 0.1e9), 0.2),
    "window": (0.70, 0.25, (1e9, 2.5e9, 0.0), 0.25),
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path / "runs"


def make_up(name: str = "costs", *, unsteady: float = 0.0, tuning: TuningFile | None = None, **facts: Any) -> str:
    cells = []
    for number, (group, (recall, density, flops, seconds)) in enumerate(METHODS.items()):
        for seed in range(3):
            films = {"name": "world", "seed": seed}
            cell = Cell(f"{group}-s{seed}", {"attention": {"name": group}, "seed": seed, "data": films}, group)
            cells.append(cell)
            parts = dict(zip(("flops", "flops_backward", "routing_flops"), flops, strict=True))
            metrics = {"identity_recall": recall + 0.01 * ((seed * (number + 1)) % 3), "subject_shown": 0.9}
            metrics |= {"shown_identity_recall": min(1.0, recall / 0.9)}
            finished(
                cell, name, 1.0, density=density, flops=flops[0], costs=parts, metrics=metrics,
                seconds_per_step=seconds * (1 + unsteady * seed), chance={"identity_recall": 0.01},
                provenance={"host": "here", "threads": 1, **({"host": f"host{seed}"} if facts.get("hosts") else {})},
            ).write(cell.folder(name))  # fmt: skip
    write_sweep(name, SweepRequest("", tuple(cells), tuning=tuning))
    return name


def test_each_sense_of_cost_has_its_order_and_its_front() -> None:
    costs = build_report(make_up()).costs
    assert {sense: [group.name for group in one.groups] for sense, one in costs.items()} == {
        "pairs": ["linear", "window", "moc", "dense"],
        "flops": ["window", "moc", "dense", "linear"],
        "seconds": ["linear", "window", "dense", "moc"],
    }
    assert {sense: set(one.front) for sense, one in costs.items()} == {
        "pairs": {"linear", "moc", "dense"},
        "flops": {"window", "moc", "dense"},
        "seconds": {"linear", "dense"},
    }
    flops = costs["flops"].groups[1].estimate("attention_flops")
    assert flops is not None
    assert flops.mean == 4.5e9  # forward, backward and routing


def test_json_has_the_costs_beside_what_it_had() -> None:
    plain = to_json(build_report(make_up()))
    assert plain["costs"]["flops"] == {
        "figure": "attention_flops",
        "order": ["window", "moc", "dense", "linear"],
        "front": ["window", "moc", "dense"],
    }
    figures = plain["groups"][0]["figures"]
    assert (figures["flops"]["mean"], figures["attention_flops"]["mean"]) == (4e9, 14e9)
    assert plain["timing"] == ""


@pytest.mark.parametrize(
    ("sense", "order"),
    [
        ("pairs", ["linear", "window", "moc", "dense"]),
        ("flops", ["window", "moc", "dense", "linear"]),
        ("seconds", ["linear", "window", "dense", "moc"]),
    ],
)
def test_the_leaderboard_is_read_by_a_cost(sense: str, order: list[str], home: Path) -> None:
    make_up("memory")
    result = CliRunner().invoke(app, ["report", "memory", "--by", sense])
    assert result.exit_code == 0, result.output
    rows = [line.split()[0] for line in result.stdout.splitlines() if line.split()[:1] and line.split()[0] in METHODS]
    assert rows[:4] == order
    page = (home / "memory" / "report.html").read_text()
    table = page[page.index('id="equal-cost"') :]
    places = [table.index(f"</span>{name}</td>") for name in order]
    assert places == sorted(places)


def test_a_cost_that_was_not_counted_is_refused() -> None:
    cell = Cell("a-s0", {"attention": {"name": "dense"}, "seed": 0}, "a")
    finished(cell, "old", 1.0).write(cell.folder("old"))
    write_sweep("old", SweepRequest("", (cell,)))
    assert [*build_report("old").costs] == ["pairs", "seconds"]
    result = CliRunner().invoke(app, ["report", "old", "--by", "flops"])
    assert result.exit_code == 2
    assert "unknown cost that was measured 'flops'" in result.stderr


def test_seconds_of_a_busy_machine_or_of_several_are_said() -> None:
    assert build_report(make_up()).sentences.timing == ""
    said = build_report(make_up(unsteady=0.2)).sentences.timing
    assert "the machine was not quiet" in said
    assert "moc (16.7\u00a0%)" in said
    assert "3 machines" in build_report(make_up(hosts=3)).sentences.timing


def test_the_report_says_which_difference_the_seeds_find() -> None:
    report = build_report(make_up())
    plan = report.comparison.seeds
    assert plan is not None
    assert (plan.methods, plan.spread.seeds, plan.target) == (4, 3, 0.1)
    said = report.sentences.power
    assert said.startswith(
        f"With 3 seeds a true difference of {plan.difference:.3f} in identity recall is found with 80"
    )
    assert f"A difference of 0.1 needs {plan.needed} seeds" in said
    assert to_json(report)["power"]["needed"] == plan.needed
    assert escape(said) in html(report)
    assert said in tables.markdown(report)


def test_the_command_says_how_many_seeds_are_needed() -> None:
    make_up("memory")
    result = CliRunner().invoke(app, ["power", "memory", "--difference", "0.02", "--methods", "9", "--json"])
    assert result.exit_code == 0, result.output
    plain = json.loads(result.stdout)
    curve = {int(n): found for n, found in plain["curve"].items()}
    assert [*curve.values()] == sorted(curve.values(), reverse=True)
    below = max((n for n in curve if n < plain["needed"]), default=0)
    assert below == 0 or curve[below] > 0.02
    assert all(found <= 0.0205 for n, found in curve.items() if n >= plain["needed"])
    shown = CliRunner().invoke(app, ["power", "memory"])
    assert "A difference of 0.1 needs" in shown.stdout
    assert CliRunner().invoke(app, ["power", "costs", "--probability", "2"]).exit_code == 2
    make_one = Cell("a-s0", {"attention": {"name": "dense"}, "seed": 0}, "a")
    finished(make_one, "one", 1.0).write(make_one.folder("one"))
    write_sweep("one", SweepRequest("", (make_one,)))
    refused = CliRunner().invoke(app, ["power", "one"])
    assert refused.exit_code == 2
    assert "the spread over seeds is not known" in refused.stderr


def test_recall_where_a_subject_is_shown_stands_beside_recall() -> None:
    report = build_report(make_up())
    assert report.columns.beside["subject_shown"] == "subject shown"
    assert report.columns.beside["shown_identity_recall"] == "recall where shown"


def test_the_report_shows_every_tried_setting() -> None:
    tried = [{"name": "moc-as_written", "settings": {}}, {"name": "moc-top_k=<2>", "settings": {"attention.top_k": 2}}]
    tried.append({"name": "moc-lost", "settings": {"attention.top_k": 3}})
    plan: Any = {"sweep": "costs-trials", "seeds": [100], "by": None, "cells": {"moc": tried}}
    plan["chosen"] = {"moc": "moc-as_written"}
    cells = []
    for one, recall in zip(tried[:2], (0.5, None), strict=True):
        cell = Cell(f"{one['name']}-s100", {"attention": {"name": "moc"}, "seed": 100}, str(one["name"]))
        cells.append(cell)
        result = finished(cell, "costs-trials", 1.0, metrics={"identity_recall": recall or 0.0})
        if recall is None:
            result = replace(result, status="failed", reason="ValueError: it <diverged>")
        result.write(cell.folder("costs-trials"))
    write_sweep("costs-trials", SweepRequest("", tuple(cells)))
    report = build_report(make_up(tuning=plan))
    trials = to_json(report)["tuning"]["cells"][0]["trials"]
    assert [(one["score"], one["reason"]) for one in trials] == [
        (0.5, ""),
        (None, "failed: ValueError: it <diverged>"),
        (None, "its runs are not there"),
    ]
    page, text = html(report), tables.markdown(report)
    assert "it &lt;diverged&gt;" in page
    assert "<b>used</b>" in page
    assert "For each cell 3 settings were tried with seed 100, which its own runs do not use." in page
    assert "top\\_k 2" in text
    shown = CliRunner().invoke(app, ["report", "costs"]).stdout
    assert "it <diverged>" in shown


def test_trials_lend_no_controls() -> None:
    attention = {"moc": {"name": "moc"}, "dense": {"name": "dense"}}
    write_sweep_of("mine", {"moc": (0.9, 0.8)}, attention, world="same")
    write_sweep_of("other-trials", {"dense": (1.0, 0.9)}, attention, world="same")
    assert build_report("mine").sweep.borrowed == ()
    write_sweep_of("other", {"dense": (1.0, 0.9)}, attention, world="same")
    assert [group.sweep for group in build_report("mine").sweep.borrowed] == ["other"]
