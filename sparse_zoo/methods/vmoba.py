"""Video Mixture of Block Attention (VMoBA): 1D, 2D and 3D blocks by layer; a share of the similarity is kept.

Paper: VMoBA: Mixture-of-Block Attention for Video Diffusion Models, arXiv 2506.23858.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sparse_zoo.attention import Attention, Branch, Call, Card, Knob, Limit, Term
from sparse_zoo.blocks import film_by_film, joint
from sparse_zoo.budgets import kept_pairs
from sparse_zoo.errors import ZooError, unknown
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered
from sparse_zoo.requirements import is_count, require

SCOPES = ("query", "head", "global")
WHOLE = 1 << 30
"""A tile's size along an axis that it spans."""


@register("vmoba")
class VMoBA(Attention):
    """The most similar pairs of a query and a block, up to a share.

    **Rule**

    Keys are cut into blocks, whose shape alternates from layer to layer: 1D (`temporal` frames), 2D (`spatial` patches
    through all frames), 3D (`spatiotemporal` cuboids). The similarity of a query and a block is q · mean(keys). All
    pairs of a query and a block within a `scope` compete; the fewest pairs are kept whose similarities sum to the share
    `threshold` of the scope's total.

    **Paper**

    - Section 3; pairs compete over a whole head (scope "head"). The paper trains with threshold 0.25.
    - From the authors' code (KwaiVGI/VMoBA): similarities are shifted and scaled to [0, 1] over the scope; the own
      block is always kept and counts towards the share, and the other blocks fill it up, largest first; the scopes
      "query" and "global"; and `top_k` blocks per query instead of a share, spent jointly by the scope.
    - Default block sizes are those of FastVideo's port for Wan 1.3B.

    **Our choices**

    - Batch items and films never compete, nor does text: every token attends to the text of its film, and text attends
      to the whole film.
    - Block sizes need not divide the film. Ties go to the earlier query, then head, then block.
    - If all similarities of a scope are equal, all pairs weigh the same. With threshold 1 every pair is kept, those of
      weight 0 too.
    - The code keeps at least one other block in each scope even where the own blocks hold the share; we do not.
    - Scopes "head" and "global" sort nothing: `within_budget` finds the smallest kept similarity exactly, after
      rounding similarities to 2^-24 of their range, and recomputes the products in each of its four passes.
    - The sizes of the kept sets differ so much that index lists would be longer than a table: edges are one byte for
      each head, query and block.

    **Not to be confused with**

    `moba`: one cut for all layers, and exactly `top_k` blocks for each query.

    Args:
        threshold: Share of the scope's similarity that is kept, in (0, 1]; null: use `top_k`.
        top_k: Blocks per query, the own one included, on average over the scope; null: use `threshold`.
        scope: Where pairs compete: "query" (each query and head alone), "head", or "global" (all heads of an item).
            With "global" a head depends on the others, so that a call with some of the heads (sharding) is refused.
        temporal: Frames in a 1D block (layers 0, 3, …).
        spatial: Rows and columns in a 2D block, all frames (layers 1, 4, …).
        spatiotemporal: Frames, rows and columns in a 3D block (layers 2, 5, …).
        stop_at_shots: Blocks restart at each shot, so that no block holds frames of two shots.
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
        require(
            self,
            f"one of threshold and top_k must be given, the other null, got {threshold!r} and {top_k!r}"
            if (threshold is None) == (top_k is None)
            else "",
            unknown("scope", scope, SCOPES) if scope not in SCOPES else "",
            *(
                f"{name} must be {axes} whole number{'s' * (axes > 1)} of at least 1, got {tile!r}"
                for axes, (name, tile) in enumerate(tiles.items(), 1)
                if len(tile) != axes or not all(map(is_count, tile))
            ),
            shares={} if threshold is None else {"threshold": threshold},
            counts={} if top_k is None else {"top_k": top_k},
        )
        self.threshold, self.top_k, self.scope = threshold, top_k or 0, scope
        self.tiles = ((temporal, WHOLE, WHOLE), (WHOLE, *tiles["spatial"]), tiles["spatiotemporal"])
        self.stop_at_shots = bool(stop_at_shots)
        self.pools_queries = scope != "query"
        self.needs_all_heads = "with scope 'global' all heads share a budget" if scope == "global" else None

    def branches(self, call: Call) -> list[Branch | Term]:
        """One branch: the own block of each query and the pairs that its scope kept."""
        if self.scope == "global" and call.q.shape[1] != self.heads:
            raise ZooError(f"vmoba: scope 'global' needs all {self.heads} heads at once, got {call.q.shape[1]}")
        blocks = self._blocks(call)
        chosen = Plan.routed(blocks, self._chosen(call, blocks)).parts if blocks.count else ()
        return [Branch(joint(call.layout, *chosen, q_rows=call.q_rows))]

    def _blocks(self, call: Call) -> Partition:
        return call.layout.tiles(self.tiles[call.layer % 3], stop_at_shots=self.stop_at_shots)

    @torch.no_grad()
    def _chosen(self, call: Call, blocks: Partition) -> Tensor:
        """The pairs of a query and a block that are kept: bool (B, H, Lq, C)."""
        means = blocks.mean(call.k.float())
        own = call.at(blocks.piece_of[0, 0])
        chosen = torch.zeros(*call.q.shape[:3], blocks.count, dtype=torch.bool, device=call.q.device)
        choose = partial(kept_pairs, scope=self.scope, share=self.threshold, count=self.top_k)
        for film, tokens in _films(blocks):
            # Selecting the film's queries would wait for a GPU: all choose, and other films' choices are dropped.
            rows = tokens if call.q_rows is None else torch.arange(len(call.q_rows), device=call.q.device)
            of_film, start = own[rows] - film.start, 0
            for some in choose(call.q[:, :, rows], means[:, :, film], of_film):
                end = start + some.shape[2]
                if call.q_rows is not None:
                    mine = of_film[start:end, None]
                    some &= (mine >= 0) & (mine < film.stop - film.start)
                chosen[:, :, rows[start:end], film], start = some, end
        return chosen

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


@remembered(64)
def _films(blocks: Partition) -> list[tuple[slice, Tensor]]:
    """For each film that has video: its blocks, and its video tokens, int64 (n,)."""
    piece = blocks.piece_of[0, 0]
    return [(film, ((piece >= film.start) & (piece < film.stop)).nonzero()[:, 0]) for film in film_by_film(blocks)]
