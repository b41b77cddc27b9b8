"""Muon for matrices and AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from typing_extensions import override


class MuonAdamW(Optimizer):
    """torch's Muon on the first parameter group, its AdamW on the others; one step, one state, one schedule.

    Lightning's automatic optimization takes one optimizer, and clips, schedules and saves it as a whole. The groups and
    the state are kept here, where the checkpoint finds them; each of the two optimizers is given its share at every
    step.

    Args:
        matrices: Parameters of two dimensions, for Muon with weight decay `weight_decay` at rate `muon_lr`.
        groups: Parameter groups of AdamW, at rate `lr`.
        wide: Whether Muon orthogonalises in float32, which is faster on a CPU without bfloat16; torch does so in
            bfloat16.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        groups: Sequence[dict[str, Any]],
        *,
        muon_lr: float,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        wide: bool = False,
    ) -> None:
        self.muon = (WideMuon if wide else Muon)(list(matrices), lr=muon_lr, weight_decay=weight_decay)
        self.adamw = AdamW(list(groups), lr=lr, betas=betas)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Loading a checkpoint puts new groups and a new state in place, so they are handed on each time.
        for part, groups in ((self.muon, self.param_groups[:1]), (self.adamw, self.param_groups[1:])):
            part.param_groups, part.state = groups, self.state
            part.step()
        return loss


class WideMuon(Muon):
    """torch's Muon, whose Newton-Schulz iterations run in float32."""

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step on the gradients that are there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            momentum, rate = group["momentum"], group["lr"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                average = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight.grad))
                average.lerp_(weight.grad, 1 - momentum)
                update = weight.grad.lerp(average, momentum) if group["nesterov"] else average
                update = _orthogonalise(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rows, cols = weight.shape
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(update, alpha=-rate * max(1, rows / cols) ** 0.5)
        return loss


def _orthogonalise(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz iterations, which move the singular values of a matrix towards 1."""
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x).float()
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
