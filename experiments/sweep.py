"""A sweep: a YAML file becomes cells; cells that have not finished are run; all of them are remembered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import sparse_zoo as zoo
from experiments.config import Override, load, read_yaml
from experiments.progress import Bar
from experiments.run import run
from experiments.store import Asked, Cell, Result, home, read_sweep, write_sweep
from experiments.store import read as read_result
from experiments.tracking import Tracker
from sparse_zoo.attention import is_count
from sparse_zoo.errors import ZooError, refuse, unknown

SWEEPS = Path(__file__).parent / "sweeps"
KEYS = ("name", "about", "plugins", "seeds", "base", "sizes", "axes", "cells")


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

    The file's keys: `name`; `about`, one line; `plugins`, files of methods, beside the sweep's file; `base`, overrides
    of every cell; `axes`, a mapping of dotted key -> values, whose product makes cells; `cells`, a mapping of cell
    name -> overrides, for single cells besides; `seeds`, how many runs of each cell, with seeds 0, 1, ... and names that
    end in -s0, -s1, ...; `sizes`, a mapping of size -> overrides, of which `size` lays one between base and cells. A
    sweep of another size has a name of its own, NAME-SIZE. The values of an axis are a list, or a mapping of label ->
    value where the values themselves are too long for a name. `overrides` go on top of all.
    """
    plain = read_yaml(path)
    name, seeds, plugins = plain.get("name", path.stem), plain.get("seeds"), plain.get("plugins", [])
    base, sizes, axes, singles = (plain.get(key, {}) for key in ("base", "sizes", "axes", "cells"))
    refuse(
        str(path),
        [unknown("key", key, KEYS) for key in plain if key not in KEYS]
        + [
            f"{key} must be a mapping, got {value!r}"
            for key, value in (("base", base), ("sizes", sizes), ("axes", axes), ("cells", singles))
            if not isinstance(value, dict)
        ]
        + [
            f"plugins must be a list of files, got {plugins!r}" if not isinstance(plugins, list) else "",
            f"seeds must be a whole number of at least 1, got {seeds!r}"
            if seeds is not None and not is_count(seeds)
            else "",
        ],
    )
    refuse(
        str(path),
        [
            f"axis {key!r} must be a list or a mapping of values, and not empty, got {values!r}"
            for key, values in axes.items()
            if not isinstance(values, list | dict) or not values
        ]
        + [
            f"{kind} {key!r} must be a mapping of overrides, got {value!r}"
            for kind, mapping in (("cell", singles), ("size", sizes))
            for key, value in mapping.items()
            if not isinstance(value, dict)
        ]
        + ([unknown("size", size, sizes)] if size is not None and size not in sizes else []),
    )
    for plugin in plugins:
        zoo.load_plugin(path.parent / str(plugin))
    sized = {} if size is None else sizes[size]
    labelled = [*_grid(axes), *((str(label), value) for label, value in singles.items())] or [(str(name), {})]
    wanted = [(label, None, own) for label, own in labelled]
    if seeds is not None:
        wanted = [(f"{label}-s{n}", label, {**own, "seed": n}) for label, own in labelled for n in range(seeds)]
    reasons, cells = [], []
    for label, group, own in wanted:
        try:
            cells.append(Cell(label, load([base, sized, own, *overrides]), group))
        except ZooError as error:
            reasons.append(f"cell {label}: {error}")
    labels = [label for label, _, _ in wanted]
    reasons += [f"two cells are named {label!r}" for label in dict.fromkeys(labels) if labels.count(label) > 1]
    by_id: dict[str, str] = {}
    for cell in cells:
        if by_id.setdefault(cell.id, cell.name) != cell.name:
            reasons.append(f"cells {by_id[cell.id]!r} and {cell.name!r} are the same config")
    refuse(f"sweep {name}", reasons)
    return Sweep(str(name) if size is None else f"{name}-{size}", str(plain.get("about", "")), tuple(cells))


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


def execute(sweep: Sweep, bar: Bar, *, fresh: bool = False) -> list[Result]:
    """Run, one after the other, the cells that have no finished result on disk, or with `fresh` all of them.

    A cell that fails is recorded and the next one runs; a failed cell is tried again the next time. Ctrl-C passes on as
    KeyboardInterrupt, with every finished cell kept.
    """
    found = {cell.name: read_result(cell, sweep.name) for cell in sweep.cells}
    todo = [cell for cell in sweep.cells if fresh or found[cell.name].status != "finished"]
    bar.kept(len(sweep.cells) - len(todo))
    if not todo:
        return list(found.values())
    tracker = Tracker(sweep.name)
    asked = Asked(sweep.about, sweep.cells, _parent_before(sweep.name))
    parent = tracker.parent(sweep.name, asked.mlflow_run)
    write_sweep(sweep.name, replace(asked, mlflow_run=parent))
    ended = "KILLED"
    try:
        for cell in todo:
            found[cell.name] = run(cell, sweep.name, tracker, bar, parent=parent)
        ended = "FINISHED" if all(result.status == "finished" for result in found.values()) else "FAILED"
    finally:
        tracker.end(parent, ended)
    return list(found.values())


def _parent_before(name: str) -> str | None:
    return read_sweep(name).mlflow_run if (home() / name / "sweep.json").exists() else None
