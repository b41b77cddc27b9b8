"""Settings that change during training: one built method per phase, chosen by the step of the call."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

from torch import Tensor, nn

from sparse_zoo.attention import ANCHORS, Attention, Branch, Call, Result, Term
from sparse_zoo.errors import refuse
from sparse_zoo.layout import Layout
from sparse_zoo.plan import Plan

Schedule = Mapping[str, Mapping[int | str, Any]]


class Scheduled(Attention):
    """A method whose settings change at given steps; `sparse_zoo.build(name, ..., schedule=...)` makes one.

    The phase is a function of `call.step` alone, so that resumed runs and recomputed activations use the same phase as
    before. Without a step (None, a bare call of the library) it is the first phase.

    Phases of one class share their parameters; a phase of another class keeps its own. What is declared holds in every
    phase: the weakest `causality`, the `anchors` that all have, `may_be_empty`, `pools_queries`, `own_heads`,
    `reads_values` and `needs_all_heads` where any has them. `text_reads` is "text" where any phase's is. `features` are
    those of all phases, since they are asked for without a step.

    Args:
        phases: Built methods of one shape by the step at which they begin, rising from 0. Parameters of later phases
            are replaced by those that they share.
        settings: The scheduled settings of each phase, for display.

    Raises:
        ZooError: If phases of one class have parameters of different names or shapes.
    """

    def __init__(self, phases: Mapping[int, Attention], settings: Sequence[Mapping[str, Any]]) -> None:
        built = list(phases.values())
        text_reads: Literal["method", "text"] = "text" if any(x.text_reads == "text" for x in built) else "method"
        super().__init__(
            heads=built[0].heads,
            head_dim=built[0].head_dim,
            dim=built[0].dim,
            kernel=built[0].kernel,
            text_reads=text_reads,
        )
        refuse("schedule", _share_parameters(phases))
        self.starts, self.settings = tuple(phases), tuple(dict(own) for own in settings)
        self.phases = nn.ModuleList(built)
        causal = [phase.causality for phase in built]
        strict = all(x == "strict" for x in causal)
        self.causality = "strict" if strict else "routing" if None not in causal else None
        # Under strict causality "text" promises less: where only some phases are strict, none of it holds in all.
        common = ANCHORS if strict or "strict" not in causal else ("shot", "chunk")
        self.anchors = tuple(x for x in ANCHORS if x in common and all(x in phase.anchors for phase in built))
        self.may_be_empty = any(phase.may_be_empty for phase in built)
        self.pools_queries = any(phase.pools_queries for phase in built)
        self.own_heads = next((phase.own_heads for phase in built if phase.own_heads is not None), None)
        self.reads_values = next((phase.reads_values for phase in built if phase.reads_values is not None), None)
        whole = (phase.needs_all_heads for phase in built if phase.needs_all_heads is not None)
        self.needs_all_heads = next(whole, None)

    def phase(self, step: int | None) -> int:
        """The number of the phase at a step: the last one that has begun; the first one for None."""
        return 0 if step is None else max(0, bisect_right(self.starts, step) - 1)

    def at(self, step: int | None) -> Attention:
        """The method at a step."""
        return cast(Attention, self.phases[self.phase(step)])

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:
        """The plan of the first phase."""
        return self.at(None).plan(q, k, layout)

    def features(self, hidden: Tensor) -> dict[str, Tensor]:
        """The features of all phases, prefixed by phase."""
        return {
            f"{i}.{name}": values
            for i, phase in enumerate(self.phases)
            for name, values in cast(Attention, phase).features(hidden).items()
        }

    def branches(self, call: Call) -> list[Branch | Term]:
        """The branches of the call's phase."""
        return self.at(call.step).branches(self._of_phase(call))

    def losses(self, call: Call) -> dict[str, Tensor]:
        """The auxiliary losses of the call's phase."""
        return self.at(call.step).losses(self._of_phase(call))

    def routing_flops(self, call: Call) -> int:
        """The routing FLOPs of the call's phase."""
        return self.at(call.step).routing_flops(self._of_phase(call))

    def run(self, call: Call) -> Result:
        """Attend as the call's phase does."""
        return self.at(call.step).run(self._of_phase(call))

    def _of_phase(self, call: Call) -> Call:
        """The call with the features of its phase alone."""
        if call.features is None:
            return call
        mine = f"{self.phase(call.step)}."
        own = {name.removeprefix(mine): values for name, values in call.features.items() if name.startswith(mine)}
        return replace(call, features=own)


def phases(settings: Mapping[str, Any], schedule: Schedule) -> dict[int, dict[str, Any]]:
    """The settings from each step on, rising from 0: the constant ones, changed by those that are scheduled.

    Args:
        settings: Constant settings, also the values of scheduled ones before their first step.
        schedule: {setting: {step: value}}; steps are whole numbers from 0, as numbers or text.

    Raises:
        ZooError: With everything that is wrong with the steps.
    """
    reasons, changes = [], {}
    if not isinstance(schedule, Mapping) or not schedule:
        reasons.append(f"must be {{setting: {{step: value}}}} with at least one setting, got {schedule!r}")
        schedule = {}
    for name, values in schedule.items():
        if not isinstance(values, Mapping) or not values:
            reasons.append(f"{name} must be {{step: value}} with at least one step, got {values!r}")
            continue
        steps = [_whole(step) for step in values]
        reasons += [
            f"{name}: a step must be a whole number of at least 0, got {given!r}"
            for given, step in zip(values, steps, strict=True)
            if step is None
        ]
        reasons += [
            f"{name}: step {x} is given twice" for x in dict.fromkeys(steps) if x is not None and steps.count(x) > 1
        ]
        changes[name] = {step: value for step, value in zip(steps, values.values(), strict=True) if step is not None}
    refuse("schedule", reasons)
    starts = sorted({0}.union(*changes.values()))
    return {
        start: dict(settings)
        | {
            name: values[max(begun)]
            for name, values in changes.items()
            if (begun := [step for step in values if step <= start])
        }
        for start in starts
    }


def _whole(step: object) -> int | None:
    if isinstance(step, str) and step.isascii() and step.isdigit():
        return int(step)
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def _share_parameters(phases: Mapping[int, Attention]) -> list[str]:
    """Give every phase the parameters of the first one of its class; returns why some cannot be shared."""
    reasons = []
    owners: dict[type[Attention], Attention] = {}
    for start, phase in phases.items():
        owner = owners.setdefault(type(phase), phase)
        theirs, own = dict(owner.named_parameters()), dict(phase.named_parameters())
        misfits = [
            f"from step {start}: {name!r} would change from {_shape(theirs.get(name))} to {_shape(own.get(name))}, "
            "but phases share their parameters"
            for name in theirs | own
            if _shape(theirs.get(name)) != _shape(own.get(name))
        ]
        reasons += misfits
        for name in () if misfits else own:
            path, _, last = name.rpartition(".")
            setattr(phase.get_submodule(path), last, theirs[name])
    return reasons


def _shape(parameter: Tensor | None) -> str:
    return "none" if parameter is None else str(tuple(parameter.shape))
