"""Run the conformance suite of sparse-attention-zoo, with a slow rule that goes token by token."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from zoo_keyframes import Keyframes

import sparse_zoo as zoo
from sparse_zoo import testing


@testing.slow_routing(Keyframes)
def rule(attention: Keyframes, call: zoo.Call) -> list[tuple[Tensor, float]]:
    x = call.layout
    mask = torch.zeros(len(x), len(x), dtype=torch.bool)
    for i in range(len(x)):
        for j in range(len(x)):
            back = int(x.shot[i] - x.shot[j])
            keyframe = x.shot_frame[j] < attention.frames and back <= attention.reach
            mask[i, j] = x.sample[i] == x.sample[j] and (back == 0 or (back > 0 and bool(x.is_text[j] or keyframe)))
    return [(mask, 1.0)]


@testing.parametrize_methods("keyframes")
def test_keyframes_passes_the_conformance_suite(check: Callable[[], None]) -> None:
    check()


def test_bad_settings_are_refused_together() -> None:
    with pytest.raises(zoo.ZooError, match=r"reach must be at least 0, got -1(.|\n)*frames must be at least 1, got 0"):
        zoo.build("keyframes", heads=1, head_dim=4, reach=-1, frames=0)
