"""Kernels that weigh keys wrongly, and methods of several key sets with one thing broken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_zoo.attention import Branch, Call, Result, Segment, Term
from sparse_zoo.kernels import attend, merge
from sparse_zoo.kernels.base import Kernel
from sparse_zoo.methods.sol import SolAttn
from sparse_zoo.plan import Plan
from sparse_zoo.testing import oracle
from sparse_zoo.testing.mutants.base import mutant


class Weighing(Kernel):
    """Unbroken: masked softmax, with log-weights added to scores; small streams."""

    name = "weighing"
    weighs_keys = True

    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:  # noqa: ARG002
        return [] if q is None or q.is_floating_point() else [f"dtype {q.dtype} is not a floating-point type"]

    def run(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
        dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
        q, k, v = (x.to(wide) for x in (q, k, v))
        out, lse = oracle.masked_softmax(q, k, v, oracle.mask_of(plan), scale, self.added(plan))
        return out.to(dtype), lse

    def added(self, plan: Plan) -> Tensor | float:
        """What is added to the scaled scores, which a mutant may break."""
        return oracle.log_weights_of(plan)

    def executed(self, plan: Plan, batch: int, heads: int) -> int:
        return batch * heads * plan.shape[0] * plan.shape[1]


@mutant("kernel_log_weights")
class WeightForgotten(Weighing):
    """Log-weights are left out."""

    def added(self, plan: Plan) -> Tensor | float:  # noqa: ARG002
        return 0.0


@mutant("kernel_log_weights")
class WeightCountedTwice(Weighing):
    """Log-weights are added twice."""

    def added(self, plan: Plan) -> Tensor | float:
        return 2 * super().added(plan)


@mutant("kernel_log_weights")
class WeightOfTheFirstHead(Weighing):
    """All heads take the log-weights of the first."""

    def added(self, plan: Plan) -> Tensor | float:
        weights = super().added(plan)
        return weights[:, :1] if isinstance(weights, Tensor) else weights


@mutant("kernel_log_weights")
class WeightRounded(Weighing):
    """Log-weights are rounded to bfloat16."""

    def added(self, plan: Plan) -> Tensor | float:
        weights = super().added(plan)
        return weights.bfloat16().double() if isinstance(weights, Tensor) else weights


def segmented(made: list[Branch | Term], change: Any) -> list[Branch | Term]:
    """Branches whose further segments are changed by a function."""
    return [
        replace(x, segments=tuple(map(change, x.segments))) if isinstance(x, Branch) and x.segments else x for x in made
    ]


@mutant("routing_is_the_papers")
class MeansWeighNothing(SolAttn):
    """A mean of many tokens counts as one token."""

    def branches(self, call: Call) -> list[Branch | Term]:
        return segmented(super().branches(call), lambda x: replace(x, log_weight=None))


@mutant("routing_is_the_papers")
class MeansWeighTwice(SolAttn):
    """The log of the number of tokens is added twice."""

    def branches(self, call: Call) -> list[Branch | Term]:
        return segmented(super().branches(call), lambda x: replace(x, log_weight=2 * x.log_weight))


@mutant("gradients_by_differences")
class MeansLearnNothing(SolAttn):
    """No gradient passes through pooled keys and values."""

    def branches(self, call: Call) -> list[Branch | Term]:
        return segmented(super().branches(call), lambda x: replace(x, k=x.k.detach(), v=x.v.detach()))


@mutant("values_of_another_width")
class MeansScaledByTheWidthOfValues(SolAttn):
    """Pooled keys are scaled by the width of v over that of q."""

    def branches(self, call: Call) -> list[Branch | Term]:
        scale = call.v.shape[-1] / call.q.shape[-1]
        return segmented(super().branches(call), lambda x: replace(x, k=x.k * scale))


@mutant("gradients_equal_oracle")
class SegmentsMergedWithoutTheirLse(SolAttn):
    """Each segment is a softmax of its own, and the merge passes no gradient to the weights between them."""

    def run(self, call: Call) -> Result:
        result = super().run(call)
        (branch,) = self.branches(self.ready(call))
        if not isinstance(branch, Branch) or not branch.segments:
            return result
        found = [self._alone(x, call) for x in branch.key_sets]
        return replace(result, out=merge([x.out for x in found], [x.lse for x in found])[0])

    def _alone(self, segment: Segment, call: Call) -> Any:
        k, v = call.k if segment.k is None else segment.k, call.v if segment.v is None else segment.v
        plan = segment.plan if segment.log_weight is None else segment.plan.weighted(segment.log_weight)
        return attend(call.q, k, v, plan, kernel=self.kernel)
