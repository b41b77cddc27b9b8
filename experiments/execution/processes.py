"""Worker processes of this machine, each with its share of threads and of the GPUs."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from experiments.execution import signals
from experiments.tracking.store import Result
from sparse_zoo.errors import ZooError

W = TypeVar("W")

ENDING = 10.0  # seconds that a process has, beyond a step, to write down what it has when it is interrupted


class Worker:
    """A process that is given work: with its share of the threads and, where there are GPUs, of them.

    Processes take the GPUs in turn, so that they share them where there are more processes than GPUs.

    Args:
        number: Of this process, from 0.
        jobs: How many there are.
        serve: What it runs, given its end of the pipe and its number of threads, then `more`.
        more: Sent to it once, at its start.
        gpus: How many GPUs it sees.
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


def work_through(
    waiting: deque[W], jobs: int, serve: Callable[..., None], *more: Any, gpus: int = 1
) -> Generator[tuple[W, str, tuple[Any, ...]], None, None]:
    """Each of `jobs` processes is given one piece of work after the other, until none is waiting or under way.

    No pool of a library: those take the death of one process, say for want of memory, for the end of all.

    Args:
        waiting: The work, taken from its left; the caller may put more into it meanwhile.
        jobs: How many processes.
        serve: What they run, as of `Worker`. It receives work until its pipe is closed, and sends tuples of a name and
            what belongs to it: ("done", …) for the end of a piece, ("refused", message) for what ends all.
        more: For `serve`.
        gpus: How many GPUs each process has.

    Yields:
        The piece of work, and the name and the rest of what was sent; ("died", how) where the process died. Another
        process takes its place, and the piece is the caller's to wait for again.

    Raises:
        ZooError: A process refused, with its message.
    """
    workers = [Worker(number, jobs, serve, *more, gpus=gpus) for number in range(jobs)]
    try:
        while waiting or any(worker.work is not None for worker in workers):
            for worker in workers:
                if waiting and worker.work is None:
                    worker.give(waiting.popleft())
            for pipe in wait_for([worker.pipe for worker in workers if worker.work is not None]):
                worker = next(worker for worker in workers if worker.pipe is pipe)
                work = worker.work
                try:
                    name, *rest = worker.pipe.recv()
                except (EOFError, ConnectionError):
                    name, rest = "died", [worker.fate()]
                    workers[worker.number] = Worker(worker.number, jobs, serve, *more, gpus=gpus)
                if name == "refused":
                    raise ZooError(*rest)
                if name == "done":
                    worker.work = None
                yield work, name, tuple(rest)
        for worker in workers:
            worker.pipe.close()
        for worker in workers:
            worker.process.join(signals.GRACE)  # each finishes what it has begun
    finally:
        end(workers)


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
