"""NABLA: tiles that hold a share of the softmax of tile means, and a window around each tile.

Paper: NABLA: Neighborhood Adaptive Block-Level Attention, arXiv 2507.13546.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparse_zoo.attention import Call, Card, Knob, Limit
from sparse_zoo.blocks import windowed
from sparse_zoo.blockwise import Blockwise
from sparse_zoo.layout import Layout
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered
from sparse_zoo.requirements import require
from sparse_zoo.selectors import heaviest_logits


@register("nabla")
class NABLA(Blockwise):
    """Top-p of tile means, joined with a sliding-tile window.

    **Rule**

    Video is cut into tiles of frames × rows × cols; P = softmax(mean(Q) mean(K)^T / √D) over the tiles of the
    film. Each tile attends to the fewest tiles, largest first, that hold a share `threshold` of its row of P, and to
    the tiles that differ from it by at most (window - 1) / 2 places on each axis.

    **Paper**

    The adaptive part is its method, the union with a window of sliding tile attention its option. Rule and
    defaults are read from the code of Kandinsky 5 (github.com/kandinskylab/kandinsky-5, kandinsky/models/utils.py and
    configs): tiles of 1 × 8 × 8 tokens, threshold 0.9, a window that is cut at the edges, of 11 × 3 × 3 tiles.

    **Our choices**

    Ragged tiles are averaged over the tokens they have, where the code asks for sizes that 8 divides.
    Tiles restart at each shot; places in time count through the film, so that the window reaches across cuts. Where a
    share is met exactly the tile that meets it is the last; the code takes one more. Text is read by all and reads all;
    Kandinsky 5 has it in cross-attention.

    **Not to be confused with**

    `sta`, the window alone, and `xattention`, top-p of another estimate.

    Args:
        threshold: Share of the estimated attention that is kept, in (0, 1].
        tile: Tokens of a tile along (frames, rows, cols).
        window: Tiles of the window along (frames, rows, cols), odd.
        stop_at_shots: Tiles restart at each shot, so that none holds frames of two.
    """

    limits = Limit({"threshold": 1.0})
    knob = Knob("threshold", 0.05, 1.0)
    card = Card(
        paper="NABLA: Neighborhood Adaptive Block-Level Attention, arXiv 2507.13546",
        granularity="tile of queries -> tile of keys",
        chosen_by="softmax of q · k of tile means, top-p; and a window",
        trained="from scratch and fine-tuned; Kandinsky 5",
        claim="up to 2.7x faster training and inference than full attention",
    )
    small = {"threshold": 0.63, "tile": (1, 2, 2), "window": (3, 1, 1)}

    def __init__(
        self,
        *,
        threshold: float = 0.9,
        tile: Sequence[int] = (1, 8, 8),
        window: Sequence[int] = (11, 3, 3),
        stop_at_shots: bool = True,
        **base: Any,
    ) -> None:
        tile, window = tuple(tile), tuple(window)
        super().__init__(**base)
        require(self, shares={"threshold": threshold}, triples={"tile": tile}, windows={"window": window})
        self.threshold, self.window = float(threshold), window
        self.tile, self.stop_at_shots = tile, bool(stop_at_shots)

    def select(self, scores: Tensor, legal: Tensor) -> Tensor:  # noqa: ARG002
        """Keep the fewest tiles, largest first, that hold a share `threshold` of the softmax of the scores."""
        return heaviest_logits(scores, self.threshold)

    def chosen(self, call: Call) -> Tensor:
        """The tiles that `select` keeps, and those in the window of each tile: bool (B, H, tiles, tiles)."""
        return super().chosen(call) | _near(call.layout, self.tile, self.window, self.stop_at_shots)


@remembered(32)
def _near(layout: Layout, tile: tuple[int, ...], window: tuple[int, ...], stop_at_shots: bool) -> Tensor:
    return windowed(layout, tile, window, edge="cut", stop_at_shots=stop_at_shots)
