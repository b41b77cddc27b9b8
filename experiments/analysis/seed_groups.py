"""Runs that differ by their seed alone, and what they are read against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.analysis.formatting import number
from experiments.analysis.metrics import CONTROLS, FIGURES, NO_CONTROLS, Measure
from experiments.analysis.significance import Figure
from experiments.tracking.identity import identity
from experiments.tracking.store import Result, asked_before, home, read


@dataclass(frozen=True)
class Group:
    """Runs of a sweep that differ by their seed alone, by the name that they share; most often there is one run.

    `of` is the group that a run was taken from to stand alone, `sweep` the other sweep that a control was found in.
    """

    name: str
    results: tuple[Result, ...]
    of: str | None = None
    sweep: str | None = None

    @cached_property
    def finished(self) -> list[Result]:
        return [result for result in self.results if result.status == "finished"]

    @property
    def one(self) -> Result:
        """The run that stands for all where one must: the first that finished, or else the first."""
        return (self.finished or self.results)[0]

    @cached_property
    def control(self) -> str | None:
        """Which control the group is, by its name or its method: one of `CONTROLS`, None for a method."""
        name, attention = self.of or self.name, self.one.attention
        method = attention["name"] if isinstance(attention, dict) else None
        return None if name in NO_CONTROLS else CONTROLS.get(name) or CONTROLS.get(str(method))

    @property
    def remark(self) -> str:
        """What a reader must know beside the name: which control it is, and whence, or that it is none; or nothing."""
        told = self.control or NO_CONTROLS.get(self.of or self.name, "")
        return f"{told}, of {self.sweep}" if self.sweep else told

    @property
    def titled(self) -> str:
        """The name with the remark, in plain text."""
        return f"{self.name} ({self.remark})" if self.remark else self.name

    def values(self, name: str) -> dict[int, float]:
        """Of a measure, by seed, over the finished runs that have it."""
        found = {r.seed: getattr(r, name) if name in FIGURES else r.metrics.get(name) for r in self.finished}
        return {seed: value for seed, value in found.items() if value is not None}

    def figure(self, name: str) -> Figure | None:
        """Mean and interval of one of `FIGURES` or of the sample metrics."""
        if name not in self._figures:
            self._figures[name] = Figure.of([*self.values(name).values()], Measure.of(name).bounds)
        return self._figures[name]

    @cached_property
    def _figures(self) -> dict[str, Figure | None]:
        return {}

    def source(self, name: str) -> str:
        """Where a figure comes from, a line per run: the value, the file that holds it, the commit."""
        where = name if name in FIGURES else f"metrics.{name}"
        values = self.values(name)
        return "\n".join(
            f"{number(values[r.seed], 4)}  {where} in {Path(r.folder).name}/result.json, commit {commit(r)[:9]}"
            for r in self.finished
            if r.seed in values
        )


@dataclass(frozen=True)
class Line:
    """What methods are read against: a group, or chance where there is none, or, if `missing`, why it is not there."""

    label: str
    group: Group | None = None
    missing: str = ""

    @property
    def title(self) -> str:
        """The label, or the name of a group of another name or of a single run."""
        if self.group is None:
            return self.label
        if self.group.name in CONTROLS:
            return self.group.remark
        return self.group.name if self.group.of else self.group.titled


def controls_elsewhere(name: str, groups: Sequence[Group]) -> tuple[Group, ...]:
    """Controls that these groups of sweep `name` lack, finished in another sweep, alike but for their attention."""
    worlds = [_world(result.config) for group in groups for result in group.finished]
    lacking = {*CONTROLS.values()} - {group.control for group in groups}
    if not lacking or any(world != worlds[0] for world in worlds):
        return ()
    found: dict[str, Group] = {}
    for path in sorted(home().glob("*/sweep.json")):
        other = path.parent.name
        asked = asked_before(other) if other != name else None
        runs: dict[str, list[Result]] = {}
        for cell in asked.cells if asked else ():
            if _world(cell.config) == worlds[0] and (result := read(cell, other)).status == "finished":
                runs.setdefault(cell.group or cell.name, []).append(result)
        for key, results in runs.items():
            group = Group(key, tuple(results), sweep=other)
            if group.control in lacking:
                found.setdefault(str(group.control), group)
    return tuple(found.values())


def _world(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is apart from its attention and seed."""
    config = identity(config)
    data = {key: value for key, value in config.get("data", {}).items() if key != "seed"}
    return {key: value for key, value in config.items() if key not in ("attention", "match", "seed")} | {"data": data}


def commit(result: Result) -> str:
    return str(result.provenance.get("commit", "unknown")) + ("+" if result.provenance.get("changed since") else "")
