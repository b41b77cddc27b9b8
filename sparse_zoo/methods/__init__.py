"""One paper per file; importing this registers them all."""

from sparse_zoo.methods import dense, moc, moga, radial, sta, svg, svg2, window

__all__ = ["dense", "moc", "moga", "radial", "sta", "svg", "svg2", "window"]
