"""Figures of sparsity and FLOPs that two papers print, beside the same figures from plans of the papers' sizes.

Run `python -m experiments.tools.paper_ledger > docs/ledger.md` to write the page.
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
    f"The rule: a row agrees if |ours - theirs| / theirs is at most {TOLERANCE:.0%} by the plain definition. For a "
    "printed lower bound only a shortfall counts. Otherwise the readings are tried in the order listed. A reading is "
    "admitted to a table's quantity if it fits at least half of the rows that it applies to, and a row agrees under "
    "the first admitted reading that fits it. All other rows do not follow. The readings were found by searching for "
    "what fits: they show how a figure may have been counted, not how it was."
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
        """Return this case with some settings replaced or added."""
        return replace(self, settings=tuple({**dict(self.settings), **settings}.items()))


@dataclass(frozen=True)
class Figure:
    """A printed figure and its case. Sparsity is a share; `at_least`: printed as a lower bound."""

    table: str
    row: str
    quantity: Quantity
    theirs: float
    case: Case
    at_least: bool = False

    def off(self, value: float) -> float:
        """The distance of a value from the printed one, relative to the printed one."""
        lacks = self.theirs - value if self.at_least else abs(value - self.theirs)
        return max(lacks, 0.0) / self.theirs if self.theirs else (0.0 if value == 0 else math.inf)

    def fits(self, value: float) -> bool:
        """Whether a value is within `TOLERANCE` of the printed one."""
        return self.off(value) <= TOLERANCE


@dataclass(frozen=True)
class Reading:
    """Another way to count, for every figure of a paper: its value, or None where it says nothing."""

    name: str
    about: str
    value: Callable[[Figure], float | None]


@dataclass(frozen=True)
class Paper:
    """A paper: what is assumed about it, its printed figures, and the readings that are tried on them."""

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
        """The share of dense attention's pairs that the case computes."""
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
        "own chunk, not causal; Wan's k is not printed, and we assume the same 3.",
        "Chunks of a number of tokens are cut along the stream. The chosen chunks are random; one that is shorter than "
        "the others is chosen last.",
        "FLOPs are of one head of dimension 128 in one layer, with pooling and scoring.",
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
    """The number of rows of a table's quantity that a reading fits, of those that it applies to."""

    reading: str
    table: str
    quantity: str
    fits: int
    of: int

    @property
    def count(self) -> str:
        """How many rows the reading fits, in words: `3 of 4 rows`."""
        return f"{self.fits} of {self.of} rows"

    @property
    def admitted(self) -> bool:
        """Whether the reading fits at least half of the rows that it applies to."""
        return 2 * self.fits >= self.of


@dataclass(frozen=True)
class Row:
    """A printed figure and its verdict. `ours` is by the reading if one decides, else plain."""

    figure: Figure
    ours: float
    plain: float
    verdict: Verdict
    why: str
    reading: str | None = None

    def to_json(self, paper: str) -> dict[str, Any]:
        """Plain: the printed figure, ours, the verdict with its reason; "off" is None for an infinite deviation."""
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

    `readings` are those that apply to the figure, in order, with their values. `remark` is added to the reason if the
    figure does not follow.
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
        why += f"; reading {lucky[0].reading!r} fits this row, but only {lucky[0].count}"
    elif readings:
        fit, other = min(readings, key=lambda pair: figure.off(pair[1]))
        why += f"; nearest reading, {fit.reading!r}: {shown(figure, other)}"
    return Row(figure, value, value, "does not follow", why)


def needed(figure: Figure) -> str:
    """The density or keys per query that the printed figure needs, beside those of the plan."""
    found, theirs = count(figure.case), figure.theirs
    if figure.quantity == "tokens":
        return ""
    if figure.quantity == "PFLOPs":
        rest, dense = model_pflops(found.tokens, 0.0), model_pflops(found.tokens, 1.0)
        if theirs < rest:
            return f"printed is below the {rest:.2g} of everything except attention"
        return f"printed needs a density of {(theirs - rest) / (dense - rest):.1%}, the plan has {found.density:.1%}"
    if figure.quantity in ("FLOPs", "FLOPs by the printed formula"):
        keys = theirs / (4 * HEAD_DIM * found.tokens)
        return f"printed needs {keys:,.0f} keys a query, the plan has {found.pairs / found.tokens:,.0f}"
    if figure.quantity == "sparsity":
        return f"printed needs a density of {1 - theirs:.2%}, the plan has {found.density:.2%}"
    return f"printed needs a density of {1 / theirs:.2%}, the plan has {found.density:.2%}"


@dataclass(frozen=True)
class Ledger:
    """A paper's figures with verdicts, and how many rows each reading fits."""

    paper: Paper
    rows: tuple[Row, ...]
    fits: tuple[Fit, ...]

    @staticmethod
    def of(name: str, told: Callable[[str], None] = lambda _: None) -> Ledger:
        """Recompute a paper; `told` is called with the name of each figure."""
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
        """Return the number of rows with each verdict."""
        verdicts: tuple[Verdict, ...] = ("agrees", "agrees under a reading", "does not follow")
        return {verdict: sum(row.verdict == verdict for row in self.rows) for verdict in verdicts}

    def summary(self) -> str:
        """Return the number of rows with each verdict, in words."""
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
        """The assumptions and the readings."""
        readings = "; ".join(f"{reading.name!r}: {reading.about}" for reading in self.paper.readings)
        return [*self.paper.assumptions, f"Readings: {readings}."]

    def show(self, console: Console) -> None:
        """Print the tables to a terminal of 120 columns."""
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
        """The paper's section of docs/ledger.md."""
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


@dataclass(frozen=True)
class Speed:
    """A printed sparsity and the speedup printed beside it.

    Attributes:
        paper: Its name and number.
        source: Where the figures are printed.
        row: What was timed.
        sparsity: The share of pairs that is left out, or of FLOPs that is saved.
        times: The speedup over dense.
    """

    paper: str
    source: str
    row: str
    sparsity: float
    times: float

    @property
    def bound(self) -> float:
        """The largest speedup of attention that the sparsity allows; of a whole model it is smaller."""
        return 1 / (1 - self.sparsity)

    @property
    def verdict(self) -> str:
        """Within the bound, or above it by more than `TOLERANCE`: then something else made it faster."""
        return "within the bound" if self.times <= self.bound * (1 + TOLERANCE) else "exceeds the bound"


_LITE = ("LiteAttention, arXiv 2511.11062", "README of moonmath-ai/LiteAttention, commit 01b56b3")
SPEEDS = (
    Speed(*_LITE, "Wan2.1-14B, end to end, 1707 s -> 902 s", 0.42, 1707 / 902),
    Speed(*_LITE, "Wan2.2-14B, end to end, 1473 s -> 893 s", 0.32, 1473 / 893),
    Speed(*_LITE, "self-attention, 695 s -> 573 s", 0.21, 695 / 573),
    Speed(*_LITE, "self-attention, 695 s -> 418 s", 0.42, 695 / 418),
    Speed(*_LITE, "self-attention, 695 s -> 308 s", 0.57, 695 / 308),
    Speed(*_LITE, "self-attention, 695 s -> 163 s", 0.77, 695 / 163),
    Speed("SpargeAttention2, arXiv 2602.13515", "its abstract", "attention", 0.95, 16.2),
    Speed("SLA2, arXiv 2602.12675", "its abstract", "attention, quantization included", 0.97, 18.6),
    Speed("BSA, arXiv 2509.01085", "its abstract", "attention in training, 20 times fewer FLOPs", 0.95, 17.79),
    Speed("SLA, arXiv 2509.24006", "its abstract", "attention", 0.95, 13.7),
    Speed("SubBlock, sglang #34148", "its description", "denoising of MiniMax-H3, end to end", 0.75, 1.14),
)


def speeds() -> str:
    """The section on printed speedups."""
    rows = [
        f"| {x.paper} | {x.row} | {x.sparsity:.0%} | {x.times:.2f}× | {x.bound:.2f}× | {x.verdict} | {x.source} |"
        for x in SPEEDS
    ]
    return "\n".join([SPEEDS_INTRODUCTION, *rows, ""])


def page(ledgers: list[Ledger]) -> str:
    """The text of docs/ledger.md."""
    return "\n".join([INTRODUCTION, RULE, "", *(ledger.markdown() for ledger in ledgers)])


SPEEDS_INTRODUCTION = """## Printed speedups against what their sparsity allows

Attention that leaves out a share s of the pairs can be at most 1 / (1 - s) times as fast. A whole model gains less,
since only its attention is shortened. What exceeds the bound was made faster by something besides sparsity. No row was
measured here.

| paper | row | sparsity | speedup | bound | verdict | source |
|---|---|---|---|---|---|---|"""


INTRODUCTION = """# The papers' figures, recomputed

The papers of MoC and MoGA print figures of sparsity and FLOPs. This page puts each one beside ours, which is counted
from a plan that the method itself built at the paper's size, on random queries and keys.

| type | get |
|---|---|
| `zoo cost --paper moc` | the table of one paper |
| `python -m experiments.tools.paper_ledger > docs/ledger.md` | this page |

"plain" is our figure by the plain definition. A "reading" is another way to count that the paper may have used.
"""


if __name__ == "__main__":
    print(page([Ledger.of(name) for name in PAPERS]), speeds(), sep="\n", end="")
