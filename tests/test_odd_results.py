"""An odd cell is one line and a marked row, names are text in every output, and a long report stays short."""

from __future__ import annotations

import cProfile
import io
import json
import os
import pstats
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up import finished, write_sweep_of
from matplotlib.axes import Axes
from rich.console import Console
from tiers import cases
from typer.testing import CliRunner

from experiments import escape
from experiments.cli import app
from experiments.reporting import tables
from experiments.reporting.html import html, write
from experiments.reporting.limits import (
    MAX_FULL_RESULTS,
    MAX_LEVELS,
    MAX_LISTED_PAIRS,
    MAX_PICTURED_GROUPS,
    MAX_PLOTTED_GROUPS,
    MAX_TERMINAL_ROWS,
)
from experiments.reporting.record import write_record
from experiments.reporting.report import build_report
from experiments.reporting.report_json import to_json
from experiments.reporting.terminal import terminal_tables
from experiments.tracking import schema
from experiments.tracking.arrays import MAX_ARRAY_BYTES, MAX_FILE_BYTES
from experiments.tracking.store import Cell, SweepRequest, write_sweep
from sparse_zoo.errors import ZooError

RESULTS = Path(__file__).parent.parent / "experiments" / "results"
SPEED = ("cpu_", "gpu_")
"""How files of `zoo bench` and `make gpu` begin, which are no records of sweeps."""
HOSTILE = "[red]x[/red]<script>alert(1)</script>|_\\input{a}\x1b[31m\r\u202e\ud800'\"&amp;$ :bomb:"


def test_the_docs_state_the_limits_of_long_reports() -> None:
    page = (RESULTS.parent.parent / "docs" / "reports.md").read_text()
    for stated in (
        f"| {MAX_PLOTTED_GROUPS} groups | plots show the first {MAX_PLOTTED_GROUPS} ",
        f"films the first {MAX_PICTURED_GROUPS};",
        f"| {MAX_LISTED_PAIRS} pairs ",
        f"| {MAX_FULL_RESULTS} cells |",
        f"at most {MAX_TERMINAL_ROWS} rows",
        f"more than {MAX_LEVELS} values have no plot",
        f"over {MAX_FILE_BYTES >> 20} MiB, or over {MAX_ARRAY_BYTES >> 20} MiB when unpacked",
        f'the key `"version"`, now {schema.VERSION}.',
    ):
        assert stated in page


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The result of the second of two cells."""
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    cells = tuple(Cell(name, {"attention": {"name": "dense"}, "seed": 0}) for name in ("fine", "odd"))
    for cell in cells:
        finished(cell, "s", 0.5).write(cell.folder("s"))
    write_sweep("s", SweepRequest("", cells))
    return cells[1].folder("s") / "result.json"


def changed(key: str, value: Any) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def without(key: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def outside(path: Path) -> None:
    path.unlink()
    path.symlink_to("/proc/self/status")


ODD: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_text(path.read_text()[:100]),
    "list": lambda path: path.write_text("[]"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "bytes": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "nan": lambda path: path.write_text(path.read_text().replace('"density": 0.25', '"density": NaN')),
    "overflow": lambda path: path.write_text(path.read_text().replace('"density": 0.25', '"density": 1e999')),
    "digits": lambda path: path.write_text(path.read_text().replace('"density": 0.25', f'"density": 1{"0" * 400}')),
    "text for a number": changed("density", "0.25"),
    "true for a number": changed("val_loss", True),
    "no seed": without("seed"),
    "no attention": without("attention"),
    "metrics": changed("metrics", ["a"]),
    "metric": changed("metrics", {"identity_recall": "high"}),
    "curve": changed("curves", {"val/loss": [[1, "a"]]}),
    "picture": changed("pictures", [{"label": "no file"}]),
    "strips": changed("strips", 3),
    "attention": changed("attention", {"no": "name"}),
    "config": changed("config", {"attention": 3}),
    "match": changed("config", {"match": {"density": "a"}}),
    "skipped": changed("data", {"skipped": [1]}),
    "provenance": changed("provenance", {"commit": ["a"]}),
    "status": changed("status", "great"),
    "another cell": changed("name", "fine"),
    "newer": changed("version", 99),
    "a folder": a_folder,
    "outside": outside,
}


@pytest.mark.parametrize("what", cases(ODD, ["truncated", "outside"]))
def test_an_odd_cell_is_one_line_and_a_marked_row(good: Path, what: str) -> None:
    ODD[what](good)
    result = CliRunner().invoke(app, ["report", "s"])
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("odd, unreadable: ")]
    assert "result.json cannot be read: " in line
    assert re.search(r"odd +unreadable", result.output)
    assert "1 of 2 cells finished" in result.output.replace("\n", " ")
    for text in (html(build_report("s")), tables.markdown(build_report("s")), tables.latex(build_report("s"))):
        assert "unreadable" in text
    by_name = {cell["name"]: cell for cell in to_json(build_report("s"))["cells"]}
    assert [by_name[name]["status"] for name in ("fine", "odd")] == ["finished", "unreadable"]


@pytest.mark.slow
def test_an_odd_sweep_does_not_end_the_report_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    write_sweep_of("memory", {"moc": (0.9, 0.8)}, {"moc": {"name": "moc"}})
    (tmp_path / "folder" / "sweep.json").mkdir(parents=True)
    for name, text in {
        "list": "[]",
        "cut": "{",
        "cells": '{"about": "", "cells": [{"name": "a", "config": 3}]}',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "sweep.json").write_text(text)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "sweep.json")
    assert CliRunner().invoke(app, ["report", "memory"]).exit_code == 0


def test_pipes_among_the_files_of_a_run_are_not_waited_for(good: Path) -> None:
    plain = json.loads(good.read_text()) | {"status": "running"}
    good.write_text(json.dumps(plain))
    (good.parent / "lock").unlink(missing_ok=True)
    os.mkfifo(good.parent / "lock")
    report = build_report("s")
    assert [cell.status for cell in report.sweep.results].count("missing") == 1
    asked = good.parent.parent / "sweep.json"
    asked.unlink()
    os.mkfifo(asked)
    with pytest.raises(ZooError, match=r"sweep.json cannot be read \(it is not a regular file\)"):
        build_report("s")


def test_results_of_earlier_versions_are_read(good: Path) -> None:
    plain = json.loads(good.read_text())
    assert plain.pop("version") == schema.VERSION
    del plain["resumed"], plain["films"]
    good.write_text(json.dumps(plain | {"metrics": {"a_recall": None}}))  # as it was written before there were versions
    assert [cell.status for cell in build_report("s").sweep.results] == ["finished"] * 2
    read = {path.stem: schema.read_record(path) for path in RESULTS.glob("*.json") if not path.stem.startswith(SPEED)}
    assert all(record["groups"] and record["runs"] for record in read.values())


@pytest.mark.slow
def test_names_are_text_in_every_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    name = HOSTILE.replace("/", "-").replace("\ud800", "")  # as the name of a folder
    methods = {"a": {"name": HOSTILE, HOSTILE: HOSTILE}, name: {"name": "moc", "top_k": 1, "note": HOSTILE}}
    write_sweep_of("s", {"a": (0.9, 0.8), name: (0.5, None)}, methods)
    report = build_report("s")
    for result in report.sweep.finished:
        result.metrics[f"{HOSTILE}_recall"] = 0.5
        result.kernel = HOSTILE
        result.provenance = {HOSTILE: HOSTILE}
        result.write(Path(result.folder))
    report = build_report("s")
    console = Console(width=200, file=io.StringIO(), emoji=False)
    console.print(*terminal_tables(report), *terminal_tables(report, runs=True))
    write_record(report, tmp_path / "record.json")
    outputs = {
        "html": html(report),
        "markdown": tables.markdown(report),
        "latex": tables.latex(report),
        "json": json.dumps(to_json(report)),
        "terminal": console.file.getvalue(),  # type: ignore[attr-defined]
        "command": CliRunner().invoke(app, ["report", "s"]).output,
    }
    for output, text in outputs.items():
        assert not escape.UNSAFE.search(text), output
        text.encode()
    assert "<script" not in outputs["html"]
    for output in ("terminal", "command"):
        assert "[red]x[" in outputs[output]
    assert not re.search(r"(?<!\\)<script", outputs["markdown"])
    assert r"\input{" not in outputs["latex"]
    for row in re.findall(r"^\|.*\|$", outputs["markdown"], re.MULTILINE):
        assert not re.search(r"(?<!\\)_", row)


@pytest.mark.slow
def test_a_long_report_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    names = [f"m{i}" for i in range(100)]
    recalls = {name: (i / 100, i / 100 + 0.001) for i, name in enumerate(names)}
    write_sweep_of("long", recalls, {name: {"name": "moc", "top_k": i} for i, name in enumerate(names)})
    with cProfile.Profile() as profile:
        report = build_report("long")
    calls = pstats.Stats(profile).total_calls / len(report.sweep.results)
    assert calls < 2000  # 1,200 each; if types were evaluated anew: 3,900
    scatters: list[object] = []
    scatter = Axes.scatter
    monkeypatch.setattr(Axes, "scatter", lambda axis, *of, **how: scatters.append(axis) or scatter(axis, *of, **how))
    page = write(report)
    assert max(Counter(scatters).values()) <= 2  # of a plot: not one for each of 40 groups
    assert sum(bool(result.curves) for result in report.sweep.results) == 40 * 2
    assert page.stat().st_size < 1_500_000
    assert page.with_suffix(".json").stat().st_size < 2_000_000
    assert len(report.comparison.tested) == 100 * 99 // 2
    assert len(report.comparison.listed) <= MAX_LISTED_PAIRS
    text = page.read_text()
    assert "This report is long: plots and pictures show the first 40 of 100 groups" in text
    assert text.count("data:image/png") < 150
    assert "m99" in text


@pytest.mark.slow
def test_a_report_does_not_load_what_trains() -> None:
    loaded = (
        "import sys, experiments.reporting.html; print(*{'lightning', 'mlflow', 'scipy.stats'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.slow
def test_a_winner_is_named_where_it_is_significant_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    sweeps = {
        "clear": (
            {"a": (0.90, 0.91, 0.92, 0.93), "b": (0.10, 0.12, 0.11, 0.13)},
            "a",
            "Best identity recall: 0.915, by a",
        ),
        "close": ({"a": (0.9, 0.2, 0.5), "b": (0.1, 0.8, 0.3)}, None, "No significant winner: a and b differ by"),
        "none": ({"a": (0.0, 0.0, 0.0), "b": (0.0, 0.0, 0.0)}, None, "No significant winner: a and b differ by +0.000"),
        "chance": (
            {"a": (0.0040, 0.0042, 0.0041), "b": (0.0, 0.0001, 0.0001)},
            None,
            "a, does not beat chance (0.005)",
        ),
        "one": ({"a": (0.9,), "b": (0.1,)}, None, "no test is possible, because each method has one seed"),
    }
    for name, (recalls, winner, told) in sweeps.items():
        write_sweep_of(name, recalls, {key: {"name": "moc"} for key in recalls})
        report = build_report(name)
        assert to_json(report)["winner"] == winner
        shown = CliRunner().invoke(app, ["report", name]).output.replace("\n", " ")
        for text in (html(report), shown, tables.markdown(report)):
            assert told in text.replace("\\", "")
        assert ("<dt>by</dt>" in html(report)) == (winner is not None)
