"""Sliding tile attention (STA): a static 3D window of tiles for each head.

Paper: Fast Video Generation with Sliding Tile Attention, arXiv 2502.04507.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparse_zoo.attention import Attention, Branch, Call, Card, Knob, Limit, Term
from sparse_zoo.blocks import joint, windowed
from sparse_zoo.layout import Layout
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered
from sparse_zoo.requirements import is_window, require

Triple = tuple[int, ...]
EVERY_TILE = (1 << 30) + 1


@register("sta")
class STA(Attention):
    """A 3D window of tiles around each tile, with a fixed size per head.

    **Rule**

    Video is cut into tiles of (frames, rows, cols) tokens. The queries of a tile attend to all keys of the tiles in a
    window around it. At the edges the window is shifted inside, so that it keeps its size.

    **Paper**

    - Text is dense.
    - Training-free: each head takes the window that loses least on a few prompts, and the first noise steps stay dense
      (`dense_above`). Fine-tuned: all heads have one window, 3 × 3 × 3 tiles.
    - Its films have 30 × 48 × 80 tokens, in tiles of 6 × 8 × 8.

    **Our choices**

    - The search for windows is not part of this class: pass the windows that it found.
    - Tiles restart at each shot; windows reach across cuts.
    - Partial tiles at the edges are exact. The paper asks for sizes that the tile divides.
    - Window sizes are odd. The authors' code also accepts even sizes, where 6 is as wide as 7.

    **Not to be confused with**

    `window`: one window for all heads, with a choice of how edges and cuts are treated.

    Args:
        tile: Tokens of a tile along (frames, rows, cols).
        window: Tiles of a window along (frames, rows, cols), odd numbers; or a list of such windows, which the heads of
            a layer use in turn.
    """

    limits = Limit({"window": (EVERY_TILE, EVERY_TILE, EVERY_TILE)})
    strict = "windows reach across cuts, both ways"
    anchors = ("text",)
    knob = Knob("window", (1, 1, 1), (15, 15, 15))
    card = Card(
        paper="Fast Video Generation with Sliding Tile Attention, arXiv 2502.04507",
        granularity="tile of queries -> tiles of keys",
        chosen_by="",
        trained="training-free, with a window searched for each head; or fine-tuned, with one for all",
        claim="HunyuanVideo in 501 s without training and 268 s fine-tuned, against 945 s with FlashAttention-3",
    )
    small = {"tile": (2, 2, 1), "window": ((3, 1, 3), (1, 3, 1), (1, 1, 5))}

    def __init__(
        self,
        *,
        tile: Sequence[int] = (6, 8, 8),
        window: Sequence[int] | Sequence[Sequence[int]] = (3, 3, 3),
        **base: Any,
    ) -> None:
        super().__init__(**base)
        tile, windows = tuple(tile), _windows(window)
        right = windows and all(map(is_window, windows))
        require(
            self,
            "" if right else f"window must be three odd whole numbers of at least 1, or a list of such, got {window!r}",
            triples={"tile": tile},
        )
        self.tile, self.windows = tile, windows
        if len(set(windows)) > 1:
            self.own_heads = "heads have windows of their own"

    def branches(self, call: Call) -> list[Branch | Term]:
        """One branch with one window table for each head."""
        heads = range(call.heads.start, call.heads.stop)
        windows = tuple(self.windows[head % len(self.windows)] for head in heads)
        plan = _sta(call.layout, self.tile, windows if len(set(windows)) > 1 else windows[:1])
        return [Branch(call.narrow(plan))]


def _windows(given: Sequence[Any]) -> tuple[Triple, ...]:
    """One window a head in turn, from one for all or a list of them."""
    several = all(isinstance(one, list | tuple) for one in given)
    return tuple(map(tuple, given)) if several else (tuple(given),)


@remembered(32)
def _sta(layout: Layout, tile: Triple, windows: tuple[Triple, ...]) -> Plan:
    """`windows`: that of each head, or one for all."""
    tiles = layout.tiles(tile)
    if not tiles.count:
        return joint(layout)
    tables = {window: windowed(layout, tile, window) for window in set(windows)}
    near = torch.stack([tables[window] for window in windows])[None]
    return joint(layout, *Plan.blocks(tiles, tiles, near).parts)
