"""A plan on the device: dense rectangles by the vendor's kernel, the rest gathered, merged in a fixed order.

Rectangles run first, over all heads, straight into the output; then the rest a slab of heads at a time, whose partial
rows are merged into it. The backward needs no partial outputs: for a softmax over a disjoint union, the gradients
through one part are those of dense attention on it with the union's output and log-sum-exp in place of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
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
                for slab in _calls(batch, q, k, 0):  # one partial output, which is no more than the output
                    _dense_forward(batch, slab, tensors, scale)
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
            zero = bool(work.dense) or not work.parts
            # One part alone is added in place: rounded once, as after a sum beside it.
            in_place = k.shape[1] == q.shape[1] and (len(work.parts) == 1 or wide == torch.float32)
            kinds = (q, q.dtype, zero), (k, wide, zero or in_place), (v, wide, zero or in_place)
            grads = [
                (torch.zeros if zeros else torch.empty)(x.shape, dtype=dtype, device=x.device)
                for x, dtype, zeros in kinds
            ]
            tensors = (q, k, v, out, lse, dense_rows(grad))
            for batch in work.dense:
                # A partial dq, and cuDNN's sum of it in float32.
                for slab in _calls(batch, q, k, batch.rows * q.shape[-1] * (q.element_size() + 4)):
                    _dense_backward(batch, slab, tensors, grads, ctx.scale)
            if work.parts:
                row_bytes = work.copies * q.shape[-1] * q.element_size() + 8
                for slab in _slabs(q, k, work.rows * row_bytes + 2 * 4 * k.shape[2] * k.shape[3]):
                    _backward(slab, tensors, grads, work, ctx.scale, ctx.config, in_place)
        return grads[0], grads[1].to(k.dtype), grads[2].to(v.dtype), None, None, None


@dataclass(frozen=True)
class _Listed:
    """A part's work for the gather kernels, and which of a head's partial rows are its own.

    `listed`: its keys are a list of tokens, not the stream. `by_cudnn`: the work goes to cuDNN's variable-length
    attention, whose key pieces have `longest` tokens at most. `log_weight` (B|1, H|1, Lk): what is added to the scaled
    scores of each key, if anything is.
    """

    work: PartWork
    rows: slice
    listed: bool
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
                listed = part.keys.order is not None
                by_cudnn = config.cudnn and not work.pieces and not listed and part.log_weight is None
                longest = part.keys.longest if by_cudnn else 0
                rows = slice(first, first + number)
                parts.append(_Listed(work, rows, listed, by_cudnn, longest, part.log_weight))
                slots.append(torch.where(work.slots < 0, -1, work.slots + first) if first else work.slots)
                first += number
        lead = plan.batch_heads
        joined = slots[-1] if len(slots) <= 2 else torch.cat([x.expand(*lead, -1, -1) for x in slots], dim=-1)
        return _PlanWork(batches, overlap, parts, first, joined)

    @property
    def copies(self) -> int:
        """How many tensors of partial rows the backward holds: dq, and for our kernels also q and grad."""
        return 1 if all(part.by_cudnn for part in self.parts) else 3

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

    def bias(self, part: _Listed, scale: float) -> Tensor | None:
        """What is added to the unscaled scores of each key of its heads: (items, heads, Lk), a row's keys in a row."""
        if part.log_weight is None:
            return None
        bias = self.of(part.log_weight.float() / scale)
        return bias if bias.stride(-1) == 1 else bias.contiguous()

    def first_keys(self, k: Tensor) -> Tensor:
        """The row of a contiguous k at which the stream of each of its heads begins: int64 (items, heads)."""
        stream = torch.arange(k.shape[0] * k.shape[1], device=k.device).view(k.shape[:2]) * k.shape[2]
        return self.of(stream.repeat_interleave(self.share, dim=1))


def _slabs(q: Tensor, k: Tensor, bytes_of_a_head: int) -> Iterator[_Slab]:
    """Slabs of about as many heads each, of at most SLAB_BYTES, or one group of heads that read the same keys."""
    batch, heads = q.shape[:2]
    share = heads // k.shape[1]
    most = max(share, SLAB_BYTES // max(1, bytes_of_a_head) // share * share)
    items, number = max(1, most // heads), -(-heads // most)
    step = -(-heads // (number * share)) * share
    for item in range(0, batch, items):
        for head in range(0, heads, step):
            yield _Slab(
                batch, heads, share, slice(item, min(batch, item + items)), slice(head, min(heads, head + step))
            )


# -- rectangles -------------------------------------------------------------------------------------------------------


def _calls(batch: dense.Batch, q: Tensor, k: Tensor, bytes_of_a_head: int) -> Iterator[_Slab]:
    """A slab for each call. Where rectangles are the batch items of the call, it takes one of q."""
    for slab in _slabs(q, k, bytes_of_a_head):
        if batch.number == 1:
            yield slab
        else:
            for item in range(slab.items.start, slab.items.stop):
                yield replace(slab, items=slice(item, item + 1))


def _dense_forward(batch: dense.Batch, slab: _Slab, tensors: tuple[Tensor, ...], scale: float) -> None:
    """Merge a batch of rectangles into out and lse; tensors = (q, k, v, out, lse)."""
    _, k, v, *_ = tensors
    q, out, lse = (slab.of(tensors[i]) for i in (0, 3, 4))
    queries = dense.rows_of(q, batch.queries)
    keys, values = (_for_queries(dense.rows_of(x[slab.items, slab.kv_head], batch.keys), slab) for x in (k, v))
    partial, partial_lse = dense.forward(queries, keys, values, scale)
    partial, partial_lse = dense_rows(partial), partial_lse.contiguous()
    (out, lse), tokens = _targets(batch.queries, out, lse[..., None])
    _over_rows(
        device.fold, (partial, partial_lse, out, lse, tokens), partial.shape[:3],
        (*_strides(partial), *partial_lse.stride()[:2], *_strides(out), *lse.stride()[:2]),
        DIM=q.shape[-1], LISTED=isinstance(batch.queries, Tensor),
    )  # fmt: skip


def _dense_backward(
    batch: dense.Batch, slab: _Slab, tensors: tuple[Tensor, ...], grads: list[Tensor], scale: float
) -> None:
    """Add what goes through a batch of rectangles to grads = (dq, dk, dv); tensors = (q, k, v, out, lse, grad)."""
    _, k, v, *_ = tensors
    q, out, lse, grad, dq = (slab.of(x) for x in (tensors[0], *tensors[3:], grads[0]))
    k, v, dk, dv = (x[slab.items, slab.kv_head] for x in (k, v, *grads[1:]))
    queries, outs, asked = (dense.rows_of(x, batch.queries) for x in (q, out, grad))
    keys, values = (_for_queries(dense.rows_of(x, batch.keys), slab) for x in (k, v))
    lses = dense.rows_of(lse[..., None], batch.queries)[..., 0]
    found = dense.backward(asked, queries, keys, values, outs, lses, scale)
    for partial, total, rows in zip(found, (dq, dk, dv), (batch.queries, batch.keys, batch.keys), strict=True):
        partial = dense_rows(partial)
        (to,), tokens = _targets(rows, total)
        _add_rows(partial, to, tokens, listed=isinstance(rows, Tensor), add=True)


def _for_queries(keys: Tensor, slab: _Slab) -> Tensor:
    """One head of keys for each query head."""
    return keys if slab.share == 1 else keys.repeat_interleave(slab.share, dim=1)


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
                _gathered(q, slab.of(part.work.by_query.tokens)), k, v,
                slab.first_keys(k), slab.work(part.work), part.longest, scale,
            )  # fmt: skip
            continue
        tables, strides, number = _tables(slab, part.work.by_query)
        tile = part.work.tiles(config).attend
        keys, values, share, bias = _keys(slab, part, k, v, scale)
        blocks, tma = copied_blocks(keys, values, tile)
        _launch(
            device.attend, slab, number, tile,
            q, *blocks, own, own_lse, *tables, bias, scale, slab.shape[1], number, share,
            *_strides(q, keys, values), own.stride(0), own_lse.stride(0), *strides, *_bias_strides(bias),
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
    in_place: bool,
) -> None:
    """Put the slab's gathered parts into grads = (dq, dk, dv), or add them to what rectangles put there.

    tensors = (q, k, v, out, lse, grad). `in_place`: kernels add to dk and dv, where zeros are if nothing else.
    """
    _, k, v, *_ = tensors
    q, out, lse, grad, dq = (slab.of(x) for x in (tensors[0], *tensors[3:], grads[0]))
    length, dim = q.shape[2:]
    lse = lse.contiguous()
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    _over_rows(device.row_dots, (out, grad, delta), q.shape[:3], _strides(out, grad), DIM=dim)
    # Partial dq, and q and grad in the order of the lists.
    rows, *listed = torch.empty(work.copies, slab.groups, work.rows, dim, dtype=q.dtype, device=q.device)
    add, sums = bool(work.dense), [x[slab.items, slab.kv_head] for x in grads[1:]]
    if in_place:  # a slab of several batch items has all heads, so that its rows are contiguous
        dk, dv = sums
    else:  # half precision would lose the small terms of long sums
        dk, dv = (torch.zeros(*slab.shape, *k.shape[2:], dtype=torch.float32, device=k.device) for _ in "kv")
    for part in work.parts:
        own = rows[:, part.rows]
        if part.by_cudnn:
            tokens = slab.of(part.work.by_query.tokens)
            queries, asked, outs, lses = (_gathered(x, tokens) for x in (q, grad, out, lse[..., None]))
            own.unflatten(0, slab.shape)[:], dk_part, dv_part = cudnn.backward(
                asked, queries, k, v, outs, lses[..., 0],
                slab.first_keys(k), slab.work(part.work), part.longest, scale,
            )  # fmt: skip
            dk += dk_part
            dv += dv_part
            continue
        tables, strides, number = _tables(slab, part.work.by_query)
        known = torch.empty(slab.groups, 2, tables[0].shape[-1], dtype=torch.float32, device=q.device)
        sizes = part.work.tiles(config)
        listed_q, listed_grad = (x[:, part.rows] for x in listed)
        keys, values, share, bias = _keys(slab, part, k, v, scale)
        blocks, tma = copied_blocks(keys, values, sizes.grad_queries)
        _launch(
            device.grad_queries, slab, number, sizes.grad_queries,
            q, *blocks, grad, lse, delta, own, known, listed_q, listed_grad, *tables, bias, scale,
            slab.shape[1], number, share, length,
            *_strides(q, keys, values, grad), own.stride(0), *known.stride()[:2], *strides, *_bias_strides(bias),
            DIM=dim, PIECES=part.work.pieces, TMA=tma, WEIGHTED=bias is not None,
        )  # fmt: skip
        tables, strides, number = _tables(slab, part.work.by_key)
        queries, asked = (x.unflatten(0, slab.shape) for x in (listed_q, listed_grad))
        (queries_at, asked_at), tma = copied_blocks(queries, asked, sizes.grad_keys)
        keys, values, bias = k[slab.items, slab.kv_head], v[slab.items, slab.kv_head], slab.bias(part, scale)
        _launch(
            device.grad_keys, slab, number, sizes.grad_keys,
            queries_at, keys, values, asked_at, known, dk, dv, *tables, bias, scale,
            slab.shape[1], number, slab.share, k.shape[2],
            *_strides(queries, keys, values, asked), *known.stride()[:2], *strides, *_bias_strides(bias),
            DIM=dim, PIECES=part.work.pieces, TMA=tma, WEIGHTED=bias is not None,
        )  # fmt: skip
    slots = slab.of(work.slots)
    _over_rows(
        device.add_up, (rows, slots, dq), q.shape[:3],
        (slots.shape[-1], rows.stride(0), *slots.stride()[:2], *_strides(dq)), DIM=dim, ADD=add,
    )  # fmt: skip
    for total, x in zip(sums, (dk, dv), strict=True):
        if not in_place:
            _add_rows(x, total, x, listed=False, add=add)


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


def _keys(slab: _Slab, part: _Listed, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, int, Tensor | None]:
    """Keys, values and biases of a slab's heads in the order of the part's list, and how many heads share one of them.

    Rows that lie one after the other are read in blocks; to copy them once costs less than to gather them in each tile.
    """
    k, v, bias = k[slab.items, slab.kv_head], v[slab.items, slab.kv_head], slab.bias(part, scale)
    if not part.listed:
        return k, v, slab.share, bias
    tokens, share = part.work.by_key.tokens, slab.share
    if share > 1 and tokens.shape[1] > 1:  # heads that share keys list them in orders of their own
        k, v, share = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1), 1
    tokens = slab.of(tokens)
    if bias is not None:
        bias = bias.gather(-1, tokens.long())
    return _gathered(k, tokens[:, ::share]), _gathered(v, tokens[:, ::share]), share, bias


def _bias_strides(bias: Tensor | None) -> tuple[int, ...]:
    """Over batch items and heads."""
    return (0, 0) if bias is None else bias.stride()[:2]


def _gathered(x: Tensor, tokens: Tensor) -> Tensor:
    """Rows of x (B, H, L, n) in the order of lists of tokens (B, H, m): contiguous (B, H, m, n)."""
    rows = torch.empty(*tokens.shape, x.shape[-1], dtype=x.dtype, device=x.device)
    _over_rows(
        device.gather, (x, rows, tokens), rows.shape[:3],
        (*_strides(x), rows.stride(1), *tokens.stride()[:2]), DIM=x.shape[-1],
    )  # fmt: skip
    return rows


def copied_blocks(one: Tensor, other: Tensor, tile: Tile) -> tuple[tuple[Any, Any], bool]:
    """Rows of two tensors (B, H, n, D) as a kernel takes them, and whether they are descriptors.

    The copy engine reads `tile.step` rows at once, where the tile asks for it and rows begin at multiples of 16 bytes.
    """
    if not tile.tma or not all(_aligned(x) for x in (one, other)):
        return (one, other), False
    from triton.tools.tensor_descriptor import TensorDescriptor

    block = [1, 1, tile.step, one.shape[-1]]
    return (TensorDescriptor.from_tensor(one, block), TensorDescriptor.from_tensor(other, block)), True


def _aligned(x: Tensor) -> bool:
    return all(byte % 16 == 0 for byte in (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3])))


def _tables(slab: _Slab, work: Work) -> tuple[list[Tensor], list[int], int]:
    """The tables of a slab, their strides over batch items and heads, and the number of tiles of a head."""
    tables = [slab.of(x) for x in (work.tokens, work.tiles, work.segments)]
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
