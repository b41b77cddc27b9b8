"""One paper per file; importing this registers them all."""

from sparse_zoo.methods import dense

__all__ = ["dense"]
