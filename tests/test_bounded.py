"""Caches of layouts stay within their bytes, whatever the layouts are."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import pytest
import torch

from lit_modules.stream import stream
from sparse_zoo import Layout, Shot, bounded
from sparse_zoo.bounded import tensor_bytes
from sparse_zoo.partition import refine
from sparse_zoo.remember import lazy, remembered


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(bounded, "BYTES", 4 << 20)
    monkeypatch.setattr(bounded, "_held", {})
    return 4 << 20


def test_latest_results_are_kept_by_number_and_by_bytes(limit: int) -> None:
    made: list[int] = []

    @remembered(3)
    def zeros(size: int) -> torch.Tensor:
        made.append(size)
        return torch.zeros(size)

    for size in (1, 2, 3, 1, 4, 1, 2):
        assert len(zeros(size)) == size
    assert made == [1, 2, 3, 4, 2]
    made.clear()
    large = limit // 4
    assert zeros(large) is zeros(large)  # over the limit alone, and yet kept
    assert len(zeros(1)) == 1
    assert made == [large, 1] or made == [large]
    assert sum(bounded._held.values()) <= limit


def test_lazy_properties_and_shared_storage_count_once() -> None:
    @dataclass(frozen=True, eq=False)
    class Holder:
        x: torch.Tensor

        @lazy
        def twice(self) -> torch.Tensor:
            return torch.cat([self.x, self.x])

    holder = Holder(torch.zeros(10))
    assert tensor_bytes([holder, holder, holder.x[:5]], set()) == 40
    assert holder.twice.shape == (20,)
    assert tensor_bytes(holder, set()) == 120


@pytest.mark.slow
def test_memory_stays_bounded_over_many_layouts(limit: int) -> None:
    def live() -> int:
        gc.collect()
        # Subclasses, such as those that torch.compile leaves behind, may have no memory to ask for.
        return tensor_bytes([x for x in gc.get_objects() if type(x) is torch.Tensor], set())

    before = live()
    for number in range(200):
        layout = Layout.film([Shot(20 + number % 25, 10, 3 + number // 25)], caption=1)
        chunks, shots = layout.chunks("frame"), layout.chunks("shot")
        assert refine(chunks, shots).pieces.piece_of.shape[-1] == len(layout)
        assert len(stream(layout).row_of) == len(layout)
    assert live() - before < 2 * limit
    assert sum(bounded._held.values()) < 2 * limit
