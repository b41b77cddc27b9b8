"""What a mutant is, and the list of them all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest.mock import patch

from sparse_zoo.attention import Attention
from sparse_zoo.kernels.base import Kernel
from sparse_zoo.parallel import Ulysses
from sparse_zoo.testing import parallel
from sparse_zoo.testing.kernels import run_kernel_checks
from sparse_zoo.testing.methods import run_checks
from sparse_zoo.testing.suite import Outcome


@dataclass(frozen=True)
class Mutant:
    """A broken method, kernel or way to split a stream: its class, what is broken, the checks that must each catch it.

    For a way to split a stream, `settings` name the method that it splits, and that method's settings.
    """

    name: str
    broken: str
    caught_by: tuple[str, ...]
    cls: type[Attention] | type[Kernel] | type[Ulysses]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def outcomes(self) -> list[Outcome]:
        """What the checks named in `caught_by` find."""
        if issubclass(self.cls, Kernel):
            return list(run_kernel_checks(self.cls(), only=self.caught_by))
        if issubclass(self.cls, Ulysses):
            with patch.object(parallel, "ENGINE", self.cls):
                return list(run_checks(only=self.caught_by, **self.settings))
        return list(run_checks(self.cls, only=self.caught_by, **self.settings))


MUTANTS: list[Mutant] = []

C = TypeVar("C", bound=type[Attention] | type[Kernel] | type[Ulysses])


def mutant(*caught_by: str, **settings: Any) -> Callable[[C], C]:
    """Class decorator: list a mutant; the first line of its docstring says what is broken."""

    def add(cls: C) -> C:
        broken = (inspect.getdoc(cls) or "").partition("\n")[0]
        MUTANTS.append(Mutant(cls.__name__, broken, caught_by, cls, settings))
        return cls

    return add
