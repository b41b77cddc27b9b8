"""Mixture of Block Attention: each query attends to its own block and to a few more, chosen by the mean of their keys.

Paper: MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv 2502.13189.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_zoo.attention import Attention, Branch, Call, Card, Knob, Limit, Term, is_count
from sparse_zoo.blocks import joint, same_film, stretches
from sparse_zoo.errors import refuse
from sparse_zoo.layout import Layout
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered
from sparse_zoo.routing import top_chunks


@register("moba")
class MoBA(Attention):
    """The own block of keys and the best others, by q · mean(keys).

    The paper's (section 2): blocks of equal length, the gate s_i = q · mean(K of block i) without parameters, the
    top_k blocks of largest s_i, the query's own block always, which counts as one of top_k; one softmax over their
    keys. Its scaling-law models: block_tokens 512, top_k 3. The paper's models read text from left to right: no block
    after the own one is a candidate, and the own one is attended causally. Ours, for video: attention is bidirectional,
    every block of the film is a candidate and the own one is attended whole; blocks are cut from the video of a film
    in the order of the stream, the last may be shorter (its mean is over the tokens that it has), captions are in no
    block, read by all and read all. Scores are float32, ties go to the earlier block, and where a film has fewer
    blocks than top_k all are taken.

    Args:
        top_k: Blocks each query attends to, its own among them.
        block_tokens: Video tokens in a block; the count restarts at each film.
    """

    limits = Limit({"top_k": 1 << 30})
    strict = "blocks of later shots are candidates"
    anchors = ("text", "chunk")
    knob = Knob("top_k", 1, 64)
    card = Card(
        paper="MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv 2502.13189",
        granularity="query token -> block of keys",
        chosen_by="top-k of q · mean of the block's keys",
        trained="from scratch and from dense checkpoints; language models",
        claim="6.5x faster than FlashAttention at 1M tokens, 16x at 10M (prefill of a language model)",
    )
    small = {"top_k": 3, "block_tokens": 7}

    def __init__(self, *, top_k: int = 3, block_tokens: int = 512, **base: Any) -> None:
        super().__init__(**base)
        counts = {"top_k": top_k, "block_tokens": block_tokens}
        refuse(
            type(self).__name__,
            [
                f"{name} must be a whole number of at least 1, got {x!r}"
                for name, x in counts.items()
                if not is_count(x)
            ],
        )
        self.top_k, self.block_tokens = top_k, block_tokens

    def branches(self, call: Call) -> list[Branch | Term]:
        static = _static(call.layout, self.block_tokens)
        own = static.own if call.q_rows is None else static.own[call.q_rows]
        kind = own.where(own >= 0, static.blocks.count)
        others = top_chunks(
            call.q,
            call.k,
            static.blocks,
            static.others,
            kind,
            self.top_k - 1,
            on_device=self.on_device(call),
        )
        chosen = torch.cat([own.int().expand(*others.shape[:2], -1)[..., None], others], dim=-1)
        return [Branch(joint(call.layout, *Plan.routed(static.blocks, chosen).parts, q_rows=call.q_rows))]

    def routing_flops(self, call: Call) -> int:
        """Pooling, and one product per query, head and block."""
        batch, heads, length, dim = call.q.shape
        count = _static(call.layout, self.block_tokens).blocks.count
        return batch * dim * (2 * heads * length * count + call.k.shape[1] * call.k.shape[2])


@dataclass(frozen=True, eq=False)
class _Static:
    """The blocks, the own one of each token, int64 (L,), -1 for text, and which others a query may choose.

    `others`, bool (blocks + 1, blocks), is by the own block; its last row is for text, which chooses none.
    """

    blocks: Partition
    own: Tensor
    others: Tensor


@remembered(32)
def _static(layout: Layout, tokens: int) -> _Static:
    blocks = stretches(layout, tokens)
    others = same_film(blocks, blocks).fill_diagonal_(False)
    return _Static(blocks, blocks.piece_of[0, 0], torch.nn.functional.pad(others, (0, 0, 0, 1)))
