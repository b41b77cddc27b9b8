"""Folders of video files as films: real shots, in order, with their captions."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric

from datamodules.captions import Caption, read_captions
from datamodules.decoding import DETECTORS, Decoding, Video, load
from datamodules.discovery import find_videos, resolve
from datamodules.loading import Batch, ResumableLoader, train_loader, val_loader
from datamodules.text import tokenize, words
from sparse_zoo.errors import ZooError, refuse, unknown
from sparse_zoo.layout import Layout, Shot

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Span:
    """Frames [start, stop) of `video` that belong to shot number `shot` of it and to one split."""

    video: Video
    shot: int
    start: int
    stop: int
    text: Tensor


@dataclass(frozen=True)
class VideoFilm:
    """Consecutive shots of one video, with the ids of the video's caption."""

    name: str
    caption: Tensor
    spans: tuple[Span, ...]


class VideoFilms(LightningDataModule):
    """Films of real shots, from video files that PyAV can decode, cut where PySceneDetect detects a cut.

    A video gives films of `shots_per_film` consecutive shots, so that a clip without a cut is a film of one shot. A
    shot gives the film at most `frames_per_shot` frames: in training a window at a random place, in validation its
    first frames. The last `val_fraction` of every shot's frames are for validation, in whole temporal patches, and no
    frame is in both splits. A shot too short to serve both is for training alone. A shot shorter than one temporal
    patch is dropped, and counted in `summary()`.

    A batch is `films_per_batch` films packed into one stream (B = 1). An epoch is `films_per_epoch` films (by default
    each film once; the last batch may be smaller), in an order that is a function of `seed` and the epoch.

    Args:
        folder: a folder (searched recursively), a video file, "package:name/inside" for files of an installed package,
            or a list of these.
        fps: frames a second to keep; None keeps all. A slower file keeps its own rate.
        size: (height, width) in pixels; frames are resized with their aspect kept, then centre-cropped.
        patch: (frames, rows, cols) of one token; `size` and `frames_per_shot` are in whole patches.
        frames_per_shot: frames that a shot gives to a film, at most.
        shots_per_film: consecutive shots of a film.
        films_per_batch: films packed into one stream.
        films_per_epoch: films of an epoch; by default each film once.
        val_fraction: share of every shot's frames, its last ones, that is for validation.
        detector: "content" or "adaptive", of PySceneDetect; see `threshold`.
        threshold: of the detector; None is PySceneDetect's default (27 for "content", 3 for "adaptive").
        captions: JSON file, {"a/file.mp4": {"caption": "of the whole", "shots": ["of each shot found", ...]}} by name
            inside `folder`; by default `captions.json` in each folder, where there is one. No entry means no text.
        max_words: words kept of each caption; see `datamodules.text` for how they become ids.
        vocabulary: number of token ids.
        cache: folder for decoded frames, which are then read from disk as needed; None keeps them in a temporary file.
        on_bad: "raise", or "skip" videos that cannot be decoded and list them in `summary()`.
        flip: in training, mirror half of the films left to right; captions that say "left" or "right" become false.
        num_workers: processes that make batches; with 0 the training process makes them.
        seed: fixes the order of the films and the windows in training.

    Raises:
        ZooError: For settings out of range (all at once), nothing to decode, bad captions or videos.
    """

    channels = 3

    def __init__(
        self,
        folder: str | Sequence[str],
        *,
        fps: float | None = 8.0,
        size: Sequence[int] = (64, 96),
        patch: Sequence[int] = (1, 8, 8),
        frames_per_shot: int = 8,
        shots_per_film: int = 8,
        films_per_batch: int = 1,
        films_per_epoch: int | None = None,
        val_fraction: float = 0.25,
        detector: str = "content",
        threshold: float | None = None,
        captions: str | None = None,
        max_words: int = 16,
        vocabulary: int = 1024,
        cache: str | None = None,
        on_bad: str = "raise",
        flip: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sized = len(size) == 2 and len(patch) == 3 and min(*size, *patch) >= 1
        counts = {
            "frames_per_shot": frames_per_shot,
            "shots_per_film": shots_per_film,
            "films_per_batch": films_per_batch,
            "max_words": max_words,
            "vocabulary": vocabulary,
        } | ({} if films_per_epoch is None else {"films_per_epoch": films_per_epoch})
        refuse(
            "VideoFilms",
            [f"{name} must be at least 1, got {value}" for name, value in counts.items() if value < 1]
            + [
                f"{name} must be at least 0, got {value}"
                for name, value in _below(0, seed=seed, num_workers=num_workers)
            ]
            + [
                "" if sized else f"size must be 2 and patch 3 lengths of at least 1, got {[*size]} and {[*patch]}",
                f"size {[*size]} is not in whole patches of {[*patch[1:]]}"
                if sized and (size[0] % patch[1] or size[1] % patch[2])
                else "",
                f"frames_per_shot {frames_per_shot} is not in whole patches of {patch[0]} frames"
                if sized and frames_per_shot % patch[0]
                else "",
                f"fps must be above 0, or null for all frames, got {fps}" if fps is not None and fps <= 0 else "",
                f"val_fraction must be between 0 and 1, got {val_fraction}" if not 0 < val_fraction < 1 else "",
                f"threshold must be above 0, got {threshold}" if threshold is not None and threshold <= 0 else "",
                unknown("detector", detector, DETECTORS) if detector not in DETECTORS else "",
                unknown("on_bad", on_bad, ("raise", "skip")) if on_bad not in ("raise", "skip") else "",
                "folder must name at least one folder or file" if not folder else "",
            ],
        )
        self.places = [folder] if isinstance(folder, str) else list(folder)
        self.decoding = Decoding(fps, (size[0], size[1]), detector, threshold)
        self.patch = (patch[0], patch[1], patch[2])
        self.frames_per_shot = frames_per_shot
        self.shots_per_film = shots_per_film
        self.films_per_batch = films_per_batch
        self.films_per_epoch = films_per_epoch
        self.val_fraction = val_fraction
        self.captions = captions
        self.max_words = max_words
        self.vocabulary = vocabulary
        self.cache = None if cache is None else resolve(cache)
        self.on_bad = on_bad
        self.flip = flip
        self.num_workers = num_workers
        self.seed = seed
        self.videos: dict[str, Video] = {}
        self.skipped: list[dict[str, str]] = []
        self.notes: list[str] = []
        self.unused_captions: list[str] = []
        self.dropped_shots = 0
        self.train_films: list[VideoFilm] = []
        self.val_films: list[VideoFilm] = []

    def prepare_data(self) -> None:
        """Decode into the cache, if there is one."""
        # Lightning calls this in one process only: with a cache, the others find the files decoded.
        if self.cache is not None:
            self.setup()

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002  # Lightning passes it by name
        """Decode everything and cut it into films; further calls do nothing."""
        if self.videos:
            return
        self.notes = []
        caption_files = self._caption_files()
        discovery = find_videos(self.places, caption_files)
        self._note(*discovery.notes)
        captions = read_captions(caption_files, discovery.files)  # before decoding, which takes long
        self._note(*captions.notes)
        self.unused_captions = captions.unmatched
        videos: dict[str, Video] = {}
        self.skipped = []
        for name, path in discovery.files.items():
            try:
                videos[name] = load(path, self.decoding, self.cache)
            except ZooError as error:
                if self.on_bad == "raise":
                    raise
                reason = str(error).removeprefix(f"{path}: ")
                self.skipped.append({"path": str(path), "reason": reason})
                self._note(f"{name}: skipped: {reason}")
            else:
                self._note(*(f"{name}: {line}" for line in videos[name].notes))
        # Decoders have threads: a loader's forked process, which lacks them, crashes where it frees one.
        gc.collect()
        if not videos:
            refuse("VideoFilms: every video was skipped", [f"{bad['path']}: {bad['reason']}" for bad in self.skipped])
        self.train_films, self.val_films, self.dropped_shots = [], [], 0
        for name, video in videos.items():
            self._cut(name, video, captions.by_video.get(name, Caption()))
        texts = [text for name in videos for text in captions.by_video.get(name, Caption()).texts()]
        too_long = sum(len(words(text)) > self.max_words for text in texts)
        self._note(
            f"{too_long} captions are longer than max_words {self.max_words} and cut there" if too_long else "",
            f"{self.dropped_shots} shots are shorter than a temporal patch ({self.patch[0]} frames at fps "
            f"{self.decoding.fps}) and dropped"
            if self.dropped_shots
            else "",
        )
        longest = max(stop - start for video in videos.values() for start, stop in video.shots())
        refuse(
            "VideoFilms",
            [
                f"no shot gives {self.patch[0]} frames to training and as many to validation (val_fraction "
                f"{self.val_fraction}); the longest of the {len(videos)} videos' shots has {longest} frames at fps "
                f"{self.decoding.fps}"
            ]
            if not self.val_films
            else [],
        )
        self.videos = videos

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled training films."""
        films = _Split(self, self.train_films, training=True)
        return train_loader(films, self.films_per_batch, self.seed, self.num_workers, self.trainer)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation films, always in the same order."""
        return val_loader(_Split(self, self.val_films, training=False), self.films_per_batch, self.num_workers)

    def sample_metrics(self) -> dict[str, Metric]:
        """No metrics: the truth of real films is not known."""
        return {}

    def summary(self) -> dict[str, Any]:
        """What was found, decoded, dropped and skipped, ready for JSON. Frames are counted after sampling at `fps`."""
        self.setup()
        return {
            split: {
                "films": len(films),
                "shots": sum(len(film.spans) for film in films),
                "frames": sum(span.stop - span.start for film in films for span in film.spans),
            }
            for split, films in (("train", self.train_films), ("validation", self.val_films))
        } | {
            "videos": {
                name: {"frames": len(video.source), "rate": video.rate, "cuts": list(video.cuts)}
                for name, video in self.videos.items()
            },
            "dropped_shots": self.dropped_shots,
            "captions_without_video": self.unused_captions,
            "skipped": self.skipped,
            "notes": self.notes,
        }

    def _note(self, *lines: str) -> None:
        """Log what the data loses, and keep it for `summary()`."""
        for line in filter(None, lines):
            self.notes.append(line)
            _warn(line)

    def _caption_files(self) -> list[Path]:
        if self.captions is not None:
            return [resolve(self.captions)]
        beside = (resolve(place) / "captions.json" for place in self.places)
        return [path for path in beside if path.is_file()]

    def _cut(self, name: str, video: Video, caption: Caption) -> None:
        """Add the films of one video to both splits."""
        shots, shot_captions = video.shots(), caption.shots
        if shot_captions is not None and len(shot_captions) != len(shots):
            raise ZooError(
                f"{name}: it has captions for {len(shot_captions)} shots, but {len(shots)} were found, beginning at "
                f"its frames {list(video.cuts)}; change the captions, the detector or its threshold"
            )
        unit = self.patch[0]
        kept = []
        for number, (start, stop) in enumerate(shots):
            length = (stop - start) // unit * unit
            if length == 0:
                self.dropped_shots += 1
                continue
            text = tokenize(shot_captions[number] if shot_captions else "", self.vocabulary, self.max_words)
            held = max(unit, round(length * self.val_fraction / unit) * unit)
            held = min(held, length - unit)
            middle = start + length - held
            kept.append((Span(video, number, start, middle, text), Span(video, number, middle, start + length, text)))
        for first in range(0, len(kept), self.shots_per_film):
            group = kept[first : first + self.shots_per_film]
            title = name if len(group) == len(shots) else f"{name} shots {group[0][0].shot}-{group[-1][0].shot}"
            words = tokenize(caption.whole, self.vocabulary, self.max_words)
            self.train_films.append(VideoFilm(title, words, tuple(train for train, _ in group)))
            held_spans = tuple(val for _, val in group if val.stop > val.start)
            if held_spans:
                self.val_films.append(VideoFilm(title, words, held_spans))


class _Split:
    """One split of a `VideoFilms`; film number n is film n % len(films), its windows drawn by (seed, n)."""

    def __init__(self, data: VideoFilms, films: Sequence[VideoFilm], training: bool) -> None:
        self.films = films
        self.training = training
        self.seed = data.seed
        self.flip = data.flip
        self.patch = data.patch
        self.size = data.decoding.size
        self.frames_per_shot = data.frames_per_shot
        self.length = data.films_per_epoch if training and data.films_per_epoch else len(films)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Batch:
        return self.__getitems__([number])

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        films = [(self.films[number % len(self.films)], number) for number in numbers]
        return {
            "layout": Layout.pack([self._layout(film) for film, _ in films]),
            "clips": [clip for film, number in films for clip in self._clips(film, number)],
            "text": torch.cat(
                [ids for film, _ in films for ids in (film.caption, *(span.text for span in film.spans))]
            )[None],
            "names": [film.name for film, _ in films],
        }

    def _layout(self, film: VideoFilm) -> Layout:
        frames, rows, cols = self.patch
        shots = [
            Shot(self._frames(span) // frames, self.size[0] // rows, self.size[1] // cols, len(span.text))
            for span in film.spans
        ]
        return Layout.film(shots, caption=len(film.caption))

    def _frames(self, span: Span) -> int:
        return min(span.stop - span.start, self.frames_per_shot)

    def _clips(self, film: VideoFilm, number: int) -> Iterator[Tensor]:
        draw = np.random.default_rng([self.seed, number])
        mirrored = self.training and self.flip and draw.random() < 0.5
        for span in film.spans:
            frames = self._frames(span)
            start = span.start + (int(draw.integers(span.stop - span.start - frames + 1)) if self.training else 0)
            clip = torch.tensor(np.asarray(span.video.frames[start : start + frames])).permute(0, 3, 1, 2)[None]
            yield (clip.flip(-1) if mirrored else clip).float().div(127.5).sub(1)


def _below(least: int, **values: int) -> list[tuple[str, int]]:
    return [(name, value) for name, value in values.items() if value < least]


@rank_zero_only
def _warn(line: str) -> None:
    _log.warning("data: %s", line)
