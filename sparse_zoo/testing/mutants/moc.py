"""Mixture of Contexts with one thing broken in the routing, or in its random draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sparse_zoo import routing
from sparse_zoo.attention import Branch, Call, Knob, Term
from sparse_zoo.draws import uniform
from sparse_zoo.layout import Layout
from sparse_zoo.methods import moc
from sparse_zoo.methods.moc import MoC
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Plan
from sparse_zoo.routing import Drops, top_chunks
from sparse_zoo.testing.mutants.base import mutant
from sparse_zoo.testing.routing import moc as slow_moc
from sparse_zoo.testing.routing import slow_routing

static_of = moc._static


class Open(MoC):
    """MoC, unbroken, with its tables and its choice laid open."""

    def static(self, layout: Layout) -> moc._Static:
        return static_of(layout, self.cut)

    def choose(self, *given: Any) -> Tensor:
        """Arguments as those of `top_chunks`."""
        return top_chunks(*given)

    def branches(self, call: Call) -> list[Branch | Term]:
        def static(layout: Layout, _: moc._Cut) -> moc._Static:
            return self.static(layout)

        def choose(*given: Any, on_device: bool) -> Tensor:  # noqa: ARG001
            return self.choose(*given)

        with patch.object(moc, "_static", static), patch.object(routing, "top_chunks", choose):
            return super().branches(call)


@mutant("routing_is_the_papers")
class OffByOneChunkBound(Open):
    """Every chunk starts and ends one token late."""

    def static(self, layout: Layout) -> moc._Static:
        static = super().static(layout)
        piece = static.chunks.piece_of[0, 0]
        late = torch.cat([piece[:1], piece[:-1]])
        return replace(static, chunks=Partition.from_labels(late, static.chunks.count, layout), straddles=True)


@mutant("routing_is_the_papers", chunk="tokens", chunk_tokens=84, top_k=1)
class FillsChunksUp(Open):
    """Chunks by tokens are filled one after the other: the last of a shot holds what is left."""

    def static(self, layout: Layout) -> moc._Static:
        fit = (self.cut.tokens // (layout.rows * layout.cols)).clamp(min=1)
        return replace(super().static(layout), chunks=layout.partition("shot", "is_text", layout.shot_frame // fit))


@mutant("causality_holds", "routing_is_the_papers")
class LeakedFutureChunk(Open):
    """Chunks after the query's own are candidates too."""

    def static(self, layout: Layout) -> moc._Static:
        return static_of(layout, replace(self.cut, causal=None))


@mutant("prefix_invariance", "causality_holds", causal="strict")
class StrictInNameAlone(Open):
    """Under strict causality captions of later shots are read, and their video is routed to."""

    def static(self, layout: Layout) -> moc._Static:
        return static_of(layout, replace(self.cut, causal=None))


@mutant("prefix_invariance")
class LaterCaptionsAreRead(Open):
    """Under strict causality the text anchor holds the captions of later shots."""

    def static(self, layout: Layout) -> moc._Static:
        return static_of(layout, replace(self.cut, causal="routing"))


@mutant("prefix_invariance", causal="strict", text_reads="text")
class CaptionsReadAhead(Open):
    """Under strict causality captions that read text alone read later ones too."""

    def attended(self, branch: Branch, call: Call) -> Plan:
        return Plan(
            *branch.plan.keep(~call.layout.is_text).parts,
            *Plan.within(call.layout.partition(where=call.layout.is_text)).parts,
        )


@mutant("anchors_attended", "routing_is_the_papers")
class DroppedTextAnchor(Open):
    """Text is declared an anchor and is not attended unless it is chosen."""

    def static(self, layout: Layout) -> moc._Static:
        return static_of(layout, replace(self.cut, anchors=("shot",)))


@mutant("anchors_attended", "routing_is_the_papers")
class DroppedShotAnchor(Open):
    """The own shot is declared an anchor and is not attended unless it is chosen."""

    def static(self, layout: Layout) -> moc._Static:
        return static_of(layout, replace(self.cut, anchors=("text",)))


@mutant("plans_disjoint", "gradients_equal_oracle", causal=None)
class AnchorsCountedTwice(Open):
    """Anchored chunks are candidates, and their pairs are held by the anchor and by the choice."""

    def static(self, layout: Layout) -> moc._Static:
        return replace(
            super().static(layout), legal=static_of(layout, replace(self.cut, anchors=())).legal, straddles=False
        )


@mutant("routing_is_the_papers", causal=None)
class ChoiceSpentOnAnchors(Open):
    """Anchored chunks are candidates, and take places of top_k."""

    def static(self, layout: Layout) -> moc._Static:
        return replace(
            super().static(layout), legal=static_of(layout, replace(self.cut, anchors=())).legal, straddles=True
        )


@mutant("plans_disjoint", "pairs_counted")
class ChunkChosenTwice(Open):
    """The best chunk fills the last place of top_k, too."""

    def choose(self, *given: Any) -> Tensor:
        chosen = super().choose(*given)
        return torch.cat([chosen[..., :-1], chosen[..., :1]], dim=-1)


@mutant("plans_in_range", causal=None)
class OffByOneEdges(Open):
    """Indices of chunks count from 1."""

    def choose(self, *given: Any) -> Tensor:
        return super().choose(*given) + 1


@mutant("routing_is_the_papers")
class OneTooFew(Open):
    """top_k - 1 chunks are chosen."""

    def choose(self, *given: Any) -> Tensor:
        *rest, top_k, drops = given
        return super().choose(*rest, top_k - 1, drops)


@mutant("routing_is_the_papers")
class TiesToTheLater(Open):
    """Equal scores go to the later chunk."""

    def choose(self, q: Tensor, k: Tensor, chunks: Partition, legal: Tensor, *rest: Any) -> Tensor:
        turned = Partition.from_labels(chunks.count - 1 - chunks.piece_of[0, 0], chunks.count)
        chosen = super().choose(q, k, turned, legal.flip(-1), *rest)
        return torch.where(chosen < 0, -1, chunks.count - 1 - chosen)


@mutant("routing_is_the_papers")
class SumForMean(Open):
    """Chunks are scored by the sum of their keys: the longest wins."""

    def choose(self, q: Tensor, k: Tensor, chunks: Partition, *rest: Any) -> Tensor:
        return super().choose(q, k * chunks.sizes[0, 0][chunks.piece_of[0, 0]][:, None], chunks, *rest)


@mutant("routing_is_the_papers")
class MeanOverPaddedKeys(Open):
    """Chunks are padded to a multiple of 8 tokens, and the mean counts the padding."""

    def choose(self, q: Tensor, k: Tensor, chunks: Partition, *rest: Any) -> Tensor:
        sizes = chunks.sizes[0, 0]
        share = sizes / (-(-sizes // 8) * 8).clamp(min=1)
        return super().choose(q, k * share[chunks.piece_of[0, 0]][:, None].to(k), chunks, *rest)


@mutant("routing_is_the_papers")
class LowestScores(Open):
    """The least similar chunks are chosen."""

    def choose(self, q: Tensor, *rest: Any) -> Tensor:
        return super().choose(-q, *rest)


@mutant("routing_is_the_papers")
class ScoresInHalf(Open):
    """Keys are rounded to bfloat16 before they are pooled."""

    def choose(self, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        return super().choose(q, k.bfloat16().to(k), *rest)


@mutant("films_packed", causal=None)
class ForgetsSamples(Open):
    """Chunks of other films in the stream are candidates."""

    def static(self, layout: Layout) -> moc._Static:
        static = super().static(layout)
        other = torch.ones_like(static.legal)
        return replace(static, legal=static.legal | (other & (static.chunks.sample != static.chunks.sample[0])))


@mutant("batch_items_apart")
class RoutesByFirstItem(Open):
    """All batch items attend where the first one's queries point."""

    def choose(self, q: Tensor, *rest: Any) -> Tensor:
        return super().choose(q[:1].expand_as(q), *rest)


@mutant("heads_permute", "routing_is_the_papers")
class RoutesByFirstHead(Open):
    """All heads attend where the first one's queries point."""

    def choose(self, q: Tensor, *rest: Any) -> Tensor:
        return super().choose(q[:, :1].expand_as(q), *rest)


@mutant("shared_keys", "routing_is_the_papers")
class WrongSharedKeys(Open):
    """Routing pairs query head h with key head h % Hk."""

    def choose(self, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        return super().choose(q, k.repeat(1, q.shape[1] // k.shape[1], 1, 1), *rest)


@mutant("no_query_without_key", anchors=())
class LeftWithoutKeys(Open):
    """Queries of the first chunk have no keys, and may_be_empty denies it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.may_be_empty = False


@mutant("no_query_without_key", anchors=())
class MeanForNothing(Open):
    """Queries without keys get the mean of all values."""

    def run(self, call: Call) -> Any:
        result = super().run(call)
        empty = ~result.plans[0].dense_mask().any(-1)
        mean = call.v.mean(2, keepdim=True).repeat_interleave(call.q.shape[1] // call.k.shape[1], dim=1)
        return replace(result, out=torch.where(empty[..., None], mean, result.out))


@mutant("knob_buys_density")
class KnobTheWrongWay(MoC):
    """The knob is declared from dense to sparse."""

    knob = Knob("top_k", 64, 1)


@mutant("some_queries")
class FirstQueriesForAny(MoC):
    """Some queries of the stream are taken for its first ones."""

    def branches(self, call: Call) -> list[Branch | Term]:
        whole = Plan.within(call.layout.chunks("frame"))
        return [Branch(whole if call.q_rows is None else whole.narrow(torch.arange(len(call.q_rows))))]


@mutant("eval_draws_nothing", "routing_is_the_papers")
class DropsInEval(Open):
    """Chunks are dropped off and in without training, too."""

    def branches(self, call: Call) -> list[Branch | Term]:
        with patch.object(self, "training", True):
            return super().branches(call)


@mutant("routing_is_the_papers")
class DropsOfTheFirstHead(Open):
    """All heads draw what the first draws."""

    def branches(self, call: Call) -> list[Branch | Term]:
        def first(*given: Any) -> Tensor:
            return uniform(*given)[:1].expand(call.q.shape[1], -1, -1)

        with patch.object(routing, "uniform", first):
            return super().branches(call)


class Dropping(Open):
    """MoC, unbroken, with its drops laid open."""

    def choose(self, *given: Any) -> Tensor:
        *rest, drops = given
        return super().choose(*rest, drops and Changed(drops, self.drop))

    def drop(self, drops: Drops, chosen: Tensor, legal: Tensor, rows: slice) -> Tensor:
        """Arguments as those of `Drops`."""
        return drops(chosen, legal, rows)


class Changed:
    """Drops by another rule, as wide."""

    def __init__(self, drops: Drops, rule: Callable[..., Tensor]) -> None:
        self.drops, self.rule, self.most = drops, rule, drops.most

    def __call__(self, *given: Any) -> Tensor:
        return self.rule(self.drops, *given)


@mutant("routing_is_the_papers")
class DropsInWhatIsIllegal(Dropping):
    """Anchored and later chunks may come in."""

    def drop(self, drops: Drops, chosen: Tensor, legal: Tensor, rows: slice) -> Tensor:
        return drops(chosen, torch.ones_like(legal), rows)


@mutant("routing_is_the_papers")
class DropsOffEmptyPlaces(Dropping):
    """What is taken off is drawn among the top_k places, chosen or not."""

    def drop(self, drops: Drops, chosen: Tensor, legal: Tensor, rows: slice) -> Tensor:
        changed = drops(chosen.clamp(min=0), legal, rows)
        came = drops(chosen, legal, rows)[..., chosen.shape[-1] :]
        left = torch.where(chosen < 0, -1, changed[..., : chosen.shape[-1]])
        return torch.cat([left, came], dim=-1)


@mutant("routing_is_the_papers")
class DroppedOffComesBack(Dropping):
    """What was taken off is a candidate to come in."""

    def drop(self, drops: Drops, chosen: Tensor, legal: Tensor, rows: slice) -> Tensor:
        left = replace(drops, into=0.0)(chosen, legal, rows)
        return replace(drops, off=0.0)(left, legal, rows)


@mutant("routing_is_the_papers")
class NeverDropsIn(Dropping):
    """Nothing comes in."""

    def drop(self, drops: Drops, chosen: Tensor, legal: Tensor, rows: slice) -> Tensor:
        changed = drops(chosen, legal, rows)
        return torch.cat([changed[..., : chosen.shape[-1]], torch.full_like(changed[..., chosen.shape[-1] :], -1)], -1)


@mutant("routing_is_the_papers")
class NeverDropsOff(Dropping):
    """Nothing is taken off."""

    def drop(self, drops: Drops, chosen: Tensor, legal: Tensor, rows: slice) -> Tensor:
        return replace(drops, off=0.0)(chosen, legal, rows)


class Noisy(MoC):
    """MoC, unbroken, whose scores get noise in training, drawn by seed, step, layer and head."""

    same_in_training = "scores get noise"

    def seed(self, call: Call, head: int) -> int:
        return hash((call.seed, call.step, call.layer, call.head_offset + head)) % (1 << 31)

    def noise(self, call: Call) -> Tensor:
        draws = [
            torch.randn(
                len(call.layout), call.q.shape[-1], generator=torch.Generator().manual_seed(self.seed(call, head))
            )
            for head in range(call.q.shape[1])
        ]
        noise = torch.stack(draws).to(call.q)
        return noise if call.q_rows is None else noise[:, call.q_rows]

    def branches(self, call: Call) -> list[Branch | Term]:
        return super().branches(replace(call, q=call.q + self.noise(call)) if self.training else call)


@slow_routing(Noisy)
def noisy(attention: Noisy, call: Call) -> list[tuple[Tensor, Tensor | float]]:
    """The rule of MoC, for queries with noise in training."""
    return slow_moc(attention, replace(call, q=call.q + attention.noise(call)) if attention.training else call)


@mutant("deterministic", "checkpointing")
class GlobalDraws(Noisy):
    """Noise comes from torch's global generator."""

    def noise(self, call: Call) -> Tensor:
        return torch.randn_like(call.q)


@mutant("deterministic", "draws_recomputed", "checkpointing")
class CountsCalls(Noisy):
    """Noise depends on how often the module has run."""

    calls = 0

    def seed(self, call: Call, head: int) -> int:
        CountsCalls.calls += 1
        return super().seed(call, head) + CountsCalls.calls


@mutant("draws_recomputed")
class DrawsByTheLastStep(Noisy):
    """Noise is drawn by the step of the call before."""

    step: int | None = None

    def seed(self, call: Call, head: int) -> int:
        before, DrawsByTheLastStep.step = DrawsByTheLastStep.step, call.step
        return super().seed(replace(call, step=before), head)


@mutant("eval_draws_nothing")
class DrawsInEval(Noisy):
    """Noise is added in eval mode too."""

    def branches(self, call: Call) -> list[Branch | Term]:
        return MoC.branches(self, replace(call, q=call.q + self.noise(call)))


@mutant("head_slices")
class DrawsByLocalHead(Noisy):
    """Noise is drawn by the place of a head among those given, wherever they lie."""

    def seed(self, call: Call, head: int) -> int:
        return super().seed(replace(call, head_offset=0), head)
