"""The report says what the results say, in one file, for a browser, a program and a terminal."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from experiments import pictures
from experiments.report import Figure, Report, settings, smooth
from experiments.store import Asked, Cell, Result, write_sweep
from sparse_zoo.errors import ZooError

REQUIRED = [
    "name", "attention", "status", "seed", "first_loss", "val_loss", "density", "flops", "kernel", "seconds_per_step",
]  # fmt: skip


def finished(cell: Cell, sweep: str, val_loss: float) -> Result:
    folder = cell.folder(sweep)
    for name in ("plan-1-1.png", "film.png"):
        pictures.save(torch.zeros(8, 8, 3, dtype=torch.uint8), folder / name)
    return Result(
        name=cell.name,
        attention=cell.config["attention"],
        status="finished",
        seed=0,
        first_loss=1.25,
        last_loss=1.0,
        val_loss=val_loss,
        density=0.25,
        flops=2e9,
        kernel="cpu",
        seconds_per_step=0.5,
        id=cell.id,
        steps=2,
        seconds=3.0,
        peak_memory=2**20,
        curves={"train/flow": [(1, 1.3), (2, 1.2)], "val/loss": [(2, val_loss)]},
        pictures=[{"file": "plan-1-1.png", "label": "layer 1"}],
        strips=["film.png"],
        folder=str(folder),
        provenance={"commit": "abc", "pid": 1, "host": "here"},
        data={"skipped": [{"path": "bad.mp4", "reason": "no video stream"}]},
        config=cell.config,
    )


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two finished cells, one failed, one that never ran."""
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    cells = tuple(
        Cell(name, {"attention": {"name": method}, "seed": i})
        for i, (name, method) in enumerate(
            [("worse", "dense"), ("better", "moc"), ("broken", "moga"), ("later", "moc")]
        )
    )
    for cell, loss in zip(cells, (0.9, 0.8), strict=False):
        finished(cell, "s", loss).write(cell.folder("s"))
    broken = finished(cells[2], "s", float("nan"))
    reason = "NonFiniteLoss: step 1: <flow> is nan"
    replace(broken, status="failed", reason=reason, last_loss=float("nan"), checkpoint="a/step=1.ckpt").write(
        cells[2].folder("s")
    )
    write_sweep("s", Asked("About <this>.", cells))
    return "s"


def test_json_has_what_was_promised(sweep: str) -> None:
    plain = json.loads(json.dumps(Report.of(sweep).to_json(), allow_nan=False))
    assert list(plain) == ["name", "cells", "groups"]
    assert plain["name"] == "s"
    by_name = {cell["name"]: cell for cell in plain["cells"]}
    assert list(by_name) == ["better", "worse", "broken", "later"]
    for cell in plain["cells"]:
        assert list(cell)[: len(REQUIRED)] == REQUIRED
        assert cell["attention"]["name"]
    assert [cell["status"] for cell in plain["cells"]] == ["finished", "finished", "failed", "missing"]
    assert by_name["better"]["val_loss"] == 0.8
    assert by_name["broken"]["val_loss"] is None
    assert by_name["later"]["reason"] == "has not run yet"


def test_page_is_one_file_that_opens_anywhere(sweep: str) -> None:
    page = Report.of(sweep).write()
    html = page.read_text()
    assert json.loads((page.parent / "report.json").read_text())["name"] == "s"
    named = re.findall(r"""(?:src|href|url|@import)\s*[=(]\s*["']?([^"')\s>]+)""", html)
    assert named
    assert all(link.startswith(("data:", "#")) for link in named), named
    assert "<script" not in html
    links = set(re.findall(r"https?://[^\s\"'<]+", html))
    assert all(
        link.startswith(("http://www.w3.org/", "http://purl.org/", "http://creativecommons.org/")) for link in links
    )
    assert html.count("data:image/png;base64,") == 4  # a plan and a film of each finished cell


def test_page_names_what_did_not_finish(sweep: str) -> None:
    html = Report.of(sweep).html()
    assert "2 of 4 cells did not finish" in html
    assert "step 1: &lt;flow&gt; is nan" in html
    assert "a/step=1.ckpt" in html
    assert "has not run yet" in html
    assert "bad.mp4</code>: no video stream" in html
    assert "About &lt;this&gt;." in html


def test_page_without_any_finished_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    write_sweep("none", Asked("", (Cell("a", {"attention": [{"name": "moc"}, {"name": "dense"}], "seed": 0}),)))
    assert "1 of 1 cells did not finish" in Report.of("none").html()


def test_table_fits_a_terminal(sweep: str) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*Report.of(sweep).tables())
    text = console.export_text()
    assert "…" not in text
    assert re.search(r"better +0\.800 +1\.250 +1\.000 +25\.0 % +2 +0\.500 +cpu", text)
    assert re.search(r"broken +failed", text)


@pytest.fixture
def seeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two methods with three seeds each, of which one failed, and a method with one run."""
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    runs = {"dense": (0.9, 0.7, 0.8), "moc": (0.5, None, 0.6), "alone": (0.3,)}
    cells = []
    for method, losses in runs.items():
        for seed, loss in enumerate(losses):
            name, group = (f"{method}-s{seed}", method) if len(losses) > 1 else (method, None)
            cell = Cell(name, {"attention": {"name": method}, "seed": seed}, group)
            cells.append(cell)
            if loss is None:  # it failed after a validation, whose figures do not count
                found = replace(finished(cell, "seeded", 9.0), status="failed", metrics={"identity_recall": 0.0})
            else:
                metrics = {"identity_recall": 1 - loss} if method != "alone" else {}
                found = replace(finished(cell, "seeded", loss), metrics=metrics, density=loss / 2)
            found.write(cell.folder("seeded"))
    write_sweep("seeded", Asked("", tuple(cells)))
    return "seeded"


def test_runs_that_differ_by_seed_alone_are_one_group(seeded: str) -> None:
    report = Report.of(seeded)
    assert [group.name for group in report.groups] == ["alone", "moc", "dense"]
    alone, moc, dense = report.groups
    assert [len(group.results) for group in report.groups] == [1, 3, 3]
    assert dense.figure("val_loss") == Figure(pytest.approx(0.8), pytest.approx(0.1), 3)  # n - 1 below the line
    assert moc.figure("val_loss") == Figure(pytest.approx(0.55), pytest.approx(0.05 * 2**0.5), 2)
    assert moc.figure("identity_recall") == Figure(pytest.approx(0.45), pytest.approx(0.05 * 2**0.5), 2)
    assert alone.figure("val_loss") == Figure(0.3, None, 1)
    assert alone.figure("identity_recall") is None
    plain = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert len(plain["cells"]) == 7
    by_name = {group["name"]: group for group in plain["groups"]}
    assert by_name["dense"]["cells"] == ["dense-s0", "dense-s1", "dense-s2"]
    assert by_name["dense"]["figures"]["density"] == {"mean": pytest.approx(0.4), "sd": pytest.approx(0.05), "n": 3}
    assert by_name["alone"]["figures"]["identity_recall"] is None


def test_terminal_shows_means_and_single_runs_on_demand(seeded: str) -> None:
    def shown(**options: bool) -> str:
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(*Report.of(seeded).tables(**options))
        return console.export_text()

    text = shown()
    assert "…" not in text
    assert "5 of 7" not in text
    assert "6 of 7 cells finished" in text
    assert re.search(r"dense +\.800±\.100", text)
    assert re.search(r"moc +\.550±\.071", text)
    assert re.search(r"moc +failed", text)
    assert re.search(r"dense +\.200±\.100", text)  # of the drawn shots
    single = shown(runs=True)
    assert "±" not in single
    assert re.search(r"dense-s1 +0\.700", single)
    assert re.search(r"dense-s1 +0\.300", single)


def test_page_shows_spread_measures_and_single_runs(seeded: str) -> None:
    html = Report.of(seeded).html()
    assert "0.800 ± 0.100" in html
    assert "mean ± sample standard deviation of n runs" in html
    assert "<th>identity recall</th>" in html
    assert html.count("0.200 ± 0.100") == 1
    assert "moc-s0" in html[html.index("single runs") :]
    assert "1 of 7 cells did not finish" in html


@pytest.mark.usefixtures("sweep")
def test_unknown_sweep_is_refused() -> None:
    with pytest.raises(ZooError, match=r"no sweep 't'.*there: s"):
        Report.of("t")


def test_settings_read_well() -> None:
    assert (
        settings({"name": "moc", "top_k": 2, "anchors": [], "causal": None})
        == "moc · top_k 2 · anchors none · causal off"
    )
    assert settings([{"name": "window", "tile": [2, 5, 4]}, {"name": "dense"}]) == "window · tile 2×5×4 / dense"


def test_smoothing_keeps_the_first_loss() -> None:
    assert smooth([3.0, 1.0]) == [3.0, 1.0]
    assert smooth([float(i) for i in range(20)])[:3] == [0.0, 0.5, 1.5]
