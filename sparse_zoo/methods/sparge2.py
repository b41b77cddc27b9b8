"""SpargeAttention2: blocks that top-k or top-p of block means keeps.

Paper: SpargeAttention2: Trainable Sparse Attention via Hybrid Top-k+Top-p Masking and Distillation Fine-Tuning,
arXiv 2602.13515.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_zoo.attention import Card, Knob, Limit
from sparse_zoo.blockwise import Blockwise
from sparse_zoo.registry import register
from sparse_zoo.requirements import require
from sparse_zoo.selectors import fraction_of, heaviest_logits, largest


@register("sparge2")
class SpargeAttention2(Blockwise):
    """The union of top-k and top-p of block means.

    **Rule**

    P = softmax(mean(Q) mean(K)^T / √D) over the blocks of the film. A block of queries attends to the blocks
    of keys that are among the `top_fraction` largest of its row of P, or among the fewest, largest first, that hold
    `top_p` of it.

    **Paper**

    - Top-k and top-p masks fail in different rows of P, so the paper joins them.
    - Models are fine-tuned towards the dense model instead of by the loss of the diffusion alone. Here that is the
      setting `distill_output` of a pretrained model: the squared difference from the velocity of the dense model, which
      `LitPretrained` adds to the loss of the flow.
    - The full text is not at hand: the rule is the abstract's, and its shares are not known here.

    **Our choices**

    The defaults of both shares are ours. Blocks of 128 queries and 64 keys are those of the authors'
    kernel (github.com/thu-ml/SpargeAttn, its README); blocks are cut from the video of a film. The count of top-k is
    rounded up; ties go to the earlier block. Text is read by all and reads all.

    **Not to be confused with**

    SpargeAttn, arXiv 2502.18137, which trains nothing, skips blocks by their
    self-similarity and quantizes.

    Args:
        top_fraction: Share of a film's blocks that is kept in any case, in (0, 1].
        top_p: Share of the estimated attention that is kept in any case, in (0, 1].
        query_tokens: Video tokens in a block of queries.
        block_tokens: Video tokens in a block of keys.
    """

    limits = Limit({"top_fraction": 1.0})
    knob = Knob("top_fraction", 0.05, 1.0)
    card = Card(
        paper="SpargeAttention2: Trainable Sparse Attention via Hybrid Top-k+Top-p Masking and Distillation "
        "Fine-Tuning, arXiv 2602.13515",
        granularity="block of queries -> block of keys",
        chosen_by="softmax of q · k of block means, top-k or top-p",
        trained="fine-tuned by distillation from the dense model",
        claim="attention 16.2x faster than dense at 95 % sparsity",
    )
    small = {"top_fraction": 0.2, "top_p": 0.43, "query_tokens": 6, "block_tokens": 5}

    def __init__(
        self,
        *,
        top_fraction: float = 0.05,
        top_p: float = 0.5,
        query_tokens: int = 128,
        block_tokens: int = 64,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        require(
            self,
            counts={"query_tokens": query_tokens, "block_tokens": block_tokens},
            shares={"top_fraction": top_fraction, "top_p": top_p},
        )
        self.top_fraction, self.top_p = float(top_fraction), float(top_p)
        self.query_tokens, self.block_tokens = query_tokens, block_tokens

    def select(self, scores: Tensor, legal: Tensor) -> Tensor:
        """Keep blocks among the `top_fraction` largest, or among the fewest that hold `top_p` of the softmax."""
        return largest(scores, fraction_of(legal, self.top_fraction)) | heaviest_logits(scores, self.top_p)
