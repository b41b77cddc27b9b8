"""Metrics of the model's own loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class LossByTime(Metric):
    """Mean flow loss per token at each of a few fixed noise times.

    `compute()` returns (T,) in the order of `times`, NaN where a time was never updated.
    """

    full_state_update = False
    error: Tensor
    tokens: Tensor

    def __init__(self, times: Sequence[float]) -> None:
        super().__init__()
        self.times = tuple(times)
        for state in ("error", "tokens"):
            self.add_state(state, torch.zeros(len(self.times), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, per_token: Tensor, which: int) -> None:
        """Add losses.

        Args:
            per_token: Losses of any shape, all at `times[which]`.
            which: Index into `times`.
        """
        # Not in place: states that a run in inference mode left could not be updated by one outside of it.
        here = torch.nn.functional.one_hot(torch.tensor(which, device=self.error.device), len(self.times))
        self.error = self.error + here * per_token.double().sum()
        self.tokens = self.tokens + here * per_token.numel()

    def compute(self) -> Tensor:
        """The mean loss at each time, (T,)."""
        return self.error / self.tokens
