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
from experiments.analysis.formatting import percent, settings
from experiments.config.budget import Budget
from experiments.config.names import parse_method
from experiments.escape import for_terminal as escape
from experiments.escape import visible
from experiments.inspection.capture import Captured
from experiments.sweep.budget import solve_knob, total_flops
from sparse_zoo.errors import ZooError, refuse
from sparse_zoo.ladder import ladder

LEGEND = "* no other row has both fewer pairs and less error. at best: with as many pieces, chosen by softmax mass."


@dataclass(frozen=True)
class Replayed:
    """One method with settings.

    figures: means over calls, batch items and heads; none where it failed. "density": of all pairs that ran, pooled
        ones too; "mass", "error" of the method and "best_mass", "best_error" of the best choice, see
        `sparse_zoo.ladder`; "seconds" of one call, routing included.
    untrained: it has parameters, which are as initialised.
    pareto: no other row has fewer pairs and no more error, or less error and no more pairs.
    failed: why it could not serve the calls.
    """

    method: str
    settings: dict[str, Any]
    figures: dict[str, float]
    untrained: bool = False
    pareto: bool = False
    failed: str | None = None

    @property
    def label(self) -> str:
        """The method with its settings, for people."""
        return settings({"name": self.method, **self.settings}) + (" (untrained)" if self.untrained else "")


Told = Callable[[str, Replayed | None], object]


def parse_methods(texts: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Methods with settings, of METHOD[:key=value,...], or all that are registered; `dense`, the reference, always.

    What a text does not set has the class's default.
    """
    found = [parse_method(text) for text in texts] or [(name, {}) for name in zoo.names()]
    return found if any(name == "dense" for name, _ in found) else [("dense", {}), *found]


def replay(
    captured: Sequence[Captured],
    methods: Sequence[tuple[str, Mapping[str, Any]]],
    budget: Budget | None = None,
    told: Told = lambda *_: None,
) -> list[Replayed]:
    """Serve every call by every method; by error, those that failed last.

    With a budget every method's knob is first turned until the calls cost that much in the mean: density, or flops of a
    call, forward and backward, routing included. A method that refuses its settings or a call, or cannot cost that
    much, has the reason in its row. `told` is called before each call with a note, and with each row when it is there.
    Raises ZooError for an unknown method.
    """
    for name, _ in methods:
        zoo.get(name)
    rows = []
    for name, given in methods:
        try:
            free = budget is None or name == "dense"  # the reference costs what it costs
            own = dict(given) | ({} if free or budget is None else _matched(captured, name, given, budget, told))
            rows.append(_served(captured, name, own, told))
        except ZooError as error:
            rows.append(Replayed(name, dict(given), {}, failed=str(error)))
        told(name, rows[-1])
    ran = sorted((row for row in rows if row.figures), key=lambda row: (row.figures["error"], row.figures["density"]))
    places = [(row.figures["density"], row.figures["error"]) for row in ran]
    front = [not any(a <= x and b <= y and (a, b) != (x, y) for a, b in places) for x, y in places]
    best_first = [replace(row, pareto=pareto) for row, pareto in zip(ran, front, strict=True)]
    return best_first + [row for row in rows if row.failed is not None]


def _size(call: zoo.Call) -> dict[str, Any]:
    dim = None if call.hidden is None else call.hidden.shape[-1]
    return {"heads": call.q.shape[1], "head_dim": call.q.shape[-1], "dim": dim}


def _built(call: zoo.Call, method: str, given: Mapping[str, Any]) -> zoo.Attention:
    """As initialised with one seed, whoever asks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = zoo.build(method, **_size(call), **given)
    return attention.eval().to(call.q.dtype if call.hidden is None else call.hidden.dtype)


@torch.no_grad()
def _matched(
    captured: Sequence[Captured],
    method: str,
    given: Mapping[str, Any],
    budget: Budget,
    told: Told,
) -> dict[str, Any]:
    """The setting at which the calls cost what the budget says, in the mean; ZooError where there is none."""

    def measure(own: Mapping[str, Any]) -> float:
        told(f"{method} at {', '.join(f'{key} {value}' for key, value in own.items())}", None)
        costs, known = [], dict[tuple[zoo.Layout, torch.Size], zoo.Cost]()
        for call in (one.call for one in captured):
            cost = known.get((call.layout, call.q.shape))
            if cost is None:
                result = _built(call, method, dict(given) | dict(own)).run(call)
                cost = result.cost()
                if call.q_rows is None and not any(part.routed for plan in result.plans for part in plan.parts):
                    known[call.layout, call.q.shape] = cost  # the layout alone decided
            costs.append(cost.density if budget.kind == "density" else total_flops(cost))
        return fmean(costs)

    return solve_knob(method, dict(given), budget, _size(captured[0].call), measure)


@torch.no_grad()
def _served(
    captured: Sequence[Captured],
    method: str,
    given: Mapping[str, Any],
    told: Told,
) -> Replayed:
    found: list[dict[str, float]] = []
    untrained, warm = False, set[zoo.Layout]()
    for number, call in enumerate((one.call for one in captured), 1):
        told(f"{method}, call {number} of {len(captured)}", None)
        attention = _built(call, method, given)
        untrained = any(True for _ in attention.parameters())
        means = ladder(attention, call, rungs=("method", "best")).means()
        if call.layout not in warm:
            attention.run(call)  # what depends on the layout alone is made once, and a kernel's first call loads it
            warm.add(call.layout)
        start = time.perf_counter()
        result = attention.run(call)
        seconds = time.perf_counter() - start
        of_rungs = {"": means["method"], "best_": means["best"]}
        masses = {f"{which}{key}": rung[key] for which, rung in of_rungs.items() for key in ("mass", "error")}
        found.append({"density": result.cost().density, "seconds": seconds, **masses})
    figures = {key: fmean(one[key] for one in found) for key in found[0]}
    return Replayed(method, dict(given), figures, untrained)


def to_json(captured: Sequence[Captured], rows: Sequence[Replayed], budget: Budget | None = None) -> dict[str, Any]:
    """Plain: how many calls of which layers and films, what was matched, and the rows."""
    calls = [{"layer": x.call.layer, "tokens": len(x.call.layout), "method": dict(x.method)} for x in captured]
    plain = [asdict(row) for row in rows]
    match = None if budget is None else {budget.kind: budget.target}
    return {"calls": calls, "match": match, "rows": [{**row, **row.pop("figures")} for row in plain]}


def table(captured: Sequence[Captured], rows: Sequence[Replayed]) -> Table:
    """Return a table of the methods that ran, in the order of `rows`; `*` marks those on the Pareto front."""
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
            shares = (percent(row.figures[key]) for key in ("density", "mass", "best_mass", "error", "best_error"))
            found.add_row("*" if row.pareto else "", escape(row.label), *shares, f"{row.figures['seconds']:.3g}")
    return found


def line(row: Replayed) -> str:
    """One row by itself, while others are awaited."""
    if row.failed is not None:
        return f"{row.label}: failed"
    pairs, error, kept = (percent(row.figures[key]) for key in ("density", "error", "mass"))
    return f"{row.label}: error {error} with {pairs} of the pairs, {kept} kept"


def plot(rows: Sequence[Replayed], path: Path) -> Path:
    """Error against density, the Pareto front joined, as PNG, SVG or PDF by the name's end."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    ran = [(row, row.figures["density"], row.figures["error"]) for row in rows if row.failed is None]
    refuse("replay", [] if ran else ["no method ran, so there is nothing to draw"])
    figure = Figure(figsize=(7.5, 4.2 + 0.17 * len(ran)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    front = sorted((density, error) for row, density, error in ran if row.pareto)
    axes.plot(*zip(*front, strict=True), color="0.7", lw=1.2, zorder=1)
    for number, (row, density, error) in enumerate(ran, 1):
        label, faint = visible(f"{number}  {row.label}").replace("$", r"\$"), 1 if row.pareto else 0.45
        axes.scatter(density, error, s=46, zorder=2, edgecolor="0.2", alpha=faint, label=label)
        axes.annotate(str(number), (density, error), xytext=(5, 5), textcoords="offset points", fontsize=8)
    figure.legend(loc="outside lower left", fontsize=7, frameon=False)
    axes.set_xlabel("pairs, of dense attention's")
    axes.set_ylabel("error of the output, ‖out − dense‖ ÷ ‖dense‖")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=-0.02)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
