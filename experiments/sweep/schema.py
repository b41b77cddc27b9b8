"""A sweep file as it was written: found, read, its keys of the kinds that they must have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from experiments.config.declared import fits
from experiments.config.names import Override, misspelt_in_cells
from experiments.config.yaml12 import read_yaml
from experiments.sweep.grid import Choice, grid
from sparse_zoo.errors import ZooError, refuse, unknown

SWEEPS = Path(__file__).parents[1] / "sweeps"
KINDS: dict[str, Any] = {
    "name": str,
    "about": str,
    "extends": str,
    "plugins": list[str],
    "seeds": int,
    "base": dict,
    "sizes": dict,
    "match": dict | None,
    "axes": dict,
    "zip": dict | list,
    "exclude": dict | list,
    "cells": dict,
}
OWN = ("name", "axes", "zip", "exclude", "cells")  # what does not hold in files that extend this one
NAMES = {
    str: "text",
    list[str]: "list of files",
    int: "whole number",
    dict: "mapping",
    dict | None: "mapping or null",
    dict | list: "mapping or a list of them",
}


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
    kind, the dotted keys that are varied or excluded. rules: which cells are left out.
    """

    name: str
    about: str
    below: tuple[Override, ...]
    choices: tuple[Choice, ...]
    keys: Mapping[str, set[str]]
    rules: tuple[Mapping[str, Any], ...]
    seeds: int | None
    plugins: tuple[Path, ...]

    @staticmethod
    def of(path: Path, size: str | None = None) -> Written:
        """The sweep in a file, with the overrides of a size; raises `ZooError`."""
        files = extends_chain(path)
        file = {key: value for each in files for key, value in each.items() if each is files[-1] or key not in OWN}
        sizes = {key for each in files for key in each.get("sizes", {})}
        refuse(str(path), [unknown("size", size, sizes)] if size is not None and size not in sizes else [])
        below: list[Override] = [each.get("base", {}) for each in files]
        below += [{"match": each["match"]} for each in files if "match" in each]
        below += [each.get("sizes", {}).get(size, {}) for each in files]
        name = file.get("name", path.stem)
        axes, zips, rules = file.get("axes", {}), mappings(file, "zip"), mappings(file, "exclude")
        choices = grid(axes, zips) + list(file.get("cells", {}).items()) or [(name, {})]
        return Written(
            name if size is None else f"{name}-{size}",
            file.get("about", ""),
            tuple(below),
            tuple(choices),
            {"axis": {*axes, *chain(*zips)}, "key of exclude": {*chain(*rules)}},
            tuple(rules),
            file.get("seeds"),
            tuple(file.get("plugins", ())),
        )

    def check_names(self, overrides: Sequence[Override] = (), *, plugins: bool = False) -> None:
        """Refuse misspelt names, which takes no torch; raises `ZooError`.

        Where `exclude` may leave out a cell, what is wrong in that cell alone is left to the resolved configs.
        """
        cells = {name: [*self.below, own, *overrides] for name, own in self.choices}
        plugins = plugins or bool(self.plugins)
        refuse(f"sweep {self.name}", misspelt_in_cells(cells, plugins=plugins, all_run=not self.rules))


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


def mappings(file: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Of a key that holds a mapping or a list of them, the list."""
    given = file.get(key, [])
    return [given] if isinstance(given, dict) else list(given)


def _file(path: Path) -> dict[str, Any]:
    """One sweep file, its keys known and of their kinds."""
    plain = read_yaml(path)
    refuse(
        str(path),
        [unknown("key", key, KINDS) for key in plain if key not in KINDS]
        + [
            f"{key} must be a {NAMES[kind]}, got {plain[key]!r}"
            for key, kind in KINDS.items()
            if key in plain and not fits(plain[key], kind)
        ],
    )
    zips = mappings(plain, "zip")
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
            for entry in mappings(plain, kind)
            if not isinstance(entry, dict) or not entry
        ]
        + [reason for lists in zips if isinstance(lists, dict) for reason in _out_of_step(lists)]
        + [f"{key} is varied twice" for key in _twice([*plain.get("axes", {}), *chain(*zips)])]
        + ([f"seeds must be at least 1, got {plain['seeds']}"] if plain.get("seeds", 1) < 1 else []),
    )
    return plain


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
