"""What the methods of a memory test are held against."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

import sparse_zoo as zoo
from sparse_zoo.attention import is_count
from sparse_zoo.draws import uniform
from sparse_zoo.errors import refuse


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


@zoo.register("random_shots")
class RandomShots(zoo.Attention):
    """The own shot, and others at random for each query and head: what a budget brings without a choice.

    Captions belong to their shots; the global caption counts as one. Training draws anew in every step; in eval mode a
    draw is a function of layer, head and token, so that a film is drawn with the same choice throughout.

    Args:
        shots: Other shots for each query and head; all of the film where it has fewer.
    """

    limits = zoo.Limit({"shots": 1 << 30})
    strict = "later shots are drawn too"
    anchors = ("shot",)
    own_heads = "each head draws shots of its own"
    knob = zoo.Knob("shots", 0, 64)
    small: ClassVar[Mapping[str, Any]] = {"shots": 1}

    def __init__(self, *, shots: int = 2, **base: Any) -> None:
        super().__init__(**base)
        refuse(
            "random_shots",
            [f"shots must be a whole number of at least 0, got {shots!r}"] if not is_count(shots, least=0) else [],
        )
        self.shots = shots

    def branches(self, call: zoo.Call) -> list[zoo.Branch | zoo.Term]:
        pieces = call.layout.partition("shot")
        own = zoo.Plan.within(pieces)
        rows = torch.arange(len(call.layout), device=call.q.device) if call.q_rows is None else call.q_rows
        if call.q_rows is not None:
            own = own.narrow(rows)
        mine = pieces.piece_of[0, 0][rows]
        legal = (pieces.sample[mine][:, None] == pieces.sample) & (
            mine[:, None] != torch.arange(pieces.count, device=rows.device)
        )
        drawn = uniform(call if self.training else replace(call, seed=0, step=None), "random shots", pieces.count)
        best, which = drawn.masked_fill(~legal, -1.0).topk(min(self.shots, pieces.count))
        chosen = which.masked_fill(best < 0, -1)[None]
        return [zoo.Branch(zoo.Plan(*own.parts, *zoo.Plan.routed(pieces, chosen).parts) if self.shots else own)]
