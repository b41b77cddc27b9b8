"""Sparse VideoGen2 (SVG2): k-means clusters of queries choose k-means clusters of keys.

Paper: Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via Semantic-Aware Permutation, arXiv
2505.18875.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_zoo.attention import Attention, Branch, Call, Card, Knob, Limit, Term
from sparse_zoo.blocks import joint
from sparse_zoo.kmeans import clusters
from sparse_zoo.layout import Layout
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Part
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered
from sparse_zoo.requirements import require
from sparse_zoo.selectors import chosen, heaviest, largest


@register("svg2")
class SVG2(Attention):
    """K-means clusters of queries choose clusters of keys, by top-p.

    **Rule**

    In each head, queries and keys are clustered by k-means (Euclidean distance). Query cluster a estimates the share of
    its attention that key cluster b holds,

        P_ab ~ |b| exp(q_a k_b / sqrt(D)),  q_a and k_b the centroids,  sum over b of P_ab = 1

    and attends to the fewest key clusters that together hold `top_p`.

    **Paper**

    - Training-free; tokens are permuted by cluster, so that clusters are contiguous in memory.
    - The centroids of one noise step are the starting points of the next.
    - The numbers of clusters and rounds, and `least`, are those of the authors' scripts.

    **Our choices**

    - Clusters are made from the video of each film alone; text is dense.
    - K-means starts from tokens spread evenly over the film, where the code starts from random tokens. It runs a fixed
      number of rounds, where the code stops at small moves. A token at equal distances joins the earlier cluster.
    - An empty cluster keeps its centroid and is never chosen. Keys shared by several query heads are clustered once.
    - Centroids are cached in `call.memory`, if there is one, by layer, heads and layout: the result depends on the call
      and on what that cache holds for it. Without a cache, as in training, every call starts from scratch.
    - It trains like any other method: gradients pass through attention, not through the choice.

    **Not to be confused with**

    - `svg`: two static masks per head, no clusters.
    - `moga`: learned groups, one assignment for all heads, queries and keys grouped alike.

    Args:
        top_p: Share of the estimated attention that the chosen key clusters hold, in (0, 1].
        query_clusters: Clusters of queries in each film, at most one per token.
        key_clusters: Clusters of keys in each film, at most one per token.
        least: Share of the key clusters that is chosen in any case, best first, rounded down.
        first_rounds: Rounds of k-means without cached centroids.
        later_rounds: Rounds of k-means that start from cached centroids.
    """

    limits = Limit({"top_p": 1.0})
    strict = "clusters hold tokens of all shots"
    anchors = ("text",)
    pools_queries = True
    knob = Knob("top_p", 0.1, 1.0)
    card = Card(
        paper="Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via Semantic-Aware Permutation, "
        "arXiv 2505.18875",
        granularity="cluster of queries -> clusters of keys",
        chosen_by="centroids, weighted by cluster sizes, top-p",
        trained="training-free",
        claim="2.30x end to end on HunyuanVideo at a PSNR of up to 30, 1.89x on Wan 2.1 at 26, over dense",
    )
    small = {"top_p": 0.63, "query_clusters": 4, "key_clusters": 7, "least": 0.3, "first_rounds": 3, "later_rounds": 1}

    def __init__(
        self,
        *,
        top_p: float = 0.9,
        query_clusters: int = 300,
        key_clusters: int = 1000,
        least: float = 0.1,
        first_rounds: int = 50,
        later_rounds: int = 2,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        counts = {
            "query_clusters": query_clusters,
            "key_clusters": key_clusters,
            "first_rounds": first_rounds,
            "later_rounds": later_rounds,
        }
        more = "" if 0 <= least <= 1 else f"least must be in [0, 1], got {least!r}"
        require(self, more, counts=counts, shares={"top_p": top_p})
        self.top_p, self.least = float(top_p), float(least)
        self.clusters = (query_clusters, key_clusters)
        self.first_rounds, self.later_rounds = first_rounds, later_rounds

    def branches(self, call: Call) -> list[Branch | Term]:
        """One branch: query clusters × the key clusters that they chose, with text."""
        if not _videos(call.layout):
            return [Branch(joint(call.layout))]
        with torch.no_grad(), torch.autocast(call.q.device.type, enabled=False):
            return [Branch(joint(call.layout, self._choice(call)))]

    def _choice(self, call: Call) -> Part:
        (_, heads, _, dim), share = call.q.shape, call.q.shape[1] // call.k.shape[1]
        kept = self._kept(call)
        rounds = self.later_rounds if kept else self.first_rounds
        starts = (kept.queries, kept.keys) if kept else (None, None)
        videos = _videos(call.layout)
        query_labels, query_centroids = clusters(call.q, videos, self.clusters[0], rounds, starts[0])
        key_labels, key_centroids = clusters(call.k, videos, self.clusters[1], rounds, starts[1])
        if call.memory is not None:
            call.memory[self._place(call)] = _Kept(query_centroids, key_centroids, rounds)

        queries = Partition.from_labels(query_labels, sum(x.shape[2] for x in query_centroids))
        keys = Partition.from_labels(key_labels.repeat_interleave(share, 1), sum(x.shape[2] for x in key_centroids))
        edges = torch.zeros(len(call.q), heads, queries.count, keys.count, dtype=torch.bool, device=call.q.device)
        row = col = 0
        for ours, theirs in zip(query_centroids, key_centroids, strict=True):  # of one film
            rows, cols = slice(row, row + ours.shape[2]), slice(col, col + theirs.shape[2])
            row, col = rows.stop, cols.stop
            sizes = keys.sizes[:, :, None, cols]
            edges[:, :, rows, cols] = chosen(ours * dim**-0.5, theirs, sizes > 0, partial(self._enough, sizes))
        return Part(queries, keys, edges, routed=True)

    def _enough(self, sizes: Tensor, scores: Tensor, legal: Tensor) -> Tensor:  # noqa: ARG002
        """The key clusters of a film that some query clusters choose, by scores (B, H, rows, K)."""
        weights = (scores + sizes.log()).softmax(-1)
        return heaviest(weights, self.top_p) | largest(weights, int(self.least * weights.shape[-1]))

    def routing_flops(self, call: Call) -> int:
        """Distances and means in each round of k-means, and the products of centroids.

        With cached centroids, the rounds are those that ran last.
        """
        (batch, heads, _, dim), kv_heads = call.q.shape, call.k.shape[1]
        kept = self._kept(call)
        rounds = kept.rounds if kept else self.first_rounds
        total = 0
        for tokens in _videos(call.layout):
            queries, keys = (min(count, len(tokens)) for count in self.clusters)
            total += 4 * rounds * len(tokens) * (heads * queries + kv_heads * keys) + 2 * heads * queries * keys
        return batch * total * dim

    def _kept(self, call: Call) -> _Kept | None:
        """The cached centroids for such a call, or None."""
        return None if call.memory is None else call.memory.get(self._place(call))

    def _place(self, call: Call) -> tuple[Any, ...]:
        sizes = (len(call.q), call.q.shape[1], call.k.shape[1])
        return ("svg2", call.layer, call.head_offset, sizes, self.clusters, call.layout)


@dataclass(frozen=True)
class _Kept:
    """Cached centroids, float32 (B, H, clusters, D), one tensor per film with video, and the rounds that were run."""

    queries: list[Tensor]
    keys: list[Tensor]
    rounds: int


@remembered(32)
def _videos(layout: Layout) -> list[Tensor]:
    """The video tokens of each film that has any: int64 (n,), of the stream."""
    films = [(layout.sample == film) & ~layout.is_text for film in range(len(layout.films))]
    return [video.nonzero()[:, 0] for video in films if bool(video.any())]
