"""Tile sizes, warps and stages: one table, from which the launcher picks and which the compile test goes through."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """`rows` tokens are owned by a program, which meets `step` tokens of the other side at a time.

    `tma`: blocks of the other side are read by Hopper's copy engine.
    """

    rows: int
    step: int
    warps: int
    stages: int
    tma: bool = False


class Tiles(NamedTuple):
    """Of the three kernels that multiply. dq runs over the forward's tiles, so their rows agree."""

    attend: Tile
    grad_queries: Tile
    grad_keys: Tile


class Config(NamedTuple):
    """`routed`: gathered queries × one segment of keys; `pieces`: a tile meets several segments.

    `cudnn`: routed parts go to cuDNN's variable-length attention instead of Triton's kernels.
    """

    routed: Tiles
    pieces: Tiles
    cudnn: bool = False


# For Hopper and head dim 128, `attend` and `grad_keys` are the fastest of the tiles in
# `experiments/results/gpu_tiles.json`. `grad_queries` has as many rows as `attend`: 128 × 64 with 3 stages took 39.6 ms
# on its own, and these take 41.5. Pieces have the same tiles; they were timed against tiles of 128 rows on the card, in
# a run that is not kept. The other configurations were not timed: they are the largest tiles that compile with few
# spills, none of them in a loop that multiplies.
_SM80_64 = Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2))
_SM80_128 = Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2))
_SM80_128_PIECES = Tiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2))
_SM90_64 = Tiles(Tile(128, 128, 8, 2, tma=True), Tile(128, 64, 8, 3, tma=True), Tile(128, 64, 8, 3, tma=True))
_SM90_128 = Tiles(Tile(64, 64, 4, 3, tma=True), Tile(64, 64, 4, 2, tma=True), Tile(64, 64, 4, 2, tma=True))

CONFIGS = {
    ((8, 0), 64): Config(_SM80_64, _SM80_64),
    ((8, 0), 128): Config(_SM80_128, _SM80_128_PIECES),
    ((9, 0), 64): Config(_SM90_64, _SM90_64),
    ((9, 0), 128): Config(_SM90_128, _SM90_128),
}
HEAD_DIMS = sorted({dim for _, dim in CONFIGS})

# Small, so that small plans have several tiles, ragged ones among them.
_SMALL = Tiles(Tile(16, 16, 1, 1, tma=True), Tile(16, 8, 1, 1, tma=True), Tile(8, 16, 1, 1, tma=True))
INTERPRETED = Config(_SMALL, _SMALL)

LINES = Tile(32, 0, 4, 1)
"""Of the kernels that merge, add up or dot rows."""
POOL = Tile(1, 64, 4, 2)
"""Of the kernel that takes the mean of a piece, `step` rows at a time."""
CHOOSE = {(8, 0): Tile(64, 32, 8, 1), (9, 0): Tile(128, 128, 8, 1)}
"""Of the kernel that chooses, by compute capability: `rows` queries, `step` channels at a time. One of Hopper's
products takes 64 rows and four warps, so eight warps have 128 rows; neither tile spills."""
MOST_CHUNKS = 256
"""That it chooses from: the scores of its queries stay in registers, and more spill."""


def choose(capability: tuple[int, int], head_dim: int) -> Config:
    """The configuration for a device: that of the newest capability in the table that it has."""
    return CONFIGS[max(known for known, dim in CONFIGS if dim == head_dim and known <= capability), head_dim]


def choose_tile(capability: tuple[int, int]) -> Tile:
    """The tile of the kernel that chooses, for a device."""
    return CHOOSE[max(known for known in CHOOSE if known <= capability)]
