"""Synthetic films that test memory across shots: the appearance of a subject is shown once and never captioned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric

from datamodules.drift import ShotDrift
from datamodules.identities import Identities
from datamodules.loading import Batch, ResumableLoader, train_loader, val_loader
from datamodules.quality import ShotQuality
from datamodules.recall import IdentityRecall
from datamodules.settings import ShotWorldSettings, ends
from sparse_zoo.layout import Layout, Shot

SPLITS = ("train", "validation", "test")
TEXT = 4  # tokens of a caption: the subject's tag, its start cell, its end cell, the background; then of its view


@dataclass(frozen=True)
class Script:
    """The events of one film, by shot (n,).

    Subject number, identity, tag, start and end cell, background, frames, view; the identities (n, k) and cells (n, k)
    of distractors, which introductions show.
    """

    name: str
    subject: np.ndarray[Any, np.dtype[np.int64]]
    identity: np.ndarray[Any, np.dtype[np.int64]]
    tag: np.ndarray[Any, np.dtype[np.int64]]
    start: np.ndarray[Any, np.dtype[np.int64]]
    end: np.ndarray[Any, np.dtype[np.int64]]
    background: np.ndarray[Any, np.dtype[np.int64]]
    frames: np.ndarray[Any, np.dtype[np.int64]]
    view: np.ndarray[Any, np.dtype[np.int64]]
    others: np.ndarray[Any, np.dtype[np.int64]]
    other_cells: np.ndarray[Any, np.dtype[np.int64]]


class ShotWorld(LightningDataModule):
    """Films in which each subject is introduced by a shot of its own and returns later.

    A subject's identity (shape, colour, texture) is sampled for every film and never captioned. A caption has four
    tokens: the subject's tag (sampled for each film), its start cell, its end cell, the background. To generate a
    return, a model must find, by the tag, the shot that introduced the subject. In a shot the subject moves evenly from
    its start to its end cell, in whole patches. Returns show all subjects in random order before any is repeated.

    Settings make it harder: poses, sizes and screens of subjects (a view, whose pose, size and screen the caption names
    by further tokens, each where it can differ), other objects, striped backgrounds that move. Metrics know the view.

    Film n of training is a function of (seed, n), and every epoch has new films; validation and test have films of
    their own, always the same. Films of one shape are stacked (B = `batch_size`). If `subjects` or `frames_per_shot` is
    a range, films differ in shape, and `batch_size` films are packed into one stream (B = 1).

    A batch's "truth", in stream order: "subject" (a number within its film), "identity", "background" and "view", int64
    (B, shots); "position", int64 (B, frames, 2), the top left pixel of the subject's window in each frame. The sample
    metrics need it. "known" tells for each shot of the stream whether it is given where films are judged.

    Args:
        **settings: Fields of `ShotWorldSettings`.

    Raises:
        ZooError: For settings out of range, all at once.
    """

    channels = 3

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        given = ShotWorldSettings(**settings)
        grid, patch, side = given.grid, given.patch, given.subject_size
        lengths = ends(given.frames_per_shot)
        self.identities = Identities(
            given.shapes,
            given.colours,
            given.textures,
            given.backgrounds,
            side * patch[1],
            given.poses,
            given.scales,
            given.screens,
            given.scenery,
        )
        self.subjects = ends(given.subjects)
        self.returns = given.returns
        self.least_subjects = given.least_subjects
        self.lengths = range(lengths[0], lengths[1] + 1, patch[0])
        self.grid = (grid[0], grid[1])
        self.patch = (patch[0], patch[1], patch[2])
        self.cells = (grid[0] - side + 1, grid[1] - side + 1)
        self.tags = given.tags
        self.distractors = given.distractors
        self.judged = given.judged
        self.batch_size = given.batch_size
        self.films_per_epoch = given.films_per_epoch
        self.val_films = given.val_films
        self.test_films = given.test_films
        self.num_workers = given.num_workers
        self.seed = given.seed

    @property
    def vocabulary(self) -> int:
        """Ids for the tags, then the start cells, the end cells, the backgrounds, then poses, scales and screens."""
        return self.tags + 2 * self.cells[0] * self.cells[1] + self.identities.backgrounds + sum(self._views)

    @property
    def _views(self) -> list[int]:
        """How many poses, scales and screens there are, of those that can differ."""
        of = self.identities
        return [count for count in (of.poses, of.scales, of.screens) if count > 1]

    @property
    def stacked(self) -> bool:
        """Whether all films have one shape, so that they are stacked and not packed."""
        return self.subjects[0] == self.subjects[1] and len(self.lengths) == 1

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled training films, new ones in every epoch."""
        films = _Split(self, "train", self.films_per_epoch)
        return train_loader(films, self.batch_size, self.seed, self.num_workers, self.trainer)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation films, always the same."""
        return val_loader(_Split(self, "validation", self.val_films), self.batch_size, self.num_workers)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test films, always the same."""
        return val_loader(_Split(self, "test", self.test_films), self.batch_size, self.num_workers)

    def sample_metrics(self) -> dict[str, Metric]:
        """Metrics of the last shot, generated with the earlier ones given."""
        cell = torch.arange(self.cells[0] * self.cells[1])
        places = torch.stack([cell // self.cells[1], cell % self.cells[1]], dim=-1) * self.patch[1]
        return {"identity": IdentityRecall(self.identities), "quality": ShotQuality(self.identities, places)}

    def whole_metrics(self) -> dict[str, Metric]:
        """Metrics of films of which every shot is generated."""
        return {"whole": IdentityRecall(self.identities, whole=True)}

    def drift(self) -> ShotDrift:
        """What every shot of generated films shows, by its number in the film."""
        return ShotDrift(self.identities)

    def summary(self) -> dict[str, Any]:
        """Sizes, ready for JSON; shots, frames and video tokens of a range are counted over the films themselves."""
        counts = {}
        sizes = {"train": self.films_per_epoch, "validation": self.val_films, "test": self.test_films}
        for split, films in sizes.items():
            if not films:
                continue
            scripts = [self.script(split, number) for number in range(films)]
            frames = sum(int(script.frames.sum()) for script in scripts)
            shots = sum(len(script.frames) for script in scripts)
            tokens = frames // self.patch[0] * self.grid[0] * self.grid[1]
            counts[split] = {"films": films, "shots": shots, "frames": frames, "tokens": tokens}
        return counts | {"identities": len(self.identities), "vocabulary": self.vocabulary, "skipped": []}

    def script(self, split: str, number: int) -> Script:
        """The script of film `number` of "train", "validation" or "test"."""
        draw = np.random.default_rng([self.seed, SPLITS.index(split), number])
        count = int(draw.integers(self.subjects[0], self.subjects[1] + 1))
        returns = count if self.returns is None else self.returns
        if split == "train" and self.least_subjects is not None:
            # In as many shots, so that films of all batches have one shape.
            fewer = int(draw.integers(self.least_subjects, count + 1))
            count, returns = fewer, returns + count - fewer
        rounds = [draw.permutation(count) for _ in range(-(-returns // count))]
        subject = np.concatenate([np.arange(count), *rounds])[: count + returns]
        cells, shots, of = self.cells[0] * self.cells[1], len(subject), self.identities
        start, end = draw.integers(cells, size=(2, shots))
        identity = draw.integers(len(of), size=count)[subject]
        tag = draw.permutation(self.tags)[subject]
        background = draw.integers(of.backgrounds, size=shots)
        frames = draw.choice(self.lengths, size=shots)
        # Whatever is sampled from here on leaves the films of earlier settings as they were.
        view = draw.integers(of.views, size=shots)
        others = self._distractors(draw, identity)
        other_cells = draw.integers(cells, size=others.shape)
        return Script(
            f"{split} {number}", subject, identity, tag, start, end, background, frames, view, others, other_cells
        )

    def _distractors(
        self, draw: np.random.Generator, identity: np.ndarray[Any, np.dtype[np.int64]]
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Identities (n, distractors), each of the shape of the shot's subject or of its colour, but not of both."""
        of, size = self.identities, (len(identity), self.distractors)
        same_shape = draw.integers(2, size=size) == 0
        other_shape = draw.integers(1, max(of.shapes, 2), size=size)
        other_colour = draw.integers(1, max(of.colours, 2), size=size)
        texture = draw.integers(of.textures, size=size)
        own = identity[:, None] // of.textures
        shape = np.where(same_shape, own // of.colours, (own // of.colours + other_shape) % of.shapes)
        colour = np.where(same_shape, (own % of.colours + other_colour) % of.colours, own % of.colours)
        return (shape * of.colours + colour) * of.textures + texture

    def batch(self, split: str, numbers: Sequence[int]) -> Batch:
        """These films of "train", "validation" or "test", stacked or packed as the class describes."""
        scripts = [self.script(split, number) for number in numbers]
        rows = len(scripts) if self.stacked else 1
        frames = np.concatenate([script.frames for script in scripts])
        subject, identity, background, view, start, end, tag, others, other_cells = (
            torch.from_numpy(np.concatenate([getattr(script, name) for script in scripts]))
            for name in ("subject", "identity", "background", "view", "start", "end", "tag", "others", "other_cells")
        )
        shot = torch.arange(len(frames)).repeat_interleave(torch.from_numpy(frames))
        number = torch.arange(len(shot)) - torch.from_numpy(np.cumsum(frames) - frames)[shot]  # of a frame in its shot
        position = self._position(start, end, frames, shot)
        size = (self.grid[0] * self.patch[1], self.grid[1] * self.patch[2])
        ground, canvas = background[shot], None
        for other, cell in zip(others.T, other_cells.T, strict=True):
            place = torch.stack([cell // self.cells[1], cell % self.cells[1]], dim=-1)[shot] * self.patch[1]
            canvas = self.identities.render(other[shot], place, ground, size, frame=number, canvas=canvas)
        if canvas is not None:
            # In introductions alone: where it would have to be generated, nothing says what it is.
            scene = self.identities.scene(ground, number, size)
            canvas = torch.where(_introduces(scripts)[shot, None, None, None], canvas, scene)
        video = self.identities.render(
            identity[shot], position, ground, size, view=view[shot], frame=number, canvas=canvas
        )
        text = self._captions(tag, start, end, background, view)
        films = [
            Layout.film(
                [Shot(int(length) // self.patch[0], *self.grid, TEXT + len(self._views)) for length in script.frames]
            )
            for script in (scripts[:1] if self.stacked else scripts)
        ]
        lengths = (scripts[0].frames if self.stacked else frames).tolist()
        return {
            "layout": Layout.pack(films),
            "clips": list(video.view(rows, -1, *video.shape[1:]).split(lengths, dim=1)),
            "text": text.view(rows, -1),
            "truth": {
                "subject": subject.view(rows, -1),
                "identity": identity.view(rows, -1),
                "background": background.view(rows, -1),
                "view": view.view(rows, -1),
                "position": position.view(rows, -1, 2),
            },
            "known": [known for script in (scripts[:1] if self.stacked else scripts) for known in self._known(script)],
            "names": [script.name for script in scripts],
        }

    def _known(self, script: Script) -> list[bool]:
        """Whether each shot is given where the film is judged."""
        shots = len(script.subject)
        introduced = self.subjects[1] if self.stacked else int(script.subject.max()) + 1
        given = introduced if self.judged == "returns" else shots - 1
        return [shot < given for shot in range(shots)]

    def _captions(self, tag: Tensor, start: Tensor, end: Tensor, background: Tensor, view: Tensor) -> Tensor:
        """Token ids (shots, tokens of a caption)."""
        cells, of = self.cells[0] * self.cells[1], self.identities
        parts = [(tag, self.tags), (start, cells), (end, cells), (background, of.backgrounds)]
        seen = [
            (view // (of.scales * of.screens), of.poses),
            (view // of.screens % of.scales, of.scales),
            (view % of.screens, of.screens),
        ]
        parts += [(words, count) for words, count in seen if count > 1]
        offsets = np.cumsum([0, *(count for _, count in parts[:-1])]).tolist()
        return torch.stack([words + offset for (words, _), offset in zip(parts, offsets, strict=True)], dim=-1)

    def _position(self, start: Tensor, end: Tensor, frames: np.ndarray[Any, Any], shot: Tensor) -> Tensor:
        """Top left pixel (row, col) in every frame, int64 (frames, 2)."""
        cols = self.cells[1]
        first = torch.stack([start // cols, start % cols], dim=-1)[shot]
        last = torch.stack([end // cols, end % cols], dim=-1)[shot]
        length = torch.from_numpy(frames)[shot, None]
        began = torch.from_numpy(np.cumsum(frames) - frames)[shot]
        way = (torch.arange(len(shot)) - began)[:, None] / (length - 1).clamp(min=1)
        return (first + (last - first) * way).round().long() * self.patch[1]


def _introduces(scripts: Sequence[Script]) -> Tensor:
    """Which shots of these films introduce a subject, bool (shots,)."""
    return torch.cat([torch.arange(len(x.subject)) <= int(x.subject.max()) for x in scripts])


class _Split:
    """One split of a `ShotWorld`."""

    def __init__(self, world: ShotWorld, split: str, length: int) -> None:
        self.world = world
        self.split = split
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Batch:
        return self.world.batch(self.split, [number])

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        return self.world.batch(self.split, numbers)
