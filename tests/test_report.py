"""The report says what the results say, in one file, for a browser, a program and a terminal."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from made_up import COMMAND, SECTIONS, finished, write_full_sweep, write_sweep_of
from rich.console import Console
from typer.testing import CliRunner, Result

from experiments.analysis.formatting import settings, signed
from experiments.analysis.metrics import CONTROLS, Measure
from experiments.cli import app
from experiments.reporting import tables
from experiments.reporting.html import _points, html, write
from experiments.reporting.leaderboard import list_distances, rank_groups
from experiments.reporting.plots import smooth, together
from experiments.reporting.record import record, write_record
from experiments.reporting.report import Report, build_report
from experiments.reporting.report_json import to_json
from experiments.reporting.terminal import terminal_tables
from experiments.tracking.store import Cell, SweepRequest, write_sweep
from sparse_zoo.errors import ZooError

ROOT = Path(__file__).parent.parent
REQUIRED = [
    "name", "attention", "status", "seed", "first_loss", "val_loss", "density", "flops", "kernel", "seconds_per_step",
]  # fmt: skip


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
    write_sweep("s", SweepRequest("About <this>.", cells))
    return "s"


def test_json_has_what_was_promised(sweep: str) -> None:
    plain = json.loads(json.dumps(to_json(build_report(sweep)), allow_nan=False))
    assert list(plain)[:3] == ["name", "cells", "groups"]
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


@pytest.mark.slow
def test_page_is_one_file_that_opens_anywhere(sweep: str) -> None:
    path = write(build_report(sweep))
    page = path.read_text()
    assert json.loads((path.parent / "report.json").read_text())["name"] == "s"
    named = re.findall(r"""(?:src|href|url|@import)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert named
    assert all(link.startswith(("data:", "#")) for link in named), named
    assert "<script" not in page
    assert all(link.startswith("http://www.w3.org/") for link in set(re.findall(r"https?://[^\s\"'<]+", page)))
    assert page.count("data:image/png;base64,") == 2 + 2 + 2 * 2  # plans; the real film; guesses and films of two cells


@pytest.mark.slow
def test_page_names_what_did_not_finish(sweep: str) -> None:
    page = html(build_report(sweep))
    assert "2 of 4 cells did not finish" in page
    assert "step 1: &lt;flow&gt; is nan" in page
    assert "a/step=1.ckpt" in page
    assert "has not run yet" in page
    assert "bad.mp4</code>: no video stream" in page
    assert "About &lt;this&gt;." in page


def test_page_without_any_finished_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    write_sweep("none", SweepRequest("", (Cell("a", {"attention": [{"name": "moc"}, {"name": "dense"}], "seed": 0}),)))
    assert "1 of 1 cells did not finish" in html(build_report("none"))


def test_table_fits_a_terminal(sweep: str) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*terminal_tables(build_report(sweep)))
    text = console.export_text()
    assert "…" not in text
    assert re.search(r"better +0\.800 +1\.250 +1\.000 +25\.0 % +2 +0\.500 +cpu", text)
    assert re.search(r"broken +failed", text)


@pytest.mark.slow
def test_budgets_that_training_left_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    cells = []
    for name, match, density in (
        ("kept", {"density": 0.25}, 0.2549),
        ("left", {"density": 0.25}, 0.3),
        ("fell", {"density": 0.25}, 0.2),
        ("free", None, 0.5),
        ("counted", {"flops": 1e9}, 0.9),
    ):
        cell = Cell(name, {"attention": {"name": "moc"}, "seed": 0, "match": match})
        finished(cell, "budget", 0.5, density=density).write(cell.folder("budget"))
        cells.append(cell)
    write_sweep("budget", SweepRequest("", tuple(cells)))
    report = build_report("budget")
    moved = "left 30.0 % (budget 25.0 %), fell 20.0 % (budget 25.0 %)".replace(" %", "\u00a0%")
    told = f"Cells met their density budget before training and left it in training: {moved}."
    assert report.sentences.deviation == to_json(report)["drift"] == told
    assert told in html(report)
    assert told.replace("\u00a0%", r"~\%") in tables.latex(report)
    write_sweep("budget", SweepRequest("", (cells[0], cells[3])))
    assert build_report("budget").sentences.deviation == ""


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
    write_sweep("seeded", SweepRequest("", tuple(cells)))
    return "seeded"


def test_runs_that_differ_by_seed_alone_are_one_group(seeded: str) -> None:
    report = build_report(seeded, by="val_loss")
    assert [group.name for group in report.sweep.groups] == ["alone", "moc", "dense"]
    alone, moc, dense = report.sweep.groups
    assert [len(group.results) for group in report.sweep.groups] == [1, 3, 3]
    figure = dense.estimate("val_loss")
    assert figure is not None
    assert (figure.mean, figure.sd, figure.n) == (pytest.approx(0.8), pytest.approx(0.1), 3)  # n - 1 below the line
    recall = moc.estimate("identity_recall")
    assert recall is not None
    assert (recall.mean, recall.n, recall.low) == (pytest.approx(0.45), 2, 0.0)
    assert alone.values("val_loss") == {0: 0.3}
    assert alone.estimate("identity_recall") is None
    plain = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert len(plain["cells"]) == 7
    by_name = {group["name"]: group for group in plain["groups"]}
    assert by_name["dense"]["cells"] == ["dense-s0", "dense-s1", "dense-s2"]
    density = by_name["dense"]["figures"]["density"]
    assert (density["mean"], density["sd"], density["n"]) == (pytest.approx(0.4), pytest.approx(0.05), 3)
    assert density["high"] == pytest.approx(0.4 + 4.302653 * 0.05 / 3**0.5)
    assert by_name["alone"]["figures"]["identity_recall"] is None


def test_the_headline_is_recall_where_it_is_measured(seeded: str) -> None:
    report = build_report(seeded)
    assert report.sweep.headline.name == "identity_recall"
    assert [group.name for group in report.sweep.groups] == [
        "moc",
        "dense",
        "alone",
    ]  # more is better; not measured, last
    for unknown in ("recall", "density"):  # a cost is no measure of quality
        with pytest.raises(ZooError, match=rf"unknown measure '{unknown}'.*identity_recall"):
            build_report(seeded, by=unknown)


def test_a_measure_without_a_better_way_is_no_headline(sweep: str) -> None:
    cell = build_report(sweep).sweep.groups[0].first
    replace(cell, metrics={"dynamic_degree": 0.5}).write(Path(cell.folder))
    with pytest.raises(ZooError, match="dynamic degree cannot rank methods"):
        build_report(sweep, by="dynamic_degree")
    for name, higher in {
        "identity_recall_film": True,
        "wrong_subject": False,
        "val_loss": False,
        "seconds_per_step": False,
        "motion_smoothness": True,
    }.items():
        assert Measure.of(name).higher is higher


def test_terminal_shows_intervals_letters_and_single_runs_on_demand(seeded: str) -> None:
    def shown(**options: bool) -> str:
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(*terminal_tables(build_report(seeded), **options))
        return console.export_text()

    text = shown()
    assert "…" not in text
    assert "6 of 7 cells finished" in text
    assert re.search(r"dense ceiling +0\.200 +\[0\.000, 0\.448\] +a +3", text)
    assert re.search(r"moc +failed", text)
    assert re.search(r"dense +\.800±\.248", text)  # of the other measures
    single = shown(runs=True)
    assert "±" not in single
    assert re.search(r"dense-s1 +0\.300 +1\.250", single)


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    return write_full_sweep()


def test_which_differences_hold(full: str) -> None:
    report = build_report(full)
    assert [group.name for group in report.sweep.groups][:2] == ["dense", "moc_k2"]
    tests = {(pair.a, pair.b): pair for pair in report.comparison.differences}
    assert len(tests) == 10
    assert tests["dense", "own_shot"].significant
    assert not tests["random_shot", "own_shot"].significant
    assert tests["dense", "random_shot"].n == 2  # the seeds that both have
    assert report.comparison.letters["dense"] != report.comparison.letters["own_shot"]
    assert (
        f"{sum(pair.significant for pair in report.comparison.differences)} of 10 differences in identity recall"
        in report.sentences.verdict
    )
    assert "over up to 3 seeds" in report.sentences.verdict
    assert "smallest possible p is 0.25" in report.sentences.caution
    films = {(one.a, one.b): one for one in report.comparison.films}
    assert films["dense", "own_shot"].films == 64
    assert films["dense", "own_shot"].better == 64
    assert films["dense", "own_shot"].significant


def test_films_are_not_compared_where_they_differ(full: str) -> None:
    one = build_report(full).sweep.groups[0].first
    replace(one, config=one.config | {"data": {"seed": 1}}).write(Path(one.folder))
    assert build_report(full).comparison.films == []


@pytest.mark.slow
def test_without_pairs_nothing_is_claimed(sweep: str) -> None:
    report = build_report(sweep)
    assert report.comparison.tested == []
    assert report.comparison.letters == {}
    assert "no difference can be tested" in html(report)


def test_page_shows_what_the_seeds_say(full: str) -> None:
    page = html(build_report(full))
    assert re.findall(r'<section[^>]* id="(\w+)"', page) == SECTIONS
    assert "1 of 15 cells did not finish" in page
    assert "ValueError: out of &lt;memory&gt;_&amp;" in page
    assert re.findall(r'<span class="tag">(.*?)</span>', page) == ["dense ceiling", "own shot only", "random baseline"]
    assert "Dotted: chance, dense ceiling, random baseline, own shot only." in page
    assert "<h3>moc: top_k</h3>" in page
    assert "<h3>method</h3>" in page
    assert page.count('class="held"') == sum(pair.significant for pair in build_report(full).comparison.differences)
    assert COMMAND in page
    # Each number says where it comes from.
    assert re.search(r'title="0\.9300  metrics\.identity_recall in moc_k2-s0-\w{12}/result\.json, commit abc\+', page)
    # Two panels of distance, three of cost, two effects, three curves.
    assert page.count("<svg ") - page.count('<svg class="dots"') == 2 + 3 + 2 + 3
    assert page.count('alt="The real film"') == 1  # the same for all
    assert page.count('alt="Generated by') == 5


@pytest.mark.slow
def test_page_shows_single_runs(seeded: str) -> None:
    page = html(build_report(seeded))
    assert "<th>identity recall</th>" in page
    assert "moc-s0" in page[page.index("single runs") :]


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A test of memory without its null, with a ceiling of another name, whose own-shot cell failed."""
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    methods = {"moc": "moc", "full": "dense", "own_shot": "own_shot", "text_relay": "own_shot", "random_each": "random"}
    recalls = {"moc": (0.9, 0.8), "full": (1.0, 1.0), "own_shot": (None, None), "text_relay": (0.6, 0.7)}
    write_sweep_of("memory", recalls | {"random_each": (0.3, 0.4)}, {k: {"name": v} for k, v in methods.items()})
    return "memory"


def told(report: Report) -> str:
    """What a terminal shows, on one line for each row."""
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(*terminal_tables(report))
    return console.export_text()


@pytest.mark.slow
def test_a_test_of_memory_always_has_its_four_lines(memory: str, full: str) -> None:
    report = build_report(memory)
    assert [group.name for group in report.leaderboard.ranked] == [
        "moc",
        "text_relay",
        "random_each",
    ]
    said = {line.label: line.missing or line.title for line in report.leaderboard.references}
    assert said == {
        "chance": "chance",
        "dense ceiling": "full (dense ceiling)",
        "own shot only": "did not finish",
        "random baseline": "not in this sweep",
    }
    assert [name for name, _ in report.leaderboard.levels] == ["chance", "dense ceiling"]
    assert len(rank_groups(report.sweep.split_runs()).ranked) == 6  # a run is a control where its group is
    for text in (html(report), told(report), tables.markdown(report), tables.latex(report)):
        plain = re.sub(r"</?\w[^>]*>", " ", text.replace("\\_", "_"))
        assert re.search(r"own shot only\W+did not finish", plain)
        assert re.search(r"random baseline\W+not in this sweep", plain)
        assert re.search(r"chance\W+0\.005", plain)
        assert re.search(r"full\W+(dense ceiling\W+)+(dense\W+)?1\.000", plain)
    assert "relay" in re.findall(r'<span class="tag">(.*?)</span>', html(report))
    assert "<b>own_shot-s0, own_shot-s1</b>, failed: ValueError" in html(report)  # one reason, one line
    whole = build_report(full)
    assert [line.label for line in whole.leaderboard.references] == ["chance", *CONTROLS.values()]
    assert not any(line.missing for line in whole.leaderboard.references)
    assert whole.leaderboard.rows
    assert whole.leaderboard.rows[0].name == "moc_k2"  # of the methods
    assert {line.group.name for line in rank_groups(whole.sweep.split_runs()).references if line.group} >= {
        "dense-s0",
        "random_shot-s1",
    }


@pytest.mark.slow
def test_controls_come_from_a_sweep_of_the_same_films(sweep: str) -> None:  # noqa: ARG001
    attention = {"dense": {"name": "dense"}, "random_shot": {"name": "random_shots"}, "moc": {"name": "moc"}}
    attention["own"] = {"name": "own_shot"}
    write_sweep_of("lender", {"dense": [0.97, 0.99], "random_shot": [0.02], "own": [None]}, attention, "w")
    write_sweep_of("stranger", {"dense": [0.5], "own": [0.1]}, attention, "v")
    write_sweep_of("borrower", {"moc": [0.4, 0.6], "dense": [0.9]}, attention, "w")
    report = build_report("borrower")
    said = {line.label: line.missing or line.title for line in report.leaderboard.references}
    assert said == {
        "chance": "chance",
        "dense ceiling": "dense ceiling",  # its own comes first
        "own shot only": "not in this sweep",  # the lender's failed, and the stranger's films are others
        "random baseline": "random baseline, of lender",
    }
    [null] = [line.group for line in report.leaderboard.references if line.label == "random baseline"]
    assert null is not None
    assert null.values("identity_recall") == {0: 0.02}
    assert [group.name for group in report.leaderboard.ranked] == ["moc"]
    assert "random_shot" not in {
        name for pair in report.comparison.differences for name in (pair.a, pair.b)
    }  # not tested
    for text in (html(report), told(report), tables.markdown(report)):
        assert re.search(r"random baseline, of lender\W", re.sub(r"</?\w[^>]*>", " ", text))
    kept = record(report)
    assert [group.get("sweep") for group in kept["groups"]] == [None, None, "lender"]
    assert {run["name"] for run in kept["runs"]} == {"moc-s0", "moc-s1", "dense-s0"}


@pytest.mark.slow
def test_a_leaderboard_without_recall_is_as_it_was(sweep: str) -> None:
    report = build_report(sweep)
    assert [group.name for group in report.leaderboard.ranked] == ["better", "worse"]
    assert not report.leaderboard.references
    assert not report.columns.beside
    assert "not in this sweep" not in html(report) + told(report) + tables.markdown(report)


@pytest.mark.slow
def test_memory_stands_beside_recall(memory: str) -> None:
    report = build_report(memory)
    columns = ["shape", "colour", "texture", "wrong subject", "whole film"]
    assert [*report.columns.beside.values()] == columns
    assert [*build_report(memory, by="shape_recall").columns.beside] == [
        "identity_recall", "colour_recall", "texture_recall", "wrong_subject", "whole_identity_recall"
    ]  # fmt: skip
    text = told(report)
    assert re.search(r"cell +shape +colour +texture +wrong subject +whole film *$", text, re.MULTILINE)
    row = r"moc +\.925±\.318 +\.925±\.318 +\.925±\.318 +\.017±\.071 +\.425±\.318"
    assert re.search(row, text)
    board = tables.markdown(report).partition("## Settings")[0]
    assert re.search(r"\| shape \| colour \| texture \| wrong subject \| whole film \|$", board, re.MULTILINE)
    assert re.search(row.removeprefix("moc +").replace(" +", r" \| "), board)
    (head,) = re.findall(r'id="leaderboard".*?<thead>(.*?)</thead>', html(report), re.DOTALL)
    heads = re.findall(r"<th[^>]*>([^<]*)</th>", head)
    assert heads[heads.index("shape") :][:6] == [*columns, "density"]
    assert "validation loss" not in heads


@pytest.mark.slow
def test_distances_are_plotted_and_not_listed(memory: str) -> None:
    report = build_report(memory)
    assert list_distances(report.sweep, "identity_recall") == {
        back: f"identity_recall_back_{back}" for back in (1, 2, 3, 4, 10)
    }
    page = html(report)
    (drawn,) = re.findall(r'<section id="distance">(.*?)</section>', page, re.DOTALL)
    plots = re.findall(r"<figure.*?</figure>", drawn, re.DOTALL)
    labels = (">identity recall<", ">whole film, identity recall<")
    assert [[label in plot for label in labels] for plot in plots] == [[True, False], [False, True]]
    for plot in plots:
        assert ">chance<" in plot
        assert plot.count("stroke-width: 1.5") == 4  # a line for each group that finished
    for text in (page, told(report), tables.markdown(report)):
        assert not re.search(r"recall.back.\d", text)
    by_distance = tables.markdown(report).partition("## Identity recall by distance")[2]
    assert re.search(r"\| method \| 1 \| 2 \| 3 \| 4 \| 10 \|$", by_distance, re.MULTILINE)
    assert re.search(r"^\| full \| \.950±\.000 \|.*\| \.500±\.000 \|$", by_distance, re.MULTILINE)
    assert "identity_recall_back_10" in to_json(report)["groups"][0]["figures"]
    for result in report.sweep.finished:  # measured after true shots alone
        kept = {key: value for key, value in result.metrics.items() if not key.startswith("whole_")}
        replace(result, metrics=kept).write(Path(result.folder))
    page = html(build_report(memory))
    (drawn,) = re.findall(r'<section id="distance">(.*?)</section>', page, re.DOTALL)
    assert drawn.count("<figure") == 1
    assert "whole film" not in page.lower()


@pytest.mark.slow
def test_recall_is_the_first_curve_and_from_0_to_1(memory: str) -> None:
    (drawn,) = re.findall(r'<section id="training">(.*?)</section>', html(build_report(memory)), re.DOTALL)
    assert re.findall('aria-label="learning curves, (.*?)"', drawn) == ["val/identity_recall", "train/flow", "val/loss"]
    first = drawn[drawn.index("<figure") : drawn.index("</figure>")]
    assert [tick in first for tick in (">0.0<", ">0.2<", ">1.0<", ">chance<")] == [True] * 4
    assert ">chance<" not in drawn[drawn.index("</figure>") :]


def test_validation_curves_are_not_smoothed() -> None:
    curve = [(step, float(step % 2)) for step in range(50)]
    assert _points(curve, smoothed=False) == curve
    assert _points(curve, smoothed=True) != curve


def test_rounding_leaves_no_spread_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    names = [f"m{i}" for i in range(5)]
    write_sweep_of("alike", dict.fromkeys(names, (1.0, 1.0, 1.0)), {name: {"name": name} for name in names})
    report = build_report("alike")
    assert any(
        figure.sd for group in report.sweep.groups if (figure := group.estimate("density"))
    )  # 3e-17, of equal runs
    assert [group["density"][1] for group in record(report)["groups"]] == [0.0] * 5


def test_the_record_has_the_figures_of_the_runs(memory: str, tmp_path: Path) -> None:
    one = build_report(memory).leaderboard.ranked[0].first
    here = one.provenance | {"started": "2026-11-21T10:00:00+00:00", "threads": 2}
    replace(one, provenance=here).write(Path(one.folder))
    write_record(build_report(memory), tmp_path / "memory.json")
    text = (tmp_path / "memory.json").read_text()
    kept = json.loads(text)
    assert kept == record(build_report(memory))
    assert [*kept][:11] == [
        "name", "command", "commit", "started", "processor", "threads", "torch", "minutes", "steps",
        "films_judged_per_run", "tokens_per_film",
    ]  # fmt: skip
    assert kept["commit"] == "abc+"
    assert kept["started"] == "2026-11-21T10:00:00+00:00"
    assert kept["threads"] in ([2, None], [None, 2])  # not the same for all
    assert (kept["steps"], kept["films_judged_per_run"], kept["minutes"]) == (2, 64, 0.4)
    groups = {group["name"]: group for group in kept["groups"]}
    assert groups["moc"]["n"] == 2
    assert groups["moc"]["identity_recall"] == [0.85, 0.07071]
    assert groups["full"]["identity_recall_back_10"] == [0.5, 0.0]
    assert kept["chance"]["identity_recall"] == 0.005208
    assert [run["name"] for run in kept["runs"]][:2] == ["moc-s0", "moc-s1"]
    assert kept["runs"][1]["identity_recall"] == 0.8
    assert [run["name"] for run in kept["unfinished"]] == ["own_shot-s0", "own_shot-s1"]
    assert len([line for line in text.splitlines() if line.startswith("  {")]) == 4 + 8 + 2  # groups, runs, unfinished


def test_markdown_has_complete_tables(full: str) -> None:
    text = tables.markdown(build_report(full))
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(blocks) == 11
    for block in blocks:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block
    assert r"out of \<memory\>\_&" in text
    assert re.search(r"\| chance \| 0\.005 \|", text)
    assert COMMAND in text


def test_latex_compiles(full: str, tmp_path: Path) -> None:
    text = tables.latex(build_report(full))
    plain = re.sub(r"\\[\\&%$#_{}]|%.*", "", text)
    assert plain.count("{") == plain.count("}")
    assert not re.search(r"[&%$#_^~]", re.sub(r"\$\\\w+\$|& |~", "", plain))
    for rows in re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", text, re.DOTALL):
        counts = {line.replace("\\&", "").count("&") for line in rows.splitlines() if line.endswith("\\\\")}
        assert len(counts) == 1
        assert max(counts) <= 7  # what fits a page
    if shutil.which("pdflatex"):
        (tmp_path / "tables.tex").write_text(text)
        whole = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{tables}\end{document}"
        (tmp_path / "paper.tex").write_text(whole)
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
        made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stdout[-2000:]


def test_curves_of_unlike_lengths_meet_at_steps_of_the_first() -> None:
    steps, values = together([[(0, 0.0), (10, 1.0), (20, 2.0)], [(0, 1.0), (15, 4.0)]])
    assert steps.tolist() == [0, 10]
    assert values.tolist() == [[0.0, 1.0], [1.0, 3.0]]


def test_small_differences_are_not_rounded_away() -> None:
    assert [signed(x) for x in (0.0346, -0.00042, 0.0, None)] == ["+0.035", "-0.0004", "+0.000", "–"]


@pytest.mark.usefixtures("sweep")
def test_unknown_sweep_is_refused() -> None:
    with pytest.raises(ZooError, match=r"no sweep 't'.*there: s"):
        build_report("t")


def test_settings_read_well() -> None:
    assert (
        settings({"name": "moc", "top_k": 2, "anchors": [], "causal": None})
        == "moc · top_k 2 · anchors none · causal off"
    )
    assert settings([{"name": "window", "tile": [2, 5, 4]}, {"name": "dense"}]) == "window · tile 2×5×4 / dense"


def test_smoothing_keeps_the_first_loss() -> None:
    assert smooth([3.0, 1.0]) == [3.0, 1.0]
    assert smooth([float(i) for i in range(20)])[:3] == [0.0, 0.5, 1.5]


def zoo_command(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.mark.slow
def test_the_commands_of_the_docs_run(full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "reports.md").read_text()
    commands = [
        line.replace("NAME", full).split() for line in re.findall(r"^\| `(zoo report .*?)` \|", page, re.MULTILINE)
    ]
    assert len(commands) == 7
    commands.remove(["zoo", "report", full, "--by", "flops"])  # these results have no costs: see test_equal_cost.py
    assert {name for name, *_ in commands} == {"zoo"}
    results = [zoo_command(*arguments) for _, *arguments in commands]
    assert [result.exit_code for result in results] == [0] * 6
    said = results[0].output
    assert "## Differences" in Path("a.md").read_text()
    assert r"\toprule" in Path("a.tex").read_text()
    assert json.loads(Path("a.json").read_text())["name"] == full
    assert "differences in identity recall are significant" in said
    assert "random_shot-s2, failed: ValueError: out of <memory>_&" in said
    assert "±" not in results[-1].output  # single runs
    assert zoo_command("report", full, "--markdown").output.startswith("# full\n")


def test_outputs_that_do_not_go_together_are_refused(full: str) -> None:
    for arguments in (["--markdown", "--latex"], ["--results", "a.json", "--json"], ["--out", "a.md"]):
        assert zoo_command("report", full, *arguments).exit_code == 2
