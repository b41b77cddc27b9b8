"""A run on several devices: one process for each, watched by the one that holds the run's folder.

The processes train together; the first of them also logs, draws and writes the results. The one that watches trains
nothing, so that it can end all of them when any one dies, and start the next run.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, fields
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers.logger import DummyLogger

from experiments.execution import signals
from experiments.execution.processes import PipeObserver, loaded_plugins
from experiments.execution.train import Observer, RankDied, interruptible, quiet, train
from experiments.tracking.mlflow_logger import Log, Tracker
from experiments.tracking.store import Cell, Result
from lit_modules.settings import Parallel
from sparse_zoo.errors import ZooError
from sparse_zoo.registry import import_file

SETTLING = 3.0  # seconds in which others may tell of the cause after a first process has failed
ENDING = 10.0  # seconds that processes have, beyond a step, to save and end when the run is interrupted


class RankFailed(RuntimeError):
    """A process of a run raised an error; the message names it."""


@dataclass(frozen=True)
class Task:
    """What each process of a run is given."""

    cell: Cell
    folder: Path
    result: Result
    run: str | None
    last: dict[str, int]
    experiment: str
    resume: bool
    plugins: tuple[Path, ...]
    port: int
    threads: int
    environment: dict[str, str]


def train_on_ranks(cell: Cell, folder: Path, result: Result, log: Log, observer: Observer, *, resume: bool) -> None:
    """Train a cell on the devices that its config asks for, a process each.

    Args:
        cell: The run.
        folder: Its folder.
        result: What the first process found goes here.
        log: The run's log; the first process continues it.
        observer: Receives the progress of the first process.
        resume: Resume the folder's checkpoint.

    Raises:
        RankDied: If a process died; the others are ended, and the run can be resumed.
        RankFailed: If a process raised an error; the others are ended.
        ZooError: If a process refused its work.
        KeyboardInterrupt: If a signal ended the run; it can be resumed.
    """
    size = Parallel(**cell.config["parallel"]).devices
    log.flush()
    task = Task(
        cell,
        folder,
        result,
        log.run_id,
        log.last,
        log.tracker.experiment,
        resume,
        loaded_plugins(),
        _free_port(),
        max(1, torch.get_num_threads() // size),
        dict(os.environ),
    )
    ranks = [_Rank(task, rank) for rank in range(size)]
    try:
        _watch(ranks, result, observer)
    except KeyboardInterrupt:
        for rank in ranks:
            rank.process.terminate()
        deadline = time.monotonic() + signals.GRACE + ENDING
        with suppress(RankFailed, RankDied, ZooError):
            _watch(ranks, result, observer, deadline)
        raise
    finally:
        for rank in ranks:
            rank.end()


def _watch(ranks: list[_Rank], result: Result, observer: Observer, deadline: float | None = None) -> None:
    """Pass on what the first process tells, until all have ended well or one has not."""
    working = list(ranks)
    while working:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait_for([rank.pipe for rank in working], timeout)
        if not ready:
            return
        for rank in [rank for rank in working if rank.pipe in ready]:
            kind, *said = rank.receive()
            if kind == "ended":
                working.remove(rank)
                rank.take(result, said[0])
            elif kind in ("died", "failed", "refused"):
                _settle(ranks, rank, kind, said, result)
            elif rank.number == 0:
                getattr(observer, kind)(*said)
                if kind == "step":
                    result.steps = said[1]


def _settle(ranks: list[_Rank], first: _Rank, kind: str, said: list[Any], result: Result) -> None:
    """Raise the error that one process met, after looking for its cause: others fail when one that they wait for dies.

    A process that died comes before one that failed, the first that failed before later ones.
    """
    found = [(kind != "died", 0, first, kind, said)]
    others, until = [rank for rank in ranks if rank is not first], time.monotonic() + SETTLING
    while others and (ready := wait_for([rank.pipe for rank in others], max(0.0, until - time.monotonic()))):
        for rank in [rank for rank in others if rank.pipe in ready]:
            kind, *more = rank.receive()
            if kind in ("ended", "died", "failed", "refused"):
                others.remove(rank)
            if kind in ("died", "failed", "refused"):
                found.append((kind != "died", len(found), rank, kind, more))
    _, _, rank, kind, said = min(found, key=lambda one: one[:2])
    of = f"rank {rank.number} of {len(ranks)}"
    if kind == "died":
        raise RankDied(f"{of} {rank.fate()}; the others were ended")
    text, state = said
    if kind == "refused":
        raise ZooError(text)
    rank.take(result, state)
    raise RankFailed(f"{of}: {text}")


class _Rank:
    """One process of a run."""

    def __init__(self, task: Task, number: int) -> None:
        self.number = number
        # Forked from a process that has imported what a rank needs, and no CUDA context: imports are paid for once.
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, task, number), name=f"rank {number}")
        self.process.start()
        theirs.close()

    def receive(self) -> tuple[Any, ...]:
        """What it tells; ("died",) when it is gone."""
        try:
            message: tuple[Any, ...] = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return ("died",)
        return message

    def take(self, result: Result, state: Result) -> None:
        """Into the run's result what the first process found; of the others only that they ended."""
        if self.number == 0:
            for field in fields(Result):
                setattr(result, field.name, getattr(state, field.name))

    def fate(self) -> str:
        """How it ended, once it has."""
        self.process.join(SETTLING)
        code = self.process.exitcode or 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def end(self) -> None:
        """Kill it if it is there still: it may wait for one that is gone, deaf to signals."""
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, task: Task, rank: int) -> None:
    """What such a process does."""
    os.environ |= task.environment | {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(task.port),
    }
    torch.set_num_threads(task.threads)

    observer, result = PipeObserver(pipe), task.result
    for plugin in task.plugins:
        import_file(plugin)
    log = DummyLogger() if rank else Log(Tracker(task.experiment, observer.note), task.run, task.last)
    warnings = task.folder / "warnings.txt" if rank == 0 else Path(os.devnull)
    try:
        with quiet(warnings), signals.caught(patient=True), interruptible():
            train(task.cell.config, task.folder, result, log, observer, resume=task.resume)
        observer.tell("ended", result)
    except KeyboardInterrupt:
        observer.tell("ended", result)
    except ZooError as error:
        observer.tell("refused", str(error), result)
    except (Exception, SystemExit) as error:  # whatever a method raises is the failure of this run, as in `run`
        result.fail(error)
        observer.tell("failed", f"{type(error).__name__}: {error}", result)
    finally:
        if isinstance(log, Log):
            log.flush()
    with suppress(EOFError, KeyboardInterrupt):
        pipe.recv()  # until all have reported: how others fail because of this end is not the cause
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
