"""Methods with one thing broken in what they compute, declare, keep or accept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparse_zoo.attention import Branch, Call, Limit, Result, Term
from sparse_zoo.errors import ZooError
from sparse_zoo.kernels import attend, merge
from sparse_zoo.layout import Layout
from sparse_zoo.methods.dense import Dense
from sparse_zoo.methods.moga import MoGA
from sparse_zoo.methods.window import Window
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Plan
from sparse_zoo.testing.mutants.base import mutant

# -- what is computed -------------------------------------------------------------------------------------------------


@mutant("builds")
class LosesAChannel(Dense):
    """The output lacks the last channel."""

    def run(self, call: Call) -> Result:
        result = super().run(call)
        return replace(result, out=result.out[..., :-1])


@mutant("output_equals_oracle", "heads_permute")
class SwappedHeads(Dense):
    """Heads come out in reverse order."""

    def run(self, call: Call) -> Result:
        result = super().run(call)
        return replace(result, out=result.out.flip(1))


@mutant("output_equals_oracle", "routing_is_the_papers")
class LastBranchAlone(MoGA):
    """Branches replace one another instead of being summed."""

    def run(self, call: Call) -> Result:
        call = replace(call, features=self.features(call.hidden)) if call.hidden is not None else call
        last = self.branches(call)[-1]
        assert isinstance(last, Branch)
        out = last.weight * attend(call.q, call.k, call.v, last.plan).out
        return replace(super().run(call), out=out)


@mutant("routing_is_the_papers", "parameters_learn")
class GateMissing(MoGA):
    """The routed branch is not weighed by the probability of its choice."""

    def _weight(self, name: str, call: Call) -> Tensor | float:  # noqa: ARG002
        return 1.0


@mutant("limit_is_dense")
class MeanOverThree(MoGA):
    """Branches are divided by three, however many are mixed."""

    def branches(self, call: Call) -> list[Branch | Term]:
        made = [branch for branch in super().branches(call) if isinstance(branch, Branch)]
        return [replace(branch, weight=branch.weight * len(self.mix) / 3) for branch in made]


@mutant("gradients_equal_oracle")
class MergeWithoutGradient(Dense):
    """Two halves of the keys are merged by log-sum-exp that carries no gradient: exact forward, wrong backward."""

    def run(self, call: Call) -> Result:
        result = super().run(call)
        token = torch.arange(len(call.layout))
        label = call.layout.sample
        halves = [
            Plan.groups(label, torch.where(token % 2 == side, label, -1), count=len(call.layout.films))
            for side in (0, 1)
        ]
        parts = [attend(call.q, call.k, call.v, half) for half in halves]
        return replace(result, out=merge([part.out for part in parts], [part.lse for part in parts])[0])


@mutant("influence_equals_mask", "output_equals_oracle")
class PeeksAtTheNextToken(Window):
    """A little of the next token's value is mixed in, past the plan."""

    def run(self, call: Call) -> Result:
        result = super().run(call)
        values = call.v.repeat_interleave(call.q.shape[1] // call.v.shape[1], dim=1)
        return replace(result, out=result.out + 1e-3 * values.roll(-1, dims=2))


@mutant("influence_equals_mask", "output_equals_oracle")
class LastKeyUnread(Window):
    """The value of the last token reaches nobody."""

    def run(self, call: Call) -> Result:
        last = torch.arange(len(call.layout)) == len(call.layout) - 1
        return super().run(replace(call, v=call.v.masked_fill(last[:, None], 0.0)))


@mutant("half_precision")
class AlwaysBfloat16(Dense):
    """q, k, v are rounded to bfloat16, whatever half precision is asked for."""

    def run(self, call: Call) -> Result:
        q, k, v = (x.bfloat16().to(x.dtype) for x in (call.q, call.k, call.v))
        return super().run(replace(call, q=q, k=k, v=v))


@mutant("extreme_scores")
class SoftmaxWithoutMaximum(Dense):
    """exp is taken of the scores as they are."""

    def run(self, call: Call) -> Result:
        share = call.q.shape[1] // call.k.shape[1]
        k, v = (x.repeat_interleave(share, dim=1) for x in (call.k, call.v))
        weights = (call.q @ k.transpose(-1, -2) * call.q.shape[-1] ** -0.5).exp()
        weights = weights * (call.layout.sample[:, None] == call.layout.sample)
        return replace(super().run(call), out=weights / weights.sum(-1, keepdim=True) @ v)


@mutant("pairs_counted")
class CountsOneBranch(MoGA):
    """Reported plans leave out all branches but the first."""

    def run(self, call: Call) -> Result:
        result = super().run(call)
        return replace(result, plans=result.plans[:1])


@mutant("pairs_counted")
class RoutingForLess(MoGA):
    """The router's FLOPs are taken off."""

    def routing_flops(self, call: Call) -> int:
        return -super().routing_flops(call)


class OneByOne(Dense):
    """Unbroken: dense attention on pieces that are laid out by hand."""

    def pieces(self, length: int) -> tuple[Tensor, Tensor]:
        """Tokens in the order of the pieces, and where pieces start."""
        return torch.arange(length), torch.arange(length + 1)

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:
        order, offsets = (x.int()[None, None] for x in self.pieces(len(layout)))
        pieces = Partition(order, offsets, len(layout))
        return super().plan(q, k, layout) if len(layout.films) > 1 else Plan.blocks(pieces, pieces, _all_pairs(pieces))


def _all_pairs(pieces: Partition) -> Tensor:
    return torch.ones(pieces.count, pieces.count, dtype=torch.bool)


@mutant("plans_in_range")
class TokensFromOne(OneByOne):
    """Tokens are numbered from 1."""

    def pieces(self, length: int) -> tuple[Tensor, Tensor]:
        order, offsets = super().pieces(length)
        return order + 1, offsets


@mutant("plans_in_range", "plans_disjoint")
class TokenInTwoPieces(OneByOne):
    """The last token is in the first piece, too."""

    def pieces(self, length: int) -> tuple[Tensor, Tensor]:
        order, offsets = super().pieces(length)
        return torch.cat([order[-1:], order]), torch.cat([offsets[:1], offsets[1:] + 1])


@mutant("plans_in_range")
class PieceGoesBack(OneByOne):
    """A piece ends before it starts."""

    def pieces(self, length: int) -> tuple[Tensor, Tensor]:
        order, offsets = super().pieces(length)
        return order, offsets.flip(0)


@mutant("text_reads_text")
class TextReadsOn(Dense):
    """text_reads="text" is accepted and changes nothing."""

    def attended(self, branch: Branch, call: Call) -> Plan:  # noqa: ARG002
        return branch.plan


@mutant("losses_are_scalars")
class LossPerItem(MoGA):
    """The balance loss has one value per batch item."""

    def losses(self, call: Call) -> dict[str, Tensor]:
        return {name: loss.expand(len(call.q)) for name, loss in super().losses(call).items()}


@mutant("losses_are_scalars")
class LossWithoutGradient(MoGA):
    """The balance loss is a number that nothing learns from."""

    def losses(self, call: Call) -> dict[str, Tensor]:
        return {name: loss.detach() for name, loss in super().losses(call).items()}


@mutant("features_per_token")
class FeaturesOfTheFilm(MoGA):
    """The router sees each token relative to the mean of all."""

    def features(self, hidden: Tensor) -> dict[str, Tensor]:
        return super().features(hidden - hidden.mean(1, keepdim=True))


@mutant("routing_is_the_papers")
class BorrowsNothing(MoGA):
    """Temporal groups borrow no frames of the shots beside."""

    def _plan(self, name: str, call: Call) -> Plan:
        plan = super()._plan(name, call)
        if name != "stga":
            return plan
        shot, text = call.layout.shot, call.layout.is_text
        own = Plan.groups(torch.where(text, -1, shot + 100 * call.layout.sample))
        mask = plan.dense_mask() & (own.dense_mask() | text | text[:, None])
        token = call.layout.partition(torch.arange(len(call.layout)))
        return Plan.blocks(token, token, mask)


@mutant("routing_is_the_papers")
class WindowOneTileShort(Window):
    """Windows reach one tile less to each side than they should."""

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:
        wide = self.window
        self.window = tuple(max(1, size - 2) for size in wide)
        try:
            return super().plan(q, k, layout)
        finally:
            self.window = wide


@mutant("routing_is_the_papers")
class WindowCutForShifted(Window):
    """At the edges the window is cut off where it should be pushed inside."""

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:
        return Window(heads=self.heads, head_dim=self.head_dim, tile=self.tile, window=self.window, edge="cut").plan(
            q, k, layout
        )


@mutant("films_packed", "routing_is_the_papers")
class OneStreamOneFilm(Dense):
    """Packed films attend to each other."""

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:  # noqa: ARG002
        return Plan.groups(torch.zeros(len(layout), dtype=torch.int64))


# -- what is declared -------------------------------------------------------------------------------------------------


@mutant("limit_is_dense")
class WrongLimit(Window):
    """A window of one tile is declared to be dense."""

    limits = Limit({"window": (1, 1, 1)})


@mutant("settings_survive_yaml")
class WantsTuples(Window):
    """A window given as a list, as YAML gives it, is taken for none."""

    small: ClassVar[dict[str, Any]] = {"tile": (2, 2, 2), "window": (1, 1, 1)}

    def __init__(self, *, window: Sequence[int] = (3, 3, 3), **base: Any) -> None:
        super().__init__(window=window if isinstance(window, tuple) else (3, 3, 3), **base)


@mutant("settings_survive_yaml")
class SettingsOfObjects(Window):
    """A setting is a tensor, which YAML cannot hold."""

    small: ClassVar[dict[str, Any]] = {"tile": torch.tensor([2, 2, 2])}

    def __init__(self, *, tile: Tensor, **base: Any) -> None:
        super().__init__(tile=tuple(int(size) for size in tile), **base)


# -- what is kept -----------------------------------------------------------------------------------------------------


@mutant("leaves_no_state")
class KeepsThePlan(Dense):
    """The last plan is kept on the module."""

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:
        self.last = super().plan(q, k, layout)
        return self.last


@mutant("state_dict_restores")
class MakesParametersLate(Dense):
    """A parameter is made in the first forward pass."""

    def run(self, call: Call) -> Result:
        if not hasattr(self, "gain"):
            self.gain = nn.Parameter(torch.ones((), dtype=call.q.dtype))
        result = super().run(call)
        return replace(result, out=self.gain * result.out)


@mutant("state_dict_restores")
class HidesAWeight(MoGA):
    """A random weight is a plain tensor that no state dict holds."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.gain = torch.rand(()).double()

    def run(self, call: Call) -> Result:
        result = super().run(call)
        return replace(result, out=self.gain * result.out)


@mutant("copies_and_pickles")
class HoldsALambda(Dense):
    """A lambda is kept on the module."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.activation = lambda x: x


@mutant("copies_and_pickles")
class CopiesHalf(MoGA):
    """Pickling leaves the gate's sharpness behind."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.sharpness = 3.0

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "sharpness"}

    def features(self, hidden: Tensor) -> dict[str, Tensor]:
        return super().features(hidden * vars(self).get("sharpness", 1.0))


@mutant("inference_then_training")
class RemembersInference(Window):
    """What is remembered by layout is made in whatever mode asks first."""

    remembered: ClassVar[dict[tuple[Layout, tuple[int, ...]], Tensor]] = {}

    def branches(self, call: Call) -> list[Branch | Term]:
        key = (call.layout, self.window)
        if key not in self.remembered:
            self.remembered[key] = torch.ones(len(call.layout), 1, dtype=call.q.dtype)
        return [Branch(self.plan(call.q, call.k, call.layout), weight=self.remembered[key])]


# -- what is accepted -------------------------------------------------------------------------------------------------


@mutant("ragged_films")
class MeanOfNoText(Dense):
    """The mean of the text's values is added, of none where there is no text."""

    def run(self, call: Call) -> Result:
        result = super().run(call)
        text = call.v[:, :, call.layout.is_text].mean(2, keepdim=True)
        return replace(result, out=result.out + 0 * text.repeat_interleave(call.q.shape[1] // call.k.shape[1], dim=1))


@mutant("ragged_films")
class WholeTilesOnly(Window):
    """Sizes that the tile does not divide are cut to those that it does."""

    def run(self, call: Call) -> Result:
        result = super().run(call)
        return replace(result, out=result.out[:, :, : len(call.layout) // 4 * 4])


@mutant("inputs_untouched")
class ScalesInPlace(Dense):
    """q is scaled where it lies."""

    def run(self, call: Call) -> Result:
        call.q.data.mul_(0.5)
        return super().run(call)


@mutant("strided_inputs")
class ReadsMemoryInOrder(Dense):
    """Memory is read as if q were contiguous."""

    def run(self, call: Call) -> Result:
        return super().run(replace(call, q=call.q.as_strided(call.q.shape, torch.empty(call.q.shape).stride())))


@mutant("autocast")
class AutocastDtype(MoGA):
    """The output has autocast's dtype in place of q's."""

    def run(self, call: Call) -> Result:
        result = super().run(call)
        on = torch.is_autocast_enabled("cpu")
        return replace(result, out=result.out.to(torch.get_autocast_dtype("cpu"))) if on else result


@mutant("compiles")
class OtherWhenCompiled(Dense):
    """A compiled model takes another path."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, **context: Any) -> Result:
        result: Result = super().forward(q, k * 1.5 if torch.compiler.is_compiling() else k, v, layout, **context)
        return result


@mutant("named_kernel_refuses")
class FallsBack(Dense):
    """A kernel that cannot run is replaced by one that can."""

    def run(self, call: Call) -> Result:
        try:
            return super().run(call)
        except ZooError:
            self.kernel = "auto"
            return super().run(call)


@mutant("named_kernel_refuses")
class TakesAnyKernel(Dense):
    """Unknown kernels are taken for "auto"."""

    def __init__(self, *, kernel: str = "auto", **base: Any) -> None:
        super().__init__(kernel=kernel if kernel == "refuses" else "auto", **base)


@mutant("bad_input_refused")
class PadsShortInput(Dense):
    """Streams shorter than the layout are filled up with zeros."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, **context: Any) -> Result:
        q, k, v = (nn.functional.pad(x, (0, 0, 0, len(layout) - x.shape[2])) for x in (q, k, v))
        return super().forward(q, k, v, layout, **context)


@mutant("head_slices")
class HeadsByNumber(Dense):
    """A gain for each head is found by its place among those given."""

    def run(self, call: Call) -> Result:
        result = super().run(call)
        gain = torch.arange(1, call.q.shape[1] + 1)[:, None, None]
        return replace(result, out=result.out * gain)
