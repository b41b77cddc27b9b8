"""Methods with pooled branches, with one thing broken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from sparse_zoo.attention import Branch, Call, Term
from sparse_zoo.blocks import joint, pooled, same_film, stretches
from sparse_zoo.methods import nsa, vsa
from sparse_zoo.methods.nsa import NSA
from sparse_zoo.methods.sla import SLA
from sparse_zoo.methods.vsa import VSA
from sparse_zoo.partition import Partition
from sparse_zoo.testing.mutants.base import mutant


@mutant("routing_is_the_papers", "parameters_learn")
class FineStageUngated(VSA):
    """The gate of the fine stage is left out."""

    def _gates(self, call: Call) -> dict[str, Tensor]:
        return {name: gate for name, gate in super()._gates(call).items() if name != "fine"}


@mutant("routing_is_the_papers")
class NextCubesCoarse(VSA):
    """Tokens read what the coarse stage found for the token after them."""

    def branches(self, call: Call) -> list[Branch | Term]:
        return [
            replace(made, rows=made.rows.roll(-1)) if isinstance(made, Branch) and made.rows is not None else made
            for made in super().branches(call)
        ]


@mutant("routing_is_the_papers")
class RaggedCubesPadded(VSA):
    """Means of ragged cubes are taken as if zeros filled them up."""

    def branches(self, call: Call) -> list[Branch | Term]:
        def padded(cubes: Partition, x: Tensor) -> Tensor:
            return pooled(cubes, x) * cubes.sizes[..., None] / (self.tile[0] * self.tile[1] * self.tile[2])

        with patch.object(vsa, "pooled", padded):
            return super().branches(call)


@mutant("head_slices")
class GatesOfTheFirstHeads(NSA):
    """Gates are those of the first heads, wherever the heads of the call lie."""

    def _gates(self, call: Call) -> Tensor:
        return super()._gates(replace(call, head_offset=0))


@mutant("routing_is_the_papers")
class FixedBlocksForgotten(NSA):
    """The first block, the own one and the one before are neither read nor chosen."""

    def branches(self, call: Call) -> list[Branch | Term]:
        static = replace(nsa._static(call.layout, self.block_tokens, self.window), fixed=joint(call.layout))
        with patch.object(nsa, "_static", lambda *_: static):
            return super().branches(call)


@mutant("routing_is_the_papers", "limit_is_dense")
class LinearOverAllBlocks(SLA):
    """Linear attention runs over all blocks, critical and negligible ones too."""

    def _linear(self, call: Call, marginal: Tensor) -> Term:
        blocks = stretches(call.layout, self.block_tokens)
        return super()._linear(call, same_film(blocks, blocks).expand_as(marginal))


@mutant("routing_is_the_papers")
class NothingIsNegligible(SLA):
    """All blocks that are not critical are marginal."""

    def _counts(self, legal: Tensor) -> Sequence[Tensor]:
        return super()._counts(legal)[0], legal.sum(-1, keepdim=True)


@mutant("limit_is_dense")
class BiasWhereNothingIsMarginal(SLA):
    """Proj has a bias, which is added where there is nothing to project."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.proj = nn.Linear(self.head_dim, self.head_dim)
