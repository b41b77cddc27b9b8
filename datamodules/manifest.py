"""Manifests: which videos to use, with captions and shots; read row by row, every fault with its line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from datamodules.captions import Caption, read_captions
from datamodules.discovery import SUFFIXES as VIDEOS
from datamodules.discovery import find_videos, resolve
from sparse_zoo.errors import ZooError, refuse

FIELDS = ("video", "caption", "shots")
SHOT_FIELDS = ("start", "end", "caption")
SUFFIXES = (".jsonl", ".csv", ".parquet")
_BATCH = 1024  # rows of a Parquet file that are in memory at a time


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
                    yield line, json.loads(raw.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    yield line, ZooError(f"it is not JSON: {error}")


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file)
        _need_video(path, rows.fieldnames or ())
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield rows.line_num, ZooError(f"it is not CSV: {error}")
                continue
            if None in row:
                yield rows.line_num, ZooError(f"it has more columns than the header; quote texts with commas: {row}")
                continue
            given: dict[str, Any] = {name: text for name, text in row.items() if text}
            try:
                if "shots" in given:
                    given["shots"] = json.loads(given["shots"])
                yield rows.line_num, given
            except ValueError as error:
                yield rows.line_num, ZooError(f"shots must be a JSON list: {error}")


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            _need_video(path, file.schema_arrow.names)
            line = 0
            for batch in file.iter_batches(_BATCH):
                for row in batch.to_pylist():
                    line += 1
                    given = {name: value for name, value in row.items() if value is not None}
                    try:
                        if isinstance(given.get("shots"), str):
                            given["shots"] = json.loads(given["shots"])
                        yield line, given
                    except ValueError as error:
                        yield line, ZooError(f"shots must be a JSON list: {error}")
    except (ArrowException, OSError) as error:
        raise ZooError(f"manifest {path}: it cannot be read as Parquet: {error}") from error


def _need_video(path: Path, columns: Any) -> None:
    names = ", ".join(map(str, columns)) or "none"
    refuse(f"manifest {path}", [f"it has no column 'video'; its columns: {names}"] if "video" not in columns else [])


def _row(line: int, given: Any, folder: Path, ignored: dict[str, int]) -> Row | Fault:
    if isinstance(given, ZooError):
        return Fault(line, "", (str(given),))
    if not isinstance(given, Mapping):
        return Fault(line, "", (f"it must be an object with {', '.join(FIELDS)}, got {json.dumps(given)[:80]}",))
    reasons: list[str] = []
    for key in given.keys() - set(FIELDS):
        ignored[str(key)] = ignored.get(str(key), 0) + 1
    video, caption = given.get("video"), _text(given.get("caption"), "caption", reasons)
    if not isinstance(video, str) or not video.strip():
        reasons.append(f"video must be a path, got {json.dumps(video)[:80]}" if "video" in given else "it has no video")
        video = ""
    elif _broken(video):
        reasons.append("video is not valid UTF-8 or holds a null character")
    shots = _shots(given.get("shots"), reasons, ignored)
    name = video.encode("utf-8", "backslashreplace").decode()
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
        reasons.append(f"shots must be a list of at least one object, got {json.dumps(given)[:80]}")
        return None
    shots: list[ShotRow] = []
    for number, shot in enumerate(given):
        if not isinstance(shot, Mapping):
            reasons.append(
                f"shot {number} must be an object with {', '.join(SHOT_FIELDS)}, got {json.dumps(shot)[:80]}"
            )
            continue
        for key in shot.keys() - set(SHOT_FIELDS):
            ignored[f"shots.{key}"] = ignored.get(f"shots.{key}", 0) + 1
        start, end = (_seconds(shot.get(key), f"shot {number}: {key}", reasons) for key in ("start", "end"))
        caption = _text(shot.get("caption"), f"shot {number}: caption", reasons)
        if (start is None) != (end is None) and not any(f"shot {number}: " in reason for reason in reasons):
            reasons.append(f"shot {number} has {'no end' if end is None else 'no start'}; give both, or neither")
        elif start is not None and end is not None and end <= start:
            reasons.append(f"shot {number} ends at {end:g} s, before it begins at {start:g} s")
        shots.append(ShotRow(start, end, caption))
    if reasons:
        return None
    if len({shot.start is None for shot in shots}) > 1:
        reasons.append("some shots have times and some have none; give them to all, or to none")
        return None
    for number, (one, other) in enumerate(pairwise(shots)):
        if one.end is not None and other.start is not None and one.end > other.start:
            reasons.append(
                f"shot {number + 1} begins at {other.start:g} s, before shot {number} ends at {one.end:g} s; "
                "shots must follow one another"
            )
    return tuple(shots)


def _seconds(given: Any, what: str, reasons: list[str]) -> float | None:
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given) or given < 0:
        reasons.append(f"{what} must be seconds, 0 or more, got {str(given)[:40]!r}")
        return None
    return float(given)


def _text(given: Any, what: str, reasons: list[str]) -> str:
    if given is None:
        return ""
    if not isinstance(given, str):
        reasons.append(f"{what} must be text, got {json.dumps(given, default=str)[:80]}")
        return ""
    if _broken(given):
        reasons.append(f"{what} is not valid UTF-8 or holds a null character")
    return given


def _broken(text: str) -> bool:
    return "\0" in text or any("\ud800" <= sign <= "\udfff" for sign in text)
