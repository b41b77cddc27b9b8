"""One paper per file; importing this registers them all."""

from sparse_zoo.methods import dense, moc, moga, nsa, sla, vsa, window

__all__ = ["dense", "moc", "moga", "nsa", "sla", "vsa", "window"]
