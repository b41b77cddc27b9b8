"""Gather rectangles, run a dense engine on each, merge by log-sum-exp. One file; engines differ only in the dense step.

The backward needs no partial results: for a softmax over a disjoint union of key sets, the gradients through one set
are those of dense attention on it with the union's output and log-sum-exp in place of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding

from sparse_zoo.kernels.base import Kernel, plus
from sparse_zoo.kernels.rectangles import Cost, Rectangles, alike, rectangles, slabs
from sparse_zoo.plan import Part, Plan

SLAB_BYTES = 64 << 20
BATCH_BYTES = 12 << 20
LEAST_BYTES = 4 << 20
WAITING_BYTES = 2 << 20
LEAST_QUERIES = 768
PAIRS_OF_A_CALL = 1 << 16
"""Padded pairs that cost about what one more call of the CPU engine costs, 0.2 ms."""


Gather = Callable[[Tensor], Tensor]
"""Numbers of rows, int64 or int32 of any shape (...) -> those rows (..., D)."""


Weigh = Callable[[Tensor, Tensor], Tensor]
"""Groups and key tokens, which broadcast -> the log-weights of these keys, float32 or wider."""


@dataclass(frozen=True)
class Rows:
    """Where the tokens of one (batch item, head) lie in tensors flattened to (rows, D)."""

    heads: int
    kv_heads: int
    queries: int
    keys: int

    def of_queries(self, group: Tensor, token: Tensor) -> Tensor:
        """The flattened rows of query tokens, for groups b · heads + h."""
        return group * self.queries + token

    def of_keys(self, group: Tensor, token: Tensor) -> Tensor:
        """The flattened rows of key tokens, for groups b · heads + h; several heads may share a key head."""
        item, head = torch.div(group, self.heads, rounding_mode="floor"), group % self.heads
        return (
            item * self.kv_heads + torch.div(head * self.kv_heads, self.heads, rounding_mode="floor")
        ) * self.keys + token

    def weigh(self, part: Part) -> Weigh | None:
        """What the keys of a part weigh, None where it has no log-weights."""
        given = part.log_weight
        if given is None:
            return None
        wide = given.to(torch.promote_types(given.dtype, torch.float32))
        apart = [int(size > 1) for size in given.shape[:2]]
        return lambda group, token: wide[
            torch.div(group, self.heads, rounding_mode="floor") * apart[0], group % self.heads * apart[1], token.long()
        ]


class Grouped(Kernel, ABC):
    """A kernel made of a dense engine on gathered rectangles."""

    cost: Cost = staticmethod(alike)
    """Which rectangles suit the engine."""
    weighs_keys = True

    def run(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
        """Run the engine on the rectangles of all parts and merge what it yields; lse has no gradient."""
        out, lse = _Sum.apply(q, k, v, self, scale, (plan,), 1.0)
        return out, lse

    def run_sum(
        self, q: Tensor, k: Tensor, v: Tensor, plans: Sequence[Plan], weights: Sequence[Tensor | float], scale: float
    ) -> Tensor:
        """Sum over the plans in one autograd node, whose gradients share memory; without gradients, plan by plan."""
        if not torch.is_grad_enabled():  # nothing is kept for a backward pass: each result is added and let go
            return super().run_sum(q, k, v, plans, weights, scale)
        out, _ = _Sum.apply(q, k, v, self, scale, tuple(plans), *weights)
        return cast(Tensor, out)

    @abstractmethod
    def forward(
        self, rects: Rectangles, at: Rows, q: Tensor, k: Tensor, v: Tensor, scale: float, weigh: Weigh | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (rows of queries (n,), partial outputs (n, D), lse (n,)); rows that mean nothing have lse -inf.

        What `weigh` gives for a key is added to its scaled scores.
        """

    @abstractmethod
    def backward(
        self, rects: Rectangles, at: Rows, saved: tuple[Tensor, ...], grad: Gather, scale: float, weigh: Weigh | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """From saved = (q, k, v, final out, final lse), yield (rows of queries, dq, rows of keys, dk, dv) to add.

        `grad` gives the gradient of the output at some rows, as a tensor of its own.
        """


class _Sum(torch.autograd.Function):
    """Σ weight · softmax attention over a plan; also the lse of the first. One node, so that gradients share memory."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        engine: Grouped,
        scale: float,
        plans: tuple[Plan, ...],
        *weights: Tensor | float,
    ) -> tuple[Tensor, Tensor]:
        batch, heads, length, dim = q.shape
        at = Rows(heads, k.shape[1], length, k.shape[2])
        flat = [x.detach().reshape(-1, dim) for x in (q, k, v)]
        outs, lses = zip(*(_softmax(engine, plan, at, flat, batch, scale) for plan in plans), strict=True)
        total: Tensor | None = None
        for out, weight in zip(outs, weights, strict=True):
            total = plus(total, out.view(q.shape), weight.detach() if isinstance(weight, Tensor) else weight)
        gates = [weight for weight in weights if isinstance(weight, Tensor)]
        ctx.save_for_backward(*flat, *outs, *lses, *gates)
        ctx.engine, ctx.scale, ctx.plans, ctx.at, ctx.shapes = engine, scale, plans, at, (q.shape, k.shape)
        ctx.weights = [None if isinstance(weight, Tensor) else weight for weight in weights]
        lse: Tensor = lses[0].view(q.shape[:3])
        ctx.mark_non_differentiable(lse)
        assert total is not None
        return total, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q_shape, k_shape = ctx.shapes
        count = len(ctx.plans)
        q, k, v, *rest = ctx.saved_tensors
        outs, lses, gates = rest[:count], rest[count : 2 * count], iter(rest[2 * count :])
        # Half precision would lose the small terms of long sums.
        wide = torch.promote_types(grad.dtype, torch.float32)
        dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
        to_weights: list[Tensor | None] = []
        for plan, out, lse, weight in zip(ctx.plans, outs, lses, ctx.weights, strict=True):
            gate, to_weight, factor = None, None, weight
            if weight is None:
                gate, factor = next(gates), 1.0
                to_weight = _dots(grad, out.view(q_shape), gate)
            to_weights.append(to_weight)
            some = _gather(grad, gate, factor)
            saved = (q, k, v, out, lse)
            lists = rectangles(plan, q_shape[0], q_shape[1], ctx.engine.cost)
            for part, rects in zip(plan.parts, lists, strict=True):
                for q_rows, q_part, k_rows, k_part, v_part in ctx.engine.backward(
                    rects, ctx.at, saved, some, ctx.scale, ctx.at.weigh(part)
                ):
                    dq.index_add_(0, q_rows, q_part.to(wide))
                    dk.index_add_(0, k_rows, k_part.to(wide))
                    dv.index_add_(0, k_rows, v_part.to(wide))
                    del q_part, k_part, v_part  # else they would stay beside those of the next batch
        given = (dq.to(q.dtype).view(q_shape), dk.to(q.dtype).view(k_shape), dv.to(q.dtype).view(k_shape))
        return *given, None, None, None, *to_weights


def _softmax(
    engine: Grouped, plan: Plan, at: Rows, flat: list[Tensor], batch: int, scale: float
) -> tuple[Tensor, Tensor]:
    """out (rows, D) and lse (rows,) over one plan."""
    q, k, v = flat
    lists = rectangles(plan, batch, at.heads, engine.cost)
    total = _Softmax(len(q), q.shape[1], q)
    for low, high in slabs(lists, batch * at.heads, SLAB_BYTES // (q.shape[1] * q.element_size())):
        for part, rects in zip(plan.parts, lists, strict=True):
            if len(some := rects.of_groups(low, high)):
                for partial in engine.forward(some, at, q, k, v, scale, at.weigh(part)):
                    total.add(*partial)
                    del partial  # else it would stay beside the next one
    return total.result(q.dtype)


def _gather(grad: Tensor, gate: Tensor | None, factor: float) -> Gather:
    """Rows of factor · gate · grad, (B, H, L, D) flattened.

    A gate of one number a row is multiplied in as they are gathered; so is the factor, since torch adds rows on one
    thread where it has to scale them.
    """
    batch, heads, length, dim = grad.shape
    if gate is None or gate.shape[-1] != 1:
        flat = (grad if gate is None else gate * grad).reshape(-1, dim)
        return lambda rows: embedding(rows, flat) if factor == 1 else embedding(rows, flat).mul_(factor)
    flat, gates = grad.reshape(-1, dim), gate.expand(batch, heads, length, 1).reshape(-1, 1)
    return lambda rows: embedding(rows, flat).mul_(gates[rows])


def _dots(grad: Tensor, out: Tensor, gate: Tensor) -> Tensor:
    """The gradient of a gate that broadcasts to grad and out (B, H, L, D)."""
    narrow = gate.shape[-1] == 1  # most gates: no product of the whole size is made
    dots: Tensor = torch.linalg.vecdot(grad, out)[..., None] if narrow else grad * out
    return dots.sum_to_size(gate.shape)


class _Softmax:
    """The running softmax of n rows, to which partial results are added in any order, in float32 or wider.

    Sums are kept relative to a base for each row, which is moved only when a partial's lse passes it by `RISE`: what
    is summed stays in range, and the sums are seldom scaled again. Small partials wait for others, since each merge
    takes a dozen passes over all rows.
    """

    RISE = 20.0

    def __init__(self, n: int, dim: int, like: Tensor) -> None:
        wide = torch.promote_types(like.dtype, torch.float32)
        self.sum = like.new_zeros(n, dim, dtype=wide)
        self.weight = like.new_zeros(n, dtype=wide)
        self.base = torch.full_like(self.weight, -torch.inf)
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, rows: Tensor, out: Tensor, lse: Tensor) -> None:
        """Partial outputs (m, D), which may be overwritten, and lse (m,), -inf for what means nothing, of rows (m,)."""
        self.waiting.append((rows.long(), out.to(self.sum.dtype), lse.to(self.weight.dtype)))
        if sum(some.nbytes for _, some, _ in self.waiting) > WAITING_BYTES:
            self._merge()

    def _merge(self) -> None:
        rows, out, lse = self.waiting[0] if len(self.waiting) == 1 else map(torch.cat, zip(*self.waiting, strict=True))
        self.waiting.clear()
        top = self.base.scatter_reduce(0, rows, lse, "amax")
        risen = ((top > self.base + self.RISE) & (self.base > -torch.inf)).nonzero()[:, 0]
        if len(risen):
            scale = (self.base[risen] - top[risen]).exp()
            self.sum[risen] *= scale[:, None]
            self.weight[risen] *= scale
        self.base = torch.where(top > self.base + self.RISE, top, self.base)
        weight = (lse - self.base[rows].clamp(min=torch.finfo(lse.dtype).min)).exp()
        self.sum.index_add_(0, rows, out.mul_(weight[:, None]))
        self.weight.index_add_(0, rows, weight)

    def result(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """out (n, D) and lse (n,); rows that nothing was added to have 0 and -inf."""
        if self.waiting:
            self._merge()
        lse = self.base + self.weight.log()
        self.sum /= self.weight.masked_fill(self.weight == 0, 1)[:, None]
        return self.sum.to(dtype), lse


def _cpu_cost(q_size: Tensor, k_size: Tensor) -> Tensor:
    """What the engine pays for each rectangle, in pairs.

    The engine works in blocks of 256 queries from 768 on, of 64 from 192, or of 32. The smaller ones ran at .9 and .7
    of the speed. A row, gathered, merged and its gradient added, took as long as 64 pairs.
    """
    speed = torch.where(q_size >= 768, 1.0, torch.where(q_size >= 192, 0.9, 0.7))
    return q_size * k_size / speed + 64 * (q_size + k_size)


class Cpu(Grouped):
    """ATen's CPU flash attention on batches of rectangles of about one size, padded to it."""

    name = "cpu"
    cost = staticmethod(_cpu_cost)

    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:
        """Name each unmet need: tensors on the CPU, a dtype of `CPU_DTYPES`, the same head dim for q and v."""
        if q is None or v is None:
            return []
        return [
            reason
            for reason in (
                f"tensors are on {q.device}, it runs on the CPU" if q.device.type != "cpu" else "",
                f"head dim of v ({v.shape[-1]}) differs from that of q ({q.shape[-1]})"
                if v.shape[-1] != q.shape[-1]
                else "",
                f"dtype {q.dtype} is not float64, float32, bfloat16 or float16" if q.dtype not in CPU_DTYPES else "",
            )
            if reason
        ]

    def executed(self, plan: Plan, batch: int, heads: int) -> int:
        """Count the pairs of each batch, all its rectangles padded to its most queries and its most keys."""
        return sum(
            len(group) * int(group.q_size.max()) * int(group.k_size.max())
            for rects in rectangles(plan, batch, heads, self.cost)
            for group in _alike(rects, 1, BATCH_BYTES)
        )

    def forward(
        self, rects: Rectangles, at: Rows, q: Tensor, k: Tensor, v: Tensor, scale: float, weigh: Weigh | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Attend to one padded batch of rectangles at a time."""
        for batch in _batches(rects, at, q, weigh):
            yield _attend(batch, q, k, v, scale)

    def backward(
        self, rects: Rectangles, at: Rows, saved: tuple[Tensor, ...], grad: Gather, scale: float, weigh: Weigh | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Compute the gradients of one padded batch of rectangles at a time."""
        for batch in _batches(rects, at, saved[0], weigh):
            yield _gradients(batch, saved, grad, scale)


class PaddedBatch(NamedTuple):
    """R rectangles, padded to one size.

    `q_rows` (R, n): rows of queries; `q_pad` (R, n): which of them are padding; `k_rows` (R, m): rows of keys;
    `k_mask` (R, 1, 1, m): what is added to the scores of each key, which is its log-weight, or -inf for padding.
    """

    q_rows: Tensor
    q_pad: Tensor | None
    k_rows: Tensor
    k_mask: Tensor | None


def _batches(rects: Rectangles, at: Rows, q: Tensor, weigh: Weigh | None) -> list[PaddedBatch]:
    """The batches of all rectangles, made before the first is computed.

    Made one at a time between calls of the engine, which leave nothing in the caches, they took twice as long.
    """
    some = _alike(rects, q.shape[-1] * q.element_size(), _budget(q))
    return [pad_rectangles(alike, at, q.dtype, weigh) for alike in some]


def _attend(batch: PaddedBatch, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of queries, their partial outputs and lse, of one batch. What it gathered is gone when it returns."""
    q_rows, q_pad, k_rows, k_mask = batch
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(embedding(rows, x)[:, None] for rows, x in ((q_rows, q), (k_rows, k), (k_rows, v))),
        attn_mask=None if k_mask is None else k_mask.expand(-1, 1, q_rows.shape[1], -1),
        scale=scale,
    )
    lse = lse[:, 0] if q_pad is None else lse[:, 0].masked_fill(q_pad, -torch.inf)
    return q_rows.flatten(), out.reshape(-1, q.shape[-1]), lse.flatten()


def _gradients(
    batch: PaddedBatch, saved: tuple[Tensor, ...], grad: Gather, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows of queries, dq, rows of keys, dk, dv of one batch."""
    q, k, v, out, lse = saved
    q_rows, q_pad, k_rows, k_mask = batch
    some_lse = lse[q_rows]
    if q_pad is not None:  # a row that is there for padding gives every key the weight exp(-inf), so passes nothing on
        some_lse.masked_fill_(q_pad, torch.inf)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad(q_rows)[:, None],
        *(embedding(rows, x)[:, None] for rows, x in ((q_rows, q), (k_rows, k), (k_rows, v), (q_rows, out))),
        some_lse[:, None],
        0.0,
        False,
        attn_mask=None if k_mask is None else k_mask.expand(-1, 1, q_rows.shape[1], -1),
        scale=scale,
    )
    dq, dk, dv = (x.reshape(-1, q.shape[-1]) for x in (dq, dk, dv))
    return q_rows.flatten(), dq, k_rows.flatten(), dk, dv


CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _budget(q: Tensor) -> int:
    """Bytes for one batch: what is gathered at a time should be small beside what is held anyway."""
    return min(BATCH_BYTES, max(LEAST_BYTES, 2 * q.nbytes))


def _alike(rects: Rectangles, row: int, budget: int) -> Iterator[Rectangles]:
    """Batches of rectangles of about one size, which gathered in rows of `row` bytes take about `budget` bytes.

    The engine's backward gives each rectangle to one thread: a batch is made of rounds, of as many rectangles as there
    are threads, next to one another in size. Only the last round of a size of keys may leave threads idle.
    """
    if not len(rects):
        return
    threads = torch.get_num_threads()
    rects = _cut(rects, budget // (4 * row * threads))
    # Keys first: rectangles with the same number of keys, as equal chunks have, need no mask together.
    by_queries = rects.q_size.argsort(stable=True)
    rects = rects.select(by_queries[_size_class(rects.k_size)[by_queries].argsort(stable=True)])
    _, of, count = torch.unique_consecutive(_size_class(rects.k_size), return_inverse=True, return_counts=True)
    nth = torch.arange(len(rects)) - (count.cumsum(0) - count)[of]
    _, of, count = torch.unique_consecutive(of * len(rects) + nth // threads, return_inverse=True, return_counts=True)
    queries, keys = (torch.zeros_like(count).scatter_reduce(0, of, x, "amax") for x in (rects.q_size, rects.k_size))
    rounds = zip(count.tolist(), queries.tolist(), keys.tolist(), strict=True)
    start = 0
    for together, most_queries, most_keys in _worth_joining(rounds, threads):
        most = budget // (4 * (most_queries + most_keys) * row)
        most = max(1, -(-most // threads)) * threads
        end = start + together
        for first in range(start, end, most):
            yield rects.select(slice(first, min(first + most, end)))
        start = end


def _cut(rects: Rectangles, most: int) -> Rectangles:
    """The same pairs with at most `most` rows of queries and keys in a rectangle, cut between queries.

    But for pieces of half as many queries as keys, or `LEAST_QUERIES`: keys would be gathered too often.
    """
    limit = (most - rects.k_size).clamp(min=LEAST_QUERIES).maximum(rects.k_size // 2)
    number = -(-rects.q_size // limit)
    if bool((number == 1).all()):
        return rects
    of = torch.arange(len(rects)).repeat_interleave(number)
    nth = torch.arange(len(of)) - (number.cumsum(0) - number)[of]
    low, high = (x * rects.q_size[of] // number[of] for x in (nth, nth + 1))
    parts = rects.select(of)
    return replace(parts, q_start=parts.q_start + low, q_size=high - low)


def _worth_joining(rounds: Iterable[tuple[int, int, int]], threads: int) -> Iterator[tuple[int, int, int]]:
    """From the rectangles, most queries and most keys of each round those of each batch.

    Neighbours are joined as long as all the padding that makes them of one size costs less than one more call.
    """
    held = apart = most_queries = most_keys = 0
    for number, queries, keys in rounds:
        alone = threads * queries * keys  # an idle thread waits for the others
        joined = -(-(held + number) // threads) * threads * max(most_queries, queries) * max(most_keys, keys)
        if held and joined - apart - alone > PAIRS_OF_A_CALL:
            yield held, most_queries, most_keys
            held = apart = most_queries = most_keys = 0
        held, apart = held + number, apart + alone
        most_queries, most_keys = max(most_queries, queries), max(most_keys, keys)
    yield held, most_queries, most_keys


def _size_class(size: Tensor) -> Tensor:
    """Sizes rounded up to eight steps an octave."""
    step = (2 ** (size.double().log2().floor() - 3)).clamp(min=1).long()
    return -(-size // step) * step


def pad_rectangles(rects: Rectangles, at: Rows, dtype: torch.dtype, weigh: Weigh | None) -> PaddedBatch:
    """Pad each rectangle to the most queries and the most keys of any, by repeating its last query and its last key."""
    q_tokens, q_pad = _table(rects.q_list, rects.q_start, rects.q_size)
    k_tokens, k_pad = _table(rects.k_list, rects.k_start, rects.k_size)
    mask = None
    if weigh is not None:
        # The engine takes a mask in float32 beside half precision, which would round a log-weight by 1 %.
        mask = weigh(rects.group[:, None], k_tokens).to(torch.promote_types(dtype, torch.float32))
    elif k_pad is not None:
        mask = torch.zeros_like(k_pad, dtype=dtype)
    if mask is not None:
        mask = (mask if k_pad is None else mask.masked_fill_(k_pad, -torch.inf))[:, None, None]
    none = torch.zeros_like(rects.group)
    q_first, k_first = at.of_queries(rects.group, none), at.of_keys(rects.group, none)
    return PaddedBatch(q_first[:, None] + q_tokens, q_pad, k_first[:, None] + k_tokens, mask)


def _table(tokens: Tensor, start: Tensor, size: Tensor) -> tuple[Tensor, Tensor | None]:
    """The tokens of each list, (R, the longest), and which of them are padding."""
    least, most = (int(x) for x in size.aminmax())
    step = torch.arange(most, device=size.device)
    if least == most:
        return tokens.take(start[:, None] + step), None
    # Padding repeats the last entry, which is always there.
    last = size[:, None] - 1
    return tokens.take(start[:, None] + torch.minimum(step, last)), step > last
