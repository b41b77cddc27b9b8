"""Log-linear Sparse Attention: top-k level by level, and the coarse keys met on the way.

Paper: Trainable Log-linear Sparse Attention for Efficient Diffusion Transformers, arXiv 2512.16615.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sparse_zoo.attention import Branch, Call, Card, Knob, Limit, Segment, Term
from sparse_zoo.blocks import joint, pooled, same_film, stretches, whole_film
from sparse_zoo.blockwise import Blockwise
from sparse_zoo.layout import Layout
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered
from sparse_zoo.requirements import require
from sparse_zoo.selectors import hierarchical


@register("llsa")
class LLSA(Blockwise):
    """Hierarchical top-k, enriched with the coarse keys it met.

    **Rule**

    Queries, keys and values are averaged over B tokens, these means over B again, up to `levels`. At the
    coarsest level every piece of queries chooses, among all pieces of keys, the `top_k` of largest product of means; at
    each finer level among the children of what its parent chose. Tokens attend in one softmax to the tokens of the
    blocks that their block chose; to the level l < `levels` means that were candidates there, with weight B^l; and to
    all means of the coarsest level, with weight B^levels.

    **Paper**

    Hierarchical compression and selection, so that choosing takes O(N) products, enrichment with coarse keys
    and their reweighting. Rule and defaults (B = 16, two levels, top_k 8) are read from the authors' code
    (github.com/SingleZombie/LLSA, src/llsa/kernel): a weight multiplies exp(score), so that its logarithm is added.

    **Our choices**

    Means weigh the log of how many tokens they have, which is B^l but for the last ones of a film.
    Lengths need not be powers of B. Choices are float32, ties go to the earlier piece. Blocks are stretches of a film's
    video; the paper, on images, orders tokens by patches first. Text is read by all and reads all. `enrich=False` is
    the paper's ablation without coarse keys.

    **Not to be confused with**

    `psa`, whose pooled keys stand in for tokens that are not attended: here coarse keys
    come beside the tokens below them.

    Args:
        top_k: Pieces that each piece of queries chooses, at every level.
        block_tokens: Children of a piece, and tokens of the finest.
        levels: How often is averaged.
        enrich: Whether the means are attended too.
    """

    limits = Limit({"top_k": 1 << 30, "enrich": False})
    knob = Knob("top_k", 1, 64)
    card = Card(
        paper="Trainable Log-linear Sparse Attention for Efficient Diffusion Transformers, arXiv 2512.16615",
        granularity="block of queries -> blocks of keys, and means of coarser levels",
        chosen_by="q · k of means, top-k at each level among the children of the level above",
        trained="from scratch, pixel-space image DiT",
        claim="attention inference 28.27x, DiT training 6.09x faster than full attention on 256 × 256 pixels",
    )
    small = {"top_k": 2, "block_tokens": 3}

    def __init__(
        self, *, top_k: int = 8, block_tokens: int = 16, levels: int = 2, enrich: bool = True, **base: Any
    ) -> None:
        super().__init__(**base)
        require(
            self,
            f"block_tokens must be at least 2, got {block_tokens}" if block_tokens == 1 else "",
            counts={"top_k": top_k, "block_tokens": block_tokens, "levels": levels},
        )
        self.top_k, self.block_tokens, self.levels, self.enrich = top_k, block_tokens, levels, bool(enrich)

    def branches(self, call: Call) -> list[Branch | Term]:
        """One branch over the chosen blocks and text; if `enrich`, with the means of each level as further keys."""
        pieces, parents = _pyramid(call.layout, self.block_tokens, self.levels)
        if not pieces[-1].count:
            return [Branch(joint(call.layout))]
        q, k, v = ([pooled(piece, x) for piece in pieces] for x in (call.q, call.k, call.v))
        with torch.no_grad():
            film = same_film(pieces[0], pieces[0])
            chosen = hierarchical(q, k, parents, film, self.top_k)
        segments = []
        for level in range(self.levels) if self.enrich else ():
            if level:
                # Of each block, what was a candidate at this level: the children of what its ancestor chose above.
                ancestor = _ancestor(call.layout, self.block_tokens, self.levels, level - 1)
                plan = Plan.blocks(pieces[-1], parents[level - 1], chosen[level - 1][:, :, ancestor], routed=True)
            else:
                plan = whole_film(call.layout, pieces[0]).keep(~call.layout.is_text)
            sizes = pieces[level].sizes.to(k[level].dtype).log()
            segments.append(Segment(plan, k[level].to(call.k.dtype), v[level].to(call.v.dtype), sizes))
        return [Branch(self.exact(call, chosen[-1]), segments=tuple(segments))]

    def routing_flops(self, call: Call) -> int:
        """Pooling, all pairs of the coarsest level, and top_k · block_tokens products for each finer piece."""
        batch, heads, length, dim = call.q.shape
        pieces, _ = _pyramid(call.layout, self.block_tokens, self.levels)
        pairs = pieces[0].count ** 2
        pairs += sum(x.count * min(self.top_k, above.count) * self.block_tokens for above, x in pairwise(pieces))
        return batch * dim * (2 * heads * pairs + (heads + call.k.shape[1]) * length)


@remembered(32)
def _pyramid(layout: Layout, tokens: int, levels: int) -> tuple[list[Partition], list[Partition]]:
    """The pieces of each level, coarsest first; and which pieces each piece of the level above holds.

    The latter is a partition of the pieces, one for each level but the first.
    """
    pieces = [stretches(layout, tokens**level) for level in range(levels, 0, -1)]
    parents = [Partition.from_labels(fine.of(coarse.piece_of[0, 0]), coarse.count) for coarse, fine in pairwise(pieces)]
    return pieces, parents


@remembered(32)
def _ancestor(layout: Layout, tokens: int, levels: int, level: int) -> Tensor:
    """The piece of a level that holds each block of the finest: int64 (blocks,)."""
    pieces, _ = _pyramid(layout, tokens, levels)
    return pieces[-1].of(pieces[level].piece_of[0, 0])
