"""Dense attention: the baseline of every comparison."""

from torch import Tensor

from sparse_zoo.attention import Attention, Card, Limit
from sparse_zoo.layout import Layout
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register


@register("dense")
class Dense(Attention):
    """Every token attends to every token of its film."""

    limits = Limit({})
    strict = "every shot reads the shots after it"
    anchors = ("text", "shot")
    card = Card(
        paper="Attention Is All You Need, arXiv 1706.03762",
        granularity="everyone -> everyone",
        chosen_by="",
        trained="the usual way",
        claim="none: what all others are measured against",
    )

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:  # noqa: ARG002
        return Plan.dense(layout)
