"""Runs that differ only by their seed, and the controls that they are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.analysis.formatting import number
from experiments.analysis.metrics import CONTROLS, FIGURES, NO_CONTROLS, Measure, get_figure
from experiments.analysis.significance import Estimate
from experiments.tracking.identity import identity
from experiments.tracking.store import TRIALS, Result, home, last_request, read


@dataclass(frozen=True)
class Group:
    """Runs of a sweep that differ only by their seed, under the name that they share.

    `split_from` is the group of a run that stands alone. `sweep` is the other sweep that a control was borrowed from.
    """

    name: str
    results: tuple[Result, ...]
    split_from: str | None = None
    sweep: str | None = None

    @cached_property
    def finished(self) -> list[Result]:
        """The runs that finished."""
        return [result for result in self.results if result.status == "finished"]

    @property
    def first(self) -> Result:
        """The run that represents the group: the first that finished, or else the first."""
        return (self.finished or self.results)[0]

    @cached_property
    def control(self) -> str | None:
        """Which control the group is, by its name or its method: one of `CONTROLS`, None for a method."""
        name, attention = self.split_from or self.name, self.first.attention
        method = attention["name"] if isinstance(attention, dict) else None
        return None if name in NO_CONTROLS else CONTROLS.get(name) or CONTROLS.get(str(method))

    @property
    def remark(self) -> str:
        """A note beside the name: which control it is and of which sweep, or why it is not a control; or empty."""
        note = self.control or NO_CONTROLS.get(self.split_from or self.name, "")
        return f"{note}, of {self.sweep}" if self.sweep else note

    @property
    def titled(self) -> str:
        """The name with the remark."""
        return f"{self.name} ({self.remark})" if self.remark else self.name

    def values(self, name: str) -> dict[int, float]:
        """Return a measure by seed, for the finished runs that have it."""
        found = {result.seed: get_figure(result, name) for result in self.finished}
        return {seed: one for seed, one in found.items() if one is not None}

    def estimate(self, name: str) -> Estimate | None:
        """Return the mean and interval of one of `FIGURES` or of the sample metrics; None if no run has it."""
        if name not in self._estimates:
            self._estimates[name] = Estimate.of([*self.values(name).values()], Measure.of(name).bounds)
        return self._estimates[name]

    @cached_property
    def _estimates(self) -> dict[str, Estimate | None]:
        return {}

    def source(self, name: str) -> str:
        """Return where a mean comes from, one line a run: the value, the file that holds it, the commit."""
        where = name if name in FIGURES else f"metrics.{name}"
        values = self.values(name)
        return "\n".join(
            f"{number(values[r.seed], 4)}  {where} in {Path(r.folder).name}/result.json, "
            f"commit {describe_commit(r)[:9]}"
            for r in self.finished
            if r.seed in values
        )


@dataclass(frozen=True)
class Reference:
    """What methods are compared with: chance, or a control's group, or the reason why that is `missing`."""

    label: str
    group: Group | None = None
    missing: str = ""

    @property
    def title(self) -> str:
        """The label, or the name of a group whose name does not say which control it is."""
        if self.group is None:
            return self.label
        if self.group.name in CONTROLS:
            return self.group.remark
        return self.group.name if self.group.split_from else self.group.titled


def borrow_controls(name: str, groups: Sequence[Group]) -> tuple[Group, ...]:
    """Return the controls that these groups of sweep `name` lack and another sweep finished.

    The other sweep must have the same films, model and training.
    """
    setups = [_training_setup(result.config) for group in groups for result in group.finished]
    lacking = {*CONTROLS.values()} - {group.control for group in groups}
    if not lacking or any(setup != setups[0] for setup in setups):
        return ()
    found: dict[str, Group] = {}
    for path in sorted(home().glob("*/sweep.json")):
        other = path.parent.name
        # Trials have seeds of their own, and settings that may not be the best.
        request = None if other == name or other.endswith(TRIALS) else last_request(other)
        runs: dict[str, list[Result]] = {}
        for cell in request.cells if request else ():
            if _training_setup(cell.config) == setups[0] and (result := read(cell, other)).status == "finished":
                runs.setdefault(cell.group or cell.name, []).append(result)
        for key, results in runs.items():
            group = Group(key, tuple(results), sweep=other)
            if group.control in lacking:
                found.setdefault(str(group.control), group)
    return tuple(found.values())


def _training_setup(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config without its attention and seed."""
    config = identity(config)
    data = {key: value for key, value in config.get("data", {}).items() if key != "seed"}
    return {key: value for key, value in config.items() if key not in ("attention", "match", "seed")} | {"data": data}


def describe_commit(result: Result) -> str:
    """Return the commit of a run's code; a plus marks uncommitted changes."""
    return str(result.provenance.get("commit", "unknown")) + ("+" if result.provenance.get("changed since") else "")
