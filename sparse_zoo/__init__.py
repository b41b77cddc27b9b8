"""Sparse attention for long-video diffusion transformers: methods say who attends to whom, kernels compute it."""

from sparse_zoo import methods as _methods  # noqa: F401  importing registers them
from sparse_zoo.attention import Attention, Branch, Call, Card, Knob, Limit, Result, Segment, Term
from sparse_zoo.bridge import Bridge, attach
from sparse_zoo.cost import Cost
from sparse_zoo.errors import ZooError
from sparse_zoo.kernels import Attended, attend, kernels, merge, register_kernel
from sparse_zoo.kernels.base import Kernel
from sparse_zoo.layout import Film, Layout, Shot
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Part, Plan
from sparse_zoo.registry import Setting, build, get, load_plugin, names, register, settings, summary
from sparse_zoo.schedule import Scheduled

__version__ = "0.1.0"  # of the distribution too

__all__ = [
    "Attended",
    "Attention",
    "Branch",
    "Bridge",
    "Call",
    "Card",
    "Cost",
    "Film",
    "Kernel",
    "Knob",
    "Layout",
    "Limit",
    "Part",
    "Partition",
    "Plan",
    "Result",
    "Scheduled",
    "Segment",
    "Setting",
    "Shot",
    "Term",
    "ZooError",
    "attach",
    "attend",
    "build",
    "get",
    "kernels",
    "load_plugin",
    "merge",
    "names",
    "register",
    "register_kernel",
    "settings",
    "summary",
]
