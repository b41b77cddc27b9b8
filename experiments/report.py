"""What a sweep found, from the results on disk: a page that opens anywhere, a JSON object, a table for the terminal."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich import box
from rich.table import Table

from experiments.store import Result, home, read, read_sweep, write_json

# Distinct on white and on near-black, for the usual kinds of colour blindness too as far as ten can be.
PALETTE = ("#7a7f87", "#2f7ed8", "#e07b29", "#1f9d6b", "#a55fc9", "#d1495b", "#2aa7b8", "#b59a1f", "#6a6fdb", "#c2669a")
MEASURES_ABREAST = 5  # columns of sample metrics in a terminal 80 wide
INK, FAINT = "#010203", "#040506"  # stand-ins that the page replaces by its own colours, light or dark


FIGURES = ("val_loss", "first_loss", "last_loss", "density", "flops", "seconds_per_step")


@dataclass(frozen=True)
class Figure:
    """Mean over `n` runs and their sample standard deviation (n - 1 below the line; None of one run)."""

    mean: float
    sd: float | None
    n: int

    @staticmethod
    def of(values: Sequence[float | None]) -> Figure | None:
        """Of the runs that measured it; None if none did."""
        measured = [value for value in values if value is not None]
        if not measured:
            return None
        sd = statistics.stdev(measured) if len(measured) > 1 else None
        return Figure(statistics.fmean(measured), sd, len(measured))

    def __str__(self) -> str:
        return number(self.mean) if self.sd is None else f"{number(self.mean)} ± {number(self.sd)}"


@dataclass(frozen=True)
class Group:
    """Runs of a sweep that differ by their seed alone, by the name that they share; most often there is one run."""

    name: str
    results: tuple[Result, ...]

    @property
    def finished(self) -> list[Result]:
        return [result for result in self.results if result.status == "finished"]

    @property
    def one(self) -> Result:
        """The run that stands for all where one must: the first that finished, or else the first."""
        return (self.finished or self.results)[0]

    def figure(self, name: str) -> Figure | None:
        """One of `FIGURES` or of the sample metrics, over the finished runs."""
        runs = self.finished
        return Figure.of([getattr(r, name) if name in FIGURES else r.metrics.get(name) for r in runs])


@dataclass(frozen=True)
class Report:
    """The groups of cells of a sweep, best first: by mean validation loss, those without one after, in file order."""

    name: str
    about: str
    groups: tuple[Group, ...]

    @staticmethod
    def of(name: str) -> Report:
        """The sweep of that name among the runs; raises `ZooError` where there is none."""
        asked = read_sweep(name)
        by_name: dict[str, list[Result]] = {}
        for cell in asked.cells:
            by_name.setdefault(cell.group or cell.name, []).append(read(cell, name))
        return Report(name, asked.about, _best_first([Group(key, tuple(runs)) for key, runs in by_name.items()]))

    @property
    def results(self) -> list[Result]:
        return [result for group in self.groups for result in group.results]

    @property
    def finished(self) -> list[Result]:
        return [result for result in self.results if result.status == "finished"]

    @property
    def unfinished(self) -> list[Result]:
        return [result for result in self.results if result.status != "finished"]

    @property
    def measures(self) -> list[str]:
        """The names of the sample metrics that any finished run has."""
        return list(dict.fromkeys(name for result in self.finished for name in result.metrics))

    @property
    def seeds(self) -> int:
        """The most finished runs that differ by their seed alone."""
        return max((len(group.finished) for group in self.groups), default=0)

    def singly(self) -> Report:
        """The same with every run a group of its own."""
        return replace(self, groups=_best_first([Group(result.name, (result,)) for result in self.results]))

    def to_json(self) -> dict[str, Any]:
        """{"name", "cells": [{"name", "attention", "status", "seed", ...}], "groups": [{"name", "cells", "figures"}]}.

        A group names its cells; its figures are {"mean", "sd", "n"} each, over those that finished. null stands for
        what was not measured.
        """
        groups = [
            {
                "name": group.name,
                "cells": [result.name for result in group.results],
                "figures": {
                    key: asdict(figure) if (figure := group.figure(key)) else None for key in (*FIGURES, *self.measures)
                },
            }
            for group in self.groups
        ]
        return {"name": self.name, "cells": [result.to_json() for result in self.results], "groups": groups}

    def tables(self, *, runs: bool = False) -> list[Table]:
        """For a terminal: the leaderboard, and the measures of drawn shots; of single `runs`, or means over seeds."""
        shown = self.singly() if runs else self
        title = f"{self.name}: {len(self.finished)} of {len(self.results)} cells finished"
        if shown.seeds > 1:
            title += f"; means over up to {shown.seeds} seeds ± sample standard deviation"
        table = _table(title)
        for name in ("cell", "val", "first", "last", "density", "GFLOPs", "s/step", "kernel"):
            table.add_column(name, justify="left" if name in ("cell", "kernel") else "right", no_wrap=True)
        for group in shown.groups:
            if group.finished:
                val, first, last, density, flops, seconds = (group.figure(name) for name in FIGURES)
                losses = [short(val), number(mean(first)), number(mean(last))]
                costs = [percent(mean(density)), giga(mean(flops)), number(mean(seconds))]
                table.add_row(group.name, *losses, *costs, group.one.kernel)
            for status in dict.fromkeys(r.status for r in group.results if r.status != "finished"):
                table.add_row(group.name, f"[red]{status}[/red]")
        return [table, *shown._drawn()]

    def _drawn(self) -> list[Table]:
        """The sample metrics, as many to a table as fit into a terminal."""
        tables: list[Table] = []
        for first in range(0, len(self.measures), MEASURES_ABREAST):
            names = self.measures[first : first + MEASURES_ABREAST]
            table = _table("" if tables else "last shots, drawn after the true ones before them")
            table.add_column("cell", no_wrap=True)
            for name in names:
                table.add_column(name.replace("_", " "), justify="right")
            for group in self.groups:
                if group.finished:
                    table.add_row(group.name, *(short(group.figure(name)) for name in names))
            tables.append(table)
        return tables

    def write(self) -> Path:
        """Write `report.json` and `report.html` into the sweep's folder; the path of the page."""
        folder = home() / self.name
        write_json(folder / "report.json", self.to_json())
        page = folder / "report.html"
        page.write_text(self.html())
        return page

    def html(self) -> str:
        """The page: one file, nothing fetched from anywhere."""
        environment = Environment(loader=PackageLoader("experiments"), autoescape=True, undefined=StrictUndefined)
        environment.filters.update(
            mean=mean, number=number, percent=percent, giga=giga, settings=settings, image=image, mib=mib
        )
        ordered = sorted(self.groups, key=lambda group: _order(group.one))
        colours = {group.name: PALETTE[i % len(PALETTE)] for i, group in enumerate(ordered)}
        return environment.get_template("report.html.j2").render(
            report=self,
            colours=colours,
            made=datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
            cost_plot=_themed(_cost_plot(self.groups, colours)) if self.finished else "",
            curves_plot=_themed(_curves_plot(self.groups, colours)) if any(r.curves for r in self.results) else "",
            machines=_distinct(
                [{k: v for k, v in r.provenance.items() if k not in ("pid", "started")} for r in self.results]
            ),
            skipped=_distinct([bad for r in self.results for bad in r.data.get("skipped", [])]),
            total_seconds=sum(r.seconds or 0 for r in self.results),
        )


def mean(figure: Figure | None) -> float | None:
    return None if figure is None else figure.mean


def short(figure: Figure | None) -> str:
    """`0.941`, or with several runs `.941±.012`."""
    if figure is None or figure.sd is None:
        return number(mean(figure))
    return "±".join(number(value).removeprefix("0") for value in (figure.mean, figure.sd))


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def giga(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e9:.3g}"


def mib(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:.0f} MiB"


def settings(attention: dict[str, Any] | list[dict[str, Any]]) -> str:
    """`moc · top_k 2 · anchors text` for people; layers that differ are joined: `dense ×2 / moc · top_k 2 ×10`."""
    if isinstance(attention, list):
        alike = [(name, len(list(layers))) for name, layers in groupby(map(settings, attention))]
        return " / ".join(name if count == 1 else f"{name} ×{count}" for name, count in alike)
    own = [f"{key} {_plain(value)}" for key, value in attention.items() if key != "name"]
    return " · ".join([str(attention["name"]), *own])


def image(result: Result, name: str) -> str:
    """A picture of a run as a data URI."""
    data = (Path(result.folder) / name).read_bytes()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.items()) + ")"
    if isinstance(value, list | tuple):
        return ("×" if value and isinstance(value[0], int) else "+").join(map(str, value)) or "none"
    return "off" if value is None else str(value)


def _best_first(groups: Sequence[Group]) -> tuple[Group, ...]:
    def rank(group: Group) -> tuple[bool, float]:
        loss = mean(group.figure("val_loss"))
        return not group.finished, float("inf") if loss is None else loss

    return tuple(sorted(groups, key=rank))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)


def _order(result: Result) -> tuple[bool, str]:
    name = result.attention[0]["name"] if isinstance(result.attention, list) else result.attention["name"]
    return name != "dense", result.name


def _distinct(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for i, one in enumerate(found) if one and one not in found[:i]]


def _axes(columns: int, height: float) -> Any:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 10,
            "text.color": INK,
            "axes.edgecolor": FAINT,
            "axes.labelcolor": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": INK,
            "ytick.color": INK,
            "grid.color": FAINT,
            "axes.grid": True,
            "grid.linewidth": 0.6,
            "svg.hashsalt": "zoo",
        }
    )
    return pyplot.subplots(1, columns, figsize=(4.6 * columns, height), layout="constrained", squeeze=False)


def _cost_plot(groups: Sequence[Group], colours: dict[str, str]) -> str:
    """Single runs as points; of several a larger ring at their mean."""
    figure, axes = _axes(2, 3.9)
    panels = (("attended share of pairs, %", "density", 100.0), ("seconds per step", "seconds_per_step", 1.0))
    for axis, (label, cost, unit) in zip(axes[0], panels, strict=True):
        for group in groups:
            points = [(getattr(r, cost), r.val_loss) for r in group.finished]
            points = [(unit * x, y) for x, y in points if x is not None and y is not None]
            several = len(points) > 1
            for x, y in points:
                axis.scatter(x, y, s=24 if several else 64, color=colours[group.name], zorder=3, lw=0)
            if several:
                x, y = (statistics.fmean(values) for values in zip(*points, strict=True))
                axis.scatter(x, y, s=110, facecolors="none", edgecolors=colours[group.name], zorder=3, lw=1.5)
        axis.set_xlabel(label)
        axis.set_ylabel("validation loss")
        axis.margins(0.12)
    from matplotlib.lines import Line2D

    named = [group.name for group in groups if group.finished]
    handles = [Line2D([], [], marker="o", ls="", color=colours[name], label=name) for name in named]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=5, frameon=False, handletextpad=0.2, columnspacing=1.2
    )
    return _svg(figure)


def _curves_plot(groups: Sequence[Group], colours: dict[str, str]) -> str:
    figure, axes = _axes(2, 3.6)
    for group in groups:
        style: dict[str, Any] = {"color": colours[group.name], "lw": 1.5 if len(group.results) == 1 else 0.9}
        for result in group.results:
            train, val = result.curves.get("train/flow", []), result.curves.get("val/loss", [])
            if train:
                steps, losses = zip(*train, strict=True)
                axes[0][0].plot(steps, smooth(list(losses)), alpha=0.9, **style)
            if val:
                axes[0][1].plot(*zip(*val, strict=True), marker="o", ms=3.5, **style)
    for axis, label in zip(axes[0], ("training loss, running mean", "validation loss"), strict=True):
        axis.set_xlabel("step")
        axis.set_ylabel(label)
    return _svg(figure)


def smooth(losses: list[float]) -> list[float]:
    """Mean over the last tenth of the run at most, so that the first point is the first loss."""
    reach = max(1, len(losses) // 10)
    return [statistics.fmean(losses[max(0, i + 1 - reach) : i + 1]) for i in range(len(losses))]


def _svg(figure: Any) -> str:
    from matplotlib import pyplot

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _themed(svg: str) -> str:
    """The page's own colours and fonts in a plot, so that it follows light and dark."""
    return svg.replace(INK, "var(--ink)").replace(FAINT, "var(--line)").replace("'DejaVu Sans'", "inherit")
