"""A report as a page: one HTML file that fetches nothing."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import image as png
from PIL import Image

from experiments.analysis.formatting import giga, interval, mean, mib, number, p_value, percent, settings, signed
from experiments.analysis.metrics import CONTROLS, COSTS, LABELS, RECALL, WHOLE, Measure
from experiments.analysis.seed_groups import Group
from experiments.escape import visible
from experiments.reporting import plots
from experiments.reporting.plots import GREY, PALETTE, Mark
from experiments.reporting.report import Report, machines
from experiments.tracking.schema import find_file
from experiments.tracking.store import Result, home, whole
from sparse_zoo.errors import ZooError
from sparse_zoo.strips import picture_rows

WIDE = 12  # times as wide as high, from which on a film needs the whole page
LONG = 25  # points of a curve from which on it is smoothed
POINTS = 200  # of a curve that are drawn at most
PICTURED = 24  # groups whose plans and films a long report shows
MOST_BYTES, MOST_PIXELS = 1 << 23, 1 << 25  # of a picture
MOST_LEVELS, MOST_EFFECTS = 40, 40  # values of a setting, and settings, that are plotted


def write(report: Report) -> Path:
    """Write `report.json` and `report.html` into the sweep's folder; the path of the page."""
    folder = home() / report.name
    with whole(folder / "report.json") as file:
        file.write(json.dumps(report.to_json(), allow_nan=False).encode())
    page = folder / "report.html"
    with whole(page) as file:
        file.write(html(report).encode())
    return page


def html(report: Report) -> str:
    """The page: one file, nothing fetched from anywhere."""
    environment = Environment(
        loader=PackageLoader("experiments.reporting"),
        undefined=StrictUndefined,
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = (mean, number, percent, giga, mib, interval, p_value, settings, signed)
    environment.filters.update({one.__name__: one for one in formats})
    marks = _marks(report)
    plans, films, refused = _pictures(report)
    effects = [effect for effect in report.effects if len(effect.levels) <= MOST_LEVELS][:MOST_EFFECTS]
    return environment.get_template("report.html.j2").render(
        report=report,
        marks=marks,
        made=datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        shared=_shared(report),
        dots=_dots(report),
        pairs={} if report.many else {(pair.a, pair.b): pair for pair in report.differences},
        cost_plots=_cost_plots(report, marks),
        effect_plots=[(effect, plots.effect(effect, report.headline, report.levels)) for effect in effects],
        effects_left_out=[effect.name for effect in report.effects if effect not in effects],
        distance_plots=_distance_plots(report, marks),
        curve_plots=_curve_plots(report, marks),
        banded=len(report.groups) <= plots.BANDS,
        plans=plans,
        films=films,
        refused=refused,
        machines=machines(report),
        skipped=_distinct(bad for r in report.results for bad in r.data.get("skipped", [])),
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
            named = {group.name for group in report.plotted}
            drawn.append(plots.pareto(points, marks, report.headline, Measure.of(cost), report.levels, named))
    return drawn


def _distance_plots(report: Report, marks: dict[str, Mark]) -> list[str]:
    """Recall against distance: of the last shot after true ones, and of whole films, as far as measured."""
    drawn = []
    for measure in (Measure.of(RECALL), Measure.of(WHOLE + RECALL)):
        places = report.at_distances(measure.name)
        lines = {
            group.name: {place: figure for place, name in places.items() if (figure := group.figure(name))}
            for group in report.plotted
            if group.finished
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
    plotted = report.plotted
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
    if len(points) >= LONG and smoothed:
        steps, losses = zip(*points, strict=True)
        points = list(zip(steps, plots.smooth(losses), strict=True))
    kept = np.unique(np.linspace(0, len(points) - 1, min(POINTS, len(points))).round().astype(int))
    return [points[i] for i in kept]


def _together(runs: list[list[tuple[int, float]]]) -> list[list[tuple[int, float]]]:
    """The runs that have steps in common with the first."""
    return [run for run in runs if run[-1][0] >= runs[0][0][0]]


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


class Plans(NamedTuple):
    """The pictures of a group's plans: label and data URI of each."""

    group: Group
    pictures: list[tuple[str, str]]


def _pictures(report: Report) -> tuple[list[Plans], list[Film], list[str]]:
    """Plans, films, and a line for each picture that cannot be shown."""
    plans: list[Plans] = []
    films: dict[str, Film] = {}
    refused: list[str] = []
    listed = {group.name for group in report.rows}
    for group in report.plotted[: PICTURED if report.many else None]:
        one = group.one
        pictures = [
            (picture["label"], _uri(data))
            for picture in (one.pictures if group.name in listed else ())
            if (data := _png(one, picture["file"], refused))
        ]
        plans += [Plans(group, pictures)] * bool(pictures)
        for strip in one.strips if group.finished else ():
            if data := _png(one, strip, refused):
                try:
                    _add_film(films, group, data)
                except ZooError as error:
                    refused.append(f"{one.name}: {strip}: {error}")
    return plans, list(films.values()), refused


def _add_film(films: dict[str, Film], group: Group, strip: bytes) -> None:
    """Sort one group's version of a film to the others'; raises `ZooError` for what is no strip."""
    pixels = np.asarray(Image.open(io.BytesIO(strip)).convert("RGB"))
    rows = picture_rows(torch.from_numpy(pixels.copy()))
    real, guess, drawn = map(_embedded, rows)
    film = films.setdefault(real, Film(real, rows[0].shape[1] > WIDE * len(rows[0]), []))
    film.versions.append(Versions(group, guess, drawn))


def _embedded(picture: torch.Tensor) -> str:
    buffer = io.BytesIO()
    png.imsave(buffer, picture.numpy(), format="png")
    return _uri(buffer.getvalue())


def _png(result: Result, name: str, refused: list[str]) -> bytes | None:
    """A PNG in a run's folder that can be decoded; None, and the reason in `refused`, where there is none."""
    try:
        path = find_file(Path(result.folder), name)
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ValueError(f"it has {size} bytes, more than {MOST_BYTES}")
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise ValueError(f"it has {picture.width} × {picture.height} pixels, more than {MOST_PIXELS}")
            picture.load()
    except FileNotFoundError:
        refused.append(f"{result.name}: {name}: there is no such file")
    except ValueError as error:
        refused.append(f"{result.name}: {name}: {error}")
    except (OSError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises for damaged files
        refused.append(f"{result.name}: {name}: it cannot be read as a PNG")
    else:
        return data
    return None


def _uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _distinct(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({(one["path"], one["reason"]): one for one in found}.values())
