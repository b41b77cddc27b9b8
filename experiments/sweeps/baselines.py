"""What the methods of a memory test are held against."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

import sparse_zoo as zoo


@zoo.register("own_shot")
class OwnShot(zoo.Attention):
    """Every token attends to its own shot alone: what can be drawn without memory of other shots.

    A shot's caption belongs to it; the global caption, which has no shot, attends to itself.
    """

    limits = "no setting reaches another shot"
    strict: ClassVar[Mapping[str, Any]] = {}
    causality = "strict"
    anchors = ("shot",)

    def plan(self, q: Tensor, k: Tensor, layout: zoo.Layout) -> zoo.Plan:  # noqa: ARG002
        return zoo.Plan.within(layout.partition("shot"))
