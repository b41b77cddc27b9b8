"""Manifests: which videos to use, with captions and shots; read row by row, every fault with its line."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from datamodules.captions import Caption, read_captions
from datamodules.discovery import SUFFIXES as VIDEOS
from datamodules.discovery import find_videos, printable, resolve
from sparse_zoo.errors import ZooError, refuse

FIELDS = ("video", "caption", "shots")
SHOT_FIELDS = ("start", "end", "caption")
SUFFIXES = (".jsonl", ".csv", ".parquet")
_BATCH = 1024  # rows of a Parquet file that are in memory at a time
_LONGEST = 1e9  # seconds: no time in a video is later
ROUNDING = 1e-3  # seconds: how far a time may be off a frame's, or off that of the next shot


@dataclass(frozen=True)
class ShotRow:
    """One shot of a row: seconds [start, end) in the video, None where it is to be detected, and its caption."""

    start: float | None
    end: float | None
    caption: str = ""


@dataclass(frozen=True)
class Row:
    """One film of a manifest.

    `line` counts from 1: the line of the file, or the row where a file has no lines. `name` is the video as the
    manifest writes it. `shots` None means that shots are detected; shots without times caption the detected ones.
    """

    line: int
    name: str
    path: Path
    caption: str = ""
    shots: tuple[ShotRow, ...] | None = None

    @property
    def timed(self) -> bool:
        """Whether the manifest says where the shots are."""
        return bool(self.shots) and self.shots is not None and self.shots[0].start is not None

    def texts(self) -> list[str]:
        """Its captions that are not blank, the film's first."""
        return [text for text in (self.caption, *(shot.caption for shot in self.shots or ())) if text.strip()]


@dataclass(frozen=True)
class Fault:
    """A row that cannot be used, and every reason why."""

    line: int
    name: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        named = f" ({self.name})" if self.name else ""
        return f"line {self.line}{named}: {'; '.join(self.reasons)}"


@dataclass
class Manifest:
    """The rows of a manifest; iterating gives a `Row` or a `Fault` for each and holds one row at a time.

    Args:
        place: A .jsonl, .csv or .parquet file, a folder of videos, or a video file. Paths in a file are relative to
            its folder. A folder may hold a `captions.json`, see `read_captions`.

    Raises:
        ZooError: if there is no such file, it has another suffix, or it has no column "video".
    """

    place: str
    notes: list[str] = field(default_factory=list)
    """Lines on what was not read, complete once all rows were iterated."""

    def __post_init__(self) -> None:
        self.path = resolve(self.place)
        refuse("manifest", [f"there is no such file or folder: {self.path}"] if not self.path.exists() else [])

    def __iter__(self) -> Iterator[Row | Fault]:
        self.notes.clear()
        suffix = self.path.suffix.lower()
        if self.path.is_dir() or suffix in VIDEOS:
            yield from self._folder()
            return
        refuse(
            f"manifest {self.path}",
            [f"it must be a folder, a video file, or end with {', '.join(SUFFIXES)}"] if suffix not in SUFFIXES else [],
        )
        reader = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}[suffix]
        ignored, seen = dict[str, int](), dict[int, int]()
        for line, given in reader(self.path):
            row = _row(line, given, self.path.parent, ignored)
            if isinstance(row, Row):
                same = seen.setdefault(hash((row.name, row.caption, row.shots)), line)
                row = row if same == line else Fault(line, row.name, (f"it repeats line {same}",))
            yield row
        if ignored:
            columns = ", ".join(f"{name} ({count} rows)" for name, count in sorted(ignored.items()))
            self.notes.append(f"not read: {columns}; {', '.join(FIELDS)} are, and of a shot {', '.join(SHOT_FIELDS)}")

    def _folder(self) -> Iterator[Row]:
        captions = self.path / "captions.json" if self.path.is_dir() else self.path.parent / "captions.json"
        files = [captions] if self.path.is_dir() and captions.is_file() else []
        found = find_videos([self.place], files)
        given = read_captions(files, found.files)
        # Whatever a manifest lacks is optional there: only a folder with captions is told of those that it lacks.
        self.notes += [*found.notes, *(given.notes if files else [])]
        for line, (name, path) in enumerate(found.files.items(), 1):
            caption = given.by_video.get(name, Caption())
            shots = None if caption.shots is None else tuple(ShotRow(None, None, text) for text in caption.shots)
            yield Row(line, name, path, caption.whole, shots)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            if raw.strip():
                try:
                    yield line, _parse(raw.decode("utf-8-sig"), "it is not JSON")
                except UnicodeDecodeError as error:
                    yield line, ZooError(f"it is not UTF-8: {error}")
                except ZooError as error:
                    yield line, error


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            _need_columns(path, rows.fieldnames or ())
        except csv.Error as error:
            raise ZooError(f"manifest {path}: its header is not CSV: {error}") from error
        while True:
            before = rows.reader.line_num
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                line = rows.reader.line_num
                first = f", from line {before + 1} on" if line > before + 1 else ""
                yield line, ZooError(f"it is not CSV{first}: {error}")
                continue
            if None in row:
                yield rows.line_num, ZooError(f"it has more columns than the header; quote texts with commas: {row}")
                continue
            yield rows.line_num, _with_shots({name: text for name, text in row.items() if text})


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            _need_columns(path, file.schema_arrow.names)
            line = 0
            for batch in file.iter_batches(_BATCH):
                for row in batch.to_pylist():
                    line += 1
                    yield line, _with_shots({name: value for name, value in row.items() if value is not None})
    except (ArrowException, OSError) as error:
        raise ZooError(f"manifest {path}: it cannot be read as Parquet: {error}") from error


def _with_shots(row: dict[str, Any]) -> dict[str, Any] | ZooError:
    """A row of a table whose shots may be text."""
    try:
        return row | {"shots": _parse(row["shots"], "shots must be a JSON list")} if _is_text(row, "shots") else row
    except ZooError as error:
        return error


def _is_text(row: Mapping[str, Any], column: str) -> bool:
    return isinstance(row.get(column), str)


def _parse(text: str, what: str) -> Any:
    """JSON in which no key is given twice: the second would take the first one's place without a word."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        if twice:
            raise ValueError(f"{', '.join(map(repr, twice))} given more than once")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError as error:
        raise ZooError(f"{what}: it is nested too deeply") from error
    except ValueError as error:
        raise ZooError(f"{what}: {error}") from error


def _need_columns(path: Path, columns: Sequence[str]) -> None:
    twice = [name for name, count in Counter(columns).items() if count > 1]
    names = printable(", ".join(columns)) or "none"
    reasons = [f"it has more than one column {printable(name)!r}" for name in twice]
    if "video" not in columns:
        one = len(columns) == 1 and path.suffix.lower() == ".csv" and "video" in columns[0]
        hint = ". Separate columns with commas, and save it as UTF-8" if one or "\0" in names else ""
        reasons.append(f"it has no column 'video'; its columns: {names}{hint}")
    refuse(f"manifest {path}", reasons)


def _row(line: int, given: Any, folder: Path, ignored: dict[str, int]) -> Row | Fault:
    if isinstance(given, ZooError):
        return Fault(line, "", (str(given),))
    if not isinstance(given, Mapping):
        return Fault(line, "", (f"it must be an object with {', '.join(FIELDS)}, got {_brief(given)}",))
    reasons: list[str] = []
    for key in given.keys() - set(FIELDS):
        ignored[str(key)] = ignored.get(str(key), 0) + 1
    video, caption = given.get("video"), _text(given.get("caption"), "caption", reasons)
    if not isinstance(video, str) or not video.strip():
        reasons.append(f"video must be a path, got {_brief(video)}" if "video" in given else "it has no video")
        video = ""
    elif _broken(video):
        reasons.append("video is not valid UTF-8 or holds a null character")
    shots = _shots(given.get("shots"), reasons, ignored)
    name = printable(video)
    if reasons:
        return Fault(line, name, tuple(reasons))
    try:
        return Row(line, name, folder / resolve(video), caption, shots)
    except ZooError as error:
        return Fault(line, name, (str(error),))


def _shots(given: Any, reasons: list[str], ignored: dict[str, int]) -> tuple[ShotRow, ...] | None:
    if given is None:
        return None
    if not isinstance(given, list) or not given:
        reasons.append(f"shots must be a list of at least one object, got {_brief(given)}")
        return None
    shots: list[ShotRow] = []
    for number, shot in enumerate(given):
        if not isinstance(shot, Mapping):
            reasons.append(f"shot {number} must be an object with {', '.join(SHOT_FIELDS)}, got {_brief(shot)}")
            continue
        for key in shot.keys() - set(SHOT_FIELDS):
            ignored[f"shots.{key}"] = ignored.get(f"shots.{key}", 0) + 1
        start, end = (_seconds(shot.get(key), f"shot {number}: {key}", reasons) for key in ("start", "end"))
        caption = _text(shot.get("caption"), f"shot {number}: caption", reasons)
        if (start is None) != (end is None) and not any(f"shot {number}: " in reason for reason in reasons):
            reasons.append(f"shot {number} has {'no end' if end is None else 'no start'}; give both, or neither")
        elif start is not None and end is not None and end <= start:
            how = "where it begins" if end == start else f"before it begins at {start:g} s"
            reasons.append(f"shot {number} ends at {end:g} s, {how}")
        shots.append(ShotRow(start, end, caption))
    if reasons:
        return None
    if len({shot.start is None for shot in shots}) > 1:
        reasons.append("some shots have times and some have none; give them to all, or to none")
        return None
    for number, (one, other) in enumerate(pairwise(shots)):
        if one.end is not None and other.start is not None and one.end > other.start + ROUNDING:
            reasons.append(
                f"shot {number + 1} begins at {other.start:g} s, before shot {number} ends at {one.end:g} s; "
                "shots must follow one another"
            )
    return tuple(shots)


def _seconds(given: Any, what: str, reasons: list[str]) -> float | None:
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < _LONGEST:  # so is NaN
        reasons.append(f"{what} must be seconds, 0 or more, got {str(given)[:40]!r}")
        return None
    return float(given)


def _text(given: Any, what: str, reasons: list[str]) -> str:
    if given is None:
        return ""
    if not isinstance(given, str):
        reasons.append(f"{what} must be text, got {_brief(given)}")
        return ""
    if _broken(given):
        reasons.append(f"{what} is not valid UTF-8 or holds a null character")
    return given


def _brief(given: Any) -> str:
    """The beginning of a value, which in Parquet may be of a type that JSON does not have."""
    return json.dumps(given, default=str)[:80]


def _broken(text: str) -> bool:
    return "\0" in text or any("\ud800" <= sign <= "\udfff" for sign in text)
