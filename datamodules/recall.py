"""The share of generated shots that show the subject that an earlier shot introduced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from datamodules.identities import Identities
from datamodules.last_shots import Shown, last_shots

PARTS = ("shape", "colour", "texture")


class IdentityRecall(Metric):
    """Shares of films whose last shot shows the right subject, by `Identities.decode`.

    The right identity is the true one. In whole films, whose captions do not name it, it is the one that the nearest
    earlier shot of the same subject shows as the model generated it.

    `compute` returns scalars: "identity_recall"; "shape_recall", "colour_recall", "texture_recall"; "wrong_subject",
    the share that shows another identity of the film instead, which is memory of the wrong subject; and
    "identity_recall_back_<d>" over the films whose subject was last seen d shots before, for each d that occurs.

    Args:
        identities: The appearance of subjects.
        whole: Whether whole films are judged. The names then begin with "whole_", and "whole_identity_chance" is added:
            the score if last shots were exchanged at random between films. A model that generates one subject
            everywhere has a recall of 1, and this chance too.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    scored: list[Tensor]

    def __init__(self, identities: Identities, *, whole: bool = False) -> None:
        super().__init__()
        self.identities = identities
        self.whole = whole
        # Of each batch, int64 (films, 4): the identity seen, the right one, whether the seen one is another subject's,
        # and how many shots before the subject was seen.
        self.add_state("scored", [], dist_reduce_fx="cat")

    @property
    def chance(self) -> dict[str, float]:
        """The score of guessing an identity at random, where it is known beforehand: not for whole films."""
        of = self.identities
        kinds = {"identity": len(of), "shape": of.shapes, "colour": of.colours, "texture": of.textures}
        return {} if self.whole else {f"{name}_recall": 1 / kind for name, kind in kinds.items()}

    def update(self, clips: list[Tensor], batch: dict[str, Any]) -> None:
        """Add generated clips, shaped as `batch["clips"]`; the batch is one of `ShotWorld`'s."""
        for last in last_shots(clips, batch):
            seen, source = self._seen(last.shot), last.source
            earlier = torch.stack([*map(self._seen, last.earlier)], 1) if self.whole else last.identities[:, :-1]
            true = earlier.gather(1, source[:, None])[:, 0]
            wrong = (seen != true) & (seen[:, None] == earlier).any(-1)
            self.scored.append(torch.stack([seen, true, wrong.long(), len(last.earlier) - source], dim=-1))

    def _seen(self, shot: Shown) -> Tensor:
        """The identity that a shot shows: int64 (B,)."""
        return self.identities.decode(shot.clip, shot.position, shot.background)

    def film_outcomes(self) -> dict[str, list[float]]:
        """{"identity_recall": 1 or 0 for every film since the last reset, in order}."""
        with self.sync_context():
            seen, true = dim_zero_cat(self.scored)[:, :2].unbind(-1)
            return {self._name("identity_recall"): (seen == true).float().tolist()}

    def compute(self) -> dict[str, Tensor]:
        """The shares over all films since the last reset, as scalars."""
        seen, true, wrong, back = dim_zero_cat(self.scored).unbind(-1)
        right = (seen == true).float()
        saw, is_ = self.identities.attributes(seen), self.identities.attributes(true)
        found = {"identity_recall": right.mean()}
        found |= {f"{part}_recall": (saw[part] == is_[part]).float().mean() for part in PARTS}
        found["wrong_subject"] = wrong.float().mean()
        found |= {f"identity_recall_back_{d}": right[back == d].mean() for d in back.unique().tolist()}
        if self.whole:
            drawn, shown = (torch.bincount(x, minlength=len(self.identities)).double() / len(x) for x in (seen, true))
            found["identity_chance"] = (drawn * shown).sum().float()
        return {self._name(name): value for name, value in found.items()}

    def _name(self, measure: str) -> str:
        return f"whole_{measure}" if self.whole else measure
