"""The harness: named checks, what they found, and one error that lists all failures."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, NoReturn, TypeVar

import torch
from torch import Tensor

from sparse_zoo.errors import refuse, unknown

S = TypeVar("S")


class CheckFailure(AssertionError):
    """What a check raises: what was expected, what came instead, and what to change."""

    def __init__(self, *, expected: str, came: str, change: str) -> None:
        super().__init__(f"expected {expected}; came {came}; to change: {change}")
        self.expected, self.came, self.change = expected, came, change


class Skip(Exception):
    """What a check raises where it has nothing to judge; the reason is one that the subject declares."""


class ConformanceError(AssertionError):
    """Everything that failed, in one message; `outcomes` holds all outcomes, those that passed too."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        failed = [outcome for outcome in outcomes if outcome.status == "failed"]
        lines = [f"  - {outcome.check}: {outcome.reason}" for outcome in failed]
        super().__init__(
            f"{failed[0].method} fails {len(failed)} of {len(outcomes)} checks:" + "".join(f"\n{x}" for x in lines)
        )
        self.outcomes = outcomes


@dataclass(frozen=True)
class Outcome:
    """What one check found. `status` is "passed", "failed", "skipped" or "known" (failed, as the caller expected).

    `reason` says why for all but "passed". All fields are plain: `dataclasses.asdict` gives JSON.
    """

    method: str
    check: str
    status: str
    reason: str
    seconds: float


@dataclass(frozen=True)
class Check(Generic[S]):
    """A name, one line of documentation, and a function that raises `CheckFailure` or `Skip`, or returns."""

    name: str
    doc: str
    function: Callable[[S], None]


class Checks(dict[str, Check[S]]):
    """Checks by name; calling it on a function of that name and docstring adds one."""

    def __call__(self, function: Callable[[S], None]) -> Callable[[S], None]:
        """Add a function under its own name; the first line of its docstring says what it checks."""
        doc = (inspect.getdoc(function) or "").partition("\n")[0]
        self[function.__name__] = Check(function.__name__, doc, function)
        return function

    def run(
        self,
        name: str,
        subject: S,
        *,
        known_failures: Mapping[str, str] | None = None,
        only: Collection[str] | None = None,
        first: str = "",
    ) -> Iterator[Outcome]:
        """Outcomes one by one; where `first` fails, it is the only one. Raises `ZooError` for unknown checks."""
        known = dict(known_failures or {})
        wanted = list(self) if only is None else list(only)
        refuse("checks", [unknown("check", x, self) for x in dict.fromkeys([*wanted, *known]) if x not in self])
        for check in [x for x in self.values() if x.name in wanted]:
            outcome = _outcome(name, check, subject, known.get(check.name))
            yield outcome
            if check.name == first and outcome.status == "failed":
                return


def _outcome(name: str, check: Check[S], subject: S, known: str | None) -> Outcome:
    start = time.perf_counter()
    status, reason = "passed", ""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            check.function(subject)
    except Skip as skip:
        status, reason = "skipped", str(skip)
    except CheckFailure as failure:
        status, reason = "failed", str(failure)
    except Exception as error:  # whatever an author's code may raise is a failure of the check that met it
        place = inspect.getinnerframes(error.__traceback__)[-1] if error.__traceback__ else None
        where = f" at {place.filename}:{place.lineno}" if place else ""
        status = "failed"
        reason = str(
            CheckFailure(
                expected=f"no error while checking: {check.doc}",
                came=f"{type(error).__name__}: {error}{where}",
                change="what raised it, or refuse such input with a ZooError when the method is made",
            )
        )
    if known is not None and status == "failed":
        status, reason = "known", f"{known} ({reason})"
    elif known is not None:
        reason = str(
            CheckFailure(
                expected=f"the known failure {known!r}", came=f"{status}", change="take it out of known_failures"
            )
        )
        status = "failed"
    return Outcome(name, check.name, status, reason, time.perf_counter() - start)


def settle(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """All outcomes, or one `ConformanceError` if any failed."""
    found = list(outcomes)
    if any(outcome.status == "failed" for outcome in found):
        raise ConformanceError(found)
    return found


# -- what checks are written with -------------------------------------------------------------------------------------


def fail(expected: str, came: str, change: str) -> NoReturn:
    """Raise `CheckFailure` with what was expected, what came instead, and what to change."""
    raise CheckFailure(expected=expected, came=came, change=change)


def expect(condition: bool | Tensor, expected: str, came: str, change: str) -> None:
    """Raise `CheckFailure` unless the condition holds."""
    if not bool(condition):
        fail(expected, came, change)


def same(got: Tensor | None, want: Tensor | None, atol: float, what: str, change: str) -> None:
    """Fail unless two tensors agree within `atol` everywhere, NaN nowhere."""
    if got is None or want is None:
        expect(
            got is None and want is None,
            f"{what} {'absent' if want is None else 'present'}",
            "the contrary",
            change,
        )
        return
    got, want = got.detach(), want.detach()
    expect(got.shape == want.shape, f"{what} of shape {tuple(want.shape)}", f"{tuple(got.shape)}", change)
    error = (got.double() - want.double()).abs()
    error = torch.where(got == want, 0.0, error)  # equal infinities
    worst = float(error.max()) if error.numel() else 0.0
    if not worst <= atol:
        place = tuple(int(i) for i in torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape))
        fail(
            f"{what} to agree within {atol:.1e}",
            f"{float(got[place]):.6g} for {float(want[place]):.6g} at {place}, the worst of {error.numel()} values",
            change,
        )


def some(mask: Tensor) -> str:
    """Where a mask holds, for a message: how often, and the first place."""
    places = mask.nonzero()
    return f"{len(places)} times, first at {tuple(places[0].tolist())}" if len(places) else "nowhere"
