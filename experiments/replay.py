"""`zoo replay`: captured calls served by other methods, offline: what each keeps, errs and takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.table import Table

import sparse_zoo as zoo
from experiments.captures import Captured
from experiments.config import parse_method
from experiments.report import percent, settings
from sparse_zoo.errors import ZooError, refuse
from sparse_zoo.ladder import ladder

TINY = 1024
"""Films of fewer tokens get the settings that a class declares as `small`: its defaults are for real films."""

LEGEND = "* no other row has both fewer pairs and less error. at best: with as many pieces, chosen by softmax mass."


@dataclass(frozen=True)
class Replayed:
    """One method with settings; means over calls, batch items and heads, None where it failed.

    density: of all pairs that ran, pooled ones too; mass, best, error: see `sparse_zoo.ladder`; best_error: that of the
    best choice. seconds: of one call, routing included. untrained: it has parameters, which are as initialised.
    pareto: no other row has both fewer pairs and less error.
    """

    method: str
    settings: dict[str, Any]
    density: float | None = None
    mass: float | None = None
    best: float | None = None
    error: float | None = None
    best_error: float | None = None
    seconds: float | None = None
    untrained: bool = False
    pareto: bool = False
    failed: str | None = None

    @property
    def label(self) -> str:
        """The method with its settings, for people."""
        return settings({"name": self.method, **self.settings}) + (" (untrained)" if self.untrained else "")


def asked(texts: Sequence[str], captured: Sequence[Captured]) -> list[tuple[str, dict[str, Any]]]:
    """Methods with settings, of METHOD[:key=value,...], or all that are registered.

    A method without settings of its own in the text has its defaults, or on tiny films its `small` ones.
    """
    longest = max(len(film) for one in captured for film in one.call.layout.films)
    found = []
    for name, given in [parse_method(text) for text in texts] or [(name, {}) for name in zoo.names()]:
        small = dict(zoo.get(name).small) if longest < TINY else {}
        found.append((name, given or small))
    return found


def replay(
    captured: Sequence[Captured],
    methods: Sequence[tuple[str, Mapping[str, Any]]],
    told: Callable[[str], object] = lambda _: None,
) -> list[Replayed]:
    """Serve every call by every method; by error, those that failed last. `told` is called once a method.

    A method that refuses its settings or a call has the reason in its row. Raises ZooError for an unknown method.
    """
    for name, _ in methods:
        zoo.get(name)
    rows = []
    for name, given in methods:
        blank = Replayed(name, dict(given))
        try:
            rows.append(_served(captured, blank))
        except ZooError as error:
            rows.append(replace(blank, failed=str(error)))
        told(name)
    rows.sort(key=lambda row: (row.failed is not None, row.error, row.density))
    return [replace(row, pareto=row.failed is None and not any(_beats(x, row) for x in rows)) for row in rows]


def _served(captured: Sequence[Captured], row: Replayed) -> Replayed:
    found: list[dict[str, float]] = []
    untrained = False
    for one in captured:
        call = one.call
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            dim = None if call.hidden is None else call.hidden.shape[-1]
            shape = {"heads": call.q.shape[1], "head_dim": call.q.shape[-1], "dim": dim}
            dtype = call.q.dtype if call.hidden is None else call.hidden.dtype
            attention = zoo.build(row.method, **shape, **row.settings).eval().to(dtype)
            untrained = any(True for _ in attention.parameters())
            means = ladder(attention, call).means()  # first: it warms up what depends on the layout alone
            start = time.perf_counter()
            result = attention.run(call)
            seconds = time.perf_counter() - start
        found.append(
            {
                "density": result.cost().density,
                "mass": means["method"]["mass"],
                "best": means["best"]["mass"],
                "error": means["method"]["error"],
                "best_error": means["best"]["error"],
                "seconds": seconds,
            }
        )
    means_over_calls = {key: fmean(x[key] for x in found) for key in found[0]}
    return replace(row, untrained=untrained, **means_over_calls)


def _beats(a: Replayed, b: Replayed) -> bool:
    """Whether a is nowhere worse than b, and somewhere better."""
    if a.failed is not None or a.density is None or b.density is None or a.error is None or b.error is None:
        return False
    return a.density <= b.density and a.error <= b.error and (a.density, a.error) != (b.density, b.error)


def to_json(captured: Sequence[Captured], rows: Sequence[Replayed]) -> dict[str, Any]:
    """Plain: how many calls of which layers and films, and the rows."""
    calls = [{"layer": x.call.layer, "tokens": len(x.call.layout), "method": dict(x.method)} for x in captured]
    return {"calls": calls, "rows": [asdict(row) for row in rows]}


def table(captured: Sequence[Captured], rows: Sequence[Replayed]) -> Table:
    tokens = sorted({len(x.call.layout) for x in captured})
    layers = sorted({x.call.layer for x in captured})
    span = " … ".join(f"{x:,}" for x in dict.fromkeys((tokens[0], tokens[-1])))
    found = Table(
        title=f"{len(captured)} calls of {span} tokens, layers {', '.join(map(str, layers))}; by error",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("", "method", "pairs", "kept", "at best", "error", "at best", "seconds"):
        found.add_column(name, justify="left" if name in ("", "method") else "right", no_wrap=name != "method")
    for row in rows:
        if row.failed is None:
            shares = map(percent, (row.density, row.mass, row.best, row.error, row.best_error))
            found.add_row("*" if row.pareto else "", row.label, *shares, f"{row.seconds:.3g}")
    return found


def plot(rows: Sequence[Replayed], path: Path) -> Path:
    """Error against density, the Pareto front joined, as PNG, SVG or PDF by the name's end."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    ran = [row for row in rows if row.failed is None and row.density is not None and row.error is not None]
    refuse("replay", [] if ran else ["no method ran, so there is nothing to draw"])
    figure = Figure(figsize=(7.5, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    front = sorted((row.density, row.error) for row in ran if row.pareto)  # type: ignore[type-var]
    axes.plot(*zip(*front, strict=True), color="0.7", lw=1.2, zorder=1)
    for row in ran:
        axes.scatter(row.density, row.error, s=46, zorder=2, edgecolor="0.2", alpha=1 if row.pareto else 0.45)
        axes.annotate(row.label, (row.density, row.error), xytext=(6, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel("pairs, of dense attention's")
    axes.set_ylabel("error of the output, ‖out − dense‖ ÷ ‖dense‖")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlim(left=0, right=1.25 * max(row.density for row in ran if row.density is not None))
    axes.set_ylim(bottom=-0.02)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
