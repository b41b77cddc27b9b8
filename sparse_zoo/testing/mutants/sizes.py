"""Faults that only larger or rarer calls show, and faults of methods for which there is no slow rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_zoo.attention import Attention, Branch, Call, Result, Term
from sparse_zoo.errors import ZooError
from sparse_zoo.layout import Layout
from sparse_zoo.methods.dense import Dense
from sparse_zoo.methods.moga import MoGA
from sparse_zoo.methods.window import Window
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Plan
from sparse_zoo.testing.mutants.base import mutant
from sparse_zoo.testing.mutants.moc import Open


class Unruled(Attention):
    """Unbroken: the own shot and all text of the film; no slow rule and no dense limit tell what is right."""

    limits = "the own shot is all that is read"
    strict = "captions of later shots are read"
    causality = "routing"
    anchors = ("text", "shot")

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:  # noqa: ARG002
        return self.within(layout, layout.shot)

    def within(self, layout: Layout, shot: Tensor) -> Plan:
        """Text of the film, and all tokens of the same number."""
        pieces = layout.partition(shot, "is_text")
        is_text = pieces.is_text.bool()
        reads = (pieces.of(shot)[:, None] == pieces.of(shot)) & (pieces.of(shot) >= 0)
        return Plan.blocks(pieces, pieces, (pieces.sample[:, None] == pieces.sample) & (reads | is_text))


# -- sizes ------------------------------------------------------------------------------------------------------------


@mutant("limit_is_dense", "routing_is_the_papers")
class KeysPast512(Dense):
    """Keys after the 512th token of the stream are read by nobody."""

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:  # noqa: ARG002
        early = torch.arange(len(layout)) < 512
        return Plan.groups(layout.sample, layout.sample.where(early, -1), count=len(layout.films))


@mutant("anchors_attended")
class ShotsPastThird(Unruled):
    """Shots after the fourth attend to text alone."""

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:  # noqa: ARG002
        return self.within(layout, layout.shot.masked_fill(layout.shot > 3, -1))


@mutant("routing_is_the_papers")
class FramesPast16(Window):
    """Frames of a shot after the 16th are of the last tile before them."""

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:
        plan = super().plan(q, k, layout)
        late = layout.shot_frame >= 16
        if not bool(late.any()):
            return plan
        token = layout.partition(torch.arange(len(layout)))
        mask = plan.dense_mask()[0, 0]
        return Plan.blocks(token, token, mask & ~(late & ~layout.is_text & ~late[:, None] & ~layout.is_text[:, None]))


@mutant("films_packed")
class FilmsPastFour(Unruled):
    """Films after the fourth of a stream are one film."""

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:  # noqa: ARG002
        film = layout.sample.clamp(max=4)
        group = layout.shot + 1 + 100 * film
        text = layout.is_text
        token = layout.partition(torch.arange(len(layout)))
        own = (group[:, None] == group) & (layout.shot >= 0)
        return Plan.blocks(token, token, (film[:, None] == film) & (own | text))


@mutant("batch_items_apart", "output_equals_oracle")
class ItemsPastFour(Unruled):
    """Batch items after the fourth are answered as the fourth."""

    def run(self, call: Call) -> Result:
        result = super().run(call)
        return replace(result, out=result.out[torch.arange(len(call.q)).clamp(max=3)])


@mutant("heads_permute", "output_equals_oracle")
class HeadsPastEight(Unruled):
    """Heads after the eighth are answered as the eighth."""

    def run(self, call: Call) -> Result:
        result = super().run(call)
        return replace(result, out=result.out[:, torch.arange(call.q.shape[1]).clamp(max=7)])


@mutant("shared_keys", "routing_is_the_papers")
class SharedByFourAtMost(Open):
    """In routing no key head serves more than four query heads."""

    def choose(self, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        share = min(4, q.shape[1] // k.shape[1])
        heads = (torch.arange(q.shape[1]) // share).clamp(max=k.shape[1] - 1)
        return super().choose(q, k[:, heads], *rest)


@mutant("output_equals_oracle", "limit_is_dense")
class ChannelsPast64(Dense):
    """Scores are made of the first 64 channels."""

    def run(self, call: Call) -> Result:
        return super().run(replace(call, q=call.q * (torch.arange(call.q.shape[-1]) < 64)))


@mutant("limit_is_dense", "routing_is_the_papers")
class LayersPastEight(Dense):
    """Layers after the eighth read their own shot alone."""

    def branches(self, call: Call) -> list[Branch | Term]:
        if call.layer < 8:
            return super().branches(call)
        return [Branch(Plan.within(call.layout.chunks("shot", captions="inside")).narrow(_rows(call)))]


@mutant("eval_draws_nothing", "routing_is_the_papers")
class StepsPastThousand(Open):
    """After a thousand steps a query chooses by the token after it."""

    def branches(self, call: Call) -> list[Branch | Term]:
        late = call.step is not None and call.step >= 1000
        return super().branches(replace(call, q=call.q.roll(-1, 2)) if late else call)


@mutant("limit_is_dense", "output_equals_oracle")
class PureNoiseReadsEvenly(Dense):
    """Where all is noise, all keys weigh the same."""

    def run(self, call: Call) -> Result:
        noise = 0.0 if call.noise is None else float(torch.as_tensor(call.noise).max())
        return super().run(replace(call, q=0 * call.q) if noise > 0.99 else call)


@mutant("anchors_attended")
class CleanFilmsReadNoText(Unruled):
    """Where hardly any noise is left, text is not read."""

    def branches(self, call: Call) -> list[Branch | Term]:
        if call.noise is None or float(torch.as_tensor(call.noise).min()) > 1e-3:
            return super().branches(call)
        return [Branch(Plan.within(call.layout.chunks("shot", captions="inside")).narrow(_rows(call)))]


def _rows(call: Call) -> Tensor:
    return torch.arange(len(call.layout)) if call.q_rows is None else call.q_rows


@mutant("routing_is_the_papers")
class ClampsScores(Open):
    """Queries are clamped before they choose: the largest scores are ties."""

    def choose(self, q: Tensor, *rest: Any) -> Tensor:
        return super().choose(q.clamp(-20, 20), *rest)


@mutant("routing_is_the_papers")
class FaintQueriesChooseNothing(Open):
    """A small number is added to what decides, which drowns faint queries."""

    def choose(self, q: Tensor, *rest: Any) -> Tensor:
        return super().choose(q + 0.02 * (q.abs() < 0.01), *rest)


@mutant("autocast")
class PoolsInHalfUnderAutocast(Open):
    """Under autocast means of chunks are rounded to bfloat16."""

    def choose(self, q: Tensor, k: Tensor, chunks: Partition, *rest: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            means = chunks.mean(k.float())
            k = means.bfloat16().to(k.dtype)[:, :, chunks.piece_of[0, 0].clamp(min=0)]
        return super().choose(q, k, chunks, *rest)


@mutant("autocast")
class QueriesInHalfUnderAutocast(Open):
    """Under autocast queries are rounded to bfloat16 before they choose."""

    def choose(self, q: Tensor, *rest: Any) -> Tensor:
        return super().choose(q.bfloat16().to(q.dtype) if torch.is_autocast_enabled("cpu") else q, *rest)


# -- what no rule is needed for ---------------------------------------------------------------------------------------


@mutant("plans_ignore_values")
class ValuesChoose(Unruled):
    """A token whose value is small is not read by others."""

    def branches(self, call: Call) -> list[Branch | Term]:
        (branch,) = super().branches(call)
        assert isinstance(branch, Branch)
        token = call.layout.partition(torch.arange(len(call.layout)))
        reads = call.v.detach().abs().mean((0, 1, 3)) > 0.75
        mask = branch.plan.dense_mask()[0, 0] & (reads | call.layout.is_text | torch.eye(len(reads), dtype=torch.bool))
        return [replace(branch, plan=Plan.blocks(token, token, mask))]


@mutant("plans_ignore_values")
class ValuesSaidToChoose(Unruled):
    """It says that values decide, and they do not."""

    reads_values = "values decide"


@mutant("training_is_evaluation")
class TextUnreadInTraining(Unruled):
    """In training the own shot is read alone."""

    def branches(self, call: Call) -> list[Branch | Term]:
        if not self.training:
            return super().branches(call)
        return [Branch(Plan.within(call.layout.chunks("shot", captions="inside")).narrow(_rows(call)))]


@mutant("training_is_evaluation")
class OutputsScaledInTraining(Unruled):
    """In training outputs are a little larger."""

    def branches(self, call: Call) -> list[Branch | Term]:
        made = [branch for branch in super().branches(call) if isinstance(branch, Branch)]
        return [replace(branch, weight=1.001) for branch in made] if self.training else list(made)


@mutant("values_of_another_width")
class WideValuesCut(Dense):
    """Of values wider than queries the last channels are left out."""

    def run(self, call: Call) -> Result:
        result = super().run(call)
        return replace(result, out=result.out[..., : call.q.shape[-1]])


@mutant("values_of_another_width")
class NarrowValuesCrash(Dense):
    """Outputs are viewed in the shape of the queries."""

    def run(self, call: Call) -> Result:
        result = super().run(call)
        if call.v.shape[-1] > call.q.shape[-1]:
            raise ZooError("v is wider than q")
        return replace(result, out=torch.nn.functional.pad(result.out, (0, call.q.shape[-1] - result.out.shape[-1])))


# -- cost -------------------------------------------------------------------------------------------------------------


@mutant("routing_is_counted")
class RoutingForFree(Open):
    """Routing is said to take nothing."""

    def routing_flops(self, call: Call) -> int:  # noqa: ARG002
        return 0


@mutant("routing_is_counted")
class RouterForFree(MoGA):
    """The router is said to take nothing."""

    def routing_flops(self, call: Call) -> int:  # noqa: ARG002
        return 0


@mutant("routing_is_counted")
class RoutingOfOneItem(Open):
    """Routing is counted for one batch item."""

    def routing_flops(self, call: Call) -> int:
        return super().routing_flops(call) // len(call.q)


@mutant("routing_is_counted")
class RoutingTokenByToken(Open):
    """Routing is counted as if tokens were scored, not chunks."""

    def routing_flops(self, call: Call) -> int:
        return 2 * call.q.numel() * len(call.layout)
