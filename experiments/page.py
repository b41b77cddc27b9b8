"""A report as a page: one HTML file that fetches nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import image as png

from experiments import plots
from experiments.groups import Group
from experiments.measures import CONTROLS, COSTS, LABELS, RECALL, WHOLE, Measure
from experiments.plots import GREY, PALETTE, Mark
from experiments.report import Report, machines
from experiments.store import Result
from experiments.wording import giga, interval, mean, mib, number, p_value, percent, settings, signed
from lit_modules.callbacks import picture_rows

WIDE = 12  # times as wide as high, from which on a film needs the whole page
LONG = 25  # points of a curve from which on it is smoothed


def html(report: Report) -> str:
    """The page: one file, nothing fetched from anywhere."""
    environment = Environment(
        loader=PackageLoader("experiments"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = (mean, number, percent, giga, mib, interval, p_value, settings, signed, image)
    environment.filters.update({one.__name__: one for one in formats})
    marks = _marks(report)
    return environment.get_template("report.html.j2").render(
        report=report,
        marks=marks,
        made=datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        shared=_shared(report),
        dots=_dots(report),
        pairs={(pair.a, pair.b): pair for pair in report.differences},
        cost_plots=_cost_plots(report, marks),
        effect_plots=[(effect, plots.effect(effect, report.headline, report.levels)) for effect in report.effects],
        distance_plots=_distance_plots(report, marks),
        curve_plots=_curve_plots(report, marks),
        banded=len(report.groups) <= plots.BANDS,
        films=_films(report),
        machines=machines(report),
        skipped=_distinct([bad for r in report.results for bad in r.data.get("skipped", [])]),
        total_seconds=sum(r.seconds or 0 for r in report.results),
    )


def _marks(report: Report) -> dict[str, Mark]:
    """Numbers go by the leaderboard; colours by name, so that they stay when results change; dense is grey."""
    methods = sorted(group.name for group in report.groups if group.control != CONTROLS["dense"])
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(methods)}
    ordered = dict.fromkeys(group.name for group in (*report.rows, *report.groups))
    return {name: Mark(i + 1, colours.get(name, GREY)) for i, name in enumerate(ordered)}


def _shared(report: Report) -> dict[str, Any]:
    """The settings that every cell's attention has alike, which need not stand in every row."""
    nodes = [group.one.attention for group in report.groups]
    alike = [node for node in nodes if isinstance(node, dict)]
    if len(nodes) < 2 or len(alike) < len(nodes):
        return {}
    return {key: value for key, value in alike[0].items() if all(key in node and node[key] == value for node in alike)}


def _dots(report: Report) -> dict[str, Any]:
    """For the leaderboard's dot plots, all on one scale: a function value -> percent across, and the level lines."""
    figures = [figure for group in report.measured if (figure := group.figure(report.headline.name))]
    runs = [value for group in report.measured for value in group.values(report.headline.name).values()]
    runs += [value for _, value in report.levels]
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
        "levels": [(label, across(value)) for label, value in report.levels],
        "low": low,
        "high": high,
    }


def _cost_plots(report: Report, marks: dict[str, Mark]) -> list[str]:
    """The headline against each cost that was measured."""
    drawn = []
    for cost in COSTS:
        both = {g.name: (g.figure(report.headline.name), g.figure(cost)) for g in report.groups}
        points = {name: (good, paid) for name, (good, paid) in both.items() if good is not None and paid is not None}
        if points:
            drawn.append(plots.pareto(points, marks, report.headline, Measure.of(cost), report.levels))
    return drawn


def _distance_plots(report: Report, marks: dict[str, Mark]) -> list[str]:
    """Recall against distance: of the last shot after true ones, and of whole films, as far as measured."""
    drawn = []
    for measure in (Measure.of(RECALL), Measure.of(WHOLE + RECALL)):
        places = report.at_distances(measure.name)
        lines = {
            group.name: {place: figure for place, name in places.items() if (figure := group.figure(name))}
            for group in report.rows
        }
        if places:
            measured = {name: line for name, line in lines.items() if line}
            drawn.append(plots.distances(measured, marks, measure.label, _chance(report, measure)))
    return drawn


def _chance(report: Report, measure: Measure) -> list[tuple[str, float]]:
    return [("chance", report.chance[measure.name])] if measure.name in report.chance else []


def _curve_plots(report: Report, marks: dict[str, Mark]) -> dict[str, str]:
    """One of each curve that has more than a point, recall first; long training curves, by batches, are smoothed."""
    drawn = {}
    names = dict.fromkeys(name for result in report.results for name in result.curves)
    for name in sorted(names, key=lambda name: name != f"val/{RECALL}"):
        measure = Measure.of(name.removeprefix("val/"))
        curves: dict[str, list[list[tuple[int, float]]]] = {}
        for group in report.groups:
            of = [
                _points(r.curves.get(name, []), smoothed=name.startswith("train/"))
                for r in group.finished or group.results
            ]
            if kept := [curve for curve in of if len(curve) > 1]:
                curves[group.name] = kept
        if curves:
            known = {"train/flow": "training loss, running mean", "val/loss": LABELS["val_loss"]}
            label = known.get(name, measure.label)
            drawn[name] = plots.curves(curves, marks, label, measure, _chance(report, measure))
    return drawn


def _points(curve: Sequence[tuple[int, float]], *, smoothed: bool) -> list[tuple[int, float]]:
    points = [(step, value) for step, value in curve if value is not None]
    if len(points) < LONG or not smoothed:
        return points
    steps, losses = zip(*points, strict=True)
    return list(zip(steps, plots.smooth(losses), strict=True))


@dataclass
class Film:
    """A film that was drawn, real, as a data URI, and what every group made of that very film."""

    real: str
    wide: bool
    versions: list[Versions]


class Versions(NamedTuple):
    """A method's guess from a half-noised copy, and its own film from the captions, as data URIs."""

    group: Group
    guess: str
    drawn: str


def _films(report: Report) -> list[Film]:
    found: dict[str, Film] = {}
    for group in report.groups:
        for strip in group.one.strips if group.finished else []:
            pixels = (255 * png.imread(Path(group.one.folder) / strip)[..., :3]).round().astype("uint8")
            rows = picture_rows(torch.from_numpy(pixels))
            real, guess, drawn = map(_embedded, rows)
            film = found.setdefault(real, Film(real, rows[0].shape[1] > WIDE * len(rows[0]), []))
            film.versions.append(Versions(group, guess, drawn))
    return list(found.values())


def _embedded(picture: torch.Tensor) -> str:
    buffer = io.BytesIO()
    png.imsave(buffer, picture.numpy(), format="png")
    return _uri(buffer.getvalue())


def image(result: Result, name: str) -> str:
    """A picture of a run as a data URI."""
    return _uri((Path(result.folder) / name).read_bytes())


def _uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _distinct(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for i, one in enumerate(found) if one and one not in found[:i]]
