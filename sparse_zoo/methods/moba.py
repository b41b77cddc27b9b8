"""Mixture of Block Attention (MoBA): each query attends to its own key block and to the best other blocks.

Paper: MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv 2502.13189.
"""

from __future__ import annotations

from typing import Any

import torch

from sparse_zoo.attention import Attention, Branch, Call, Card, Knob, Limit, Term
from sparse_zoo.blocks import joint, same_film, stretches
from sparse_zoo.layout import Layout
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered
from sparse_zoo.requirements import require
from sparse_zoo.routing import Candidates, from_blocks


@register("moba")
class MoBA(Attention):
    """The own key block and the best other blocks, by q · mean(keys).

    **Rule**

    The video of a film is cut into blocks of `block_tokens` consecutive tokens. A query scores block i with the gate
    s_i = q · mean(K_i), which has no parameters. It attends to its own block and to the `top_k` - 1 other blocks of
    highest score, in one softmax over their keys.

    **Paper**

    - Section 2: blocks have equal length; the own block is always attended and counts as one of `top_k`.
    - The scaling-law models use block_tokens 512 and top_k 3.
    - The models are causal language models: blocks after the own one are no candidates, and the own block is attended
      causally.

    **Our choices**

    - Attention in video is bidirectional: every block of the film is a candidate, and the own block is attended whole.
    - Blocks follow the order of the stream and restart at each film. The last block may be shorter; its mean is over
      the tokens that it has.
    - Text is in no block. Every token attends to the text of its film; text attends to the whole film.
    - Scores are float32, and ties go to the earlier block. A film with fewer blocks than `top_k` is attended whole.

    **Not to be confused with**

    - `moc`: its chunks end at frames, shots and captions, and its anchors are attended besides the `top_k` chunks.
    - `vmoba`: its blocks are 1D, 2D or 3D by layer, and a share of the similarity decides how many are kept.

    Args:
        top_k: Blocks that each query attends to, its own block included.
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
        require(self, counts={"top_k": top_k, "block_tokens": block_tokens})
        self.top_k, self.block_tokens = top_k, block_tokens

    def branches(self, call: Call) -> list[Branch | Term]:
        """One branch over the own block, the chosen blocks and text."""
        others = _others(call.layout, self.block_tokens)
        own, found = call.at(others.chunks.piece_of[0, 0]), others.best(self, call, self.top_k - 1)
        chosen = torch.cat([own.int().expand(*found.shape[:2], -1)[..., None], found], dim=-1)
        return [Branch(joint(call.layout, *Plan.routed(others.chunks, chosen).parts, q_rows=call.q_rows))]

    def routing_flops(self, call: Call) -> int:
        """Pooling, and one product per query, head and block."""
        return _others(call.layout, self.block_tokens).flops(call)


@remembered(32)
def _others(layout: Layout, tokens: int) -> Candidates:
    """The blocks of a film, all but the own one of which a query may choose."""
    blocks = stretches(layout, tokens)
    return from_blocks(blocks, same_film(blocks, blocks).fill_diagonal_(False))
