"""What a sweep found, from the results on disk: a page that opens anywhere, a JSON object, a table for the terminal."""

from __future__ import annotations

import base64
import io
import statistics
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich import box
from rich.table import Table

from experiments.store import Result, home, read, read_sweep, write_json

# Distinct on white and on near-black, for the usual kinds of colour blindness too as far as ten can be.
PALETTE = ("#7a7f87", "#2f7ed8", "#e07b29", "#1f9d6b", "#a55fc9", "#d1495b", "#2aa7b8", "#b59a1f", "#6a6fdb", "#c2669a")
INK, FAINT = "#010203", "#040506"  # stand-ins that the page replaces by its own colours, light or dark


@dataclass(frozen=True)
class Report:
    """The cells of a sweep, best first: finished by validation loss, then the others in the sweep's order."""

    name: str
    about: str
    results: tuple[Result, ...]

    @staticmethod
    def of(name: str) -> Report:
        """The sweep of that name among the runs; raises `ZooError` where there is none."""
        asked = read_sweep(name)
        found = [read(cell, name) for cell in asked.cells]
        worst = float("inf")
        found.sort(key=lambda r: (r.status != "finished", worst if r.val_loss is None else r.val_loss))
        return Report(name, asked.about, tuple(found))

    @property
    def finished(self) -> list[Result]:
        return [result for result in self.results if result.status == "finished"]

    @property
    def unfinished(self) -> list[Result]:
        return [result for result in self.results if result.status != "finished"]

    def to_json(self) -> dict[str, Any]:
        """{"name", "cells": [{"name", "attention", "status", "seed", ...}]}; null stands for what was not measured."""
        return {"name": self.name, "cells": [result.to_json() for result in self.results]}

    def table(self) -> Table:
        """The leaderboard for a terminal."""
        title = f"{self.name}: {len(self.finished)} of {len(self.results)} cells finished"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for name in ("cell", "val", "first", "last", "density", "GFLOPs", "s/step", "kernel"):
            table.add_column(name, justify="left" if name in ("cell", "kernel") else "right", no_wrap=True)
        for r in self.results:
            if r.status == "finished":
                figures = [number(r.val_loss), number(r.first_loss), number(r.last_loss), percent(r.density)]
                table.add_row(r.name, *figures, giga(r.flops), number(r.seconds_per_step), r.kernel)
            else:
                table.add_row(r.name, f"[red]{r.status}[/red]")
        return table

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
        environment.filters.update(number=number, percent=percent, giga=giga, settings=settings, image=image, mib=mib)
        colours = {result.name: PALETTE[i % len(PALETTE)] for i, result in enumerate(sorted(self.results, key=_order))}
        return environment.get_template("report.html.j2").render(
            report=self,
            colours=colours,
            made=datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
            cost_plot=_themed(_cost_plot(self.finished, colours)) if self.finished else "",
            curves_plot=_themed(_curves_plot(self.results, colours)) if any(r.curves for r in self.results) else "",
            machines=_distinct(
                [{k: v for k, v in r.provenance.items() if k not in ("pid", "started")} for r in self.results]
            ),
            skipped=_distinct([bad for r in self.results for bad in r.data.get("skipped", [])]),
            total_seconds=sum(r.seconds or 0 for r in self.results),
        )


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def giga(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e9:.3g}"


def mib(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:.0f} MiB"


def settings(attention: dict[str, Any] | list[dict[str, Any]]) -> str:
    """`moc · top_k 2 · anchors text` for people; layers that differ are joined."""
    if isinstance(attention, list):
        return " / ".join(settings(layer) for layer in attention)
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


def _cost_plot(results: list[Result], colours: dict[str, str]) -> str:
    figure, axes = _axes(2, 3.9)
    panels = (
        ("attended share of pairs, %", lambda r: 100 * r.density if r.density is not None else None),
        ("seconds per step", lambda r: r.seconds_per_step),
    )
    for axis, (label, cost) in zip(axes[0], panels, strict=True):
        points = [(cost(r), r.val_loss, r.name) for r in results if cost(r) is not None and r.val_loss is not None]
        for x, y, name in points:
            axis.scatter(x, y, s=64, color=colours[name], zorder=3)
        axis.set_xlabel(label)
        axis.set_ylabel("validation loss")
        axis.margins(0.12)
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", ls="", color=colours[r.name], label=r.name) for r in results]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=5, frameon=False, handletextpad=0.2, columnspacing=1.2
    )
    return _svg(figure)


def _curves_plot(results: tuple[Result, ...], colours: dict[str, str]) -> str:
    figure, axes = _axes(2, 3.6)
    for result in results:
        train, val = result.curves.get("train/flow", []), result.curves.get("val/loss", [])
        if train:
            steps, losses = zip(*train, strict=True)
            axes[0][0].plot(steps, smooth(list(losses)), color=colours[result.name], lw=1.5, alpha=0.9)
        if val:
            axes[0][1].plot(*zip(*val, strict=True), color=colours[result.name], lw=1.5, marker="o", ms=3.5)
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
