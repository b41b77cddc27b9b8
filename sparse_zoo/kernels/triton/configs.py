"""Tile sizes, warps and stages: one table, from which the launcher picks and which the compile test goes through."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """`rows` tokens are owned by a program, which meets `step` tokens of the other side at a time."""

    rows: int
    step: int
    warps: int
    stages: int


class Config(NamedTuple):
    """Tiles of the three kernels that multiply. dq runs over the forward's tiles, so their rows agree."""

    attend: Tile
    grad_queries: Tile
    grad_keys: Tile


CONFIGS = {
    ((8, 0), 64): Config(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
    ((8, 0), 128): Config(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 1)),
    ((9, 0), 64): Config(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    ((9, 0), 128): Config(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
}
INTERPRETED = Config(Tile(16, 16, 1, 1), Tile(16, 16, 1, 1), Tile(16, 16, 1, 1))
"""Small, so that small plans have ragged tiles, several of them."""
LINES = 32
"""Rows of a program that merges, adds or dots rows."""


def choose(capability: tuple[int, int], head_dim: int) -> Config:
    """The configuration for a device: that of the newest capability in the table that it has."""
    return CONFIGS[max(known for known, dim in CONFIGS if dim == head_dim and known <= capability), head_dim]


def head_dims() -> list[int]:
    return sorted({dim for _, dim in CONFIGS})
