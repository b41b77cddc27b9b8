"""Does a generated shot show the subject that an earlier shot introduced?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from datamodules.identities import Identities
from datamodules.last_shots import last_shots


class IdentityRecall(Metric):
    """Shares of films whose last shot shows the right subject, by `Identities.decode`.

    `compute` gives five scalars: "identity_recall", "shape_recall", "colour_recall", "texture_recall" (chance, with all
    192 identities: 1/192, 1/6, 1/8 and 1/4; `chance` has them for the sizes at hand) and "wrong_subject", the share
    decoded as another identity of the same film: a model that remembers, but the wrong subject. Chance for that is
    (other identities in the film) / (all identities).
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    scored: Tensor
    hits: Tensor
    right: list[Tensor]

    def __init__(self, identities: Identities) -> None:
        super().__init__()
        self.identities = identities
        self.add_state("scored", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("hits", torch.zeros(5, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("right", [], dist_reduce_fx="cat")

    @property
    def chance(self) -> dict[str, float]:
        """What guessing an identity at random scores."""
        of = self.identities
        return {
            "identity_recall": 1 / len(of),
            "shape_recall": 1 / of.shapes,
            "colour_recall": 1 / of.colours,
            "texture_recall": 1 / of.textures,
        }

    def update(self, clips: list[Tensor], batch: dict[str, Any]) -> None:
        """`clips`, generated, are shaped as `batch["clips"]`; the batch is one of `ShotWorld`'s."""
        for last in last_shots(clips, batch):
            seen = self.identities.decode(last.shot.clip, last.shot.position, last.shot.background)
            self._score(seen, last.identity, last.identities)

    def _score(self, seen: Tensor, true: Tensor, in_film: Tensor) -> None:
        saw, is_ = self.identities.attributes(seen), self.identities.attributes(true)
        right = [seen == true, *(saw[name] == is_[name] for name in ("shape", "colour", "texture"))]
        wrong = (seen != true) & (seen[:, None] == in_film).any(-1)
        self.hits += torch.stack([*right, wrong]).sum(-1)
        self.scored += len(seen)
        self.right.append(seen == true)

    def film_outcomes(self) -> dict[str, list[float]]:
        """{"identity_recall": 1 or 0 of every film since the last reset, in order}."""
        with self.sync_context():
            return {"identity_recall": dim_zero_cat(self.right).float().tolist()}

    def compute(self) -> dict[str, Tensor]:
        names = ("identity_recall", "shape_recall", "colour_recall", "texture_recall", "wrong_subject")
        return dict(zip(names, self.hits / self.scored, strict=True))
