"""A sweep file as it was written: found, read, its keys of the kinds that they must have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, product, starmap
from pathlib import Path
from typing import Any, get_type_hints

from experiments.analysis.metrics import Measure
from experiments.config.declared import fits
from experiments.config.names import Override, misspelt_in_cells, parse
from experiments.config.yaml12 import read_yaml
from experiments.sweep.grid import Choice, axis, grid
from experiments.tracking.identity import flatten
from sparse_zoo.errors import ZooError, refuse, unknown

SWEEPS = Path(__file__).parents[1] / "sweeps"
REPLACED = ("attention", "data", "match")  # what an override of the whole section takes the settings of away
SHOWN = 5  # cells that a message names
OWN = ("name", "axes", "zip", "exclude", "cells", "tune")  # what does not hold in files that extend this one
WANTED = {  # how the type of a key reads
    str: "text",
    list[str]: "a list of files",
    int: "a whole number",
    list[int]: "a list of whole numbers",
    int | None: "a whole number or null",
    int | list[int] | None: "a whole number, a list of whole numbers or null",
    str | None: "text or null",
    dict[str, Any]: "a mapping",
    dict[str, Any] | None: "a mapping or null",
    dict[str, Any] | list[Any]: "a mapping or a list of them",
}


@dataclass(frozen=True)
class Tune:
    """The `tune` section of a sweep file: each cell is tried with equally many settings, and its runs have the best.

    The trials of a cell are the cell as written, then the defaults of its method, then the combinations of the listed
    values, those first that take early values. docs/sweeps.md explains it with examples.
    """

    trials: int
    """How many settings are tried for each cell; the cell as written is one of them."""
    seeds: list[int]
    """Seeds that each setting is tried with; none of them may be a seed of the cell's own runs."""
    by: str | None = None
    """The measure that chooses; null: identity_recall where it was measured, else val_loss."""
    max_steps: int | None = None
    """Training steps of a trial; null: as many as the cell's own runs have."""
    cells: dict[str, Any] = field(default_factory=dict)
    """What is tried in single cells: name of the cell -> {dotted key: values}; elsewhere the method's knob is."""
    shared: dict[str, Any] | None = None
    """What is tried in every cell, {dotted key: values}; null: the learning rate."""


@dataclass(frozen=True)
class SweepFile:
    """The keys of a sweep file; docs/sweeps.md explains them with examples."""

    name: str = ""
    """Name of the sweep and of its results' folder; by default the file's name."""
    about: str = ""
    """One line on what the sweep tests, shown above its report."""
    extends: str = ""
    """A sweep file below this one: its path from this file, or the name of one in experiments/sweeps."""
    plugins: list[str] = field(default_factory=list)
    """Python files with methods or data of your own, by their paths from this file."""
    base: dict[str, Any] = field(default_factory=dict)
    """Settings of every cell; keys may be dotted."""
    sizes: dict[str, Any] = field(default_factory=dict)
    """Named settings laid over `base` by `zoo sweep --size NAME`."""
    match: dict[str, Any] | None = None
    """The cost that each cell's method is solved for, such as {density: 0.16}; null for none."""
    axes: dict[str, Any] = field(default_factory=dict)
    """Settings that are varied: a list of values each, or a mapping from label to value; all combinations run."""
    zip: dict[str, Any] | list[Any] = field(default_factory=list)
    """Settings that are varied in step: lists of one length; a list of such mappings multiplies them."""
    exclude: dict[str, Any] | list[Any] = field(default_factory=list)
    """Settings of the cells to leave out; in a list of such mappings each leaves out its own."""
    cells: dict[str, Any] = field(default_factory=dict)
    """Further cells by name, each a mapping of settings."""
    seeds: int | list[int] | None = None
    """How many runs each cell has, with seeds 0, 1, ..., or a list of their seeds; null: one run, with its own seed."""
    tune: dict[str, Any] | None = None
    """How settings are tried before the runs, such as {trials: 6, seeds: [100]}, see `Tune`; null: they are not."""


def find(name: str) -> Path:
    """A sweep file by its path, or by its name among those that come along; raises `ZooError`."""
    for path in (Path(name), SWEEPS / f"{name}.yaml"):
        if path.is_file():
            return path
    raise ZooError(f"sweep: {unknown('file or sweep', name, (path.stem for path in SWEEPS.glob('*.yaml')))}")


def find_sized(name: str, size: str | None = None) -> tuple[Path, str | None]:
    """The file and the size of a sweep: NAME-SIZE, as its report is named, is the preset NAME with that size."""
    stem, _, named = name.rpartition("-")
    preset = SWEEPS / f"{stem}.yaml"
    if size is None and preset.is_file() and not Path(name).is_file() and not (SWEEPS / f"{name}.yaml").is_file():
        return preset, named
    return find(name), size


@dataclass(frozen=True)
class Written:
    """A sweep as its file and those that it extends say it, before any cell is resolved.

    below: overrides of every cell, the lowest first. choices: each cell's name and own overrides, seeds apart. keys: by
    kind, the dotted keys that are varied or excluded. rules: which cells are left out. tune: how settings are tried.
    """

    name: str
    about: str
    below: tuple[Override, ...]
    choices: tuple[Choice, ...]
    keys: Mapping[str, set[str]]
    rules: tuple[Mapping[str, Any], ...]
    seeds: tuple[int, ...] | None
    plugins: tuple[Path, ...]
    tune: Tune | None = None

    @staticmethod
    def of(path: Path, size: str | None = None) -> Written:
        """The sweep in a file, with the overrides of a size; raises `ZooError`."""
        files = extends_chain(path)
        file = SweepFile(**{k: v for each in files for k, v in each.items() if each is files[-1] or k not in OWN})
        sizes = {key for each in files for key in each.get("sizes", {})}
        refuse(str(path), [unknown("size", size, sizes)] if size is not None and size not in sizes else [])
        below: list[Override] = [each.get("base", {}) for each in files]
        below += [{"match": each["match"]} for each in files if "match" in each]
        below += [each.get("sizes", {}).get(size, {}) for each in files]
        name = file.name if "name" in files[-1] else path.stem
        axes, zips, rules = file.axes, mappings(file.zip), mappings(file.exclude)
        choices = grid(axes, zips) + list(file.cells.items()) or [(name, {})]
        tune = None if file.tune is None else Tune(**file.tune)
        refuse(str(path), _unknown_cells(tune, [label for label, _ in choices]))
        return Written(
            name if size is None else f"{name}-{size}",
            file.about,
            tuple(below),
            tuple(choices),
            {"axis": {*axes, *chain(*zips)}, "key of exclude": {*chain(*rules)}},
            tuple(rules),
            tuple(range(file.seeds) if isinstance(file.seeds, int) else file.seeds) if file.seeds is not None else None,
            tuple(map(Path, file.plugins)),
            tune,
        )

    def check_names(self, overrides: Sequence[Override] = (), *, plugins: bool = False) -> None:
        """Refuse misspelt names, and overrides of what a cell sets itself, which takes no torch; raises `ZooError`.

        Where `exclude` may leave out a cell, what is wrong in that cell alone is left to the resolved configs.
        """
        cells = {name: [*self.below, own, *overrides] for name, own in self.choices}
        for name, own in self.choices if self.tune else ():
            for key, values in self.tried_in(name).items():
                for label, value in axis(key, values):
                    cells[f"{name}, tried with {label}"] = [*self.below, own, value, *overrides]
        plugins = plugins or bool(self.plugins)
        reasons = misspelt_in_cells(cells, plugins=plugins, all_run=not self.rules)
        refuse(f"sweep {self.name}", reasons + self._twice_set(overrides))

    def tried_in(self, cell: str) -> dict[str, Any]:
        """What the file lists to be tried in a cell, {dotted key: values}: its own, then what is shared."""
        return {} if self.tune is None else self.tune.cells.get(cell, {}) | (self.tune.shared or {})

    def _twice_set(self, overrides: Sequence[Override]) -> list[str]:
        """Why overrides cannot hold in every cell: what tells cells apart would be gone, and their names would lie."""
        reasons = []
        for text in (override for override in overrides if isinstance(override, str)):
            with suppress(ZooError):  # which is refused for what it is
                key, value = parse(text)
                given = [key] if key in REPLACED else [*flatten({key: value})]
                names = [name for name, own in self.choices if any(starmap(_meet, product(given, _keys(own))))]
                shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
                if names:
                    reasons.append(f"{text} is for every cell, but {shown} set that themselves; change it in the file")
                if "seed" in given and self.seeds is not None:
                    seeds = ", ".join(map(str, self.seeds))
                    reasons.append(f"{text} is for every cell, but they have the seeds {seeds}; leave it out")
        return reasons


def _keys(own: Mapping[str, Any]) -> list[str]:
    """The dotted keys that a cell sets; a method or data given by its name alone sets `name`."""
    named = {key: {"name": x} if key in REPLACED and isinstance(x, str) else x for key, x in own.items()}
    return [*flatten(named)]


def _meet(one: str, other: str) -> bool:
    """Whether one of two dotted keys is the other, or a section around it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def extends_chain(path: Path, above: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """A sweep file after those that it extends, the lowest first, their plug-ins as paths; raises `ZooError`."""
    refuse(str(path), ["extends itself"] if path.resolve() in above else [])
    own = _file(path)
    own |= {"plugins": [path.parent / plugin for plugin in own["plugins"]]} if "plugins" in own else {}
    if "extends" not in own:
        return [own]
    beside = path.parent / own["extends"]
    below = beside if beside.is_file() or beside.suffix else find(own["extends"])
    return [*extends_chain(below, (*above, path.resolve())), own]


def mappings(given: dict[str, Any] | list[Any]) -> list[dict[str, Any]]:
    """The list of mappings that one mapping, or a list of them, stands for."""
    return [given] if isinstance(given, dict) else list(given)


def _file(path: Path) -> dict[str, Any]:
    """One sweep file, its keys known and of their kinds."""
    plain = read_yaml(path)
    hints = get_type_hints(SweepFile)
    refuse(
        str(path),
        [unknown("key", key, hints) for key in plain if key not in hints]
        + [
            f"{key} must be {WANTED[hint]}, got {plain[key]!r}"
            for key, hint in hints.items()
            if key in plain and not fits(plain[key], hint)
        ],
    )
    zips = mappings(plain.get("zip", []))
    refuse(
        str(path),
        [
            f"axis {key!r} must be a list or a mapping of values, and not empty, got {values!r}"
            for key, values in plain.get("axes", {}).items()
            if not isinstance(values, list | dict) or not values
        ]
        + [
            f"{kind} {key!r} must be a mapping of overrides, got {value!r}"
            for kind in ("cell", "size")
            for key, value in plain.get(f"{kind}s", {}).items()
            if not isinstance(value, dict)
        ]
        + [
            f"{kind} must hold mappings that are not empty, got {entry!r}"
            for kind in ("zip", "exclude")
            for entry in mappings(plain.get(kind, []))
            if not isinstance(entry, dict) or not entry
        ]
        + [reason for lists in zips if isinstance(lists, dict) for reason in _out_of_step(lists)]
        + [f"{key} is varied twice" for key in _twice([*plain.get("axes", {}), *chain(*zips)])]
        + ([] if plain.get("seeds") is None else _seed_reasons("seeds", plain["seeds"])),
    )
    refuse(str(path), [] if plain.get("tune") is None else _tune_reasons(plain["tune"]))
    return plain


def _tune_reasons(given: Mapping[str, Any]) -> list[str]:
    """What is wrong with a `tune` section."""
    hints = get_type_hints(Tune)
    reasons = [unknown("key of tune", key, hints) for key in given if key not in hints]
    reasons += [f"tune.{key} is missing" for key in ("trials", "seeds") if key not in given]
    wrong = [
        f"tune.{key} must be {WANTED[hint]}, got {given[key]!r}"
        for key, hint in hints.items()
        if key in given and not fits(given[key], hint)
    ]
    if reasons + wrong:
        return reasons + wrong
    tune = Tune(**given)
    if tune.trials < 2:
        reasons.append(f"tune.trials must be at least 2, got {tune.trials}: with one setting there is none to choose")
    reasons += _seed_reasons("tune.seeds", tune.seeds)
    if tune.max_steps is not None and tune.max_steps < 1:
        reasons.append(f"tune.max_steps must be at least 1, got {tune.max_steps}")
    if tune.by is not None and Measure.of(tune.by).higher is None:
        reasons.append(f"tune.by {tune.by!r} cannot choose: it is not known whether more or less of it is better")
    listed = {f"tune.cells.{name}": own for name, own in tune.cells.items()}
    listed |= {} if tune.shared is None else {"tune.shared": tune.shared}
    for place, own in listed.items():
        if not isinstance(own, Mapping):
            reasons.append(f"{place} must be {{dotted key: values}}, got {own!r}")
            continue
        reasons += [
            f"{place}: {key!r} must be a list or a mapping of values, and not empty, got {values!r}"
            for key, values in own.items()
            if not isinstance(values, list | dict) or not values
        ]
        reasons += [f"{place}: seed is not tuned; leave it out" for key in own if key == "seed"]
    return reasons


def _seed_reasons(key: str, seeds: int | list[int]) -> list[str]:
    """Why a number of seeds, or a list of them, cannot be; nothing if it can."""
    if isinstance(seeds, int):
        return [] if seeds >= 1 else [f"{key} must be at least 1, got {seeds}"]
    distinct = seeds and min(seeds) >= 0 and len({*seeds}) == len(seeds)
    return [] if distinct else [f"{key} must be distinct whole numbers from 0, at least one, got {seeds}"]


def _unknown_cells(tune: Tune | None, names: Sequence[str]) -> list[str]:
    return [unknown("cell under tune.cells", name, names) for name in (tune.cells if tune else ()) if name not in names]


def _out_of_step(lists: Mapping[str, Any]) -> list[str]:
    """Why the lists of a zip cannot be walked in step."""
    bad = [f"zip {key!r} must be a list that is not empty, got {x!r}" for key, x in lists.items() if not _filled(x)]
    if bad or len({len(values) for values in lists.values()}) == 1:
        return bad
    lengths = ", ".join(f"{key} has {len(values)}" for key, values in lists.items())
    return [f"lists of a zip must be of one length: {lengths}"]


def _filled(values: Any) -> bool:
    return isinstance(values, list) and bool(values)


def _twice(keys: Sequence[str]) -> list[str]:
    return [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
