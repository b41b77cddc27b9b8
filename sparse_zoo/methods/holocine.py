"""HoloCine's inter-shot attention: the own shot, and the first frame of every shot.

Paper: HoloCine: Holistic Generation of Cinematic Multi-Shot Long Video Narratives, arXiv 2510.20822.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_zoo.attention import Attention, Card, Knob, Limit
from sparse_zoo.blocks import joint, same_film
from sparse_zoo.layout import Layout
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered
from sparse_zoo.requirements import require


@register("holocine")
class HoloCine(Attention):
    """The own shot, and the first latent frame of every shot.

    **Rule**

    Video of shot s attends, in one softmax, to all video of shot s and to the first frame of every shot of
    the film: K(s) = video(s) ∪ ⋃_r first(r). Nothing depends on q or k.

    **Paper**

    Inter-shot sparse attention: full attention inside a shot, and between shots only to summaries of each
    shot; the released code takes the first tokens of each shot as its summary (`per_g` of them, mode "firstk"), which
    are its first latent frame when `per_g` is the number of tokens in a frame. Rule read from the public code
    (github.com/yihao-meng/HoloCine, diffsynth/models/wan_video_dit.py).

    **Our choices**

    The union is exact: the code appends the summaries of all shots to each shot's keys, so the first
    frame of the own shot counts twice there. Text is in a joint stream here: it is read by all and reads all; the code
    has text in cross-attention. `frames` generalizes the first frame to the first few.

    **Not to be confused with**

    the reach of `moga`'s windows, which take the two nearest frames of adjacent shots.

    Args:
        frames: First latent frames of each shot that all shots read.
    """

    limits = Limit({"frames": 1 << 30})
    strict = "the first frames of later shots are read"
    anchors = ("text", "shot")
    knob = Knob("frames", 1, 64)
    card = Card(
        paper="HoloCine: Holistic Generation of Cinematic Multi-Shot Long Video Narratives, arXiv 2510.20822",
        granularity="shot -> own shot, first frame of every shot",
        chosen_by="",
        trained="from Wan2.2 14B",
        claim="none: its abstract names no figure",
    )

    def __init__(self, *, frames: int = 1, **base: Any) -> None:
        super().__init__(**base)
        require(self, counts={"frames": frames})
        self.frames = frames

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:  # noqa: ARG002
        """Each shot × itself and the first `frames` frames of every shot, with text."""
        return _plan(layout, self.frames)


@remembered(32)
def _plan(layout: Layout, frames: int) -> Plan:
    video = ~layout.is_text
    if not bool(video.any()):
        return joint(layout)
    shots = layout.partition("shot", where=video)
    first = layout.partition("shot", where=video & (layout.shot_frame < frames))
    others = same_film(shots, first) & (shots.shot[:, None] != first.shot)
    return joint(layout, *Plan.within(shots).parts, *Plan.blocks(shots, first, others).parts)
