"""Broken sliding tiles, radial bands and Sparse VideoGens."""

from __future__ import annotations

from dataclasses import replace
from inspect import unwrap
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sparse_zoo import kmeans
from sparse_zoo.attention import Branch, Call, Term
from sparse_zoo.blocks import joint, windowed
from sparse_zoo.layout import Layout
from sparse_zoo.methods import radial
from sparse_zoo.methods.radial import Radial
from sparse_zoo.methods.sta import STA
from sparse_zoo.methods.svg import SVG
from sparse_zoo.methods.svg2 import SVG2
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Plan
from sparse_zoo.testing.mutants.base import mutant


@mutant("routing_is_the_papers", window=(3, 1, 3))
class CutAtTheEdges(STA):
    """Windows are cut off at the edges, not pushed inside."""

    def branches(self, call: Call) -> list[Branch | Term]:
        tiles = call.layout.tiles(self.tile)
        near = windowed(call.layout, self.tile, self.windows[0], edge="cut")
        return [Branch(joint(call.layout, *Plan.blocks(tiles, tiles, near).parts))]


@mutant("head_slices", "routing_is_the_papers")
class WindowsByLocalHead(STA):
    """Windows go by the place of a head among those given, wherever they lie."""

    def branches(self, call: Call) -> list[Branch | Term]:
        return super().branches(replace(call, head_offset=0))


class OpenReach(Radial):
    """Radial, unbroken, with the reach from frame to frame laid open."""

    def reach(self, frames: Partition, block_tokens: int, decay: float) -> Tensor:
        """Arguments as those of `radial._reach`."""
        return reach_of(frames, block_tokens, decay)

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:  # noqa: ARG002
        with patch.object(radial, "_reach", self.reach):
            plan: Plan = unwrap(radial._radial)(layout, self.block_tokens, self.decay)
        return plan


reach_of = radial._reach


@mutant("routing_is_the_papers")
class NeverThinsOut(OpenReach):
    """Far frames are all attended, however narrow their diagonals."""

    def reach(self, frames: Partition, block_tokens: int, decay: float) -> Tensor:
        reach = super().reach(frames, block_tokens, decay)
        same = frames.sample[:, None] == frames.sample
        return torch.where(same & (reach < 0), block_tokens, reach)


@mutant("routing_is_the_papers")
class WithoutSink(OpenReach):
    """The first frame is attended as any other."""

    def reach(self, frames: Partition, block_tokens: int, decay: float) -> Tensor:
        reach = super().reach(frames, block_tokens, decay)
        return reach.masked_fill((frames.frame == 0) & (frames.frame[:, None] > 1), -1)


@mutant("routing_is_the_papers")
class WorseMask(SVG):
    """A head takes the mask under which the sampled queries err more."""

    def _temporal(self, call: Call) -> Tensor:
        return ~super()._temporal(call)


@mutant("films_packed", "routing_is_the_papers")
class KindOfTheFirstFilm(SVG):
    """All films of a stream have the kinds of heads that the first one asks for."""

    def _temporal(self, call: Call) -> Tensor:
        temporal = super()._temporal(call)
        return temporal[..., :1].expand_as(temporal)


@mutant("routing_is_the_papers")
class ClustersOfOneSize(SVG2):
    """Clusters are weighted alike, however many keys they hold."""

    def _enough(self, sizes: Tensor, scores: Tensor, legal: Tensor) -> Tensor:
        return super()._enough((sizes > 0).long(), scores, legal)


@mutant("routing_is_the_papers")
class FirstGuessStays(SVG2):
    """Centroids never move to the means of their clusters."""

    def branches(self, call: Call) -> list[Branch | Term]:
        def one_round(x: Tensor, tokens: Tensor, centroids: Tensor, _: int) -> tuple[Tensor, Tensor]:
            return in_full(x, tokens, centroids, 1)[0], centroids

        with patch.object(kmeans, "kmeans", one_round):
            return super().branches(call)


in_full = kmeans.kmeans


@mutant("leaves_no_state", "draws_recomputed", "checkpointing", later_rounds=1)
class KeepsCentroidsOnTheModule(SVG2):
    """Centroids of the call before are kept in the module."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.centroids: dict[Any, Any] = {}

    def branches(self, call: Call) -> list[Branch | Term]:
        return super().branches(replace(call, memory=self.centroids))
