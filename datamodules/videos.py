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
from datamodules.decoding import Decoding, Video, load
from datamodules.discovery import find_videos, resolve
from datamodules.loading import Batch, ResumableLoader, train_loader, val_loader
from datamodules.settings import VideoFilmsSettings
from datamodules.text import tokenize, words
from sparse_zoo.errors import ZooError, refuse
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
    caption: str


@dataclass(frozen=True)
class VideoFilm:
    """Consecutive shots of one video, with the video's caption and its ids."""

    name: str
    text: Tensor
    caption: str
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

    Captions are a JSON file, {"a/file.mp4": {"caption": "of the whole", "shots": ["of each shot found", ...]}}, by
    name inside `folder`; a video without an entry has no text. `datamodules.text` says how words become ids.

    Args:
        folder: Folder, video file, "package:name/inside" for files of an installed package, or a list of these.
        **settings: Further fields of `VideoFilmsSettings`.

    Raises:
        ZooError: For settings out of range (all at once), nothing to decode, bad captions or videos.
    """

    channels = 3

    def __init__(self, folder: str | Sequence[str], **settings: Any) -> None:
        super().__init__()
        given = VideoFilmsSettings(folder=folder, **settings)
        size, patch, cache = given.size, given.patch, given.cache
        self.places = [folder] if isinstance(folder, str) else list(folder)
        self.decoding = Decoding(given.fps, (size[0], size[1]), given.detector, given.threshold)
        self.patch = (patch[0], patch[1], patch[2])
        self.frames_per_shot = given.frames_per_shot
        self.shots_per_film = given.shots_per_film
        self.films_per_batch = given.films_per_batch
        self.films_per_epoch = given.films_per_epoch
        self.val_fraction = given.val_fraction
        self.captions = given.captions
        self.max_words = given.max_words
        self.vocabulary = given.vocabulary
        self.cache = None if cache is None else resolve(cache)
        self.on_bad = given.on_bad
        self.flip = given.flip
        self.num_workers = given.num_workers
        self.seed = given.seed
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
            own = shot_captions[number] if shot_captions else ""
            said = tokenize(own, self.vocabulary, self.max_words), own
            held = max(unit, round(length * self.val_fraction / unit) * unit)
            held = min(held, length - unit)
            middle = start + length - held
            kept.append((Span(video, number, start, middle, *said), Span(video, number, middle, start + length, *said)))
        for first in range(0, len(kept), self.shots_per_film):
            group = kept[first : first + self.shots_per_film]
            title = name if len(group) == len(shots) else f"{name} shots {group[0][0].shot}-{group[-1][0].shot}"
            whole = tokenize(caption.whole, self.vocabulary, self.max_words), caption.whole
            self.train_films.append(VideoFilm(title, *whole, tuple(train for train, _ in group)))
            held_spans = tuple(val for _, val in group if val.stop > val.start)
            if held_spans:
                self.val_films.append(VideoFilm(title, *whole, held_spans))


class _Split:
    """One split of a `VideoFilms`; film number n is film n % len(films), its windows drawn by (seed, n)."""

    def __init__(self, data: VideoFilms, films: Sequence[VideoFilm], training: bool) -> None:
        self.films = films
        self.training = training
        self.seed = data.seed
        self.flip = data.flip
        self.patch = data.patch
        self.size, self.fps = data.decoding.size, data.decoding.fps
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
            "text": torch.cat([ids for film, _ in films for ids in (film.text, *(span.text for span in film.spans))])[
                None
            ],
            "names": [film.name for film, _ in films],
            "rates": [min(self.fps or rate, rate) for film, _ in films if (rate := film.spans[0].video.rate)],
            "captions": [[film.caption, *(span.caption for span in film.spans)] for film, _ in films],
        }

    def _layout(self, film: VideoFilm) -> Layout:
        frames, rows, cols = self.patch
        shots = [
            Shot(self._frames(span) // frames, self.size[0] // rows, self.size[1] // cols, len(span.text))
            for span in film.spans
        ]
        return Layout.film(shots, caption=len(film.text))

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


@rank_zero_only
def _warn(line: str) -> None:
    _log.warning("data: %s", line)
