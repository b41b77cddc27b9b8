"""Radial attention: a static mask whose density falls with distance in time, O(n log n).

Paper: Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation, arXiv 2506.19852.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_zoo.attention import Attention, Card, Knob, Limit, is_count
from sparse_zoo.blocks import SLICE, joint, same_film, stretches
from sparse_zoo.errors import refuse
from sparse_zoo.layout import Layout
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered


@register("radial")
class Radial(Attention):
    """Near frames in full, farther ones along ever thinner diagonals.

    The paper's: frames d apart are in band b, the number of binary digits of d (0, 1, 2 and 3, 4 to 7, ...). Frames at
    most one apart attend in full, and all attend to the first frame. Farther on a query attends to the keys near its
    own place in the frame, within a width that halves from band to band; where that would be less than the grain of the
    kernel it stays there, and only every second, fourth, ... distance is kept instead. Exact numbers as in the authors'
    code: for frames of s tokens the width is w = 2^(binary digits of s) / 2^b, times `decay` but at least
    `block_tokens`, and of distances those are kept that block_tokens // w divides. A pair of blocks is attended if, of
    the keys in it that any query of the block sees, more than 0.6 are seen by more than a third of its queries.

    Ours: that rule is applied to the whole mask, where the code takes each pair of frames apart and drops the tail of
    some frames (the same where `block_tokens` divides the frames); a block always attends to itself; blocks count the
    video tokens of a film, and frames are counted through it, across cuts; where frames differ in size, s is the
    query's, and key l of s' is at place (2l + 1) s // 2s' in its frame; text is dense. The paper keeps the first noise
    steps dense, for which there is `dense_above`, and the first layer, for which there are lists of layers. Without
    parameters: it serves trained models as they are, and the paper also tunes them with it for longer films.

    Args:
        decay: Factor of the widths: how slowly they decay with distance.
        block_tokens: Tokens of a block of queries and of keys, and the least width.
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
        refuse(
            type(self).__name__,
            [
                f"decay must be above 0 and finite (the authors use 0.2 to 1), got {decay!r}"
                if not 0 < decay < math.inf
                else "",
                f"block_tokens must be a whole number of at least 1, got {block_tokens!r}"
                if not is_count(block_tokens)
                else "",
            ],
        )
        self.decay, self.block_tokens = float(decay), block_tokens

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:  # noqa: ARG002
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
    """Pairs of blocks of which the token mask holds enough: bool (P, P). No mask of tokens is made.

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

    # The place of each key in frames of each size that there is.
    sizes, kind = size.unique(return_inverse=True)
    carried = ((2 * place + 1) * sizes[:, None] // (2 * size[frame])).int()

    bounds, rows = blocks.offsets[0, 0].long(), blocks.sizes[0, 0, :, None]
    kept = torch.empty(blocks.count, blocks.count, dtype=torch.bool, device=layout.device)
    step = max(1, SLICE // len(place))
    for start in range(0, blocks.count, step):
        some = slice(start, start + step)
        here = ((of_block >= start) & (of_block < start + step)).nonzero()[:, 0]
        width, at = reach[of_frame[here]][:, frame], carried[kind[of_frame[here]]]
        seeing = torch.minimum(at + width, last[here]) - torch.maximum(at - width, first[here]) + 1
        by = torch.zeros(len(rows[some]), len(place), dtype=torch.int32, device=layout.device)
        by.index_add_(0, of_block[here] - start, seeing.clamp_(min=0))

        def in_blocks(what: Tensor) -> Tensor:
            return torch.nn.functional.pad(what.cumsum(-1), (1, 0))[:, bounds].diff(dim=-1)

        kept[some] = 5 * in_blocks(3 * by > rows[some]) > 3 * in_blocks(by > 0)
    return kept


def _reach(frames: Partition, block_tokens: int, decay: float) -> Tensor:
    """How far from its own place a query of one frame sees in another: int32 (F, F) in tokens, -1 not at all."""
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
