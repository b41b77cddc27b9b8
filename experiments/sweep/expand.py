"""A sweep: a YAML file becomes cells."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sparse_zoo as zoo
from experiments.config.names import Override
from experiments.config.resolve import Config, check, known, merge
from experiments.config.resolve import cell as make_cell
from experiments.sweep.budget import Unreached, shared_reach, solved, with_settings
from experiments.sweep.grid import Choice, matches
from experiments.sweep.preflight import error_reason, first_of_groups
from experiments.sweep.schema import SWEEPS, Written, find
from experiments.tracking.store import Cell, last_request
from sparse_zoo.errors import ZooError, refuse, unknown_setting

__all__ = ["SWEEPS", "Sweep", "find", "read"]

LONGEST = 200  # bytes of a name: file systems take 255, of which an id and suffixes have their share


@dataclass(frozen=True)
class Sweep:
    """A name, one line about it, and its cells."""

    name: str
    about: str
    cells: tuple[Cell, ...]


def read(
    path: Path,
    overrides: Sequence[Override] = (),
    size: str | None = None,
    told: Callable[[str], object] = lambda _: None,
) -> Sweep:
    """The sweep in a file, every cell resolved, checked and its budget solved; raises `ZooError` with all reasons.

    The file's keys:

    - `name` (by default the file's) and `about`, one line.
    - `base`: overrides of every cell.
    - `axes`: a mapping of dotted key -> values, whose product makes cells. The values are a list, or a mapping of
      label -> value where the values themselves are too long for a name.
    - `zip`: a mapping of dotted key -> list, walked in step, or a list of such mappings; each multiplies with the axes.
    - `exclude`: a mapping of dotted key -> value or list of values, or a list of such mappings: cells whose resolved
      settings match all of one are left out.
    - `cells`: a mapping of cell name -> overrides, for single cells besides.
    - `seeds`: how many runs of each cell, with seeds 0, 1, ...; their names end in -s0, -s1, ...
    - `match`: what every cell is to cost, see `sweep.budget`; null in a cell's own overrides leaves it as it is.
      Solved for the first seed, and for all alike.
    - `sizes`: a mapping of size -> overrides, of which `size` lays one between `base` and the cells. The sweep of a
      size is another one, named NAME-SIZE.
    - `plugins`: files of methods, beside this file.
    - `extends`: a sweep file beside this one, or one that comes along by its name, of which all but the cells holds
      here too: its `seeds`, `plugins` and `about` where this one has none, its `base`, `match` and `sizes` below this
      one's.

    `overrides` go on top of all. `told` hears the name of each cell whose budget is solved.
    """
    written = Written.of(path, size)
    name, rules = written.name, written.rules
    for plugin in written.plugins:
        zoo.load_plugin(plugin)
    drafts = _drafts(written.choices, written.seeds)
    reasons = _resolve(drafts, written.below, overrides, written.keys)
    idle = [rule for rule in rules if not any(matches(draft.config, rule) for draft in drafts)]
    reasons += [f"exclude {rule} leaves out no cell" for rule in idle]
    drafts = [draft for draft in drafts if not any(matches(draft.config, rule) for rule in rules)]
    reasons += [] if drafts else ["exclude leaves out every cell"]
    reasons += _wrong(drafts)
    labels = [draft.name for draft in drafts]
    reasons += _unfit("sweep", name)
    reasons += [reason for label in dict.fromkeys(labels) if label != name for reason in _unfit("cell", label)]
    reasons += [f"two cells are named {label!r}" for label, count in Counter(labels).items() if count > 1]
    refuse(f"sweep {name}", reasons)

    cells = _matched([make_cell(draft.name, draft.config, draft.group) for draft in drafts], name, told)
    by_id: dict[str, str] = {}
    for cell in cells:
        if by_id.setdefault(cell.id, cell.name) != cell.name:
            reasons.append(f"cells {by_id[cell.id]!r} and {cell.name!r} are the same config")
    refuse(f"sweep {name}", reasons)
    return Sweep(name, written.about, tuple(cells))


@dataclass
class _Draft:
    """A cell before it is checked: its overrides; then its config, and why some of them could not be laid over it."""

    name: str
    group: str | None
    own: dict[str, Any]
    config: Config = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def _drafts(choices: Sequence[Choice], seeds: int | None) -> list[_Draft]:
    if seeds is None:
        return [_Draft(label, None, own) for label, own in choices]
    return [_Draft(f"{label}-s{n}", label, own | {"seed": n}) for label, own in choices for n in range(seeds)]


def _resolve(
    drafts: Sequence[_Draft], below: Sequence[Override], overrides: Sequence[Override], keys: Mapping[str, set[str]]
) -> list[str]:
    """Give every draft its config. Of `keys`, by kind, those that no config knows are told once, and then left out."""

    def lay(without: Iterable[str]) -> None:
        for draft in drafts:
            own = {key: value for key, value in draft.own.items() if key not in without}
            try:
                draft.config, draft.wrong = merge([*below, own, *overrides])
            except ZooError as error:
                draft.wrong = [str(error)]

    lay(without=())
    # What a config knows follows from its classes alone.
    kinds = {
        repr([_names(draft.config[key]) for key in ("attention", "data")]): draft.config
        for draft in drafts
        if draft.config
    }
    names = set().union(*map(known, kinds.values()))
    strange = {key: kind for kind, own in keys.items() for key in sorted(own) if not names & {key, _two_deep(key)}}
    if strange and names:
        lay(without=strange)
    return [unknown_setting(key, _like(key, names), kind) for key, kind in strange.items() if names]


def _unfit(kind: str, name: str) -> list[str]:
    """Why a name cannot be a folder's, nor stand in quotes where MLflow is asked for a run; nothing if it can."""
    apart = re.fullmatch(r"[^/\\'\"\x00-\x1f\ud800-\udfff]+", name) and name not in (".", "..")
    fit = apart and len(name.encode()) <= LONGEST
    limits = f"1 to {LONGEST} bytes, without slashes, quotes, line breaks and what is no text"
    return [] if fit else [f"a {kind}'s name is that of its folder: {limits}; got {name!r}"]


def _names(part: Any) -> Any:
    """The name of a method or of data; None of a list for the layers."""
    return part.get("name") if isinstance(part, Mapping) else None


def _two_deep(key: str) -> str:
    return ".".join(key.split(".")[:2])


def _like(key: str, names: set[str]) -> list[str]:
    """The names among which one may have meant a key: of its section, or of its last part in others."""
    section, _, last = key.rpartition(".")
    inside = [name for name in names if name.startswith(f"{section}.")] if section else []
    elsewhere = [name for name in names if name.endswith(f".{last}")]
    return inside or elsewhere or [name for name in names if "." not in name]


def _wrong(drafts: Sequence[_Draft]) -> list[str]:
    """Why cells cannot run, of those that differ by their seed alone the first; what all have in common once."""
    first: dict[str, _Draft] = {}
    for draft in drafts:
        first.setdefault(draft.group or draft.name, draft)
    found = {label: draft.wrong or check(draft.config) for label, draft in first.items()}
    common = [reason for reason in next(iter(found.values()), []) if all(reason in own for own in found.values())]
    if len(found) == 1:
        common = []
    own = ((label, reason) for label, reasons in found.items() for reason in reasons if reason not in common)
    return [f"every cell: {reason}" for reason in common] + [f"cell {label}: {reason}" for label, reason in own]


def _matched(cells: Sequence[Cell], sweep: str, told: Callable[[str], object]) -> list[Cell]:
    """The cells with their budgets solved, once for those that differ by their seed alone."""
    asked = last_request(sweep)
    earlier = [cell.config for cell in asked.cells] if asked else []
    found, reasons, unreached = {}, [], False
    for label, cell in first_of_groups(cells).items():
        if "match" not in cell.config:
            continue
        told(label)
        try:
            found[label] = solved(cell.config, earlier)["match"]["set"]
        except Exception as error:  # a plug-in may raise anything; the other cells' reasons are told beside
            reasons.append(f"cell {label}: {error_reason(error)}")
            unreached = unreached or isinstance(error, Unreached)
    if unreached:
        reasons += shared_reach(
            {x: cell.config for x, cell in first_of_groups(cells).items() if "match" in cell.config}
        )
    refuse(f"sweep {sweep}", reasons)
    groups = [cell.group or cell.name for cell in cells]
    return [
        make_cell(cell.name, with_settings(cell.config, found[group]), cell.group) if group in found else cell
        for cell, group in zip(cells, groups, strict=True)
    ]
