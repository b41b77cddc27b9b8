"""Synthetic films that test memory across shots: what a subject looks like is shown once and never told."""

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

from datamodules.identities import Identities
from datamodules.loading import Batch, ResumableLoader, train_loader, val_loader
from datamodules.quality import ShotQuality
from datamodules.recall import IdentityRecall
from datamodules.settings import ShotWorldSettings, ends
from sparse_zoo.layout import Layout, Shot

SPLITS = ("train", "validation", "test")
TEXT = 4  # tokens of a caption: the subject's tag, its start cell, its end cell, the background


@dataclass(frozen=True)
class Script:
    """What happens in one film, by shot (n,): subject number, identity, tag, start and end cell, background, frames."""

    name: str
    subject: np.ndarray[Any, np.dtype[np.int64]]
    identity: np.ndarray[Any, np.dtype[np.int64]]
    tag: np.ndarray[Any, np.dtype[np.int64]]
    start: np.ndarray[Any, np.dtype[np.int64]]
    end: np.ndarray[Any, np.dtype[np.int64]]
    background: np.ndarray[Any, np.dtype[np.int64]]
    frames: np.ndarray[Any, np.dtype[np.int64]]


class ShotWorld(LightningDataModule):
    """Films in which each subject is introduced by a shot of its own, and later returns.

    A subject's identity (shape, colour, texture) is drawn anew for every film and never captioned; a caption has four
    tokens: the subject's tag (assigned anew per film), its start cell, its end cell, the background. To draw a return,
    a model must find, by the tag, the shot that introduced the subject. In a shot the subject moves evenly from its
    start to its end cell, in whole patches. Returns go through all subjects in random order before any comes again.

    Film n of training is a function of (seed, n), and every epoch draws new ones; validation and test have films of
    their own, the same always. Films of one shape are stacked (B = `batch_size`); where `subjects` or
    `frames_per_shot` is a range they differ in shape, and `batch_size` films are packed into one stream (B = 1).

    A batch's "truth", in stream order: "subject" (a number within its film), "identity" and "background", int64 (B,
    shots); "position", int64 (B, frames, 2), the subject's top left pixel in each frame. It is what the sample metrics
    need.

    Args:
        **settings: Fields of `ShotWorldSettings`.

    Raises:
        ZooError: for settings out of range, all at once.
    """

    channels = 3

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        given = ShotWorldSettings(**settings)
        grid, patch, side = given.grid, given.patch, given.subject_size
        lengths = ends(given.frames_per_shot)
        self.identities = Identities(given.shapes, given.colours, given.textures, given.backgrounds, side * patch[1])
        self.subjects = ends(given.subjects)
        self.returns = given.returns
        self.lengths = range(lengths[0], lengths[1] + 1, patch[0])
        self.grid = (grid[0], grid[1])
        self.patch = (patch[0], patch[1], patch[2])
        self.cells = (grid[0] - side + 1, grid[1] - side + 1)
        self.tags = given.tags
        self.batch_size = given.batch_size
        self.films_per_epoch = given.films_per_epoch
        self.val_films = given.val_films
        self.test_films = given.test_films
        self.num_workers = given.num_workers
        self.seed = given.seed

    @property
    def vocabulary(self) -> int:
        """Ids for the tags, then the start cells, the end cells, the backgrounds."""
        return self.tags + 2 * self.cells[0] * self.cells[1] + self.identities.backgrounds

    @property
    def stacked(self) -> bool:
        """Whether all films have one shape, and so are stacked and not packed."""
        return self.subjects[0] == self.subjects[1] and len(self.lengths) == 1

    def train_dataloader(self) -> ResumableLoader:
        films = _Films(self, "train", self.films_per_epoch)
        return train_loader(films, self.batch_size, self.seed, self.num_workers, self.trainer)

    def val_dataloader(self) -> DataLoader[Batch]:
        return val_loader(_Films(self, "validation", self.val_films), self.batch_size, self.num_workers)

    def test_dataloader(self) -> DataLoader[Batch]:
        return val_loader(_Films(self, "test", self.test_films), self.batch_size, self.num_workers)

    def sample_metrics(self) -> dict[str, Metric]:
        cell = torch.arange(self.cells[0] * self.cells[1])
        places = torch.stack([cell // self.cells[1], cell % self.cells[1]], dim=-1) * self.patch[1]
        return {"identity": IdentityRecall(self.identities), "quality": ShotQuality(self.identities, places)}

    def whole_metrics(self) -> dict[str, Metric]:
        return {"whole": IdentityRecall(self.identities, whole=True)}

    def summary(self) -> dict[str, Any]:
        """Sizes, ready for JSON; the shots and frames of a range are counted over the films themselves."""
        counts = {}
        sizes = {"train": self.films_per_epoch, "validation": self.val_films, "test": self.test_films}
        for split, films in sizes.items():
            if not films:
                continue
            scripts = [self.script(split, number) for number in range(films)]
            frames = sum(int(script.frames.sum()) for script in scripts)
            counts[split] = {"films": films, "shots": sum(len(script.frames) for script in scripts), "frames": frames}
        return counts | {"identities": len(self.identities), "vocabulary": self.vocabulary, "skipped": []}

    def script(self, split: str, number: int) -> Script:
        """What happens in film `number` of "train", "validation" or "test"."""
        draw = np.random.default_rng([self.seed, SPLITS.index(split), number])
        count = int(draw.integers(self.subjects[0], self.subjects[1] + 1))
        returns = count if self.returns is None else self.returns
        rounds = [draw.permutation(count) for _ in range(-(-returns // count))]
        subject = np.concatenate([np.arange(count), *rounds])[: count + returns]
        start, end = draw.integers(self.cells[0] * self.cells[1], size=(2, len(subject)))
        return Script(
            name=f"{split} {number}",
            subject=subject,
            identity=draw.integers(len(self.identities), size=count)[subject],
            tag=draw.permutation(self.tags)[subject],
            start=start,
            end=end,
            background=draw.integers(self.identities.backgrounds, size=len(subject)),
            frames=draw.choice(self.lengths, size=len(subject)),
        )

    def batch(self, split: str, numbers: Sequence[int]) -> Batch:
        """These films of "train", "validation" or "test", stacked or packed, as the class says."""
        scripts = [self.script(split, number) for number in numbers]
        rows = len(scripts) if self.stacked else 1
        frames = np.concatenate([script.frames for script in scripts])
        subject, identity, background, start, end, tag = (
            torch.from_numpy(np.concatenate([getattr(script, name) for script in scripts]))
            for name in ("subject", "identity", "background", "start", "end", "tag")
        )
        shot = torch.arange(len(frames)).repeat_interleave(torch.from_numpy(frames))
        position = self._position(start, end, frames, shot)
        size = (self.grid[0] * self.patch[1], self.grid[1] * self.patch[2])
        video = self.identities.render(identity[shot], position, background[shot], size)
        cells = self.cells[0] * self.cells[1]
        offsets = torch.tensor([0, self.tags, self.tags + cells, self.tags + 2 * cells])
        text = torch.stack([tag, start, end, background], dim=-1) + offsets
        films = [
            Layout.film([Shot(int(length) // self.patch[0], *self.grid, TEXT) for length in script.frames])
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
                "position": position.view(rows, -1, 2),
            },
            "names": [script.name for script in scripts],
        }

    def _position(self, start: Tensor, end: Tensor, frames: np.ndarray[Any, Any], shot: Tensor) -> Tensor:
        """Top left pixel (row, col) in every frame, int64 (frames, 2)."""
        cols = self.cells[1]
        first = torch.stack([start // cols, start % cols], dim=-1)[shot]
        last = torch.stack([end // cols, end % cols], dim=-1)[shot]
        length = torch.from_numpy(frames)[shot, None]
        began = torch.from_numpy(np.cumsum(frames) - frames)[shot]
        way = (torch.arange(len(shot)) - began)[:, None] / (length - 1).clamp(min=1)
        return (first + (last - first) * way).round().long() * self.patch[1]


class _Films:
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
