"""FlexAttention: tokens sorted by piece, so that few 128 × 128 blocks hold the plan's pairs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from sparse_zoo.errors import refuse
from sparse_zoo.kernels.base import Kernel
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Part, Plan

BLOCK = 128
FEW_TOKENS = 4096
"""Up to this length a plan is computed though its query tokens choose one by one, so that it can be checked."""
LEAST_DIM = 16
LEAST_PIECES = 64
SHAPES = 64
"""Shapes for which it compiles before it refuses to go on."""


class Flex(Kernel):
    """One compiled `flex_attention` for each part, merged by log-sum-exp; its own autograd makes the backward.

    On the CPU, where compiled code gives no lse, it runs eagerly: forward alone, over the whole L × L, to check masks.
    Query tokens that choose one by one scatter over all blocks: such plans are refused above `FEW_TOKENS` queries.
    """

    name = "flex"
    compiles_each_shape = True
    weighs_keys = True

    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:
        """Name each unmet need: a CUDA device, or the CPU without gradients; a dtype of `DTYPES`; one head dim."""
        if q is None or v is None:
            return [] if torch.cuda.is_available() else ["needs a CUDA device for a backward pass, torch sees none"]
        device = q.device.type
        learns = torch.is_grad_enabled() and (q.requires_grad or v.requires_grad)
        return [
            reason
            for reason in (
                f"tensors are on {q.device}, it runs on CUDA and the CPU" if device not in ("cuda", "cpu") else "",
                "it has no backward on the CPU" if device == "cpu" and learns else "",
                f"dtype {q.dtype} is not float32, bfloat16 or float16" if q.dtype not in DTYPES else "",
                f"head dim of v ({v.shape[-1]}) differs from that of q ({q.shape[-1]})"
                if v.shape[-1] != q.shape[-1]
                else "",
            )
            if reason
        ]

    def run(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
        """Run FlexAttention on each part under a block mask, and merge the parts by their lse."""
        refuse("kernel 'flex'", _too_scattered(plan))
        batch, heads, _, dim = q.shape
        if dim < LEAST_DIM:
            q, k, v = (pad(x, (0, LEAST_DIM - dim)) for x in (q, k, v))
        if not torch.is_grad_enabled():
            q, k, v = q.detach(), k.detach(), v.detach()
        parts = [_attend(q, k, v, _blocks(part, batch, heads), scale, part.log_weight) for part in plan.parts]
        outs, lses = torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])
        # Where a part has no key its lse is -inf, which has no gradient to pass on.
        weights = lses.masked_fill(lses == -torch.inf, torch.finfo(lses.dtype).min).softmax(0)
        out = (weights[..., None] * outs).sum(0).to(q.dtype)
        return out[..., :dim], lses.detach().logsumexp(0)

    def executed(self, plan: Plan, batch: int, heads: int) -> int:
        """Count the pairs of all blocks that hold some pair of the plan; all pairs for a plan that `run` refuses."""
        if _too_scattered(plan):
            return batch * heads * plan.shape[0] * plan.shape[1]
        return sum(_blocks(part, batch, heads).number for part in plan.parts) * BLOCK**2


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _too_scattered(plan: Plan) -> list[str]:
    return [
        f"part {i} lets each of {plan.shape[0]} query tokens choose its keys: with more than {FEW_TOKENS} of them "
        f"nearly all blocks of {BLOCK} × {BLOCK} would hold some pair"
        for i, part in enumerate(plan.parts)
        if part.queries.is_singles and plan.shape[0] > FEW_TOKENS
    ]


@cache
def _compiled() -> Any:
    # fullgraph: past the limit of recompilations it raises, where it would otherwise turn dense.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _flex(*tensors: Tensor, **rest: Any) -> tuple[Tensor, Any]:
    call = flex_attention if tensors[0].device.type == "cpu" else _compiled()
    with torch._dynamo.config.patch(recompile_limit=SHAPES):
        out, aux = call(*tensors, **rest)
        return out, aux


@dataclass(frozen=True)
class Blocks:
    """A part as a block mask over sorted tokens.

    `q_order`, `k_order`, int64 (B|1, H|1, n): the token at each place, n a length with room; `q_place` (B|1, H|1, Lq):
    the place of each query; `number`: blocks that are multiplied, over all batch items and heads.
    """

    q_order: Tensor
    q_place: Tensor
    k_order: Tensor
    mask: BlockMask
    number: int


def _attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float, log_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out (B, H, Lq, D), lse (B, H, Lq) of one part, in stream order."""
    batch, heads = q.shape[:2]
    weigh = None
    if log_weight is not None:
        given = log_weight.float().expand(batch, heads, -1)
        weight = given.gather(2, blocks.k_order.expand(batch, heads, -1))

        def weigh(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
            return score + weight[b, h, key]

    if blocks.k_order.shape[1] > 1:
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    out, aux = _flex(
        *(_take(x, order) for x, order in ((q, blocks.q_order), (k, blocks.k_order), (v, blocks.k_order))),
        score_mod=weigh,
        block_mask=blocks.mask,
        scale=scale,
        enable_gqa=k.shape[1] != heads,
        return_aux=AuxRequest(lse=True),
    )
    return _take(out, blocks.q_place), _take(aux.lse[..., None], blocks.q_place)[..., 0]


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Rows of x (B, H, n, D) at places (B|1, H|1, m)."""
    return x.gather(2, places[..., None].expand(*x.shape[:2], -1, x.shape[-1]))


@torch.inference_mode(False)  # remembered with the part
def _blocks(part: Part, batch: int, heads: int) -> Blocks:
    known: dict[tuple[int, int], Blocks] = part.__dict__.setdefault("_blocks", {})
    if (batch, heads) not in known:
        known[batch, heads] = _build(part, batch, heads)
    return known[batch, heads]


def _build(part: Part, batch: int, heads: int) -> Blocks:
    q_labels, q_order, q_place = _sorted(part.queries)
    k_labels, k_order, _ = _sorted(part.keys)
    # Shapes with room: a film or a choice that differs a little needs no other compilation.
    room = [_room(size + 1, LEAST_PIECES) - size for size in part.table.shape[2:]]
    table = pad(part.table, (0, room[1], 0, room[0]))
    lead = (batch, heads) if part.batch_heads != (1, 1) else (1, 1)
    pairs = _per_block(q_labels, table.shape[2]) @ table.float() @ _per_block(k_labels, table.shape[3]).mT
    pairs = pairs.expand(*lead, -1, -1)
    # In one layout whatever is apart: it compiles for strides as well.
    tables = (q_labels, k_labels, table)
    of_query, of_key, edges = (x.expand(batch, heads, *x.shape[2:]).contiguous() for x in tables)

    def reached(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return edges[b, h, of_query[b, h, query], of_key[b, h, key]]

    mask = BlockMask.from_kv_blocks(
        *_listed((pairs > 0) & (pairs < BLOCK**2)),
        *_listed(pairs == BLOCK**2),
        BLOCK_SIZE=BLOCK,
        mask_mod=reached,
        seq_lengths=(q_labels.shape[-1], k_labels.shape[-1]),
    )
    number = int((pairs > 0).sum()) * (batch * heads // (lead[0] * lead[1]))
    return Blocks(q_order, q_place, k_order, mask, number)


def _sorted(pieces: Partition) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens by piece, those in none last: their labels and numbers (B|1, H|1, n) and the place of each token.

    The label of those in no piece, and of what fills up, is the number of pieces.
    """
    labels = torch.where(pieces.piece_of < 0, pieces.count, pieces.piece_of)
    labels, order = labels.sort(dim=-1, stable=True)
    room = _room(pieces.length, BLOCK) - pieces.length
    return pad(labels, (0, room), value=pieces.count), pad(order, (0, room)), order.argsort(dim=-1)


def _per_block(labels: Tensor, pieces: int) -> Tensor:
    """How many tokens of each piece are in each block: float32 (B|1, H|1, n / BLOCK, pieces)."""
    blocks = labels.unflatten(-1, (-1, BLOCK))
    held = torch.zeros(*blocks.shape[:-1], pieces, device=labels.device)
    return held.scatter_add_(-1, blocks, torch.ones_like(blocks, dtype=held.dtype))


def _listed(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, int32 (B, H, rows), and which, those first, int32 (B, H, rows, columns)."""
    return wanted.sum(-1, dtype=torch.int32), wanted.int().argsort(dim=-1, descending=True, stable=True).int()


def _room(size: int, step: int) -> int:
    """The next of four sizes an octave, all multiples of `step`."""
    step = max(step, 1 << max(0, (size - 1).bit_length() - 3))
    return -(-size // step) * step
