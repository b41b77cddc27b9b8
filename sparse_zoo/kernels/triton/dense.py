"""Large rectangles that heads and batch items share, by the vendor's dense attention on slices.

A call takes all heads, and equal rectangles at equal distances (the shots of a film) as batch items: calls of a few
heads would leave much of the device idle at their ends. The backward takes the final output and log-sum-exp of the
union, as every kernel here does. No call has a mask or is without keys, where cuDNN is known to return NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_zoo.errors import refuse
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Part
from sparse_zoo.remember import on_device, origin

PAIRS = 1 << 20
"""Mean pairs of a part's rectangles from which the vendor's kernel takes them: a call costs tens of microseconds."""
CALLS = 128
"""Query pieces of a part up to which it may: each is a call."""
TILE = 128

Rows = slice | Tensor


class Rectangle(NamedTuple):
    """Tokens of a piece of queries × tokens of all the key pieces it attends to; int64 (n,) where they are no slice."""

    queries: Rows
    keys: Rows
    pairs: int


class Run(NamedTuple):
    """`number` slices of the stream of `length` tokens, the first at `first`, each `step` after the one before."""

    first: int
    length: int
    step: int = 0
    number: int = 1


class Batch(NamedTuple):
    """Rectangles that one call takes, the i-th slice of queries with the i-th of keys; int64 (n,) for one of others."""

    queries: Run | Tensor
    keys: Run | Tensor

    @property
    def number(self) -> int:
        """How many rectangles the batch has: 1 if the queries are a list of tokens."""
        return self.queries.number if isinstance(self.queries, Run) else 1

    @property
    def rows(self) -> int:
        """Rows of queries in all rectangles of the batch."""
        return self.queries.number * self.queries.length if isinstance(self.queries, Run) else len(self.queries)


def rectangles(part: Part) -> list[Rectangle] | None:
    """The rectangles of a part that is large and dense, None of any other. Remembered; never waits for the device.

    Large and dense: made from a layout, shared by batch items and heads, of at most CALLS pieces of queries that are
    not single tokens, with at least PAIRS pairs in a rectangle on average. Parts whose keys have log-weights are none:
    the vendor's kernel takes no weights.
    """
    if part.log_weight is not None:
        return None
    if part.batch_heads != (1, 1) or not 0 < part.queries.count <= CALLS or part.queries.is_singles:
        return None
    found = origin(part)
    if found is None and part.edges.device.type != "cpu":
        return None  # made on the device, from values: to list its tokens the host would have to wait for them
    known: list[list[Rectangle]] = part.__dict__.setdefault("_dense_rectangles", [])
    if not known:
        known.append(_rectangles(part) if found is None else on_device(_rectangles(found.host), found.device))
    total = sum(rectangle.pairs for rectangle in known[0])
    return known[0] if total and total >= PAIRS * len(known[0]) else None


@torch.inference_mode(False)  # remembered with the part
def _rectangles(part: Part) -> list[Rectangle]:
    queries, keys = _listed(part.queries), _listed(part.keys)
    found = []
    for query, edges in zip(queries, part.edges[0, 0], strict=True):
        named = (edges.nonzero()[:, 0] if part.by_table else edges[edges >= 0]).tolist()
        listed = torch.cat([keys[piece] for piece in named]) if named else keys[0][:0] if keys else query[:0]
        if len(query) and len(listed):
            found.append(Rectangle(_rows(query), _rows(listed), len(query) * len(listed)))
    return found


def _listed(pieces: Partition) -> list[Tensor]:
    """The tokens of each piece of a partition that batch items and heads share."""
    tokens = torch.arange(pieces.length, device=pieces.device) if pieces.order is None else pieces.order[0, 0].long()
    offsets = pieces.offsets[0, 0].tolist()
    return [tokens[a:b] for a, b in pairwise(offsets)]


def _rows(tokens: Tensor) -> Rows:
    first = int(tokens[0])
    return slice(first, first + len(tokens)) if bool((tokens.diff() == 1).all()) else tokens


def batches(found: list[Rectangle]) -> Iterator[Batch]:
    """Rectangles in batches of equal ones at equal distances, whose keys do not overlap.

    So each rectangle of a batch adds dk and dv to rows of its own.
    """
    runs: list[Batch] = []
    for rectangle in found:
        if not isinstance(rectangle.queries, slice) or not isinstance(rectangle.keys, slice):
            yield Batch(*(_run(rows) if isinstance(rows, slice) else rows for rows in rectangle[:2]))
            continue
        queries, keys = _run(rectangle.queries), _run(rectangle.keys)
        longer = _continued(runs[-1], queries, keys) if runs else None
        if longer:
            runs[-1] = longer
        else:
            runs.append(Batch(queries, keys))
    yield from runs


def _run(rows: slice) -> Run:
    return Run(rows.start, rows.stop - rows.start)


def _continued(batch: Batch, queries: Run, keys: Run) -> Batch | None:
    """The batch with one more rectangle, if it is equal and as far from the last as that one from its predecessor."""
    longer = []
    for run, more in zip(batch, (queries, keys), strict=True):
        assert isinstance(run, Run)
        step = more.first - (run.first + (run.number - 1) * run.step)
        if more.length != run.length or step < run.length or (run.number > 1 and step != run.step):
            return None
        longer.append(Run(run.first, run.length, step, run.number + 1))
    return Batch(*longer)


def overlap(found: list[Rectangle]) -> bool:
    """Whether two rectangles may hold the same key."""
    slices = sorted((rows.start, rows.stop) for _, rows, _ in found if isinstance(rows, slice))
    return len(found) > 1 and (len(slices) < len(found) or any(b > c for (_, b), (c, _) in pairwise(slices)))


def rows_of(x: Tensor, rows: Run | Tensor) -> Tensor:
    """Some rows of x (B, H, L, n): (B, H, length, n), or (number, H, length, n) of one batch item; a view of slices."""
    if isinstance(rows, Tensor):
        return x.index_select(2, rows)
    if rows.number == 1:
        return x[:, :, rows.first : rows.first + rows.length]
    _, heads, _, width = x.shape
    _, *stride = x.stride()
    first = x.storage_offset() + rows.first * stride[1]
    return x.as_strided((rows.number, heads, rows.length, width), (rows.step * stride[1], *stride), first)


def executed(found: list[Rectangle]) -> int:
    """Pairs multiplied for one head, taking the vendor's tiles to be 128 × 128."""

    def padded(rows: Rows) -> int:
        length = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        return -(-length // TILE) * TILE

    return sum(padded(found.queries) * padded(found.keys) for found in found)


# -- engines ----------------------------------------------------------------------------------------------------------


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, H, n, D), k, v (B, H, m, D) -> out (B, H, n, D) and natural lse (B, H, n), float32."""
    given = {"query": q, "key": k, "value": v, "attn_bias": None, "compute_log_sumexp": True, "scale": scale}
    out, lse, *_ = _call(_engine(q)[0], given)
    return out, lse.reshape(q.shape[:3])


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) through this rectangle, given the union's final out and lse."""
    op = _engine(q)[1]
    dq: Tensor | None = None
    key_grads = []
    for some in cuts(k.shape[2], op):
        part, *of_keys = _backward(op, grad, q, k[:, :, some], v[:, :, some], out, lse, scale)
        dq = part if dq is None else dq.add_(part)
        key_grads.append(of_keys)
    assert dq is not None
    dk, dv = (x[0] if len(x) == 1 else torch.cat(x, dim=2) for x in zip(*key_grads, strict=True))
    return dq, dk, dv


def cuts(keys: int, op: Any) -> list[slice]:
    """The slices of keys that the backward takes one after the other: all at once where it can.

    cuDNN 9.19 gives NaN for dq if the rest of keys ÷ 128 is 64 and a log-sum-exp is below -88; with the rests 32, 21
    and 0 it did not (`make gpu`, check-dense). So 32 keys of such a rest go alone.
    """
    if op is torch.ops.aten._scaled_dot_product_cudnn_attention_backward and keys % TILE == TILE // 2:
        return [slice(0, keys - TILE // 4), slice(keys - TILE // 4, keys)]
    return [slice(0, keys)]


def _backward(
    op: Any, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # the state of a dropout that is off
    # cuDNN keeps lse with a last dimension of 1.
    ranked = lse[..., None] if op is torch.ops.aten._scaled_dot_product_cudnn_attention_backward else lse
    given = {
        "grad_out": _like(q, grad),
        "query": q,
        "key": k,
        "value": v,
        "out": _like(q, out),
        "logsumexp": ranked.contiguous(),
        "philox_seed": unused,
        "philox_offset": unused,
        "attn_bias": None,
        "cum_seq_q": None,
        "cum_seq_k": None,
        "max_q": q.shape[2],
        "max_k": k.shape[2],
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": scale,
    }
    dq, dk, dv = _call(op, given)
    return dq, dk, dv


def _like(q: Tensor, x: Tensor) -> Tensor:
    """x in the memory layout that the forward gives its output.

    torch caches cuDNN's plans by the strides of q, k and v alone: another layout of out, its gradient or lse would be
    read by the strides of an earlier call.
    """
    like = torch.empty_like(q)
    return x if x.stride() == like.stride() else like.copy_(x)


def _engine(q: Tensor) -> tuple[Any, Any]:
    """The forward and backward operators: cuDNN's where it may be used, flash attention's otherwise."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return (
            aten._scaled_dot_product_flash_attention_for_cpu,
            aten._scaled_dot_product_flash_attention_for_cpu_backward,
        )
    # cuDNN's backward adds dq up in the order in which blocks end.
    if cudnn() and not torch.are_deterministic_algorithms_enabled():
        return aten._scaled_dot_product_cudnn_attention, aten._scaled_dot_product_cudnn_attention_backward
    return aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_flash_attention_backward


def cudnn() -> bool:
    """Whether cuDNN's attention may be used."""
    return bool(torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled())


def _call(op: Any, given: dict[str, Any]) -> Any:
    """Call an operator by its schema, which differs between versions of torch: by name, defaults left alone."""
    schema = op.default._schema
    refuse(
        f"{schema.name} of torch {torch.__version__}",
        [
            f"its argument {argument.name!r} is not known to sparse_zoo; known are: {', '.join(given)}"
            for argument in schema.arguments
            if argument.name not in given and not argument.has_default_value()
        ],
    )
    return op(**{argument.name: given[argument.name] for argument in schema.arguments if argument.name in given})
