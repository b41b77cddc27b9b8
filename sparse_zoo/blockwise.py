"""A method from parts: blocks of video queries choose blocks of video keys, by a scorer and a selector."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_zoo import scorers
from sparse_zoo.attention import Attention, Branch, Call, Term
from sparse_zoo.blocks import joint, same_film, stretches
from sparse_zoo.errors import refuse
from sparse_zoo.layout import Layout
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Plan
from sparse_zoo.selectors import Scores, choose


class Blockwise(Attention):
    """Base of methods that attend from block to block.

    A subclass overrides `select`, and what else differs: `scores` (the means of both blocks by default), `most` if
    `select` keeps a bounded number of blocks, `branches` for more than one branch or key set. Text is in no block: it
    is read by all and reads all, in the same softmax. Blocks of different films never meet.

    Blocks are stretches of a film's video of `block_tokens` tokens, those of queries of `query_tokens` if not 0; or, if
    there is a `tile`, tiles of (frames, rows, cols), which restart at each shot if `stop_at_shots`.
    """

    strict = "blocks of later shots are candidates"
    anchors = ("text",)
    pools_queries = True
    block_tokens: int = 64
    query_tokens: int = 0
    tile: tuple[int, ...] = ()
    stop_at_shots: bool = True

    def queries(self, layout: Layout) -> Partition:
        """The blocks of queries."""
        return self._cut(layout, self.query_tokens or self.block_tokens)

    def keys(self, layout: Layout) -> Partition:
        """The blocks of keys."""
        return self._cut(layout, self.block_tokens)

    def _cut(self, layout: Layout, tokens: int) -> Partition:
        return layout.tiles(self.tile, stop_at_shots=self.stop_at_shots) if self.tile else stretches(layout, tokens)

    def scores(self, call: Call) -> Scores:
        """Scores of blocks of keys, some blocks of queries at a time: scaled products of means."""
        scale = call.q.shape[-1] ** -0.5
        return scorers.means(call.q, call.k, self.queries(call.layout), self.keys(call.layout), scale=scale)

    def select(self, scores: Tensor, legal: Tensor) -> Tensor:
        """What to keep of scores (B, H, rows, K), -inf where not legal: bool, of the same shape."""
        raise NotImplementedError(f"{type(self).__name__} must define select(scores, legal)")

    def most(self, blocks: int) -> int | None:  # noqa: ARG002
        """The most blocks that `select` keeps of this number of blocks of keys; None if there is no bound."""
        return None

    def chosen(self, call: Call) -> Tensor:
        """Which blocks of keys each block of queries attends to, as `choose` gives it."""
        queries, keys = self.queries(call.layout), self.keys(call.layout)
        shape = (*call.q.shape[:2], queries.count, keys.count)
        with torch.no_grad():
            film = same_film(queries, keys)
            return choose(self.scores(call), film, shape, self.select, self.most(keys.count))

    def exact(self, call: Call, chosen: Tensor) -> Plan:
        """The plan of the chosen blocks, and of text."""
        queries, keys = self.queries(call.layout), self.keys(call.layout)
        return joint(call.layout, *Plan.blocks(queries, keys, chosen, routed=True).parts)

    def branches(self, call: Call) -> list[Branch | Term]:
        """One branch over the chosen blocks and text."""
        if not self.queries(call.layout).count:
            return [Branch(joint(call.layout))]
        return [Branch(self.exact(call, self.chosen(call)))]

    def require_width(self, call: Call, what: str) -> None:
        """Refuse v of another head dim than `head_dim`, for which `what` the method has is made."""
        width = call.v.shape[-1]
        wrong = f"v has head dim {width}; {what} for {self.head_dim}"
        refuse(type(self).__name__, [wrong] if width != self.head_dim else [])

    def routing_flops(self, call: Call) -> int:
        """Pooling of q and k, and one product for each pair of blocks and head."""
        batch, heads, length, dim = call.q.shape
        pairs = self.queries(call.layout).count * self.keys(call.layout).count
        return batch * dim * (2 * heads * pairs + (heads + call.k.shape[1]) * length)
