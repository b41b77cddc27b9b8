"""SLA2: a learned router splits blocks between softmax and linear attention, and a learned ratio joins the two.

Paper: SLA2: Sparse-Linear Attention with Learnable Routing and QAT, arXiv 2602.12675.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sparse_zoo.attention import Branch, Call, Card, Knob, Limit, Term
from sparse_zoo.blocks import film_by_film, joint, pooled, same_film
from sparse_zoo.blockwise import Blockwise
from sparse_zoo.gather import take_rows
from sparse_zoo.linear import linear_attention
from sparse_zoo.registry import register
from sparse_zoo.requirements import require
from sparse_zoo.selectors import chosen, fraction_of, largest


@register("sla2")
class SLA2(Blockwise):
    """Softmax and linear attention, split and mixed by what is learned.

    **Rule**

    R = softmax(mean(Q) W_q (mean(K) W_k)^T / √D) over the blocks of the film, with learned D × D maps W_q and
    W_k. The `top_fraction` largest blocks of a row are attended by softmax, O_s; all others by linear attention, O_l.
    The output is α O_s + (1 - α) O_l, with one α for each block of queries and head.

    **Paper**

    A learned router in place of SLA's rule, and a direct split: attention is α times its normalized sparse
    part plus 1 - α times the rest, where SLA adds a projection of O_l; besides, quantization, which is not here. The
    full text is not at hand; this is what its abstract and summaries say.

    **Our choices**

    α_i = a m_i / (a m_i + 1 - m_i), with m_i the share of R_i on the chosen blocks and a = exp(learned
    number of each head), 1 at first. That is the α of an exact split if R is the attention, and the router learns
    through it. W_q and W_k start as the identity, so that the first choice is that of block means. The count is rounded
    up, ties go to the earlier block. Blocks are stretches of a film's video; text is read by all and reads all, by
    softmax.

    **Not to be confused with**

    `sla`, which also skips the blocks of least score and learns a projection of O_l.

    Args:
        top_fraction: Share of a film's blocks that goes to softmax attention, in (0, 1].
        block_tokens: Video tokens in a block.
    """

    limits = Limit({"top_fraction": 1.0})
    own_heads = "each head has a ratio of its own"
    knob = Knob("top_fraction", 0.05, 1.0)
    card = Card(
        paper="SLA2: Sparse-Linear Attention with Learnable Routing and QAT, arXiv 2602.12675",
        granularity="block of queries -> block of keys",
        chosen_by="learned maps of q and k block means, top-k; the rest by linear attention",
        trained="fine-tuned",
        claim="attention 18.6x faster than dense at 97 % sparsity, quantization included",
    )
    small = {"top_fraction": 0.3, "block_tokens": 5}

    def __init__(self, *, top_fraction: float = 0.05, block_tokens: int = 64, **base: Any) -> None:
        super().__init__(**base)
        require(self, counts={"block_tokens": block_tokens}, shares={"top_fraction": top_fraction})
        self.top_fraction, self.block_tokens = float(top_fraction), block_tokens
        self.query_map, self.key_map = (nn.Linear(self.head_dim, self.head_dim, bias=False) for _ in "qk")
        for each in (self.query_map, self.key_map):
            nn.init.eye_(each.weight)
        self.ratio = nn.Parameter(torch.zeros(self.heads))

    def branches(self, call: Call) -> list[Branch | Term]:
        """One exact branch over the chosen blocks and text, weighted by α, and a linear term over the other blocks."""
        self.require_width(call, "its maps are")
        blocks = self.queries(call.layout)
        if not blocks.count:
            return [Branch(joint(call.layout))]
        with torch.autocast(call.q.device.type, enabled=False):
            q, k = pooled(blocks, call.q), pooled(blocks, call.k)
            q, k = (x @ by.weight.to(x.dtype).mT for x, by in ((q, self.query_map), (k, self.key_map)))
            q, film = q * call.q.shape[-1] ** -0.5, same_film(blocks, blocks)
            best = chosen(q, k, film, lambda scores, legal: largest(scores, fraction_of(legal, self.top_fraction)))
            ratio = self._ratio(call, q, k, best)
        alpha = take_rows(pad(ratio, (0, 0, 0, 1), value=1.0), blocks.piece_of[0, 0] % (blocks.count + 1))
        alpha = alpha.to(call.q.dtype)
        value, flops = linear_attention(call, blocks, film & ~best)
        rest = (1 - alpha) * value.to(call.q.dtype)
        return [Branch(self.exact(call, best), alpha), Term(rest, flops)]

    def _ratio(self, call: Call, q: Tensor, k: Tensor, best: Tensor) -> Tensor:
        """α of each block of queries: (B, H, blocks, 1)."""
        odds = self.ratio[call.heads].exp()[:, None, None]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        mass = []
        for film in film_by_film(self.queries(call.layout)):
            share = (q[:, :, film] @ k[:, :, film].mT).softmax(-1)
            mass.append((share * best[:, :, film, film]).sum(-1, keepdim=True))
        held = torch.cat(mass, dim=2)
        rest = torch.where(best.sum(-1, keepdim=True) == 0, 1.0, (1 - held).clamp(min=0))
        return odds * held / (odds * held + rest)

    def routing_flops(self, call: Call) -> int:
        """Pooling and maps of q and k, and two products for each pair of blocks and head."""
        batch, heads, length, dim = call.q.shape
        count, both = self.queries(call.layout).count, call.q.shape[1] + call.k.shape[1]
        return batch * dim * (2 * 2 * heads * count**2 + both * (length + 2 * dim * count))
