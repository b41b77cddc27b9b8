"""Methods whose outputs are right and whose gradients or losses are not."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from sparse_zoo.attention import Branch, Call, Result, Term
from sparse_zoo.blocks import pooled
from sparse_zoo.layout import Layout
from sparse_zoo.methods import vsa
from sparse_zoo.methods.dense import Dense
from sparse_zoo.methods.moga import MoGA
from sparse_zoo.methods.nsa import NSA
from sparse_zoo.methods.sla import SLA
from sparse_zoo.methods.vsa import VSA
from sparse_zoo.testing.mutants.base import mutant


def part(x: Tensor, share: float) -> Tensor:
    """The same numbers, through which a share of the gradient passes."""
    return share * x + (1 - share) * x.detach()


@mutant("gradients_by_differences")
class CoarseWithoutGradient(VSA):
    """The coarse stage passes no gradient to q, k and v."""

    def branches(self, call: Call) -> list[Branch | Term]:
        with patch.object(vsa, "pooled", lambda pieces, x: pooled(pieces, x).detach()):
            return super().branches(call)


@mutant("gradients_by_differences")
class HalfTheGradientOfMeans(NSA):
    """Means of values pass half their gradient."""

    def branches(self, call: Call) -> list[Branch | Term]:
        made = [branch for branch in super().branches(call) if isinstance(branch, Branch)]
        return [branch if branch.v is None else replace(branch, v=part(branch.v, 0.5)) for branch in made]


@mutant("gradients_by_differences")
class GateDetachedFromHidden(NSA):
    """Gates learn, and what they are made of does not."""

    def features(self, hidden: Tensor) -> dict[str, Tensor]:
        return super().features(hidden.detach())


@mutant("gradients_by_differences")
class LinearKeysDetached(SLA):
    """The linear part passes no gradient to k."""

    def _linear(self, call: Call, marginal: Tensor) -> Term:
        return super()._linear(replace(call, k=call.k.detach()), marginal)


@mutant("gradients_by_differences")
class GateDetachedInLaterLayers(MoGA):
    """From the eighth layer on the routed branch passes no gradient to its gate."""

    def _weight(self, name: str, call: Call) -> Tensor | float:
        weight = super()._weight(name, call)
        return weight.detach() if isinstance(weight, Tensor) and call.layer >= 8 else weight


@mutant("gradients_by_differences")
class GateDetachedPastFourItems(MoGA):
    """Batch items after the fourth pass no gradient to the gate of the routed branch."""

    def _weight(self, name: str, call: Call) -> Tensor | float:
        weight = super()._weight(name, call)
        return torch.cat([weight[:4], weight[4:].detach()]) if isinstance(weight, Tensor) else weight


@mutant("gradients_by_differences")
class GateDetachedInTraining(VSA):
    """In training the coarse gate passes half its gradient."""

    def _gates(self, call: Call) -> dict[str, Tensor]:
        gates = super()._gates(call)
        return {name: part(gate, 0.5) if self.training and name == "coarse" else gate for name, gate in gates.items()}


@mutant("gradients_alone")
class KeysLearnWithValues(Dense):
    """k gets no gradient where v needs none."""

    def run(self, call: Call) -> Result:
        return super().run(call if call.v.requires_grad else replace(call, k=call.k.detach()))


@mutant("gradients_alone")
class CoarseLearnsWithHidden(NSA):
    """The compressed branch passes no gradient where hidden needs none."""

    def branches(self, call: Call) -> list[Branch | Term]:
        made = super().branches(call)
        if call.hidden is None or call.hidden.requires_grad:
            return made
        return [
            replace(x, k=x.k.detach(), v=x.v.detach())
            if isinstance(x, Branch) and x.k is not None and x.v is not None
            else x
            for x in made
        ]


@mutant("losses_are_means")
class LossOfTheFirstItem(MoGA):
    """The balance loss counts the first batch item alone."""

    def losses(self, call: Call) -> dict[str, Tensor]:
        return super().losses(replace(call, features={name: x[:1] for name, x in self.featured(call).items()}))


@mutant("losses_are_means")
class LossOfFourFilms(MoGA):
    """The balance loss of a stream counts its first four films alone."""

    def losses(self, call: Call) -> dict[str, Tensor]:
        if len(call.layout.films) <= 4:
            return super().losses(call)
        early = (call.layout.sample < 4).nonzero()[:, 0]
        given = {name: x[:, early] for name, x in self.featured(call).items()}
        q, k, v = (x[:, :, early] for x in (call.q, call.k, call.v))
        return super().losses(
            replace(call, q=q, k=k, v=v, hidden=None, features=given, layout=Layout(call.layout.films[:4]))
        )


@mutant("losses_are_means")
class LossGrowsWithTheBatch(MoGA):
    """The balance loss is a sum over batch items."""

    def losses(self, call: Call) -> dict[str, Tensor]:
        return {name: loss * len(call.q) for name, loss in super().losses(call).items()}


@mutant("losses_by_differences", "training_is_evaluation")
class NoLossInTraining(MoGA):
    """The balance loss is 0 in training."""

    def losses(self, call: Call) -> dict[str, Tensor]:
        return {name: loss * (not self.training) for name, loss in super().losses(call).items()}


@mutant("losses_by_differences")
class LossOfHalfTheGradient(MoGA):
    """The balance loss passes half its gradient."""

    def losses(self, call: Call) -> dict[str, Tensor]:
        return {name: part(loss, 0.5) for name, loss in super().losses(call).items()}


@mutant("losses_by_differences")
class LossDetachedFromHidden(MoGA):
    """The router learns balance, and what it reads does not."""

    def losses(self, call: Call) -> dict[str, Tensor]:
        if call.hidden is None:
            return super().losses(call)
        return super().losses(replace(call, features=self.features(call.hidden.detach())))
