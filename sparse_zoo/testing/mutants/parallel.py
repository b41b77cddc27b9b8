"""Ways to split a stream over ranks that are wrong, and methods that cannot be split as they declare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_zoo.attention import Attention, Branch, Call, Result, Term
from sparse_zoo.layout import Layout
from sparse_zoo.methods.dense import Dense
from sparse_zoo.parallel import Ulysses
from sparse_zoo.testing.mutants.base import mutant
from sparse_zoo.testing.mutants.learning import part


@mutant("ranks_equal_one", method="moc")
class NoHeadOffset(Ulysses):
    """Every rank says that its heads are the first ones, and so draws what rank 0 draws."""

    def run(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, layout: Layout, **context: Any) -> Result:
        """Attend with the offset of rank 0."""
        first = self.rank * q.shape[1] // self.size
        return super().run(attention, q, k, v, layout, head_offset=-first, **context)


@mutant("ranks_equal_one", method="moga")
class FeaturesNotGathered(Ulysses):
    """Each rank has the features of its own tokens, and zeros for those of others."""

    def gather(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        """The whole of anything but features, which lie along dimension 1."""
        if dim != 1:
            return super().gather(x, dim, sizes)
        before, after = sum(sizes[: self.rank]), sum(sizes[self.rank + 1 :])
        shape = list(x.shape)
        ends = [x.new_zeros(*shape[:1], count, *shape[2:]) for count in (before, after)]
        return torch.cat([ends[0], x, ends[1]], dim)


@mutant("ranks_equal_one", method="moga")
class AuxiliaryLossDivided(Ulysses):
    """Auxiliary losses are divided by the number of ranks, though gradients are averaged over them."""

    def mean(self, x: Tensor) -> Tensor:
        """The mean, divided once more."""
        return super().mean(x) / self.size


@mutant("ranks_equal_one", method="dense")
class GradientsAveragedTwice(Ulysses):
    """The backward of a gather averages over ranks, before the gradients of parameters are averaged."""

    def gather(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        """The whole, whose backward is the mean."""
        whole = super().gather(x, dim, sizes)
        return part(whole, 1 / self.size) if whole.is_floating_point() else whole


@mutant("ranks_equal_one")
class LossSummedOverHeads(Dense):
    """An auxiliary loss is a sum over heads, of which a rank has some."""

    def losses(self, call: Call) -> dict[str, Tensor]:
        """The square of q, summed over heads."""
        return {"size": call.q.square().mean((0, 2, 3)).sum()}


@mutant("ranks_equal_one")
class ReadsHidden(Dense):
    """The output is scaled by the mean of `hidden`, which no rank has as a whole."""

    def branches(self, call: Call) -> list[Branch | Term]:
        """Dense attention, scaled."""
        (branch,) = super().branches(call)
        assert isinstance(branch, Branch)
        scale = 1.0 if call.hidden is None else call.hidden.mean((1, 2))[:, None, None, None]
        return [Branch(branch.plan, scale)]


@mutant("ranks_equal_one")
class NormalisesOverHeads(Dense):
    """Queries are centred by their mean over heads."""

    def branches(self, call: Call) -> list[Branch | Term]:
        """Dense attention of centred queries."""
        (branch,) = super().branches(call)
        assert isinstance(branch, Branch)
        return [Branch(branch.plan, q=call.q - call.q.mean(1, keepdim=True))]
