"""Stand-ins for functions of torch whose first call imports sympy or torch's compiler, which takes seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

F = TypeVar("F", bound=Callable[..., Any])


def opaque(function: F) -> F:
    """Decorate a function that torch.compile calls and does not trace, without importing the compiler for it."""
    disabled = _disable_dynamo(function)  # the public torch.compiler.disable imports it here already

    @wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        compiles = torch.compiler.is_compiling() or "torch._dynamo" in sys.modules
        return (disabled if compiles else function)(*args, **named)

    return cast(F, call)


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """The shape to which tensors of these shapes broadcast; RuntimeError where they do not."""
    whole: Tensor = torch.broadcast_tensors(*(torch.empty(tuple(shape), device="meta") for shape in shapes))[0]
    return whole.shape
