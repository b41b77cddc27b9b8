"""Bidirectional Sparse Attention: the most distinct queries of each tile, and the tiles that hold their attention.

Paper: Bidirectional Sparse Attention for Faster Video Diffusion Training, arXiv 2509.01085.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparse_zoo.attention import Branch, Call, Card, Knob, Limit, Term
from sparse_zoo.blocks import is_triple, joint, members, pooled, same_film
from sparse_zoo.blockwise import Blockwise, require
from sparse_zoo.layout import Layout
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Part, Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered
from sparse_zoo.selectors import chosen, heaviest_logits


@register("bsa")
class BSA(Blockwise):
    """Pruned queries, and top-p of tiles of keys.

    **Rule**

    In each tile the queries of least cosine similarity to the query in its middle are kept, a share
    `keep_queries` of them. P = softmax(mean(kept Q_i) mean(K_j)^T / √D) over the tiles of the film; the kept queries of
    tile i attend to the fewest tiles, largest first, that hold a share `threshold` of P_i. Every other query gets the
    output of the kept one that is nearest to it in the order of its tile.

    **Paper**

    Queries sparsified by semantic similarity, keys and values by a dynamic threshold on block scores. The
    full text is not at hand: the rule and its defaults (tiles of 4 × 4 × 4, half of the queries, 0.9) are read from
    FastVideo's backend (fastvideo/attention/backends/bsa_attn.py), which uses it without training.

    **Our choices**

    At least one query of a tile is kept, ragged tiles keep their share rounded down, and the middle is
    token ⌊n / 2⌋ of the n that a tile has. Ties go to the earlier token and tile. Tiles restart at each shot. Text
    queries are never pruned; text is read by all kept queries and reads all.

    **Not to be confused with**

    block sparse attention, which goes by the same letters in LongCat and FlashInfer.

    Args:
        threshold: Share of the estimated attention that the tiles of keys hold, in (0, 1].
        keep_queries: Share of the queries of a tile that is kept, in (0, 1].
        tile: Tokens of a tile along (frames, rows, cols).
        stop_at_shots: Tiles restart at each shot, so that none holds frames of two.
    """

    limits = Limit({"threshold": 1.0, "keep_queries": 1.0})
    knob = Knob("threshold", 0.05, 1.0)
    card = Card(
        paper="Bidirectional Sparse Attention for Faster Video Diffusion Training, arXiv 2509.01085",
        granularity="kept queries of a tile -> tile of keys",
        chosen_by="cosine to the middle query; softmax of q · k of tile means, top-p",
        trained="from scratch; also without training",
        claim="up to 20x fewer FLOPs and 17.79x faster attention in training than full attention",
    )
    small = {"threshold": 0.63, "keep_queries": 0.4, "tile": (2, 2, 2)}

    def __init__(
        self,
        *,
        threshold: float = 0.9,
        keep_queries: float = 0.5,
        tile: Sequence[int] = (4, 4, 4),
        stop_at_shots: bool = True,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        tile = tuple(tile)
        require(
            self,
            shares={"threshold": threshold, "keep_queries": keep_queries},
            more=(f"tile must be three whole numbers of at least 1, got {tile!r}" if not is_triple(tile) else "",),
        )
        self.threshold, self.keep_queries = float(threshold), float(keep_queries)
        self.tile, self.stop_at_shots = tile, bool(stop_at_shots)

    def queries(self, layout: Layout) -> Partition:
        """The tiles of the video, `tile` tokens each, which restart at each shot if `stop_at_shots`."""
        return layout.tiles(self.tile, stop_at_shots=self.stop_at_shots)

    def branches(self, call: Call) -> list[Branch | Term]:
        """One branch: kept queries × the tiles that their tile chose, with text; pruned queries copy a kept output."""
        layout, tiles = call.layout, self.queries(call.layout)
        if not tiles.count:
            return [Branch(joint(layout))]
        kept = _kept(call.q, tiles, self.keep_queries)
        with torch.no_grad():
            q, k = kept.means * call.q.shape[-1] ** -0.5, pooled(tiles, call.k)
            best = chosen(q, k, same_film(tiles, tiles), lambda scores, _: heaviest_logits(scores, self.threshold))
        queries = Partition.from_labels(tiles.piece_of.where(kept.tokens, -1), tiles.count)
        parts = [*Plan.blocks(queries, tiles, best, routed=True).parts]
        if beside := _text(layout):  # all but pruned queries read text, and text reads all
            text, of_film, reads_video = beside
            readers = Partition.from_labels(layout.sample.where(kept.tokens | layout.is_text, -1), len(layout.films))
            parts += (*Plan.blocks(readers, text, of_film).parts, reads_video)
        return [Branch(Plan(*parts), rows=kept.rows)]

    def routing_flops(self, call: Call) -> int:
        """Cosines, pooling of q and k, and one product for each pair of tiles and head."""
        batch, heads, length, dim = call.q.shape
        count = self.queries(call.layout).count
        return batch * dim * (2 * heads * count**2 + 4 * heads * length + call.k.shape[1] * length)


@remembered(32)
def _text(layout: Layout) -> tuple[Partition, Tensor, Part] | None:
    """The text of each film, which films' text each film reads, bool (films, texts), and text × video.

    None if there is no text.
    """
    text, video = layout.partition(where=layout.is_text), layout.partition(where=~layout.is_text)
    if not text.count:
        return None
    of_film = torch.arange(len(layout.films))[:, None] == text.sample
    return text, of_film, Plan.blocks(text, video, same_film(text, video)).parts[0]


class _Kept(NamedTuple):
    """Which queries are kept, and what the others read.

    `tokens`, bool (B, H, L): which tokens are kept; `rows`, int64 (B, H, L): the row that each token reads; `means`,
    float32 (B, H, tiles, D): the means of the kept queries of each tile.
    """

    tokens: Tensor
    rows: Tensor
    means: Tensor


@torch.no_grad()
def _kept(q: Tensor, tiles: Partition, share: float) -> _Kept:
    (batch, heads, length, _), table = q.shape, members(tiles)
    held, size = table >= 0, tiles.sizes[0, 0]
    own = q.float()[:, :, table.clamp(min=0)]  # (B, H, tiles, most, D)
    middle = own.gather(3, (size // 2)[:, None, None].expand(*own.shape[:3], 1, own.shape[-1]))
    likeness = (normalize(own, dim=-1) * normalize(middle, dim=-1)).sum(-1).masked_fill(~held, torch.inf)
    place = likeness.argsort(dim=-1, stable=True).argsort(dim=-1)
    kept = (place < (size.double() * share).long().clamp(min=1)[:, None]) & held
    means = (own * kept[..., None]).sum(3) / kept.sum(-1, keepdim=True)
    # The kept token nearest to each: the last one up to it, or the next one if that is nearer.
    step = torch.arange(table.shape[1], device=q.device)
    far = 2 * table.shape[1]
    before = torch.where(kept, step, -far).cummax(-1).values
    after = torch.where(kept, step, far).flip(-1).cummin(-1).values.flip(-1)
    nearest = torch.where(step - before <= after - step, before, after)
    source = table.clamp(min=0).expand(batch, heads, -1, -1).gather(3, nearest.clamp(0, table.shape[1] - 1))
    place = table.where(held, length).expand(batch, heads, -1, -1).flatten(2)  # what is no token goes past the last
    tokens = torch.zeros(batch, heads, length + 1, dtype=torch.bool, device=q.device)
    rows = torch.arange(length + 1, device=q.device).repeat(batch, heads, 1)
    tokens.scatter_(2, place, kept.flatten(2))
    rows.scatter_(2, place, source.flatten(2))
    return _Kept(tokens[..., :-1], rows[..., :-1], means)
