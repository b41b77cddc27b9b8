"""Dense attention: the baseline of every comparison."""

from torch import Tensor

from sparse_zoo.attention import Attention, Limit
from sparse_zoo.layout import Layout
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register


@register("dense")
class Dense(Attention):
    """Every token attends to every token of its film."""

    limits = Limit({})
    strict = "every shot reads the shots after it"
    anchors = ("text", "shot")

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:  # noqa: ARG002
        return Plan.dense(layout)
