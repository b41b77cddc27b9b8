"""Sparse VideoGen (SVG): each head attends near in time or near in space, whichever loses less on a few queries.

Paper: Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity, arXiv 2502.01776.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_zoo.attention import Attention, Branch, Call, Card, Knob, Limit, Term
from sparse_zoo.blocks import joint, same_film, slice_of
from sparse_zoo.layout import Layout
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Part, Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered
from sparse_zoo.requirements import require


@register("svg")
class SVG(Attention):
    """Spatial or temporal mask per head, by error on sampled queries.

    **Rule**

    A spatial head attends to its own frame and the frames near it. A temporal head attends to its own place and the
    places near it, in all frames. Both attend to text and to the first frame. In every call, each head takes the mask m
    of smaller error on a few sampled queries:

        E_m = mean over queries and channels of (softmax(q k^T / sqrt(D) within m) v - softmax(q k^T / sqrt(D)) v)²

    **Paper**

    - Training-free, with this choice ("online profiling") made in every call.
    - The masks of the authors' code are bands of tokens, in frame order and in place order, in blocks of 128. In a
      temporal head the first places stand for the first frame. Its scripts for Wan keep a band of 0.3 of all pairs, as
      width 3 does for 21 frames.

    **Our choices**

    - Each film chooses for itself, from queries spread evenly over its video; the paper samples them at random. A tie
      gives a spatial head.
    - The spatial mask is `width` whole frames before and after the own one. The temporal mask is its mirror image:
      places are cut into as many groups as the film has frames (group = place * frames // places), and `width` groups
      before and after the own one are attended. Both kinds of head therefore cost the same.
    - Where shots differ in frame size, places are compared by group.
    - It trains like any other method: gradients pass through attention, not through the choice.

    **Not to be confused with**

    `svg2`, which clusters tokens by content instead of choosing between two static masks.

    Args:
        width: Frames, or groups of places, attended before and after the own one.
        rows: Queries sampled in each film.
    """

    limits = Limit({"width": 1 << 30})
    strict = "spatial heads attend across cuts, and the choice of a head looks at the whole film"
    anchors = ("text",)
    pools_queries = True
    reads_values = "a head's kind is chosen by the error of sampled outputs"
    knob = Knob("width", 0, 16)
    card = Card(
        paper="Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity, "
        "arXiv 2502.01776",
        granularity="head -> neighbouring frames, or neighbouring places of all frames",
        chosen_by="error of sampled queries under either mask",
        trained="training-free",
        claim="2.28x end to end on CogVideoX-v1.5, 2.33x on HunyuanVideo, 1.51x on Wan 2.1, over dense",
    )
    small = {"width": 1, "rows": 7}

    def __init__(self, *, width: int = 3, rows: int = 64, **base: Any) -> None:
        super().__init__(**base)
        require(self, from_zero={"width": width}, counts={"rows": rows})
        self.width, self.rows = width, rows

    def branches(self, call: Call) -> list[Branch | Term]:
        """One branch: each head's spatial or temporal mask, chosen from sampled queries."""
        with torch.no_grad(), torch.autocast(call.q.device.type, enabled=False):
            temporal = self._temporal(call)
        sink, bands = _bands(call.layout, self.width)
        parts = [
            Part(queries, keys, near & chosen[:, :, queries.sample, None], routed=True)
            for (queries, keys, near), chosen in zip(bands, (~temporal, temporal), strict=False)  # no bands: one frame
        ]
        return [Branch(joint(call.layout, *sink, *parts))]

    def _temporal(self, call: Call) -> Tensor:
        """Whether a head is temporal: bool (B, H, films)."""
        (batch, heads, _, dim), kv_heads = call.q.shape, call.k.shape[1]
        share, layout = heads // kv_heads, call.layout
        errors = torch.zeros(2, batch, heads, len(layout.films), device=call.q.device)
        start = 0
        for number, film in enumerate(layout.films):
            own = slice(start, start + len(film))
            start += len(film)
            rows = _sampled(layout, number, self.rows)
            always = layout.is_text[own] | (layout.frame[own] == 0)
            masks = [always | ((at[rows, None] - at[own]).abs() <= self.width) for at in _places(layout)]
            step = max(1, slice_of(call.q) // (batch * share * len(film)))
            for head in range(kv_heads):
                mine = slice(head * share, (head + 1) * share)
                k, v = (x[:, head, None, own].float() for x in (call.k, call.v))
                for first in range(0, len(rows), step):
                    some = slice(first, first + step)
                    scores = call.q[:, mine, rows[some]].float() @ k.transpose(-1, -2) * dim**-0.5
                    full = scores.softmax(-1) @ v
                    for kind, mask in enumerate(masks):
                        out = scores.masked_fill(~mask[some], -torch.inf).softmax(-1) @ v
                        errors[kind, :, mine, number] += (out - full).square().sum((-1, -2))
        return errors[1] < errors[0]

    def routing_flops(self, call: Call) -> int:
        """The scores of the sampled queries, and their outputs in full and under both masks."""
        batch, heads, _, dim = call.q.shape
        pairs = sum(len(_sampled(call.layout, i, self.rows)) * len(film) for i, film in enumerate(call.layout.films))
        return batch * heads * pairs * dim * (2 + 3 * 2)


@remembered(32)
def _places(layout: Layout) -> tuple[Tensor, Tensor]:
    """The frame of each token, and its group of places (as many groups as the film has frames): int64 (L,)."""
    frames = torch.tensor([sum(shot.frames for shot in film.shots) for film in layout.films], device=layout.device)
    place = layout.row * layout.cols + layout.col
    return layout.frame, place * frames[layout.sample] // (layout.rows * layout.cols)


@remembered(32)
def _sampled(layout: Layout, film: int, rows: int) -> Tensor:
    """Up to `rows` queries spread evenly over the video of a film: int64 (n,), of the stream."""
    video = ((layout.sample == film) & ~layout.is_text).nonzero()[:, 0]
    count = min(rows, len(video))
    return video[(2 * torch.arange(count, device=video.device) + 1) * len(video) // max(1, 2 * count)]


@remembered(32)
def _bands(layout: Layout, width: int) -> tuple[tuple[Part, ...], list[tuple[Partition, Partition, Tensor]]]:
    """The first frames, which all video attends to, and the bands of the two kinds of head.

    A band is the pieces of queries, those of the other keys, and which of them are near, bool (Q, K).
    """
    video = ~layout.is_text
    everyone, first = layout.partition(where=video), layout.partition(where=layout.frame == 0)
    sink = Plan.blocks(everyone, first, same_film(everyone, first)).parts if first.count else ()
    rest = layout.frame > 0
    bands = []
    for at in _places(layout) if bool(rest.any()) else ():
        queries, keys = layout.partition(at, where=video), layout.partition(at, where=rest)
        apart = (queries.of(at)[:, None] - keys.of(at)).abs()
        bands.append((queries, keys, same_film(queries, keys) & (apart <= width)))
    return sink, bands
