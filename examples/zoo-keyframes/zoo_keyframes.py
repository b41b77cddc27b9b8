"""Keyframe attention: each shot attends to itself and to the first frames of the shots before it."""

from typing import Any

from torch import Tensor

import sparse_zoo as zoo
from sparse_zoo.errors import refuse
from sparse_zoo.remember import remembered


@zoo.register("keyframes")
class Keyframes(zoo.Attention):
    """Every token attends to its own shot, to the first frames of shots before it, and to all text up to its shot.

    Args:
        reach: Number of earlier shots.
        frames: Frames at the start of each of them.
    """

    limits = "it never looks ahead"
    strict = {}
    causality = "strict"
    anchors = ("text", "shot")
    knob = zoo.Knob("reach", 0, 8)
    small = {"reach": 1}  # the films of the checks have few shots

    def __init__(self, *, reach: int = 4, frames: int = 1, **base: Any) -> None:
        super().__init__(**base)
        refuse(
            "keyframes",
            [
                f"reach must be at least 0, got {reach}" if reach < 0 else "",
                f"frames must be at least 1, got {frames}" if frames < 1 else "",
            ],
        )
        self.reach, self.frames = reach, frames

    def plan(self, q: Tensor, k: Tensor, layout: zoo.Layout) -> zoo.Plan:  # noqa: ARG002
        return keyframes(layout, self.reach, self.frames)


@remembered(32)  # it depends on the layout alone, so it is built once, not in every step
def keyframes(layout: zoo.Layout, reach: int, frames: int) -> zoo.Plan:
    """Each shot × itself, × text up to it, × keyframes of the shots before it."""
    shots = layout.chunks("shot", captions="inside")
    text = layout.partition("shot", where=layout.is_text)
    keys = layout.partition("shot", where=~layout.is_text & (layout.shot_frame < frames))

    def back(pieces: zoo.Partition) -> Tensor:
        """Shots between a piece and each later shot, -1 where the piece is in another film or a later shot."""
        gap = shots.shot[:, None] - pieces.shot
        return gap.masked_fill((shots.sample[:, None] != pieces.sample) | (gap < 0), -1)

    read = zoo.Plan.blocks(shots, text, back(text) >= 0)
    seen = zoo.Plan.blocks(shots, keys, (back(keys) >= 0) & (back(keys) <= reach))
    return (
        zoo.Plan.within(shots) | read | seen
    )  # own captions and keyframes are in two of the plans; a union counts them once
