"""The built-in methods, one paper per file. Importing this package registers all of them."""

from sparse_zoo.methods import (
    dense,
    moba,
    moc,
    moga,
    nsa,
    radial,
    sla,
    sta,
    svg,
    svg2,
    vmoba,
    vsa,
    window,
    xattention,
)

__all__ = [
    "dense",
    "moba",
    "moc",
    "moga",
    "nsa",
    "radial",
    "sla",
    "sta",
    "svg",
    "svg2",
    "vmoba",
    "vsa",
    "window",
    "xattention",
]
