"""A sweep: a YAML file becomes cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import sparse_zoo as zoo
from experiments.config import Override, fits, load, read_yaml
from experiments.store import Cell
from sparse_zoo.errors import ZooError, refuse, unknown

SWEEPS = Path(__file__).parent / "sweeps"
KINDS: dict[str, type] = {
    "name": str,
    "about": str,
    "extends": str,
    "plugins": list,
    "seeds": int,
    "base": dict,
    "sizes": dict,
    "axes": dict,
    "cells": dict,
}
NAMES = {str: "text", list: "list", int: "whole number", dict: "mapping"}


@dataclass(frozen=True)
class Sweep:
    """A name, one line about it, and its cells."""

    name: str
    about: str
    cells: tuple[Cell, ...]


def find(name: str) -> Path:
    """A sweep file by its path, or by its name among those that come along; raises `ZooError`."""
    for path in (Path(name), SWEEPS / f"{name}.yaml"):
        if path.is_file():
            return path
    raise ZooError(f"sweep: {unknown('file or sweep', name, (path.stem for path in SWEEPS.glob('*.yaml')))}")


def read(path: Path, overrides: Sequence[Override] = (), size: str | None = None) -> Sweep:
    """The sweep in a file, every cell resolved, checked and its method built; raises `ZooError` with all reasons.

    The file's keys:

    - `name` (by default the file's) and `about`, one line.
    - `base`: overrides of every cell.
    - `axes`: a mapping of dotted key -> values, whose product makes cells. The values are a list, or a mapping of
      label -> value where the values themselves are too long for a name.
    - `cells`: a mapping of cell name -> overrides, for single cells besides.
    - `seeds`: how many runs of each cell, with seeds 0, 1, ...; their names end in -s0, -s1, ...
    - `sizes`: a mapping of size -> overrides, of which `size` lays one between `base` and the cells. The sweep of a
      size is another one, named NAME-SIZE.
    - `plugins`: files of methods, beside this file.
    - `extends`: a sweep file beside this one, of which all but the cells holds here too: its `seeds`, `plugins` and
      `about` where this one has none, its `base` and `sizes` below this one's.

    `overrides` go on top of all.
    """
    own = _file(path)
    files = [_file(path.parent / own["extends"]), own] if "extends" in own else [own]
    merged = {key: value for file in files for key, value in file.items()}
    name, seeds = own.get("name", path.stem), merged.get("seeds")
    axes, singles = own.get("axes", {}), own.get("cells", {})
    sizes = {key for file in files for key in file.get("sizes", {})}
    refuse(str(path), [unknown("size", size, sizes)] if size is not None and size not in sizes else [])
    for plugin in merged.get("plugins", []):
        zoo.load_plugin(path.parent / plugin)
    below = [file.get("base", {}) for file in files] + [file.get("sizes", {}).get(size, {}) for file in files]
    labelled = [*_grid(axes), *((str(label), of) for label, of in singles.items())] or [(name, {})]
    wanted: list[tuple[str, str | None, dict[str, Any]]] = [(label, None, of) for label, of in labelled]
    if seeds is not None:
        wanted = [(f"{label}-s{n}", label, {**of, "seed": n}) for label, of in labelled for n in range(seeds)]
    reasons, cells = [], []
    for label, group, settings in wanted:
        try:
            cells.append(Cell(label, load([*below, settings, *overrides]), group))
        except ZooError as error:
            reasons.append(f"cell {label}: {error}")
    labels = [label for label, _, _ in wanted]
    reasons += [f"two cells are named {label!r}" for label in dict.fromkeys(labels) if labels.count(label) > 1]
    by_id: dict[str, str] = {}
    for cell in cells:
        if by_id.setdefault(cell.id, cell.name) != cell.name:
            reasons.append(f"cells {by_id[cell.id]!r} and {cell.name!r} are the same config")
    refuse(f"sweep {name}", reasons)
    return Sweep(name if size is None else f"{name}-{size}", merged.get("about", ""), tuple(cells))


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
        + ([f"seeds must be at least 1, got {plain['seeds']}"] if plain.get("seeds", 1) < 1 else []),
    )
    return plain


def _grid(axes: Mapping[str, list[Any] | dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The product of the axes: (name, overrides) each."""
    if not axes:
        return []
    labelled = [
        [(str(label), {key: value}) for label, value in values.items()]
        if isinstance(values, dict)
        else [(_label(key, value), {key: value}) for value in values]
        for key, values in axes.items()
    ]
    return [
        ("-".join(label for label, _ in choice), {key: value for _, own in choice for key, value in own.items()})
        for choice in product(*labelled)
    ]


def _label(key: str, value: Any) -> str:
    """Short and fit for a file name: moc, moc_top_k=2_anchors=text+shot, seed=1."""
    if isinstance(value, dict):
        named = str(value.get("name", key.rpartition(".")[2]))
        text = "_".join([named, *(f"{k}={_short(v)}" for k, v in value.items() if k != "name")])
    else:
        text = value if isinstance(value, str) else f"{key.rpartition('.')[2]}={_short(value)}"
    return "".join(letter if letter.isalnum() or letter in "._+=" else "_" for letter in text)


def _short(value: Any) -> str:
    return ("+".join(map(_short, value)) or "none") if isinstance(value, list) else str(value)
