"""How films change with their length: what each shot of generated films shows, by its number in the film."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from datamodules.identities import Identities
from datamodules.judged_shots import judged_shots


class ShotDrift(Metric):
    """Means over films for each judged shot, by its number in the film.

    `compute` returns, one value a judged shot in order: "shot", the number; "films"; "subject_shown", the share in
    which a subject is there, as in `IdentityRecall`; "window_error", the mean squared error of the subject's window
    against the nearest identity, 0 for a perfect drawing of any; "same_as_introduction", the share that shows the
    identity which the introduction of the subject shows, NaN for introductions themselves.

    Args:
        identities: The appearance of subjects.
    """

    full_state_update = False
    is_differentiable = False

    rows: list[Tensor]

    def __init__(self, identities: Identities) -> None:
        super().__init__()
        self.identities = identities
        # Of each batch, float32 (shots, 4): number, subject shown, window error, same identity as in the introduction.
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, clips: list[Tensor], batch: dict[str, Any]) -> None:
        """Add generated clips, shaped as `batch["clips"]`, every shot of which is judged."""
        everything = batch | {"known": [False] * len(clips)}
        for film in judged_shots(clips, everything):
            seen: list[Tensor] = []
            for number, judged in enumerate(film):
                each, bare = self.identities.errors(judged.shot)
                least, saw = each.min(-1)
                seen.append(saw)
                # Of a subject that was not seen before, the introduction is this shot itself.
                first = judged.introduction
                same = (torch.stack(seen, 1).gather(1, first[:, None])[:, 0] == saw).float()
                pixels = judged.shot.clip.shape[1] * 3 * self.identities.pixels**2
                same = same.masked_fill(first == number, torch.nan)
                row = (torch.full_like(least, number), (least < bare / 2).float(), least / pixels, same)
                self.rows.append(torch.stack(row, dim=-1))

    def compute(self) -> dict[str, list[float]]:
        """The means by shot."""
        rows = dim_zero_cat(self.rows)
        found: dict[str, list[float]] = {
            name: [] for name in ("shot", "films", "subject_shown", "window_error", "same_as_introduction")
        }
        for number in rows[:, 0].unique().tolist():
            mine = rows[rows[:, 0] == number]
            means = [number, float(len(mine)), *mine[:, 1:3].mean(0).tolist(), float(mine[:, 3].nanmean())]
            for values, value in zip(found.values(), means, strict=True):
                values.append(value)
        return found
