"""What a mutant is, and the list of them all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sparse_zoo.attention import Attention
from sparse_zoo.kernels.base import Kernel
from sparse_zoo.testing.kernels import run_kernel_checks
from sparse_zoo.testing.methods import run_checks
from sparse_zoo.testing.suite import Outcome


@dataclass(frozen=True)
class Mutant:
    """A broken method or kernel: its class, one line on what is broken, the checks that must each catch it."""

    name: str
    broken: str
    caught_by: tuple[str, ...]
    cls: type[Attention] | type[Kernel]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> type[Attention] | Kernel:
        """What the suite is given: the class of a method, or a kernel."""
        return self.cls() if issubclass(self.cls, Kernel) else self.cls

    def outcomes(self) -> list[Outcome]:
        """What the checks named in `caught_by` find."""
        made = self.make()
        if isinstance(made, Kernel):
            return list(run_kernel_checks(made, only=self.caught_by))
        return list(run_checks(made, only=self.caught_by, **self.settings))


MUTANTS: list[Mutant] = []

C = TypeVar("C", bound=type[Attention] | type[Kernel])


def mutant(*caught_by: str, **settings: Any) -> Callable[[C], C]:
    """Class decorator: list a mutant; the first line of its docstring says what is broken."""

    def add(cls: C) -> C:
        broken = (inspect.getdoc(cls) or "").partition("\n")[0]
        MUTANTS.append(Mutant(cls.__name__, broken, caught_by, cls, settings))
        return cls

    return add
