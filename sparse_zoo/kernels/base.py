"""What a kernel is: a plan and q, k, v -> (out, lse)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from sparse_zoo.plan import Plan


class Kernel(ABC):
    """Computes any plan exactly, or tells every reason why it cannot."""

    name: ClassVar[str]

    @abstractmethod
    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:
        """Every reason why it cannot run here (without arguments) or on these tensors; empty when it can."""

    @abstractmethod
    def run(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
        """q (B, H, Lq, D), k, v (B, Hk, Lk, D) -> out (B, H, Lq, D) and lse (B, H, Lq), natural log, float32 or wider.

        A query without keys gets out 0, lse -inf and no gradient.
        """

    @abstractmethod
    def executed(self, plan: Plan, batch: int, heads: int) -> int:
        """Pairs that are multiplied for this plan, padding included."""
