"""What methods require of their settings: one wording for each kind of number, all reasons at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_zoo.errors import refuse


def is_count(value: object, least: int = 1) -> bool:
    """Whether a setting is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_share(value: object) -> bool:
    """Whether a setting is a number in (0, 1]."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def is_triple(sizes: tuple[int, ...]) -> bool:
    """Whether a setting is three whole numbers of at least 1: (frames, rows, cols)."""
    return len(sizes) == 3 and all(map(is_count, sizes))


def is_window(sizes: tuple[int, ...]) -> bool:
    """Whether a setting is three odd whole numbers of at least 1: (frames, rows, cols)."""
    return is_triple(sizes) and all(size % 2 for size in sizes)


KINDS = {
    "counts": (is_count, "a whole number of at least 1"),
    "from_zero": (lambda x: is_count(x, 0), "a whole number of at least 0"),
    "shares": (is_share, "in (0, 1]"),
    "triples": (is_triple, "three whole numbers of at least 1"),
    "windows": (is_window, "three odd whole numbers of at least 1"),
}


def require(method: object, *more: str, **settings: Mapping[str, Any]) -> None:
    """Raise `ZooError` for settings that a method cannot have, with all reasons at once.

    Args:
        method: Whose settings they are.
        more: Further reasons; empty strings are none.
        settings: Settings by name, grouped by what they must be: `counts` (whole numbers of at least 1), `from_zero`
            (of at least 0), `shares` (in (0, 1]), `triples` (three counts), `windows` (three odd counts).
    """
    wrong = [
        f"{name} must be {allowed}, got {value!r}"
        for kind, given in settings.items()
        for fits, allowed in (KINDS[kind],)
        for name, value in given.items()
        if not fits(value)
    ]
    refuse(type(method).__name__, [*wrong, *more])
