"""Video Mixture of Block Attention: blocks in time, in space, in both by turns; a share of a head's similarity kept.

Paper: VMoBA: Mixture-of-Block Attention for Video Diffusion Models, arXiv 2506.23858.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sparse_zoo.attention import Attention, Branch, Call, Card, Knob, Limit, Term, is_count
from sparse_zoo.blocks import film_by_film, heaviest, joint, largest, products
from sparse_zoo.budgets import weights, within_budget
from sparse_zoo.errors import ZooError, refuse, unknown
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered

SCOPES = ("query", "head", "global")
WHOLE = 1 << 30
"""A tile's size along an axis that it spans."""


@register("vmoba")
class VMoBA(Attention):
    """The most similar pairs of a query and a block, up to a share.

    The paper's (section 3): blocks of keys are cut by turns from layer to layer, 1D (`temporal` frames), 2D (`spatial`
    patches through all frames), 3D (`spatiotemporal` cuboids); a query's similarity to a block is q · mean(keys);
    pairs of a query and a block compete over a whole head ("head"), and the fewest are kept whose similarities add up
    to a share `threshold` of all. The authors' code (KwaiVGI/VMoBA): similarities are first moved and scaled to
    0 … 1 over the scope; the own block is kept always, counts towards the share, and the others fill it up, largest
    first; scope "query" (each query and head by itself) and "global" (all heads at once); or a number of blocks
    instead of a share, `top_k` for each query, the own one among them, that a scope's queries spend together. The
    paper trains at threshold 0.25; block sizes are those of FastVideo's port for Wan 1.3B.

    Ours: batch items and films never compete, text does not either (it is read by all and reads all); sizes need not
    divide the film; ties go to the earlier query, then head, then block; where all similarities of a scope are equal
    they weigh the same; with a share of 1 everything is kept, what weighs 0 too. The code keeps at least one other
    block in each scope, even where the own ones hold the share: here it is not kept. Over a head or all heads nothing
    is sorted: `within_budget` finds the least similarity that is kept, exactly, similarities being rounded to 2^-24 of
    their range, and products are made anew in each of its four passes. Sets of very different sizes make
    indices longer than a table: edges are a byte for each head, query and block.

    Args:
        threshold: Share of the scope's similarity that is kept, in (0, 1]; null: by top_k.
        top_k: Blocks for each query, its own among them, on average over the scope; null: by threshold.
        scope: Where pairs compete: for each "query" (and head), over a "head", or "global", over all heads of an item;
            then a head depends on the others, and some heads alone (sharded) are refused.
        temporal: Frames in a 1D block (layers 0, 3, …).
        spatial: Rows and columns in a 2D block, all frames (layers 1, 4, …).
        spatiotemporal: Frames, rows and columns in a 3D block (layers 2, 5, …).
        stop_at_shots: Blocks restart at each shot, so that none holds frames of two.
    """

    limits = Limit({"threshold": 1.0, "top_k": None})
    strict = "blocks of later shots are candidates"
    anchors = ("text", "chunk")
    knob = Knob("threshold", 0.05, 1.0)
    card = Card(
        paper="VMoBA: Mixture-of-Block Attention for Video Diffusion Models, arXiv 2506.23858",
        granularity="query token -> 1D, 2D or 3D block of keys, by layer",
        chosen_by="share of q · mean of the block's keys, over a head",
        trained="from Wan 2.1 1.3B; also without training",
        claim="2.92x fewer FLOPs, 1.48x faster training than full attention at 55k tokens (93 × 576 × 1024)",
    )
    small = {"threshold": 0.4, "temporal": 1, "spatial": (2, 2), "spatiotemporal": (2, 2, 2)}

    def __init__(
        self,
        *,
        threshold: float | None = 0.25,
        top_k: int | None = None,
        scope: Literal["query", "head", "global"] = "head",
        temporal: int = 2,
        spatial: Sequence[int] = (3, 4),
        spatiotemporal: Sequence[int] = (4, 6, 4),
        stop_at_shots: bool = True,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        tiles = {"temporal": (temporal,), "spatial": tuple(spatial), "spatiotemporal": tuple(spatiotemporal)}
        refuse(
            type(self).__name__,
            [
                f"one of threshold and top_k must be given, the other null, got {threshold!r} and {top_k!r}"
                if (threshold is None) == (top_k is None)
                else "",
                f"threshold must be in (0, 1], got {threshold!r}"
                if threshold is not None and not 0 < threshold <= 1
                else "",
                f"top_k must be a whole number of at least 1, got {top_k!r}"
                if top_k is not None and not is_count(top_k)
                else "",
                unknown("scope", scope, SCOPES) if scope not in SCOPES else "",
                *(
                    f"{name} must be {axes} whole number{'s' * (axes > 1)} of at least 1, got {tile!r}"
                    for axes, (name, tile) in enumerate(tiles.items(), 1)
                    if len(tile) != axes or not all(map(is_count, tile))
                ),
            ],
        )
        self.threshold, self.top_k, self.scope = threshold, top_k or 0, scope
        self.tiles = ((temporal, WHOLE, WHOLE), (WHOLE, *tiles["spatial"]), tiles["spatiotemporal"])
        self.stop_at_shots = bool(stop_at_shots)
        self.pools_queries = scope != "query"
        self.needs_all_heads = "with scope 'global' all heads share a budget" if scope == "global" else None

    def branches(self, call: Call) -> list[Branch | Term]:
        if self.scope == "global" and call.q.shape[1] != self.heads:
            raise ZooError(f"vmoba: scope 'global' needs all {self.heads} heads at once, got {call.q.shape[1]}")
        blocks = self._blocks(call)
        chosen = Plan.routed(blocks, self._chosen(call, blocks)).parts if blocks.count else ()
        return [Branch(joint(call.layout, *chosen, q_rows=call.q_rows))]

    def _blocks(self, call: Call) -> Partition:
        return call.layout.tiles(self.tiles[call.layer % 3], stop_at_shots=self.stop_at_shots)

    @torch.no_grad()
    def _chosen(self, call: Call, blocks: Partition) -> Tensor:
        """bool (B, H, Lq, C)"""
        means = blocks.mean(call.k.float())
        own = blocks.piece_of[0, 0] if call.q_rows is None else blocks.piece_of[0, 0, call.q_rows]
        choose = self._by_query if self.scope == "query" else self._together
        chosen = torch.zeros(*call.q.shape[:3], blocks.count, dtype=torch.bool, device=call.q.device)
        for film, tokens in _films(blocks):
            # Which of some queries are of this film a GPU would have to tell: all choose, and the others' is dropped.
            rows = tokens if call.q_rows is None else torch.arange(len(call.q_rows), device=call.q.device)
            of_film, start = own[rows] - film.start, 0
            for some in choose(call.q[:, :, rows], means[:, :, film], of_film):
                end = start + some.shape[2]
                if call.q_rows is not None:
                    mine = of_film[start:end, None]
                    some &= (mine >= 0) & (mine < film.stop - film.start)
                chosen[:, :, rows[start:end], film], start = some, end
        return chosen

    def _by_query(self, q: Tensor, means: Tensor, own: Tensor) -> Iterator[Tensor]:
        """What queries (B, H, n, D) choose, each by itself, of the blocks of their film: some rows of (B, H, n, C).

        means (B, Hk, C, D); `own`, int64 (n,), is the block of each query.
        """
        for rows, scores in products(q, means):
            mine = _is(own[rows], scores)
            if self.threshold is None:
                yield largest(scores.masked_fill(mine, torch.inf), self.top_k)
            else:
                scale = weights(scores, scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True))
                yield heaviest(scale, self.threshold, first=mine)

    def _together(self, q: Tensor, means: Tensor, own: Tensor) -> Iterator[Tensor]:
        """As `_by_query`, but pairs compete over a head, or over all heads."""
        batch, heads, length, _ = q.shape
        across = self.scope == "global"

        def slices() -> Iterator[tuple[Tensor, Tensor]]:
            for rows, scores in products(q, means):
                pair = scores, _is(own[rows], scores)
                a, b = (x.transpose(1, 2).flatten(1) if across else x.flatten(2).flatten(0, 1) for x in pair)
                yield a, b

        count = self.top_k * length * (heads if across else 1)
        for kept in within_budget(slices, share=self.threshold, count=count):
            order = (batch, -1, heads, means.shape[2]) if across else (batch, heads, -1, means.shape[2])
            yield kept.view(order).transpose(1, 2) if across else kept.view(order)

    def routing_flops(self, call: Call) -> int:
        """Pooling, and a product per query, head and block in each pass."""
        (batch, heads, _, dim), blocks = call.q.shape, self._blocks(call)
        count = call.q.shape[2]
        pairs: int = sum(
            (film.stop - film.start) * (len(tokens) if call.q_rows is None else count)
            for film, tokens in _films(blocks)
        )
        passes = 1 if self.scope == "query" or self.threshold == 1 else 4
        return batch * dim * (2 * heads * passes * pairs + call.k.shape[1] * call.k.shape[2])


def _is(own: Tensor, scores: Tensor) -> Tensor:
    """Whether a block is the query's own, `own`, int64 (n,): bool (B, H, n, C), as scores are shaped."""
    return (own[:, None] == torch.arange(scores.shape[-1], device=own.device)).expand_as(scores)


@remembered(64)
def _films(blocks: Partition) -> list[tuple[slice, Tensor]]:
    """For each film that has video: its blocks, and its video tokens, int64 (n,)."""
    piece = blocks.piece_of[0, 0]
    return [(film, ((piece >= film.start) & (piece < film.stop)).nonzero()[:, 0]) for film in film_by_film(blocks)]
