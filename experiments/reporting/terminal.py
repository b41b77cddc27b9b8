"""A report as tables for a terminal that is 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.table import Table

from experiments.analysis.formatting import giga, interval, mean, number, percent, plus_minus, tried
from experiments.analysis.metrics import COSTS
from experiments.analysis.seed_groups import Group
from experiments.analysis.trials import Tuning
from experiments.escape import for_terminal as escape
from experiments.reporting.equal_cost import CostOrder, cost_figure
from experiments.reporting.leaderboard import choose_columns, rank_groups
from experiments.reporting.limits import MAX_TERMINAL_ROWS
from experiments.reporting.loading import SweepResults
from experiments.reporting.report import Report
from experiments.reporting.sentences import word_task, word_tuning

MEASURES_PER_TABLE = 5  # columns of measures that fit


def terminal_tables(report: Report, *, runs: bool = False) -> list[Table]:
    """Return the leaderboard and the tables of the other measures.

    Args:
        report: The report to show.
        runs: Whether a row is a single run; else a row is the mean over seeds.
    """
    sweep = report.sweep.split_runs() if runs else report.sweep
    leaderboard, columns = rank_groups(sweep), choose_columns(sweep)
    several = sweep.seeds > 1
    half = " ± half of the 95 % interval." if several else ""
    others = "Other measures, of shots that were generated beside the true ones; the loss is of whole films."
    tables = (
        (columns.beside, word_task(sweep, columns) + half),
        (columns.whole_films, f"Whole films, generated from noise.{half}"),
        (columns.others, others + half),
    )
    order = report.costs.get(report.read_by or "")
    tuning = [_tuning(sweep.tuning, word_tuning(sweep.tuning))] if sweep.tuning else []
    return [
        _leaderboard(report, sweep) if order is None or runs else _by_cost(report, order),
        *tuning,
        *(table for shown, title in tables for table in _measure_tables(sweep, leaderboard.rows, shown, title)),
    ]


def _leaderboard(report: Report, sweep: SweepResults) -> Table:
    leaderboard, several, head = rank_groups(sweep), sweep.seeds > 1, sweep.headline
    finished = f"{len(sweep.finished)} of {len(sweep.results)} cells finished"
    title = f"{escape(sweep.name)}: {finished}, by {escape(head.label)}"
    if several:
        title += f"; means over up to {sweep.seeds} seeds with 95 % intervals"
        title += "; groups that share a letter do not differ significantly" if report.comparison.letters else ""
    table = _table(title)
    spread = ("95 %", "", "n") if several else ("first", "last")
    kernel = () if several else ("kernel",)
    for name in ("cell", escape(_short(head.name)), *spread, "density", "GFLOPs", "s/step", *kernel):
        left = name in ("cell", "", "kernel")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "cell", overflow="fold")

    def add(group: Group, title: str) -> None:
        estimate = group.estimate(head.name)
        density, flops, seconds = (mean(group.estimate(name)) for name in COSTS)
        if several:
            letters = report.comparison.letters.get(group.name, "")
            own = [interval(estimate), letters, str(len(group.finished))]
        else:
            own = [number(mean(group.estimate(name))) for name in ("first_loss", "last_loss")]
        costs = [percent(density), giga(flops), number(seconds)]
        kernel = [] if several else [escape(group.first.kernel or "–")]
        table.add_row(escape(title), number(mean(estimate)), *map(escape, own), *costs, *kernel)

    for group in leaderboard.ranked[:MAX_TERMINAL_ROWS]:
        add(group, group.name)
    _add_rest(table, leaderboard.ranked)
    table.add_section()
    for reference in leaderboard.references:
        if reference.group:
            add(reference.group, reference.title)
        elif reference.missing:
            table.add_row(escape(f"{reference.title}: {reference.missing}"))
        else:
            table.add_row(escape(reference.title), number(sweep.chance.get(head.name)))
    partial = [group for group in sweep.groups if len(group.finished) < len(group.results)]
    for group in partial[:MAX_TERMINAL_ROWS]:
        for status in dict.fromkeys(r.state for r in group.results if r.status != "finished"):
            table.add_row(escape(group.name), f"[red]{status}[/red]")
    _add_rest(table, partial)
    return table


def _by_cost(report: Report, order: CostOrder) -> Table:
    """The measured groups by one sense of cost, cheapest first."""
    head = report.sweep.headline
    table = _table(
        f"{escape(report.sweep.name)}: {escape(head.label)} by {escape(order.measure.label)}, cheapest first; *: no "
        "other cell is at least as good and costs at most as much"
    )
    table.add_column("cell", overflow="fold")
    for column in (_short(head.name), "95 %", *(cost.measure.label for cost in report.costs.values())):
        table.add_column(escape(column), justify="right", overflow="fold")
    for group in order.groups[:MAX_TERMINAL_ROWS]:
        estimate = group.estimate(head.name)
        costs = [
            cost_figure(group, cost.measure) + ("*" if group.name in cost.front else " ")
            for cost in report.costs.values()
        ]
        table.add_row(escape(group.titled), number(mean(estimate)), escape(interval(estimate)), *costs)
    _add_rest(table, order.groups)
    return table


def _tuning(tuning: Tuning, title: str) -> Table:
    """The settings that were tried, a row each; the one that the cell's own runs have is marked."""
    table = _table(escape(title))
    for column in ("cell", "setting", _short(tuning.measure.name), "outcome"):
        table.add_column(
            escape(column), justify="right" if column == _short(tuning.measure.name) else "left", overflow="fold"
        )
    rows = [(cell, trial) for cell in tuning.cells for trial in cell.trials]
    for cell, trial in rows[:MAX_TERMINAL_ROWS]:
        outcome = "used" if trial.name == cell.chosen else trial.why_unscored(tuning.measure)
        score = number(trial.score(tuning.measure))
        table.add_row(escape(cell.name), escape(tried(trial.settings)), score, escape(outcome))
    _add_rest(table, rows)
    return table


def _measure_tables(
    sweep: SweepResults, rows: Sequence[Group], columns: Mapping[str, str], title: str
) -> Iterator[Table]:
    """Tables of measures (name -> heading), as many to a table as fit; the first has the title."""
    for first in range(0, len(columns), MEASURES_PER_TABLE):
        names = list(columns)[first : first + MEASURES_PER_TABLE]
        table = _table("" if first else title)
        table.add_column("cell", overflow="fold")
        for name in names:
            table.add_column(escape(columns[name]), justify="right", overflow="fold")
        for group in rows[:MAX_TERMINAL_ROWS]:
            table.add_row(escape(group.name), *(plus_minus(group.estimate(name)) for name in names))
        _add_rest(table, rows)
        if any(name in sweep.chance for name in names):
            table.add_row("[dim]chance[/dim]", *(number(sweep.chance.get(name)) for name in names))
        yield table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)


def _add_rest(table: Table, groups: Sequence[object]) -> None:
    """Say how many groups have no row, where there are too many."""
    if len(groups) > MAX_TERMINAL_ROWS:
        table.add_row(f"[dim]and {len(groups) - MAX_TERMINAL_ROWS} more[/dim]")


def _short(name: str) -> str:
    return {"val_loss": "val", "identity_recall": "recall"}.get(name, name.replace("_", " "))
