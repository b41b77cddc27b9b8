"""SubBlock: blocks are chosen by the log-sum-exp over the means of their parts.

Source: sglang pull request 34148 (there is no paper).
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from sparse_zoo import scorers
from sparse_zoo.attention import Call, Card, Knob, Limit
from sparse_zoo.blocks import stretches
from sparse_zoo.blockwise import Blockwise
from sparse_zoo.registry import register
from sparse_zoo.requirements import require
from sparse_zoo.selectors import Scores, fraction_of, largest


@register("subblock")
class SubBlock(Blockwise):
    """Block scores by log-sum-exp over sub-block means, top-k.

    **Rule**

    Blocks of queries i and of keys j are cut into parts a and b, and
    score(i, j) = log Σ_{a, b} exp(mean(Q_ia) · mean(K_jb) / √D), an estimate of the softmax mass of the pair of
    blocks. Each block of queries attends to the `top_fraction` of the film's blocks with the largest score.

    **Paper**

    None: the rule is that of sglang's backend `subblock_sparse_attn` (pull request 34148, router.py),
    without training, on MiniMax-H3. Its defaults: blocks of 64, four parts on either side, sparsity 0.75, dense for the
    first ten noise steps (here: `dense_above`).

    **Our choices**

    The count is rounded up to a whole block; the code also rounds it up to a multiple of 8, which its
    kernel bills anyway. Products are float32 where the code's are bfloat16. Ties go to the earlier block; the order of
    its selector is undefined. Blocks are cut from the video of a film; text is read by all and reads all.

    **Not to be confused with**

    the block scores of `sla` and `sparge2`, which are one product of means: with one part
    on either side this is their rule.

    Args:
        top_fraction: Share of a film's blocks that each block of queries attends to, in (0, 1].
        block_tokens: Video tokens in a block, a multiple of both numbers of parts.
        query_parts: Parts that a block of queries is cut into.
        key_parts: Parts that a block of keys is cut into.
    """

    limits = Limit({"top_fraction": 1.0})
    knob = Knob("top_fraction", 0.05, 1.0)
    card = Card(
        paper="sglang pull request 34148; what it improves on: block means, as in SLA, arXiv 2509.24006",
        granularity="block of queries -> block of keys",
        chosen_by="log-sum-exp of q · k of sub-block means, top-k",
        trained="no",
        claim="denoising 1.14x faster than dense at 75 % sparsity on MiniMax-H3, 37,700 tokens, B200",
    )
    small = {"top_fraction": 0.3, "block_tokens": 8, "query_parts": 2, "key_parts": 4}

    def __init__(
        self,
        *,
        top_fraction: float = 0.25,
        block_tokens: int = 64,
        query_parts: int = 4,
        key_parts: int = 4,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        parts = {"query_parts": query_parts, "key_parts": key_parts}
        require(self, counts=parts | {"block_tokens": block_tokens}, shares={"top_fraction": top_fraction})
        wrong = [
            f"block_tokens must be a multiple of {x}, got {block_tokens}" for x in parts if block_tokens % parts[x]
        ]
        require(self, *wrong)
        self.top_fraction, self.block_tokens = float(top_fraction), block_tokens
        self.parts = (query_parts, key_parts)

    def scores(self, call: Call) -> Scores:
        """Score a pair of blocks by the log-sum-exp of the scaled products of their parts' means."""
        of_q, of_k = (stretches(call.layout, self.block_tokens // parts) for parts in self.parts)
        return scorers.sub_blocks(call.q, call.k, self.queries(call.layout), (of_q, of_k))

    def select(self, scores: Tensor, legal: Tensor) -> Tensor:
        """Keep the `top_fraction` best of the legal blocks of each row, their number rounded up."""
        return largest(scores, fraction_of(legal, self.top_fraction))

    def most(self, blocks: int) -> int:
        """The number of blocks that `select` keeps where all are legal."""
        return math.ceil(blocks * self.top_fraction)

    def routing_flops(self, call: Call) -> int:
        """Pooling of q and k, and one product for each pair of parts and head."""
        batch, heads, length, dim = call.q.shape
        pairs = self.queries(call.layout).count ** 2 * self.parts[0] * self.parts[1]
        return batch * dim * (2 * heads * pairs + (heads + call.k.shape[1]) * length)
