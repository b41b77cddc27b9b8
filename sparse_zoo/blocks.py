"""Steps that block-sparse methods share: text beside video, blocks on a grid, pooling, products of pooled tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from sparse_zoo.layout import Layout
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Part, Plan
from sparse_zoo.remember import remembered

SLICE = 1 << 22
GPU_SLICE = 1 << 26
"""Scores held at once while blocks are chosen: on a GPU 256 MB of float32, since small slices keep its host busy."""


def slice_of(x: Tensor) -> int:
    """How many scores to hold at once on the device of a tensor."""
    return SLICE if x.device.type == "cpu" else GPU_SLICE


def joint(layout: Layout, *video: Part, q_rows: Tensor | None = None) -> Plan:
    """Join parts between video tokens with text, as methods for video treat it.

    Every token attends to the text of its film, and text attends to the whole film. The papers describe streams without
    text, or leave text dense; all methods here do the same unless they say otherwise.

    Args:
        layout: The stream.
        video: Parts that join video to video.
        q_rows: int64 (Lq,), the tokens that q holds, None for all. With it, `video` must already be for these queries.

    Returns:
        The plan of all parts.
    """
    text = _text(layout)
    if q_rows is not None:
        text = tuple(part.narrow(q_rows) for part in text)
    return Plan(*video, *text) if video or text else Plan.within(layout.partition())


@remembered(32)
def _text(layout: Layout) -> tuple[Part, ...]:
    text, video = layout.partition(where=layout.is_text), layout.partition(where=~layout.is_text)
    reads_video = Plan.blocks(text, video, same_film(text, video)).parts if text.count and video.count else ()
    return (*text_for_all(layout), *reads_video)


@remembered(32)
def text_for_all(layout: Layout, *, past: bool = False) -> tuple[Part, ...]:
    """Every token × the text of its film, with `past` that of its shot and of those before; none without text."""
    if not bool(layout.is_text.any()):
        return ()
    keys = ("shot",) if past else ()
    readers, text = layout.partition(*keys), layout.partition(*keys, where=layout.is_text)
    wanted = same_film(readers, text)
    return Plan.blocks(readers, text, wanted & (text.shot <= readers.shot[:, None]) if past else wanted).parts


@remembered(32)
def shot_for_captions(layout: Layout) -> tuple[Part, ...]:
    """Each caption × the video of its shot; nothing for a global caption, and none without captions and video."""
    captions = layout.partition("shot", where=layout.is_text & (layout.shot >= 0))
    shots = layout.partition("shot", where=~layout.is_text)
    if not captions.count or not shots.count:
        return ()
    return Plan.blocks(captions, shots, same_film(captions, shots) & (captions.shot[:, None] == shots.shot)).parts


def same_film(queries: Partition, keys: Partition) -> Tensor:
    """Whether two pieces belong to one film: bool (Q, K)."""
    return queries.sample[:, None] == keys.sample


@remembered(64)
def stretches(layout: Layout, tokens: int) -> Partition:
    """The video of each film in blocks of `tokens` consecutive tokens, blind to shots and frames.

    The last block of a film may be shorter.
    """
    video = ~layout.is_text
    first = torch.nn.functional.pad(torch.bincount(layout.sample[video], minlength=len(layout.films)).cumsum(0), (1, 0))
    return layout.partition((video.cumsum(0) - 1 - first[layout.sample]) // tokens, where=video)


@remembered(64)
def film_by_film(pieces: Partition) -> list[slice]:
    """The slice of pieces of each film that has any. Pieces of a layout follow the order of the stream."""
    return [
        slice(first, last)
        for first, last in pairwise([0, *torch.bincount(pieces.sample).cumsum(0).tolist()])
        if last > first
    ]


def grid(layout: Layout, tile: tuple[int, ...], *, stop_at_shots: bool) -> list[tuple[Tensor, Tensor]]:
    """The position of each token's tile on each axis (frames, rows, cols), and the number of positions there.

    Tiles are those of `layout.tiles`. Time counts tiles through the film; rows and columns are counted in each frame.

    Returns:
        For each axis two tensors int64 (L,); values at text tokens have no meaning.
    """
    video = ~layout.is_text
    within = layout.shot_frame if stop_at_shots else layout.frame
    keys = ("shot", within // tile[0]) if stop_at_shots else (within // tile[0],)
    steps = layout.partition(*keys, where=video)
    number = torch.bincount(steps.sample, minlength=len(layout.films))
    time = steps.piece_of[0, 0] - (number.cumsum(0) - number)[layout.sample]
    rows, cols = (-(-size // step) for size, step in ((layout.rows, tile[1]), (layout.cols, tile[2])))
    return [(time, number[layout.sample]), (layout.row // tile[1], rows), (layout.col // tile[2], cols)]


def products(queries: Tensor, keys: Tensor, most: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Products of queries (B, H, Q, D) and pooled keys (B, Hk, K, D), slice by slice.

    The whole table is never held: about `most` scores are at once, None for `slice_of`.

    Yields:
        A slice of query rows, and their products, float32 (B, H, rows, K).
    """
    keys = keys.float().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1).transpose(-1, -2)
    rows = max(1, (most or slice_of(queries)) // max(1, queries.shape[0] * queries.shape[1] * keys.shape[-1]))
    for start in range(0, queries.shape[2], rows):
        some = slice(start, start + rows)
        with torch.autocast(queries.device.type, enabled=False):  # would narrow what is widened here
            scores = queries[:, :, some].float() @ keys
        yield some, scores


def pooled(pieces: Partition, x: Tensor) -> Tensor:
    """Means over the tokens of each piece, (B, H, L, D) -> (B, H, P, D), in float32 or wider. Differentiable."""
    return pieces.mean(x.to(torch.promote_types(x.dtype, torch.float32)))


@remembered(64)
def whole_film(layout: Layout, keys: Partition, queries: Partition | None = None) -> Plan:
    """The plan of a coarse branch: each token, or each piece of `queries`, attends to all pieces of `keys` of its film.

    Use it in a `Branch` with its own k, v (and q), pooled over these pieces.
    """
    readers = layout.sample if queries is None else queries.sample
    return Plan.groups(readers, keys.sample, count=len(layout.films))


@remembered(64)
def members(pieces: Partition) -> Tensor:
    """The tokens of each piece in stream order: int64 (P, size of the largest), -1 where a piece has fewer.

    The pieces must be shared by all batch items and heads.
    """
    starts, sizes = pieces.offsets[0, 0, :-1, None].long(), pieces.sizes[0, 0, :, None]
    number = torch.arange(int(sizes.max()) if len(sizes) else 0, device=pieces.device)
    place = (starts + number).masked_fill(number >= sizes, 0)
    tokens = place if pieces.order is None else pieces.order[0, 0].long()[place]
    return tokens.masked_fill(number >= sizes, -1)


def windowed(
    layout: Layout,
    tile: tuple[int, ...],
    window: tuple[int, ...],
    *,
    edge: Literal["shift", "cut"] = "shift",
    stop_at_shots: bool = True,
) -> Tensor:
    """The tiles in a window of `window` tiles around each tile: bool (T, T) over the tiles of `layout.tiles`.

    Args:
        layout: The stream.
        tile: Tokens of a tile along (frames, rows, cols).
        window: Odd sizes; tiles differ from the middle one by at most (window - 1) / 2 positions on each axis. Time
            counts tiles through the film, across cuts; rows and columns are compared by index where shots differ in
            size.
        edge: At the edges the window is shifted inside ("shift"), so that it keeps its size, or cut off ("cut").
        stop_at_shots: Whether tiles restart at each shot.
    """
    tiles = layout.tiles(tile, stop_at_shots=stop_at_shots)
    near = same_film(tiles, tiles)
    for (place, count), size in zip(grid(layout, tile, stop_at_shots=stop_at_shots), window, strict=True):
        reach = size // 2
        at, last = tiles.of(place), tiles.of(count) - 1
        middle = at.clamp(min=reach).minimum((last - reach).clamp(min=reach)) if edge == "shift" else at
        near &= (at - middle[:, None]).abs() <= reach
    return near
