"""Linear attention from block to block: what sparse-linear methods add beside their softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparse_zoo.attention import Call
from sparse_zoo.blocks import members
from sparse_zoo.gather import take
from sparse_zoo.layout import Layout
from sparse_zoo.partition import Partition
from sparse_zoo.remember import remembered

EPS = 1e-5
"""Added to the sum of linear weights, as the authors' code does: 0 where there are none, gradients finite."""


def linear_attention(call: Call, blocks: Partition, wanted: Tensor) -> tuple[Tensor, int]:
    """φ(Q_i) Σ_j φ(K_j)^T V_j / (φ(Q_i) Σ_j φ(K_j)^T 1) over the wanted blocks j of block i, φ softmax of channels.

    Args:
        call: q, k and v.
        blocks: Blocks of video tokens, shared by batch items and heads.
        wanted: bool (B, H, blocks, blocks).

    Returns:
        (B, H, L, D), in float32 at least, 0 for tokens in no block and where nothing is wanted; and its FLOPs.
    """
    batch, heads, _, dim = call.q.shape
    share = heads // call.k.shape[1]
    places = _places(call.layout, blocks)
    q, k, v, pairs = (x.flatten(0, 1).unbind() for x in (call.q, call.k, call.v, wanted))
    found = []
    for i in range(batch * heads):
        # One head at a time, and again in the backward pass: sums for each block of queries are (blocks, D, D + 1).
        given = (q[i], k[i // share], v[i // share], pairs[i], places)
        found.append(checkpoint(_one_head, *given, use_reentrant=False, preserve_rng_state=False))
    each = 2 * dim * (dim + 1) * (2 * places.tokens + wanted.shape[-1] ** 2)
    return torch.stack(found).view(call.q.shape), batch * heads * each


@dataclass(frozen=True, eq=False)
class _Places:
    """Tokens in a table of blocks, and back.

    `table`, int64 (blocks, size), is the token in each slot; `held`, bool, tells which slots hold one. `back`, int64
    (L,), is the slot of each token that is one of the `tokens` video tokens.
    """

    table: Tensor
    held: Tensor
    back: Tensor
    text: Tensor
    tokens: int


@remembered(32)
def _places(layout: Layout, blocks: Partition) -> _Places:
    table = members(blocks)
    held = table >= 0
    back = torch.zeros_like(layout.sample)
    back[table[held]] = held.flatten().nonzero()[:, 0]
    return _Places(table.clamp(min=0), held, back, layout.is_text, int(held.sum()))


def _one_head(q: Tensor, k: Tensor, v: Tensor, marginal: Tensor, places: _Places) -> Tensor:
    """O_l of one batch item and head, float32 at least: q, k, v (L, D), marginal bool (blocks, blocks) -> (L, D)."""
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k, v = (take(x.to(wide), 0, places.table) for x in (q, k, v))  # (blocks, size, D)
        k = k.softmax(-1) * places.held[..., None]
        v = torch.nn.functional.pad(v, (0, 1), value=1.0)  # its last channel sums the weights
        own = k.transpose(1, 2) @ v  # (blocks, D, D + 1)
        sums = (marginal.to(wide) @ own.flatten(1)).view_as(own)
        out = q.softmax(-1) @ sums
        out = out[..., :-1] / (out[..., -1:] + EPS)
        return take(out.flatten(0, 1), 0, places.back).masked_fill(places.text[:, None], 0)
