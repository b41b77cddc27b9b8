"""Which cases of a test are fast. The others are slow: `make test-slow`, `make test-all` and CI run them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

KINDS = ("dense", "moc", "moga", "svg2", "vsa")
"""One method of each kind: no choice, routed chunks, a learned router of several plans, clusters, pooled branches."""


def marks(name: str, fast: Collection[str] = KINDS) -> list[pytest.MarkDecorator]:
    """Marks of a `pytest.param`: slow, unless the name is in `fast`."""
    return [] if name in fast else [pytest.mark.slow]


def cases(names: Iterable[str], fast: Collection[str] = KINDS) -> list[Any]:
    """Arguments for `pytest.mark.parametrize`: each name, marked slow unless it is in `fast`."""
    return [pytest.param(name, marks=marks(name, fast)) for name in names]
