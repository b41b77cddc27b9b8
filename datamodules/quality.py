"""How consistent a generated shot is with its film and within itself, and how its subject moves, without a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from datamodules.identities import Identities, Shown
from datamodules.judged_shots import Judged, judged_shots

MEASURES = (
    "cross_shot_consistency",
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "motion_accuracy",
)


def pixel_similarity(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    """1 - half the mean absolute difference of pixels (..., 3, h, w) clamped to [-1, 1], of shape (...).

    1 is identical, 0 black against white. `where`, bool (..., 1, h, w), are the pixels that count; NaN if there are
    none.
    """
    apart = (a.float().clamp(-1, 1) - b.float().clamp(-1, 1)).abs() / 2
    weight = (torch.ones_like(apart[..., :1, :, :]) if where is None else where.to(apart)).expand_as(apart)
    return 1 - (apart * weight).sum((-3, -2, -1)) / weight.sum((-3, -2, -1))


def over_time(similarity: Tensor, first: Tensor) -> Tensor:
    """VBench's mean over frames 2 ... F of ½ (to the frame before + to the first frame): both (B, F - 1) -> (B,)."""
    return (similarity + first).mean(-1) / 2


class ShotQuality(Metric):
    """Means over judged shots of measures, named after VBench's where the meaning is the same.

    VBench (arXiv 2311.17982) compares features of networks (DINO, CLIP, an interpolator, optical flow). Here the truth
    about the film replaces them, so that values do not compare with VBench's, although rankings may. "Similar" is
    `pixel_similarity`, 1 for identical.

    - "cross_shot_consistency" (not in VBench; MoGA has the same between features of two shots): the subject as this
      shot shows it, in the window where it should be, against the subject as its introduction shows it, cut out along
      the outline of the identity decoded there and put on this shot's background. Mean over frames.
    - "subject_consistency", as in VBench: how similar the subject's window is to that of the frame before and of the
      first frame, averaged. VBench uses DINO features of whole frames.
    - "background_consistency", as in VBench: the same for the pixels outside the subject's window in both frames.
      VBench uses CLIP features of whole frames.
    - "motion_smoothness", as in VBench: how similar a frame is to an interpolation of its neighbours. The interpolation
      here is their mean, and every inner frame is judged; VBench's is a network's, of every second frame. Subjects move
      by whole patches, so that even real films stay below 1.
    - "dynamic_degree", as in VBench: the share of shots that move. A shot moves if its subject, located by the nearest
      of all identities at all places, is not always where it is in the first frame; VBench thresholds optical flow.
      More is not better: real films have a share of their own, and noise is located anywhere, so it moves.
    - "motion_accuracy" (ours): the share of frames whose subject is located where the caption says.

    The second to fifth need two frames, smoothness three. `compute` leaves out a measure that no film allowed.

    Args:
        identities: The appearance of subjects.
        places: int64 (P, 2): top left pixels at which a subject can be.
    """

    full_state_update = False
    is_differentiable = False

    total: Tensor
    shots: Tensor

    def __init__(self, identities: Identities, places: Tensor) -> None:
        super().__init__()
        self.identities = identities
        self.places = places
        self.add_state("total", torch.zeros(len(MEASURES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("shots", torch.zeros(len(MEASURES), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, clips: list[Tensor], batch: dict[str, Any]) -> None:
        """Add generated clips, shaped as `batch["clips"]`; the batch is one of `ShotWorld`'s."""
        for judged in (shot for film in judged_shots(clips, batch) for shot in film):
            found = {"cross_shot_consistency": self._cross_shot(judged)} | self._over_frames(judged)
            # Not in place: states that a run in inference mode left could not be updated by one outside of it.
            values = [found.get(name, self.total[:0]) for name in MEASURES]
            self.total = self.total + torch.stack([value.double().nansum() for value in values])
            self.shots = self.shots + torch.stack([(~value.isnan()).sum() for value in values])

    def compute(self) -> dict[str, Tensor]:
        """The mean of each measure over shots, as scalars."""
        return {name: self.total[i] / self.shots[i] for i, name in enumerate(MEASURES) if self.shots[i]}

    def _cross_shot(self, judged: Judged) -> Tensor:
        shot = judged.shot
        seen = self.identities.crop(shot.clip, shot.position)  # (B, F, 3, p, p)
        size, number = (shot.clip.shape[-2], shot.clip.shape[-1]), torch.arange(seen.shape[1], device=seen.device)
        found = seen.new_full((len(seen),), torch.nan)
        for at, shown in enumerate(judged.earlier):
            rows = (judged.introduction == at).nonzero()[:, 0]
            if not len(rows):
                continue
            intro = Shown(shown.clip[rows], shown.position[rows], shown.background[rows], shown.view[rows])
            identity, here = self.identities.decode(intro), torch.arange(len(rows), device=seen.device)
            scene = self.identities.scene(
                shot.background[rows].repeat_interleave(len(number)), number.repeat(len(rows)), size
            ).unflatten(0, (len(rows), len(number)))
            ground = self.identities.crop(scene, shot.position[rows])
            if self.identities.views == 1:
                outline = self.identities.outlines(intro.view)[here, identity][:, None]  # (B, 1, 1, p, p)
                cut = self.identities.crop(intro.clip, intro.position).mean(1, keepdim=True)
                expected = torch.where(outline, cut, ground)
            else:
                view = shot.view[rows].repeat_interleave(len(number))
                known = self.identities.templates(view, ground.flatten(0, 1))
                each = torch.arange(len(known), device=seen.device)
                expected = known[each, identity.repeat_interleave(len(number))].unflatten(0, ground.shape[:2])
            found[rows] = pixel_similarity(seen[rows], expected).mean(-1)
        return found

    def _over_frames(self, judged: Judged) -> dict[str, Tensor]:
        clip, position = judged.shot.clip, judged.shot.position
        located = self.identities.locate(judged.shot, self.places)
        found = {"motion_accuracy": (located == position).all(-1).float().mean(-1)}
        if clip.shape[1] > 1:
            subject, away = self.identities.crop(clip, position), self._outside(clip, position)
            found["subject_consistency"] = over_time(
                pixel_similarity(subject[:, 1:], subject[:, :-1]), pixel_similarity(subject[:, 1:], subject[:, :1])
            )
            found["background_consistency"] = over_time(
                pixel_similarity(clip[:, 1:], clip[:, :-1], away[:, 1:] & away[:, :-1]),
                pixel_similarity(clip[:, 1:], clip[:, :1], away[:, 1:] & away[:, :1]),
            )
            found["dynamic_degree"] = (located != located[:, :1]).flatten(1).any(-1).float()
        if clip.shape[1] > 2:
            between = (clip[:, :-2] + clip[:, 2:]) / 2
            found["motion_smoothness"] = pixel_similarity(clip[:, 1:-1], between).mean(-1)
        return found

    def _outside(self, clip: Tensor, position: Tensor) -> Tensor:
        """The pixels that the subject's window does not cover: bool (B, F, 1, H, W)."""
        row, col = (torch.arange(size, device=clip.device) for size in clip.shape[-2:])
        top, left = position[..., 0, None], position[..., 1, None]
        rows = (row >= top) & (row < top + self.identities.pixels)
        cols = (col >= left) & (col < left + self.identities.pixels)
        return ~(rows[..., :, None] & cols[..., None, :])[:, :, None]
