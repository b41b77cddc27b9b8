"""The share of generated shots that show the subject that an earlier shot introduced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from datamodules.identities import Identities, Shown
from datamodules.judged_shots import judged_shots

PARTS = ("shape", "colour", "texture")


class IdentityRecall(Metric):
    """Shares of judged shots that show the right subject, by `Identities.decode`.

    The right identity is the true one. In whole films, whose captions do not name it, it is the one that the nearest
    earlier shot of the same subject shows as the model generated it.

    `compute` returns scalars: "identity_recall"; "shape_recall", "colour_recall", "texture_recall"; "wrong_subject",
    the share that shows another identity of the film instead, which is memory of the wrong subject; "subject_shown",
    the share in which a subject was generated at all, and "shown_identity_recall", the recall among these (0 if there
    are none); and "identity_recall_back_<d>" over the shots whose subject was last seen d shots before, in a shot that
    is given or, in whole films, in any, for each d that occurs.

    A subject is there if the nearest identity leaves less than half the squared error that the bare background leaves;
    in whole films it must be in the earlier shot too.

    Args:
        identities: The appearance of subjects.
        whole: Whether whole films are judged. The names then begin with "whole_", and "whole_identity_chance" is added:
            the score if shots were exchanged at random between films. A model that generates one subject everywhere has
            a recall of 1, and this chance too.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    scored: list[Tensor]

    def __init__(self, identities: Identities, *, whole: bool = False) -> None:
        super().__init__()
        self.identities = identities
        self.whole = whole
        # Of each batch, int64 (shots, 6), film after film: the identity seen, the right one, whether the seen one is
        # another subject's, how many shots before the subject was seen, whether a subject is there, and whether the
        # shot is the first judged one of its film.
        self.add_state("scored", [], dist_reduce_fx="cat")

    @property
    def chance(self) -> dict[str, float]:
        """The score of guessing an identity at random, where it is known beforehand: not for whole films."""
        of = self.identities
        kinds = {"identity": len(of), "shape": of.shapes, "colour": of.colours, "texture": of.textures}
        return {} if self.whole else {f"{name}_recall": 1 / kind for name, kind in kinds.items()}

    def update(self, clips: list[Tensor], batch: dict[str, Any]) -> None:
        """Add generated clips, shaped as `batch["clips"]`; the batch is one of `ShotWorld`'s."""
        seen: dict[int, tuple[Tensor, Tensor]] = {}  # of clips

        def look(shot: Shown) -> tuple[Tensor, Tensor]:
            if id(shot.clip) not in seen:
                seen[id(shot.clip)] = self._look(shot)
            return seen[id(shot.clip)]

        for film in judged_shots(clips, batch):
            rows = []
            for number, judged in enumerate(film):
                saw, there = look(judged.shot)
                # In whole films every shot is generated; otherwise what was generated is no source.
                source = judged.source if self.whole else judged.known_source
                earlier = judged.identities[:, :-1]
                if self.whole:
                    earlier, before = (torch.stack(x, 1) for x in zip(*map(look, judged.earlier), strict=True))
                    there = there & before.gather(1, source[:, None])[:, 0]
                true = earlier.gather(1, source[:, None])[:, 0]
                wrong = (saw != true) & (saw[:, None] == earlier).any(-1)
                back = len(judged.earlier) - source
                first = torch.full_like(saw, number == 0)
                rows.append(torch.stack([saw, true, wrong.long(), back, there.long(), first], dim=-1))
            self.scored.append(torch.stack(rows, dim=1).flatten(0, 1))

    def _look(self, shot: Shown) -> tuple[Tensor, Tensor]:
        """The identity that a shot shows, int64 (B,), and whether a subject is there at all, bool (B,)."""
        each, bare = self.identities.errors(shot)
        least, saw = each.min(-1)
        return saw, least < bare / 2

    def film_outcomes(self) -> dict[str, list[float]]:
        """{"identity_recall": share of right shots, for every film since the last reset, in order}."""
        with self.sync_context():
            seen, true, _, _, _, first = dim_zero_cat(self.scored).unbind(-1)
            film, right = first.cumsum(0) - 1, (seen == true).float()
            count = torch.bincount(film)
            share = torch.zeros(len(count), device=right.device).index_add_(0, film, right) / count
            return {self._name("identity_recall"): share.tolist()}

    def compute(self) -> dict[str, Tensor]:
        """The shares over all judged shots since the last reset, as scalars."""
        seen, true, wrong, back, there, _ = dim_zero_cat(self.scored).unbind(-1)
        right = (seen == true).float()
        saw, is_ = self.identities.attributes(seen), self.identities.attributes(true)
        found = {"identity_recall": right.mean()}
        found |= {f"{part}_recall": (saw[part] == is_[part]).float().mean() for part in PARTS}
        found["wrong_subject"] = wrong.float().mean()
        found["subject_shown"] = there.float().mean()
        found["shown_identity_recall"] = (right * there).sum() / there.sum().clamp(min=1)
        found |= {f"identity_recall_back_{d}": right[back == d].mean() for d in back.unique().tolist()}
        if self.whole:
            drawn, shown = (torch.bincount(x, minlength=len(self.identities)).double() / len(x) for x in (seen, true))
            found["identity_chance"] = (drawn * shown).sum().float()
        return {self._name(name): value for name, value in found.items()}

    def _name(self, measure: str) -> str:
        return f"whole_{measure}" if self.whole else measure
