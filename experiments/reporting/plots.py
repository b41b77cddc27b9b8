"""The report's plots: SVG in the page's own colours and fonts, one panel a plot, so that a phone can stack them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec

import numpy as np

from experiments.analysis.ablations import MainEffect
from experiments.analysis.formatting import plain_values
from experiments.analysis.metrics import Measure
from experiments.analysis.significance import Estimate, pareto_front
from experiments.escape import visible

# Distinct on white and on near-black, for the usual kinds of colour blindness too as far as nine can be.
GREY = "#7a7f87"
PALETTE = ("#2f7ed8", "#e07b29", "#1f9d6b", "#a55fc9", "#d1495b", "#2aa7b8", "#b59a1f", "#6a6fdb", "#c2669a")
INK, FAINT, QUIET = "#010203", "#040506", "#070809"  # stand-ins that the page replaces by its own, light or dark
THEME = {INK: "var(--ink)", FAINT: "var(--line)", QUIET: "var(--quiet)", "'DejaVu Sans'": "inherit"}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "zoo",
    "text.parse_math": False,  # names may hold dollars
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.1,
    "axes.ymargin": 0.1,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True)
class Mark:
    """How a method is told apart in every plot: its place in the leaderboard, its colour."""

    number: int
    colour: str


BANDS = 9  # of more lines the bands would hide each other
LONGEST_LABEL = 40  # letters of a setting's value
CROWDED = 8  # values of a setting whose names would meet even if slanted
SHARE = (0.0, 1.0)
WHOLE_SCALE = (-0.04, 1.04)  # of shares, so that lines at either end are whole

P = ParamSpec("P")
Levels = Sequence[tuple[str, float]]
"""(label, value): chance and the controls, drawn as lines."""


def _svg(draw: Callable[P, Any]) -> Callable[P, str]:
    """A function that draws a matplotlib figure becomes one that gives its SVG."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        with rc_context(STYLE):
            buffer, figure = io.StringIO(), draw(*args, **kwargs)
            # Laid out here, as `savefig` would, which draws everything once more for it.
            figure.set_dpi(72)  # that of SVG
            FigureCanvasSVG(figure)
            figure.get_layout_engine().execute(figure)
            figure.set_layout_engine("none")
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return _themed(buffer.getvalue())

    return drawn


@_svg
def pareto(
    points: Mapping[str, tuple[Estimate, Estimate]],
    marks: Mapping[str, Mark],
    quality: Measure,
    cost: Measure,
    levels: Levels,
    numbered: Collection[str],
) -> Any:
    """Quality with its interval against cost, (quality, cost) by name; steps join the Pareto front, rings mark it.

    Those that are not `numbered` are faint dots.
    """
    canvas, axis = _panel(4.3, 3.5)
    found = pareto_front(
        {name: of.mean for name, (_, of) in points.items()}, lambda name: quality.rank(points[name][0].mean)
    )
    steps = [(cost.unit * points[name][1].mean, points[name][0].mean) for name in found]
    axis.step(*zip(*steps, strict=True), where="post", color=INK, lw=0.9, ls=(0, (4, 2)), zorder=2)
    faint = [(cost.unit * paid.mean, good.mean) for name, (good, paid) in points.items() if name not in numbered]
    if faint:
        axis.scatter(*zip(*faint, strict=True), s=8, color=QUIET, alpha=0.4, lw=0, zorder=1)
    shown = {name: (cost.unit * paid.mean, good) for name, (good, paid) in points.items() if name in numbered}
    for name, (x, good) in shown.items():
        if good.low is not None and good.high is not None:
            axis.plot([x, x], [good.low, good.high], color=marks[name].colour, lw=1.6, alpha=0.55)
    rings = [INK if name in found else "none" for name in shown]
    places = [(x, good.mean, marks[name]) for name, (x, good) in shown.items()]
    _draw_badges(axis, places, s=120, edgecolors=rings, linewidths=1.3)
    axis.set_xlabel(visible(cost.label))
    axis.locator_params(axis="x", nbins=6)  # more of long figures would run into each other
    axis.set_ylabel(visible(quality.label))
    _draw_levels(axis, levels)
    return canvas


@_svg
def effect(one: MainEffect, measure: Measure, levels: Levels) -> Any:
    """The mean and interval at each value of a setting, in order; single runs as faint dots."""
    canvas, axis = _panel(2.9, 2.4)
    places = range(len(one.levels))
    spread: list[float] = []
    for x, level in zip(places, one.levels, strict=True):
        spread += (x + np.linspace(-0.08, 0.08, len(level.values))).tolist() if len(level.values) > 1 else [x]
    runs = [value for level in one.levels for value in level.values]
    axis.scatter(spread, runs, s=9, color=QUIET, alpha=0.55, lw=0, zorder=2)
    for x, level in zip(places, one.levels, strict=True):
        if level.estimate.low is not None:
            axis.plot([x, x], [level.estimate.low, level.estimate.high], color=INK, lw=1.4, zorder=3)
    means = [level.estimate.mean for level in one.levels]
    if all(isinstance(part, int | float) for level in one.levels for part in level.value):
        axis.plot(places, means, color=INK, lw=0.8, zorder=2)
    axis.scatter(places, means, s=34, color=INK, zorder=4)
    labels = [_cut(visible(plain_values(level.value))) for level in one.levels]
    slanted = {"rotation": 25, "ha": "right", "fontsize": 8} if sum(len(label) + 2 for label in labels) > 30 else {}
    axis.set_xticks(places, labels=labels, **({"rotation": 90, "fontsize": 8} if len(labels) > CROWDED else slanted))
    axis.set_xlim(-0.5, len(one.levels) - 0.5)
    axis.grid(axis="x", visible=False)
    axis.set_ylabel(visible(measure.label))
    _draw_levels(axis, levels)
    return canvas


@_svg
def curves(
    runs: Mapping[str, Sequence[Sequence[tuple[int, float]]]],
    marks: Mapping[str, Mark],
    label: str,
    measure: Measure,
    levels: Levels,
) -> Any:
    """Each method's mean over its runs, (step, value) each; up to `BANDS` with a band from the lowest to the highest.

    Shares are drawn from 0 to 1 with their `levels`; losses that fall far on a logarithmic scale.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    canvas, axis = _panel(4.3, 3.1)
    badges = []
    for name, of in runs.items():
        steps, values = together(of)
        dots = {"marker": "o", "ms": 3} if len(steps) < 12 else {}
        if len(values) > 1 and len(runs) <= BANDS:
            axis.fill_between(steps, values.min(0), values.max(0), color=marks[name].colour, alpha=0.18, lw=0)
        axis.plot(steps, values.mean(0), color=marks[name].colour, lw=1.5, **dots)
        badges.append(_place_on_line(steps, values.mean(0), marks[name]))
    _draw_badges(axis, badges, s=70)
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel(visible(label))
    axis.margins(x=0.02)
    low, high = axis.dataLim.intervaly
    if measure.bounds == SHARE:
        axis.set_ylim(*WHOLE_SCALE)
    elif low > 0 and high > 4 * low:  # else what parts the methods late would be hidden by how all begin
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
    _draw_levels(axis, levels)
    return canvas


@_svg
def distances(
    lines: Mapping[str, Mapping[int, Estimate]], marks: Mapping[str, Mark], label: str, levels: Levels
) -> Any:
    """A share against the distance in shots, by name and distance: means, of up to `BANDS` their intervals as bands."""
    from matplotlib.ticker import MaxNLocator

    canvas, axis = _panel(4.3, 3.5)
    badges = []
    for name, figures in lines.items():
        places, mark = list(figures), marks[name]
        means = [figure.mean for figure in figures.values()]
        known = [(place, figure.low, figure.high) for place, figure in figures.items() if figure.low is not None]
        if known and len(lines) <= BANDS:
            axis.fill_between(*zip(*known, strict=True), color=mark.colour, alpha=0.18, lw=0)
        axis.plot(places, means, color=mark.colour, lw=1.5, marker="o", ms=3)
        badges.append(_place_on_line(places, means, mark))
    _draw_badges(axis, badges, s=70)
    axis.set_xlabel("shots back to the nearest that shows the subject")
    axis.set_ylabel(visible(label))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(*WHOLE_SCALE)
    _draw_levels(axis, levels)
    return canvas


def together(runs: Sequence[Sequence[tuple[int, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Curves at the steps of the first, as far as all of them go: steps (n,), values (runs, n)."""
    tables = [np.asarray(run, dtype=float).T for run in runs]
    last = min(steps[-1] for steps, _ in tables)
    steps = tables[0][0][tables[0][0] <= last]
    return steps, np.stack([np.interp(steps, *table) for table in tables])


def smooth(losses: Sequence[float]) -> list[float]:
    """Mean over the last tenth of the run at most, so that the first point is the first loss."""
    reach = max(1, len(losses) // 10)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    last = np.arange(1, len(losses) + 1)
    first = np.maximum(0, last - reach)
    return [float(x) for x in (sums[last] - sums[first]) / (last - first)]


def _cut(label: str) -> str:
    """A label that leaves room for the plot."""
    return label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…"


Badge = tuple[float, float, Mark]


def _place_on_line(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, mark: Mark) -> Badge:
    """A place for a line's number, each line's at another, so that numbers do not meet; late on long lines."""
    reach = len(x) if len(x) < 6 else len(x) // 2
    places = min(reach, 8)
    at = len(x) - 1 - (reach - 1) * (mark.number % places) // max(1, places - 1)
    return float(x[at]), float(y[at]), mark


def _draw_badges(axis: Any, badges: Sequence[Badge], **style: Any) -> None:
    """All at once: a scatter for each would take most of a plot's time."""
    if not badges:
        return
    xs, ys, marks = zip(*badges, strict=True)
    axis.scatter(xs, ys, color=[mark.colour for mark in marks], zorder=4, **style)
    in_white = {"color": "white", "size": 7, "weight": "bold", "ha": "center", "va": "center_baseline", "zorder": 5}
    for x, y, mark in badges:
        # Inside the axes, so that the layout need not measure it.
        axis.text(x, y, str(mark.number), **in_white).set_in_layout(False)


def _panel(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width, height), layout="constrained")
    return canvas, canvas.add_subplot()


def _draw_levels(axis: Any, levels: Levels) -> None:
    """Lines across, each with its label above; labels that would meet are joined."""
    low, high = axis.get_ylim()
    written: list[tuple[float, list[str]]] = []
    for label, value in sorted(levels, key=lambda level: level[1]):
        axis.axhline(value, color=QUIET, lw=0.9, ls=(0, (1, 2)), zorder=1)
        if written and value - written[-1][0] < 0.06 * (high - low):
            written[-1][1].append(label)
        else:
            written.append((value, [label]))
    # Above the line by more than half a badge, so that a control's own point does not hide its label.
    style = {"size": 7.5, "color": QUIET, "ha": "right", "va": "bottom", "zorder": 1, "textcoords": "offset points"}
    for value, labels in written:
        place = {"xy": (0.995, value), "xycoords": axis.get_yaxis_transform(), "xytext": (0, 6)}
        axis.annotate(visible(", ".join(labels)), **place, **style)


def _themed(svg: str) -> str:
    """What is between <svg> tags, in the page's colours and fonts; ids that many plots on one page would share go."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.find("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for stand_in, own in THEME.items():
        svg = svg.replace(stand_in, own)
    return svg
