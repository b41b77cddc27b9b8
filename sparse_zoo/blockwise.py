"""A method from parts: blocks of video queries choose blocks of video keys, by a scorer and a selector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_zoo import scorers
from sparse_zoo.attention import Attention, Branch, Call, Term, is_count
from sparse_zoo.blocks import joint, same_film, stretches
from sparse_zoo.errors import refuse
from sparse_zoo.layout import Layout
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Plan
from sparse_zoo.selectors import Scores, choose


class Blockwise(Attention):
    """Base of methods that attend from block to block.

    A subclass overrides `select`, and what else differs: `scores` (the means of both blocks by default), `queries` and
    `keys` (stretches of `block_tokens` of a film's video by default), `branches` for more than one branch or key set.
    Text is in no block: it is read by all and reads all, in the same softmax. Blocks of different films never meet.
    """

    strict = "blocks of later shots are candidates"
    anchors = ("text",)
    pools_queries = True
    block_tokens: int = 64

    def queries(self, layout: Layout) -> Partition:
        """The blocks of queries."""
        return stretches(layout, self.block_tokens)

    def keys(self, layout: Layout) -> Partition:
        """The blocks of keys."""
        return self.queries(layout)

    def scores(self, call: Call) -> Scores:
        """Scores of blocks of keys, some blocks of queries at a time: scaled products of means."""
        scale = call.q.shape[-1] ** -0.5
        return scorers.means(call.q, call.k, self.queries(call.layout), self.keys(call.layout), scale=scale)

    def select(self, scores: Tensor, legal: Tensor) -> Tensor:
        """What to keep of scores (B, H, rows, K), -inf where not legal: bool, of the same shape."""
        raise NotImplementedError(f"{type(self).__name__} must define select(scores, legal)")

    def chosen(self, call: Call) -> Tensor:
        """Which blocks of keys each block of queries attends to: bool (B, H, Q, K)."""
        queries, keys = self.queries(call.layout), self.keys(call.layout)
        shape = (*call.q.shape[:2], queries.count, keys.count)
        with torch.no_grad():
            return choose(self.scores(call), same_film(queries, keys), shape, self.select)

    def exact(self, call: Call, chosen: Tensor) -> Plan:
        """The plan of the chosen blocks, and of text."""
        queries, keys = self.queries(call.layout), self.keys(call.layout)
        return joint(call.layout, *Plan.blocks(queries, keys, chosen, routed=True).parts)

    def branches(self, call: Call) -> list[Branch | Term]:
        """One branch over the chosen blocks and text."""
        if not self.queries(call.layout).count:
            return [Branch(joint(call.layout))]
        return [Branch(self.exact(call, self.chosen(call)))]

    def routing_flops(self, call: Call) -> int:
        """Pooling of q and k, and one product for each pair of blocks and head."""
        batch, heads, length, dim = call.q.shape
        pairs = self.queries(call.layout).count * self.keys(call.layout).count
        return batch * dim * (2 * heads * pairs + (heads + call.k.shape[1]) * length)


def require(
    method: Attention,
    *,
    counts: Mapping[str, Any] | None = None,
    shares: Mapping[str, Any] | None = None,
    more: tuple[str, ...] = (),
) -> None:
    """Raise `ZooError` for settings out of range, all of them at once.

    Args:
        method: Whose settings they are.
        counts: Settings that must be whole numbers of at least 1.
        shares: Settings that must be in (0, 1].
        more: Further reasons; empty strings are none.
    """
    refuse(
        type(method).__name__,
        [
            *(
                f"{name} must be a whole number of at least 1, got {x!r}"
                for name, x in (counts or {}).items()
                if not is_count(x)
            ),
            *(f"{name} must be in (0, 1], got {x!r}" for name, x in (shares or {}).items() if not is_share(x)),
            *more,
        ],
    )


def is_share(x: object) -> bool:
    """Whether a setting is a number in (0, 1]."""
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 < x <= 1
