"""What a method costs beside dense attention at a real size: the bill behind `zoo cost METHOD`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

import sparse_zoo as zoo
from experiments.analysis.formatting import si
from lit_modules.flops import Flops, ModelShape, caption_flops, inner, linear_flops
from sparse_zoo.errors import refuse
from sparse_zoo.peak_memory import peak_bytes
from sparse_zoo.simulate import Simulated, simulate

NOTES = (
    "Routing is simulated with random q, k and hidden, and parameters as initialised: which chunks or groups a token "
    "gets is random; how many pairs that makes is exact where chunks are of one length and groups are balanced.",
    "FLOPs: a multiply and an add are two. Attention 4 and 10 · pairs · head_dim, forward and backward; linear layers "
    "2 · rows · in · out and twice that backward. Routing has no backward. Norms, activations and softmax are not "
    "counted.",
    "Bytes: q, k, v and the output of one layer in bfloat16, and the index tables of the layer's plan as held.",
)
PEAK_NOTE = (
    "Peak on a GPU: what one layer's attention holds at once with kernel triton, q, k, v and the output among it. "
    "Counted without a GPU; on an H200 it was within 3 %."
)


@dataclass(frozen=True)
class Films:
    """The layout, in tokens: a film of equal shots, each with `text` tokens of caption; `caption` for the film."""

    shots: int
    frames: int
    rows: int
    cols: int
    text: int = 0
    caption: int = 0

    def __post_init__(self) -> None:
        refuse(
            "layout",
            [f"{name} must be at least 1, got {x}" for name, x in asdict(self).items() if name in GRID and x < 1]
            + [f"{name} must be at least 0, got {x}" for name, x in asdict(self).items() if name not in GRID and x < 0],
        )

    def layout(self) -> zoo.Layout:
        """Return the layout of one film: `shots` equal shots and the film's caption."""
        return zoo.Layout.film([zoo.Shot(self.frames, self.rows, self.cols, self.text)] * self.shots, self.caption)


GRID = ("shots", "frames", "rows", "cols")


@dataclass(frozen=True)
class Bill:
    """One method: `attention`, of one layer; the rest of the whole model, every layer in it."""

    attention: Simulated
    routing: Flops
    attending: Flops
    captions: Flops
    linear: Flops
    tensor_bytes: int
    peak: Mapping[str, int] | None

    @property
    def model(self) -> Flops:
        """FLOPs of the whole model: routing, attention, captions and linear layers of every layer."""
        return self.routing + self.attending + self.captions + self.linear

    def to_json(self) -> dict[str, Any]:
        """{"pairs", "density", "branch_pairs", "executed_pairs", "flops": by pass, "bytes": {"qkvo", "plan", "peak"}}.

        "peak" is null where it was not asked for, else {"forward", "forward_backward"}.
        """
        cost = self.attention.cost
        parts = ("routing", "attending", "captions", "linear", "model")
        flops: dict[str, Flops] = {name: getattr(self, name) for name in parts}
        return {
            "pairs": cost.pairs,
            "density": cost.density,
            "branch_pairs": list(self.attention.branch_pairs),
            "executed_pairs": self.attention.executed,
            "flops": {
                "forward": {name.replace("attending", "attention"): part.forward for name, part in flops.items()},
                "forward_backward": {name.replace("attending", "attention"): part.both for name, part in flops.items()},
            },
            "bytes": {
                "qkvo": self.tensor_bytes,
                "plan": self.attention.plan_bytes,
                "peak": self.peak and {name.replace("+", "_"): held for name, held in self.peak.items()},
            },
        }


@dataclass(frozen=True)
class Comparison:
    """A method's bill beside that of dense attention, in the same model on the same film."""

    method: str
    settings: Mapping[str, Any]
    films: Films
    shape: ModelShape
    batch: int
    kernel: str
    tokens: int
    dense: Bill
    ours: Bill
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """{"method", "settings", "layout", "model", "kernel", "simulated", "dense": bill, "cost": bill, "notes"}."""
        batch, heads = self.ours.attention.simulated
        return {
            "method": self.method,
            "settings": dict(self.settings),
            "layout": {**asdict(self.films), "tokens": self.tokens},
            "model": {**asdict(self.shape), "batch": self.batch},
            "kernel": self.kernel,
            "simulated": {"batch": batch, "heads": heads},
            "dense": self.dense.to_json(),
            "cost": self.ours.to_json(),
            "notes": list(self.notes),
        }

    def table(self) -> Table:
        """For a terminal: dense, the method, and how many times less it takes."""
        title = f"{self.method} on {self.tokens:,} tokens"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        table.add_column("")
        for name in ("dense", self.method, "dense ÷ it"):
            table.add_column(name, justify="right", no_wrap=True)
        dense, ours = self.dense, self.ours

        def row(name: str, one: float, other: float, unit: str = "") -> None:
            table.add_row(name, si(one, unit), si(other, unit), f"{one / other:.2f}×" if one and other else "–")

        def section(name: str) -> None:
            table.add_section()
            table.add_row(f"[bold]{name}[/bold]")

        section("attention of one layer")
        row("  pairs", dense.attention.cost.pairs, ours.attention.cost.pairs)
        table.add_row("  density", *(f"{100 * bill.attention.cost.density:.2f} %" for bill in (dense, ours)), "")
        row(
            f"  pairs that kernel {self.kernel} multiplies", dense.attention.executed or 0, ours.attention.executed or 0
        )
        row("  q, k, v, out", dense.tensor_bytes, ours.tensor_bytes, "B")
        table.add_row("  index tables of the plan", *(si(bill.attention.plan_bytes, "B") for bill in (dense, ours)), "")
        if dense.peak and ours.peak:
            for which in dense.peak:
                row(f"  peak on a GPU, {which.replace('+', ' and ')}", dense.peak[which], ours.peak[which], "B")
        for name, which in (("forward", "forward"), ("forward and backward", "both")):
            section(f"whole model, {name}")
            for label, part in PARTS.items():
                one, other = (getattr(getattr(bill, part), which) for bill in (dense, ours))
                if one or other or part == "routing":
                    row(f"  {label}", one, other, "FLOP")
        return table


PARTS = {
    "routing": "routing",
    "attention": "attending",
    "attention to captions": "captions",
    "linear layers": "linear",
    "in all": "model",
}


def compare(
    method: str,
    settings: Mapping[str, Any],
    films: Films,
    shape: ModelShape,
    *,
    batch: int = 1,
    kernel: str = "torch",
    every_head: bool = False,
    memory: bool = False,
) -> Comparison:
    """Simulate the method and dense attention, with `memory` also on a GPU that is not there.

    Raises:
        ZooError: For sizes and settings that cannot be, and where memory cannot be counted.
    """
    refuse("batch", [f"must be at least 1, got {batch}"] if batch < 1 else [])
    layout = films.layout()

    def peak(name: str, given: Mapping[str, Any]) -> Mapping[str, int]:
        heads, head_dim = shape.heads, shape.head_dim
        attention = zoo.build(name, heads=heads, head_dim=head_dim, dim=shape.dim, kernel="triton", **given)
        return peak_bytes(attention, inner(shape, layout), heads, head_dim, batch=batch)

    def bill(name: str, given: Mapping[str, Any]) -> Bill:
        stream = inner(shape, layout)
        found = simulate(
            name,
            stream,
            heads=shape.heads,
            head_dim=shape.head_dim,
            dim=shape.dim,
            batch=batch,
            settings=given,
            every_head=every_head,
            kernel=kernel,
        )
        cost, terms = found.cost, found.term_flops
        return Bill(
            attention=found,
            routing=Flops(shape.depth * cost.routing_flops, 0),
            attending=Flops(shape.depth * (cost.flops + terms), shape.depth * (cost.flops_backward + 2 * terms)),
            captions=caption_flops(shape, layout, batch),
            linear=linear_flops(shape, layout, batch),
            tensor_bytes=4 * 2 * batch * len(stream) * shape.dim,
            peak=peak(name, given) if memory else None,
        )

    dense, ours = bill("dense", {}), bill(method, settings)
    notes = (*NOTES, PEAK_NOTE) if memory else NOTES
    tokens = len(inner(shape, layout))
    return Comparison(method, settings, films, shape, batch, kernel, tokens, dense, ours, notes)
