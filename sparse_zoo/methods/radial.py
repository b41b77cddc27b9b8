"""Radial attention: a static mask whose density falls with distance in time, O(n log n).

Paper: Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation, arXiv 2506.19852.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_zoo.attention import Attention, Card, Knob, Limit
from sparse_zoo.blocks import film_by_film, joint, same_film, slice_of, stretches
from sparse_zoo.layout import Layout
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered
from sparse_zoo.requirements import require


@register("radial")
class Radial(Attention):
    """Near frames in full, farther frames along ever thinner diagonals.

    **Rule**

    Frames that are d apart are in band b, the number of binary digits of d (d = 0; 1; 2 and 3; 4 to 7; ...).

    - Frames at most one apart attend to each other in full, and all frames attend to the first frame.
    - In farther frames, a query attends to the keys within a width of its own position in the frame. For frames of s
      tokens the width is w = 2^(binary digits of s) / 2^b, times `decay`, and at least `block_tokens`.
    - Where w is less than `block_tokens`, only those distances d are kept that block_tokens // w divides.
    - The token mask becomes a block mask: a pair of blocks is attended if, of the keys that any query of the block
      sees, more than 0.6 are seen by more than a third of its queries.

    **Paper**

    - The widths halve from band to band; the exact numbers above are those of the authors' code.
    - The first noise steps and the first layer stay dense: use `dense_above` and a list of attention per layer.
    - There are no parameters: it serves trained models as they are. The paper also fine-tunes models for longer films.

    **Our choices**

    - The block rule looks at the whole mask. The authors' code looks at each pair of frames and drops the tail of some
      frames; the two agree where `block_tokens` divides the frame.
    - A block always attends to itself.
    - Blocks and frames are counted through the video of a film, across cuts.
    - Where frames differ in size, s is the size of the query's frame, and key l of a frame of s' tokens is at position
      (2l + 1) s // 2s'.
    - Text attends to everything and is attended by everything.

    **Not to be confused with**

    `window` and `sta`, whose window has the same width at every distance and ends there.

    Args:
        decay: Factor of the widths; a larger value keeps more at a distance.
        block_tokens: Tokens in a block of queries and of keys, and the least width.
    """

    limits = Limit({"block_tokens": 1 << 30})
    strict = "frames are attended across cuts, both ways"
    anchors = ("text",)
    knob = Knob("decay", 0.1, 4.0)
    card = Card(
        paper="Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation, "
        "arXiv 2506.19852",
        granularity="block of queries -> blocks of keys",
        chosen_by="",
        trained="training-free; LoRA for longer films",
        claim="1.9x over dense at the default length; at 4 times the length 3.7x, and 4.4x cheaper tuning",
    )
    small = {"block_tokens": 5}

    def __init__(self, *, decay: float = 1.0, block_tokens: int = 128, **base: Any) -> None:
        super().__init__(**base)
        finite = 0 < decay < math.inf
        require(
            self,
            "" if finite else f"decay must be above 0 and finite (the authors use 0.2 to 1), got {decay!r}",
            counts={"block_tokens": block_tokens},
        )
        self.decay, self.block_tokens = float(decay), block_tokens

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:  # noqa: ARG002
        """The block mask, which depends on the layout alone."""
        return _radial(layout, self.block_tokens, self.decay)


@remembered(32)
def _radial(layout: Layout, block_tokens: int, decay: float) -> Plan:
    blocks = stretches(layout, block_tokens)
    if not blocks.count:
        return joint(layout)
    near = _dense_enough(layout, blocks, block_tokens, decay)
    near |= torch.eye(blocks.count, dtype=torch.bool, device=near.device)
    return joint(layout, *Plan.blocks(blocks, blocks, near).parts)


def _dense_enough(layout: Layout, blocks: Partition, block_tokens: int, decay: float) -> Tensor:
    """Pairs of blocks of which the token mask covers enough: bool (P, P). No mask of tokens is built.

    For each key token and each run of queries of one frame in one block, the queries that see the key are an interval.
    """
    video = ~layout.is_text
    frames = layout.partition("shot", "frame", where=video)
    size, frame = frames.sizes[0, 0], frames.piece_of[0, 0][video]
    place = (layout.row * layout.cols + layout.col)[video]
    reach = _reach(frames, block_tokens, decay)

    runs = layout.partition(blocks.piece_of[0, 0], "shot", "frame", where=video)
    of_block, of_frame = runs.of(blocks.piece_of[0, 0]), runs.of(frames.piece_of[0, 0])
    first = place[runs.offsets[0, 0, :-1].long()][:, None].int()
    last = first + runs.sizes[0, 0, :, None].int() - 1

    # The position of each key, scaled to every frame size that occurs.
    sizes, kind = size.unique(return_inverse=True)
    carried = ((2 * place + 1) * sizes[:, None] // (2 * size[frame])).int()

    bounds, rows = blocks.offsets[0, 0].tolist(), blocks.sizes[0, 0, :, None]
    kept = torch.zeros(blocks.count, blocks.count, dtype=torch.bool, device=layout.device)
    for film in film_by_film(blocks):
        keys = slice(bounds[film.start], bounds[film.stop])
        length = keys.stop - keys.start
        size_of_block = min(block_tokens, length)
        step = max(1, slice_of(place) // (4 * length))
        for start in range(film.start, film.stop, step):
            some = slice(start, min(start + step, film.stop))
            here = ((of_block >= start) & (of_block < some.stop)).nonzero()[:, 0]
            width = reach[of_frame[here]].index_select(1, frame[keys])
            at = carried[:, keys].index_select(0, kind[of_frame[here]])
            seeing = torch.minimum(at + width, last[here]) - torch.maximum(at - width, first[here]) + 1
            by = torch.zeros(some.stop - start, length, dtype=torch.int32, device=layout.device)
            by.index_add_(0, of_block[here] - start, seeing.clamp_(min=0))
            enough, any_sees = (_per_block(x, size_of_block) for x in (3 * by > rows[some], by > 0))
            kept[some, film] = 5 * enough > 3 * any_sees
    return kept


def _per_block(what: Tensor, size: int) -> Tensor:
    """How many entries of each `size` along the last dimension are True, bool (…, n) -> int32 (…, ⌈n / size⌉)."""
    counted: Tensor = torch.nn.functional.pad(what, (0, -what.shape[-1] % size)).unflatten(-1, (-1, size))
    return counted.sum(-1, dtype=torch.int32)


def _reach(frames: Partition, block_tokens: int, decay: float) -> Tensor:
    """How far from its own position a query of one frame sees in another: int32 (F, F) in tokens, -1 for none."""
    size, number = frames.sizes[0, 0], frames.frame
    apart = (number[:, None] - number).abs()
    width = torch.exp2((_digits(size)[:, None] - _digits(apart)).double())
    kept = apart % (block_tokens / width).floor().clamp(min=1) == 0
    reach = torch.where(kept, (decay * width).clamp(min=block_tokens, max=1 << 30).floor(), -1)
    whole = (apart <= 1) | (number == 0)
    return torch.where(whole, size[:, None], reach).masked_fill(~same_film(frames, frames), -1).int()


def _digits(x: Tensor) -> Tensor:
    """The number of binary digits: 0 for 0, 1 for 1, 2 for 2 and 3, ..."""
    return torch.frexp(x.double()).exponent
