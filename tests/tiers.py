"""Which cases of a test are fast. The others are slow: `make test-slow` and `make test-all` run them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

KINDS = ("dense", "moc", "moga", "svg2", "vsa")
"""One method of each kind: no choice, routed chunks, a learned router of several plans, clusters, pooled branches."""


def marks(value: object, fast: Collection[object] = KINDS) -> list[pytest.MarkDecorator]:
    """Marks of a `pytest.param`: slow, unless its value is in `fast`."""
    return [] if value in fast else [pytest.mark.slow]


def cases(values: Iterable[object], fast: Collection[object] = KINDS) -> list[Any]:
    """Arguments for `pytest.mark.parametrize`: each value, marked slow unless it is in `fast`."""
    return [pytest.param(value, marks=marks(value, fast)) for value in values]
