"""A plan on the device: dense rectangles by the vendor's kernel, the rest gathered, merged in a fixed order.

Rectangles run first, over all heads, straight into the output; then the rest a slab of heads at a time, whose partial
rows are merged into it. The backward needs no partial outputs: for a softmax over a disjoint union, the gradients
through one part are those of dense attention on it with the union's output and log-sum-exp in place of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
KEPT = 1 / 8
"""Of the bytes of q, k, v and the output, up to which the backward keeps the lists of the forward: to make them takes
milliseconds of both. Larger ones are made again."""


class Union(torch.autograd.Function):
    """Attention over a plan as one autograd node: (q, k, v, plan, scale, config) -> (out, lse)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, config: Config
    ) -> tuple[Tensor, Tensor]:
        """Compute all rectangles and parts, merge them, and save what the backward needs."""
        q, k, v = (dense_rows(x.detach()) for x in (q, k, v))
        if config.cudnn:  # which takes rows of keys one after the other, whatever their head
            k, v = k.contiguous(), v.contiguous()
        lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
        with on(q):
            work = _PlanWork.of(plan, config)
            # What no rectangle writes is written by the merge, if there is one.
            out = (torch.empty if work.parts else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
            tensors = (q, k, v, out, lse)
            for batch in work.dense:
                for items in _calls(batch, len(q)):
                    _dense_forward(batch, items, tensors, scale)
            if work.parts:
                for slab in _slabs(q, k, work.rows * (q.shape[-1] * q.element_size() + 4)):
                    _forward(slab, tensors, work, scale, config)
        ctx.save_for_backward(*tensors)
        ctx.plan, ctx.scale, ctx.config = plan, scale, config
        ctx.work = work if work.bytes() <= KEPT * sum(x.nbytes for x in tensors) else None
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Compute dq, dk and dv; dk and dv are summed in float32 where rectangles may hold the same keys."""
        q, k, v, out, lse = ctx.saved_tensors
        with on(q):
            work = ctx.work or _PlanWork.of(ctx.plan, ctx.config)
            ctx.work = None  # the output may be held for long after its gradient is taken
            # Half precision would lose the small terms of long sums: where many rectangles read the same keys.
            wide = torch.float32 if work.overlap else k.dtype
            fresh = torch.zeros if work.dense or not work.parts else torch.empty
            grads = [fresh(x.shape, dtype=dtype, device=x.device) for x, dtype in ((q, q.dtype), (k, wide), (v, wide))]
            tensors = (q, k, v, out, lse, dense_rows(grad))
            for batch in work.dense:
                for items in _calls(batch, len(q)):
                    _dense_backward(batch, items, tensors, grads, ctx.scale)
            if work.parts:
                row_bytes = q.shape[-1] * q.element_size() + 8
                for slab in _slabs(q, k, work.rows * row_bytes + 2 * 4 * k.shape[2] * k.shape[3]):
                    _backward(slab, tensors, grads, work, ctx.scale, ctx.config)
        return grads[0], grads[1].to(k.dtype), grads[2].to(v.dtype), None, None, None


@dataclass(frozen=True)
class _Listed:
    """A part's work for the gather kernels, and which of a head's partial rows are its own.

    `by_cudnn`: the work goes to cuDNN's variable-length attention, whose key pieces have `longest` tokens at most.
    `log_weight` (B|1, H|1, Lk): what is added to the scaled scores of each key, if anything is.
    """

    work: PartWork
    rows: slice
    by_cudnn: bool
    longest: int
    log_weight: Tensor | None


@dataclass(frozen=True)
class _PlanWork:
    """A plan's rectangles in batches, and its other parts.

    `overlap`: rectangles of one part may hold the same keys. `rows`: how many partial rows a head has of the other
    parts. `slots`, int32 (B|1, H|1, Lq, s): which of these rows are each query's, -1 for none.
    """

    dense: list[dense.Batch]
    overlap: bool
    parts: list[_Listed]
    rows: int
    slots: Tensor

    @staticmethod
    def of(plan: Plan, config: Config) -> _PlanWork:
        batches: list[dense.Batch] = []
        overlap = False
        parts: list[_Listed] = []
        slots = [torch.empty(1, 1, plan.shape[0], 0, dtype=torch.int32, device=plan.parts[0].queries.device)]
        first = 0
        for part in plan.parts:
            rectangles = dense.rectangles(part)
            if rectangles:
                batches += dense.batches(rectangles)
                overlap |= dense.overlap(rectangles)
            elif work := _work(part, config):
                number = work.by_query.tokens.shape[-1]
                by_cudnn = config.cudnn and not work.pieces and part.log_weight is None
                longest = part.keys.longest if by_cudnn else 0
                parts.append(_Listed(work, slice(first, first + number), by_cudnn, longest, part.log_weight))
                slots.append(torch.where(work.slots < 0, -1, work.slots + first) if first else work.slots)
                first += number
        lead = plan.batch_heads
        joined = slots[-1] if len(slots) <= 2 else torch.cat([x.expand(*lead, -1, -1) for x in slots], dim=-1)
        return _PlanWork(batches, overlap, parts, first, joined)

    def bytes(self) -> int:
        """Bytes of the tables that each call builds."""
        tables = [x for part in self.parts for x in (*part.work.by_query, *part.work.by_key)]
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (*tables, self.slots)}
        return sum(held.values())


def _work(part: Part, config: Config) -> PartWork | None:
    """The work of a part, remembered where it is small: for pieces and edges that batch items and heads share."""
    if part.batch_heads != (1, 1) or part.queries.is_singles:
        return work_of(part, config)
    known: dict[Config, PartWork | None] = part.__dict__.setdefault("_triton_work", {})
    if config not in known:
        with torch.inference_mode(False):
            known[config] = work_of(part, config)
    return known[config]


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

    def bias(self, part: _Listed, scale: float) -> tuple[Tensor | None, tuple[int, int]]:
        """What is added to the unscaled scores of its heads, and its strides over batch items and heads."""
        if part.log_weight is None:
            return None, (0, 0)
        bias = self.of(part.log_weight.float() / scale)
        bias = bias if bias.stride(-1) == 1 else bias.contiguous()
        return bias, (bias.stride(0), bias.stride(1))

    def first_keys(self, k: Tensor) -> Tensor:
        """The row of a contiguous k at which the stream of each of its heads begins: int64 (items, heads)."""
        stream = torch.arange(k.shape[0] * k.shape[1], device=k.device).view(k.shape[:2]) * k.shape[2]
        return self.of(stream.repeat_interleave(self.share, dim=1))


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


# -- rectangles -------------------------------------------------------------------------------------------------------


def _calls(batch: dense.Batch, items: int) -> Iterator[slice]:
    """The batch items of each call: all, or each alone where rectangles are the batch items of the call."""
    yield from ([slice(0, items)] if batch.number == 1 else [slice(i, i + 1) for i in range(items)])


def _dense_forward(batch: dense.Batch, items: slice, tensors: tuple[Tensor, ...], scale: float) -> None:
    """Merge a batch of rectangles into out and lse; tensors = (q, k, v, out, lse)."""
    q, k, v, out, lse = (x[items] for x in tensors)
    queries = dense.rows_of(q, batch.queries)
    keys, values = (_for_queries(dense.rows_of(x, batch.keys), q.shape[1]) for x in (k, v))
    partial, partial_lse = dense.forward(queries, keys, values, scale)
    partial, partial_lse = dense_rows(partial), partial_lse.contiguous()
    (out, lse), tokens = _targets(batch.queries, out, lse[..., None])
    _over_rows(
        device.fold, (partial, partial_lse, out, lse, tokens), partial.shape[:3],
        (*_strides(partial), *partial_lse.stride()[:2], *_strides(out), *lse.stride()[:2]),
        DIM=q.shape[-1], LISTED=isinstance(batch.queries, Tensor),
    )  # fmt: skip


def _dense_backward(
    batch: dense.Batch, items: slice, tensors: tuple[Tensor, ...], grads: list[Tensor], scale: float
) -> None:
    """Add what goes through a batch of rectangles to grads = (dq, dk, dv); tensors = (q, k, v, out, lse, grad)."""
    q, k, v, out, lse, grad = (x[items] for x in tensors)
    queries, outs, asked = (dense.rows_of(x, batch.queries) for x in (q, out, grad))
    keys, values = (_for_queries(dense.rows_of(x, batch.keys), q.shape[1]) for x in (k, v))
    lses = dense.rows_of(lse[..., None], batch.queries)[..., 0]
    found = dense.backward(asked, queries, keys, values, outs, lses, scale)
    for partial, total, rows in zip(found, grads, (batch.queries, batch.keys, batch.keys), strict=True):
        partial = dense_rows(partial)
        (to,), tokens = _targets(rows, total[items])
        _add_rows(partial, to, tokens, listed=isinstance(rows, Tensor), add=True)


def _for_queries(keys: Tensor, heads: int) -> Tensor:
    """One head of keys for each query head."""
    share = heads // keys.shape[1]
    return keys if share == 1 else keys.repeat_interleave(share, dim=1)


def _targets(rows: dense.Run | Tensor, *tensors: Tensor) -> tuple[list[Tensor], Tensor]:
    """Where results go: views of the rows, or whole streams and the tokens in them."""
    if isinstance(rows, Tensor):
        return list(tensors), rows
    return [dense.rows_of(x, rows) for x in tensors], tensors[0]  # no list: its pointer is not read


def _add_rows(rows: Tensor, to: Tensor, tokens: Tensor, *, listed: bool, add: bool) -> None:
    """Add rows (B, H, n, D), summed over the heads that share one of `to`, to its rows, or put them there."""
    _over_rows(
        device.add_rows, (rows, to, tokens), (*to.shape[:2], rows.shape[2]),
        (rows.shape[1] // to.shape[1], *_strides(rows, to)), DIM=rows.shape[3], LISTED=listed, ADD=add,
    )  # fmt: skip


# -- gathered parts ---------------------------------------------------------------------------------------------------


def _forward(slab: _Slab, tensors: tuple[Tensor, ...], work: _PlanWork, scale: float, config: Config) -> None:
    """Merge the slab's gathered parts into out and lse; tensors = (q, k, v, out, lse)."""
    _, k, v, *_ = tensors
    q, out, lse = (slab.of(tensors[i]) for i in (0, 3, 4))
    dim = q.shape[3]
    rows = torch.empty(slab.groups, work.rows, dim, dtype=q.dtype, device=q.device)
    rows_lse = torch.empty(slab.groups, work.rows, dtype=torch.float32, device=q.device)
    for part in work.parts:
        own, own_lse = rows[:, part.rows], rows_lse[:, part.rows]
        if part.by_cudnn:
            own.unflatten(0, slab.shape)[:], own_lse.unflatten(0, slab.shape)[:] = cudnn.forward(
                _gathered(slab, q, part.work), k, v,
                slab.first_keys(k), slab.work(part.work), part.longest, scale,
            )  # fmt: skip
            continue
        tables, strides, number = _tables(slab, part.work.by_query)
        tile = part.work.tiles(config).attend
        blocks, tma = copied_blocks(k[slab.items], v[slab.items], part.work, tile)
        bias, bias_strides = slab.bias(part, scale)
        _launch(
            device.attend, slab, number, tile,
            q, *blocks, own, own_lse, *tables, bias, scale,
            slab.shape[1], number, slab.head.start, slab.share,
            *_strides(q, k, v), own.stride(0), own_lse.stride(0), *strides, *bias_strides,
            DIM=dim, PIECES=part.work.pieces, TMA=tma, WEIGHTED=bias is not None,
        )  # fmt: skip
    slots = slab.of(work.slots)
    _over_rows(
        device.merge, (rows, rows_lse, slots, out, lse), q.shape[:3],
        (slots.shape[-1], rows.stride(0), rows_lse.stride(0), *slots.stride()[:2], *_strides(out), *lse.stride()[:2]),
        DIM=dim,
    )  # fmt: skip


def _backward(
    slab: _Slab,
    tensors: tuple[Tensor, ...],
    grads: list[Tensor],
    work: _PlanWork,
    scale: float,
    config: Config,
) -> None:
    """Put the slab's gathered parts into grads = (dq, dk, dv), or add them to what rectangles put there.

    tensors = (q, k, v, out, lse, grad).
    """
    _, k, v, *_ = tensors
    q, out, lse, grad, dq = (slab.of(x) for x in (tensors[0], *tensors[3:], grads[0]))
    length, dim = q.shape[2:]
    lse = lse.contiguous()
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    _over_rows(device.row_dots, (out, grad, delta), q.shape[:3], _strides(out, grad), DIM=dim)
    rows = torch.empty(slab.groups, work.rows, dim, dtype=q.dtype, device=q.device)
    # Half precision would lose the small terms of long sums.
    dk, dv = (torch.zeros(*slab.shape, *k.shape[2:], dtype=torch.float32, device=k.device) for _ in "kv")
    for part in work.parts:
        own = rows[:, part.rows]
        if part.by_cudnn:
            queries, asked, outs, lses = (_gathered(slab, x, part.work) for x in (q, grad, out, lse[..., None]))
            own.unflatten(0, slab.shape)[:], dk_part, dv_part = cudnn.backward(
                asked, queries, k, v, outs, lses[..., 0],
                slab.first_keys(k), slab.work(part.work), part.longest, scale,
            )  # fmt: skip
            dk += dk_part
            dv += dv_part
            continue
        tables, strides, number = _tables(slab, part.work.by_query)
        # lse and delta of the listed queries, in the order of the list, which both kernels read.
        known = torch.empty(slab.groups, 2, tables[0].shape[-1], dtype=torch.float32, device=q.device)
        tile = part.work.tiles(config).grad_queries
        blocks, tma = copied_blocks(k[slab.items], v[slab.items], part.work, tile)
        bias, bias_strides = slab.bias(part, scale)
        _launch(
            device.grad_queries, slab, number, tile,
            q, *blocks, grad, lse, delta, own, known, *tables, bias, scale,
            slab.shape[1], number, slab.head.start, slab.share, length,
            *_strides(q, k, v, grad), own.stride(0), *known.stride()[:2], *strides, *bias_strides,
            DIM=dim, PIECES=part.work.pieces, TMA=tma, WEIGHTED=bias is not None,
        )  # fmt: skip
        tables, strides, number = _tables(slab, part.work.by_key)
        _launch(
            device.grad_keys, slab, number, part.work.tiles(config).grad_keys,
            q, k[slab.items], v[slab.items], grad, known, dk, dv, *tables, bias, scale,
            slab.shape[1], number, slab.head.start, slab.share, k.shape[2],
            *_strides(q, k, v, grad), *known.stride()[:2], *strides, *bias_strides,
            DIM=dim, PIECES=part.work.pieces, WEIGHTED=bias is not None,
        )  # fmt: skip
    slots, add = slab.of(work.slots), bool(work.dense)
    _over_rows(
        device.add_up, (rows, slots, dq), q.shape[:3],
        (slots.shape[-1], rows.stride(0), *slots.stride()[:2], *_strides(dq)), DIM=dim, ADD=add,
    )  # fmt: skip
    for total, x in ((grads[1], dk), (grads[2], dv)):
        _add_rows(x, total[slab.items, slab.kv_head], x, listed=False, add=add)


# -- launching --------------------------------------------------------------------------------------------------------


def _launch(kernel: Any, slab: _Slab, number: int, tile: Tile, *args: Any, **constants: Any) -> None:
    """`number` programs for each head of the slab, in the first grid dimension: the others end at 65,535."""
    if tile.step:
        constants["STEP"] = tile.step
    kernel[(slab.groups * number,)](*args, ROWS=tile.rows, num_warps=tile.warps, num_stages=tile.stages, **constants)


def _over_rows(
    kernel: Any, tensors: tuple[Tensor, ...], shape: tuple[int, ...], rest: Iterable[int], **constants: Any
) -> None:
    """Programs for LINES.rows rows each of `shape` = (batch items, heads, rows)."""
    number = -(-shape[2] // LINES.rows)
    kernel[(shape[0] * shape[1] * number,)](
        *tensors, shape[1], number, shape[2], *rest,
        ROWS=LINES.rows, num_warps=LINES.warps, num_stages=LINES.stages, **constants,
    )  # fmt: skip


def _gathered(slab: _Slab, x: Tensor, work: PartWork) -> Tensor:
    """Rows of x (items, heads, L, n) in the order of the part's list of queries: contiguous (items, heads, m, n)."""
    tokens = slab.of(work.by_query.tokens)
    rows = torch.empty(*slab.shape, tokens.shape[-1], x.shape[-1], dtype=x.dtype, device=x.device)
    _over_rows(
        device.gather, (x, rows, tokens), rows.shape[:3],
        (*_strides(x), rows.stride(1), *tokens.stride()[:2]), DIM=x.shape[-1],
    )  # fmt: skip
    return rows


def copied_blocks(k: Tensor, v: Tensor, work: PartWork, tile: Tile) -> tuple[tuple[Any, Any], bool]:
    """k and v as a kernel takes them, and whether they are descriptors.

    The copy engine can read blocks of a slice of the stream, where the tile asks for it and rows begin at multiples of
    16 bytes.
    """
    if work.pieces or not tile.tma or not all(_aligned(x) for x in (k, v)):
        return (k, v), False
    from triton.tools.tensor_descriptor import TensorDescriptor

    block = [1, 1, tile.step, k.shape[-1]]
    return (TensorDescriptor.from_tensor(k, block), TensorDescriptor.from_tensor(v, block)), True


def _aligned(x: Tensor) -> bool:
    return all(byte % 16 == 0 for byte in (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3])))


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
