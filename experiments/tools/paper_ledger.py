"""What two papers print of sparsity and FLOPs, beside the same figures from plans of the papers' sizes.

`python -m experiments.tools.paper_ledger` writes docs/ledger.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import sparse_zoo as zoo
from sparse_zoo.methods.moga import MoGA
from sparse_zoo.simulate import shape_only

TOLERANCE = 0.02
RULE = (
    f"The rule: a row agrees where |ours - theirs| / theirs, of the printed figure, is at most {TOLERANCE:.0%} by the "
    "plain definition (of a printed lower bound, only what lacks counts). Failing that, the readings are tried in the "
    "order listed: one is admitted to a table's quantity if it fits at least half of the rows that it bears on, and a "
    "row agrees under the first admitted reading that fits it. All else does not follow. The readings were found by "
    "looking for what fits: they show how a figure may have been counted, not how it was."
)
Quantity = Literal["sparsity", "FLOPs", "FLOPs by the printed formula", "dense ÷ sparse FLOPs", "PFLOPs", "tokens"]
Verdict = Literal["agrees", "agrees under a reading", "does not follow"]

HEAD_DIM = 128  # MoC's printed example; its FLOPs are of one head and layer
PRINTED_CHUNKS = 36  # C of MoC's printed example
SIMULATED_DIM = 16  # channels of the random q and k: routing needs no more
WAN_DIM, WAN_DEPTH, WAN_LINEAR, WAN_PARAMETERS = 1536, 30, 1.3e9, 1.42e9
FRAME = (30, 52)  # Wan at 480 × 832


@dataclass(frozen=True)
class Case:
    """A method on a layout."""

    method: str
    settings: tuple[tuple[str, Any], ...]
    layout: zoo.Layout

    def but(self, **settings: Any) -> Case:
        return replace(self, settings=tuple({**dict(self.settings), **settings}.items()))


@dataclass(frozen=True)
class Figure:
    """A printed figure and the case that it is of. Sparsity is a share; `at_least`: printed as a lower bound."""

    table: str
    row: str
    quantity: Quantity
    theirs: float
    case: Case
    at_least: bool = False

    def off(self, value: float) -> float:
        """How far a value is from the printed one, relative to it."""
        lacks = self.theirs - value if self.at_least else abs(value - self.theirs)
        return max(lacks, 0.0) / self.theirs if self.theirs else (0.0 if value == 0 else math.inf)

    def fits(self, value: float) -> bool:
        return self.off(value) <= TOLERANCE


@dataclass(frozen=True)
class Reading:
    """Another way to count, for every figure of a paper: its value, or None where it says nothing."""

    name: str
    about: str
    value: Callable[[Figure], float | None]


@dataclass(frozen=True)
class Paper:
    name: str
    title: str
    assumptions: tuple[str, ...]
    figures: tuple[Figure, ...]
    readings: tuple[Reading, ...]


# -- counting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """Of one head and one sample: pairs of all branches, those of dense attention, routing FLOPs at `HEAD_DIM`."""

    tokens: int
    pairs: int
    dense: int
    routing: int

    @property
    def density(self) -> float:
        return self.pairs / self.dense


@cache
@torch.no_grad()
def count(case: Case) -> Count:
    """Build the case's plans on random values and count them.

    Routing is drawn at random but for two rules: MoC chooses a chunk that is shorter than the others last, and MoGA's
    groups are balanced (its router is the identity on normal noise, one channel a group).
    """
    settings, layout = dict(case.settings), case.layout
    dim = settings.get("groups", 1)
    attention = zoo.build(case.method, heads=1, head_dim=SIMULATED_DIM, dim=dim, **settings)
    draws = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, len(layout), SIMULATED_DIM, generator=draws)
    features = None
    if case.method == "moc":
        chunks = layout.chunks(settings["chunk"], tokens=settings.get("chunk_tokens"))
        short = chunks.sizes[0, 0] < chunks.sizes.max()
        q[..., 0], k[..., 0] = 1, torch.where(short[chunks.piece_of[0, 0]], -100.0, 0.0)
    if isinstance(attention, MoGA):
        attention.router.weight.copy_(torch.eye(dim))
        attention.router.bias.zero_()
        features = attention.features(torch.randn(1, len(layout), dim, generator=draws))
    branches = attention.branches(zoo.Call(q, k, k, layout, features=features))
    segments = [segment for branch in branches if isinstance(branch, zoo.Branch) for segment in branch.key_sets]
    pairs = sum(int(segment.plan.pairs.sum()) for segment in segments)
    routing = attention.routing_flops(shape_only(layout, 1, 1, HEAD_DIM, WAN_DIM))
    return Count(len(layout), pairs, layout.dense_pairs, routing)


def plain(figure: Figure) -> float:
    """The figure by the plain definition."""
    case = figure.case
    if figure.quantity == "tokens":
        return len(case.layout)
    if figure.quantity == "sparsity":
        return 1 - count(case).density
    if figure.quantity == "PFLOPs":
        return model_pflops(len(case.layout), count(case).density)
    if figure.quantity == "FLOPs by the printed formula":
        found = count(case)
        return HEAD_DIM * (found.tokens + 2 * found.tokens * PRINTED_CHUNKS + 4 * found.pairs)
    if figure.quantity == "dense ÷ sparse FLOPs":
        return 4 * HEAD_DIM * count(case).dense / head_flops(case)
    return head_flops(case)


def head_flops(case: Case, per_pair: int = 4) -> float:
    """Routing and attention of one head, forward."""
    return per_pair * HEAD_DIM * count(case).pairs + count(case).routing


def model_pflops(tokens: int, density: float) -> float:
    """One forward of Wan 1.3B: attention at this density, and a multiply and an add per parameter and token."""
    return (4 * tokens**2 * WAN_DIM * WAN_DEPTH * density + 2 * WAN_LINEAR * tokens) / 1e15


# -- MoC --------------------------------------------------------------------------------------------------------------


def _film(shots: int, captions: int = 0) -> zoo.Layout:
    return zoo.Layout.film([zoo.Shot(25, 30, 30, captions)] * shots, captions)


MULTI = _film(8)
SINGLE = zoo.Layout.film([zoo.Shot(7, 30, 30)])
WAN_CLIP = zoo.Layout.film([zoo.Shot(21, *FRAME)])


def _dense(layout: zoo.Layout) -> Case:
    return Case("dense", (), layout)


def _moc(layout: zoo.Layout, **settings: Any) -> Case:
    return Case("moc", tuple(settings.items()), layout)


def _single(chunk: int, top_k: int) -> Case:
    settings = {"chunk": "fixed", "chunk_tokens": chunk, "anchors": ("text", "chunk"), "causal": None}
    return _moc(SINGLE, top_k=top_k, **settings)


FINAL = _moc(MULTI, top_k=5, chunk="fixed", chunk_tokens=1280, anchors=("text", "shot"), causal="routing")
EXAMPLE = _moc(MULTI, top_k=5, chunk="fixed", chunk_tokens=1024, anchors=(), causal=None)
WAN_MOC = _moc(WAN_CLIP, top_k=3, chunk="frame", anchors=("text", "chunk"), causal=None)
SINGLE_MOC = _single(256, 3)


def _both(table: str, row: str, sparsity: float, flops: float, case: Case) -> tuple[Figure, Figure]:
    return Figure(table, row, "sparsity", sparsity, case), Figure(table, row, "FLOPs", flops, case)


MOC_FIGURES = (
    Figure("headline", "pairs pruned", "sparsity", 0.85, FINAL),
    Figure("headline", "fewer attention FLOPs, more than", "dense ÷ sparse FLOPs", 7, FINAL, at_least=True),
    Figure("headline", "dense", "FLOPs", 1.7e13, _dense(MULTI)),
    Figure("headline", "MoC", "FLOPs", 2.3e12, FINAL),
    Figure("printed example", "m 1024, k 5, C 36, d 128", "FLOPs by the printed formula", 2.32e12, EXAMPLE),
    *_both("multi-shot", "LCT dense", 0, 1.7e13, _dense(MULTI)),
    *_both("multi-shot", "MoC", 0.85, 2.3e12, FINAL),
    *_both("single-shot", "dense", 0, 1.9e10, _dense(SINGLE)),
    *_both("single-shot", "MoC", 0.83, 4.1e9, SINGLE_MOC),
    Figure("Wan 1.3B", "dense", "sparsity", 0, _dense(WAN_CLIP)),
    Figure("Wan 1.3B", "MoC, chunk 1560", "sparsity", 0.81, WAN_MOC),
    *_both("chunk length", "chunk 64, k 3", 0.96, 1.2e9, _single(64, 3)),
    *_both("chunk length", "chunk 128, k 3", 0.92, 1.7e9, _single(128, 3)),
    *_both("chunk length", "chunk 256, k 3", 0.83, 4.1e9, _single(256, 3)),
    *_both("chunk length", "chunk 512, k 3", 0.68, 6.6e9, _single(512, 3)),
    *_both("chunk length", "chunk 1024, k 3", 0.35, 1.3e10, _single(1024, 3)),
    *_both("top-k", "chunk 256, k 1", 0.92, 2.1e9, _single(256, 1)),
    *_both("top-k", "chunk 256, k 2", 0.88, 3.1e9, _single(256, 2)),
    *_both("top-k", "chunk 256, k 4", 0.80, 5.2e9, _single(256, 4)),
    *_both("top-k", "chunk 256, k 5", 0.76, 6.2e9, _single(256, 5)),
    *_both("top-k", "chunk 256, k 6", 0.72, 7.2e9, _single(256, 6)),
)


def _of_case(change: Callable[[Case], Case | None]) -> Callable[[Figure], float | None]:
    """A reading that changes the case alone."""

    def value(figure: Figure) -> float | None:
        case = change(figure.case)
        return None if case is None else plain(replace(figure, case=case))

    return value


def _with_captions(case: Case) -> Case | None:
    return replace(case, layout=_film(8, captions=128)) if case.layout == MULTI else None


def _printed_chunks(case: Case) -> Case | None:
    if case.layout != MULTI or case.method == "dense" or case == EXAMPLE:
        return None
    return case.but(top_k=5, chunk_tokens=len(MULTI) // PRINTED_CHUNKS, anchors=(), causal=None)


def _without_anchors(case: Case) -> Case | None:
    return None if case.method == "dense" else case.but(anchors=(), causal=None)


def _five(figure: Figure) -> float | None:
    return head_flops(figure.case, per_pair=5) if figure.quantity == "FLOPs" else None


MOC = Paper(
    "moc",
    "Mixture of Contexts, arXiv 2508.21058",
    (
        "Multi-shot: 8 shots of 25 latent frames of 30 × 30 tokens, 180,000 in all (printed: about 180k, 22k a shot).",
        "Single-shot: 7 latent frames of 30 × 30, 6,300 tokens (about 6.3k). Wan: 21 frames of 30 × 52 = 1,560.",
        "Text is not in the count (its length is not printed).",
        "Final multi-shot setting: chunk 1280, k 5, anchors text and own shot, causal. Single-shot: anchors text and "
        "own chunk, not causal; Wan's k is not printed and taken to be its 3.",
        "Chunks of a number of tokens are cut along the stream. Which are chosen is drawn at random, one that is "
        "shorter than the others last of all.",
        "FLOPs are of one head of dimension 128 in one layer, pooling and scoring included.",
    ),
    MOC_FIGURES,
    (
        Reading("captions", "captions are counted, nine of 128 tokens", _of_case(_with_captions)),
        Reading(
            "printed C",
            "chunks of L / C tokens, C = 36 as in the printed example, k 5, no anchors (not offered to the example "
            "itself, which prints its m)",
            _of_case(_printed_chunks),
        ),
        Reading("no anchors", "anchors are not counted", _of_case(_without_anchors)),
        Reading("five FLOPs", "five FLOPs per pair and channel, not four", _five),
    ),
)


# -- MoGA -------------------------------------------------------------------------------------------------------------

SHOTS = 4
FRAMES = {5: 21, 10: 40, 15: 60, 20: 80, 30: 120}
PRINTED_PFLOPS = {
    "full": {5: 0.28, 10: 0.88, 15: 1.85, 20: 3.19, 30: 6.94},
    "M 5": {5: 0.093, 10: 0.34, 15: 0.67, 20: 1.09, 30: 2.26},
    "M 10": {5: 0.065, 10: 0.25, 15: 0.48, 20: 0.78, 30: 1.56},
    "M 20": {5: 0.051, 10: 0.21, 15: 0.39, 20: 0.61, 30: 1.22},
}
GROUPS_QUANTITIES: tuple[Quantity, Quantity] = ("sparsity", "PFLOPs")
PRINTED_GROUPS = {1: (0, 0.88), 2: (0.4125, 0.59), 4: (0.6625, 0.42), 8: (0.7875, 0.36), 16: (0.8125, 0.35)}


def _clip(frames: int, rows: int = FRAME[0], cols: int = FRAME[1]) -> zoo.Layout:
    """Shots as even as whole frames allow."""
    sizes = [frames // SHOTS + (i < frames % SHOTS) for i in range(SHOTS)]
    return zoo.Layout.film([zoo.Shot(size, rows, cols) for size in sizes])


def _moga(groups: int, layout: zoo.Layout, windows: int = 2) -> Case:
    if groups == 1:
        return _dense(layout)  # one group: full attention, as printed with sparsity 0
    return Case("moga", (("groups", groups), ("windows", (windows, windows))), layout)


def _groups(row: str) -> int:
    return 1 if row == "full" else int(row.removeprefix("M "))


def _nothing_borrowed(case: Case) -> float:
    """The density without keys from adjacent shots: local branches as if each shot were a film of its own."""
    film = case.layout.films[0]
    alone = zoo.Layout.pack([zoo.Layout.film([shot]) for shot in film.shots])
    routed = count(case.but(mix=("group",)))
    local = count(replace(case, layout=alone).but(mix=("stga", "frame")))
    return (routed.pairs + local.pairs) / routed.dense


def _unborrowed(figure: Figure) -> float | None:
    if figure.case.method == "dense" or figure.quantity == "tokens":
        return None
    density = _nothing_borrowed(figure.case)
    return 1 - density if figure.quantity == "sparsity" else model_pflops(len(figure.case.layout), density)


def _whole_model(figure: Figure) -> float | None:
    if figure.case.method == "dense" or figure.quantity != "PFLOPs":
        return None
    tokens = len(figure.case.layout)
    density = _nothing_borrowed(replace(figure.case, layout=_clip(FRAMES[10])))
    return model_pflops(tokens, 1.0) * density + WAN_PARAMETERS * tokens / 1e15


MOGA = Paper(
    "moga",
    "Mixture-of-Groups Attention, arXiv 2510.18692",
    (
        "Wan 1.3B at 480 × 832: 30 × 52 = 1,560 tokens a latent frame, which is four frames at 16 fps. 5 s: its own 81 "
        "frames, 21 latent; 10 to 30 s: 4 latent frames a second, 187,200 tokens at 30 s (printed: 187k).",
        "Four equal shots in every clip (not printed; the sparsity at 10 s is 1 - 1/M - 1/16 - 1/40, which four shots "
        "of four windows and 40 frames give). MMDiT: 361 latent frames of 40 × 40 tokens.",
        "Text is not in the stream. Groups are balanced. Pairs are summed over the three branches.",
        "PFLOPs are of one forward of the model: 4 · pairs · 1536 · 30 for attention, 2 · 1.3e9 a token for the rest.",
    ),
    (
        Figure("headline", "30 s, M 5", "sparsity", 0.7125, _moga(5, _clip(120))),
        Figure("headline", "30 s, full", "PFLOPs", 6.94, _dense(_clip(120))),
        Figure("headline", "30 s, M 5", "PFLOPs", 2.26, _moga(5, _clip(120))),
        *(
            Figure("durations", f"{row}, {seconds} s", "PFLOPs", theirs, _moga(_groups(row), _clip(FRAMES[seconds])))
            for row, figures in PRINTED_PFLOPS.items()
            for seconds, theirs in figures.items()
        ),
        *(
            Figure("groups, 10 s", f"M {groups}", quantity, theirs, _moga(groups, _clip(40)))
            for groups, printed in PRINTED_GROUPS.items()
            for quantity, theirs in zip(GROUPS_QUANTITIES, printed, strict=True)
        ),
        Figure("MMDiT", "M 20, 1441 frames", "tokens", 578e3, _moga(20, _clip(361, 40, 40), windows=4)),
    ),
    (
        Reading("nothing borrowed", "keys that STGA borrows from adjacent shots are not counted", _unborrowed),
        Reading(
            "whole model",
            "the whole model's FLOPs, not attention's, times the density at 10 s with nothing borrowed, and one FLOP "
            "per parameter (1.42e9) and token",
            _whole_model,
        ),
    ),
)

PAPERS: Mapping[str, Paper] = {paper.name: paper for paper in (MOC, MOGA)}


# -- judging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """How many rows of a table's quantity a reading fits, of those that it speaks of."""

    reading: str
    table: str
    quantity: str
    fits: int
    of: int

    @property
    def count(self) -> str:
        return f"{self.fits} of {self.of} rows"

    @property
    def admitted(self) -> bool:
        return 2 * self.fits >= self.of


@dataclass(frozen=True)
class Row:
    """A printed figure judged. `ours` is by the reading where one decides, else plain."""

    figure: Figure
    ours: float
    plain: float
    verdict: Verdict
    why: str
    reading: str | None = None

    def to_json(self, paper: str) -> dict[str, Any]:
        figure = self.figure
        return {
            "paper": paper,
            "table": figure.table,
            "row": figure.row,
            "quantity": figure.quantity,
            "theirs": figure.theirs,
            "ours": self.ours,
            "verdict": self.verdict,
            "why": self.why,
            "plain": self.plain,
            "off": figure.off(self.ours) if math.isfinite(figure.off(self.ours)) else None,
            "reading": self.reading,
            "tokens": len(figure.case.layout),
            "density": count(figure.case).density,
        }


def judge(figure: Figure, value: float, readings: list[tuple[Fit, float]], remark: str = "") -> Row:
    """The rule: by the plain value, else by the first admitted reading that fits, else not.

    `readings`: those that speak of the figure, in order, with their values; `remark` is for figures that do not follow.
    """
    by_plain = f"plain: {shown(figure, value)}, off by {_percent(figure.off(value))}"
    if figure.fits(value):
        return Row(figure, value, value, "agrees", by_plain)
    for fit, other in readings:
        if fit.admitted and figure.fits(other):
            why = f"reading {fit.reading!r} fits {fit.count}; {by_plain}"
            return Row(figure, other, value, "agrees under a reading", why, fit.reading)
    why = "; ".join(filter(None, (by_plain, remark)))
    lucky = [fit for fit, other in readings if figure.fits(other)]
    if lucky:
        why += f"; reading {lucky[0].reading!r} would fit, but fits only {lucky[0].count}"
    elif readings:
        fit, other = min(readings, key=lambda pair: figure.off(pair[1]))
        why += f"; nearest reading, {fit.reading!r}: {shown(figure, other)}"
    return Row(figure, value, value, "does not follow", why)


def needed(figure: Figure) -> str:
    """What the printed figure would take, beside what the plan holds."""
    found, theirs = count(figure.case), figure.theirs
    if figure.quantity == "tokens":
        return ""
    if figure.quantity == "PFLOPs":
        rest, dense = model_pflops(found.tokens, 0.0), model_pflops(found.tokens, 1.0)
        if theirs < rest:
            return f"printed is less than the {rest:.2g} of all but attention"
        return f"printed takes a density of {(theirs - rest) / (dense - rest):.1%}, the plan has {found.density:.1%}"
    if figure.quantity in ("FLOPs", "FLOPs by the printed formula"):
        keys = theirs / (4 * HEAD_DIM * found.tokens)
        return f"printed takes {keys:,.0f} keys a query, the plan has {found.pairs / found.tokens:,.0f}"
    if figure.quantity == "sparsity":
        return f"printed takes a density of {1 - theirs:.2%}, the plan has {found.density:.2%}"
    return f"printed takes a density of {1 / theirs:.2%}, the plan has {found.density:.2%}"


@dataclass(frozen=True)
class Ledger:
    """A paper's figures, judged, and how each reading fared."""

    paper: Paper
    rows: tuple[Row, ...]
    fits: tuple[Fit, ...]

    @staticmethod
    def of(name: str, told: Callable[[str], None] = lambda _: None) -> Ledger:
        """Recompute a paper; `told` hears of each figure."""
        paper = PAPERS[name]
        values: dict[Figure, list[float | None]] = {}
        for figure in paper.figures:
            values[figure] = [plain(figure), *(reading.value(figure) for reading in paper.readings)]
            told(f"{figure.table}: {figure.row}")
        fits: dict[tuple[int, str, str], Fit] = {}
        for i, reading in enumerate(paper.readings):
            for table, quantity in dict.fromkeys((figure.table, figure.quantity) for figure in paper.figures):
                said = [
                    figure.fits(value)
                    for figure, (_, *others) in values.items()
                    if (figure.table, figure.quantity) == (table, quantity) and (value := others[i]) is not None
                ]
                if said:
                    fits[i, table, quantity] = Fit(reading.name, table, quantity, sum(said), len(said))
        rows = []
        for figure, (value, *others) in values.items():
            assert value is not None
            said_here = [
                (fits[i, figure.table, figure.quantity], other) for i, other in enumerate(others) if other is not None
            ]
            rows.append(judge(figure, value, said_here, needed(figure)))
        return Ledger(paper, tuple(rows), tuple(fits.values()))

    def tally(self) -> dict[Verdict, int]:
        verdicts: tuple[Verdict, ...] = ("agrees", "agrees under a reading", "does not follow")
        return {verdict: sum(row.verdict == verdict for row in self.rows) for verdict in verdicts}

    def summary(self) -> str:
        agree, under, not_at_all = self.tally().values()
        return f"{agree} agree, {under} under a reading, {not_at_all} do not follow"

    def to_json(self) -> dict[str, Any]:
        """{"paper", "title", "rule", "tolerance", "assumptions", "rows", "readings", "fits", "summary"}."""
        return {
            "paper": self.paper.name,
            "title": self.paper.title,
            "rule": RULE,
            "tolerance": TOLERANCE,
            "assumptions": list(self.paper.assumptions),
            "rows": [row.to_json(self.paper.name) for row in self.rows],
            "readings": [{"name": reading.name, "about": reading.about} for reading in self.paper.readings],
            "fits": [{**asdict(fit), "admitted": fit.admitted} for fit in self.fits],
            "summary": dict(self.tally()),
        }

    def notes(self) -> list[str]:
        """What was assumed, and the readings."""
        readings = "; ".join(f"{reading.name!r}: {reading.about}" for reading in self.paper.readings)
        return [*self.paper.assumptions, f"Readings: {readings}."]

    def show(self, console: Console) -> None:
        """For a terminal of 120 columns."""
        console.print(f"[bold]{self.paper.title}[/bold]")
        for line in self.notes():
            console.print(f"[dim]- {line}[/dim]")
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for name in ("row", "quantity", "theirs", "ours", "verdict", "why"):
            table.add_column(name, justify="right" if name in ("theirs", "ours") else "left", overflow="fold")
        for name in dict.fromkeys(row.figure.table for row in self.rows):
            table.add_section()
            table.add_row(f"[bold]{name}[/bold]")
            for row in self.rows:
                figure = row.figure
                if figure.table == name:
                    verdict = f"[{COLOURS[row.verdict]}]{row.verdict}[/{COLOURS[row.verdict]}]"
                    figures = shown(figure, figure.theirs), shown(figure, row.ours)
                    table.add_row(figure.row, figure.quantity, *figures, verdict, row.why)
        console.print(table)
        tried = Table(
            "reading", "table", "quantity", "fits", title="readings tried", box=box.SIMPLE_HEAD, pad_edge=False
        )
        for fit in self.fits:
            tried.add_row(fit.reading, fit.table, fit.quantity, f"{fit.count}")
        console.print(tried)
        console.print(f"[dim]{RULE}[/dim]")
        console.print(f"[bold]{self.summary()}[/bold]")

    def markdown(self) -> str:
        """For the page."""
        lines = [f"## {self.paper.title}", "", f"`zoo cost --paper {self.paper.name}`: {self.summary()}.", ""]
        lines += [f"- {line}" for line in self.notes()]
        lines += ["", "| table | row | quantity | theirs | ours | verdict | why |", "|---|---|---|---|---|---|---|"]
        for row in self.rows:
            figure = row.figure
            figures = shown(figure, figure.theirs), shown(figure, row.ours)
            cells = (figure.table, figure.row, figure.quantity, *figures, row.verdict, row.why)
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", "| reading tried | table | quantity | fits |", "|---|---|---|---|"]
        lines += [f"| {fit.reading} | {fit.table} | {fit.quantity} | {fit.count} |" for fit in self.fits]
        return "\n".join([*lines, ""])


COLOURS: Mapping[Verdict, str] = {"agrees": "green", "agrees under a reading": "yellow", "does not follow": "red"}


def shown(figure: Figure, value: float) -> str:
    """A value of this figure's quantity, as people read it."""
    if figure.quantity == "sparsity":
        return f"{100 * value:.4g} %"
    if figure.quantity == "PFLOPs":
        return f"{value:.3g}"
    if figure.quantity == "dense ÷ sparse FLOPs":
        return f"{value:.3g}×"
    if figure.quantity == "tokens":
        return f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else "all of it"


def page(ledgers: list[Ledger]) -> str:
    """docs/ledger.md."""
    return "\n".join([INTRODUCTION, RULE, "", *(ledger.markdown() for ledger in ledgers)])


INTRODUCTION = """# The papers' figures, recomputed

Every figure of sparsity or FLOPs that the two papers print, beside ours: each is counted from a plan that the method
itself built at the paper's size, on random queries and keys.
Written by `python -m experiments.tools.paper_ledger > docs/ledger.md`.
"""


if __name__ == "__main__":
    print(page([Ledger.of(name) for name in PAPERS]), end="")
