"""One pass over a video file: its frames, upright and of one size, and the cuts between shots."""

from __future__ import annotations

import os
import stat
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import ColorTrc, Interpolation, VideoReformatter
from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode
from scenedetect.common import Timecode

from datamodules.unread import unread
from sparse_zoo.errors import ZooError

Frames = npt.NDArray[np.uint8]

DETECTORS: dict[str, Callable[..., Any]] = {"content": ContentDetector, "adaptive": AdaptiveDetector}
_THRESHOLD = {"content": "threshold", "adaptive": "adaptive_threshold"}
# PySceneDetect's thresholds are made for frames of about this width.
_DETECTOR_WIDTH = 256
_SHORTEST_SHOT = 0.6  # seconds; cuts that follow each other faster are one
_ROUNDING = 1.1e-3  # seconds: how far a difference of two times is off that a container rounds to milliseconds
_JITTER = 0.5  # seconds: where times go back by more, another recording begins
_CLOCK = 10**6  # ticks a second of the times that the detector is given
# Containers whose header says how long the video is; of the others the length is guessed.
_WITH_LENGTH = ("matroska", "mov", "avi", "flv", "asf")
_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
_HDR = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
_MOST_ERRORS = 1000  # in a row, without a frame between them: the rest of the file is given up


@dataclass(frozen=True)
class Decoding:
    """How to decode: `fps` frames a second (None: the file's own rate), `size` (H, W) in pixels, and how to find cuts.

    Frames are turned as the file says, given square pixels, resized with their aspect kept until they cover `size`,
    then cut to it around the centre. `threshold` None is the detector's own default; `detector` None looks for no cuts.
    """

    fps: float | None
    size: tuple[int, int]
    detector: str | None = "content"
    threshold: float | None = None


@dataclass(frozen=True)
class Footage:
    """What a pass found beside the frames, as `Video` has it; `notes` are lines on what was lost or not honoured.

    `times` are the seconds at which the frames that were kept begin, `end` those at which the last frame ends.
    """

    source: tuple[int, ...]
    cuts: tuple[int, ...]
    rate: float
    notes: tuple[str, ...]
    times: tuple[float, ...]
    end: float


def read_footage(path: Path, decoding: Decoding, keep: Callable[[Frames], Any] | None) -> Footage:
    """Decode the whole file once, finding cuts at its own rate; call `keep` with each frame (H, W, 3) to be kept.

    Where `keep` is None, only times and cuts are found, and no frame is resized.

    Only a few frames are in memory at a time. What cannot be decoded is left out, up to the next key frame.

    Raises:
        ZooError: With the path and the reason, if no frame can be decoded.
    """
    try:
        need_file(path)
        # An absolute path with its protocol: FFmpeg takes "scene:01.mp4" for a URL. Titles and the like are not read,
        # so their encoding is no reason to refuse a video.
        where = f"file:{os.path.abspath(path)}"
        number = _best_stream(path, where)
        with av.open(where, metadata_errors="replace") as container:
            return _Pass(path, container, number, decoding).run(keep)
    except av.FFmpegError as error:
        raise ZooError(f"{path}: it cannot be decoded: {error.strerror}") from error
    except OSError as error:
        raise ZooError(f"{path}: it cannot be read: {error.strerror}") from error


def need_file(path: Path) -> None:
    """Raise `ZooError` for what is empty or no file: whoever reads a pipe may wait for ever, and a device has no end.

    Raises:
        OSError: if there is nothing at the path.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ZooError(f"{path}: it is {'a folder' if stat.S_ISDIR(found.st_mode) else 'a pipe or a device'}, no file")
    if found.st_size == 0:
        raise ZooError(f"{path}: it is empty")


@dataclass(frozen=True)
class Header:
    """What a file says of its video before it is decoded: frames a second, seconds (None where it does not), pixels.

    Width and height are as shown: upright, with square pixels.
    """

    width: int
    height: int
    rate: float
    seconds: float | None


def probe(path: Path) -> Header:
    """Read a file's header and decode its first frame, which takes milliseconds.

    Raises:
        ZooError: with the path and the reason, if no frame can be had.
    """
    try:
        need_file(path)
        where = f"file:{os.path.abspath(path)}"
        number = _best_stream(path, where)
        with av.open(where, metadata_errors="replace") as container:
            stream = container.streams[number]
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            length = container.duration if any(name in container.format.name for name in _WITH_LENGTH) else None
            for packet in container.demux(stream):
                for frame in packet.decode():
                    seconds = None if length is None else length / av.time_base
                    shape = round(frame.width * float(stream.sample_aspect_ratio or 1)), frame.height
                    width, height = shape[::-1] if frame.rotation % 180 == 90 else shape
                    return Header(width, height, rate, seconds)
    except (av.FFmpegError, IndexError) as error:
        raise ZooError(f"{path}: it cannot be decoded: {getattr(error, 'strerror', error)}") from error
    except OSError as error:
        raise ZooError(f"{path}: it cannot be read: {error.strerror}") from error
    raise ZooError(f"{path}: it has no frame")


def _best_stream(path: Path, where: str) -> int:
    """Index of the video stream to use: films before pictures, then the file's default stream, then the largest."""
    with av.open(where, metadata_errors="replace") as container:
        videos = container.streams.video
        films = [stream for stream in videos if not stream.disposition & _PICTURES]
        if not films:
            raise ZooError(f"{path}: it has no video stream" + (", only a cover picture" if videos else ""))
        known = [stream for stream in films if stream.codec_context is not None]
        if not known:
            raise ZooError(f"{path}: its codec is unknown")
        if len(known) == 1:
            return int(known[0].index)
        # Pictures that are not marked as such end after one packet.
        packets = dict.fromkeys((stream.index for stream in known), 0)
        with suppress(IndexError):  # where a stream begins that PyAV does not know: what was seen so far decides
            for packet in container.demux(known):
                packets[packet.stream_index] += packet.size > 0
                if min(packets.values()) > 1 or sum(packets.values()) > 500:
                    break
        best = max(
            known,
            key=lambda stream: (
                packets[stream.index] > 1,
                bool(stream.disposition & Disposition.default),
                stream.width * stream.height,
                -stream.index,
            ),
        )
        return int(best.index)


class _Pass:
    """The state of one pass over a container."""

    def __init__(self, path: Path, container: Any, number: int, decoding: Decoding) -> None:
        self.path = path
        self.container = container
        self.stream = container.streams[number]
        self.decoding = decoding
        self.rate = self.stream.average_rate or self.stream.guessed_rate or Fraction(25)
        self.period = float(1 / self.rate)
        self.aspect = float(self.stream.sample_aspect_ratio or 1)
        self.rotation: int | None = None  # degrees, of the last frame, and what it takes to undo it
        self.turn = (False, False, False)
        # `frame.reformat` would set up its scaling again for every frame, which takes longer than to scale a small one.
        self.shrinker, self.scaler = VideoReformatter(), VideoReformatter()
        self.origin: float | None = None  # seconds in the file's own time at which the present recording would begin
        self.now = -self.period  # seconds since the first frame
        self.ends = 0.0  # when the present frame should give way to the next one
        self.strange = 0  # packets of streams that begin later
        self.read = 0  # bytes of the file up to the end of the last packet
        self.notes: list[str] = []
        self.jumps: list[float] = []
        self.gaps: list[tuple[float, float]] = []
        self.lost: list[tuple[float, float | None, str]] = []

    def run(self, keep: Callable[[Frames], Any] | None) -> Footage:
        stream, decoding = self.stream, self.decoding
        stream.thread_type = "AUTO"
        if not 0.1 <= self.aspect <= 10:
            raise ZooError(f"{self.path}: its pixels are {self.aspect:g} times as wide as high; 0.1 to 10 are allowed")
        detector = None
        if decoding.detector is not None:
            chosen = {} if decoding.threshold is None else {_THRESHOLD[decoding.detector]: decoding.threshold}
            detector = DETECTORS[decoding.detector](min_scene_len=_SHORTEST_SHOT - _ROUNDING, **chosen)
        # Of the stream, not of each frame: a file may change its size on the way, and the detector compares frames.
        shrink = max(1.0, stream.width / _DETECTOR_WIDTH)
        small = {"width": round(stream.width / shrink), "height": max(1, round(stream.height / shrink))}
        times, source, cuts, due = array("q"), array("q"), list[int](), 0
        begins = array("d")  # of the frames that are kept
        interlaced, transfer = 0, None
        for number, frame in enumerate(self._frames()):
            times.append(round(self.now * _CLOCK))
            if detector is not None:
                moment = FrameTimecode(Timecode(times[-1], Fraction(1, _CLOCK)), self.rate)
                view = self.shrinker.reformat(
                    frame, **small, format="bgr24", interpolation=Interpolation.AREA
                ).to_ndarray()
                cuts += [bisect_left(times, cut.pts) for cut in detector.process_frame(moment, view)]
            interlaced += frame.interlaced_frame
            transfer = transfer or _HDR.get(frame.color_trc)
            tick = number if decoding.fps is None else int((self.now + _ROUNDING) * decoding.fps)
            if tick >= due:
                if keep is not None:
                    keep(self._shown(frame))
                source.append(number)
                begins.append(self.now)
                due = tick + 1
        if not source:
            raise ZooError(f"{self.path}: it has no frame" + (f" that decodes: {self.lost[0][2]}" if self.lost else ""))
        self._take_stock(len(times), interlaced, transfer)
        return Footage(
            tuple(source), tuple(sorted({0, *cuts})), float(self.rate), tuple(self.notes), tuple(begins), self.ends
        )

    def _frames(self) -> Iterator[Any]:
        """Complete frames, with `now` set to the time of each."""
        broken = ""
        for item in self._decoded():
            damage = item.strerror if isinstance(item, av.FFmpegError) else "damaged" if item.is_corrupt else ""
            if damage:
                broken = broken or damage
            # What follows damage is computed from it, up to the next key frame.
            elif not broken or item.key_frame:
                before, ended = self.now, self.ends
                self._advance(item)
                if broken:
                    self.lost.append((max(0.0, before + self.period), self.now, broken))
                    broken = ""
                elif before >= 0 and self.now > max(before + 4 * self.period, ended + 2 * self.period):
                    self.gaps.append((ended, self.now))
                yield item
        if broken:
            self.lost.append((max(0.0, self.now + self.period), None, broken))

    def _decoded(self) -> Iterator[Any]:
        """Frames, and errors in place of what could not be decoded."""
        packets, failures = self.container.demux(self.stream), 0
        while failures < _MOST_ERRORS:
            try:
                packet = next(packets)
                if packet.pos is not None and not packet.is_corrupt:
                    self.read = max(self.read, packet.pos + packet.size)
                frames = packet.decode()
            except (StopIteration, av.error.EOFError):
                return
            except IndexError:  # PyAV knows the streams that the file begins with
                self.strange += 1
                packets = self.container.demux(self.stream)  # goes on where it stopped
                continue
            except av.FFmpegError as error:
                failures += 1
                yield error
                packets = self.container.demux(self.stream)  # goes on where it stopped
                continue
            if frames:
                failures = 0
            yield from frames

    def _advance(self, frame: Any) -> None:
        """Set `now` for the next frame. It always increases, so that repeated or falling timestamps lose no frame."""
        following = self.now + self.period
        if frame.time is None:
            self.now = following
        else:
            if self.origin is None:
                self.origin = frame.time - following
            self.now, before = frame.time - self.origin, self.now
            if self.now <= before + _ROUNDING:
                if before - self.now > _JITTER:
                    self.jumps.append(following)
                    self.origin = frame.time - following
                self.now = following
        own = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else self.period
        self.ends = self.now + max(own, self.period)

    def _shown(self, frame: Any) -> Frames:
        """The frame upright and with square pixels, covering `size`, cropped to it around the centre."""
        # Looking at side data makes a cycle that keeps the frame until garbage is collected: only where it may differ.
        if self.rotation != frame.rotation:
            self.rotation, self.turn = frame.rotation, self._turn(frame)
        swapped, up, left = self.turn
        height, width = self.decoding.size[::-1] if swapped else self.decoding.size
        across = frame.width * self.aspect
        scale = max(height / frame.height, width / across)
        tall, wide = max(height, round(frame.height * scale)), max(width, round(across * scale))
        smaller = tall < frame.height and wide < frame.width
        how = Interpolation.AREA if smaller else Interpolation.BICUBIC
        scaled = self.scaler.reformat(frame, width=wide, height=tall, format="rgb24", interpolation=how)
        whole: Frames = np.asarray(scaled.to_ndarray(), np.uint8)
        top, side = (tall - height) // 2, (wide - width) // 2
        cut = whole[top : top + height, side : side + width]
        cut = cut.swapaxes(0, 1) if swapped else cut
        return cut[:: -1 if up else 1, :: -1 if left else 1]

    def _turn(self, frame: Any) -> tuple[bool, bool, bool]:
        """How to show a frame as its display matrix says: swap rows and columns, then mirror rows, columns."""
        side = frame.side_data.get(SideData.DISPLAYMATRIX)
        if side is None:
            return False, False, False
        # A pixel at (x, y) is shown at (ax + cy, bx + dy); translation is of no interest.
        a, b, _, c, d, *_ = np.frombuffer(bytes(side)[:36], np.int32) / 65536
        largest = max(abs(a), abs(b), abs(c), abs(d))
        straight, swapped = (
            min(abs(x), abs(y)) > 0.98 * largest > 0 and max(abs(u), abs(v)) < 0.02 * largest
            for x, y, u, v in ((a, d, b, c), (b, c, a, d))
        )
        if not straight and not swapped:
            raise ZooError(
                f"{self.path}: it is to be shown turned by {frame.rotation} degrees; only quarter turns and mirroring "
                "can be done. Turn its frames themselves, and write it anew"
            )
        return (True, bool(b < 0), bool(c < 0)) if swapped else (False, bool(d < 0), bool(a < 0))

    def _take_stock(self, count: int, interlaced: int, transfer: str | None) -> None:
        """Turn the counts into notes."""
        others = [
            stream
            for stream in self.container.streams.video
            if stream.index != self.stream.index and not stream.disposition & _PICTURES
        ]
        if others:
            self.notes.append(
                f"it has {len(others) + 1} video streams; number {self.stream.index} is taken "
                f"({self.stream.width}x{self.stream.height})"
            )
        for start, stop, why in self.lost[:3]:
            until = "the end" if stop is None else _clock(stop)
            self.notes.append(f"frames from {_clock(start)} to {until} are lost: {why}")
        if (later := len(self.lost) - 3) > 0:
            self.notes.append(f"frames are lost in {later} later place{'s' * (later > 1)} too")
        if self.gaps:
            start, stop = self.gaps[0]
            more = f", and {len(self.gaps) - 1} more such gaps" if len(self.gaps) > 1 else ""
            self.notes.append(f"it has no frame from {_clock(start)} to {_clock(stop)}{more}")
        if self.jumps:
            more = f" and {len(self.jumps) - 1} more times" if len(self.jumps) > 1 else ""
            self.notes.append(
                f"its times go back at {_clock(self.jumps[0])}{more}, as in joined recordings; all frames are taken, "
                "in their order in the file"
            )
        promised, length = self.stream.frames, self.container.duration
        told = any(name in self.container.format.name for name in _WITH_LENGTH)
        if told and promised > count:
            self.notes.append(
                f"its header promises {promised} frames, {count} could be used: it is cut short, damaged or edited"
            )
        elif told and not promised and length and length / av.time_base - self.ends > max(0.5, 2 * self.period):
            self.notes.append(
                f"its header promises {_clock(length / av.time_base)}, its last frame ends at {_clock(self.ends)}"
            )
        if self.read and (rest := unread(self.path, self.read)):
            self.notes.append(rest)
        if self.strange:
            self.notes.append(
                f"{self.strange} packets belong to streams that begin within the file and are not read: sound, or "
                "another recording that was joined to the first. Split the file there"
            )
        if interlaced:
            self.notes.append(f"{interlaced} frames are interlaced, and taken as they are: moving edges look combed")
        if transfer:
            self.notes.append(f"it is HDR ({transfer}) and is not tone-mapped: its colours will look pale")


def _clock(seconds: float) -> str:
    return f"{seconds:.2f} s"
