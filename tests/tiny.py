"""A sweep that runs in seconds: two cells, two steps, synthetic films of two shots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

BASE: dict[str, Any] = {
    "data": {
        "name": "shot_world",
        "subjects": 1,
        "tags": 1,
        "grid": [2, 2],
        "patch": [1, 3, 3],
        "frames_per_shot": 1,
        "batch_size": 1,
        "val_films": 1,
    },
    "model": {"dim": 16, "depth": 1, "heads": 2},
    "trainer": {"max_steps": 2, "val_check_interval": 1, "accelerator": "cpu", "log_every_n_steps": 1},
    "sampling": {"every": 2, "steps": 1},
}

OWN_AND_PREVIOUS = '''
import sparse_zoo as zoo


@zoo.register("own_and_previous_shots")
class OwnAndPreviousShots(zoo.Attention):
    """Every token attends to its own shot and to the `reach` shots before it."""

    def __init__(self, *, reach: int = 1, **base):
        super().__init__(**base)
        self.reach = reach

    def plan(self, q, k, layout):
        s = layout.chunks("shot", captions="inside")
        gap = s.shot[:, None] - s.shot
        return zoo.Plan.blocks(s, s, (s.sample[:, None] == s.sample) & (gap >= 0) & (gap <= self.reach))
'''

DIVERGES = '''
import torch

import sparse_zoo as zoo


@zoo.register("diverges")
class Diverges(zoo.Attention):
    """Dense attention whose auxiliary loss is NaN from the second step on."""

    def plan(self, q, k, layout):
        return zoo.Plan.dense(layout)

    def losses(self, call):
        return {"bad": torch.tensor(float("nan") if call.step else 0.0)}
'''


def write_sweep(path: Path, **parts: Any) -> Path:
    """A sweep file over `BASE`; its name is the file's."""
    path.write_text(yaml.safe_dump({"base": BASE, **parts}, sort_keys=False))
    return path
