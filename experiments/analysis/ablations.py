"""What each setting does: the settings that differ between cells, and the mean of a measure at each value of one.

Settings inside a method are nested in it: `top_k` of one method is another setting than `top_k` of the next. One that
a cell leaves out has its method's default, where that method is registered. What one budget was solved to in all cells
of a method is no setting: these cells compare at equal cost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import sparse_zoo as zoo
from experiments.analysis.metrics import Measure
from experiments.analysis.significance import Figure
from experiments.tracking.identity import flatten

METHOD = "attention"
NO_SETTINGS = ("seed", "match", METHOD)  # runs are paired by the first; what the second was solved to is in the third


@dataclass(frozen=True)
class Cells:
    """Runs that differ by their seed alone: their config and, by seed, what was measured."""

    name: str
    config: Mapping[str, Any]
    values: Mapping[int, float]


@dataclass(frozen=True)
class Level:
    """One value of a setting (of several, where they always change together), the cells that have it, their runs."""

    value: tuple[Any, ...]
    figure: Figure
    cells: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Effect:
    """The mean of a measure at each value of a setting, over all else that is found with every one of its values.

    `keys` are the dotted settings, more than one where they always change together. `crossed` of `combinations` of the
    other settings have every value, and only those count. Where there are none `crossed` is 0: all cells count, and
    other settings differ between the values too.
    """

    keys: tuple[str, ...]
    levels: tuple[Level, ...]
    crossed: int
    combinations: int

    @property
    def name(self) -> str:
        """`moc: top_k`, `data.frames_per_shot`, `method`; several that always change together are joined."""
        first, *others = map(_readable, self.keys)
        method = first.partition(": ")[0] + ": "
        return ", ".join([first, *(other.removeprefix(method) for other in others)])


def effects(cells: Sequence[Cells], measure: Measure) -> list[Effect]:
    """Of every setting with at least two values among these cells, all of which were measured."""
    nodes: dict[str, list[Mapping[str, Any]]] = {}  # the configs of each method
    for cell in cells:
        if not isinstance(cell.config[METHOD], list):
            nodes.setdefault(cell.config[METHOD]["name"], []).append(cell.config)
    methods = {name: _method(name, alike) for name, alike in nodes.items()}
    settings = {cell.name: _settings(cell.config, methods) for cell in cells}
    axes = _axes(settings)
    found = [_effect(keys, axes, cells, settings, measure) for keys in axes]
    return [effect for effect in found if len(effect.levels) > 1]


def _method(name: str, alike: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """The settings of a method that any of its configs gives, without those that were solved, and its defaults."""
    hidden = {"name", *_solved(alike)}
    given = dict.fromkeys(key for config in alike for key in config[METHOD] if key not in hidden)
    defaults = {key: one.default for key, one in zoo.settings(name).items()} if name in zoo.names() else {}
    return [*given], defaults


def _settings(config: Mapping[str, Any], methods: Mapping[str, tuple[list[str], dict[str, Any]]]) -> dict[str, str]:
    """Dotted key -> value as JSON, without the seed; settings of a method as `attention.METHOD.key`."""
    asked = flatten({key: value for key, value in config.items() if key not in NO_SETTINGS})
    plain = {key: _json(value) for key, value in asked.items() if value != {}}
    attention = config[METHOD]
    if isinstance(attention, list):
        return plain | {METHOD: _json(attention)}
    name = attention["name"]
    given, defaults = methods[name]
    own = {key: attention.get(key, defaults.get(key)) for key in given if key in attention or key in defaults}
    return plain | {METHOD: _json(name)} | {f"{METHOD}.{name}.{key}": _json(value) for key, value in own.items()}


def _solved(alike: Sequence[Mapping[str, Any]]) -> set[str]:
    """The settings of a method that one and the same budget was solved to in all of its cells."""
    budgets = [config.get("match") or {} for config in alike]
    asked = {_json({key: value for key, value in budget.items() if key not in ("set", "also")}) for budget in budgets}
    solved = [set(own) if isinstance(own := budget.get("set"), Mapping) else set[str]() for budget in budgets]
    return set.intersection(*solved) if len(asked) == 1 else set()


def _readable(key: str) -> str:
    method, _, own = key.removeprefix(f"{METHOD}.").partition(".")
    return "method" if key == METHOD else f"{method}: {own}" if key.startswith(f"{METHOD}.") else key


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _axes(settings: Mapping[str, Mapping[str, str]]) -> list[tuple[str, ...]]:
    """The keys that differ; those that split the cells in the same way are one axis."""
    by_split: dict[tuple[int | None, ...], list[str]] = {}
    for key in dict.fromkeys(key for one in settings.values() for key in one):
        values = [one.get(key) for one in settings.values()]
        distinct = list(dict.fromkeys(value for value in values if value is not None))
        if len(distinct) > 1:
            split = tuple(None if value is None else distinct.index(value) for value in values)
            by_split.setdefault(split, []).append(key)
    return [tuple(keys) for keys in by_split.values()]


def _effect(
    keys: tuple[str, ...],
    axes: Sequence[tuple[str, ...]],
    cells: Sequence[Cells],
    settings: Mapping[str, Mapping[str, str]],
    measure: Measure,
) -> Effect:
    # What is nested in a method cannot stay the same when the method changes: its variants are averaged.
    inside = f"{METHOD}." if METHOD in keys else None
    others = [axis[0] for axis in axes if axis != keys and not (inside and axis[0].startswith(inside))]
    levels: dict[tuple[str, ...], dict[tuple[str | None, ...], list[Cells]]] = {}
    for cell in cells:
        own = settings[cell.name]
        if keys[0] in own:
            else_ = tuple(own.get(key) for key in others)
            levels.setdefault(tuple(own[key] for key in keys), {}).setdefault(else_, []).append(cell)
    combinations = set().union(*levels.values())
    crossed = combinations.intersection(*levels.values())
    made = []
    counted = crossed or combinations
    for value, by_rest in levels.items():
        used = [by_rest[rest] for rest in by_rest if rest in counted]
        of_all = [cell for group in used for cell in group]
        seeds = sorted(set.intersection(*(set(cell.values) for cell in of_all)))
        # Each combination counts alike, however many variants of a method it has.
        means = [float(np.mean([np.mean([cell.values[seed] for cell in group]) for group in used])) for seed in seeds]
        figure = Figure.of(means, measure.bounds)
        if figure is not None:
            runs = tuple(run for cell in of_all for run in cell.values.values())
            made.append(Level(tuple(map(json.loads, value)), figure, tuple(cell.name for cell in of_all), runs))
    if all(isinstance(part, int | float) for level in made for part in level.value):
        made.sort(key=lambda level: level.value)
    return Effect(keys, tuple(made), len(crossed), len(combinations))
