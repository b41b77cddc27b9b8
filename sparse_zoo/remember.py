"""Things computed once and used again.

Whatever is remembered is made outside of inference mode: what validation asked for first must serve training too, and
a tensor of inference mode cannot be saved for a backward pass.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch

from sparse_zoo.bounded import bounded

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def remembered(most: int) -> Callable[[F], F]:
    """Decorator: remember the results of the `most` latest arguments, which must be hashable."""

    def wrap(function: F) -> F:
        made: F = bounded(most)(torch.inference_mode(False)(function))  # type: ignore[assignment]
        return made

    return wrap


class lazy(cached_property[T]):
    """A property computed at first use."""

    def __init__(self, function: Callable[[Any], T]) -> None:
        super().__init__(torch.inference_mode(False)(function))
