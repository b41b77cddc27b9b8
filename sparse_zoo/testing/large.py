"""Checks of a kernel at sizes where no L × L table fits: against float64, in blocks of queries or at sampled tokens.

The conformance suite judges kernels on some hundred tokens. What only large plans reach is judged here: rectangles that
go to a vendor's kernel, whole tiles, row offsets past 2^31, chunks chosen on the device.

Tolerance, for out, dq, dk and dv: the error of a row is |got - want| ÷ max(|want|, the median row's |want|), with
Euclidean norms over the head dim. A kernel may err `oracle.EAGER` times as much as the worst row of plain masked
softmax in the inputs' dtype, plus one rounding of the result. For lse, a number a row, the error is |got - want|. Both
plain and float64 results are made here from the pieces and edges of the plan, not from its own masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_zoo.kernels import get
from sparse_zoo.kernels.base import Kernel
from sparse_zoo.kernels.triton import dense
from sparse_zoo.layout import Layout, Shot
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Part, Plan
from sparse_zoo.testing.oracle import EAGER

FILM = Layout.film([Shot(3, 16, 32, text=20), Shot(3, 16, 31, text=21), Shot(3, 15, 32), Shot(4, 16, 30, text=33)], 17)
"""6,475 tokens: shots of several tiles of 128, whose lengths no tile divides, with captions and without."""
BLOCK = 512
"""Queries of which all scores are held at once."""


@dataclass(frozen=True)
class Finding:
    """The largest error of one result, and how large it may be."""

    what: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is small enough; a NaN is not."""
        return self.error <= self.allowed  # not so for NaN

    def __str__(self) -> str:
        return f"{self.what} errs by {self.error:.1e}, allowed is {self.allowed:.1e}"


def failures(findings: list[Finding]) -> str:
    """One line of all that failed; empty where nothing did."""
    return "; ".join(str(finding) for finding in findings if not finding.passed)


class Inputs(NamedTuple):
    """q, grad (B, H, Lq, D) and k, v (B, Hk, Lk, D): what a kernel is given, and the gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor

    @staticmethod
    def random(
        length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str, seed: int
    ) -> Inputs:
        """Normal numbers, the same for the same device and seed."""
        draw = torch.Generator(device).manual_seed(seed)
        shapes = [(1, count, length, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
        return Inputs(*(torch.randn(shape, dtype=dtype, device=device, generator=draw) for shape in shapes))

    @property
    def scale(self) -> float:
        """The usual scale of scores, 1 / sqrt(D)."""
        return float(self.q.shape[-1] ** -0.5)


class Run(NamedTuple):
    """What a kernel gave: out (B, H, Lq, D), lse (B, H, Lq), and the gradients of q, k, v."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def run(kernel: Kernel | str, plan: Plan, given: Inputs) -> Run:
    """Forward and backward of a kernel, an object or a name."""
    kernel = get(kernel) if isinstance(kernel, str) else kernel
    q, k, v = (x.detach().requires_grad_() for x in given[:3])
    out, lse = kernel.run(q, k, v, plan, given.scale)
    return Run(out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), given.grad))


# -- the plan's meaning -----------------------------------------------------------------------------------------------


def seen(plan: Plan, item: int, head: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Whether each of some queries reads each of some keys: int64 (n,), (m,) -> bool (n, m)."""
    reads = torch.zeros(len(queries), len(keys), dtype=torch.bool, device=queries.device)
    for part in plan.parts:
        reads |= _seen(part, item, head, queries, keys)
    return reads


def added(plan: Plan, item: int, head: int, queries: Tensor, keys: Tensor) -> Tensor | float:
    """What log-weights add to the scaled scores of some pairs: float64 (n, m), or 0."""
    total: Tensor | float = 0.0
    for part in plan.parts:
        if part.log_weight is not None:
            seen_by = _seen(part, item, head, queries, keys)
            total = total + seen_by * _own(part.log_weight, item, head)[keys].double()
    return total


def _seen(part: Part, item: int, head: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Whether a part lets each of some queries read each of some keys: bool (n, m)."""
    of_query, of_key = _piece(part.queries, item, head)[queries], _piece(part.keys, item, head)[keys]
    there = (of_query >= 0)[:, None] & (of_key >= 0)
    edges = _own(part.edges, item, head)
    if not edges.numel():
        return torch.zeros_like(there)
    rows = edges[of_query.clamp(min=0)]
    if part.by_table:
        return rows[:, of_key.clamp(min=0)] & there
    reads = torch.zeros_like(there)
    for column in rows.unbind(-1):  # rather than (n, k, m) at once
        reads |= (column[:, None] == of_key) & there
    return reads


def _piece(pieces: Partition, item: int, head: int) -> Tensor:
    """The piece of each token, from lists and bounds: int64 (L,), -1 for none."""
    offsets = _own(pieces.offsets, item, head).long()
    place = torch.arange(int(offsets[0]), int(offsets[-1]), device=offsets.device)
    number = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff())
    tokens = place if pieces.order is None else _own(pieces.order, item, head).long()[place]
    found = torch.full((pieces.length,), -1, device=offsets.device)
    found[tokens] = number
    return found


def _own(table: Tensor, item: int, head: int) -> Tensor:
    """What a table (B|1, H|1, …) holds for a batch item and head."""
    return table[item if table.shape[0] > 1 else 0, head if table.shape[1] > 1 else 0]


class _Rows(NamedTuple):
    """Of n queries and m keys: out (n, D), lse (n,), dq (n, D); weights and gradients of scores (n, m)."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    weights: Tensor
    grad_scores: Tensor


def _rows(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, reads: Tensor, scale: float, more: Tensor | float = 0.0
) -> _Rows:
    """Plain masked softmax and its backward, in the dtype given: all the keys of some queries.

    `more` is added to the scaled scores.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.mT * scale + more).to(q.dtype).masked_fill(~reads, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)  # of queries without keys
    out = weights @ v
    delta = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    grad_scores = (weights.to(wide) * ((grad @ v.mT).to(wide) - delta)).to(q.dtype)
    return _Rows(out, scores.to(wide).logsumexp(-1), grad_scores @ k * scale, weights, grad_scores)


# -- comparing --------------------------------------------------------------------------------------------------------


def compare(what: str, got: Tensor, want: Tensor, plain: Tensor) -> Finding:
    """By the rule above: rows (…, D), or numbers where `what` is lse; `want` in float64."""
    dtype, got, plain = got.dtype, got.double(), plain.double()
    rounding = torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    if not got.numel():
        return Finding(what, 0.0, 0.0)
    if what == "lse":
        empty = want == -torch.inf
        if not bool((got[empty] == -torch.inf).all()):
            return Finding("lse of queries without keys", float("inf"), 0.0)
        got, want, plain = got[~empty], want[~empty], plain[~empty]
        if not got.numel():
            return Finding(what, 0.0, 0.0)
        error, usual, size = (got - want).abs(), (plain - want).abs(), want.abs().clamp(min=1)
        return Finding(what, _largest(error), EAGER * _largest(usual) + rounding * _largest(size))
    norm = want.norm(dim=-1)
    held = norm > 0
    size = norm.clamp(min=float(norm[held].median()) if bool(held.any()) else 1.0)
    error, usual = (got - want).norm(dim=-1) / size, (plain - want).norm(dim=-1) / size
    return Finding(what, _largest(error), EAGER * _largest(usual) + rounding)


def _largest(x: Tensor) -> float:
    return float(x.max())  # NaN where there is one


def check_whole(kernel: Kernel | str, plan: Plan, given: Inputs) -> list[Finding]:
    """out, lse, dq, dk and dv of a kernel, every row, against float64 in blocks of queries."""
    return judge_whole(run(kernel, plan, given), plan, given)


def _zeros(k: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Sums of dk and dv, in float32 or wider."""
    return [torch.zeros_like(k, dtype=torch.promote_types(dtype, torch.float32)) for _ in "kv"]


def judge_whole(got: Run, plan: Plan, given: Inputs) -> list[Finding]:
    """What `check_whole` finds of a run."""
    pairs: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {what: [] for what in Run._fields}
    batch, heads, length, _ = given.q.shape
    share = heads // given.k.shape[1]
    keys = torch.arange(given.k.shape[2], device=given.q.device)
    for item in range(batch):
        totals: dict[torch.dtype, list[Tensor]] = {}
        for head in range(heads):
            if head % share == 0:  # query heads that share keys add up
                totals = {dtype: _zeros(given.k[item, 0], dtype) for dtype in (torch.float64, given.q.dtype)}
            for queries in torch.arange(length, device=given.q.device).split(BLOCK):
                reads, more = seen(plan, item, head, queries, keys), added(plan, item, head, queries, keys)
                made: dict[torch.dtype, _Rows] = {}
                for dtype, (dk, dv) in totals.items():
                    q, grad = (x[item, head, queries].to(dtype) for x in (given.q, given.grad))
                    k, v = (x[item, head // share].to(dtype) for x in (given.k, given.v))
                    rows = made[dtype] = _rows(q, k, v, grad, reads, given.scale, more)
                    dk += rows.grad_scores.mT @ q * given.scale
                    dv += rows.weights.mT @ grad
                for what in ("out", "lse", "dq"):
                    ours = getattr(got, what)[item, head, queries]
                    want, plain = (getattr(made[dtype], what) for dtype in (torch.float64, given.q.dtype))
                    pairs[what].append((ours, want, plain))
            if head % share == share - 1:
                for i, what in enumerate(("dk", "dv")):
                    want, plain = (totals[dtype][i].to(dtype) for dtype in (torch.float64, given.q.dtype))
                    pairs[what].append((getattr(got, what)[item, head // share], want, plain))
    return [compare(what, *(torch.cat(parts) for parts in zip(*found, strict=True))) for what, found in pairs.items()]


class Sampled:
    """out, lse and dq at sampled queries and dk, dv at sampled keys of some heads, for plans of any size.

    The reference of the queries is made once, so that many runs on one plan can be judged by it. That of the keys takes
    the lse and out of the run, which its sampled queries vouch for: a key is read by queries all over the stream.
    """

    def __init__(self, plan: Plan, given: Inputs, *, tokens: int = 256, heads: int = 3, seed: int = 0) -> None:
        self.plan, self.given = plan, given
        draw = torch.Generator().manual_seed(seed)
        share = given.q.shape[1] // given.k.shape[1]

        def some(count: int, most: int) -> Tensor:
            return torch.randperm(count, generator=draw)[:most].sort().values

        # The first and last tokens are where tiles and offsets end.
        def ends(length: int) -> Tensor:
            found: Tensor = torch.cat([some(length, tokens), torch.tensor([0, length - 1])]).unique()
            return found.to(given.q.device)

        self.queries, self.keys = ends(given.q.shape[2]), ends(given.k.shape[2])
        # Of query heads that share keys all are needed for dk and dv; the last head is where offsets are largest.
        shared = torch.cat([some(given.k.shape[1], heads), torch.tensor([given.k.shape[1] - 1])]).unique().tolist()
        self.heads = [(item, head, share) for item in range(given.q.shape[0]) for head in shared[-heads:]]
        self.rows = [made for item, kv_head, _ in self.heads for made in self._queries(item, kv_head)]

    def _queries(self, item: int, kv_head: int) -> Iterator[tuple[tuple[int, int], dict[str, tuple[Tensor, Tensor]]]]:
        given = self.given
        every = torch.arange(given.k.shape[2], device=given.q.device)
        share = given.q.shape[1] // given.k.shape[1]
        for head in range(kv_head * share, (kv_head + 1) * share):
            reads = seen(self.plan, item, head, self.queries, every)
            more = added(self.plan, item, head, self.queries, every)
            made = []
            for dtype in (torch.float64, given.q.dtype):
                q, grad = (x[item, head, self.queries].to(dtype) for x in (given.q, given.grad))
                k, v = (x[item, kv_head].to(dtype) for x in (given.k, given.v))
                made.append(_rows(q, k, v, grad, reads, given.scale, more))
            yield (
                (item, head),
                {what: (getattr(made[0], what), getattr(made[1], what)) for what in ("out", "lse", "dq")},
            )

    def judge(self, got: Run) -> list[Finding]:
        """What is found of a run on this plan and these inputs."""
        found = []
        for what in ("out", "lse", "dq"):
            triples = [(getattr(got, what)[item, head, self.queries], *made[what]) for (item, head), made in self.rows]
            found.append(compare(what, *(torch.cat(parts) for parts in zip(*triples, strict=True))))
        triples_of: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"dk": [], "dv": []}
        for item, kv_head, share in self.heads:
            want, plain = (
                self._keys(got, item, kv_head, share, dtype) for dtype in (torch.float64, self.given.q.dtype)
            )
            for i, what in enumerate(triples_of):
                triples_of[what].append((getattr(got, what)[item, kv_head, self.keys], want[i], plain[i]))
        for what, triples in triples_of.items():
            found.append(compare(what, *(torch.cat(parts) for parts in zip(*triples, strict=True))))
        return found

    def _keys(self, got: Run, item: int, kv_head: int, share: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """dk and dv (m, D) of the sampled keys, in a dtype, over blocks of the queries of all heads that share them."""
        given, scale = self.given, self.given.scale
        wide = torch.promote_types(dtype, torch.float32)
        k, v = (x[item, kv_head, self.keys].to(dtype) for x in (given.k, given.v))
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for head in range(kv_head * share, (kv_head + 1) * share):
            for queries in torch.arange(given.q.shape[2], device=k.device).split(64 * BLOCK):
                reads = seen(self.plan, item, head, queries, self.keys)
                more = added(self.plan, item, head, queries, self.keys)
                q, grad, out = (x[item, head, queries].to(dtype) for x in (given.q, given.grad, got.out))
                lse = got.lse[item, head, queries].to(wide).nan_to_num(neginf=0.0)
                scores = (q @ k.mT * scale + more).to(wide).masked_fill(~reads, -torch.inf)
                weights = (scores - lse[:, None]).exp()
                delta = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
                grad_scores = (weights * ((grad @ v.mT).to(wide) - delta)).to(dtype)
                dk += grad_scores.mT @ q * scale
                dv += weights.to(dtype).mT @ grad
        return dk.to(dtype), dv.to(dtype)


def check_sampled(
    kernel: Kernel | str, plan: Plan, given: Inputs, *, tokens: int = 256, heads: int = 3
) -> list[Finding]:
    """out, lse and dq at sampled queries, dk and dv at sampled keys, against gathered float64; plans of any size."""
    return Sampled(plan, given, tokens=tokens, heads=heads).judge(run(kernel, plan, given))


# -- choosing chunks --------------------------------------------------------------------------------------------------

Choose = Callable[[Tensor, Tensor, Partition, Tensor, Tensor, int], Tensor]
"""What `sparse_zoo.routing.top_chunks` is."""


def check_choice(
    choose: Choose, q: Tensor, k: Tensor, chunks: Partition, legal: Tensor, kind: Tensor, top_k: int
) -> Finding:
    """The chunks that each query chooses, as sets, against scores in float64.

    The error is by how much the worst chosen chunk scores less than the best legal one that was left out; it may be as
    large as float32 scores err, twice. It is infinite for an illegal or repeated chunk, or a wrong number of them.
    """
    chosen = choose(q, k, chunks, legal, kind, top_k).long()
    exact, single = (
        chunks.mean(k.to(dtype)).repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT
        for dtype in (torch.float64, torch.float32)
    )
    worst = allowed = 0.0
    for rows in torch.arange(q.shape[2], device=q.device).split(16 * BLOCK):
        score = q[:, :, rows].double() @ exact
        allowed = max(allowed, 2 * _largest((q[:, :, rows].float() @ single - score).abs()))
        may = legal[kind[rows]].expand(score.shape)
        of_row = chosen[:, :, rows]
        number = torch.zeros(*score.shape[:-1], score.shape[-1] + 1, dtype=torch.int64, device=q.device)
        number.scatter_add_(-1, of_row + 1, torch.ones_like(of_row))
        number = number[..., 1:]
        wrong = (number > 1).any() | ((number > 0) & ~may).any()
        wrong |= (number.sum(-1) != may.sum(-1).clamp(max=top_k)).any()
        if bool(wrong):
            return Finding("choice", float("inf"), allowed)
        low = score.masked_fill(number == 0, torch.inf).amin(-1)
        high = score.masked_fill((number > 0) | ~may, -torch.inf).amax(-1)
        worst = max(worst, _largest(high - low))
    return Finding("choice", worst, allowed)


@contextmanager
def dense_from(pairs: int) -> Iterator[None]:
    """The `triton` kernel gives rectangles to the vendor's from this many pairs on, rather than from 2^20."""
    before, dense.PAIRS = dense.PAIRS, pairs
    try:
        yield
    finally:
        dense.PAIRS = before
