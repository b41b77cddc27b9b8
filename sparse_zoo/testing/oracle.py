"""What a plan means, in float64, from its pieces and edges alone: independent of the plan's own masks and kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from sparse_zoo.attention import Attention, Branch, Call, Term
from sparse_zoo.layout import Layout
from sparse_zoo.light import broadcast_shapes
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Part, Plan


def members(pieces: Partition) -> Tensor:
    """float32 (B|1, H|1, P, L): how often each piece lists each token."""
    starts, ends = pieces.offsets[..., :-1, None], pieces.offsets[..., 1:, None]
    held = pieces.length if pieces.order is None else pieces.order.shape[-1]
    place = torch.arange(held, device=pieces.device)
    inside = ((place >= starts) & (place < ends)).float()
    if pieces.order is None:
        return inside
    batch, heads = broadcast_shapes(inside.shape[:2], pieces.order.shape[:2])
    index = pieces.order.long()[:, :, None].expand(batch, heads, pieces.count, -1)
    listed = torch.zeros(batch, heads, pieces.count, pieces.length, device=pieces.device)
    return listed.scatter_add(3, index, inside.expand(batch, heads, -1, -1))


def edge_counts(part: Part) -> Tensor:
    """float32 (B|1, H|1, Q, K): how often each key piece is named for each query piece."""
    if part.edges.dtype == torch.bool:
        return part.edges.float()
    named = torch.zeros(*part.edges.shape[:3], part.keys.count + 1, device=part.edges.device)
    return named.scatter_add(3, part.edges.long() + 1, torch.ones_like(part.edges, dtype=torch.float32))[..., 1:]


def times_held(plan: Plan) -> Tensor:
    """int64 (parts, B, H, Lq, Lk): how many rectangles of each part hold each pair."""
    return torch.stack(torch.broadcast_tensors(*map(held_by, plan.parts))).long()


def held_by(part: Part) -> Tensor:
    """float32 (B|1, H|1, Lq, Lk): how many rectangles of a part hold each pair; exact, as counts are small."""
    return members(part.queries).transpose(-1, -2) @ edge_counts(part) @ members(part.keys)


def mask_of(plan: Plan) -> Tensor:
    """Who attends to whom: bool (B|1, H|1, Lq, Lk)."""
    return reduce(torch.logical_or, [held_by(part) > 0 for part in plan.parts])


def log_weights_of(plan: Plan) -> Tensor | float:
    """What the plan adds to the scaled score of each pair: float64 (B|1, H|1, Lq, Lk), or 0 without log-weights."""
    total: Tensor | float = 0.0
    for part, pairs in zip(plan.parts, times_held(plan) > 0, strict=True):
        if part.log_weight is not None:
            total = total + pairs * part.log_weight.detach().double()[:, :, None]
    return total


def masked_softmax(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None, log_weights: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """out (B, H, Lq, D), lse (B, H, Lq) in the dtype given, differentiable; rows without keys get 0 and -inf.

    `log_weights`, which broadcasts to (B, H, Lq, Lk), is added to the scaled scores.
    """
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores + (log_weights.to(scores) if isinstance(log_weights, Tensor) else log_weights)
    scores = torch.where(mask, scores, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    lse = (top + total.detach().log())[..., 0]
    return (weights / torch.where(total > 0, total, torch.ones_like(total))) @ v, lse


def masks(attention: Attention, call: Call, branch: Branch) -> Tensor:
    """Who attends to whom in a branch, with what `text_reads` makes of it: bool (B|1, H|1, Lq, Lk).

    Keys of several segments come one segment after the other.
    """
    found = []
    for segment in branch.key_sets:
        mask = mask_of(segment.plan)
        if attention.text_reads == "text" and not branch.pools_queries:
            rows = torch.arange(len(call.layout)) if call.q_rows is None else call.q_rows
            text = call.layout.is_text[rows][:, None]
            # Pooled keys are no tokens: text does not read them.
            mask = (
                mask & ~text
                if segment.k is not None
                else torch.where(text, readable_text(attention, call.layout)[rows], mask)
            )
        found.append(mask)
    return along_keys(found)


def along_keys(found: Sequence[Tensor]) -> Tensor:
    """Tensors (B|1, H|1, n, Lk) of segments, one after the other."""
    lead = broadcast_shapes(*(x.shape[:-1] for x in found))
    return torch.cat([x.expand(*lead, -1) for x in found], dim=-1)


def log_weights(call: Call, branch: Branch) -> Tensor | float:
    """What is added to the scores of each key of a branch's segments: (B|1, H|1, 1, Lk), or 0."""
    if all(x.log_weight is None for x in branch.key_sets):
        return 0.0
    lengths = [(call.k if x.k is None else x.k).shape[2] for x in branch.key_sets]
    given = [
        call.q.new_zeros(1, 1, 1, length, dtype=torch.float64) if x.log_weight is None else x.log_weight[:, :, None]
        for x, length in zip(branch.key_sets, lengths, strict=True)
    ]
    return along_keys(given)


def readable_text(attention: Attention, layout: Layout) -> Tensor:
    """Text of the own film; under strict causality of the own shot and those before: bool (L, L)."""
    seen = (layout.sample[:, None] == layout.sample) & layout.is_text
    return seen & (layout.shot <= layout.shot[:, None]) if attention.causality == "strict" else seen


def routed(attention: Attention, call: Call) -> tuple[Call, list[Branch | Term]]:
    """The call with the method's features in it, and its branches."""
    if call.hidden is not None and call.features is None:
        call = replace(call, features=attention.features(call.hidden))
    return call, attention.branches(call)


def plain(
    attention: Attention,
    call: Call,
    dtype: torch.dtype | None = torch.float64,
    branches: Sequence[Branch | Term] | None = None,
) -> Tensor:
    """Masked softmax of each branch, weighted and summed: what `branches` mean, by default the method's for this call.

    Args:
        attention: The method; its `text_reads` and causality decide what text may read.
        call: What it is given.
        dtype: Of all that is computed; None for that of q.
        branches: Judged instead of the method's own.

    Returns:
        The output, (B, H, Lq, Dv).
    """
    if branches is None:
        call, branches = routed(attention, call)
    dtype = dtype or call.q.dtype
    is_text = call.layout.is_text if call.q_rows is None else call.layout.is_text[call.q_rows]
    silent = is_text & (attention.text_reads == "text")
    total = torch.zeros((), dtype=dtype, device=call.q.device)
    for branch in branches:
        if not isinstance(branch, Branch):
            total = total + branch.value.to(dtype).masked_fill(silent[:, None], 0)
            continue
        q, k, v = (own.to(dtype) for own in inputs_of(branch, call))
        out, _ = masked_softmax(q, k, v, masks(attention, call, branch), log_weights=log_weights(call, branch))
        if branch.rows is not None:
            # A token whose text is silent may still read a query that is text.
            reads_text = False if branch.pools_queries else silent[branch.rows.clamp(min=0)]
            out = at_rows(out, branch.rows.masked_fill(silent & ~torch.as_tensor(reads_text), -1))
        weight = branch.weight.to(dtype) if isinstance(branch.weight, Tensor) else branch.weight
        total = total + weight * out
    return total


def at_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x (B, H, P, n) at rows, int64 (Lq,) or (B|1, H|1, Lq): 0 where -1."""
    x = torch.nn.functional.pad(x, (0, 0, 1, 0))
    if rows.dim() == 1:
        return x[:, :, rows + 1]
    lead = broadcast_shapes(x.shape[:2], rows.shape[:2])
    index = (rows + 1)[..., None].expand(*lead, -1, x.shape[-1])
    return x.expand(*lead, -1, -1).gather(2, index)


EAGER = 2.0
"""Below float64 a result may err this many times as much as plain masked softmax in the same precision."""


def bound(dtype: torch.dtype, want: Tensor, eager: Tensor) -> float:
    """How far a result in `dtype` may be from the oracle's, given what plain softmax in that dtype makes of it.

    Besides, the result itself is rounded once, and what led to it is a few times in float32.
    """
    finite = torch.isfinite(want)
    if not bool(finite.any()):
        return 0.0
    want, eager = want.detach().double()[finite], eager.detach().double()[finite]
    rounding = torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    return EAGER * float((eager - want).abs().max()) + rounding * max(1.0, float(want.abs().max()))


def inputs_of(branch: Branch, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The q, k, v that a branch reads: its own, or the call's; those of several segments one after the other."""
    return (
        call.q if branch.q is None else branch.q,
        torch.cat([call.k if x.k is None else x.k for x in branch.key_sets], dim=2),
        torch.cat([call.v if x.v is None else x.v for x in branch.key_sets], dim=2),
    )
