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

from datamodules.identities import Identities
from datamodules.loading import Batch, ResumableLoader, train_loader, val_loader
from datamodules.quality import ShotQuality
from datamodules.recall import IdentityRecall
from sparse_zoo.errors import refuse
from sparse_zoo.layout import Layout, Shot

SPLITS = ("train", "validation", "test")
TEXT = 4  # tokens of a caption: the subject's tag, its start cell, its end cell, the background


@dataclass(frozen=True)
class Script:
    """The events of one film, by shot (n,): subject number, identity, tag, start and end cell, background, frames."""

    name: str
    subject: np.ndarray[Any, np.dtype[np.int64]]
    identity: np.ndarray[Any, np.dtype[np.int64]]
    tag: np.ndarray[Any, np.dtype[np.int64]]
    start: np.ndarray[Any, np.dtype[np.int64]]
    end: np.ndarray[Any, np.dtype[np.int64]]
    background: np.ndarray[Any, np.dtype[np.int64]]
    frames: np.ndarray[Any, np.dtype[np.int64]]


class ShotWorld(LightningDataModule):
    """Films in which each subject is introduced by a shot of its own and returns later.

    A subject's identity (shape, colour, texture) is sampled for every film and never captioned. A caption has four
    tokens: the subject's tag (sampled for each film), its start cell, its end cell, the background. To generate a
    return, a model must find, by the tag, the shot that introduced the subject. In a shot the subject moves evenly from
    its start to its end cell, in whole patches. Returns show all subjects in random order before any is repeated.

    Film n of training is a function of (seed, n), and every epoch has new films; validation and test have films of
    their own, always the same. Films of one shape are stacked (B = `batch_size`). If `subjects` or `frames_per_shot` is
    a range, films differ in shape, and `batch_size` films are packed into one stream (B = 1).

    A batch's "truth", in stream order: "subject" (a number within its film), "identity" and "background", int64 (B,
    shots); "position", int64 (B, frames, 2), the subject's top left pixel in each frame. The sample metrics need it.

    Args:
        subjects: subjects, and so introductions, per film; or a range [least, most], sampled per film.
        returns: shots after the introductions; None gives each subject one.
        frames_per_shot: in pixel frames; or a range [least, most], sampled per shot, in whole temporal patches.
        grid: (rows, cols) of a frame in patches.
        patch: (frames, rows, cols) of one token, rows = cols.
        subject_size: side of a subject in patches; its places are patch-aligned.
        shapes, colours, textures, backgrounds, tags: number of each.
        batch_size: films of a batch.
        films_per_epoch, val_films: films of an epoch of training, and of validation.
        test_films: films of a separate test after training; with 0 there is none.
        num_workers: processes that make batches; with 0 the training process makes them.
        seed: fixes the films of training.

    Raises:
        ZooError: For settings out of range, all at once.
    """

    channels = 3

    def __init__(
        self,
        *,
        subjects: int | Sequence[int] = 3,
        returns: int | None = None,
        frames_per_shot: int | Sequence[int] = 2,
        grid: Sequence[int] = (3, 3),
        patch: Sequence[int] = (1, 4, 4),
        subject_size: int = 2,
        shapes: int = 6,
        colours: int = 8,
        textures: int = 4,
        backgrounds: int = 4,
        tags: int = 6,
        batch_size: int = 16,
        films_per_epoch: int = 1600,
        val_films: int = 64,
        test_films: int = 0,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        people, lengths = _range(subjects), _range(frames_per_shot)
        sized = len(grid) == 2 and len(patch) == 3 and min(*grid, *patch) >= 1
        least = {
            "subject_size": (subject_size, 1),
            "batch_size": (batch_size, 1),
            "films_per_epoch": (films_per_epoch, 1),
            "val_films": (val_films, 1),
            "returns": (1 if returns is None else returns, 1),
            "test_films": (test_films, 0),
            "num_workers": (num_workers, 0),
            "seed": (seed, 0),
        }
        refuse(
            "ShotWorld",
            [f"{name} must be at least {low}, got {value}" for name, (value, low) in least.items() if value < low]
            + [
                "" if people[0] else f"subjects must be a count or a range [least, most] from 1, got {subjects}",
                ""
                if lengths[0]
                else f"frames_per_shot must be a count or a range [least, most] from 1, got {frames_per_shot}",
                f"{people[1]} subjects need as many tags, got {tags}" if tags < people[1] else "",
                "" if sized else f"grid must be 2 and patch 3 lengths of at least 1, got {[*grid]} and {[*patch]}",
                f"a patch must be as high as wide, got {[*patch]}" if sized and patch[1] != patch[2] else "",
                f"a subject of {subject_size} patches does not fit into a grid of {[*grid]}"
                if sized and subject_size > min(grid)
                else "",
                f"frames_per_shot {frames_per_shot} is not in whole patches of {patch[0]} frames"
                if sized and (lengths[0] % patch[0] or lengths[1] % patch[0])
                else "",
            ],
        )
        self.identities = Identities(shapes, colours, textures, backgrounds, subject_size * patch[1])
        self.subjects = people
        self.returns = returns
        self.lengths = range(lengths[0], lengths[1] + 1, patch[0])
        self.grid = (grid[0], grid[1])
        self.patch = (patch[0], patch[1], patch[2])
        self.cells = (grid[0] - subject_size + 1, grid[1] - subject_size + 1)
        self.tags = tags
        self.batch_size = batch_size
        self.films_per_epoch = films_per_epoch
        self.val_films = val_films
        self.test_films = test_films
        self.num_workers = num_workers
        self.seed = seed

    @property
    def vocabulary(self) -> int:
        """Ids for the tags, then the start cells, the end cells, the backgrounds."""
        return self.tags + 2 * self.cells[0] * self.cells[1] + self.identities.backgrounds

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
        """The script of film `number` of "train", "validation" or "test"."""
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
        """These films of "train", "validation" or "test", stacked or packed as the class describes."""
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


def _range(value: int | Sequence[int]) -> tuple[int, int]:
    """The (least, most) of a count or a range; (0, 0) if it is neither."""
    ends = [value, value] if isinstance(value, int) else [*value]
    return (ends[0], ends[1]) if len(ends) == 2 and 1 <= ends[0] <= ends[1] else (0, 0)
