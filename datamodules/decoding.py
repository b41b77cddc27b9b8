"""Decoded videos: frames in a memory-mapped file, in a cache that processes share."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO
from zlib import crc32

import numpy as np

from datamodules.footage import DETECTORS, Decoding, Frames, read_footage
from sparse_zoo.errors import ZooError

__all__ = ["DETECTORS", "Decoding", "Frames", "Video", "decode", "load"]

# Part of an entry's key: raised with every change of what decoding gives.
_CACHE_FORMAT = 2
_PIECE = 2**22  # bytes of an entry that are read at a time to check it


@dataclass(frozen=True)
class Video:
    """A decoded video.

    Frames are numbered from 0 over the frames of the file that decode, at the file's own rate. `frames` are in a file
    and are read on access.

    Attributes:
        frames: uint8 (N, H, W, 3).
        source: The number of each frame in the file.
        cuts: The number of each shot's first frame.
        rate: Frames a second of the file.
        notes: Lines on what was lost, or not handled as the file declares.
    """

    frames: Frames
    source: tuple[int, ...]
    cuts: tuple[int, ...]
    rate: float
    notes: tuple[str, ...] = ()

    def shots(self) -> list[tuple[int, int]]:
        """Bounds [start, stop) of every shot in `frames`; empty where sampling at a low rate skipped a shot."""
        starts = np.searchsorted(self.source, self.cuts).tolist()
        return list(zip(starts, [*starts[1:], len(self.source)], strict=True))


def load(path: Path, decoding: Decoding, cache: Path | None) -> Video:
    """Decode `path`, or read the entry of an earlier call with the same file and settings from the folder `cache`.

    One process decodes; others that want the same entry wait for it. What a killed process left is overwritten.

    Raises:
        ZooError: With the path and the reason, if the file cannot be decoded.
    """
    if cache is None:
        return decode(path, decoding)
    try:
        stat = path.stat()
    except OSError as error:
        raise ZooError(f"{path}: it cannot be read: {error.strerror}") from error
    asked = [_CACHE_FORMAT, str(path.resolve()), stat.st_mtime_ns, stat.st_size, asdict(decoding)]
    entry = cache / sha256(json.dumps(asked).encode()).hexdigest()[:32]
    video = _read(entry)
    if video is not None:
        return video
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = entry.with_suffix(".npy.unfinished")
    with _locked(unfinished) as file:
        video = _read(entry)  # by whoever held the lock before
        if video is None:
            video = decode(path, decoding, file)
            _publish(entry, video, file, unfinished)
    return video


def decode(path: Path, decoding: Decoding, file: IO[bytes] | None = None) -> Video:
    """Decode the whole file once, finding cuts at its own rate and keeping frames at `decoding.fps`.

    No frame is kept twice: a video slower than `fps` keeps its own rate. Frames are written to `file` in NumPy's
    format, by default a temporary file that is deleted with its last use.

    Raises:
        ZooError: With the path and the reason.
    """
    if file is None:
        with TemporaryFile(prefix="zoo-frames-") as temporary:  # the mapping outlives it
            return decode(path, decoding, temporary)
    shape = (*decoding.size, 3)
    _write_header(file, 0, shape)
    footage = read_footage(path, decoding, lambda frame: file.write(np.ascontiguousarray(frame).data))
    file.seek(0)
    # As long as the first one: NumPy leaves room for the number of frames to grow.
    start = _write_header(file, len(footage.source), shape)
    file.flush()
    frames = np.memmap(file, np.uint8, "r", start, (len(footage.source), *shape))
    return Video(frames, footage.source, footage.cuts, footage.rate, footage.notes)


def _write_header(file: IO[bytes], frames: int, shape: tuple[int, ...]) -> int:
    header = {"descr": "|u1", "fortran_order": False, "shape": (frames, *shape)}
    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
    return file.tell()


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """The empty file at `path`, locked; deleted at the end unless it was moved. A killed process loses its lock."""
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _lies_at(file, path):
                continue  # whoever held the lock before has finished with this file
            file.truncate(0)
            try:
                yield file
            finally:
                if _lies_at(file, path):
                    path.unlink()
                fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: what maps the file holds it open
            return


def _lies_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _read(entry: Path) -> Video | None:
    """The entry, or None if it is missing, truncated or damaged."""
    try:
        facts = json.loads(entry.with_suffix(".json").read_text(encoding="utf-8"))
        with entry.with_suffix(".npy").open("rb") as file:
            if _checksum(file) != facts["crc32"]:
                return None
        frames: Frames = np.load(entry.with_suffix(".npy"), mmap_mode="r")
        return Video(frames, tuple(facts["source"]), tuple(facts["cuts"]), facts["rate"], tuple(facts["notes"]))
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None


def _checksum(file: IO[bytes]) -> int:
    """The checksum of a whole file, read in pieces, because a mapped file would count as memory in use."""
    file.seek(0)
    found = 0
    while piece := file.read(_PIECE):
        found = crc32(piece, found)
    return found


def _publish(entry: Path, video: Video, file: IO[bytes], unfinished: Path) -> None:
    facts = {
        "source": video.source,
        "cuts": video.cuts,
        "rate": video.rate,
        "notes": video.notes,
        "crc32": _checksum(file),
    }
    unwritten = entry.with_suffix(".json.unfinished")
    unwritten.write_text(json.dumps(facts), encoding="utf-8")
    os.replace(unwritten, entry.with_suffix(".json"))
    # The frames come last: until they are there, and have this checksum, there is no entry, and the lock is held.
    os.replace(unfinished, entry.with_suffix(".npy"))
