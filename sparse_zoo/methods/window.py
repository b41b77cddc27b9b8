"""3D window attention aligned to tiles.

Paper: Fast Video Generation with Sliding Tile Attention, arXiv 2502.04507, whose windows move by whole tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from sparse_zoo.attention import Attention, Card, Knob, Limit
from sparse_zoo.blocks import joint, windowed
from sparse_zoo.errors import unknown
from sparse_zoo.layout import Layout
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered
from sparse_zoo.requirements import require

EVERY_TILE = (1 << 30) + 1


@register("window")
class Window(Attention):
    """A 3D window of tiles around each tile; text attends to all.

    **Rule**

    A tile attends to the tiles whose index differs from its own by at most (window - 1) / 2 on each axis.

    **Paper**

    The geometry of sliding tile attention, with one window for all heads.

    **Our choices**

    - Time counts tiles through the film, so that a window reaches across cuts. Rows and columns are compared by index
      where shots differ in size.
    - Partial tiles at the edges are exact.
    - `edge` and `stop_at_shots` choose how the edges of the film and the cuts are treated.

    **Not to be confused with**

    `sta`: windows that differ by head, as in the paper.

    Args:
        tile: Tokens of a tile along (frames, rows, cols).
        window: Tiles of a window along (frames, rows, cols), odd numbers.
        edge: At the edges the window is shifted inside ("shift", as in sliding tile attention) or cut off ("cut").
        stop_at_shots: Tiles restart at each shot, so that no tile holds frames of two shots.
    """

    limits = Limit({"window": (EVERY_TILE, EVERY_TILE, EVERY_TILE)})
    strict = "windows reach across cuts, both ways"
    anchors = ("text",)
    knob = Knob("window", (1, 1, 1), (15, 15, 15))
    card = Card(
        paper="Fast Video Generation with Sliding Tile Attention, arXiv 2502.04507",
        granularity="tile -> tiles around it, one window for all heads",
        chosen_by="",
        trained="from dense checkpoints; also without training",
        claim="see `sta`: the same geometry, there with a window for each head",
    )
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
        wrong = unknown("edge", edge, ("shift", "cut")) if edge not in ("shift", "cut") else ""
        require(self, wrong, triples={"tile": tile}, windows={"window": window})
        self.tile, self.window, self.stop_at_shots = tile, window, bool(stop_at_shots)
        self.edge: Literal["shift", "cut"] = edge

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:  # noqa: ARG002
        """The table of tiles in each window, which depends on the layout alone."""
        return _window(layout, self.tile, self.window, self.edge, self.stop_at_shots)


@remembered(32)
def _window(
    layout: Layout,
    tile: tuple[int, ...],
    window: tuple[int, ...],
    edge: Literal["shift", "cut"],
    stop_at_shots: bool,
) -> Plan:
    """Tiles × tiles, all × text, text × video."""
    tiles = layout.tiles(tile, stop_at_shots=stop_at_shots)
    if not tiles.count:
        return joint(layout)
    near = windowed(layout, tile, window, edge=edge, stop_at_shots=stop_at_shots)
    return joint(layout, *Plan.blocks(tiles, tiles, near).parts)
