"""Broken methods and kernels, each with the checks that must catch it: what keeps the checks honest."""

from sparse_zoo.testing.mutants import (
    blockwise,
    coarse,
    kernels,
    learning,
    methods,
    moc,
    parallel,
    segments,
    sizes,
    tiles,
)
from sparse_zoo.testing.mutants.base import MUTANTS, Mutant

__all__ = [
    "MUTANTS",
    "Mutant",
    "blockwise",
    "coarse",
    "kernels",
    "learning",
    "methods",
    "moc",
    "parallel",
    "segments",
    "sizes",
    "tiles",
]
