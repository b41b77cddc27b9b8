"""What the methods of a memory test are held against."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

import sparse_zoo as zoo
from sparse_zoo.draws import numbers, uniform
from sparse_zoo.errors import refuse, unknown
from sparse_zoo.requirements import is_count

CAPTIONS, EACH = ("own", "all"), ("shot", "token")


@zoo.register("own_shot")
class OwnShot(zoo.Attention):
    """Every token attends to its own shot: what can be drawn without memory of other shots.

    A shot's caption belongs to it; the global caption, which has no shot, attends to itself.

    Args:
        captions: Which captions are attended to besides. "all": those of the whole film. Where captions read video,
            which `text_reads="text"` forbids, they then carry it from shot to shot.
    """

    limits = "no setting reaches the video of another shot"
    strict: ClassVar[Mapping[str, Any] | str] = "captions of later shots are read too"
    anchors = ("shot",)

    def __init__(self, *, captions: Literal["own", "all"] = "own", **base: Any) -> None:
        super().__init__(**base)
        refuse("own_shot", [unknown("captions", captions, CAPTIONS)] if captions not in CAPTIONS else [])
        self.captions = captions
        if captions == "own":
            self.causality, self.strict = "strict", {}  # type: ignore[misc]

    def plan(self, q: Tensor, k: Tensor, layout: zoo.Layout) -> zoo.Plan:  # noqa: ARG002
        """Return a plan: each token attends to its own shot and, if `captions` is "all", to its film's captions."""
        shots = zoo.Plan.within(layout.partition("shot"))
        if self.captions == "own":
            return shots
        films, text = layout.partition(), layout.partition(where=layout.is_text)
        return shots | zoo.Plan.blocks(films, text, films.sample[:, None] == text.sample)


@zoo.register("random_shots")
class RandomShots(zoo.Attention):
    """The own shot, and others at random: what a budget brings without a choice.

    Captions belong to their shots; the global caption counts as one. Films are drawn with the same choice from first
    to last step. The films of a batch share it, and so do those of one stream: shots and tokens count from the first
    of their own film, so that a film is drawn alike packed and alone.

    Args:
        shots: Other shots; all of the film where it has fewer.
        each: Who draws. "shot": every shot once, for all its tokens, in all heads and layers, so that a shot that was
            not drawn cannot be seen in any way: the null. "token": every query in every head and layer, which is no
            null, since together the tokens of a shot see nearly all others.
    """

    limits = zoo.Limit({"shots": 1 << 30})
    strict = "later shots are drawn too"
    anchors = ("shot",)
    knob = zoo.Knob("shots", 0, 64)
    small: ClassVar[Mapping[str, Any]] = {"shots": 1}

    def __init__(self, *, shots: int = 2, each: Literal["shot", "token"] = "shot", **base: Any) -> None:
        super().__init__(**base)
        refuse(
            "random_shots",
            [
                f"shots must be a whole number of at least 0, got {shots!r}" if not is_count(shots, least=0) else "",
                unknown("each", each, EACH) if each not in EACH else "",
            ],
        )
        self.shots, self.each = shots, each
        self.own_heads = "each head draws shots of its own" if each == "token" else None

    def branches(self, call: zoo.Call) -> list[zoo.Branch | zoo.Term]:
        """Return one branch: the own shot, and up to `shots` other shots of the same film, chosen at random."""
        pieces = call.layout.partition("shot")
        rows = torch.arange(len(call.layout), device=call.q.device) if call.q_rows is None else call.q_rows
        mine = pieces.piece_of[0, 0][rows]
        own = zoo.Plan.within(pieces)
        if call.q_rows is not None:
            own = own.narrow(rows)
        if not self.shots:
            return [zoo.Branch(own)]
        number = torch.arange(pieces.count, device=rows.device)
        shot = _within(pieces.sample)
        # Not of the step: a seed stands for a batch of films, in all the steps in which they are drawn.
        if self.each == "shot":
            drawn = numbers(("random shots", call.seed), number[:1], shot, pieces.count)[:, mine]
        else:
            token = _within(call.layout.sample)
            drawn = uniform(replace(call, step=None, q_rows=token[rows]), "random shots", pieces.count)
        drawn = drawn[..., shot]
        legal = (pieces.sample[mine][:, None] == pieces.sample) & (mine[:, None] != number)
        best, which = drawn.masked_fill(~legal, -1.0).topk(min(self.shots, pieces.count))
        chosen = which.masked_fill(best < 0, -1)[None]
        return [zoo.Branch(zoo.Plan(*own.parts, *zoo.Plan.routed(pieces, chosen).parts))]


def _within(sample: Tensor) -> Tensor:
    """The place of each entry among those of its own film, whose entries follow one another."""
    place = torch.arange(len(sample), device=sample.device)
    return place - torch.searchsorted(sample, sample)
