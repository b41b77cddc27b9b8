"""Sol-Attn: blocks above a threshold exactly, all others by their means, in one softmax.

Paper: Sol-Attn: Accelerating Video Generation Inference via On-the-Fly Attention Sparsification, arXiv 2607.24027.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from sparse_zoo.attention import Branch, Call, Card, Knob, Limit, Segment, Term
from sparse_zoo.blocks import film_by_film, joint, pooled, same_film
from sparse_zoo.blockwise import Blockwise
from sparse_zoo.errors import unknown
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register
from sparse_zoo.requirements import require

SPREADS = ("diagonal", "exact")
FLOOR = 1e-6
"""Added to the variance of scaled scores, as the authors' code does."""


@register("sol")
class SolAttn(Blockwise):
    """Blocks above a threshold exactly, the rest by their means.

    **Rule**

    Blocks of tokens have mean queries Q̄_i, keys K̄_j and values V̄_j, and s_ij = Q̄_i · K̄_j / √D. Block j is
    exact for block i if s_ij > m_i + τ σ_i or |i - j| ≤ 1, where m_i is the mean of s_i over the film's blocks and σ_i
    their spread. A query q of block i attends in one softmax to the tokens of the exact blocks and, for each other
    block j of n_j tokens, to K̄_j with weight n_j exp(q · K̄_j / √D) and value V̄_j.

    **Paper**

    Thresholding of blocks on the fly, and reuse of the same scores for what is not selected, without
    training. Its full text is not at hand: threshold, neighbours and weights are read from the authors' code
    (github.com/NVlabs/Sana, techniques/sparse_backends/sol_attn: triton_ref/fwd.py, mps/preprocess.py), which has
    blocks of 64 and, by default, τ = 1 and the "diag" spread: σ_i² = Σ_d Q̄_id² var_j(K̄_jd) / D + 1e-6, which ignores
    how channels vary together; "exact" is the variance of s_i itself.

    **Our choices**

    It trains: gradients pass through the means too. Blocks are cut from the video of each film, and
    neighbours are of one film. Text is no block: it is read by all and reads all, exactly, which is the part of the
    code's sinks.

    **Not to be confused with**

    `sla`, whose rest goes through linear attention outside the softmax, and `vsa`, whose
    coarse output is added under a gate.

    Args:
        tau: Standard deviations by which an exact block exceeds the mean score; lower is denser.
        block_tokens: Video tokens in a block.
        spread: Of which variance: "diagonal", of the channels apart, or "exact".
    """

    limits = Limit({"tau": -1e9})
    knob = Knob("tau", 3.0, -3.0)
    card = Card(
        paper="Sol-Attn: Accelerating Video Generation Inference via On-the-Fly Attention Sparsification, "
        "arXiv 2607.24027",
        granularity="block of queries -> block of keys; query token -> means of the other blocks",
        chosen_by="threshold on q · k of block means, in standard deviations",
        trained="no",
        claim="none checked",
    )
    small = {"tau": 0.7, "block_tokens": 5}

    def __init__(
        self,
        *,
        tau: float = 1.0,
        block_tokens: int = 64,
        spread: Literal["diagonal", "exact"] = "diagonal",
        **base: Any,
    ) -> None:
        super().__init__(**base)
        number = isinstance(tau, int | float) and not isinstance(tau, bool) and tau == tau
        require(
            self,
            "" if number else f"tau must be a number, got {tau!r}",
            unknown("spread", spread, SPREADS) if spread not in SPREADS else "",
            counts={"block_tokens": block_tokens},
        )
        self.tau, self.block_tokens, self.spread = float(tau), block_tokens, spread

    def branches(self, call: Call) -> list[Branch | Term]:
        """One branch over the exact blocks and text, with the means of all other blocks of the film as further keys."""
        blocks = self.queries(call.layout)
        if not blocks.count:
            return [Branch(joint(call.layout))]
        k, v = pooled(blocks, call.k), pooled(blocks, call.v)
        exact = self._exact(pooled(blocks, call.q), k, blocks)
        means = Partition.singles(blocks.count, blocks.device)
        others = Plan.blocks(blocks, means, same_film(blocks, blocks) & ~exact, routed=True)
        summary = Segment(others, k.to(call.k.dtype), v.to(call.v.dtype), blocks.sizes.to(k.dtype).log())
        return [replace(Branch(self.exact(call, exact)), segments=(summary,))]

    @torch.no_grad()
    def _exact(self, q: Tensor, k: Tensor, blocks: Partition) -> Tensor:
        """bool (B, H, blocks, blocks), from the means of queries and of keys."""
        share, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
        place = torch.arange(blocks.count, device=q.device)
        exact = (same_film(blocks, blocks) & ((place[:, None] - place).abs() <= 1)).repeat(*q.shape[:2], 1, 1)
        with torch.autocast(q.device.type, enabled=False):
            q, k = q.float() * scale, k.float().repeat_interleave(share, dim=1)
            for film in film_by_film(blocks):
                mine, keys = q[:, :, film], k[:, :, film]
                centre = keys.mean(2, keepdim=True)
                scores, mean = mine @ keys.mT, mine @ centre.mT
                if self.spread == "exact":
                    variance = (scores - mean).square().mean(-1, keepdim=True)
                else:
                    variance = mine.square() @ (keys - centre).square().mean(2, keepdim=True).mT
                exact[:, :, film, film] |= scores > mean + self.tau * (variance + FLOOR).sqrt()
        return exact
