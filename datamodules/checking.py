"""Checks a manifest before hours are spent on it: reads every row and opens every video."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from datamodules.footage import Header, probe
from datamodules.manifest import Fault, Manifest, Row
from sparse_zoo.errors import ZooError

_AHEAD = 64  # rows that are read before their probes have ended
_TAIL = 0.1  # seconds by which a shot may end after its video without a word


@dataclass
class Checked:
    """What a check found. `seconds` adds up the videos whose headers tell; `unknown` counts the others."""

    rows: int = 0
    usable: int = 0
    shots: int = 0
    captions: int = 0
    seconds: float = 0.0
    unknown: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check(manifest: Manifest, told: Callable[[], object] = lambda: None) -> Checked:
    """Check every row of a manifest; memory holds a few rows and the faults.

    Args:
        manifest: The rows.
        told: Called once a row.

    Returns:
        Counts over the rows that can be used, and a fault for every other one.
    """
    found = Checked()
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        for row, probed in _probes(manifest, pool):
            found.rows += 1
            told()
            if isinstance(row, Fault):
                found.faults.append(row)
                continue
            try:
                header = probed.result()
            except ZooError as error:
                found.faults.append(Fault(row.line, row.name, (str(error).removeprefix(f"{row.path}: "),)))
                continue
            if late := past_the_end(row, header.seconds):
                found.faults.append(Fault(row.line, row.name, tuple(late)))
                continue
            found.notes += [f"line {row.line} ({row.name}): {note}" for note in cut_at_the_end(row, header.seconds)]
            found.usable += 1
            found.shots += len(row.shots or ())
            found.captions += len(row.texts())
            found.seconds += header.seconds or 0.0
            found.unknown += header.seconds is None
            size = f"{header.width}x{header.height}"
            found.sizes[size] = found.sizes.get(size, 0) + 1
    found.notes += manifest.notes
    return found


def past_the_end(row: Row, seconds: float | None) -> list[str]:
    """The shots of a row that begin after its video has ended."""
    if seconds is None:
        return []
    return [
        f"shot {number} begins at {shot.start:g} s, the video ends at {seconds:.2f} s"
        for number, shot in enumerate(row.shots or ())
        if shot.start is not None and shot.start >= seconds
    ]


def cut_at_the_end(row: Row, seconds: float | None) -> list[str]:
    """A line on each shot of a row that begins within its video and ends after it."""
    return [
        f"shot {number} ends at {shot.end:g} s and is cut at {seconds:.2f} s, where the video ends"
        for number, shot in enumerate(row.shots or ())
        if seconds is not None and shot.end is not None and (shot.start or 0.0) < seconds < shot.end - _TAIL
    ]


def _probes(manifest: Manifest, pool: ThreadPoolExecutor) -> Iterator[tuple[Row | Fault, Future[Header]]]:
    ahead = deque[tuple[Row | Fault, Future[Header]]]()
    for row in manifest:
        ahead.append((row, Future() if isinstance(row, Fault) else pool.submit(probe, row.path)))
        if len(ahead) >= _AHEAD:
            yield ahead.popleft()
    yield from ahead
