"""Dense attention, the baseline of every comparison.

Paper: Attention Is All You Need, arXiv 1706.03762.
"""

from torch import Tensor

from sparse_zoo.attention import Attention, Card, Limit
from sparse_zoo.layout import Layout
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register


@register("dense")
class Dense(Attention):
    """Every token attends to every token of its film.

    **Rule**

    o_i = Σ_j softmax_j(q_i · k_j / √D) v_j, where j runs over all tokens of the film of i, text and video.

    **Paper**

    Scaled dot-product attention (section 3.2.1, equation 1).

    **Our choices**

    Films that share a stream do not attend to each other.

    **Not to be confused with**

    `dense_above`, a setting of every method: it makes a sparse method dense in sampling while the noise is high.
    """

    limits = Limit({})
    strict = "every shot attends to later shots"
    anchors = ("text", "shot")
    card = Card(
        paper="Attention Is All You Need, arXiv 1706.03762",
        granularity="token -> every token of its film",
        chosen_by="",
        trained="from scratch",
        claim="none: the baseline of all comparisons",
    )

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:  # noqa: ARG002
        """One dense table per film."""
        return Plan.dense(layout)
