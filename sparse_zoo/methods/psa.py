"""Pyramid Sparse Attention: the more a block of keys matters, the less its keys are pooled.

Paper: PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation, arXiv 2512.04025.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_zoo import scorers
from sparse_zoo.attention import Branch, Call, Card, Knob, Limit, Segment, Term
from sparse_zoo.blocks import joint, pooled, same_film, stretches
from sparse_zoo.blockwise import Blockwise
from sparse_zoo.layout import Layout
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered
from sparse_zoo.requirements import require
from sparse_zoo.selectors import Scores, ranked

LEVELS = (2, 4, 8)
"""Tokens in a pooled key, by level of the pyramid."""


@register("psa")
class PSA(Blockwise):
    """Keys pooled the more, the less their block matters.

    **Rule**

    Each block of queries ranks the blocks of keys of its film by importance. The best `top_fraction` is
    attended token by token; the next shares `pooled_fractions` by means of 2, 4 and 8 neighbouring keys and values; the
    rest is skipped. All is one softmax; the score of a mean of n keys gains log n, since it stands for n tokens.

    **Paper**

    Multi-level pooled keys and values, levels assigned by importance, weights log 2, log 4, log 8 (rule read
    from the authors' code, github.com/ziplab/Pyramid-Sparse-Attention, src/psa_triton). Its defaults: 128 queries and
    64 keys in a block; cumulated shares 0.1 exact, 0.15, 0.15 and 0.35. Importance is the largest softmax weight of any
    pair of tokens, each query's weights taken relative to its best key, over a quarter of the tokens of each block.

    **Our choices**

    The quarter is every fourth token, where the code draws the tokens at random. At least one block is
    exact. Bounds between ranks are rounded down; the code also rounds numbers of pooled blocks up to whole tiles of its
    kernel. A last mean may be of fewer tokens, and weighs the log of how many it has. Ties go to the earlier block.
    Text is read by all and reads all, exactly. Neither the code's similarity test nor its permutations are here.

    **Not to be confused with**

    `sol`, which has one level of pooling and skips nothing.

    Args:
        top_fraction: Share of a film's blocks that is attended exactly, in (0, 1].
        pooled_fractions: Shares of the blocks whose keys are pooled by 2, 4 and 8, each in [0, 1].
        query_tokens: Video tokens in a block of queries.
        block_tokens: Video tokens in a block of keys, a multiple of 8.
    """

    limits = Limit({"top_fraction": 1.0})
    knob = Knob("top_fraction", 0.05, 1.0)
    card = Card(
        paper="PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation, arXiv 2512.04025",
        granularity="block of queries -> block of keys, exact or pooled by 2, 4 or 8",
        chosen_by="largest sampled attention weight of the pair of blocks, by rank",
        trained="no, and distilled (CogVideoX)",
        claim="none: its abstract names no figure",
    )
    small = {"top_fraction": 0.2, "pooled_fractions": (0.2, 0.1, 0.3), "query_tokens": 6, "block_tokens": 8}

    def __init__(
        self,
        *,
        top_fraction: float = 0.1,
        pooled_fractions: Sequence[float] = (0.05, 0.0, 0.2),
        query_tokens: int = 128,
        block_tokens: int = 64,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        shares = tuple(pooled_fractions)
        fits = len(shares) == len(LEVELS) and all(isinstance(x, int | float) and 0 <= x <= 1 for x in shares)
        require(
            self,
            "" if fits else f"pooled_fractions must be three numbers in [0, 1], got {pooled_fractions!r}",
            counts={"query_tokens": query_tokens, "block_tokens": block_tokens},
            shares={"top_fraction": top_fraction},
        )
        uneven = f"block_tokens must be a multiple of {LEVELS[-1]}, got {block_tokens}"
        require(self, uneven if block_tokens % LEVELS[-1] else "")
        self.shares = (float(top_fraction), *map(float, shares))
        self.query_tokens, self.block_tokens = query_tokens, block_tokens

    def scores(self, call: Call) -> Scores:
        """Score a pair of blocks by its largest product relative to the query's best key, over every fourth token."""
        queries, keys = self.queries(call.layout), self.keys(call.layout)
        return scorers.maxima(call.q, call.k, queries, keys, every=4)

    def branches(self, call: Call) -> list[Branch | Term]:
        """One branch over the exact blocks and text, with means of 2, 4 and 8 keys of pooled blocks as further keys."""
        queries, keys = self.queries(call.layout), self.keys(call.layout)
        if not queries.count:
            return [Branch(joint(call.layout))]
        shape = (*call.q.shape[:2], queries.count, keys.count)
        level = ranked(self.scores(call), same_film(queries, keys), shape, self._counts)
        segments = []
        for number, tokens in enumerate(LEVELS, 1):
            pieces, of_block = _pooled_keys(call.layout, keys, tokens)
            k, v = (pooled(pieces, x).to(x.dtype) for x in (call.k, call.v))
            plan = Plan.blocks(queries, of_block, level == number, routed=True)
            segments.append(Segment(plan, k, v, pieces.sizes.to(torch.promote_types(k.dtype, torch.float32)).log()))
        return [Branch(self.exact(call, level == 0), segments=tuple(segments))]

    def _counts(self, legal: Tensor) -> Sequence[Tensor]:
        """How many blocks of each row are exact, and how many are exact or pooled by 2, by 4, by 8: int64 (..., 1)."""
        count = legal.sum(-1, keepdim=True).double()
        bounds = (min(1.0, sum(self.shares[: n + 1])) for n in range(len(self.shares)))
        # A rounding below a whole number of blocks is none.
        return [(count * bound + 1e-9).long().clamp(min=1) for bound in bounds]

    def routing_flops(self, call: Call) -> int:
        """A product for each pair of sampled tokens and head."""
        batch, heads, length, dim = call.q.shape
        return 2 * batch * heads * dim * (-(-length // 4)) ** 2


@remembered(64)
def _pooled_keys(layout: Layout, blocks: Partition, tokens: int) -> tuple[Partition, Partition]:
    """Groups of `tokens` neighbours in the blocks, and which of the groups lie in each block."""
    pieces = stretches(layout, tokens)
    return pieces, Partition.from_labels(pieces.of(blocks.piece_of[0, 0]), blocks.count)
