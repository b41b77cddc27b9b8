"""What a video file says of itself is honoured or its loss is named; memory does not grow with its length."""

import gc
import json
import os
import re
import resource
import signal
import time
from collections.abc import Sequence
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from test_videos import COLOURS, plain, ramp, write

from datamodules import decoding
from datamodules.decoding import Decoding, Video, decode, load
from sparse_zoo.errors import ZooError

RED, GREEN, BLUE, WHITE = (220, 20, 20), (20, 200, 30), (30, 30, 210), (235, 235, 235)
SETTINGS = Decoding(None, (32, 32))


def quarters(height: int = 64, width: int = 64) -> np.ndarray:
    """Red and green above blue and white."""
    picture = np.empty((height, width, 3), np.uint8)
    half, middle = height // 2, width // 2
    picture[:half, :middle], picture[:half, middle:] = RED, GREEN
    picture[half:, :middle], picture[half:, middle:] = BLUE, WHITE
    return picture


def corners(frame: np.ndarray) -> np.ndarray:
    """Mean colours of the four quarters, (2, 2, 3)."""
    height, width = frame.shape[0] // 2, frame.shape[1] // 2
    return np.array(
        [
            [frame[rows, cols].mean((0, 1)) for cols in (slice(2, width - 2), slice(width + 2, -2))]
            for rows in (slice(2, height - 2), slice(height + 2, -2))
        ]
    )


def film(
    path: Path,
    pictures: Sequence[np.ndarray],
    *,
    codec: str = "libx264",
    rate: int = 24,
    times: Sequence[int] | None = None,
    gop: int | None = None,
    container: dict[str, str] | None = None,
    **stream_settings: Any,
) -> Path:
    """A file with one stream; `times` are those of the frames, in ticks of 1 / rate."""
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if gop:
            stream.codec_context.gop_size = gop
        if "turn" in stream_settings:
            degrees, mirrored = stream_settings["turn"]
            stream.set_display_rotation(degrees, hflip=mirrored)
        if "aspect" in stream_settings:
            stream.codec_context.sample_aspect_ratio = stream_settings["aspect"]
        stream.codec_context.time_base = Fraction(1, rate)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (times[number] if times else number), Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def busy(frames: int) -> list[np.ndarray]:
    """Frames with detail that moves, which take some bytes."""
    draw = np.random.default_rng(0)
    picture = np.kron(draw.integers(0, 255, (16, 24, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    return [np.roll(picture, number, 1) for number in range(frames)]


# Turned, mirrored, stretched


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_turned_and_mirrored_clips_are_upright(tmp_path: Path, degrees: int, mirrored: bool) -> None:
    # What is stored is the upright picture with the mirroring, then the turn, undone.
    upright = quarters(96, 64)
    stored = np.rot90(np.fliplr(upright) if mirrored else upright, -degrees // 90)
    video = decode(
        film(tmp_path / "a.mp4", [np.ascontiguousarray(stored)] * 4, turn=(degrees, mirrored)), Decoding(None, (48, 32))
    )
    assert video.frames.shape == (4, 48, 32, 3)
    np.testing.assert_allclose(corners(video.frames[1]), corners(upright), atol=12)
    assert video.notes == ()


def test_odd_turn_is_rejected(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", [quarters()] * 4, turn=(30, False))
    with pytest.raises(ZooError, match=r"a\.mp4: it is to be shown turned by (29|30) degrees; only quarter turns"):
        decode(path, SETTINGS)


@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2)])
def test_pixels_that_are_not_square_are_made_square(tmp_path: Path, aspect: Fraction) -> None:
    # A disc as it looks on the screen, stored with pixels of the given shape.
    height, width = 64, int(64 / aspect)
    y, x = np.mgrid[:height, :width]
    disc = ((y - 31.5) / 20) ** 2 + ((x - (width - 1) / 2) * float(aspect) / 20) ** 2 <= 1
    picture = np.where(disc[..., None], np.uint8(240), np.uint8(10)).repeat(3, -1)
    video = decode(film(tmp_path / "a.mp4", [picture] * 4, aspect=aspect), Decoding(None, (64, 64)))
    shown = video.frames[1, ..., 0] > 125
    assert abs(int(shown.any(0).sum()) - int(shown.any(1).sum())) <= 2
    assert abs(int(shown.any(0).sum()) - 40) <= 2


def test_pixels_of_an_absurd_shape_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"its pixels are 20 times as wide as high; 0\.1 to 10 are allowed"):
        decode(film(tmp_path / "a.mp4", [quarters()] * 4, aspect=Fraction(20)), SETTINGS)


@pytest.mark.parametrize("degrees", [0, 90, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_turned_clips_with_pixels_that_are_not_square_are_upright(tmp_path: Path, degrees: int, mirrored: bool) -> None:
    # The aspect is that of the stored pixels, before the turn: every second stored column is left out.
    y, x = np.mgrid[:64, :64]
    disc = np.where(((y - 31.5) ** 2 + (x - 31.5) ** 2 <= 400)[..., None], np.uint8(240), np.uint8(10)).repeat(3, -1)
    stored = np.rot90(np.fliplr(disc) if mirrored else disc, -degrees // 90)[:, ::2]
    path = film(tmp_path / "a.mp4", [np.ascontiguousarray(stored)] * 3, turn=(degrees, mirrored), aspect=Fraction(2))
    shown = decode(path, Decoding(None, (64, 64))).frames[1, ..., 0] > 125
    assert abs(int(shown.any(0).sum()) - 40) <= 2
    assert abs(int(shown.any(1).sum()) - 40) <= 2


# Which stream


def two_streams(path: Path, first: np.ndarray, second: np.ndarray, frames: tuple[int, int], **flags: Any) -> Path:
    with av.open(str(path), "w") as output:
        streams = []
        for picture in (first, second):
            stream = output.add_stream("libx264", rate=24)
            stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
            streams.append(stream)
        for number, flag in flags.get("flags", {}).items():
            streams[number].disposition = flag
        for stream, picture, count in zip(streams, (first, second), frames, strict=True):
            for _ in range(count):
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            output.mux(stream.encode())
    return path


def cover(path: Path, film_too: bool = True) -> Path:
    """An mp4 whose first stream is a picture marked as its cover, larger than the film."""
    with av.open(str(path), "w") as output:
        picture = output.add_stream("mjpeg", rate=1)
        picture.height, picture.width, picture.pix_fmt = 256, 256, "yuvj420p"
        picture.disposition = Disposition.attached_pic
        stream = output.add_stream("libx264" if film_too else "aac", rate=24 if film_too else 8000)
        if film_too:
            stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        output.mux(picture.encode(av.VideoFrame.from_ndarray(np.full((256, 256, 3), RED, np.uint8), format="rgb24")))
        output.mux(picture.encode())
        for _ in range(8):
            if film_too:
                frame: Any = av.VideoFrame.from_ndarray(np.full((64, 64, 3), GREEN, np.uint8), format="rgb24")
            else:
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                frame.sample_rate = 8000
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def test_cover_picture_is_not_decoded_as_the_film(tmp_path: Path) -> None:
    video = decode(cover(tmp_path / "a.mp4"), SETTINGS)
    assert len(video.frames) == 8
    np.testing.assert_allclose(video.frames[3].mean((0, 1)), GREEN, atol=12)


def test_music_with_a_cover_picture_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="it has no video stream, only a cover picture"):
        decode(cover(tmp_path / "a.mp4", film_too=False), SETTINGS)


@pytest.mark.parametrize(
    ("suffix", "sizes", "frames", "flags"),
    [
        ("mkv", (32, 64), (8, 8), {0: Disposition(0), 1: Disposition(0)}),  # the larger
        ("mkv", (64, 32), (8, 8), {0: Disposition(0), 1: Disposition.default}),  # the default one
        ("mkv", (64, 32), (1, 8), {0: Disposition.default, 1: Disposition(0)}),  # the one that is no single picture
        # In an MP4 file the first stream is always the default one.
        ("mp4", (64, 32), (1, 8), {0: Disposition.default, 1: Disposition(0)}),
    ],
)
def test_best_stream_is_chosen_and_named(
    tmp_path: Path, suffix: str, sizes: tuple[int, int], frames: tuple[int, int], flags: dict[int, Any]
) -> None:
    pictures = [np.full((size, size, 3), colour, np.uint8) for size, colour in zip(sizes, (RED, GREEN), strict=True)]
    path = two_streams(tmp_path / f"a.{suffix}", *pictures, frames, flags=flags)
    video = decode(path, SETTINGS)
    assert len(video.frames) == 8
    np.testing.assert_allclose(video.frames[3].mean((0, 1)), GREEN, atol=12)
    assert any("it has 2 video streams; number 1 is taken" in note for note in video.notes)


def test_first_of_two_equal_streams_is_chosen_and_named(tmp_path: Path) -> None:
    pictures = [np.full((64, 64, 3), colour, np.uint8) for colour in (RED, GREEN)]
    flags = {0: Disposition(0), 1: Disposition(0)}
    video = decode(two_streams(tmp_path / "a.mkv", *pictures, (8, 8), flags=flags), SETTINGS)
    np.testing.assert_allclose(video.frames[3].mean((0, 1)), RED, atol=12)
    assert any("it has 2 video streams; number 0 is taken" in note for note in video.notes)


# Times


@pytest.mark.parametrize("fps", [None, 8.0, 24.0])
@pytest.mark.parametrize(("suffix", "times"), [("ts", 3), ("mpg", 3), ("mkv", 2)])
def test_joined_recordings_keep_all_their_frames(tmp_path: Path, suffix: str, times: int, fps: float | None) -> None:
    pictures = [np.full((64, 96, 3), 20 + 4 * n, np.uint8) for n in range(48)]
    part = write(tmp_path / f"part.{suffix}", pictures, "mpeg2video" if suffix == "mpg" else "libx264")
    joined = tmp_path / f"a.{suffix}"
    joined.write_bytes(part.read_bytes() * times)
    video, alone = (decode(path, Decoding(fps, (32, 32))) for path in (joined, part))
    assert len(video.frames) == times * len(alone.frames)
    # In their order: every part rises from dark to light.
    levels = video.frames.mean((1, 2, 3)).reshape(times, -1)
    assert (np.diff(levels, axis=1) > 0).all()
    if suffix != "mpg":  # whose parts have hardly any times
        assert any("its times go back at 2.00 s" in note for note in video.notes)


@pytest.mark.parametrize(
    ("suffix", "codec", "times"),
    [
        ("mp4", "libx264", 2),
        ("mov", "libx264", 2),
        ("flv", "flv", 2),
        ("mkv", "libx264", 3),
        ("wmv", "wmv2", 2),
        ("ivf", "libvpx", 2),
    ],
)
def test_joined_recordings_that_no_player_reads_are_named(tmp_path: Path, suffix: str, codec: str, times: int) -> None:
    part = write(tmp_path / f"a.{suffix}", plain(RED, 24), codec)
    assert decode(part, SETTINGS).notes == ()
    part.write_bytes(part.read_bytes() * times)
    assert any("another recording, joined to the first, and not read" in note for note in decode(part, SETTINGS).notes)


@pytest.mark.parametrize("second", ["mkv", "ts", "mpg", "h264"])
@pytest.mark.parametrize("first", ["mp4", "mkv", "avi", "mov"])
def test_recording_of_another_format_at_the_end_is_named(tmp_path: Path, first: str, second: str) -> None:
    codecs = {"mpg": "mpeg2video", "avi": "mpeg4"}
    parts = [
        write(tmp_path / f"{n}.{kind}", plain(RED, 24), codecs.get(kind, "libx264"))
        for n, kind in enumerate((first, second))
    ]
    size = parts[0].stat().st_size
    parts[0].write_bytes(parts[0].read_bytes() + parts[1].read_bytes())
    video = decode(parts[0], SETTINGS)
    if first == second:  # Matroska files may follow each other
        assert len(video.frames) == 48
        return
    share = re.search(r"the last ([\d.]+)% of the file", " ".join(video.notes))
    assert share is not None
    assert abs(float(share[1]) / 100 - (1 - size / parts[0].stat().st_size)) < 0.006


@pytest.mark.parametrize("first", ["mp4", "mkv", "avi"])
def test_unused_space_at_the_end_is_no_loss(tmp_path: Path, first: str) -> None:
    path = write(tmp_path / f"a.{first}", plain(RED, 24), "mpeg4")
    path.write_bytes(path.read_bytes() + bytes(10_000))
    assert decode(path, SETTINGS).notes == ()


def test_recording_whose_streams_begin_later_is_named(tmp_path: Path) -> None:
    # The second recording has other stream numbers, as broadcasts have that gain a sound track on the way.
    first, second = (write(tmp_path / name, plain(RED, 24)) for name in ("a.m2ts", "b.ts"))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    video = decode(first, SETTINGS)
    assert len(video.frames) == 24
    assert any("streams that begin within the file and are not read" in note for note in video.notes)


@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "libx264"), ("flv", "flv"), ("mp4", "libx264")])
@pytest.mark.parametrize("late", [1, 5])
def test_recording_that_begins_late_keeps_all_frames_at_its_own_rate(
    tmp_path: Path, suffix: str, codec: str, late: int
) -> None:
    # At 24 frames a second the first time is rounded to milliseconds too, in another direction than the others.
    path = film(tmp_path / f"a.{suffix}", plain(RED, 30), codec=codec, times=range(late, late + 30))
    assert decode(path, Decoding(24, (32, 32))).source == tuple(range(30))


def test_h264_in_avi_keeps_all_frames_at_its_own_rate(tmp_path: Path) -> None:
    # AVI stores no times of presentation, so those of reordered frames go back and forth.
    path = ramp(tmp_path / "a.avi", 48, 4)
    assert decode(path, Decoding(24, (32, 32))).source == tuple(range(48))
    assert len(decode(path, Decoding(8, (32, 32))).source) in (16, 17)


def test_uneven_times_are_sampled_by_time(tmp_path: Path) -> None:
    times = [*range(24), *range(24, 72, 6), *range(72, 96)]  # 24, then 4, then 24 frames a second
    path = film(tmp_path / "a.mp4", [np.full((64, 64, 3), 20 + 2 * n, np.uint8) for n in range(56)], times=times)
    video = decode(path, Decoding(4, (32, 32)))
    assert [times[number] for number in video.source] == list(range(0, 96, 6))


def test_frames_after_a_gap_are_sampled_by_time(tmp_path: Path) -> None:
    times = [*range(24), *range(72, 96)]  # two seconds without a frame
    path = film(tmp_path / "a.mp4", [np.full((64, 64, 3), 20 + 2 * n, np.uint8) for n in range(48)], times=times)
    video = decode(path, Decoding(4, (32, 32)))
    assert [times[number] for number in video.source] == [0, 6, 12, 18, 72, 78, 84, 90]


# Cuts


@pytest.mark.parametrize(("rate", "seconds"), [(5, 2.0), (10, 1.0), (24, 1.0), (60, 1.0), (120, 1.0)])
@pytest.mark.parametrize("detector", ["content", "adaptive"])
def test_shots_are_separated_by_their_seconds(tmp_path: Path, rate: int, seconds: float, detector: str) -> None:
    length = int(rate * seconds)
    pictures = [p for colour in (*COLOURS, WHITE) for p in plain(colour, length)]
    video = decode(write(tmp_path / "a.mp4", pictures, rate=rate), Decoding(None, (32, 48), detector))
    assert video.cuts == (0, length, 2 * length, 3 * length)


def test_flashes_are_no_shots_at_a_high_rate(tmp_path: Path) -> None:
    # At 60 frames a second 20 frames are a third of a second: above 15 frames, below 0.6 s.
    lengths = [90, 20, 90]
    pictures = [p for colour, n in zip(COLOURS, lengths, strict=True) for p in plain(colour, n)]
    assert len(decode(write(tmp_path / "a.mp4", pictures, rate=60), SETTINGS).cuts) == 2


def test_cuts_of_uneven_times_are_counted_in_seconds(tmp_path: Path) -> None:
    # Four shots of 2 s, of 6 frames each, although the file has stretches at 24 frames a second.
    times = [n + start for start in (0, 48, 96, 144) for n in (0, 1, 2, 12, 24, 36)]
    pictures = [p for colour in (*COLOURS, WHITE) for p in plain(colour, 6)]
    video = decode(film(tmp_path / "a.mp4", pictures, times=times), SETTINGS)
    assert video.cuts == (0, 6, 12, 18)


# Damage


def damaged(path: Path, start: float = 0.5, stop: float = 0.53) -> Path:
    data = bytearray(path.read_bytes())
    first, last = int(len(data) * start), int(len(data) * stop)
    data[first:last] = np.random.default_rng(1).integers(0, 256, last - first, dtype=np.uint8).tobytes()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.ts", "libx264"),
        pytest.param("a.mkv", "libx264", marks=pytest.mark.slow),
        pytest.param("a.webm", "libvpx-vp9", marks=pytest.mark.slow),
        ("a.avi", "mpeg4"),
        pytest.param("a.mpg", "mpeg2video", marks=pytest.mark.slow),
    ],
)
def test_damage_in_the_middle_is_placed_and_the_rest_is_used(tmp_path: Path, name: str, codec: str) -> None:
    pictures = busy(120)
    path = film(tmp_path / name, pictures, codec=codec, gop=12)
    whole = decode(path, Decoding(None, (64, 96)))
    assert whole.notes == ()
    video = decode(damaged(path), Decoding(None, (64, 96)))
    assert 80 <= len(video.frames) < 120
    said = " ".join(video.notes)
    assert " s to " in said, said
    # Every frame that is used is one of the undamaged file.
    known = whole.frames.astype(np.int16)
    for frame in video.frames[::5]:
        assert np.abs(known - frame).mean((1, 2, 3)).min() < 3


def test_damage_at_the_end_is_placed(tmp_path: Path) -> None:
    path = film(tmp_path / "a.ts", busy(120), gop=12)
    video = decode(damaged(path, 0.9, 1.0), SETTINGS)
    assert len(video.frames) < 116
    assert any(re.search(r"frames from 4\.\d\d s to the end are lost", note) for note in video.notes), video.notes


def test_many_damaged_places_are_counted(tmp_path: Path) -> None:
    path = film(tmp_path / "a.ts", busy(120), gop=6)
    for start in (0.1, 0.25, 0.4, 0.55, 0.7, 0.85):
        damaged(path, start, start + 0.02)
    notes = decode(path, SETTINGS).notes
    assert sum("are lost:" in note for note in notes) == 3
    assert any(re.fullmatch(r"frames are lost in (1 later place|[2-4] later places) too", note) for note in notes), (
        notes
    )


def test_damage_before_the_first_key_frame_is_placed(tmp_path: Path) -> None:
    path = film(tmp_path / "a.ts", busy(60), gop=12)
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 3 // 188 * 188 :])  # a recording that begins between key frames
    video = decode(path, SETTINGS)
    assert 20 < len(video.frames) < 60


@pytest.mark.parametrize(
    ("name", "codec", "said"),
    [
        ("a.mp4", "libx264", r"its header promises 120 frames, \d+ could be used"),
        ("a.avi", "mpeg4", r"its header promises 120 frames, \d+ could be used"),
        ("a.mkv", "libx264", r"its header promises 5\.00 s, its last frame ends at [12]\.\d\d s"),
        ("a.webm", "libvpx-vp9", r"its header promises 5\.00 s, its last frame ends at [12]\.\d\d s"),
    ],
)
def test_file_that_is_cut_short_says_what_is_missing(tmp_path: Path, name: str, codec: str, said: str) -> None:
    settings = {"movflags": "faststart"} if name.endswith("mp4") else None
    path = film(tmp_path / name, busy(120), codec=codec, gop=12, container=settings)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 5])
    video = decode(path, SETTINGS)
    assert 12 <= len(video.frames) < 100
    assert any(re.search(said, note) for note in video.notes), video.notes


def test_empty_and_tiny_files(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(ZooError, match=r"empty\.mp4: it is empty"):
        decode(tmp_path / "empty.mp4", SETTINGS)
    (tmp_path / "head.mp4").write_bytes(write(tmp_path / "a.mp4", [quarters()] * 4).read_bytes()[:40])
    with pytest.raises(ZooError, match=r"head\.mp4: it cannot be decoded"):
        decode(tmp_path / "head.mp4", SETTINGS)
    video = decode(write(tmp_path / "one.mp4", [quarters()]), SETTINGS)
    assert (video.source, video.cuts, len(video.frames)) == ((0,), (0,), 1)


def test_hdr_and_interlaced_files_say_what_is_not_done(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as output:
        stream = output.add_stream("libx264", rate=24, options={"x264-params": "interlaced=1"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p10le"
        stream.codec_context.color_trc = 16
        for _ in range(4):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(quarters(), format="rgb24")))
        output.mux(stream.encode())
    video = decode(tmp_path / "a.mkv", SETTINGS)
    assert any("is HDR (PQ)" in note for note in video.notes)
    assert any("frames are interlaced" in note for note in video.notes)
    np.testing.assert_allclose(corners(video.frames[1]), corners(quarters()), atol=12)


@pytest.mark.parametrize("full", [False, True])
def test_full_and_limited_range_give_the_same_colours(tmp_path: Path, full: bool) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as output:
        stream = output.add_stream("libx264", rate=24, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.color_range = 2 if full else 1
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(quarters(), format="rgb24")
            output.mux(stream.encode(frame.reformat(format="yuv420p", dst_color_range=2 if full else 1)))
        output.mux(stream.encode())
    shown = decode(tmp_path / "a.mkv", SETTINGS).frames[1]
    np.testing.assert_allclose(corners(shown), corners(quarters()), atol=6)


def test_name_with_a_colon_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "clip.mp4", plain(RED, 4)).rename(tmp_path / "scene:01.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(decode(Path("scene:01.mp4"), SETTINGS).frames) == 4


# Memory and cache


def in_fork(target: Any, *arguments: Any) -> Any:
    """A process that runs `target`; forked, because the imports take longer than the work."""
    gc.collect()  # a fork must not free the decoders of this process
    process = get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def peaks(short: Path, long: Path, cache: Path, told: Any) -> None:
    """Tell by how many KiB the peak rises with each use of a video."""

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    marks = [peak()]
    for path, folder in ((short, None), (long, None), (long, cache), (long, cache)):
        video = load(path, Decoding(None, (240, 320)), folder)
        for start in range(0, len(video.frames), len(video.frames) // 8):
            video.frames[start : start + 4].mean()
        marks.append(peak())
    told.send(np.diff(marks).tolist())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_a_video(tmp_path: Path) -> None:
    short, long = (
        write(tmp_path / f"{seconds}.mp4", plain(RED, 10 * seconds, 240, 320), "mpeg4", rate=10)
        for seconds in (20, 120)
    )
    here, there = get_context("fork").Pipe()
    process = in_fork(peaks, short, long, tmp_path / "cache", there)
    first, *more = here.recv()
    process.join()
    # The frames of the long one take 276 MB.
    assert first < 150_000
    assert max(more) < 25_000


@pytest.mark.slow
def test_killed_decoder_leaves_no_entry_and_nothing_in_the_way(tmp_path: Path) -> None:
    path, cache, settings = (
        write(tmp_path / "a.mp4", busy(600), "mpeg4"),
        tmp_path / "cache",
        Decoding(None, (128, 192)),
    )
    process = in_fork(load, path, settings, cache)
    while process.is_alive() and sum(file.stat().st_size for file in cache.glob("*.unfinished")) < 1_000_000:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [*cache.glob("*.unfinished")]
    assert not [*cache.glob("*.npy"), *cache.glob("*.json")]
    assert len(load(path, settings, cache).frames) == 600
    assert sorted(file.suffix for file in cache.iterdir()) == [".json", ".npy"]


def count_decodings(path: Path, cache: Path, counted: Path) -> None:
    original = decoding.decode

    def counting(*given: Any) -> Video:
        with counted.open("a") as file:
            file.write("decoded ")
        return original(*given)

    decoding.decode = counting
    assert len(load(path, Decoding(None, (64, 96)), cache).frames) == 200


@pytest.mark.slow
def test_processes_share_one_decoding(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", busy(200), "mpeg4")
    runs = [in_fork(count_decodings, path, tmp_path / "cache", tmp_path / "count") for _ in range(3)]
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "decoded "
    assert sorted(file.suffix for file in (tmp_path / "cache").iterdir()) == [".json", ".npy"]


def test_notes_are_kept_in_the_cache(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mkv", busy(120), gop=12)
    damaged(path)
    first, again = (load(path, SETTINGS, tmp_path / "cache") for _ in range(2))
    assert first.notes == again.notes != ()
    facts = json.loads(next((tmp_path / "cache").glob("*.json")).read_text())
    assert facts["notes"] == list(first.notes)


def test_failed_decoding_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(ZooError):
        load(tmp_path / "a.mp4", SETTINGS, tmp_path / "cache")
    assert not os.listdir(tmp_path / "cache")
