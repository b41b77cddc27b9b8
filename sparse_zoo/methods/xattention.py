"""XAttention: blocks of queries attend to the blocks of keys whose antidiagonals score highest.

Paper: XAttention: Block Sparse Attention with Antidiagonal Scoring, arXiv 2503.16428.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_zoo import scorers
from sparse_zoo.attention import Call, Card, Knob, Limit
from sparse_zoo.blockwise import Blockwise
from sparse_zoo.registry import register
from sparse_zoo.requirements import require
from sparse_zoo.selectors import Scores, heaviest


@register("xattention")
class XAttention(Blockwise):
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
        require(self, shares={"threshold": threshold}, counts={"block_tokens": block_tokens, "stride": stride})
        uneven = f"block_tokens must be a multiple of stride, got {block_tokens} and {stride}"
        require(self, uneven if block_tokens % stride else "")
        self.threshold, self.block_tokens, self.stride = threshold, block_tokens, stride

    def scores(self, call: Call) -> Scores:
        """Score a pair of blocks by its share of attention, as antidiagonals estimate it."""
        return scorers.antidiagonals(call.q, call.k, self.queries(call.layout), self.stride)

    def select(self, scores: Tensor, legal: Tensor) -> Tensor:  # noqa: ARG002
        """Keep the fewest blocks, largest first, that hold a share `threshold`."""
        return heaviest(scores.clamp(min=0), self.threshold)

    def routing_flops(self, call: Call) -> int:
        """A product of width stride · D per pair of groups."""
        batch, heads, _, dim = call.q.shape
        films = scorers.groups(self.queries(call.layout), self.stride)
        return 2 * batch * heads * dim * self.stride * sum((len(x) * x.shape[1]) ** 2 for _, x in films)
