"""Sparse-Linear Attention (SLA): heavy blocks exactly, light blocks skipped, the rest by linear attention.

Paper: SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention, arXiv 2509.24006.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sparse_zoo import scorers
from sparse_zoo.attention import Branch, Call, Card, Knob, Limit, Term
from sparse_zoo.blocks import joint, same_film
from sparse_zoo.blockwise import Blockwise
from sparse_zoo.linear import linear_attention
from sparse_zoo.registry import register
from sparse_zoo.requirements import require
from sparse_zoo.selectors import Scores, ranked


@register("sla")
class SLA(Blockwise):
    """Critical blocks exactly, marginal blocks by linear attention.

    **Rule**

    P_c = softmax(pool(Q) pool(K)^T / √D) over block means ranks the blocks of keys for each block of queries. The share
    `top_fraction` of largest P_c is critical, the share `negligible` of smallest P_c is skipped, the rest is marginal.

    - O_s is softmax attention to the critical blocks.
    - O_l = φ(Q) H / φ(Q) Z, with H = Σ_j φ(K_j)^T V_j and Z = Σ_j φ(K_j)^T 1 over the marginal blocks j, and φ a
      softmax over channels.
    - The output is O_s + Proj(O_l), where Proj is a learned D × D map shared by all heads.

    **Paper**

    Section 4: blocks of 64 tokens; models are fine-tuned with shares of 5 % (critical) and 10 % (negligible).

    **Our choices**

    - We follow the paper's text. The authors' code (github.com/thu-ml/SLA) differs: its branch SLA-1 has no negligible
      blocks, and its main branch runs the linear part over all blocks (its issues 7, 11 and 18 ask about this).
    - From that code: Proj starts at zero, so that at first only the sparse part acts; shares are rounded down to whole
      blocks; 1e-5 is added to φ(Q) Z.
    - At least one block is critical, and a critical block is never negligible. Ties go to the earlier block.
    - Proj has no bias, so that it adds nothing where no block is marginal.
    - Blocks are cut from the video of each film, and shares are of the blocks of the own film.
    - Text attends exactly to everything and is attended exactly by everything. The linear part joins video to video.

    **Not to be confused with**

    - `vsa`: its coarse stage is softmax attention over block means, and covers all blocks.
    - `nsa`: its compressed branch is likewise a softmax over means.

    Args:
        top_fraction: Share of a film's blocks that are critical for each block of queries, in (0, 1].
        negligible: Share of the blocks that is skipped, in [0, 1); critical blocks are never skipped.
        block_tokens: Video tokens in a block.
    """

    limits = Limit({"top_fraction": 1.0})
    strict = "blocks of all shots are ranked together"
    knob = Knob("top_fraction", 0.05, 1.0)
    card = Card(
        paper="SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention, "
        "arXiv 2509.24006",
        granularity="block of queries -> block of keys",
        chosen_by="q · k of block means: top share exact, bottom share skipped",
        trained="fine-tuned, 2000 steps",
        claim="attention 13.7x faster than FlashAttention-2 at 95% sparsity, 2.2x end to end, on Wan2.1-1.3B",
    )
    small = {"top_fraction": 0.3, "negligible": 0.2, "block_tokens": 5}

    def __init__(
        self, *, top_fraction: float = 0.05, negligible: float = 0.1, block_tokens: int = 64, **base: Any
    ) -> None:
        super().__init__(**base)
        require(
            self,
            f"negligible must be at least 0 and below 1, got {negligible!r}" if not 0 <= negligible < 1 else "",
            shares={"top_fraction": top_fraction},
            counts={"block_tokens": block_tokens},
        )
        self.top_fraction, self.negligible, self.block_tokens = float(top_fraction), float(negligible), block_tokens
        self.proj = nn.Linear(self.head_dim, self.head_dim, bias=False)
        nn.init.zeros_(self.proj.weight)

    def branches(self, call: Call) -> list[Branch | Term]:
        """One exact branch over the critical blocks and one linear term over the marginal blocks."""
        self.require_width(call, "proj is")
        blocks = self.queries(call.layout)
        if not blocks.count:
            return [Branch(joint(call.layout))]
        shape = (*call.q.shape[:2], blocks.count, blocks.count)
        share = ranked(self.scores(call), same_film(blocks, blocks), shape, self._counts)
        return [Branch(self.exact(call, share == 0)), self._linear(call, share == 1)]

    def scores(self, call: Call) -> Scores:
        """Score a pair of blocks by the product of its means, whose order is that of P_c."""
        return scorers.means(call.q, call.k, self.queries(call.layout), self.keys(call.layout))

    def _counts(self, legal: Tensor) -> Sequence[Tensor]:
        """The number of critical blocks of each row, and of critical or marginal ones: int64 (..., 1)."""
        count = legal.sum(-1, keepdim=True)
        critical = (count.double() * self.top_fraction).long().clamp(min=1)
        negligible = (count.double() * self.negligible).long().minimum(count - critical)
        return critical, count - negligible

    def _linear(self, call: Call, marginal: Tensor) -> Term:
        """Proj(O_l), with marginal, bool (B, H, blocks, blocks)."""
        value, flops = linear_attention(call, self.queries(call.layout), marginal)
        tokens = call.layout.video_tokens
        projected = self.proj(value.to(self.proj.weight.dtype)).to(call.q.dtype)
        return Term(projected, flops + 2 * call.q.shape[0] * call.q.shape[1] * call.q.shape[-1] ** 2 * tokens)
