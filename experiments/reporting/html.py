"""A report as a page: one HTML file that loads nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from experiments.analysis.formatting import giga, interval, mean, mib, number, p_value, percent, settings, signed, tried
from experiments.analysis.metrics import CONTROLS, COSTS, LABELS, RECALL, WHOLE, Measure
from experiments.analysis.seed_groups import Group
from experiments.escape import visible
from experiments.reporting import plots
from experiments.reporting.equal_cost import CostOrder, cost_figure
from experiments.reporting.leaderboard import list_distances, rank_groups
from experiments.reporting.limits import MAX_CURVE_POINTS, MAX_EFFECTS, MAX_LEVELS
from experiments.reporting.plots import GREY, PALETTE, Mark
from experiments.reporting.report import Report, list_machines
from experiments.reporting.report_json import to_json
from experiments.reporting.run_pictures import load_pictures
from experiments.reporting.sentences import group_unfinished
from experiments.tracking.store import atomic_write, home

MIN_SMOOTHED_POINTS = 25  # a training curve of fewer points is plotted as it is


def write(report: Report) -> Path:
    """Write `report.json` and `report.html` into the sweep's folder, and return the path of the page."""
    folder = home() / report.sweep.name
    with atomic_write(folder / "report.json") as file:
        file.write(json.dumps(to_json(report), allow_nan=False).encode())
    page = folder / "report.html"
    with atomic_write(page) as file:
        file.write(html(report).encode())
    return page


def html(report: Report) -> str:
    """Return the page."""
    environment = Environment(
        loader=PackageLoader("experiments.reporting"),
        undefined=StrictUndefined,
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = (mean, number, percent, giga, mib, interval, p_value, settings, signed, tried, cost_figure)
    environment.filters.update({one.__name__: one for one in formats})
    sweep, board, comparison = report.sweep, report.leaderboard, report.comparison
    marks = _marks(report)
    pictures = load_pictures(sweep, board)
    ordered_by = report.costs.get(report.read_by or "pairs") or next(iter(report.costs.values()), None)
    effects = [effect for effect in comparison.effects if len(effect.levels) <= MAX_LEVELS][:MAX_EFFECTS]
    return environment.get_template("report.html.j2").render(
        sweep=sweep,
        board=board,
        columns=report.columns,
        comparison=comparison,
        sentences=report.sentences,
        unfinished=group_unfinished(sweep),
        marks=marks,
        made=datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        shared=_shared(report),
        dots=_dots(report),
        pairs={} if sweep.is_long else {(pair.a, pair.b): pair for pair in comparison.differences},
        singles=rank_groups(sweep.split_runs()).rows if sweep.shows_full_results else [],
        cost_plots=_cost_plots(report, marks),
        costs=report.costs,
        ordered_by=ordered_by,
        cost_rows=_cost_rows(report, ordered_by),
        effect_plots=[(effect, plots.effect(effect, sweep.headline, board.levels)) for effect in effects],
        effects_left_out=[effect.name for effect in comparison.effects if effect not in effects],
        distance_plots=_distance_plots(report, marks),
        curve_plots=_curve_plots(report, marks),
        banded=len(sweep.groups) <= plots.BANDS,
        pictures=pictures,
        machines=list_machines(sweep),
        skipped=_distinct(bad for r in sweep.results for bad in r.data.get("skipped", [])),
        total_seconds=sum(r.seconds or 0 for r in sweep.results),
    )


def _marks(report: Report) -> dict[str, Mark]:
    """Numbers go by the leaderboard; colours by name, so that they stay when results change; dense is grey."""
    methods = sorted(group.name for group in report.sweep.groups if group.control != CONTROLS["dense"])
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(methods)}
    ordered = dict.fromkeys(group.name for group in (*report.leaderboard.rows, *report.sweep.groups))
    return {name: Mark(i + 1, colours.get(name, GREY)) for i, name in enumerate(ordered)}


def _shared(report: Report) -> dict[str, Any]:
    """The settings that every cell's attention has alike, which need not stand in every row."""
    nodes = [group.first.attention for group in report.sweep.groups]
    alike = [node for node in nodes if isinstance(node, dict)]
    if len(nodes) < 2 or len(alike) < len(nodes):
        return {}
    return {key: value for key, value in alike[0].items() if all(key in node and node[key] == value for node in alike)}


def _dots(report: Report) -> dict[str, Any]:
    """For the leaderboard's dot plots, all on one scale: a function value -> percent across, and the level lines."""
    figures = [figure for group in report.sweep.measured if (figure := group.estimate(report.sweep.headline.name))]
    runs = [value for group in report.sweep.measured for value in group.values(report.sweep.headline.name).values()]
    runs += [value for _, value in report.leaderboard.levels]
    if not runs:
        return {}
    # Every run is on the scale, and the level lines; intervals as far as half of that to each side.
    room = (max(runs) - min(runs)) / 2 or abs(max(runs)) / 100 or 1.0
    low = max(min(runs) - room, min([f.low for f in figures if f.low is not None] + runs))
    high = min(max(runs) + room, max([f.high for f in figures if f.high is not None] + runs))
    wide = high - low or 1.0

    def across(value: float) -> float:
        return round(3 + 94 * min(1.0, max(0.0, (value - low) / wide)), 2)

    return {
        "across": across,
        "levels": [(label, across(value)) for label, value in report.leaderboard.levels],
        "low": low,
        "high": high,
    }


def _cost_rows(report: Report, ordered_by: CostOrder | None) -> list[Group]:
    """The measured groups in the order of a cost, those without it last."""
    ordered = [*ordered_by.groups] if ordered_by else []
    names = {group.name for group in ordered}
    return ordered + [group for group in report.sweep.measured if group.name not in names]


def _cost_plots(report: Report, marks: dict[str, Mark]) -> list[str]:
    """The headline against each cost that was measured; FLOPs of attention with all that belongs to it, if counted."""
    drawn = []
    total = "attention_flops" if "flops" in report.costs else "flops"
    for cost in (total if cost == "flops" else cost for cost in COSTS):
        both = {g.name: (g.estimate(report.sweep.headline.name), g.estimate(cost)) for g in report.sweep.groups}
        points = {name: (good, paid) for name, (good, paid) in both.items() if good is not None and paid is not None}
        if points:
            named = {group.name for group in report.leaderboard.plotted}
            drawn.append(
                plots.pareto(points, marks, report.sweep.headline, Measure.of(cost), report.leaderboard.levels, named)
            )
    return drawn


def _distance_plots(report: Report, marks: dict[str, Mark]) -> list[str]:
    """Recall against distance: of the last shot after true ones, and of whole films, as far as measured."""
    drawn = []
    for measure in (Measure.of(RECALL), Measure.of(WHOLE + RECALL)):
        places = list_distances(report.sweep, measure.name)
        lines = {
            group.name: {place: figure for place, name in places.items() if (figure := group.estimate(name))}
            for group in report.leaderboard.plotted
            if group.finished
        }
        if places:
            measured = {name: line for name, line in lines.items() if line}
            drawn.append(plots.distances(measured, marks, measure.label, _chance(report, measure)))
    return drawn


def _chance(report: Report, measure: Measure) -> list[tuple[str, float]]:
    return [("chance", report.sweep.chance[measure.name])] if measure.name in report.sweep.chance else []


def _curve_plots(report: Report, marks: dict[str, Mark]) -> dict[str, str]:
    """One of each curve that has more than a point, recall first; long training curves, by batches, are smoothed."""
    drawn = {}
    plotted = report.leaderboard.plotted
    names = dict.fromkeys(name for group in plotted for result in group.results for name in result.curves)
    for name in sorted(names, key=lambda name: name != f"val/{RECALL}"):
        measure = Measure.of(name.removeprefix("val/"))
        curves: dict[str, list[list[tuple[int, float]]]] = {}
        for group in plotted:
            of = [
                _points(r.curves.get(name, []), smoothed=name.startswith("train/"))
                for r in group.finished or group.results
            ]
            if kept := _together([curve for curve in of if len(curve) > 1]):
                curves[group.name] = kept
        if curves:
            known = {"train/flow": "training loss, running mean", "val/loss": LABELS["val_loss"]}
            label = known.get(name, measure.label)
            drawn[name] = plots.curves(curves, marks, label, measure, _chance(report, measure))
    return drawn


def _points(curve: Sequence[tuple[int, float]], *, smoothed: bool) -> list[tuple[int, float]]:
    """The points of a curve that are drawn, evenly spread, with the first and the last."""
    points = list(curve)
    if len(points) >= MIN_SMOOTHED_POINTS and smoothed:
        steps, losses = zip(*points, strict=True)
        points = list(zip(steps, plots.smooth(losses), strict=True))
    kept = np.unique(np.linspace(0, len(points) - 1, min(MAX_CURVE_POINTS, len(points))).round().astype(int))
    return [points[i] for i in kept]


def _together(runs: list[list[tuple[int, float]]]) -> list[list[tuple[int, float]]]:
    """The runs that have steps in common with the first."""
    return [run for run in runs if run[-1][0] >= runs[0][0][0]]


def _distinct(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({(one["path"], one["reason"]): one for one in found}.values())
