"""Steps that block-sparse methods share: text beside video, blocks on a grid, pooling, products of pooled tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from sparse_zoo.attention import is_count
from sparse_zoo.layout import Layout
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Part, Plan
from sparse_zoo.remember import remembered

SLICE = 1 << 22
"""Scores held at once while blocks are chosen."""


def joint(layout: Layout, *video: Part, q_rows: Tensor | None = None) -> Plan:
    """Parts that join video to video, and text as the methods for video have it: read by all, and reading all.

    The papers speak of streams without text, or leave it dense; so do all methods here that do not say otherwise.
    Where the queries are those at `q_rows`, int64 (Lq,), alone, the parts given are theirs already.
    """
    text = _text(layout)
    if q_rows is not None:
        text = tuple(part.narrow(q_rows) for part in text)
    return Plan(*video, *text) if video or text else Plan.within(layout.partition())


@remembered(32)
def _text(layout: Layout) -> tuple[Part, ...]:
    everyone, text = layout.partition(), layout.partition(where=layout.is_text)
    video = layout.partition(where=~layout.is_text)
    if not text.count:
        return ()
    return tuple(
        Plan.blocks(queries, keys, same_film(queries, keys)).parts[0]
        for queries, keys in ((everyone, text), (text, video))
        if keys.count
    )


def same_film(queries: Partition, keys: Partition) -> Tensor:
    """Whether two pieces are of one sample: bool (Q, K)."""
    return queries.sample[:, None] == keys.sample


@remembered(64)
def stretches(layout: Layout, tokens: int) -> Partition:
    """The video of each film, cut every `tokens` tokens, blind to shots and frames; the last may be shorter."""
    video = ~layout.is_text
    first = torch.nn.functional.pad(torch.bincount(layout.sample[video], minlength=len(layout.films)).cumsum(0), (1, 0))
    return layout.partition((video.cumsum(0) - 1 - first[layout.sample]) // tokens, where=video)


@remembered(64)
def film_by_film(pieces: Partition) -> list[slice]:
    """The pieces of each film that has any; pieces of a layout lie in the order of the stream, so film by film."""
    return [
        slice(first, last)
        for first, last in pairwise([0, *torch.bincount(pieces.sample).cumsum(0).tolist()])
        if last > first
    ]


def grid(layout: Layout, tile: tuple[int, ...], *, stop_at_shots: bool) -> list[tuple[Tensor, Tensor]]:
    """For each axis (frames, rows, cols) the place of each token's tile, int64 (L,), and how many places it has there.

    Tiles are those of `layout.tiles`. Places in time count them through the film; rows and columns are numbered in each
    frame. Values at text tokens have no meaning.
    """
    video = ~layout.is_text
    within = layout.shot_frame if stop_at_shots else layout.frame
    keys = ("shot", within // tile[0]) if stop_at_shots else (within // tile[0],)
    steps = layout.partition(*keys, where=video)
    number = torch.bincount(steps.sample, minlength=len(layout.films))
    time = steps.piece_of[0, 0] - (number.cumsum(0) - number)[layout.sample]
    rows, cols = (-(-size // step) for size, step in ((layout.rows, tile[1]), (layout.cols, tile[2])))
    return [(time, number[layout.sample]), (layout.row // tile[1], rows), (layout.col // tile[2], cols)]


def products(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Products of queries (B, H, Q, D) and pooled keys (B, Hk, K, D): some rows, and float32 (B, H, rows, K) for them.

    No whole table is held.
    """
    keys = keys.float().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1).transpose(-1, -2)
    rows = max(1, SLICE // max(1, queries.shape[0] * queries.shape[1] * keys.shape[-1]))
    for start in range(0, queries.shape[2], rows):
        some = slice(start, start + rows)
        with torch.autocast(queries.device.type, enabled=False):  # would narrow what is widened here
            scores = queries[:, :, some].float() @ keys
        yield some, scores


def pooled(pieces: Partition, x: Tensor) -> Tensor:
    """Means over the tokens of each piece, (B, H, L, D) -> (B, H, P, D), in float32 at least. Differentiable."""
    return pieces.mean(x.to(torch.promote_types(x.dtype, torch.float32)))


@remembered(64)
def whole_film(layout: Layout, keys: Partition, queries: Partition | None = None) -> Plan:
    """A coarse branch's plan: every token, or every piece of `queries`, reads all pieces of `keys` of its film.

    It is for a `Branch` with k, v (and q) of its own, pooled over these pieces.
    """
    readers = layout.sample if queries is None else queries.sample
    return Plan.groups(readers, keys.sample, count=len(layout.films))


@remembered(64)
def members(pieces: Partition) -> Tensor:
    """The tokens of each piece in stream order: int64 (P, size of the largest), -1 where a piece has fewer.

    For pieces shared by all batch items and heads.
    """
    starts, sizes = pieces.offsets[0, 0, :-1, None].long(), pieces.sizes[0, 0, :, None]
    number = torch.arange(int(sizes.max()) if len(sizes) else 0, device=pieces.device)
    place = (starts + number).masked_fill(number >= sizes, 0)
    tokens = place if pieces.order is None else pieces.order[0, 0].long()[place]
    return tokens.masked_fill(number >= sizes, -1)


def is_triple(sizes: tuple[int, ...]) -> bool:
    """Whether a setting is three whole numbers of at least 1: (frames, rows, cols)."""
    return len(sizes) == 3 and all(map(is_count, sizes))


def windowed(
    layout: Layout,
    tile: tuple[int, ...],
    window: tuple[int, ...],
    *,
    edge: Literal["shift", "cut"] = "shift",
    stop_at_shots: bool = True,
) -> Tensor:
    """Which tiles a window of `window` tiles around each holds: bool (T, T) over the tiles of `layout.tiles`.

    Sizes of a window are odd; its tiles differ from the middle one by at most (window - 1) / 2 places on each axis. At
    the edges the window is pushed inside ("shift"), so that it stays as large as there is room, or cut off ("cut").
    Places in time count tiles through the film, across cuts; rows and columns are compared by number where shots differ
    in size.
    """
    tiles = layout.tiles(tile, stop_at_shots=stop_at_shots)
    near = same_film(tiles, tiles)
    for (place, count), size in zip(grid(layout, tile, stop_at_shots=stop_at_shots), window, strict=True):
        reach = size // 2
        at, last = tiles.of(place), tiles.of(count) - 1
        middle = at.clamp(min=reach).minimum((last - reach).clamp(min=reach)) if edge == "shift" else at
        near &= (at - middle[:, None]).abs() <= reach
    return near
