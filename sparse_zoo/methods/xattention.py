"""XAttention: blocks of queries attend to the blocks of keys whose antidiagonals score highest.

Paper: XAttention: Block Sparse Attention with Antidiagonal Scoring, arXiv 2503.16428.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_zoo.attention import Attention, Call, Card, Knob, Limit, is_count
from sparse_zoo.blocks import SLICE, film_by_film, joint, stretches
from sparse_zoo.errors import refuse
from sparse_zoo.layout import Layout
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered
from sparse_zoo.selectors import heaviest


@register("xattention")
class XAttention(Attention):
    """Blocks that hold a share of attention, scored by antidiagonals.

    **Rule**

    Queries and keys are taken in groups of `stride` neighbours. A group of queries scores a group of keys with the
    antidiagonal of their square, Σ_i q[stride - 1 - i] · k[i] / (stride · √D). After a softmax over the groups of keys,
    the sum over the groups of two blocks estimates how much attention the block of queries gives to the block of keys.
    Each block of queries and head attends to the fewest blocks, largest first, that hold the share `threshold`.

    **Paper**

    - Section 2, training-free.
    - The authors' code (mit-han-lab/x-attention) has blocks of 128 and, for HunyuanVideo, stride 8, threshold 0.9 or
      0.95, no causality, and no block that is always kept: a block may leave itself out. The first 5 of 50 noise steps
      are dense (here: `dense_above`).

    **Our choices**

    - It trains; gradients do not pass through the choice.
    - Blocks are cut from the video of a film in the order of the stream. Text is in no block: it attends to everything
      and is attended by everything. HunyuanVideo's code puts text at the end of the blocked stream.
    - The last group and block may be shorter. Missing tokens add nothing to a product and are no candidates of the
      softmax; the code pads keys with zeros, which are candidates.
    - The first block is kept if it is chosen; the indexing of the code always keeps it.
    - Scores are float32; ties go to the earlier block. With threshold 1 all blocks are attended.

    **Not to be confused with**

    `svg2` and `vmoba`, which also keep a share (top-p), but score cluster or block means.

    Args:
        threshold: Share of the estimated attention that is kept, in (0, 1].
        block_tokens: Video tokens in a block of queries and of keys, a multiple of `stride`; restarts at each film.
        stride: Tokens in a group: one product estimates stride² pairs.
    """

    limits = Limit({"threshold": 1.0})
    strict = "blocks of later shots are candidates"
    anchors = ("text",)
    pools_queries = True
    knob = Knob("threshold", 0.05, 1.0)
    card = Card(
        paper="XAttention: Block Sparse Attention with Antidiagonal Scoring, arXiv 2503.16428",
        granularity="block of queries -> block of keys",
        chosen_by="share of the sum of antidiagonal scores after softmax",
        trained="training-free",
        claim="up to 13.5x faster attention than dense (prefill of a language model, up to 256k tokens)",
    )
    small = {"threshold": 0.65, "block_tokens": 8, "stride": 4}

    def __init__(self, *, threshold: float = 0.9, block_tokens: int = 128, stride: int = 8, **base: Any) -> None:
        super().__init__(**base)
        counts = {"block_tokens": block_tokens, "stride": stride}
        wrong = [
            f"{name} must be a whole number of at least 1, got {x!r}" for name, x in counts.items() if not is_count(x)
        ]
        refuse(
            type(self).__name__,
            [
                f"threshold must be in (0, 1], got {threshold!r}" if not 0 < threshold <= 1 else "",
                *wrong,
                f"block_tokens must be a multiple of stride, got {block_tokens} and {stride}"
                if not wrong and block_tokens % stride
                else "",
            ],
        )
        self.threshold, self.block_tokens, self.stride = threshold, block_tokens, stride

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:
        """Blocks × the blocks that they chose, with text."""
        blocks = stretches(layout, self.block_tokens)
        if not blocks.count:
            return joint(layout)
        wanted = torch.zeros(*q.shape[:2], blocks.count, blocks.count, dtype=torch.bool, device=q.device)
        for film, slots in _slots(layout, self.block_tokens, self.stride):
            wanted[:, :, film, film] = self._chosen(q, k, slots)
        return joint(layout, *Plan.blocks(blocks, blocks, wanted, routed=True).parts)

    def _chosen(self, q: Tensor, k: Tensor, slots: Tensor) -> Tensor:
        """The blocks of keys that each block of queries of a film attends to: bool (B, H, C, C).

        `slots`, int64 (C, groups, stride), are the tokens of each group of each block, -1 where there are fewer.
        """
        (batch, heads, _, dim), (count, groups, stride) = q.shape, slots.shape
        keys = _gathered(k, slots).repeat_interleave(heads // k.shape[1], dim=1).transpose(-1, -2)
        empty = slots[..., 0] < 0
        chosen = []
        step = max(1, SLICE // (batch * heads * count * groups * groups))
        for rows, without in zip(slots.split(step), empty.split(step), strict=True):
            scores = _gathered(q, rows.flip(-1)) @ keys / (stride * dim**0.5)
            held = scores.masked_fill(empty.flatten(), -torch.inf).softmax(-1)
            held = held.masked_fill(without.flatten()[:, None], 0)
            chosen.append(heaviest(held.view(batch, heads, -1, groups, count, groups).sum((3, 5)), self.threshold))
        return torch.cat(chosen, dim=2)

    def routing_flops(self, call: Call) -> int:
        """A product of width stride · D per pair of groups."""
        batch, heads, _, dim = call.q.shape
        films = _slots(call.layout, self.block_tokens, self.stride)
        return 2 * batch * heads * dim * self.stride * sum((len(x) * x.shape[1]) ** 2 for _, x in films)


def _gathered(x: Tensor, slots: Tensor) -> Tensor:
    """The tokens of each group side by side, 0 where there is none: (B, H, L, D) -> float32 (B, H, groups, S · D)."""
    found = x[:, :, slots.clamp(min=0)].float().masked_fill(slots[..., None] < 0, 0)
    return found.flatten(4).flatten(2, 3)


@remembered(64)
def _slots(layout: Layout, tokens: int, stride: int) -> list[tuple[slice, Tensor]]:
    """For each film with video: its blocks, and the tokens of their groups as `XAttention._chosen` takes them."""
    blocks = stretches(layout, tokens)
    piece = blocks.piece_of[0, 0]
    token = (piece >= 0).nonzero()[:, 0]
    slots = torch.full((blocks.count, tokens), -1, device=layout.device)
    slots[piece[token], torch.arange(len(token), device=layout.device) - blocks.offsets[0, 0, piece[token]]] = token
    return [(film, slots[film].unflatten(1, (-1, stride))) for film in film_by_film(blocks)]
