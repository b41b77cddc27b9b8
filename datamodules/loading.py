"""Batches whose order is a function of (seed, epoch), and a loader that resumes in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any, Protocol

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Batch = dict[str, Any]


class FilmSplit(Protocol):
    """A split: `len` films to an epoch; film numbers continue from epoch to epoch."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Batch: ...
    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        """The batch of these films."""
        ...


class Order(DistributedSampler[int]):
    """Shuffled film numbers: epoch e has e·n to (e + 1)·n - 1, so that a film can be seeded by its number."""

    def __init__(self, films: Sized, seed: int, replicas: int, rank: int) -> None:
        super().__init__(films, num_replicas=replicas, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.films = films
        self.skip = 0

    def __iter__(self) -> Iterator[int]:
        order = list(super().__iter__())[self.skip :]
        self.skip = 0
        return iter([self.epoch * len(self.films) + film for film in order])


class ResumableLoader(DataLoader[Batch]):
    """A loader that resumes after a restart with the batch after its last one; Lightning saves and loads its state."""

    served = 0
    resume_at = 0
    epoch_batches = 0  # Lightning may end an epoch before the loader does; 0: it does not

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.served, self.resume_at = self.resume_at, 0
        if isinstance(self.sampler, Order) and self.batch_size:
            self.sampler.skip = self.served * self.batch_size
        for batch in super().__iter__():
            self.served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of batches that were returned in this epoch."""
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume after the batch that `state` describes."""
        # A finished epoch is followed by a whole one.
        self.resume_at = state["served"] % (self.epoch_batches or len(self))


def train_loader(films: FilmSplit, batch: int, seed: int, workers: int, trainer: Trainer | None) -> ResumableLoader:
    """Shuffled batches of `batch` films (the last of an epoch may be smaller), divided among the trainer's ranks."""
    # Of ranks that share films, all see the same ones.
    shared = (trainer.distributed_sampler_kwargs if trainer else None) or {"num_replicas": 1, "rank": 0}
    order = Order(films, seed, shared["num_replicas"], shared["rank"])
    loader = ResumableLoader(_dataset(films), batch, sampler=order, num_workers=workers, collate_fn=_as_it_is)
    limit = trainer.limit_train_batches if trainer else 1.0
    loader.epoch_batches = min(limit, len(loader)) if isinstance(limit, int) else int(limit * len(loader))
    return loader


def val_loader(films: FilmSplit, batch: int, workers: int) -> DataLoader[Batch]:
    """The same batches in the same order, always."""
    return DataLoader(_dataset(films), batch, num_workers=workers, collate_fn=_as_it_is)


def _dataset(films: FilmSplit) -> Dataset[Batch]:
    return films  # type: ignore[return-value]  # DataLoader asks for `__len__` and `__getitems__`, not for the base class


def _as_it_is(batch: Any) -> Any:
    return batch
