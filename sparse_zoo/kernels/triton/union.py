"""A plan on the device: dense rectangles by the vendor's kernel, the rest gathered, merged in a fixed order.

Partial rows are kept for a slab of heads at a time. The backward needs no partial outputs: for a softmax over a
disjoint union, the gradients through one part are those of dense attention on it with the union's output and
log-sum-exp in place of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_zoo.kernels.triton import cudnn, dense, device
from sparse_zoo.kernels.triton.configs import LINES, Config, Tile
from sparse_zoo.kernels.triton.work import PartWork, Work, work_of
from sparse_zoo.plan import Part, Plan

SLAB_BYTES = 1 << 30


class Union(torch.autograd.Function):
    """(q, k, v, plan, scale, config) -> (out, lse)"""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, config: Config
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (dense_rows(x.detach()) for x in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        with on(q):
            work = _PlanWork.of(plan, config)
            for slab in _slabs(q, k, work.rows * (q.shape[-1] * q.element_size() + 4)):
                _forward(slab, (q, k, v, out, lse), work, scale, config)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale, ctx.config = plan, scale, config
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        with on(q):
            # Made again rather than kept: the lists of a routed part are larger than its edges.
            work = _PlanWork.of(ctx.plan, ctx.config)
            row_bytes = q.shape[-1] * q.element_size()
            for slab in _slabs(q, k, work.rows * row_bytes + 2 * 4 * k.shape[2] * k.shape[3]):
                _backward(slab, (q, k, v, out, lse, dense_rows(grad)), grads, work, ctx.scale, ctx.config)
        return *grads, None, None, None


@dataclass(frozen=True)
class _Listed:
    """A part: dense rectangles or work for the gather kernels, and which of a head's partial rows are its own.

    `by_cudnn`: the work goes to cuDNN's variable-length attention, whose key pieces have `longest` tokens at most.
    """

    dense: list[dense.Rectangle] | None
    work: PartWork | None
    rows: slice
    by_cudnn: bool = False
    longest: int = 0


@dataclass(frozen=True)
class _PlanWork:
    """Parts, how many partial rows a head has, and which are each query's: int32 (B|1, H|1, Lq, s), -1 for none."""

    parts: list[_Listed]
    rows: int
    slots: Tensor

    @staticmethod
    def of(plan: Plan, config: Config) -> _PlanWork:
        queries = plan.parts[0].queries
        parts: list[_Listed] = []
        slots: list[Tensor] = []
        first = 0
        for part in plan.parts:
            rectangles = dense.rectangles(part)
            work = None if rectangles else _work(part, config)
            if rectangles:
                number, places = queries.length, _dense_slots(rectangles, queries.length, queries.device)
            elif work:
                number, places = work.by_query.tokens.shape[-1], work.slots
            else:
                continue
            by_cudnn = config.cudnn and work is not None and not work.pieces
            longest = part.keys.longest if by_cudnn else 0
            parts.append(_Listed(rectangles, work, slice(first, first + number), by_cudnn, longest))
            slots.append(torch.where(places < 0, -1, places + first))
            first += number
        lead = plan.batch_heads
        if not slots:
            return _PlanWork([], 0, torch.empty(1, 1, queries.length, 0, dtype=torch.int32, device=queries.device))
        return _PlanWork(parts, first, torch.cat([x.expand(*lead, -1, -1) for x in slots], dim=-1))


def _work(part: Part, config: Config) -> PartWork | None:
    """The work of a part, remembered where it is small: for pieces and edges that batch items and heads share."""
    if part.batch_heads != (1, 1) or part.queries.is_singles:
        return work_of(part, config)
    known: dict[Config, PartWork | None] = part.__dict__.setdefault("_triton_work", {})
    if config not in known:
        with torch.inference_mode(False):
            known[config] = work_of(part, config)
    return known[config]


def _dense_slots(rectangles: list[dense.Rectangle], length: int, where: torch.device) -> Tensor:
    slots = torch.full((length,), -1, dtype=torch.int32, device=where)
    token = torch.arange(length, dtype=torch.int32, device=where)
    for rectangle in rectangles:
        slots[rectangle.queries] = token[rectangle.queries]
    return slots[None, None, :, None]


# -- slabs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slab:
    """Some heads of some batch items of (batch, heads); `share` query heads read one head of keys."""

    batch: int
    heads: int
    share: int
    items: slice
    head: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.items.stop - self.items.start, self.head.stop - self.head.start

    @property
    def groups(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def kv_head(self) -> slice:
        return slice(self.head.start // self.share, self.head.stop // self.share)

    def of(self, x: Tensor) -> Tensor:
        """Its batch items and query heads of a tensor or table, (B|1, H|1, …); a shared one is not copied."""
        return x.expand(self.batch, self.heads, *x.shape[2:])[self.items, self.head]

    def work(self, work: PartWork) -> PartWork:
        """Its batch items and heads of the tables of a part."""
        by_query, by_key = (Work(*(self.of(x) for x in tables)) for tables in (work.by_query, work.by_key))
        return work._replace(by_query=by_query, by_key=by_key)

    def first_keys(self, k: Tensor) -> Tensor:
        """The row of a contiguous k at which the stream of each of its heads begins: int64 (items, heads)."""
        stream = torch.arange(k.shape[0] * k.shape[1], device=k.device).view(k.shape[:2]) * k.shape[2]
        return self.of(stream.repeat_interleave(self.share, dim=1))

    def keys_at(self, x: Tensor, rows: dense.Rows) -> Tensor:
        """Some rows of k or v, one head for each query head."""
        own = x[self.items, self.kv_head][:, :, rows]
        return own if self.share == 1 else own.repeat_interleave(self.share, dim=1)


def _slabs(q: Tensor, k: Tensor, bytes_of_a_head: int) -> Iterator[_Slab]:
    """Slabs of whole groups of heads that read the same keys, of at most SLAB_BYTES (or one group)."""
    batch, heads = q.shape[:2]
    share = heads // k.shape[1]
    most = max(share, SLAB_BYTES // max(1, bytes_of_a_head) // share * share)
    items, step = max(1, most // heads), min(heads, most)
    for item in range(0, batch, items):
        for head in range(0, heads, step):
            yield _Slab(
                batch, heads, share, slice(item, min(batch, item + items)), slice(head, min(heads, head + step))
            )


def _forward(slab: _Slab, tensors: tuple[Tensor, ...], work: _PlanWork, scale: float, config: Config) -> None:
    """Fill the slab's part of out and lse; tensors = (q, k, v, out, lse)."""
    _, k, v, *_ = tensors
    q, out, lse = (slab.of(tensors[i]) for i in (0, 3, 4))
    length, dim = q.shape[2:]
    rows = torch.empty(slab.groups, work.rows, dim, dtype=q.dtype, device=q.device)
    rows_lse = torch.empty(slab.groups, work.rows, dtype=torch.float32, device=q.device)
    for part in work.parts:
        own, own_lse = rows[:, part.rows], rows_lse[:, part.rows]
        for at, keys, _ in part.dense or ():
            partial = dense.forward(q[:, :, at], slab.keys_at(k, keys), slab.keys_at(v, keys), scale)
            own.unflatten(0, slab.shape)[:, :, at], own_lse.unflatten(0, slab.shape)[:, :, at] = partial
        if part.work and part.by_cudnn:
            own.unflatten(0, slab.shape)[:], own_lse.unflatten(0, slab.shape)[:] = cudnn.forward(
                _gathered(slab, q, part.work), k.contiguous(), v.contiguous(),
                slab.first_keys(k), slab.work(part.work), part.longest, scale,
            )  # fmt: skip
        elif part.work:
            tables, strides, number = _tables(slab, part.work.by_query)
            tile = part.work.tiles(config).attend
            blocks, tma = copied_blocks(k[slab.items], v[slab.items], part.work, tile)
            _launch(
                device.attend, slab, number, tile,
                q, *blocks, own, own_lse, *tables, scale,
                *_numbers(slab, number), slab.head.start, slab.share,
                *_strides(q, k, v), own.stride(0), own_lse.stride(0), *strides,
                DIM=dim, PIECES=part.work.pieces, TMA=tma,
            )  # fmt: skip
    slots = slab.of(work.slots)
    number = -(-length // LINES.rows)
    _launch(
        device.merge, slab, number, LINES,
        rows, rows_lse, slots, out, lse, *_numbers(slab, number), length, slots.shape[-1],
        rows.stride(0), rows_lse.stride(0), *slots.stride()[:2], *_strides(out), *lse.stride()[:2], DIM=dim,
    )  # fmt: skip


def _backward(
    slab: _Slab,
    tensors: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    work: _PlanWork,
    scale: float,
    config: Config,
) -> None:
    """Fill the slab's part of grads = (dq, dk, dv); tensors = (q, k, v, out, lse, grad)."""
    _, k, v, *_ = tensors
    q, out, lse, grad, dq = (slab.of(x) for x in (tensors[0], *tensors[3:], grads[0]))
    length, dim = q.shape[2:]
    lse = lse.contiguous()
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    lines = -(-length // LINES.rows)
    _launch(
        device.row_dots, slab, lines, LINES,
        out, grad, delta, *_numbers(slab, lines), length, *_strides(out, grad), DIM=dim,
    )  # fmt: skip
    rows = torch.empty(slab.groups, work.rows, dim, dtype=q.dtype, device=q.device)
    # Half precision would lose the small terms of long sums.
    dk, dv = (torch.zeros(*slab.shape, *k.shape[2:], dtype=torch.float32, device=k.device) for _ in "kv")
    for part in work.parts:
        own = rows[:, part.rows]
        for at, keys, _ in part.dense or ():
            own.unflatten(0, slab.shape)[:, :, at], dk_part, dv_part = dense.backward(
                grad[:, :, at], q[:, :, at], slab.keys_at(k, keys), slab.keys_at(v, keys),
                out[:, :, at], lse[:, :, at], scale,
            )  # fmt: skip
            dk[:, :, keys] += dk_part
            dv[:, :, keys] += dv_part
        if part.work and part.by_cudnn:
            queries, asked, outs, lses = (_gathered(slab, x, part.work) for x in (q, grad, out, lse[..., None]))
            own.unflatten(0, slab.shape)[:], dk_part, dv_part = cudnn.backward(
                asked, queries, k.contiguous(), v.contiguous(), outs, lses[..., 0],
                slab.first_keys(k), slab.work(part.work), part.longest, scale,
            )  # fmt: skip
            dk += dk_part
            dv += dv_part
        elif part.work:
            tables, strides, number = _tables(slab, part.work.by_query)
            # lse and delta of the listed queries, in the order of the list, which both kernels read.
            known = torch.empty(slab.groups, 2, tables[0].shape[-1], dtype=torch.float32, device=q.device)
            tile = part.work.tiles(config).grad_queries
            blocks, tma = copied_blocks(k[slab.items], v[slab.items], part.work, tile)
            _launch(
                device.grad_queries, slab, number, tile,
                q, *blocks, grad, lse, delta, own, known, *tables, scale,
                *_numbers(slab, number), slab.head.start, slab.share, length,
                *_strides(q, k, v, grad), own.stride(0), *known.stride()[:2], *strides,
                DIM=dim, PIECES=part.work.pieces, TMA=tma,
            )  # fmt: skip
            tables, strides, number = _tables(slab, part.work.by_key)
            _launch(
                device.grad_keys, slab, number, part.work.tiles(config).grad_keys,
                q, k[slab.items], v[slab.items], grad, known, dk, dv, *tables, scale,
                *_numbers(slab, number), slab.head.start, slab.share, k.shape[2],
                *_strides(q, k, v, grad), *known.stride()[:2], *strides,
                DIM=dim, PIECES=part.work.pieces,
            )  # fmt: skip
    slots = slab.of(work.slots)
    _launch(
        device.add_up, slab, lines, LINES,
        rows, slots, dq, *_numbers(slab, lines), length, slots.shape[-1], rows.stride(0),
        *slots.stride()[:2], *_strides(dq), DIM=dim,
    )  # fmt: skip
    for total, x in ((grads[1], dk), (grads[2], dv)):
        total[slab.items, slab.kv_head] = x.unflatten(1, (-1, slab.share)).sum(2)


# -- launching --------------------------------------------------------------------------------------------------------


def _launch(kernel: Any, slab: _Slab, number: int, tile: Tile, *args: Any, **constants: Any) -> None:
    """`number` programs for each head of the slab, in the first grid dimension: the others end at 65,535."""
    if tile.step:
        constants["STEP"] = tile.step
    kernel[(slab.groups * number,)](*args, ROWS=tile.rows, num_warps=tile.warps, num_stages=tile.stages, **constants)


def _gathered(slab: _Slab, x: Tensor, work: PartWork) -> Tensor:
    """Rows of x (items, heads, L, n) in the order of the part's list of queries: contiguous (items, heads, m, n)."""
    tokens = slab.of(work.by_query.tokens)
    rows = torch.empty(*slab.shape, tokens.shape[-1], x.shape[-1], dtype=x.dtype, device=x.device)
    number = -(-tokens.shape[-1] // LINES.rows)
    _launch(
        device.gather, slab, number, LINES,
        x, rows, tokens, *_numbers(slab, number), tokens.shape[-1], *_strides(x), rows.stride(1), *tokens.stride()[:2],
        DIM=x.shape[-1],
    )  # fmt: skip
    return rows


def copied_blocks(k: Tensor, v: Tensor, work: PartWork, tile: Tile) -> tuple[tuple[Any, Any], bool]:
    """k and v as a kernel takes them, and whether they are descriptors: blocks of a slice of the stream can be read by
    the copy engine, where the tile asks for it and rows begin at multiples of 16 bytes."""
    if work.pieces or not tile.tma or not all(_aligned(x) for x in (k, v)):
        return (k, v), False
    from triton.tools.tensor_descriptor import TensorDescriptor

    block = [1, 1, tile.step, k.shape[-1]]
    return (TensorDescriptor.from_tensor(k, block), TensorDescriptor.from_tensor(v, block)), True


def _aligned(x: Tensor) -> bool:
    return all(byte % 16 == 0 for byte in (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3])))


def _numbers(slab: _Slab, number: int) -> tuple[int, int]:
    return slab.shape[1], number


def _tables(slab: _Slab, work: Work) -> tuple[list[Tensor], list[int], int]:
    """The tables of a slab, their strides over batch items and heads, and the number of tiles of a head."""
    tables = [slab.of(x) for x in work]
    return tables, [stride for x in tables for stride in x.stride()[:2]], work.tiles.shape[2]


def _strides(*tensors: Tensor) -> list[int]:
    """Over batch items, heads and rows."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def dense_rows(x: Tensor) -> Tensor:
    """x with the channels of a row next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
