"""What a kernel is: a plan and q, k, v -> (out, lse)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sparse_zoo.plan import Plan


class Kernel(ABC):
    """Computes any plan exactly, or tells every reason why it cannot."""

    name: ClassVar[str]
    compiles_each_shape: ClassVar[bool] = False
    """Whether a new shape costs seconds: such a kernel is judged by its own suite, not on every method's films."""

    weighs_keys: ClassVar[bool] = False
    """Whether `run` adds the `log_weight` of parts to scaled scores. Plans with log-weights run on no other kernel."""

    @abstractmethod
    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:
        """Every reason why it cannot run here (without arguments) or on these tensors; empty when it can."""

    @abstractmethod
    def run(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
        """q (B, H, Lq, D), k, v (B, Hk, Lk, D) -> out (B, H, Lq, D) and lse (B, H, Lq), natural log, float32 or wider.

        A query without keys gets out 0, lse -inf and no gradient.
        """

    def run_sum(
        self, q: Tensor, k: Tensor, v: Tensor, plans: Sequence[Plan], weights: Sequence[Tensor | float], scale: float
    ) -> Tensor:
        """Σ weight · run(…, plan)[0] over the plans, (B, H, Lq, D), differentiable in the weights too.

        Weights are numbers or broadcast to the output. A kernel that can do this in less memory overrides it.
        """
        out: Tensor | None = None
        for plan, weight in zip(plans, weights, strict=True):
            out = plus(out, self.run(q, k, v, plan, scale)[0], weight)
        assert out is not None
        return out

    @abstractmethod
    def executed(self, plan: Plan, batch: int, heads: int) -> int:
        """Pairs that are multiplied for this plan, padding included."""


def plus(out: Tensor | None, value: Tensor, weight: Tensor | float) -> Tensor:
    """out + weight · value, the product never held beside the sum."""
    if isinstance(weight, Tensor):
        return weight * value if out is None else torch.addcmul(out, weight, value)
    if out is None:
        return value if weight == 1 else weight * value
    return torch.add(out, value, alpha=weight)
