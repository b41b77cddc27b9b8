"""Tile-aligned 3D window attention.

Paper: Fast Video Generation with Sliding Tile Attention, arXiv 2502.04507, whose windows move by whole tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from sparse_zoo.attention import Attention, Knob, Limit, is_count
from sparse_zoo.blocks import grid, joint, same_film
from sparse_zoo.errors import refuse, unknown
from sparse_zoo.layout import Layout
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered

EVERY_TILE = (1 << 30) + 1


@register("window")
class Window(Attention):
    """3D window of tiles around each tile of video; text is read by all and reads all.

    A tile attends to the tiles whose place differs from its own by at most (window - 1) / 2 on each axis. Places in
    time count tiles through the film, so a window reaches across cuts; rows and columns are compared by number where
    shots differ in size. Ragged tiles at the edges are exact.

    Args:
        tile: Tokens of a tile along (frames, rows, cols).
        window: Tiles of a window along (frames, rows, cols), odd.
        edge: At the edges the window is pushed inside ("shift", as sliding tile attention does) or cut off ("cut").
        stop_at_shots: Tiles restart at each shot, so that none holds frames of two.
    """

    limits = Limit({"window": (EVERY_TILE, EVERY_TILE, EVERY_TILE)})
    strict = "windows reach across cuts, both ways"
    anchors = ("text",)
    knob = Knob("window", (1, 1, 1), (15, 15, 15))
    small = {"tile": (2, 2, 1), "window": (3, 1, 3)}

    def __init__(
        self,
        *,
        tile: Sequence[int] = (4, 4, 4),
        window: Sequence[int] = (3, 3, 3),
        edge: Literal["shift", "cut"] = "shift",
        stop_at_shots: bool = True,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        tile, window = tuple(tile), tuple(window)
        refuse(
            type(self).__name__,
            [
                f"tile must be three whole numbers of at least 1, got {tile!r}" if not _three(tile) else "",
                f"window must be three odd whole numbers of at least 1, got {window!r}"
                if not _three(window) or not all(size % 2 for size in window)
                else "",
                unknown("edge", edge, ("shift", "cut")) if edge not in ("shift", "cut") else "",
            ],
        )
        self.tile, self.window, self.edge, self.stop_at_shots = tile, window, edge, bool(stop_at_shots)

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:  # noqa: ARG002
        return _window(layout, self.tile, self.window, self.edge, self.stop_at_shots)


def _three(sizes: tuple[int, ...]) -> bool:
    return len(sizes) == 3 and all(map(is_count, sizes))


@remembered(32)
def _window(layout: Layout, tile: tuple[int, ...], window: tuple[int, ...], edge: str, stop_at_shots: bool) -> Plan:
    """Tiles × tiles, all × text, text × video."""
    tiles = layout.tiles(tile, stop_at_shots=stop_at_shots)
    if not tiles.count:
        return joint(layout)
    near = same_film(tiles, tiles)
    for (place, count), size in zip(grid(layout, tile, stop_at_shots=stop_at_shots), window, strict=True):
        reach = size // 2
        at, last = tiles.of(place), tiles.of(count) - 1
        middle = at.clamp(min=reach).minimum((last - reach).clamp(min=reach)) if edge == "shift" else at
        near &= (at - middle[:, None]).abs() <= reach
    return joint(layout, *Plan.blocks(tiles, tiles, near).parts)
