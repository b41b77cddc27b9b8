"""Caches of values computed on the host and copied to the device that asks for them.

What follows from a layout depends on counts (how many chunks, how large), and a GPU would make the host wait for each
of them. It is therefore computed on the CPU, whatever device the arguments are on, and copied once, without waiting.

Everything cached is computed outside inference mode: what validation computed first must serve training too, and a
tensor of inference mode cannot be saved for a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cached_property, wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from sparse_zoo.bounded import bounded

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

CPU = torch.device("cpu")


class Origin(NamedTuple):
    """The CPU object that a copy on a device was made from, and that device."""

    host: Any
    device: torch.device


def origin(x: object) -> Origin | None:
    """The origin of a partition, part or plan; None if it was made on its device."""
    found: Origin | None = vars(x).get("_origin") if hasattr(x, "__dict__") else None
    return found


def remembered(most: int) -> Callable[[F], F]:
    """Decorate a function to cache the results of its `most` latest arguments, which must be hashable.

    Arguments on a device (a `Layout`, a `torch.device`, a copy made by `on_device`) are replaced by their CPU origins,
    and the result is copied to their device. An argument without such an origin, whose pieces were made on the device
    from values, is passed as it is.
    """

    def wrap(function: F) -> F:
        made = bounded(most)(torch.inference_mode(False)(function))

        @bounded(most)
        @torch.inference_mode(False)
        def copied(device: torch.device, *args: Any, **named: Any) -> Any:
            return on_device(made(*args, **named), device)

        @wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            origins = [_host(x) for x in (*args, *named.values())]
            away = {found.device for found in origins if found is not None and found.device != CPU}
            if len(away) != 1 or any(found is None for found in origins):
                return made(*args, **named)
            hosts = [cast(Origin, found).host for found in origins]
            return copied(away.pop(), *hosts[: len(args)], **dict(zip(named, hosts[len(args) :], strict=True)))

        return cast(F, call)

    return wrap


class Cached:
    """Base of dataclasses on which results are cached: a pickle or copy holds their fields alone.

    Cached results may be large (copies on devices, a kernel's tables) or hold functions, which cannot be pickled.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(cast(Any, self))}


class lazy(cached_property[T]):
    """A property computed at first use. On a copy on a device it is computed from the origin, then copied."""

    def __init__(self, function: Callable[[Any], T]) -> None:
        @torch.inference_mode(False)
        @wraps(function)
        def compute(self: Any) -> T:
            found = origin(self)
            if found is None:
                return function(self)
            return cast(T, on_device(getattr(found.host, function.__name__), found.device))

        super().__init__(compute)


def on_device(x: Any, device: torch.device) -> Any:
    """Copy a tensor, or an object that holds tensors (dataclass, layout, tuple, list, dict), from the CPU.

    A dataclass is copied once per device, so that results cached on it (lazy properties, a kernel's tables) are reused.
    """
    if isinstance(x, Tensor):
        return copy_to(x, device)
    if hasattr(x, "to") and not isinstance(x, type):  # a layout
        return x.to(device)
    if is_dataclass(x) and not isinstance(x, type):
        copies: dict[torch.device, Any] = x.__dict__.setdefault("_copies", {})
        if device not in copies:
            copy = object.__new__(type(x))  # what __init__ checks was checked on the CPU
            for field in fields(x):
                object.__setattr__(copy, field.name, on_device(getattr(x, field.name), device))
            object.__setattr__(copy, "_origin", Origin(x, device))
            copies[device] = copy
        return copies[device]
    if isinstance(x, dict):
        return {key: on_device(value, device) for key, value in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(on_device(value, device) for value in x))
    if isinstance(x, tuple | list):
        return type(x)(on_device(value, device) for value in x)
    return x


def copy_to(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to a device without making the host wait: through pinned memory, if the device is a GPU."""
    device = torch.device(device)
    if x.device == device:
        return x
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=device.type != "cpu")


def _host(x: Any) -> Origin | None:
    """An argument on the CPU and the device it came with; None if it was made on its device."""
    if isinstance(x, torch.device):
        return Origin(CPU, x)
    found = origin(x)
    if found is not None:
        return found
    device = getattr(x, "device", CPU)
    if device == CPU:
        return Origin(x, CPU)
    return Origin(x.to(CPU), device) if hasattr(x, "to") and not isinstance(x, Tensor) else None
