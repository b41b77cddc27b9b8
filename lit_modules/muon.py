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
    ) -> None:
        self.muon = Muon(list(matrices), lr=muon_lr, weight_decay=weight_decay)
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
