"""Checks of the plans: what a method says before any kernel runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sparse_zoo.attention import Attention, Branch, Call
from sparse_zoo.errors import ZooError
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Part, Plan
from sparse_zoo.testing import oracle
from sparse_zoo.testing.subject import CASES, FILMS, LONG, PACKED, STORY, Case, Subject, make, usable
from sparse_zoo.testing.suite import Checks, expect, fail, same, some

checks: Checks[Subject] = Checks()

T = TypeVar("T")


def plans(attention: Attention, call: Call) -> list[Plan]:
    """The plan of each key set of each branch."""
    return [segment.plan for branch in branches(attention, call) for segment in branch.key_sets]


def branches(attention: Attention, call: Call) -> list[Branch]:
    """The branches that have a plan."""
    return [branch for branch in oracle.routed(attention, call)[1] if isinstance(branch, Branch)]


def everywhere(subject: Subject, *, grad: bool = False) -> Iterator[tuple[str, Attention, Call]]:
    """The method, and a call of it, on each film and in each case, with the name of either."""
    attention = subject.build()
    for film, layout in FILMS.items():
        yield film, attention, make(layout, grad=grad)
    for name, case in CASES.items():
        yield name, subject.build_for(case), case.call(grad=grad)


@checks
def builds(subject: Subject) -> None:
    """The method is made from its settings, is an Attention, and computes something of the shape of q."""
    attention, call = subject.build(), make(STORY)
    expect(isinstance(attention, Attention), "a subclass of sparse_zoo.Attention", f"{subject.cls!r}", "its base class")
    out = attention.run(call).out
    expect(
        out.shape == call.q.shape and out.dtype == call.q.dtype,
        f"an output of shape {tuple(call.q.shape)}, {call.q.dtype}",
        f"{tuple(out.shape)}, {out.dtype}",
        "the weights or terms of its branches",
    )


@checks
def plans_in_range(subject: Subject) -> None:
    """Pieces list tokens of the stream, each at most once; edges name pieces that exist; sizes fit batch and heads."""
    for film, attention, call in everywhere(subject):
        items, count = call.q.shape[:2]
        for plan in plans(attention, call):
            for number, part in enumerate(plan.parts):
                reasons = _out_of_range(part)
                expect(not reasons, "indices in range", f"part {number} on {film}: {'; '.join(reasons)}", "its indices")
            batch, heads = plan.batch_heads
            expect(
                batch in (1, items) and heads in (1, count),
                f"a plan for {items} or 1 batch items and {count} or 1 heads",
                f"{batch} and {heads}",
                "the leading sizes of its labels, tables or indices",
            )


def _out_of_range(part: Part) -> list[str]:
    reasons = []
    for side, pieces in (("queries", part.queries), ("keys", part.keys)):
        reasons += [f"{side}: {reason}" for reason in _bad_pieces(pieces)]
    if part.edges.dtype != torch.bool and part.edges.numel():
        low, high = int(part.edges.min()), int(part.edges.max())
        if low < -1 or high >= part.keys.count:
            reasons.append(f"edges {low} … {high}, allowed are -1 … {part.keys.count - 1}")
    return reasons


def _bad_pieces(pieces: Partition) -> list[str]:
    offsets = pieces.offsets.long()
    held = pieces.length if pieces.order is None else pieces.order.shape[-1]
    if bool((offsets.diff(dim=-1) < 0).any()) or int(offsets.min()) < 0 or int(offsets.max()) > held:
        return [f"offsets leave 0 … {held} or go back"]
    if pieces.order is not None and pieces.order.numel():
        low, high = int(pieces.order.min()), int(pieces.order.max())
        if low < 0 or high >= pieces.length:
            return [f"tokens {low} … {high}, allowed are 0 … {pieces.length - 1}"]
    listed = oracle.members(pieces).sum(2)
    return [f"a token is in several pieces {some(listed > 1)}"] if bool((listed > 1).any()) else []


@checks
def plans_disjoint(subject: Subject) -> None:
    """No pair of a query and a key is held twice by a branch's plan."""
    for film, attention, call in everywhere(subject):
        for plan in plans(attention, call):
            held = oracle.times_held(plan)
            twice = held.sum(0) > 1
            if bool(twice.any()):
                item, head, i, j = (int(x) for x in twice.nonzero()[0])
                named = [
                    text
                    for number, part in enumerate(plan.parts)
                    for text in _rectangles_with(part, number, item, head, i, j)
                ]
                fail(
                    "each pair in one rectangle",
                    f"{int(twice.sum())} pairs held twice on {film}, first query {i} × key {j}"
                    f" (batch item {item}, head {head}), by {' and '.join(named)}",
                    "join plans with `|`, and name no key piece twice for one query piece",
                )


def _rectangles_with(part: Part, number: int, item: int, head: int, i: int, j: int) -> list[str]:
    """The rectangles of a part that hold a pair, in words, as often as they do."""

    def tokens(pieces: Partition, piece: int) -> str:
        listed = _of(oracle.members(pieces), item, head)[piece].nonzero()[:, 0].tolist()
        return f"{listed[0]}…{listed[-1]}" if listed[-1] - listed[0] + 1 == len(listed) > 2 else f"{listed}"

    queries, keys = (_of(oracle.members(pieces), item, head) for pieces in (part.queries, part.keys))
    edges = _of(oracle.edge_counts(part), item, head)
    found = []
    for a in queries[:, i].nonzero()[:, 0].tolist():
        for b in keys[:, j].nonzero()[:, 0].tolist():
            found += [f"part {number}'s queries {tokens(part.queries, a)} × keys {tokens(part.keys, b)}"] * int(
                edges[a, b]
            )
    return found


def _of(x: Tensor, item: int, head: int) -> Tensor:
    """One batch item and head of a table that may be shared."""
    return x[item if x.shape[0] > 1 else 0, head if x.shape[1] > 1 else 0]


@checks
def no_query_without_key(subject: Subject) -> None:
    """Every query has a key in each branch; with `may_be_empty`, one without has output 0 and passes no gradient."""
    for film, attention, call in everywhere(subject, grad=True):
        masks = [oracle.masks(attention, call, branch) for branch in branches(attention, call) if branch.rows is None]
        if not masks:
            continue
        empty = [~mask.any(-1).expand(call.q.shape[:3]) for mask in masks]
        if not attention.may_be_empty:
            for rows in empty:
                expect(
                    ~rows.any(),
                    "a key for every query",
                    f"none {some(rows)} (batch item, head, query) on {film}",
                    "what it attends to at least, such as the own chunk; or declare may_be_empty = True",
                )
            continue
        nothing = torch.stack(empty).all(0)
        out = attention.run(call).out
        (grad,) = torch.autograd.grad(out.sum(), call.q)
        for what, x in (("output", out), ("gradient of q", grad)):
            left = (x.detach() != 0).any(-1) & nothing
            expect(~left.any(), f"{what} 0 for a query without keys on {film}", f"not 0 {some(left)}", "its branches")


@checks
def pairs_counted(subject: Subject) -> None:
    """Reported pairs, density and FLOPs are those of the branches' masks; kernels execute no fewer."""
    for film, attention, call in everywhere(subject):
        layout, (batch, heads) = call.layout, call.q.shape[:2]
        with torch.no_grad():
            result, (_, made) = attention.run(call), oracle.routed(attention, call)
        masks = [oracle.masks(attention, call, branch) for branch in made if isinstance(branch, Branch)]
        pairs = sum(int(mask.expand(batch, heads, -1, -1).sum()) for mask in masks)
        dense = batch * heads * sum(len(film) ** 2 for film in layout.films)
        cost, dim = result.cost(), result.out.shape[-1]
        pooled = any(plan.shape != (len(layout), len(layout)) for plan in result.plans)
        terms = sum(x.flops for x in made if not isinstance(x, Branch))
        wanted: dict[str, float] = {
            "pairs": pairs,
            "flops": 4 * pairs * dim + terms,
            "flops_backward": 10 * pairs * dim + 2 * terms,
        }
        wanted |= {} if pooled else {"density": pairs / dense}
        for name, want in wanted.items():
            got = getattr(cost, name)
            expect(got == want, f"{name} {want} on {film}", f"{got}", "Result.plans must hold the plan of each branch")
        expect(
            isinstance(cost.routing_flops, int) and cost.routing_flops >= 0,
            "routing_flops a whole number of at least 0",
            f"{cost.routing_flops!r}",
            "routing_flops(call)",
        )
        for name, *_ in usable():
            executed = sum(plan.executed(name, batch=batch, heads=heads) for plan in result.plans)
            expect(executed >= pairs, f"kernel {name} to execute {pairs} pairs or more", f"{executed}", "executed()")


@checks
def plans_ignore_values(subject: Subject) -> None:
    """With other values v the plans stay the same, in training too; with `reads_values` they do not."""
    differ = False
    calls = [(subject.build(), make(STORY)), *((subject.build_for(case), case.call()) for case in CASES.values())]
    for attention, call in calls:
        v = torch.randn(call.v.shape, generator=torch.Generator().manual_seed(17), dtype=call.v.dtype)
        for training in (False, True):
            attention.train(training)
            pairs = zip(plans(attention, call), plans(attention, replace(call, v=3 * v)), strict=True)
            changed = [oracle.mask_of(mine) != oracle.mask_of(other) for mine, other in pairs]
            differ = differ or any(bool(x.any()) for x in changed)
            for wrong in [] if attention.reads_values else changed:
                expect(
                    ~wrong.any(),
                    "the same plans with other values",
                    f"others {some(wrong)} (batch item, head, query, key)",
                    "choose by q, k and hidden; or say in reads_values why v decides",
                )
    declared = attention.reads_values
    expect(differ or not declared, f"plans that depend on v: {declared}", "the same ones", "reads_values = None")


@checks
def routing_is_counted(subject: Subject) -> None:
    """`routing_flops` is at least half, and no more than twice, what torch counts while branches are made."""
    for case in (COUNTED, CASES["many films, items and heads"]):
        attention, call = subject.build_for(case), case.call()
        with torch.no_grad():
            assert call.hidden is not None
            hidden = call.hidden
            features, before, _ = _counted(lambda: attention.features(hidden))  # noqa: B023
            routed = replace(call, features=features)
            made, inside, touched = _counted(lambda: attention.branches(routed))  # noqa: B023
        terms = sum(x.flops for x in made if not isinstance(x, Branch))
        declared = attention.routing_flops(routed) + terms
        # Features may hold gates besides what decides: they count where nothing else was multiplied.
        least, most = (inside or before) / 2, 2 * (before + inside) + touched
        expect(
            least <= declared <= most,
            f"routing_flops, with the FLOPs of terms, between {least:.4g} and {most:.4g}",
            f"{declared:.4g}",
            "routing_flops(call): 2 FLOPs for a product and a sum, over batch items, query heads, queries and pieces",
        )


COUNTED = Case(LONG, batch=2, heads=4, kv_heads=2, head_dim=64)


class _Touched(TorchDispatchMode):
    """Counts the numbers that operations other than views make or read."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            held = [x for x in (*args, out) if isinstance(x, Tensor) and x.is_floating_point()]
            self.numbers += max((x.numel() for x in held), default=0)
        return out


def _counted(make: Callable[[], T]) -> tuple[T, int, int]:
    """What a function gives, the FLOPs of its matrix products, and how many numbers its operations went over."""
    with FlopCounterMode(display=False) as flops, _Touched() as touched:
        made = make()
    return made, flops.get_total_flops(), touched.numbers


@checks
def some_queries(subject: Subject) -> None:
    """Given some queries of the stream (`q_rows`), each gets what it gets among all; `pools_queries` refuses them."""
    calls = [(subject.build(), make(layout, step=3)) for layout in (STORY, PACKED)]
    calls += [(subject.build_for(case), case.call()) for case in CASES.values()]
    for attention, whole in calls:
        layout, (batch, heads) = whole.layout, whole.q.shape[:2]
        rows = torch.randperm(len(layout))[:11]
        some_rows = replace(whole, q=whole.q[:, :, rows], q_rows=rows)
        if attention.pools_queries:
            try:
                attention.run(some_rows)
            except ZooError:
                continue
            fail(
                "a ZooError for q_rows, as pools_queries says", "an output", "pools_queries = False, if it serves them"
            )
        part, change = (
            attention.run(some_rows),
            "branches(call) must take queries at call.q_rows: kinds, labels, weights",
        )
        same(part.out, attention.run(whole).out[:, :, rows], 1e-9, "outputs of some queries and among all", change)
        lengths = torch.tensor([len(film) for film in layout.films])
        dense = batch * heads * int(lengths[layout.sample[rows]].sum())
        came = part.cost().dense_pairs
        expect(came == dense, f"{dense} dense pairs for these queries", f"{came}", "Result must hold call.q_rows")


@checks
def text_reads_text(subject: Subject) -> None:
    """With text_reads="text", text attends to the text of its film that it may see, and to nothing else."""
    attention, usual = subject.build({"text_reads": "text"}), subject.build({"text_reads": "method"})
    for layout in (STORY, PACKED):
        call = make(layout)
        result, before = attention.run(call), usual.run(call)
        among = oracle.readable_text(attention, layout)
        kinds = branches(attention, call)
        for branch, plan, other in zip(kinds, result.plans, before.plans, strict=True):
            if branch.k is not None or branch.rows is not None:
                continue  # no tokens on both sides: the outputs below tell
            plan, other = plan.first_segment, other.first_segment
            mask = oracle.mask_of(plan)
            text, video = mask[:, :, layout.is_text], mask[:, :, ~layout.is_text]
            wrong = text != among[layout.is_text]
            expect(~wrong.any(), "text to attend to the text of its film", f"otherwise {some(wrong)}", "run(call)")
            wrong = video != oracle.mask_of(other)[:, :, ~layout.is_text]
            expect(~wrong.any(), "video to attend as before", f"otherwise {some(wrong)}", "run(call)")
        same(
            result.out,
            oracle.plain(attention, call),
            1e-9,
            "outputs with text_reads='text' and the oracle",
            "run(call) must attend with the plans that it reports",
        )
        other_video = attention.run(replace(call, v=torch.where(layout.is_text[:, None], call.v, call.v + 1)))
        same(
            other_video.out[:, :, layout.is_text],
            result.out[:, :, layout.is_text],
            0.0,
            "outputs of text when values of video change",
            "terms and pooled branches may not bring video to text",
        )
