"""Worker processes of this machine, each with its share of threads and a GPU of its own."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from experiments.execution import signals
from experiments.tracking.store import Result

ENDING = 10.0  # seconds that a process has, beyond a step, to write down what it has when it is interrupted


class Worker:
    """A process that is given work: with its share of the threads and, where there are GPUs, its own of them.

    Args:
        number: Of this process, from 0.
        jobs: How many there are.
        serve: What it runs, given its end of the pipe and its number of threads, then `more`.
        more: Sent to it once, at its start.
        gpus: How many GPUs are its own.
    """

    def __init__(self, number: int, jobs: int, serve: Callable[..., None], *more: Any, gpus: int = 1) -> None:
        self.number = number
        self.work: Any = None
        self.pipe, theirs = get_context("spawn").Pipe()
        threads, given = max(1, torch.get_num_threads() // jobs), dict[str, str]()
        if torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
            first = number * gpus % torch.cuda.device_count()
            given["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[first : first + gpus])
        self.process = get_context("spawn").Process(target=serve, args=(theirs, threads, *more), name=f"job {number}")
        with patch.dict(os.environ, given):
            self.process.start()
        theirs.close()

    def give(self, work: Any) -> None:
        """Send it a piece of work."""
        self.work = work
        with suppress(BrokenPipeError):  # it died meanwhile: reading from it says so
            self.pipe.send(work)

    def fate(self) -> str:
        """How its process ended, once its pipe is closed."""
        self.process.join()
        code = self.process.exitcode or 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def end(workers: Sequence[Worker]) -> None:
    """End processes by SIGTERM, and after a while by SIGKILL."""
    for worker in workers:
        worker.process.terminate()
    try:
        deadline = time.monotonic() + signals.GRACE + ENDING
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
    finally:  # at a second signal too
        for worker in workers:
            worker.process.kill()


class PipeObserver:
    """An `Observer` that sends to another process, and ends where that is gone."""

    def __init__(self, to: Connection) -> None:
        self.to = to

    def tell(self, *what: Any) -> None:
        """Send one event, its name first; end this process at once if the other end of the pipe is gone."""
        try:
            self.to.send(what)
        except BrokenPipeError:
            os._exit(1)  # as if killed: the sweep resumes the cell from its checkpoint when it is started again

    def started(self, name: str) -> None:
        """Send that the run `name` has started."""
        self.tell("started", name)

    def step(self, name: str, step: int, total: int | None, note: str) -> None:
        """Send that the run `name` is at `step` of `total` (None: not known), with a note to show."""
        self.tell("step", name, step, total, note)

    def ended(self, result: Result) -> None:
        """Send the result of a run that has ended."""
        self.tell("ended", result)

    def note(self, line: str) -> None:
        """Send a line for the user to read."""
        self.tell("note", line)


def loaded_plugins() -> tuple[Path, ...]:
    """The files of methods, kernels and data that were imported here, for processes that need them too."""
    return tuple(
        Path(str(module.__file__)) for name, module in sys.modules.items() if name.startswith("sparse_zoo_plugin_")
    )
