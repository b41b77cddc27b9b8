"""The ladder against plain Python: pieces as lists of tokens, softmax by hand, and every choice there is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import pytest
import torch
from tiers import KINDS, cases, marks
from torch import Tensor

import sparse_zoo as zoo
from sparse_zoo import Branch, Call, Layout, Part, Plan, Shot, Term, ZooError
from sparse_zoo import ladder as module
from sparse_zoo.ladder import RUNGS, Ladder, chance, ladder, verdict

FILM = Layout.film([Shot(2, 2, 3, 2), Shot(1, 3, 2), Shot(3, 1, 2, 1), Shot(1, 1, 1, 1)], caption=2)
PACKED = Layout.pack([FILM, Layout.film([Shot(1, 2, 2, 1), Shot(2, 1, 3)])])
BATCH, HEADS, KV_HEADS, HEAD_DIM, DIM = 2, 2, 1, 4, 6
SOME = torch.tensor([30, 3, 8, 21, 14, 40])


class Mixed(zoo.Attention):
    """Shots choose frames beside themselves; pooled keys, pooled queries and a term come on top."""

    def branches(self, call: Call) -> list[Branch | Term]:
        shots, frames = call.layout.partition("shot"), call.layout.chunks("frame")
        means = frames.mean(call.k).repeat_interleave(HEADS // KV_HEADS, dim=1)
        wanted = (shots.mean(call.q) @ means.transpose(-1, -2) > 0.1) & (shots.sample[:, None] == frames.sample)
        k, v = shots.mean(call.k), shots.mean(call.v)
        return [
            Branch(Plan.blocks(shots, frames, wanted, routed=True) | Plan.within(shots), call.q.sigmoid()),
            Branch(Plan.groups(call.layout.sample, shots.sample), 0.5, k=k, v=v),
            Branch(
                Plan.groups(shots.sample),
                0.3,
                q=shots.mean(call.q),
                k=k,
                v=v,
                rows=shots.piece_of[0, 0].masked_fill(call.layout.shot < 0, -1),
            ),
            Term(0.1 * call.q, 7),
        ]


class Near(zoo.Attention):
    """Each token chooses the chunk before its own, an empty one, and its own, which causality leaves to no other."""

    causality = "routing"

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:  # noqa: ARG002
        chunks = layout.chunks("frame")
        own = chunks.piece_of[0, 0]
        before = (own - 1).masked_fill((own < 1) | (chunks.sample[own - 1] != chunks.sample[own]), -1)
        none = torch.full_like(own, chunks.count)
        with_empty = zoo.Partition.from_labels(own, chunks.count + 1, layout)
        return Plan.routed(with_empty, torch.stack([before, none, own], dim=-1)[None, None])


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, dict(zoo.get(name).small)) for name in zoo.names()},
    "moc, no anchors": ("moc", {"top_k": 2, "anchors": (), "causal": None}),
    "moc, no anchors, causal": ("moc", {"top_k": 2, "anchors": ()}),
    "moc, text apart": ("moc", {"top_k": 1, "causal": "strict", "text_reads": "text"}),
    "moc_fixed, bidirectional": ("moc_fixed", {"top_k": 2, "chunk_tokens": 5, "causal": None}),
    "moga, groups alone": ("moga", {"groups": 3, "mix": ("group",)}),
    "sol, text apart": ("sol", {"tau": 0.7, "block_tokens": 5, "text_reads": "text"}),
    "bsa, text apart": ("bsa", {"threshold": 0.63, "keep_queries": 0.4, "tile": (2, 2, 2), "text_reads": "text"}),
    "near": ("near", {}),
    "mixed": ("mixed", {}),
    "mixed, text apart": ("mixed", {"text_reads": "text"}),
}
FAST = (*KINDS, "moc, no anchors", "near", "mixed, text apart")


@pytest.fixture(autouse=True)
def _registered() -> None:
    zoo.register("mixed")(Mixed)
    zoo.register("near")(Near)


def method(case: str) -> zoo.Attention:
    name, settings = CASES[case]
    torch.manual_seed(1)
    return zoo.build(name, heads=HEADS, head_dim=HEAD_DIM, dim=DIM, **settings).eval().double()


def needs_all_queries(case: str) -> bool:
    return case.partition(",")[0] in ("near", "mixed") or method(case).pools_queries


def call_on(layout: Layout, rows: Tensor | None = None, **context: Any) -> Call:
    draws = torch.Generator().manual_seed(3)
    shapes = ((BATCH, HEADS), (BATCH, KV_HEADS), (BATCH, KV_HEADS), (BATCH,))
    q, k, v, hidden = (
        torch.randn(*shape, len(layout), size, generator=draws, dtype=torch.float64)
        for shape, size in zip(shapes, (HEAD_DIM, HEAD_DIM, HEAD_DIM, DIM), strict=True)
    )
    q = 2 * q if rows is None else 2 * q[:, :, rows]  # sharp enough for choices to matter
    return Call(q, k, v, layout, q_rows=rows, hidden=hidden, **context)


# -- the slow ladder ------------------------------------------------------------------------------------------------


@dataclass
class Pieces:
    """One part of one batch item and head: tokens of each piece, and which key pieces each query piece takes.

    `queries` are the tokens that read the output of a query of each piece, `computed` these queries.
    """

    queries: list[list[int]]
    computed: list[list[int]]
    keys: list[list[int]]
    taken: list[list[int]]
    routed: bool
    grouped: bool

    @staticmethod
    def of(part: Part, b: int, h: int, reads: list[int]) -> Pieces:
        def lists(pieces: zoo.Partition) -> list[list[int]]:
            own = pieces.piece_of.expand(BATCH, HEADS, -1)[b, h].tolist()
            return [[i for i, p in enumerate(own) if p == piece] for piece in range(pieces.count)]

        table = part.table.expand(BATCH, HEADS, -1, -1)[b, h].tolist()
        keys = lists(part.keys)
        taken = [[c for c, on in enumerate(row) if on and keys[c]] for row in table]
        computed = lists(part.queries)
        queries = [[i for i, read in enumerate(reads) if read in tokens] for tokens in computed]
        alone = part.edges.dtype != torch.bool and all(row in ([], [c]) for c, row in enumerate(taken))
        grouped = part.routed and alone and any(len(tokens) > 1 for tokens in computed)
        return Pieces(queries, computed, keys, taken, part.routed, grouped)

    def held(self, token: int) -> set[int]:
        """The keys of what a token reads."""
        return self._of(token, self.queries)

    def attended(self, query: int) -> set[int]:
        """The keys that a query is computed with."""
        return self._of(query, self.computed)

    def _of(self, query: int, pieces: list[list[int]]) -> set[int]:
        rows = [row for tokens, row in zip(pieces, self.taken, strict=True) if query in tokens]
        return {j for row in rows for c in row for j in self.keys[c]}


@dataclass
class Slow:
    """One batch item and head of a call."""

    attention: zoo.Attention
    call: Call
    b: int
    h: int
    softmax: Tensor = field(init=False)

    def __post_init__(self) -> None:
        call, layout = self.call, self.call.layout
        self.q, self.k, self.v = call.q[self.b, self.h], call.k[self.b, 0], call.v[self.b, 0]
        self.token = list(range(len(self.q))) if call.q_rows is None else call.q_rows.tolist()
        self.film = layout.sample.tolist()
        odds = (self.q @ self.k.T / math.sqrt(HEAD_DIM)).exp()
        for i, token in enumerate(self.token):
            odds[i, layout.sample != layout.sample[token]] = 0
        self.odds, self.softmax = odds, odds / odds.sum(-1, keepdim=True)
        ready = self.attention.ready(call)
        branches = [x for x in self.attention.branches(ready) if isinstance(x, Branch)]
        self.own = [x for x in branches if x.q is None and x.k is None]
        self.reads = [self.rows(branch) for branch in self.own]
        self.pooled = [self.others(branch, ready) for branch in self.own]
        plans = [self.attention.attended(branch, ready) for branch in self.own]
        self.plans = [
            [Pieces.of(part, self.b, self.h, reads) for part in plan.first_segment.parts]
            for plan, reads in zip(plans, self.reads, strict=True)
        ]
        out = self.attention.run(call).out[self.b, self.h]
        self.rest = out - self.summed(self.plans)

    def rows(self, branch: Branch) -> list[int]:
        """The query whose output each token reads, -1 for none."""
        every = list(range(len(self.q)))
        if branch.rows is None:
            return every
        rows = branch.rows.expand(BATCH, HEADS, -1)[self.b, self.h].tolist()
        if self.attention.text_reads == "method":
            return rows
        text = self.call.layout.is_text[self.token].tolist()
        return [-1 if text[i] and not text[rows[i]] else rows[i] for i in every]

    def others(self, branch: Branch, call: Call) -> tuple[Tensor, Tensor]:
        """Odds, 0 without a pair, and values of the pooled keys of a branch: (Lq, n), (n, D)."""
        odds, values = [self.q[:, :0]], [self.v[:0]]
        for segment in branch.segments:
            assert segment.k is not None
            assert segment.v is not None
            assert segment.log_weight is not None
            k = segment.k[self.b, 0]
            pairs = segment.plan.dense_mask().expand(BATCH, HEADS, -1, -1)[self.b, self.h]
            if self.attention.text_reads == "text":
                pairs = pairs & ~call.layout.is_text[self.token, None]
            weight = segment.log_weight.double().expand(BATCH, HEADS, -1)[self.b, self.h].exp()
            odds.append((self.q @ k.T / math.sqrt(HEAD_DIM)).exp() * weight * pairs)
            values.append(segment.v[self.b, 0])
        return torch.cat(odds, dim=1), torch.cat(values)

    def summed(self, plans: list[list[Pieces]]) -> Tensor:
        total = torch.zeros_like(self.q)
        for branch, parts, reads, (odds, v) in zip(self.own, plans, self.reads, self.pooled, strict=True):
            weight = torch.as_tensor(branch.weight).double().expand(BATCH, HEADS, len(self.q), HEAD_DIM)[self.b, self.h]
            for i, read in enumerate(reads):
                keys = sorted(set().union(*(part.attended(read) for part in parts))) if read >= 0 else []
                whole = float(self.odds[read, keys].sum() + odds[read].sum()) if read >= 0 else 0.0
                if whole:
                    total[i] += weight[i] * (self.odds[read, keys] @ self.v[keys] + odds[read] @ v) / whole
        return total

    def figures(self, plans: list[list[Pieces]]) -> dict[str, float]:
        mass = pairs = 0.0
        for i in range(len(self.q)):
            held = [set().union(*(part.held(i) for part in parts)) for parts in plans]
            pairs += sum(len(set().union(*(part.attended(i) for part in parts))) for parts in plans)
            mass += float(self.softmax[i, sorted(set().union(*held))].sum()) / len(self.q)
        dense = self.softmax @ self.v
        error = (self.rest + self.summed(plans) - dense).norm() / dense.norm()
        of_dense = sum(self.film.count(self.film[token]) for token in self.token)
        return {"mass": mass, "error": float(error), "pairs": pairs, "density": pairs / of_dense}

    def choices(self, part: Pieces, beside: list[Pieces], elsewhere: list[Pieces]) -> list[list[tuple[int, float]]]:
        """For each query piece the candidates, each with the mass it adds."""
        found = []
        for queries, taken in zip(part.queries, part.taken, strict=True):
            row = []
            for c, keys in enumerate(part.keys):
                left = any(
                    self.film[j] == self.film[self.token[i]] and all(j not in other.held(i) for other in beside)
                    for i in queries
                    for j in keys
                )
                if self.attention.causality is not None:
                    left = left and all(max(keys) < self.begin(part, i) for i in queries)
                new = sum(
                    float(self.softmax[i, j])
                    for i in queries
                    for j in keys
                    if all(j not in other.held(i) for other in beside + elsewhere)
                )
                if left or c in taken:
                    row.append((c, new))
            found.append(row)
        return found

    def begin(self, part: Pieces, i: int) -> int:
        return min([min(keys) for keys in part.keys if self.token[i] in keys] or [self.token[i]])

    def exchanged(self, by: str) -> list[list[Pieces]]:
        plans = [list(parts) for parts in self.plans]
        some = any(part.routed for parts in plans for part in parts)
        for parts in plans:
            elsewhere = [part for others in plans if others is not parts for part in others]
            for n, part in enumerate(parts):
                if some and not part.routed:
                    continue
                if part.grouped:
                    part = replace(
                        part,
                        keys=[[j] for j in range(len(self.k))],
                        taken=[[j for c in row for j in part.keys[c]] for row in part.taken],
                    )
                taken = []
                for row, queries, had in zip(
                    self.choices(part, parts[:n] + parts[n + 1 :], elsewhere), part.queries, part.taken, strict=True
                ):
                    if by == "pooled":
                        row = [(c, float(self.q[queries].mean(0) @ self.k[part.keys[c]].mean(0))) for c, _ in row]
                    taken.append([c for c, _ in sorted(row, key=lambda x: -x[1])[: len(had)]])
                parts[n] = replace(part, taken=taken, routed=False)
        return plans


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "rows"),
    [pytest.param(case, None, id=f"{case}-all queries", marks=marks(case, FAST)) for case in CASES]
    + [
        pytest.param(case, SOME, id=f"{case}-some queries", marks=marks(case, FAST))
        for case in CASES
        if not needs_all_queries(case)
    ],
)
def test_every_rung_is_the_slow_one(case: str, rows: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = method(case)
    monkeypatch.setattr(module, "BLOCK", 7 * BATCH * HEADS * len(PACKED))  # slices of 7 queries
    call = call_on(PACKED, rows)
    found = ladder(attention, call, draws=1).rungs
    for b in range(BATCH):
        for h in range(HEADS):
            slow = Slow(attention, call, b, h)
            routed = any(part.routed for parts in slow.plans for part in parts)
            assert list(found) == list(RUNGS if routed else RUNGS[:2])
            for name in ("method", "best", "pooled") if routed else ("method", "best"):
                plans = slow.plans if name == "method" else slow.exchanged(name)
                for key, value in slow.figures(plans).items():
                    assert float(getattr(found[name], key)[b, h]) == pytest.approx(value, abs=1e-9), (name, key)


# -- what must hold -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases(CASES, FAST))
def test_the_best_holds_at_least_what_any_other_rung_does(case: str) -> None:
    attention = method(case)
    rungs = ladder(attention, call_on(PACKED)).rungs
    best = rungs["best"].mass
    assert (best >= rungs["method"].mass - 1e-12).all()
    if "random" in rungs:
        assert (best >= rungs["pooled"].mass - 1e-12).all()
        assert (best >= rungs["random"].mass - 1e-12).all()
        assert (best > rungs["random"].mass).any()
    assert all((rung.mass <= 1 + 1e-12).all() and (rung.mass >= 0).all() for rung in rungs.values())


def test_no_set_of_as_many_pieces_holds_more() -> None:
    """Every set of two chunks of a film, for every query."""
    call = call_on(FILM)
    rungs = ladder(method("moc, no anchors"), call).rungs
    chunks = FILM.chunks("frame").piece_of[0, 0]
    softmax = (call.q @ call.k.expand_as(call.q).mT / math.sqrt(HEAD_DIM)).softmax(-1)
    each = torch.stack([softmax[..., chunks == c].sum(-1) for c in range(int(chunks.max()) + 1)])
    sets = torch.stack([each[a] + each[b] for a, b in combinations(range(len(each)), 2)])
    torch.testing.assert_close(rungs["best"].mass, sets.amax(0).mean(-1))
    assert (rungs["method"].mass < rungs["best"].mass).all()


def test_moc_is_the_pooled_choice() -> None:
    found = ladder(method("moc"), call_on(PACKED)).rungs
    for key in ("mass", "error", "pairs", "density"):
        assert torch.equal(getattr(found["method"], key), getattr(found["pooled"], key))


def test_dense_keeps_all() -> None:
    found = ladder(method("dense"), call_on(PACKED))
    for rung in found.rungs.values():
        torch.testing.assert_close(rung.mass, torch.ones_like(rung.mass))
        torch.testing.assert_close(rung.density, torch.ones_like(rung.density))
        assert rung.error.max() < 1e-12
    assert found.verdict() == "enough"
    assert found.means()["best"] == pytest.approx({"mass": 1, "error": 0, "density": 1}, abs=1e-12)


def test_random_is_every_candidate_alike() -> None:
    """The mean over many draws is that over all sets of two chunks; few draws are a mean too."""
    call = call_on(FILM)
    attention = method("moc, no anchors")
    chunks = FILM.chunks("frame")
    held = 2 / chunks.count  # of the mass, and of the keys
    many = ladder(attention, call, draws=300).rungs["random"]
    assert many.mass.mean().item() == pytest.approx(held, rel=0.02)
    assert many.density.mean().item() == pytest.approx(held, rel=0.02)
    one, again = (ladder(attention, call, draws=1).rungs["random"].mass for _ in range(2))
    assert torch.equal(one, again)
    for other in (replace(call, layer=1), replace(call, seed=1)):
        assert not torch.equal(one, ladder(attention, other, draws=1).rungs["random"].mass)
    assert not torch.equal(one, ladder(attention, call, draws=2).rungs["random"].mass)


def test_rungs_may_be_left_out() -> None:
    call = call_on(FILM)
    attention = method("moc, no anchors")
    few = ladder(attention, call, rungs=("method", "best"))
    assert list(few.rungs) == ["method", "best"]
    for name, rung in few.rungs.items():
        assert torch.equal(rung.error, ladder(attention, call, draws=1).rungs[name].error)
    with pytest.raises(ZooError, match="unknown rung 'pool'; did you mean 'pooled'"):
        ladder(attention, call, rungs=("pool",))


def test_keys_of_which_the_largest_leave_nothing_still_give_an_output() -> None:
    """The chosen chunks lie e^-200 below the own shot, which no float32 holds; among themselves they are attended."""
    call = call_on(FILM)
    bias = torch.nn.functional.one_hot(FILM.shot.clamp(min=0), 4).double() * 25
    q, k = (torch.cat([x, bias.expand(*x.shape[:2], -1, -1)], dim=-1) for x in (call.q, call.k))
    v = torch.nn.functional.pad(call.v, (0, 4))
    attention = zoo.build("moc", heads=HEADS, head_dim=8, top_k=2, anchors=(), causal="routing")
    for dtype in (torch.float32, torch.float64):
        given = Call(q.to(dtype), k.to(dtype), v.to(dtype), FILM)
        rung = ladder(attention, given).rungs["method"]
        dense = zoo.build("dense", heads=HEADS, head_dim=8).run(given).out
        error = (attention.run(given).out - dense).square().sum((2, 3)) / dense.square().sum((2, 3))
        torch.testing.assert_close(rung.error, error.sqrt().double(), rtol=1e-5, atol=0)
    assert rung.mass.max() < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    attention, call = method("moc, no anchors"), call_on(PACKED)
    half = Call(call.q.to(dtype), call.k.to(dtype), call.v.to(dtype), PACKED)
    exact = Call(half.q.double(), half.k.double(), half.v.double(), PACKED)
    got, want = (ladder(attention, x).means() for x in (half, exact))
    with torch.autocast("cpu", torch.bfloat16):  # the method may choose otherwise then, what is measured may not change
        cast = ladder(attention, half).means()
    for name in ("method", "best", "pooled"):
        assert got[name] == pytest.approx(want[name], rel=1e-4), name
        assert name == "method" or cast[name] == got[name]


def test_a_schedule_is_judged_by_the_phase_of_the_call() -> None:
    settings: dict[str, Any] = {"heads": HEADS, "head_dim": HEAD_DIM, "dim": DIM}
    scheduled = zoo.build("moga", schedule={"name": {5: "dense"}}, **settings).eval().double()
    assert ladder(scheduled, call_on(FILM, step=5)).verdict() == "enough"
    early = ladder(scheduled, call_on(FILM, step=4))
    assert set(early.rungs) == set(RUNGS)
    apart = zoo.build("dense", schedule={"text_reads": {5: "text"}}, **settings)
    kept = [ladder(apart, call_on(FILM, step=step)).means()["method"]["mass"] for step in (4, 5)]
    assert kept[0] == pytest.approx(1)
    assert kept[1] < 0.99
    with pytest.raises(ZooError, match="draws must be at least 1, got 0"):
        ladder(scheduled, call_on(FILM), draws=0)


def test_verdicts() -> None:
    assert verdict({"method": 0.95, "best": 0.99}) == "enough"
    assert verdict({"method": 0.4, "best": 0.61}) == "router"
    assert verdict({"method": 0.4, "best": 0.59}) == "budget"
    assert verdict({"method": 0.7, "best": 0.7}) == "budget"
    assert chance({"method": 0.31, "best": 0.8, "random": 0.3})
    assert not chance({"method": 0.4, "best": 0.8, "random": 0.3})
    assert not chance({"method": 0.4, "best": 0.8})


def test_a_router_that_is_wrong_and_a_budget_that_is_small() -> None:
    """Every token looks for the last shot of its colour. Told to look for the other colour, the router is wrong."""
    film = Layout.film([Shot(1, 2, 2) for _ in range(6)])
    colour = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 0, 1, 2]), 4).double()[film.shot]

    class Led(zoo.Attention):
        """Each query takes the chunk of the shot that it is sent to."""

        def __init__(self, *, to: list[int], **base: Any) -> None:
            super().__init__(**base)
            self.to_shot = torch.tensor(to)

        def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:  # noqa: ARG002
            return Plan.routed(layout.partition("shot"), self.to_shot[layout.shot].expand(1, 1, 1, -1).mT)

    def found(to: list[int], sharp: float) -> Ladder:
        q = (sharp * colour).expand(1, 1, -1, -1)
        return ladder(Led(heads=1, head_dim=4, to=to), Call(q, colour.expand_as(q), colour.expand_as(q), film))

    right, wrong = [3, 4, 5, 0, 1, 2], [4, 5, 3, 1, 2, 0]
    assert found(wrong, 20).verdict() == "router"
    assert found(right, 20).verdict() == "budget"  # half of it lies in the own shot
    assert found(wrong, 20).means()["method"]["mass"] < 0.01
    assert found(right, 20).means()["method"]["mass"] == pytest.approx(0.5, abs=0.01)
