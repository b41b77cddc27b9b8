"""MoBA, VMoBA and XAttention with one thing broken in what they choose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sparse_zoo.attention import Branch, Call, Term
from sparse_zoo.budgets import Slices, within_budget
from sparse_zoo.layout import Layout
from sparse_zoo.methods import vmoba, xattention
from sparse_zoo.methods.moba import MoBA
from sparse_zoo.methods.vmoba import VMoBA
from sparse_zoo.methods.xattention import XAttention
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Plan
from sparse_zoo.testing.mutants.base import mutant


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

    def _together(self, q: Tensor, means: Tensor, own: Tensor) -> Iterator[Tensor]:
        yield from self._by_query(q, means, own)


@mutant("head_slices", "routing_is_the_papers")
class HeadsShareABudget(VMoBA):
    """Heads compete with each other, though the scope is a head."""

    def _together(self, q: Tensor, means: Tensor, own: Tensor) -> Iterator[Tensor]:
        with patch.object(self, "scope", "global"):
            yield from super()._together(q, means, own)


@mutant("batch_items_apart", "routing_is_the_papers")
class ItemsShareABudget(VMoBA):
    """Batch items compete with each other."""

    def _together(self, q: Tensor, means: Tensor, own: Tensor) -> Iterator[Tensor]:
        def joined(slices: Slices, **budget: Any) -> Iterator[Tensor]:
            def flat() -> Iterator[tuple[Tensor, Tensor]]:
                for scores, first in slices():
                    yield scores.flatten()[None], first.flatten()[None]

            shapes = [first.shape for _, first in slices()]
            for kept, shape in zip(within_budget(flat, **budget), shapes, strict=True):
                yield kept.view(shape)

        with patch.object(vmoba, "within_budget", joined):
            yield from super()._together(q, means, own)


@mutant("routing_is_the_papers")
class OwnBlocksForFree(VMoBA):
    """Own blocks are kept besides what the share buys."""

    def _together(self, q: Tensor, means: Tensor, own: Tensor) -> Iterator[Tensor]:
        def free(slices: Slices, **budget: Any) -> Iterator[Tensor]:
            def none_first() -> Iterator[tuple[Tensor, Tensor]]:
                for scores, first in slices():
                    yield scores, torch.zeros_like(first)

            for kept, (_, first) in zip(within_budget(none_first, **budget), slices(), strict=True):
                yield kept | first

        with patch.object(vmoba, "within_budget", free):
            yield from super()._together(q, means, own)


class Gathering(XAttention):
    """XAttention, unbroken, with the gathering of its groups laid open."""

    def gathered(self, x: Tensor, slots: Tensor, of_queries: bool) -> Tensor:  # noqa: ARG002
        return gathered(x, slots)

    def _chosen(self, q: Tensor, k: Tensor, slots: Tensor) -> Tensor:
        with patch.object(xattention, "_gathered", lambda x, slots: self.gathered(x, slots, x is q)):
            return super()._chosen(q, k, slots)


gathered = xattention._gathered


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

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:
        def as_one(*given: Any) -> list[tuple[slice, Tensor]]:
            films = slots(*given)
            return [(slice(0, films[-1][0].stop), torch.cat([tokens for _, tokens in films]))] if films else []

        with patch.object(xattention, "_slots", as_one):
            return super().plan(q, k, layout)


slots = xattention._slots
