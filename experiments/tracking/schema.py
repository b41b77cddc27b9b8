"""The schema of the JSON files of runs and sweeps, and how to read them: a run folder of somebody else is data.

Files without a "version" are version 0, which has the same keys. What is wrong with a file is a `ValueError` whose
message is one line. Nothing here follows a path out of a folder or runs anything that a file holds.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, TypedDict, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

VERSION = 1
LARGEST = 1e100  # the square of a number that is used in statistics must be finite
LARGEST_INT = 2**63 - 1
SHOWN = 3  # problems of a file that its line tells

Scalar = str | int | float | bool | None


class Method(TypedDict):
    """A method with its settings."""

    name: str


class Match(TypedDict, total=False):
    """A budget."""

    density: float
    flops: float
    seconds: float
    set: dict[str, Any] | list[dict[str, Any]]


class Config(TypedDict, total=False):
    """What readers use of a resolved config."""

    attention: Method | list[Method]
    data: dict[str, Any]
    match: Match | None
    seed: int


class Picture(TypedDict):
    """A picture in the run's folder."""

    file: str
    label: str


class Skipped(TypedDict):
    """A film that was left out."""

    path: str
    reason: str


class Data(TypedDict, total=False):
    """What readers use of a datamodule's summary."""

    skipped: list[Skipped]


class ResultFile(TypedDict):
    """`result.json`: what became of one cell, see `experiments.tracking.store.Result`.

    null stands for a number that was not finite.
    """

    name: str
    attention: Method | list[Method]
    status: Literal["finished", "failed", "running", "missing", "unreadable"]
    seed: int
    first_loss: NotRequired[float | None]
    val_loss: NotRequired[float | None]
    density: NotRequired[float | None]
    flops: NotRequired[float | None]
    kernel: NotRequired[str | None]
    seconds_per_step: NotRequired[float | None]
    last_loss: NotRequired[float | None]
    reason: NotRequired[str | None]
    id: NotRequired[str]
    steps: NotRequired[int]
    seconds: NotRequired[float | None]
    peak_memory: NotRequired[int | None]
    costs: NotRequired[dict[str, Any]]
    metrics: NotRequired[dict[str, float | None]]
    diagnostics: NotRequired[dict[str, Any]]
    chance: NotRequired[dict[str, float | None]]
    films: NotRequired[dict[str, list[float | None]]]
    curves: NotRequired[dict[str, list[tuple[int, float | None]]]]
    pictures: NotRequired[list[Picture]]
    strips: NotRequired[list[str]]
    checkpoint: NotRequired[str | None]
    folder: NotRequired[str]
    mlflow_run: NotRequired[str | None]
    provenance: NotRequired[dict[str, Scalar]]
    resumed: NotRequired[list[dict[str, Any]]]
    data: NotRequired[Data]
    config: NotRequired[Config]
    traceback: NotRequired[str | None]


class CellConfig(TypedDict):
    """What readers use of the resolved config of a sweep's cell."""

    attention: Method | list[Method]
    seed: int
    data: NotRequired[dict[str, Any]]
    match: NotRequired[Match | None]


class CellFile(TypedDict):
    """A cell that a sweep asked for."""

    name: str
    config: CellConfig
    group: NotRequired[str | None]
    id: NotRequired[str]


class TrialFile(TypedDict):
    """A setting that is tried: the name that its runs share, and what it lays over the cell as written."""

    name: str
    settings: dict[str, Any]


class TuningFile(TypedDict):
    """What is tried for the cells of a sweep: in which other sweep, and by cell the trials and the one that was chosen.

    by: the measure that chooses; null: identity_recall where it was measured, else val_loss.
    """

    sweep: str
    seeds: list[int]
    by: str | None
    cells: dict[str, list[TrialFile]]
    chosen: dict[str, str]


class SweepFile(TypedDict):
    """`sweep.json`: what was last asked for."""

    about: str
    cells: list[CellFile]
    mlflow_run: NotRequired[str | None]
    command: NotRequired[str]
    tuning: NotRequired[TuningFile | None]


class RecordedGroup(TypedDict):
    """Mean and spread of each measure, beside these, over n seeds."""

    name: str
    n: int


class RecordedRun(TypedDict):
    """The figures of a run, beside these."""

    name: str
    seed: int
    id: str


class RecordFile(TypedDict):
    """What `zoo report --results` writes."""

    name: str
    command: str
    groups: list[RecordedGroup]
    runs: list[RecordedRun]
    unfinished: NotRequired[list[dict[str, Any]]]


def read_result(folder: Path) -> dict[str, Any]:
    """The checked `result.json` of a run's folder: what `ResultFile` names, without numbers that were not finite.

    Raises `FileNotFoundError` where there is none, and `ValueError` where it cannot be used.
    """
    plain = _read(find_file(folder, "result.json"), ResultFile)
    found = {key: value for key, value in plain.items() if key in _hints(ResultFile)}
    for key in ("metrics", "chance"):
        found[key] = {name: value for name, value in found.get(key, {}).items() if value is not None}
    found["films"] = {name: each for name, each in found.get("films", {}).items() if None not in each}
    found["curves"] = {
        name: [point for point in points if point[1] is not None] for name, points in found.get("curves", {}).items()
    }
    return found


def read_sweep(path: Path) -> SweepFile:
    """The checked `sweep.json`; raises as `read_result` does."""
    plain = _read(path, SweepFile)
    names = [cell["name"] for cell in plain["cells"]]
    _refuse([f"the cell's name {_shown(name)} is no name of a folder" for name in names if not _is_component(name)])
    _refuse([f"two cells are named {_shown(name)}" for name in dict.fromkeys(names) if names.count(name) > 1])
    ids = [cell["id"] for cell in plain["cells"] if "id" in cell]
    _refuse([f"the cell's id {_shown(own)} is no hash" for own in ids if not re.fullmatch("[0-9a-f]{12}", own)])
    trials = (plain.get("tuning") or {}).get("sweep", "trials")
    _refuse([] if _is_component(trials) else [f"the trials' sweep {_shown(trials)} is no name of a folder"])
    return cast("SweepFile", plain)


def read_record(path: Path) -> RecordFile:
    """The checked file of `zoo report --results`; raises as `read_result` does."""
    return cast("RecordFile", _read(path, RecordFile))


def find_file(folder: Path, name: str) -> Path:
    """A regular file in a folder, where neither `..` nor a link leads out of it.

    Raises `FileNotFoundError` where there is none, and `ValueError` where it may not be read.
    """
    try:
        path = (folder / name).resolve(strict=True)
        _refuse([] if path.is_relative_to(folder.resolve()) else ["it leads out of the run's folder"])
        _refuse([] if path.is_file() else ["it is not a regular file"])
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links
        raise ValueError(_why(error)) from error
    return path


def read_json(path: Path) -> Any:
    """A JSON file; raises `FileNotFoundError` where there is none, `ValueError` where it cannot be read."""
    try:
        _refuse([] if stat.S_ISREG(path.stat().st_mode) else ["it is not a regular file"])  # a pipe would block
        return json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(_why(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def misfits(value: Any, hint: Any, where: str = "") -> Iterator[str]:
    """What keeps a JSON value from being of a type, one reason each; `where` names it."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return
    if origin in (Union, UnionType):
        found = [[*misfits(value, one, where)] for one in args]
        if all(found):  # the reasons of the member that comes nearest: the one of the same kind
            yield from next((each for one, each in zip(args, found, strict=True) if _alike(value, one)), found[0])
    elif origin is NotRequired:
        yield from misfits(value, args[0], where)
    elif origin is Literal:
        if value not in args:
            yield f"{where} must be one of {', '.join(args)}, got {_shown(value)}"
    elif is_typeddict(hint):
        yield from _of_object(value, hint, where)
    elif origin is dict:
        if not isinstance(value, dict):
            yield f"{where} must be an object, got {_shown(value)}"
            return
        for key, inner in value.items():
            yield from misfits(inner, args[1], f"{where}.{key!a}")
    elif origin in (list, tuple):
        if not isinstance(value, list) or (origin is tuple and len(value) != len(args)):
            wanted = "a list" if origin is list else f"a list of {len(args)}"
            yield f"{where} must be {wanted}, got {_shown(value)}"
            return
        for i, inner in enumerate(value):
            yield from misfits(inner, args[0] if origin is list else args[i], f"{where}[{i}]")
    elif not _is(value, hint):
        yield f"{where} must be {NAMES[hint]}, got {_shown(value)}"


NAMES = {float: "a finite number", int: "a whole number", str: "text", bool: "true or false", NoneType: "null"}


def _read(path: Path, kind: Any) -> dict[str, Any]:
    plain = read_json(path)
    _refuse([] if isinstance(plain, dict) else [f"it must hold an object, got {_shown(plain)}"])
    version = plain.get("version", 0)
    _refuse([*misfits(version, int, "version")])
    _refuse(
        [f"its schema has version {version}, newer than {VERSION}; update the program"] if version > VERSION else []
    )
    _refuse([] if _predicate(kind)(plain) else [*misfits(plain, kind)])
    return cast("dict[str, Any]", plain)


@cache
def _predicate(hint: Any) -> Callable[[Any], bool]:
    """Whether a value has no `misfits`: the same without the reasons, because curves have thousands of points."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda _: True
    if origin is list:
        inner = _predicate(args[0])
        if get_origin(args[0]) is tuple:  # a curve: column by column
            width, columns = len(get_args(args[0])), [_column(one) for one in get_args(args[0])]
            return lambda value: (
                isinstance(value, list)
                and {*map(type, value)} <= {list}
                and {*map(len, value)} <= {width}
                and all(fits(column) for fits, column in zip(columns, zip(*value, strict=True), strict=False))
            )
        if float in (args[0], *get_args(args[0])):
            numbers = _column(args[0])
            return lambda value: isinstance(value, list) and (not value or numbers(tuple(value)))
        return lambda value: isinstance(value, list) and all(map(inner, value))
    if origin is tuple:
        parts = [_predicate(one) for one in args]
        return lambda value: (
            isinstance(value, list)
            and len(value) == len(parts)
            and all(p(x) for p, x in zip(parts, value, strict=True))
        )
    if origin in (Union, UnionType):
        members = [_predicate(one) for one in args]
        return lambda value: any(member(value) for member in members)
    if origin is dict:
        of_values = _predicate(args[1])
        return lambda value: isinstance(value, dict) and all(map(of_values, value.values()))
    if is_typeddict(hint):
        needed = _required(hint)
        known = {key: _predicate(inner) for key, inner in _hints(hint).items()}
        return lambda value: (
            isinstance(value, dict)
            and needed <= value.keys()
            and all(fits(value[key]) for key, fits in known.items() if key in value)
        )
    if hint is float:
        return lambda value: (type(value) is float and -LARGEST <= value <= LARGEST) or _is(value, float)
    if origin is None and isinstance(hint, type):
        return lambda value: _is(value, hint)
    return lambda value: not [*misfits(value, hint)]


def _column(hint: Any) -> Callable[[tuple[Any, ...]], bool]:
    """The same of many numbers."""
    fits = _predicate(hint)
    plain: set[type] = {int, float} if float in (hint, *get_args(hint)) else {int}

    def column_fits(column: tuple[Any, ...]) -> bool:
        if {*map(type, column)} <= plain:  # no NaN among them: `read_json` refuses it
            return fits(min(column)) and fits(max(column))
        return all(map(fits, column))

    return column_fits


def _of_object(value: Any, hint: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where} must be an object, got {_shown(value)}"
        return
    for key, inner in _hints(hint).items():
        place = f"{where}.{key}" if where else key
        if key in value:
            yield from misfits(value[key], inner, place)
        elif key in _required(hint):
            yield f"{place} is missing"


@cache
def _hints(hint: Any) -> dict[str, Any]:
    """The types of an object's values; `get_type_hints` evaluates their text at every call."""
    return get_type_hints(hint)


@cache
def _required(hint: Any) -> frozenset[str]:
    """The keys that an object must have; `__required_keys__` does not see through annotations that are text."""
    if not hint.__total__:
        return frozenset()
    hints = get_type_hints(hint, include_extras=True)
    return frozenset(key for key, inner in hints.items() if get_origin(inner) is not NotRequired)


def _is(value: Any, hint: Any) -> bool:
    if hint is NoneType:
        return value is None
    if hint in (int, float):
        if isinstance(value, bool) or not isinstance(value, int if hint is int else (int, float)):
            return False
        return abs(value) <= (LARGEST_INT if hint is int else LARGEST) and math.isfinite(value)
    return isinstance(value, hint)


def _alike(value: Any, hint: Any) -> bool:
    """Whether a value is of the kind of a type, whatever it holds."""
    origin = get_origin(hint) or hint
    kind = dict if is_typeddict(origin) else origin
    return isinstance(value, kind) if isinstance(kind, type) else False


def _is_component(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & {"/", "\0"}


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")


def _refuse(reasons: Sequence[str]) -> None:
    if reasons:
        more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
        raise ValueError("; ".join(reasons[:SHOWN]) + more)


def _shown(value: Any) -> str:
    """A value in an error message, cut to a few words."""
    if isinstance(value, Mapping | list):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    try:
        text = ascii(value)
    except ValueError:  # an integer of thousands of digits
        text = "a huge number"
    return text if len(text) <= 40 else f"{text[:37]}..."


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
