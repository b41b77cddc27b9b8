"""Rolling window with sink frames: what autoregressive video models keep in their cache.

Papers: Self Forcing: Bridging the Train-Test Gap in Autoregressive Video Diffusion, arXiv 2506.08009, and Efficient
Streaming Language Models with Attention Sinks, arXiv 2309.17453.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_zoo.attention import Attention, Card, Knob
from sparse_zoo.blocks import shot_for_captions, text_for_all
from sparse_zoo.layout import Layout
from sparse_zoo.plan import Part, Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered
from sparse_zoo.requirements import require


@register("rolling")
class Rolling(Attention):
    """The own chunk of frames, the latest frames before it, and sinks.

    **Rule**

    A shot is cut into chunks of `chunk_frames` frames. A chunk attends to itself in both directions, to the
    `window` frames before it, across cuts, to the first `sinks` frames of the film, and to the text of its own shot and
    those before. Text attends to such text and to the video of its own shot.

    **Paper**

    - Self Forcing generates a film chunk by chunk with a rolling cache of the latest keys and values, in training too.
    - Attention sinks keep the first tokens in the cache of a language model, whatever the window.
    - Only the abstracts were read: `window`, `sinks` and `chunk_frames` have no figures from the papers.

    **Our choices**

    - The rule of both is a plan, so that training sees what the cache will hold.
    - Chunks restart at shots, text is treated as above, and a frame in several sets is read once.
    - Sampling shot by shot (`sampling.order=shots`) caches the keys of earlier shots.

    **Not to be confused with**

    `window`, whose tiles look ahead as well.

    Args:
        window: Frames before the own chunk that it attends to.
        sinks: First frames of the film that every chunk attends to.
        chunk_frames: Frames of a chunk.
    """

    limits = "it never looks ahead"
    strict = {}
    causality = "strict"
    anchors = ("text",)
    knob = Knob("window", 0, 64)
    card = Card(
        paper="Self Forcing: Bridging the Train-Test Gap in Autoregressive Video Diffusion, arXiv 2506.08009; "
        "Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453",
        granularity="chunk of frames -> itself, latest frames, first frames",
        chosen_by="",
        trained="on its own rollouts (Self Forcing), from Wan 2.1 1.3B",
        claim="none checked: the rule alone is taken",
    )
    small = {"window": 1, "chunk_frames": 2}

    def __init__(self, *, window: int = 6, sinks: int = 1, chunk_frames: int = 3, **base: Any) -> None:
        super().__init__(**base)
        require(self, counts={"chunk_frames": chunk_frames}, from_zero={"window": window, "sinks": sinks})
        self.window, self.sinks, self.chunk_frames = window, sinks, chunk_frames

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:  # noqa: ARG002
        """Each chunk × itself, the `window` frames before it and the first `sinks` frames, and text up to its shot."""
        return _plan(layout, self.window, self.sinks, self.chunk_frames)


@remembered(32)
def _plan(layout: Layout, window: int, sinks: int, chunk_frames: int) -> Plan:
    video = ~layout.is_text
    parts: list[Part] = []
    chunks = layout.partition("shot", layout.shot_frame // chunk_frames, where=video)
    frames = layout.partition("frame", where=video)
    if chunks.count:
        film = chunks.sample[:, None] == frames.sample
        first = chunks.of(layout.frame - layout.shot_frame % chunk_frames)[:, None]
        gap = frames.frame - first
        before = (gap < 0) & ((gap >= -window) | (frames.frame < sinks))
        own = (chunks.shot[:, None] == frames.shot) & (gap >= 0) & (gap < chunk_frames)
        parts += Plan.blocks(chunks, frames, film & (before | own)).parts
    parts += (*text_for_all(layout, past=True), *shot_for_captions(layout))
    return Plan(*parts)
