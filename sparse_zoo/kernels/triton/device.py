"""What runs on the device. Imports Triton: imported from inside functions only.

Programs are numbered in one grid dimension, (batch item, head) major. Tables say which tile of tokens a program owns
and which segments of the other side it meets (`work.Work`); what batch items or heads share has a stride of 0 there.
The other side's rows lie in the order of its list. PIECES: a tile meets several segments, otherwise one. Softmax runs
in base 2; log-sum-exps in memory are natural. Rows are addressed in 64 bits: assignments × head dim pass 2^31.
"""

import inspect

import triton
import triton.language as tl

ROWS_OF = (
    "q", "k", "v", "grad", "listed_q", "listed_grad", "rows", "out", "a", "b", "x", "partial", "to", "dk", "dv",
    "means",
)  # fmt: skip
"""Tensors of rows of DIM channels. That their addresses are multiples of 16 makes wide loads of them."""


def _launched(function):
    """A kernel, compiled once for each set of dtypes and constants.

    Triton compiles another for each number that is 1 or a multiple of 16. It may for addresses of rows, where it
    matters and seldom differs, and for nothing else: lengths, counts and strides of tables change with every film.
    """
    wide = {x + end for x in ROWS_OF for end in ("", "_item", "_head", "_row", "_group")}
    parameters = inspect.signature(function).parameters.items()
    plain = [name for name, x in parameters if name not in wide and x.annotation is not tl.constexpr]
    return triton.jit(do_not_specialize=plain)(function)


LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _places(others, place, end, LISTED: tl.constexpr, MASKED: tl.constexpr):
    """The tokens at some places of a list, or of the stream itself."""
    if LISTED:
        if MASKED:
            return tl.load(others + place, mask=place < end, other=0).to(tl.int64)
        return tl.load(others + place).to(tl.int64)
    return place.to(tl.int64)


@triton.jit
def _rows(x, token, row_stride, live, DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows of x at some tokens: (tokens, DIM)."""
    at = x + token[:, None] * row_stride + tl.arange(0, DIM)[None, :]
    if MASKED:
        return tl.load(at, mask=live[:, None], other=0.0)
    return tl.load(at)


@triton.jit
def _block(
    x, item, head, first, end, row_stride,
    STEP: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """STEP rows from `first` on, (STEP, DIM): by the copy engine, or one pointer a row.

    x is a descriptor of the whole (B, H, n, DIM) with TMA, else a pointer to the first row of one head.
    """
    place = first + tl.arange(0, STEP)
    if TMA:
        block = x.load([item.to(tl.int32), head.to(tl.int32), first, 0]).reshape(STEP, DIM)
        if MASKED:
            # The copy engine knows no `end`: rows past it belong to the next piece, and 0 times their NaN is NaN.
            block = tl.where((place < end)[:, None], block, 0.0)
    else:
        block = _rows(x, place.to(tl.int64), row_stride, place < end, DIM, MASKED)
    return block


@triton.jit
def _biases(bias, place, end, MASKED: tl.constexpr):
    """What is added to the unscaled scores of the keys at some places."""
    if MASKED:
        return tl.load(bias + place, mask=place < end, other=0.0)
    return tl.load(bias + place)


@triton.jit
def _attend_step(
    q, k, v, item, head, begin, end, k_row, v_row, bias, scale, top, total, acc,
    STEP: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr, WEIGHTED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One step of online softmax over STEP keys."""
    place = begin + tl.arange(0, STEP)
    keys = _block(k, item, head, begin, end, k_row, STEP, DIM, TMA, MASKED)
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
    if WEIGHTED:
        scores += _biases(bias, place, end, MASKED)[None, :]
    if MASKED:
        scores = tl.where((place < end)[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.math.exp2(scores * scale - higher[:, None])
    shrink = tl.math.exp2(top - higher)
    total = total * shrink + tl.sum(weights, 1)
    values = _block(v, item, head, begin, end, v_row, STEP, DIM, TMA, MASKED)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit
def _attend_segment(
    q, k, v, item, head, segment, k_row, v_row, bias, scale, top, total, acc,
    STEP: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    begin, end = tl.load(segment), tl.load(segment + 1)
    whole = begin + (end - begin) // STEP * STEP
    for at in tl.range(begin, whole, STEP):
        top, total, acc = _attend_step(
            q, k, v, item, head, at, end, k_row, v_row, bias, scale, top, total, acc,
            STEP, DIM, TMA, WEIGHTED, False,
        )  # fmt: skip
    if whole < end:
        top, total, acc = _attend_step(
            q, k, v, item, head, whole, end, k_row, v_row, bias, scale, top, total, acc,
            STEP, DIM, TMA, WEIGHTED, True,
        )  # fmt: skip
    return top, total, acc


@_launched
def attend(
    q, k, v, rows, rows_lse, tokens, tiles, segments, bias, scale,
    heads, number, share,
    q_item, q_head, q_row, k_item, k_head, k_row, v_item, v_head, v_row, rows_group, rows_lse_group,
    tokens_item, tokens_head, tiles_item, tiles_head, segments_item, segments_head,
    bias_item, bias_head,
    ROWS: tl.constexpr, STEP: tl.constexpr, DIM: tl.constexpr, PIECES: tl.constexpr, TMA: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One tile of queries × all its segments of keys -> one row of partial output and log-sum-exp for each query."""
    group, tile = tl.program_id(0) // number, tl.program_id(0) % number
    item, head = (group // heads).to(tl.int64), (group % heads).to(tl.int64)
    record = tiles + item * tiles_item + head * tiles_head + tile * 4
    first, count, low, high = tl.load(record), tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    if count == 0:
        return
    row, dim = tl.arange(0, ROWS), tl.arange(0, DIM)
    live = row < count
    place = first + row
    token = tl.load(tokens + item * tokens_item + head * tokens_head + place, mask=live, other=0).to(tl.int64)
    queries = _rows(q + item * q_item + head * q_head, token, q_row, live, DIM, True)
    kv_head = head // share
    if not TMA:
        k += item * k_item + kv_head * k_head
        v += item * v_item + kv_head * v_head
    segments += item * segments_item + head * segments_head
    if WEIGHTED:
        bias += item * bias_item + head * bias_head
    scale *= LOG2_E
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    if PIECES:
        for i in tl.range(low, high):
            top, total, acc = _attend_segment(
                queries, k, v, item, kv_head, segments + i * 2, k_row, v_row, bias, scale, top, total,
                acc, STEP, DIM, TMA, WEIGHTED,
            )  # fmt: skip
    else:
        top, total, acc = _attend_segment(
            queries, k, v, item, kv_head, segments + low * 2, k_row, v_row, bias, scale, top, total,
            acc, STEP, DIM, TMA, WEIGHTED,
        )  # fmt: skip
    # Without keys: 0 / 1, and -inf + log(0).
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    to = rows + group.to(tl.int64) * rows_group + place.to(tl.int64)[:, None] * DIM + dim[None, :]
    tl.store(to, acc.to(rows.dtype.element_ty), mask=live[:, None])
    tl.store(rows_lse + group.to(tl.int64) * rows_lse_group + place, (top + tl.math.log2(total)) * LN_2, mask=live)


@triton.jit
def _grad_queries_step(
    queries, grads, lse, delta, k, v, item, head, begin, end, k_row, v_row, bias, scale, acc,
    STEP: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr, WEIGHTED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    place = begin + tl.arange(0, STEP)
    keys = _block(k, item, head, begin, end, k_row, STEP, DIM, TMA, MASKED)
    values = _block(v, item, head, begin, end, v_row, STEP, DIM, TMA, MASKED)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    if WEIGHTED:
        scores += _biases(bias, place, end, MASKED)[None, :]
    if MASKED:
        # Zero keys are not enough: with an lse near -200, exp2(0 - lse) is inf, and inf * 0 a NaN in every row.
        scores = tl.where((place < end)[None, :], scores, float("-inf"))
    weights = tl.math.exp2(scores * scale - lse[:, None])
    grad_scores = weights * (tl.dot(grads, tl.trans(values), input_precision="ieee") - delta[:, None])
    return tl.dot(grad_scores.to(keys.dtype), keys, acc, input_precision="ieee")


@triton.jit
def _grad_queries_segment(
    queries, grads, lse, delta, k, v, item, head, segment, k_row, v_row, bias, scale, acc,
    STEP: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    begin, end = tl.load(segment), tl.load(segment + 1)
    whole = begin + (end - begin) // STEP * STEP
    for at in tl.range(begin, whole, STEP):
        acc = _grad_queries_step(
            queries, grads, lse, delta, k, v, item, head, at, end, k_row, v_row, bias, scale, acc,
            STEP, DIM, TMA, WEIGHTED, False,
        )  # fmt: skip
    if whole < end:
        acc = _grad_queries_step(
            queries, grads, lse, delta, k, v, item, head, whole, end, k_row, v_row, bias, scale, acc,
            STEP, DIM, TMA, WEIGHTED, True,
        )  # fmt: skip
    return acc


@_launched
def grad_queries(
    q, k, v, grad, lse, delta, rows, known, listed_q, listed_grad, tokens, tiles, segments, bias, scale,
    heads, number, share, length,
    q_item, q_head, q_row, k_item, k_head, k_row, v_item, v_head, v_row, grad_item, grad_head, grad_row, rows_group,
    known_group, known_row,
    tokens_item, tokens_head, tiles_item, tiles_head, segments_item, segments_head,
    bias_item, bias_head,
    ROWS: tl.constexpr, STEP: tl.constexpr, DIM: tl.constexpr, PIECES: tl.constexpr, TMA: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One tile of queries × all its segments of keys -> one row of partial dq for each query. lse and delta are those
    of the union.

    `grad_keys` lists the same queries. So they are copied in the order of `tokens`, to be read there in a row instead
    of one by one: base-2 lse and delta to `known`, rows of q and grad to `listed_q` and `listed_grad`.
    """
    group, tile = tl.program_id(0) // number, tl.program_id(0) % number
    item, head = (group // heads).to(tl.int64), (group % heads).to(tl.int64)
    record = tiles + item * tiles_item + head * tiles_head + tile * 4
    first, count, low, high = tl.load(record), tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    if count == 0:
        return
    row, dim = tl.arange(0, ROWS), tl.arange(0, DIM)
    live = row < count
    place = first + row
    token = tl.load(tokens + item * tokens_item + head * tokens_head + place, mask=live, other=0).to(tl.int64)
    queries = _rows(q + item * q_item + head * q_head, token, q_row, live, DIM, True)
    grads = _rows(grad + item * grad_item + head * grad_head, token, grad_row, live, DIM, True)
    of_row = group.to(tl.int64) * length + token
    row_lse = tl.load(lse + of_row, mask=live, other=0.0) * LOG2_E
    row_delta = tl.load(delta + of_row, mask=live, other=0.0)
    known += group.to(tl.int64) * known_group + place
    tl.store(known, row_lse, mask=live)
    tl.store(known + known_row, row_delta, mask=live)
    to = group.to(tl.int64) * rows_group + place.to(tl.int64)[:, None] * DIM + dim[None, :]
    tl.store(listed_q + to, queries, mask=live[:, None])
    tl.store(listed_grad + to, grads, mask=live[:, None])
    kv_head = head // share
    if not TMA:
        k += item * k_item + kv_head * k_head
        v += item * v_item + kv_head * v_head
    segments += item * segments_item + head * segments_head
    if WEIGHTED:
        bias += item * bias_item + head * bias_head
    acc = tl.zeros([ROWS, DIM], tl.float32)
    if PIECES:
        for i in tl.range(low, high):
            acc = _grad_queries_segment(
                queries, grads, row_lse, row_delta, k, v, item, kv_head, segments + i * 2, k_row, v_row,
                bias, scale * LOG2_E, acc, STEP, DIM, TMA, WEIGHTED,
            )  # fmt: skip
    else:
        acc = _grad_queries_segment(
            queries, grads, row_lse, row_delta, k, v, item, kv_head, segments + low * 2, k_row, v_row,
            bias, scale * LOG2_E, acc, STEP, DIM, TMA, WEIGHTED,
        )  # fmt: skip
    tl.store(rows + to, (acc * scale).to(rows.dtype.element_ty), mask=live[:, None])


@triton.jit
def _grad_keys_step(
    keys, values, q, grad, known, known_row, item, head, begin, end, q_row, grad_row, bias, scale,
    grad_k, grad_v,
    STEP: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr, WEIGHTED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    place = begin + tl.arange(0, STEP)
    there = place < end
    queries = _block(q, item, head, begin, end, q_row, STEP, DIM, TMA, MASKED)
    # Weights of rows past the end are 0. So they would be without: their gradients are. But with 0 here ptxas
    # serialises the products on sm_90 (C7515).
    row_lse = tl.load(known + place, mask=there, other=float("inf"))
    scores = tl.dot(keys, tl.trans(queries), input_precision="ieee")
    if WEIGHTED:
        scores += bias[:, None]
    weights = tl.math.exp2(scores * scale - row_lse[None, :])
    grads = _block(grad, item, head, begin, end, grad_row, STEP, DIM, TMA, MASKED)
    grad_v = tl.dot(weights.to(grads.dtype), grads, grad_v, input_precision="ieee")
    row_delta = tl.load(known + known_row + place, mask=there, other=0.0)
    grad_weights = tl.dot(values, tl.trans(grads), input_precision="ieee")
    grad_scores = weights * (grad_weights - row_delta[None, :])
    grad_k = tl.dot(grad_scores.to(queries.dtype), queries, grad_k, input_precision="ieee")
    return grad_k, grad_v


@triton.jit
def _grad_keys_segment(
    keys, values, q, grad, known, known_row, item, head, segment, q_row, grad_row, bias, scale, grad_k, grad_v,
    STEP: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    begin, end = tl.load(segment), tl.load(segment + 1)
    if TMA:
        whole = begin + (end - begin) // STEP * STEP
        for at in tl.range(begin, whole, STEP):
            grad_k, grad_v = _grad_keys_step(
                keys, values, q, grad, known, known_row, item, head, at, end, q_row, grad_row, bias, scale,
                grad_k, grad_v, STEP, DIM, True, WEIGHTED, False,
            )  # fmt: skip
        if whole < end:
            grad_k, grad_v = _grad_keys_step(
                keys, values, q, grad, known, known_row, item, head, whole, end, q_row, grad_row, bias, scale,
                grad_k, grad_v, STEP, DIM, True, WEIGHTED, True,
            )  # fmt: skip
    else:
        # Invariants moved out of the loop would stay in registers through it, and some of these kernels spill.
        for at in tl.range(begin, end, STEP, disable_licm=True):
            grad_k, grad_v = _grad_keys_step(
                keys, values, q, grad, known, known_row, item, head, at, end, q_row, grad_row, bias, scale,
                grad_k, grad_v, STEP, DIM, False, WEIGHTED, True,
            )  # fmt: skip
    return grad_k, grad_v


@_launched
def grad_keys(
    q, k, v, grad, known, dk, dv, tokens, tiles, segments, bias, scale,
    heads, number, share, keys_length,
    q_item, q_head, q_row, k_item, k_head, k_row, v_item, v_head, v_row, grad_item, grad_head, grad_row,
    known_group, known_row,
    tokens_item, tokens_head, tiles_item, tiles_head, segments_item, segments_head,
    bias_item, bias_head,
    ROWS: tl.constexpr, STEP: tl.constexpr, DIM: tl.constexpr, PIECES: tl.constexpr, TMA: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One tile of keys × all its segments of queries, added to its rows of dk and dv: no other program writes them.

    The rows of q and grad, like those of `known`, are in the order of the lists that segments are parts of.
    """
    group, tile = tl.program_id(0) // number, tl.program_id(0) % number
    item, head = (group // heads).to(tl.int64), (group % heads).to(tl.int64)
    record = tiles + item * tiles_item + head * tiles_head + tile * 4
    first, count, low, high = tl.load(record), tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    if count == 0:
        return
    row, dim = tl.arange(0, ROWS), tl.arange(0, DIM)
    live = row < count
    tokens += item * tokens_item + head * tokens_head
    token = tl.load(tokens + first + row, mask=live, other=0).to(tl.int64)
    kv_head = head // share
    keys = _rows(k + item * k_item + kv_head * k_head, token, k_row, live, DIM, True)
    values = _rows(v + item * v_item + kv_head * v_head, token, v_row, live, DIM, True)
    if not TMA:
        q += item * q_item + head * q_head
        grad += item * grad_item + head * grad_head
    segments += item * segments_item + head * segments_head
    known += group.to(tl.int64) * known_group
    row_bias = bias
    if WEIGHTED:
        row_bias = tl.load(bias + item * bias_item + head * bias_head + token, mask=live, other=0.0)
    grad_k = tl.zeros([ROWS, DIM], tl.float32)
    grad_v = tl.zeros([ROWS, DIM], tl.float32)
    if PIECES:
        for i in tl.range(low, high):
            grad_k, grad_v = _grad_keys_segment(
                keys, values, q, grad, known, known_row, item, head, segments + i * 2, q_row, grad_row, row_bias,
                scale * LOG2_E, grad_k, grad_v, STEP, DIM, TMA, WEIGHTED,
            )  # fmt: skip
    else:
        grad_k, grad_v = _grad_keys_segment(
            keys, values, q, grad, known, known_row, item, head, segments + low * 2, q_row, grad_row, row_bias,
            scale * LOG2_E, grad_k, grad_v, STEP, DIM, TMA, WEIGHTED,
        )  # fmt: skip
    # Read again: kept, the tokens would take registers through the loop.
    token = tl.load(tokens + first + row, mask=live, other=0, cache_modifier=".cg").to(tl.int64)
    to = group.to(tl.int64) * keys_length * DIM + token[:, None] * DIM + dim[None, :]
    grad_k = tl.load(dk + to, mask=live[:, None], other=0.0).to(tl.float32) + grad_k * scale
    tl.store(dk + to, grad_k.to(dk.dtype.element_ty), mask=live[:, None])
    grad_v = tl.load(dv + to, mask=live[:, None], other=0.0).to(tl.float32) + grad_v
    tl.store(dv + to, grad_v.to(dv.dtype.element_ty), mask=live[:, None])


@_launched
def gather(
    x, rows, tokens, heads, number, length, x_item, x_head, x_row, rows_group, tokens_item, tokens_head,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Rows of x in the order of a list of tokens."""
    group, tile = tl.program_id(0) // number, tl.program_id(0) % number
    item, head = (group // heads).to(tl.int64), (group % heads).to(tl.int64)
    place, dim = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, DIM)
    live = place < length
    token = tl.load(tokens + item * tokens_item + head * tokens_head + place, mask=live, other=0).to(tl.int64)
    row = _rows(x + item * x_item + head * x_head, token, x_row, live, DIM, True)
    tl.store(rows + group.to(tl.int64) * rows_group + place[:, None] * DIM + dim[None, :], row, mask=live[:, None])


@_launched
def merge(
    rows, rows_lse, slots, out, lse, heads, number, length, width, rows_group, rows_lse_group,
    slots_item, slots_head, out_item, out_head, out_row, lse_item, lse_head, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of each query so far, where lse is not -inf, and its partial rows in the order of its
    slots -> output and log-sum-exp of all."""
    group, tile = tl.program_id(0) // number, tl.program_id(0) % number
    item, head = (group // heads).to(tl.int64), (group % heads).to(tl.int64)
    token, dim = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, DIM)
    live = token < length
    rows += group.to(tl.int64) * rows_group
    rows_lse += group.to(tl.int64) * rows_lse_group
    slots += item * slots_item + head * slots_head
    out += item * out_item + head * out_head
    lse += item * lse_item + head * lse_head + token
    top = tl.load(lse, mask=live, other=float("-inf")) * LOG2_E
    there = top != float("-inf")
    total = there.to(tl.float32)
    acc = _rows(out, token, out_row, there, DIM, True).to(tl.float32)
    for i in tl.range(0, width):
        place = tl.load(slots + token * width + i, mask=live, other=-1).to(tl.int64)
        there = place >= 0
        partial_lse = tl.load(rows_lse + place, mask=there, other=float("-inf")) * LOG2_E
        # Rows without keys may hold anything, and 0 times NaN is NaN.
        partial = _rows(rows, place, DIM, there & (partial_lse != float("-inf")), DIM, True).to(tl.float32)
        higher = tl.maximum(top, partial_lse)
        # -inf - -inf is no number: rows without keys so far weigh 0.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, weight = tl.math.exp2(top - base), tl.math.exp2(partial_lse - base)
        acc = acc * shrink[:, None] + partial * weight[:, None]
        total = total * shrink + weight
        top = higher
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    to = out + token[:, None] * out_row + dim[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=live[:, None])
    tl.store(lse, (top + tl.math.log2(total)) * LN_2, mask=live)


@_launched
def fold(
    partial, partial_lse, out, lse, tokens, heads, number, length,
    partial_item, partial_head, partial_row, partial_lse_item, partial_lse_head,
    out_item, out_head, out_row, lse_item, lse_head,
    ROWS: tl.constexpr, DIM: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Merge partial rows into output and log-sum-exp, in place: row i into row i, or LISTED into row tokens[i]."""
    group, tile = tl.program_id(0) // number, tl.program_id(0) % number
    item, head = (group // heads).to(tl.int64), (group % heads).to(tl.int64)
    place, dim = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, DIM)
    live = place < length
    token = _places(tokens, place, length, LISTED, True)
    out += item * out_item + head * out_head
    lse += item * lse_item + head * lse_head + token
    one = tl.load(lse, mask=live, other=float("-inf")) * LOG2_E
    partial_lse += item * partial_lse_item + head * partial_lse_head + place
    other = tl.load(partial_lse, mask=live, other=0.0) * LOG2_E
    top = tl.maximum(one, other)
    weight, more = tl.math.exp2(one - top), tl.math.exp2(other - top)
    total = weight + more
    before = _rows(out, token, out_row, live & (one != float("-inf")), DIM, True)
    acc = before.to(tl.float32) * (weight / total)[:, None]
    rows = _rows(partial + item * partial_item + head * partial_head, place, partial_row, live, DIM, True)
    acc += rows.to(tl.float32) * (more / total)[:, None]
    tl.store(out + token[:, None] * out_row + dim[None, :], acc.to(out.dtype.element_ty), mask=live[:, None])
    tl.store(lse, (top + tl.math.log2(total)) * LN_2, mask=live)


@_launched
def add_rows(
    rows, to, tokens, heads, number, length, share, rows_item, rows_head, rows_row, to_item, to_head, to_row,
    ROWS: tl.constexpr, DIM: tl.constexpr, LISTED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Sum rows over `share` heads each, and add the sums to row i, or LISTED to row tokens[i]; or, not ADD, put them
    there. `heads` are those of `to`."""
    group, tile = tl.program_id(0) // number, tl.program_id(0) % number
    item, head = (group // heads).to(tl.int64), (group % heads).to(tl.int64)
    place, dim = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, DIM)
    live = place < length
    token = _places(tokens, place, length, LISTED, True)
    at = to + item * to_item + head * to_head + token[:, None] * to_row + dim[None, :]
    acc = tl.zeros([ROWS, DIM], tl.float32)
    if ADD:
        acc += tl.load(at, mask=live[:, None], other=0.0).to(tl.float32)
    rows += item * rows_item + head * share * rows_head
    for i in tl.range(0, share):
        acc += _rows(rows + i * rows_head, place, rows_row, live, DIM, True).to(tl.float32)
    tl.store(at, acc.to(to.dtype.element_ty), mask=live[:, None])


@_launched
def add_up(
    rows, slots, out, heads, number, length, width, rows_group, slots_item, slots_head, out_item, out_head, out_row,
    ROWS: tl.constexpr, DIM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The sum of the partial rows of each query, in the order of its slots, with ADD added to what is there."""
    group, tile = tl.program_id(0) // number, tl.program_id(0) % number
    item, head = (group // heads).to(tl.int64), (group % heads).to(tl.int64)
    token, dim = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, DIM)
    live = token < length
    rows += group.to(tl.int64) * rows_group
    slots += item * slots_item + head * slots_head
    to = out + item * out_item + head * out_head + token[:, None] * out_row + dim[None, :]
    acc = tl.zeros([ROWS, DIM], tl.float32)
    if ADD:
        acc += tl.load(to, mask=live[:, None], other=0.0).to(tl.float32)
    for i in tl.range(0, width):
        place = tl.load(slots + token * width + i, mask=live, other=-1).to(tl.int64)
        acc += _rows(rows, place, DIM, place >= 0, DIM, True).to(tl.float32)
    tl.store(to, acc.to(out.dtype.element_ty), mask=live[:, None])


@_launched
def row_dots(
    a, b, out, heads, number, length, a_item, a_head, a_row, b_item, b_head, b_row,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Σ a · b over the head dim, in float32: the delta of the softmax's backward."""
    group, tile = tl.program_id(0) // number, tl.program_id(0) % number
    item, head = (group // heads).to(tl.int64), (group % heads).to(tl.int64)
    token = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = token < length
    left = _rows(a + item * a_item + head * a_head, token, a_row, live, DIM, True).to(tl.float32)
    right = _rows(b + item * b_item + head * b_head, token, b_row, live, DIM, True).to(tl.float32)
    tl.store(out + group.to(tl.int64) * length + token, tl.sum(left * right, 1), mask=live)


@_launched
def pool(
    k, means, tokens, offsets, heads, count,
    k_item, k_head, k_row, tokens_item, tokens_head, offsets_item, offsets_head,
    STEP: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The mean key of one piece, 0 for an empty one, as a sum of three numbers of the keys' dtype: together as exact as
    float32, and multiplied by tensor cores."""
    group, piece = tl.program_id(0) // count, tl.program_id(0) % count
    item, head = (group // heads).to(tl.int64), (group % heads).to(tl.int64)
    at = offsets + item * offsets_item + head * offsets_head + piece
    begin, end = tl.load(at), tl.load(at + 1)
    tokens += item * tokens_item + head * tokens_head
    k += item * k_item + head * k_head
    dim = tl.arange(0, DIM)
    total = tl.zeros([DIM], tl.float32)
    for first in tl.range(begin, end, STEP):
        place = first + tl.arange(0, STEP)
        token = tl.load(tokens + place, mask=place < end, other=0).to(tl.int64)
        total += tl.sum(_rows(k, token, k_row, place < end, DIM, True).to(tl.float32), 0)
    rest = total / tl.maximum(end - begin, 1)
    for i in tl.static_range(3):
        term = rest.to(means.dtype.element_ty)
        tl.store(means + ((group * 3 + i) * count + piece).to(tl.int64) * DIM + dim, term)
        rest -= term.to(tl.float32)


@_launched
def choose(
    q, means, legal, kind, chosen, heads, number, length, share, count, q_item, q_head, q_row,
    ROWS: tl.constexpr, STEP: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """The TOP_K legal pieces of largest q · mean for each query: best first, ties to the earlier, -1 for none.

    legal: a bit for each of COLUMNS pieces, COLUMNS // 32 words for each kind of query.
    """
    group, tile = tl.program_id(0) // number, tl.program_id(0) % number
    item, head = (group // heads).to(tl.int64), (group % heads).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    live, token = row < length, row.to(tl.int64)
    column, step = tl.arange(0, COLUMNS), tl.arange(0, STEP)
    q += item * q_item + head * q_head
    means += (item * (heads // share) + head // share) * 3 * count * DIM
    scores = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.static_range(0, DIM, STEP):
        dim = first + step
        queries = tl.load(q + token[:, None] * q_row + dim[None, :], mask=live[:, None], other=0.0)
        for i in tl.static_range(3):
            at = means + (i * count + column[None, :]) * DIM + dim[:, None]
            keys = tl.load(at, mask=(column < count)[None, :], other=0.0)
            scores = tl.dot(queries, keys, scores, input_precision="ieee")
    # A bit for each column, rather than a table of the tile: the scores then stay where the products left them, with
    # whole rows in the registers of four lanes.
    words = legal + tl.load(kind + row, mask=live, other=0) * (COLUMNS // 32)
    bit = 1 << (column % 32)
    for i in tl.static_range(COLUMNS // 32):
        word = tl.load(words + i, mask=live, other=0)
        barred = (column // 32 == i)[None, :] & ((word[:, None] & bit[None, :]) == 0)
        scores = tl.where(barred, float("-inf"), scores)
    to = chosen + (group.to(tl.int64) * length + token) * TOP_K
    for i in tl.range(0, TOP_K):
        best = tl.max(scores, 1)
        index = tl.min(tl.where(scores == best[:, None], column[None, :], COLUMNS), 1)
        tl.store(to + i, tl.where(best == float("-inf"), -1, index), mask=live)
        scores = tl.where(column[None, :] == index[:, None], float("-inf"), scores)
