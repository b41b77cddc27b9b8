"""MoBA, VMoBA and XAttention with one thing broken in what they choose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sparse_zoo import blockwise, budgets, scorers
from sparse_zoo.attention import Branch, Call, Term
from sparse_zoo.budgets import Slices, kept_pairs, within_budget
from sparse_zoo.methods import vmoba
from sparse_zoo.methods.moba import MoBA
from sparse_zoo.methods.vmoba import VMoBA
from sparse_zoo.methods.xattention import XAttention
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Plan
from sparse_zoo.selectors import Scores
from sparse_zoo.testing.mutants.base import mutant

QUERY, GLOBAL = {"scope": "query"}, {"scope": "global"}


@mutant("routing_is_the_papers")
class OwnBlockNotCounted(MoBA):
    """top_k blocks come beside the query's own."""

    def branches(self, call: Call) -> list[Branch | Term]:
        with patch.object(self, "top_k", self.top_k + 1):
            return super().branches(call)


@mutant("routing_is_the_papers", "anchors_attended")
class OwnBlockNotAlways(MoBA):
    """The query's own block costs a place, and is left out."""

    def branches(self, call: Call) -> list[Branch | Term]:
        (branch,) = super().branches(call)
        assert isinstance(branch, Branch)
        parts = [replace(part, edges=part.edges[..., 1:]) if part.routed else part for part in branch.plan.parts]
        return [replace(branch, plan=Plan(*parts))]


@mutant("routing_is_the_papers")
class NeverTakesTurns(VMoBA):
    """All layers cut blocks as the first does."""

    def _blocks(self, call: Call) -> Partition:
        return super()._blocks(replace(call, layer=0))


@mutant("routing_is_the_papers")
class QueriesBudgetApart(VMoBA):
    """Each query has a share of its own, though the scope is a head."""

    def branches(self, call: Call) -> list[Branch | Term]:
        with patch.object(vmoba, "kept_pairs", lambda *given, **budget: kept_pairs(*given, **budget | QUERY)):
            return super().branches(call)


@mutant("head_slices", "routing_is_the_papers")
class HeadsShareABudget(VMoBA):
    """Heads compete with each other, though the scope is a head."""

    def branches(self, call: Call) -> list[Branch | Term]:
        with patch.object(vmoba, "kept_pairs", lambda *given, **budget: kept_pairs(*given, **budget | GLOBAL)):
            return super().branches(call)


@mutant("batch_items_apart", "routing_is_the_papers")
class ItemsShareABudget(VMoBA):
    """Batch items compete with each other."""

    def branches(self, call: Call) -> list[Branch | Term]:
        def joined(slices: Slices, **budget: Any) -> Iterator[Tensor]:
            def flat() -> Iterator[tuple[Tensor, Tensor]]:
                for scores, first in slices():
                    yield scores.flatten()[None], first.flatten()[None]

            shapes = [first.shape for _, first in slices()]
            for kept, shape in zip(within_budget(flat, **budget), shapes, strict=True):
                yield kept.view(shape)

        with patch.object(budgets, "within_budget", joined):
            return super().branches(call)


@mutant("routing_is_the_papers")
class OwnBlocksForFree(VMoBA):
    """Own blocks are kept besides what the share buys."""

    def branches(self, call: Call) -> list[Branch | Term]:
        def free(slices: Slices, **budget: Any) -> Iterator[Tensor]:
            def none_first() -> Iterator[tuple[Tensor, Tensor]]:
                for scores, first in slices():
                    yield scores, torch.zeros_like(first)

            for kept, (_, first) in zip(within_budget(none_first, **budget), slices(), strict=True):
                yield kept | first

        with patch.object(budgets, "within_budget", free):
            return super().branches(call)


class Gathering(XAttention):
    """XAttention, unbroken, with the gathering of its groups laid open."""

    def gathered(self, x: Tensor, slots: Tensor, of_queries: bool) -> Tensor:  # noqa: ARG002
        return gathered(x, slots)

    def scores(self, call: Call) -> Scores:
        with patch.object(scorers, "_side_by_side", lambda x, slots: self.gathered(x, slots, x is call.q)):
            yield from super().scores(call)


gathered = scorers._side_by_side


@mutant("routing_is_the_papers")
class MainDiagonals(Gathering):
    """Groups are scored along the diagonal of their square."""

    def gathered(self, x: Tensor, slots: Tensor, of_queries: bool) -> Tensor:
        return gathered(x, slots.flip(-1) if of_queries else slots)


@mutant("routing_is_the_papers")
class PaddedWithTokens(Gathering):
    """Short groups are filled up with the film's first token."""

    def gathered(self, x: Tensor, slots: Tensor, of_queries: bool) -> Tensor:  # noqa: ARG002
        return gathered(x, slots.where(slots >= 0, slots[0, 0, 0]))


@mutant("films_packed", "routing_is_the_papers")
class GuessesAcrossFilms(XAttention):
    """Blocks of all films share one softmax, and one share."""

    def branches(self, call: Call) -> list[Branch | Term]:
        def as_one(*given: Any) -> list[tuple[slice, Tensor]]:
            films = groups(*given)
            return [(slice(0, films[-1][0].stop), torch.cat([tokens for _, tokens in films]))] if films else []

        def any_film(queries: Partition, keys: Partition) -> Tensor:
            return torch.ones(queries.count, keys.count, dtype=torch.bool, device=queries.device)

        with patch.object(scorers, "groups", as_one), patch.object(blockwise, "same_film", any_film):
            return super().branches(call)


groups = scorers.groups
