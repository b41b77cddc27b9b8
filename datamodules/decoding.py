"""A video file becomes frames of one size and rate, and the places of its cuts, remembered on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any
from zlib import crc32

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import Interpolation
from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode

from sparse_zoo.errors import ZooError

Frames = npt.NDArray[np.uint8]

DETECTORS: dict[str, Callable[..., Any]] = {"content": ContentDetector, "adaptive": AdaptiveDetector}
_THRESHOLD = {"content": "threshold", "adaptive": "adaptive_threshold"}
# PySceneDetect's thresholds are made for frames of about this width.
_DETECTOR_WIDTH = 256
_CACHE_FORMAT = 1


@dataclass(frozen=True)
class Decoding:
    """How to decode: `fps` frames a second (None: the file's own rate), `size` (H, W) in pixels, and how to find cuts.

    Frames are resized with their aspect kept until they cover `size`, then cut to it around the centre; flags for
    rotation and for pixels that are not square are not applied. `threshold` None is the detector's own default.
    """

    fps: float | None
    size: tuple[int, int]
    detector: str = "content"
    threshold: float | None = None


@dataclass(frozen=True)
class Video:
    """`frames` uint8 (N, H, W, 3), `source` the number of each in the file, `cuts` the number of each shot's first.

    Numbers count the frames of the file from 0, at the file's own `rate` (frames a second).
    """

    frames: Frames
    source: tuple[int, ...]
    cuts: tuple[int, ...]
    rate: float

    def shots(self) -> list[tuple[int, int]]:
        """Bounds [start, stop) of every shot in `frames`; empty where sampling at a low rate stepped over a shot."""
        starts = np.searchsorted(self.source, self.cuts).tolist()
        return list(zip(starts, [*starts[1:], len(self.source)], strict=True))


def load(path: Path, decoding: Decoding, cache: Path | None) -> Video:
    """Decode `path`, or read what an earlier call with the same file and settings left in the folder `cache`.

    Raises `ZooError` with the path and the reason when the file cannot be decoded.
    """
    if cache is None:
        return decode(path, decoding)
    stat = _stat(path)
    asked = [_CACHE_FORMAT, str(path.resolve()), stat.st_mtime_ns, stat.st_size, asdict(decoding)]
    entry = cache / sha256(json.dumps(asked).encode()).hexdigest()[:32]
    video = _read(entry)
    if video is None:
        video = decode(path, decoding)
        _write(entry, video)
    return video


def decode(path: Path, decoding: Decoding) -> Video:
    """Decode the whole file once, finding cuts at its own rate and keeping frames at `decoding.fps`.

    No frame is kept twice: a file slower than `fps` keeps its own rate. Raises `ZooError` with the path and the reason.
    """
    try:
        # Titles and the like are not read, so their encoding is no reason to refuse a video.
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise ZooError(f"{path}: it has no video stream")
            if container.streams.video[0].codec_context is None:
                raise ZooError(f"{path}: its codec is unknown")
            return _decode(container, decoding, path)
    except av.FFmpegError as error:
        raise ZooError(f"{path}: it cannot be decoded: {error.strerror}") from error


def _decode(container: Any, decoding: Decoding, path: Path) -> Video:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    rate = stream.average_rate or stream.guessed_rate or 25
    chosen = {} if decoding.threshold is None else {_THRESHOLD[decoding.detector]: decoding.threshold}
    detector = DETECTORS[decoding.detector](**chosen)
    frames, source, cuts, due = [], [], [], 0
    # Of the stream, not of each frame: a file may change its size on the way, and the detector compares frames.
    shrink = max(1.0, stream.width / _DETECTOR_WIDTH)
    small = {"width": round(stream.width / shrink), "height": max(1, round(stream.height / shrink))}
    for number, frame in enumerate(container.decode(stream)):
        view = frame.reformat(**small, format="bgr24", interpolation=Interpolation.AREA).to_ndarray()
        cuts += detector.process_frame(FrameTimecode(number, rate), view)
        seconds = float(number / rate) if frame.time is None else frame.time
        if number == 0:
            first = seconds
        # Half a millisecond: containers round times to as little as whole milliseconds.
        tick = number if decoding.fps is None else int((seconds - first + 5e-4) * decoding.fps)
        if tick >= due:
            frames.append(_cover(frame, decoding.size))
            source.append(number)
            due = tick + 1
    if not frames:
        raise ZooError(f"{path}: it has no frame")
    starts = sorted({0, *(cut.frame_num for cut in cuts)})
    return Video(np.stack(frames), tuple(source), tuple(starts), float(rate))


def _cover(frame: Any, size: tuple[int, int]) -> Frames:
    height, width = size
    scale = max(height / frame.height, width / frame.width)
    tall, wide = max(height, round(frame.height * scale)), max(width, round(frame.width * scale))
    how = Interpolation.AREA if scale < 1 else Interpolation.BICUBIC
    whole: Frames = frame.reformat(width=wide, height=tall, format="rgb24", interpolation=how).to_ndarray()
    top, left = (tall - height) // 2, (wide - width) // 2
    return whole[top : top + height, left : left + width]


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise ZooError(f"{path}: it cannot be read: {error.strerror}") from error


def _read(entry: Path) -> Video | None:
    """None where there is no whole entry: nothing yet, cut short, or damaged."""
    try:
        facts = json.loads(entry.with_suffix(".json").read_text(encoding="utf-8"))
        frames: Frames = np.load(entry.with_suffix(".npy"), mmap_mode="r")
        if crc32(frames.data) != facts["crc32"]:
            return None
        return Video(frames, tuple(facts["source"]), tuple(facts["cuts"]), facts["rate"])
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None


def _write(entry: Path, video: Video) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    facts = {"source": video.source, "cuts": video.cuts, "rate": video.rate, "crc32": crc32(video.frames.data)}
    # The facts come last: without them there is no entry.
    _replace(entry.with_suffix(".npy"), lambda file: np.save(file, video.frames))
    _replace(entry.with_suffix(".json"), lambda file: file.write(json.dumps(facts).encode()))


def _replace(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with unfinished.open("wb") as file:
        write(file)
    os.replace(unfinished, path)
