"""What stands in for functions of torch that import much does the same."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_zoo.light import broadcast_shapes, opaque

SHAPES = st.lists(st.lists(st.integers(0, 3), max_size=4).map(tuple), min_size=1, max_size=3)


@given(shapes=SHAPES)
@settings(deadline=None)
def test_shapes_broadcast_as_in_torch(shapes: list[tuple[int, ...]]) -> None:
    try:
        want = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            broadcast_shapes(*shapes)
    else:
        assert broadcast_shapes(*shapes) == want


@pytest.mark.parametrize("imported", [True, False])
def test_what_is_opaque_is_not_traced(imported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler imported before the call, and in a process that seems to be without it."""
    traced: list[bool] = []

    @opaque
    def inner(x: Tensor) -> Tensor:
        traced.append(torch.compiler.is_compiling())
        return x + len(traced)

    def outer(x: Tensor) -> Tensor:
        return inner(x * 2) * 3

    compiled = torch.compile(outer, backend="eager")
    if not imported:
        monkeypatch.delitem(sys.modules, "torch._dynamo")
    assert inner(torch.zeros(1)).item() == 1
    assert [compiled(torch.ones(1)).item() for _ in range(2)] == [12, 15]
    assert traced == [False] * 3
