"""Checkpoints from which an interrupted run resumes, bit for bit as if nothing had happened."""

from __future__ import annotations

import signal
import time
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.plugins import TorchCheckpointIO
from typing_extensions import override

from experiments.execution import signals
from experiments.tracking.mlflow_logger import Log
from experiments.tracking.store import atomic_write
from lit_modules.parallel import META, recover_folder
from lit_modules.sharded_checkpoint import read_metadata


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint atomically: a temporary file in the checkpoint's folder, then a rename.

    Lightning writes to the system's folder for temporary files, which may be small. It then copies the file, and a kill
    during the copy can leave an incomplete checkpoint.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        # What a datamodule of one's own was made from, where it keeps that: a secret of the environment may be in it.
        checkpoint.pop(pl.LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY, None)
        with atomic_write(Path(path)) as file:
            writing = _Writing(file)
            try:
                torch.save(checkpoint, cast("IO[bytes]", writing))
            except RuntimeError as error:
                raise (writing.failed or error) from None


class _Writing:
    """Keeps the reason why a write failed, say a full disk, of which torch.save makes a RuntimeError without one."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.flush = file, file.flush
        self.failed: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.failed = error
            raise


class Saving(Checkpoint):
    """Saves the whole state to `path` at the first step that ends `seconds` after the last time.

    By time, not by steps: what a kill may cost is then the same whatever a step takes, and so is the share of time that
    saving takes. Where a validation follows a step, after it: Lightning takes one that is due when it resumes for
    done. Never in the middle of accumulated batches, nor after the last step, so that a resumed run always has a
    step and a validation of its own. A signal that asks the process to end is answered here, once the state is saved.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self._last = time.monotonic()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = time.monotonic()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop
        if loop._data_fetcher is None or not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._save(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        amid = trainer.fit_loop.epoch_loop._should_accumulate() or (
            trainer.global_step >= trainer.estimated_stepping_batches
        )
        if amid:
            return
        ending, due = _agreed(bool(signals.pending()), time.monotonic() - self._last >= self.seconds)
        if not (ending or due):
            return
        for logger in trainer.loggers:
            logger.flush() if isinstance(logger, Log) else logger.save()  # what came before is not repeated
        epochs = trainer.fit_loop.epoch_progress
        for count in (epochs.current, epochs.total):
            assert isinstance(count, _ProcessedTracker)
            # Lightning does not count an epoch that began where a run resumed at the end of the one before.
            count.ready = count.started = count.processed + 1
        trainer.save_checkpoint(self.path)
        self._last = time.monotonic()
        signals.raise_pending()
        if ending:  # the signal has reached the first process, and is on its way to this one
            raise signals.Ended(signal.SIGTERM)


def _agreed(*answers: bool) -> list[bool]:
    """What the first process of the run answers: all save at the same step, or none."""
    if not dist.is_initialized():
        return list(answers)
    held = torch.tensor(answers, dtype=torch.uint8)
    dist.broadcast(held, 0)
    return [bool(answer) for answer in held]


def saved_step(path: Path) -> int:
    """The number of optimizer steps in a checkpoint; ValueError, with the reason, if it cannot be resumed."""
    recover_folder(path)
    try:
        if path.is_dir():  # of several devices
            read_metadata(path)
            return int(load_plain(path / META)["global_step"])
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
        if broken is not None:
            raise ValueError(f"{broken} in it is damaged")
        return int(load_plain(path, mmap=True)["global_step"])
    except FileNotFoundError as error:
        raise ValueError("there is none") from error
    except Exception as error:  # whatever a damaged archive makes of itself
        raise ValueError(str(error) or type(error).__name__) from error


def load_plain(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint of tensors and plain values; ValueError, with the reason, for any other.

    A pickle can name functions to be called, and a checkpoint may be somebody else's: such names are refused.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged pickle makes of itself
        foreign = _foreign(path)
        if foreign:
            raise ValueError(f"would run code when loaded ({', '.join(foreign)}), so it is refused") from error
        why = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__  # without torch's advice
        raise ValueError(f"is damaged: {why}") from error
    if not isinstance(state, dict):
        raise ValueError("is no checkpoint of a run")
    return state


def _foreign(path: Path) -> list[str]:
    """The functions and classes that a pickle names and that plain values do not need."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # it is damaged, which is said elsewhere
        return []
