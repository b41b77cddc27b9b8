"""`zoo ladder`: a trained model's attention on the ladder of `sparse_zoo.ladder`, by layer, head and noise time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities import move_data_to_device
from rich.table import Table
from torch import Tensor

import sparse_zoo as zoo
from experiments.analysis.formatting import percent, settings
from experiments.config.names import parse_method
from experiments.escape import for_terminal as escape
from experiments.escape import visible
from experiments.inspection.capture import Captured, load
from experiments.inspection.trained import Trained
from lit_modules.dit import Block
from lit_modules.routing_watch import each_attention
from sparse_zoo.errors import refuse
from sparse_zoo.ladder import RUNGS, chance, ladder, verdict

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
FIGURES = ("mass", "error", "density")
RULE = (
    "In %. kept: share of dense attention's softmax on the keys; error: of the output, ‖out − dense‖ ÷ ‖dense‖. best, "
    "pooled, random: as many pieces, chosen by mass, by q · mean k, at random. router: the best would bring back a "
    "third or more of what is missing; budget: it would not, only more keys would; enough: 95 % are kept. Of several "
    "branches, kept is of the union of their keys, and pairs are summed over branches."
)
COLOURS = {"method": "#2f7ed8", "best": "#1f9d6b", "pooled": "#e07b29", "random": "#d1495b"}
QUIET = "#6b7280"

Figures = dict[str, dict[str, float]]
"""{rung: {figure: value}}"""


@dataclass(frozen=True)
class Step:
    """One method in one layer at one noise time: {rung: {figure: float64 (heads,)}}, means over films."""

    method: str
    layer: int
    time: float
    rungs: dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Climbed:
    """What `zoo ladder` found. `methods`: the run's own first, then those that were asked for.

    `checkpoint` is the file that it looked into, `step` the step of its training; None for captured calls without one.
    """

    checkpoint: str
    step: int | None
    films: int
    times: tuple[float, ...]
    methods: tuple[str, ...]
    layers: tuple[int, ...]
    heads: int
    steps: tuple[Step, ...]

    def figures(
        self, method: str, layer: int | None = None, time: float | None = None, head: int | None = None
    ) -> Figures:
        """Means over whatever is not given."""
        found = [x for x in self.steps if x.method == method and layer in (None, x.layer) and time in (None, x.time)]

        def mean(rung: str, figure: str) -> float:
            by_head = torch.stack([x.rungs[rung][figure] for x in found]).mean(0)
            return float(by_head.mean() if head is None else by_head[head])

        return {
            rung: {key: mean(rung, key) for key in FIGURES} for rung in RUNGS if all(rung in x.rungs for x in found)
        }

    def verdict(self, method: str, layer: int) -> dict[str, Any]:
        """{"method", "layer", "verdict", "chance", "mass"} over all heads and times; mass by rung."""
        mass = {name: rung["mass"] for name, rung in self.figures(method, layer).items()}
        return {"method": method, "layer": layer, "verdict": verdict(mass), "chance": chance(mass), "mass": mass}

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        """The verdict of every method in every layer: by method, then by layer."""
        return [self.verdict(method, layer) for method in self.methods for layer in self.layers]

    def to_json(self) -> dict[str, Any]:
        """Plain: "steps" with means and "heads", {rung: {figure: [of each head]}}, and "verdicts" by layer."""
        return {
            "checkpoint": self.checkpoint,
            "step": self.step,
            "films": self.films,
            "times": list(self.times),
            "methods": list(self.methods),
            "verdicts": self.verdicts,
            "steps": [
                {
                    "method": x.method,
                    "layer": x.layer,
                    "time": x.time,
                    "rungs": self.figures(x.method, x.layer, x.time),
                    "heads": {rung: {key: y.tolist() for key, y in own.items()} for rung, own in x.rungs.items()},
                }
                for x in self.steps
            ],
        }

    def tables(self, *, heads: bool) -> list[Table]:
        """By layer (and head), and by noise time."""
        which = [None, *range(self.heads)] if heads else [None]
        by_layer = [
            (method, f"{layer}" if head is None else f"{layer}, head {head}", self.figures(method, layer, head=head))
            for method in self.methods
            for layer in self.layers
            for head in which
        ]
        by_time = [(name, f"{time:g}", self.figures(name, time=time)) for name in self.methods for time in self.times]
        return [
            _table(f"By layer, mean over noise times {', '.join(f'{x:g}' for x in self.times)}", "layer", by_layer),
            _table("By noise time, mean over layers", "time", by_time),
        ]

    def told(self) -> list[str]:
        """The verdicts in words, a line a layer."""
        lines = []
        for found in self.verdicts:
            mass = found["mass"]
            named = f"{found['method']}, " if len(self.methods) > 1 else ""
            text = f"{named}layer {found['layer']}: {found['verdict']}: keeps {percent(mass['method'])}"
            text += f", the best choice of as many pieces {percent(mass['best'])}"
            lines.append(text + ("; no better than random" if found["chance"] else ""))
        return lines


def climb(
    trained: Trained,
    times: Sequence[float] = TIMES,
    asked: Sequence[str] = (),
    told: Callable[[str], object] = lambda _: None,
) -> Climbed:
    """Run the model on its films at each noise time; put every layer, and each method `asked`, on the ladder.

    `asked` are METHOD[:key=value,...], built anew: what they learn is not learnt. `told` is called once for each
    attention. Raises ZooError for times outside of (0, 1] and for what `sparse_zoo.build` refuses.
    """
    _check_times(times)
    blocks = [cast(Block, block).attention for block in trained.module.model.blocks]
    run = settings(trained.config["attention"])
    size = {"heads": blocks[0].heads, "head_dim": blocks[0].head_dim, "dim": blocks[0].dim}
    others = {name: own for name, own in (_build(parse_method(text), size) for text in asked) if name != run}
    found: Found = {}

    def look(time: float, attention: zoo.Attention, call: zoo.Call) -> None:
        _look_at(call, time, {run: attention, **others}, found)
        told(f"layer {call.layer}, time {time:g}")

    each_call(trained, times, look)
    films = sum(len(batch["text"]) * len(batch["layout"].films) for batch in trained.batches)
    return Climbed(
        str(trained.checkpoint),
        trained.step,
        films,
        tuple(times),
        (run, *others),
        tuple(range(len(blocks))),
        blocks[0].heads,
        _means(found),
    )


@torch.no_grad()
def climb_captured(path: Path, asked: Sequence[str] = (), told: Callable[[str], object] = lambda _: None) -> Climbed:
    """Put methods on the ladder for the calls that `zoo capture` has kept, of a run or of a pretrained model.

    Args:
        path: The file of calls.
        asked: METHOD[:key=value,...], built anew; where there is none, the method that served the calls.
        told: Called once for each call.

    Raises:
        ZooError: For what is no file of captures, calls that do not say their noise time, or differ in their heads, and
            for what `sparse_zoo.build` refuses.
    """
    captured = load(path)
    sizes = {(one.call.q.shape[1], one.call.q.shape[-1]) for one in captured}
    refuse(
        str(path),
        [f"call {n} does not say its noise time" for n, one in enumerate(captured) if one.call.noise is None]
        + [f"its calls must have heads of one number and width, got {sorted(sizes)}"] * (len(sizes) > 1),
    )
    first = captured[0].call
    dim = None if first.hidden is None else first.hidden.shape[-1]
    size = {"heads": first.q.shape[1], "head_dim": first.q.shape[-1], "dim": dim}
    wanted = [parse_method(text) for text in asked]
    for one in captured if not asked else ():
        own = {key: value for key, value in one.method.items() if key != "name"}
        if (one.method["name"], own) not in wanted:
            wanted.append((one.method["name"], own))
    methods = dict(_build(method, size) for method in wanted)
    found: Found = {}
    for one in captured:
        time = round(float(torch.as_tensor(one.call.noise).max()), 3)
        _look_at(one.call, time, methods, found)
        told(f"layer {one.call.layer}, time {time:g}")
    layers, times = tuple(sorted({layer for _, layer, _ in found})), tuple(sorted({time for *_, time in found}))
    in_a_layer = [one.call for one in captured if one.call.layer == first.layer]
    films = sum(len(call.q) * len(call.layout.films) for call in in_a_layer) // len(times)
    return Climbed(str(path), first.step, films, times, tuple(methods), layers, first.q.shape[1], _means(found))


Found = dict[tuple[str, int, float], list[dict[str, dict[str, Tensor]]]]
"""By method, layer and noise time, for each call: {rung: {figure: (batch, heads)}}."""


def _look_at(call: zoo.Call, time: float, methods: Mapping[str, zoo.Attention], found: Found) -> None:
    for name, attention in methods.items():
        attention.to(call.q.device, call.q.dtype if call.hidden is None else call.hidden.dtype)
        rungs = ladder(attention, call).rungs
        plain = {rung: {key: getattr(x, key).cpu() for key in FIGURES} for rung, x in rungs.items()}
        found.setdefault((name, call.layer, time), []).append(plain)


def _means(found: Found) -> tuple[Step, ...]:
    return tuple(
        Step(
            name,
            layer,
            time,
            {rung: {key: torch.cat([x[rung][key] for x in parts]).mean(0) for key in FIGURES} for rung in parts[0]},
        )
        for (name, layer, time), parts in found.items()
    )


def capture(
    trained: Trained,
    times: Sequence[float] = TIMES,
    layers: Sequence[int] | None = None,
    told: Callable[[str], object] = lambda _: None,
) -> list[Captured]:
    """The calls of some layers (all, when None) on the films at each noise time, in the order in which they ran.

    Raises ZooError for layers that there are not and times outside of (0, 1].
    """
    _check_times(times)
    attention, depth = trained.config["attention"], len(trained.module.model.blocks)
    refuse(
        "capture",
        [f"layers are 0 … {depth - 1}, got {layer}" for layer in layers or () if not 0 <= layer < depth],
    )
    found = []

    def look(time: float, _: zoo.Attention, call: zoo.Call) -> None:
        if layers is None or call.layer in layers:
            method = attention[call.layer] if isinstance(attention, list) else attention
            found.append(Captured(call, method))
        told(f"layer {call.layer}, time {time:g}")

    each_call(trained, times, look)
    return found


def each_call(trained: Trained, times: Sequence[float], look: Callable[[float, zoo.Attention, zoo.Call], None]) -> None:
    """Let `look` see every layer's call on every batch of films at every noise time."""
    module, device = trained.ready()
    for cpu in trained.batches:
        batch = move_data_to_device(cpu, device)
        for time in times:
            with torch.no_grad(), trained.trainer.precision_plugin.forward_context():
                each_attention(module, batch, time, trained.step, partial(_look, look, time))


def _look(
    look: Callable[[float, zoo.Attention, zoo.Call], None],
    time: float,
    attention: zoo.Attention,
    call: zoo.Call,
    result: zoo.Result,  # noqa: ARG001
) -> None:
    look(time, attention, call)


def layer_numbers(text: str) -> list[int]:
    """Of "0,2"; raises ZooError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    refuse("layers", [f"must be whole numbers as in 0,2, got {part!r}" for part in parts if not part.isdecimal()])
    return [int(part) for part in parts]


def _build(method: tuple[str, Mapping[str, Any]], size: Mapping[str, Any]) -> tuple[str, zoo.Attention]:
    """A method named for people and in eval mode; parameters are those of seed 0."""
    name, given = method
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = zoo.build(name, **size, **given).eval()
    untrained = any(True for _ in made.parameters())
    return settings({"name": name, **given}) + (" (untrained)" if untrained else ""), made


def plot(found: Climbed, path: Path) -> Path:
    """Kept mass and output error by layer and by noise time, a row a method, as PNG, SVG or PDF by the name's end."""
    from matplotlib.figure import Figure

    rows = len(found.methods)
    figure = Figure(figsize=(12, 3.2 * rows + 0.3), dpi=130, layout="constrained")
    lines = figure.subfigures(rows, 1, squeeze=False)[:, 0]
    for line, method in zip(lines, found.methods, strict=True):
        by_layer = {layer: found.figures(method, layer=layer) for layer in found.layers}
        by_time = {time: found.figures(method, time=time) for time in found.times}
        axes = line.subplots(1, 4)
        for i, key in enumerate(("mass", "error")):
            _draw(axes[2 * i], by_layer, key, "layer")
            _draw(axes[2 * i + 1], by_time, key, "noise time")
        title = f"{method}: {percent(found.figures(method)['method']['density'])} of pairs"
        line.suptitle(visible(title).replace("$", r"\$"), x=0.01, ha="left", fontsize=10, fontweight="bold")
        handles, labels = axes[0].get_legend_handles_labels()
        line.legend(handles[::-1], labels[::-1], loc="outside lower left", ncols=5, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _draw(axis: Any, series: Mapping[Any, Figures], key: str, by: str) -> None:
    """One figure of every rung against layer or time, and dense attention's."""
    from matplotlib.ticker import PercentFormatter

    places = list(series)
    axis.axhline(1 if key == "mass" else 0, color=QUIET, lw=1, label="dense")
    for rung in reversed(series[places[0]]):
        width, style = (2.4, "-") if rung == "method" else (1.4, "--")
        values = [found[rung][key] for found in series.values()]
        axis.plot(places, values, style, marker="o", ms=4, lw=width, color=COLOURS[rung], label=rung)
    axis.set_xlabel(by, fontsize=8)
    axis.set_title(f"{'softmax kept' if key == 'mass' else 'error of the output'}, by {by}", fontsize=9, loc="left")
    axis.set_xticks(places[:: -(-len(places) // 10)])
    axis.set_ylim(bottom=0, top=1.05 if key == "mass" else None)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _check_times(times: Sequence[float]) -> None:
    refuse("noise times", [f"must be above 0 and at most 1, got {x:g}" for x in times if not 0 < x <= 1])


def _table(title: str, by: str, rows: Sequence[tuple[str, str, Figures]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    several = len({method for method, _, _ in rows}) > 1
    if several:
        table.add_column("method", overflow="fold")
    table.add_column(by, no_wrap=True)
    for name in ("pairs", "kept", *RUNGS[1:], "error", *RUNGS[1:]):
        table.add_column(name, justify="right", no_wrap=True, style="bold" if name in ("kept", "error") else "")
    for method, label, found in rows:
        shares = [percent(found["method"]["density"])]
        shares += [percent(_figure_value(found, rung, key)) for key in ("mass", "error") for rung in RUNGS]
        table.add_row(*([escape(method)] if several else []), label, *(x.replace(" %", "") for x in shares))
    return table


def _figure_value(found: Mapping[str, Mapping[str, float]], rung: str, figure: str) -> float | None:
    value = found[rung][figure] if rung in found else math.nan
    return value if math.isfinite(value) else None
