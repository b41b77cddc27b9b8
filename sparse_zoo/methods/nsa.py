"""Native Sparse Attention (NSA): three gated branches, over block means, over chosen blocks and over a window.

Paper: Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention, arXiv 2502.11089.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_zoo.attention import Attention, Branch, Call, Card, Knob, Term
from sparse_zoo.blocks import joint, pooled, same_film, stretches, whole_film
from sparse_zoo.layout import Layout
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered
from sparse_zoo.requirements import is_count, require
from sparse_zoo.routing import Candidates, from_blocks


@register("nsa")
class NSA(Attention):
    """Block means, chosen blocks and a window, mixed by learned gates.

    **Rule**

    o = Σ_c g_c · attention_c for the three branches c, with g_c in [0, 1] learned from the token's features, per head:

    - compressed: one key and one value for each block;
    - selected: all tokens of the `top_k` blocks whose compressed keys score highest, of the first block of the film, of
      the own block and of the block before it;
    - window: the `window` blocks around the own one.

    **Paper**

    - Section 3; with l' = l = d one cut serves the compressed and the selected branch, and equation 8 gives the scores.
    - It selects 16 blocks of 64 tokens, 3 of them fixed, and its window holds the last 512 tokens.
    - Blocks are compressed by an MLP with a position embedding. Each branch has its own projections of keys and values.
    - Scores are summed over the heads that share keys, so that decoding loads fewer blocks.

    **Our choices**

    - Video has no order to mask: blocks on both sides are attended.
    - `top_k` does not count the three fixed blocks. Tokens of the first two blocks therefore attend to fewer blocks.
    - The window is a whole number of blocks around the own one, 9 blocks of 64, and is cut off at the ends of the film.
    - A block is compressed to its mean, as in the public code of fla-org. A position embedding added before a mean
      would shift all keys alike and change no softmax.
    - All branches share keys and values. Each head selects for itself. Gates are a linear layer and a sigmoid.
    - Blocks are cut from the video of each film. Text is attended by all tokens, and attends to all, in the selected
      and the window branch; it attends to the block means too.

    **Not to be confused with**

    - `vsa`: blocks of queries choose, cubes are 3D, and there is no window branch.
    - `moba`: the selected branch alone, without gates.

    Args:
        top_k: Blocks chosen by score, besides the first block of the film, the own block and the one before it.
        block_tokens: Video tokens in a block.
        window: Blocks in the window, an odd number: the own block and equally many on either side.
    """

    limits = "three branches are mixed, one of them over means of blocks"
    strict = "blocks on both sides are attended"
    anchors = ("text",)
    own_heads = "each head has gates of its own"
    knob = Knob("top_k", 1, 64)
    card = Card(
        paper="Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention, arXiv 2502.11089",
        granularity="query token -> block of keys",
        chosen_by="q · mean of the block's keys, top-k",
        trained="from scratch (language models)",
        claim="forward 9.0x, backward 6.0x, decoding 11.6x faster than full attention at 64k tokens of text",
    )
    small = {"top_k": 2, "block_tokens": 5, "window": 3}

    def __init__(self, *, top_k: int = 13, block_tokens: int = 64, window: int = 9, **base: Any) -> None:
        super().__init__(**base)
        odd = is_count(window) and window % 2
        require(
            self,
            "" if odd else f"window must be an odd whole number of at least 1, got {window!r}",
            "dim, the width of hidden, is needed for the gates" if self.dim is None else "",
            counts={"top_k": top_k, "block_tokens": block_tokens},
        )
        self.top_k, self.block_tokens, self.window = top_k, block_tokens, window
        self.gate = nn.Linear(self.dim or 0, 3 * self.heads)

    def features(self, hidden: Tensor) -> dict[str, Tensor]:
        """The gates of the compressed, the selected and the window branch: `gates`, (B, L, heads, 3)."""
        return {"gates": self.gate(hidden).sigmoid().unflatten(-1, (self.heads, 3))}

    def branches(self, call: Call) -> list[Branch | Term]:
        """The compressed branch (keys and values are block means), the selected branch and the window branch."""
        static = _static(call.layout, self.block_tokens, self.window)
        blocks = static.others.chunks
        compress, select, near = self._gates(call).split(1, dim=-1)
        fixed, window = call.narrow(static.fixed), Branch(call.narrow(static.window), near)
        if not blocks.count:
            return [Branch(fixed, select), window]
        best = static.others.best(self, call, self.top_k)
        # A fixed block is never a candidate, so that no pair is held twice.
        selected = Branch(Plan(*fixed.parts, *Plan.routed(blocks, best).parts), select)
        k, v = (pooled(blocks, x).to(x.dtype) for x in (call.k, call.v))
        return [Branch(call.narrow(whole_film(call.layout, blocks)), compress, k=k, v=v), selected, window]

    def _gates(self, call: Call) -> Tensor:
        """The gates of this call's heads, (B, H, Lq, 3)."""
        gates = self.featured(call)["gates"][:, :, call.heads].transpose(1, 2).to(call.q.dtype)
        return gates if call.q_rows is None else gates[:, :, call.q_rows]

    def routing_flops(self, call: Call) -> int:
        """Pooling of k, and one product for each query, head and block."""
        return _static(call.layout, self.block_tokens, self.window).others.flops(call)


@dataclass(frozen=True, eq=False)
class _Static:
    """What follows from the layout.

    `fixed` and `window` are the plans of the fixed blocks and of the window, with text; `others` are the blocks that a
    query may choose besides the fixed ones.
    """

    fixed: Plan
    window: Plan
    others: Candidates


@remembered(32)
def _static(layout: Layout, block_tokens: int, window: int) -> _Static:
    blocks = stretches(layout, block_tokens)
    together = same_film(blocks, blocks)
    place = torch.arange(blocks.count, device=layout.device)
    gap = place[:, None] - place
    # Blocks of a film are consecutive, so the first one is as far back as the film has earlier blocks.
    first = place - (together & (gap > 0)).sum(-1)
    fixed = together & ((gap == 0) | (gap == 1) | (place == first[:, None]))
    near = together & (gap.abs() <= window // 2)
    always, window_plan = (joint(layout, *Plan.blocks(blocks, blocks, wanted).parts) for wanted in (fixed, near))
    return _Static(always, window_plan, from_blocks(blocks, together & ~fixed))
