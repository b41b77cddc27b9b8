"""A part as work for device kernels: tiles of one side × segments of the other. torch alone.

Nothing here reads a count on the host, so that building never waits for the device: tables have their largest possible
size, and tiles past the last hold no token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_zoo.kernels.triton.configs import Config, Tiles
from sparse_zoo.light import broadcast_shapes
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Part, named


class Work(NamedTuple):
    """Tiles of tokens of one side and, for each, the segments of tokens of the other side that it meets.

    All int32, each shared by batch items or heads where it can be:
    tokens (B|1, H|1, n): the tiled side's, piece after piece;
    tiles (B|1, H|1, T, 4): first place in `tokens`, number of places (0: no such tile), first segment, end of segments;
    segments (B|1, H|1, S, 2): first place in the `tokens` of the other side, end.
    """

    tokens: Tensor
    tiles: Tensor
    segments: Tensor


class PartWork(NamedTuple):
    """What kernels need to know of a part.

    by_query serves the forward and dq, which fill one partial row for each place of `by_query.tokens`; by_key serves dk
    and dv, where every key is in one tile. Without `pieces`, every tile meets one segment, and keys are places in the
    stream itself. slots, int32 (B|1, H|1, Lq, s), names the rows of each query, -1 for none.
    """

    by_query: Work
    by_key: Work
    slots: Tensor
    pieces: bool

    def tiles(self, config: Config) -> Tiles:
        """The tiles of a configuration for this part: its `pieces` or its `routed`."""
        return config.pieces if self.pieces else config.routed


def work_of(part: Part, config: Config) -> PartWork | None:
    """The work of a part in a configuration's tiles; None for a part without pieces or edges.

    Queries that are single tokens are gathered: a tile holds queries that chose one key piece. Others are tiled piece
    by piece, and a tile meets all the key pieces of its piece.
    """
    queries, keys = part.queries, part.keys
    edges, number = _named(part)
    if not edges.numel() or not keys.count:
        return None
    pieces = not queries.is_singles
    sizes = config.pieces if pieces else config.routed
    rows, key_rows = sizes.attend.rows, sizes.grad_keys.rows
    readers, starts, places = _by_key(edges, keys.count)
    if not pieces:
        by_query = Work(readers, tiles_of_pieces(starts, readers.shape[-1], rows), _bounds(keys.offsets))
        by_key = Work(tokens_of(keys), tiles_of_pieces(keys.offsets, _listed(keys), key_rows), _bounds(starts))
        return PartWork(by_query, by_key, places, pieces)
    segments, number = _joined(_bounds_at(keys.offsets, edges.flatten(2)).unflatten(2, edges.shape[2:]), number)
    first = torch.arange(queries.count, device=edges.device) * edges.shape[-1]
    tiles = _tiles(queries.offsets, _listed(queries), rows, first, first + number)
    by_query = Work(tokens_of(queries), tiles, segments)
    by_key = Work(
        tokens_of(keys),
        _tiles(keys.offsets, _listed(keys), key_rows, starts[..., :-1], starts[..., 1:]),
        _bounds_at(queries.offsets, readers),
    )
    return PartWork(by_query, by_key, _places(queries), pieces)


def _named(part: Part) -> tuple[Tensor, Tensor]:
    """Edges as indices (B|1, H|1, Q, k), -1 for none, and the number of columns that count, (B|1, H|1, Q).

    A table keeps its width, rather than wait for the device to count: what is named stands first. Over single tokens
    the partial rows of a head are therefore as many as the table has entries.
    """
    edges = part.edges
    if not part.by_table:
        return edges, torch.full((1, 1, 1), edges.shape[-1], device=edges.device)
    return named(edges, edges.shape[-1]).int(), edges.sum(-1)


def _by_key(edges: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Edges (B, H, Q, k) -> the query pieces that name each key piece, one list after the other: int32 (B, H, Q · k).

    Also where the list of each key piece begins, int32 (B, H, count + 1), and where in the lists each edge is, int32
    (B, H, Q, k), -1 for none. Queries ascend within a list. Stable, so that sums over a list have one order.
    """
    batch, heads, pieces, k = edges.shape
    groups, width = batch * heads, pieces * k
    # One radix sort for all groups, over as few bytes as hold the keys.
    most = groups * (count + 1)
    dtype = torch.int16 if most < 1 << 15 else torch.int32 if most < 1 << 31 else torch.int64
    flat = edges.reshape(groups, width)
    base = (torch.arange(groups, device=edges.device) * (count + 1))[:, None].to(dtype)
    ordered = (torch.where(flat < 0, count, flat).to(dtype) + base).flatten().sort(stable=True)
    place = torch.arange(width, dtype=torch.int32, device=edges.device).expand(groups, -1)
    places = torch.empty_like(flat, dtype=torch.int32).flatten().scatter_(0, ordered.indices, place.flatten())
    bounds = base + torch.arange(count + 1, dtype=dtype, device=edges.device)
    starts = torch.searchsorted(ordered.values.view(groups, width), bounds, out_int32=True)
    readers = torch.div(ordered.indices.remainder_(width).int(), k, rounding_mode="floor")
    return (
        readers.view(batch, heads, width),
        starts.view(batch, heads, count + 1),
        places.view(edges.shape).masked_fill_(edges < 0, -1),
    )


def _tiles(starts: Tensor, listed: int, size: int, low: Tensor, high: Tensor) -> Tensor:
    """Tiles of `size` places of pieces that begin at `starts` (…, P + 1), with each piece's segments low … high."""
    lead = broadcast_shapes(starts.shape[:-1], low.shape[:-1], high.shape[:-1])
    pieces = starts.shape[-1] - 1
    starts, low, high = (x.expand(*lead, -1).long() for x in (starts, low, high))
    number = (starts.diff(dim=-1) + size - 1).div(size, rounding_mode="floor")
    ends = number.cumsum(-1)
    # Each piece's last tile may be ragged: no more than this, whatever the pieces are.
    tile = torch.arange(listed // size + pieces, device=starts.device).expand(*lead, -1).contiguous()
    piece = torch.searchsorted(ends, tile, right=True).clamp(max=pieces - 1)
    first = starts.gather(-1, piece) + (tile - (ends - number).gather(-1, piece)) * size
    count = (starts[..., 1:].gather(-1, piece) - first).clamp(0, size)
    return torch.stack([first, count, low.gather(-1, piece), high.gather(-1, piece)], dim=-1).int()


def tiles_of_pieces(starts: Tensor, listed: int, size: int) -> Tensor:
    """Tiles whose segments are one: that of their own piece."""
    piece = torch.arange(starts.shape[-1] - 1, device=starts.device)[None, None]
    return _tiles(starts, listed, size, piece, piece + 1)


def _bounds(starts: Tensor) -> Tensor:
    """(…, P + 1) -> where each piece begins and ends, (…, P, 2)."""
    return torch.stack([starts[..., :-1], starts[..., 1:]], dim=-1)


def _bounds_at(starts: Tensor, pieces: Tensor) -> Tensor:
    """Where some pieces (…, n) begin and end: (…, n, 2), 0 and 0 for piece -1."""
    lead = broadcast_shapes(starts.shape[:-1], pieces.shape[:-1])
    pieces = pieces.expand(*lead, -1)
    bounds = _bounds(starts).expand(*lead, -1, -1)
    at = pieces.clamp(min=0).long()[..., None].expand(*pieces.shape, 2)
    return bounds.gather(-2, at).masked_fill_((pieces < 0)[..., None], 0)


def _joined(bounds: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Segments (…, Q, k, 2), of which the first `number` (…, Q) count, fewer: joined where one begins as one ends.

    A kernel's loads stop being in flight where a segment ends. Returns (…, Q · k, 2) and the numbers that count.
    """
    begin, end = bounds.unbind(-1)
    place = torch.arange(begin.shape[-1], device=begin.device)
    counts = place < number[..., None]
    new = counts & ((place == 0) | (begin != end.roll(1, -1)))
    run = new.cumsum(-1) - 1
    last = counts & (new.roll(-1, -1) | (place == number[..., None] - 1))
    joined = torch.zeros(*begin.shape[:-1], begin.shape[-1] + 1, 2, dtype=bounds.dtype, device=bounds.device)
    for side, (edge, where) in enumerate(((begin, new), (end, last))):
        joined[..., side].scatter_(-1, run.where(where, begin.shape[-1]), edge)
    return joined[..., :-1, :].flatten(-3, -2).contiguous(), new.sum(-1)


def tokens_of(pieces: Partition) -> Tensor:
    """The tokens of all pieces, one piece after the other: int32 (B|1, H|1, n)."""
    if pieces.order is not None:
        return pieces.order.contiguous()
    return torch.arange(pieces.length, dtype=torch.int32, device=pieces.device)[None, None]


def _listed(pieces: Partition) -> int:
    return pieces.length if pieces.order is None else pieces.order.shape[-1]


def _places(pieces: Partition) -> Tensor:
    """The place of each token in the list of pieces, -1 where it is in none: int32 (B|1, H|1, L, 1)."""
    tokens = tokens_of(pieces)
    lead = broadcast_shapes(tokens.shape[:2], pieces.offsets.shape[:2])
    place = torch.arange(tokens.shape[-1], dtype=torch.int32, device=tokens.device)
    held = (place >= pieces.offsets[..., :1]) & (place < pieces.offsets[..., -1:])
    places = torch.full((*lead, pieces.length), -1, dtype=torch.int32, device=tokens.device)
    source = torch.where(held, place, -1).expand(*lead, -1)
    return places.scatter_(-1, tokens.long().expand(*lead, -1), source)[..., None]
