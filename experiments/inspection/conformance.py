"""The conformance suite on several methods at once, one process a core."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from experiments.execution import signals
from experiments.execution.processes import work_through
from sparse_zoo.registry import import_file
from sparse_zoo.testing import Outcome, run_checks


def check_methods(names: Sequence[str], plugins: Sequence[Path]) -> Iterator[Outcome]:
    """The outcome of every check on every method, as soon as it is known.

    Args:
        names: Registered methods.
        plugins: Files that register some of them.

    Yields:
        Outcomes; those of a method in the order of the checks, those of different methods mixed. A method whose process
        dies has one that says so, failed, in place of those that were to come.
    """
    jobs = min(len(names), torch.get_num_threads())
    if jobs <= 1:
        for name in names:
            yield from run_checks(name)
        return
    with closing(work_through(deque(names), jobs, _serve, tuple(plugins))) as messages:
        for name, kind, rest in messages:
            if kind == "died":
                yield Outcome(name, "process", "failed", f"its process {rest[0]} while checking", 0.0)
            elif kind == "outcome":
                yield rest[0]


def _serve(pipe: Connection, threads: int, plugins: Sequence[Path]) -> None:
    """What such a process does."""
    torch.set_num_threads(threads)
    with signals.caught(patient=True), suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        for plugin in plugins:
            import_file(plugin)
        while True:
            for outcome in run_checks(pipe.recv()):
                pipe.send(("outcome", outcome))
            pipe.send(("done",))
