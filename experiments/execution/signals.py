"""Signals that end a command: a checkpoint first, where training can write one, then exit code 128 + n.

The first SIGINT, SIGTERM or SIGHUP raises `Ended` in the main thread. Training asks for the signal to wait until the
next step boundary (`deferred`, `raise_pending`), `GRACE` seconds at most. A second signal ends the command at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 20.0  # seconds that a step may take until it is cut short; SLURM and Kubernetes kill after 30


class Ended(KeyboardInterrupt):
    """A signal asked the process to end. A KeyboardInterrupt, as Lightning, Ray and click know it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def code(self) -> int:
        """The exit code by which a shell tells that a signal ended a program."""
        return 128 + self.number


def exit_code(error: KeyboardInterrupt) -> int:
    """128 + the number of the signal; of a plain KeyboardInterrupt that of SIGINT."""
    return error.code if isinstance(error, Ended) else 128 + signal.SIGINT


class _State:
    owner = 0  # the process that handles signals; its forks inherit the handlers
    waiting = 0  # how many `deferred` blocks are entered
    pending: int | None = None
    patient = False
    terminals: tuple[int, ...] = ()


_state = _State()


@contextmanager
def caught(*more: int, patient: bool = False) -> Iterator[None]:
    """Raise `Ended` for signals meanwhile. No effect in other threads than the main one.

    Args:
        more: Further signals that end the process, such as SLURM's notice.
        patient: Answer SIGTERM alone, once, and ignore SIGINT and SIGHUP: for a worker, which its driver ends, and
            which a terminal or a process manager may signal besides.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before_state = vars(_state).copy()
    _state.patient = patient or (_state.owner == os.getpid() and _state.patient)
    _state.owner, _state.terminals = os.getpid(), tuple(number for number in (1, 2) if os.isatty(number))
    numbers = {*ENDING, *more}
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (*numbers, signal.SIGALRM)}
    for number in numbers:
        quiet = patient and number in (signal.SIGINT, signal.SIGHUP)
        if before[number] != signal.SIG_IGN:  # as nohup asks for
            signal.signal(number, signal.SIG_IGN if quiet else _answer)
    signal.signal(signal.SIGALRM, _time_is_up)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        vars(_state).clear()
        vars(_state).update(before_state)


@contextmanager
def deferred() -> Iterator[None]:
    """Let a first signal wait for `raise_pending`, or for the end of this block, `GRACE` seconds at most."""
    _state.waiting += 1
    try:
        yield
    finally:
        _state.waiting -= 1
        signal.setitimer(signal.ITIMER_REAL, 0)
    raise_pending()


def pending() -> int | None:
    """The signal that waits; None without one."""
    return _state.pending


def raise_pending() -> None:
    """Raise `Ended` if a signal waits."""
    if _state.pending is not None:
        raise Ended(_state.pending)


def _answer(number: int, _: FrameType | None) -> None:
    if os.getpid() != _state.owner:
        # A fork, such as a data loader: its parent may need it for the step that it finishes, and then ends it.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 2 * GRACE)
        return
    if number == signal.SIGHUP:
        _leave_terminal()
    if _state.pending is not None and _state.patient:
        return
    first, _state.pending = _state.pending is None, number if _state.pending is None else _state.pending
    if first and _state.waiting:
        signal.setitimer(signal.ITIMER_REAL, GRACE)
        return
    raise Ended(_state.pending)


def _time_is_up(*_: object) -> None:
    raise_pending()


def _leave_terminal() -> None:
    """Let output go nowhere: writing to a terminal that is gone raises, in place of the signal's exit code."""
    for number in _state.terminals:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
