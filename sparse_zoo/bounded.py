"""A cache of the latest results, bounded by their number and, all such caches together, by their bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from functools import wraps
from threading import RLock
from types import NoneType
from typing import Any, TypeVar, cast

from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

BYTES = 1 << 29  # of all caches together: a video set may have another layout in every batch

_held: dict[int, int] = {}  # bytes by cache, as last counted
_lock = RLock()


def bounded(most: int) -> Callable[[F], F]:
    """Decorator: cache the results of the `most` latest arguments, which must be hashable.

    Results and arguments count with all tensors that they hold, lazily computed ones too. Where all caches together
    exceed `BYTES`, the cache that has just grown drops its oldest entries, but keeps the newest.

    Entries grow when their lazy properties are asked for. All of a cache are counted again once an eighth of them is
    new, or once the bytes seem too many.
    """

    def wrap(function: F) -> F:
        entries: OrderedDict[Hashable, Any] = OrderedDict()
        new = 0  # since all were counted

        @wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            nonlocal new
            key = (args, *sorted(named.items()))
            with _lock:
                if key in entries:
                    entries.move_to_end(key)
                    return entries[key]
            made = function(*args, **named)
            with _lock:
                entries[key] = made
                while len(entries) > most:
                    entries.popitem(last=False)
                new += 1
                _held[id(entries)] = _held.get(id(entries), 0) + tensor_bytes((key, made), set())
                if 8 * new < len(entries) and sum(_held.values()) <= BYTES:
                    return made
                new = 0
                seen: set[int] = set()
                sizes = {k: tensor_bytes(k, seen) + tensor_bytes(value, seen) for k, value in reversed(entries.items())}
                others = sum(held for cache, held in _held.items() if cache != id(entries))
                while len(entries) > 1 and others + sum(sizes.values()) > BYTES:
                    oldest, _ = entries.popitem(last=False)
                    del sizes[oldest]
                _held[id(entries)] = sum(sizes.values())
            return made

        return cast(F, call)

    return wrap


def tensor_bytes(x: Any, seen: set[int]) -> int:
    """Bytes of the tensors that an object holds; those whose storage or object is in `seen` count no more."""
    total, todo = 0, [x]
    while todo:
        x = todo.pop()
        if isinstance(x, Tensor):
            storage = x.untyped_storage()
            place = storage.data_ptr() or id(storage)
            total += 0 if place in seen else storage.nbytes()
            seen.add(place)
        elif id(x) not in seen and not isinstance(x, type):
            seen.add(id(x))
            if not isinstance(x, tuple | list):
                x = list((x if isinstance(x, Mapping) else getattr(x, "__dict__", {})).values())
            todo += [inner for inner in x if type(inner) not in PLAIN]
    return total


PLAIN = frozenset({int, float, bool, str, NoneType})  # what holds nothing, and is most of what there is
