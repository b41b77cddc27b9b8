"""Results on disk that no training made, to try reports on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sparse_zoo as zoo
from experiments.reporting import pictures
from experiments.tracking.store import Asked, Cell, Result, write_sweep
from lit_modules.callbacks import write_picture
from sparse_zoo.strips import film_pictures

# Of the page of the full sweep, in order.
SECTIONS = [
    "unfinished",
    "leaderboard",
    "differences",
    "distance",
    "measures",
    "cost",
    "effects",
    "training",
    "plans",
    "films",
    "provenance",
]
COMMAND = "zoo sweep made_up --size gpu"
LAYOUT = zoo.Layout.film([zoo.Shot(2, 4, 4), zoo.Shot(1, 4, 4)])


def strip(drawn: float) -> Tensor:
    """A film of two shots, of which one value was `drawn`; the real one is the same for all."""
    real = [torch.linspace(-1, 1, frames * 3 * 12 * 12).view(1, frames, 3, 12, 12) for frames in (2, 1)]
    return film_pictures(LAYOUT, [real, [clip / 2 for clip in real], [torch.full_like(c, drawn) for c in real]])[0]


def finished(cell: Cell, sweep: str, val_loss: float, **more: Any) -> Result:
    """A result whose pictures are there."""
    folder = cell.folder(sweep)
    pictures.save(torch.zeros(8, 8, 3, dtype=torch.uint8), folder / "plan-1-1.png")
    write_picture(folder / "film.png", strip(min(1.0, val_loss)))
    made = Result(
        name=cell.name,
        attention=cell.config["attention"],
        status="finished",
        seed=cell.config["seed"],
        first_loss=1.25,
        last_loss=1.0,
        val_loss=val_loss,
        density=0.25,
        flops=2e9,
        kernel="cpu",
        seconds_per_step=0.5,
        id=cell.id,
        steps=2,
        seconds=3.0,
        peak_memory=2**20,
        curves={"train/flow": [(1, 1.3), (2, 1.2)], "val/loss": [(1, 2 * val_loss), (2, val_loss)]},
        pictures=[{"file": "plan-1-1.png", "label": "layer 1"}],
        strips=["film.png"],
        folder=str(folder),
        provenance={"commit": "abc", "pid": 1, "host": "here", "changed since": True},
        data={"skipped": [{"path": "bad.mp4", "reason": "no video stream"}]},
        config=cell.config,
    )
    return replace(made, **more)


def write_sweep_of(
    name: str,
    recalls: Mapping[str, Sequence[float | None]],
    attention: Mapping[str, Any],
    world: str | None = None,
) -> None:
    """A sweep whose groups have these recalls, by seed, None for a cell that failed; with chance, and films judged.

    Sweeps have films of their own, unless their `world` is the same.
    """
    rng, cells = np.random.default_rng(0), []
    for number, (group, values) in enumerate(recalls.items()):
        for seed, recall in enumerate(values):
            films = {"name": world or name, "seed": seed}
            cell = Cell(f"{group}-s{seed}", {"attention": attention[group], "seed": seed, "data": films}, group)
            cells.append(cell)
            if recall is None:
                made = replace(finished(cell, name, 9.0), status="failed", reason="ValueError: out of <memory>_&")
            else:
                others = {f"{part}_recall": (1 + recall) / 2 for part in ("shape", "colour", "texture")}
                others |= {"wrong_subject": (1 - recall) / 9}
                far = {f"identity_recall_back_{back}": recall * (1 - back / 20) for back in (1, 2, 3, 4, 10)}
                drawn = {"identity_recall": recall, **others, **far}
                more = dict.fromkeys(("cross_shot_consistency", "motion_accuracy", "subject_consistency"), recall)
                made = finished(
                    cell,
                    name,
                    1 - recall / 2,
                    metrics={**drawn, **more, **{f"whole_{key}": value / 2 for key, value in drawn.items()}},
                    chance={"identity_recall": 1 / 192, "shape_recall": 1 / 6, "whole_identity_recall": 1 / 192},
                    curves={
                        "train/flow": [(1, 1.3), (2, 1.2)],
                        "val/loss": [(1, 2 - recall), (2, 1 - recall / 2)],
                        "val/identity_recall": [(1, recall / 2), (2, recall)],
                    },
                    films={"identity_recall": (rng.random(64) < recall).astype(float).tolist()},
                    density=0.9 / (1 + number),
                    flops=2e9 / (1 + number),
                    seconds_per_step=0.2 + 0.01 * number + 0.002 * seed,
                )
            made.write(cell.folder(name))
    write_sweep(name, Asked("A sweep that was made up: 100 % of it & <more>.", tuple(cells), command=COMMAND))


def write_full_sweep(name: str = "full") -> str:
    """Five methods with three seeds: controls, a failed cell, a setting that differs alone."""
    recalls = {
        "dense": (1.0, 0.99, 0.995),
        "moc_k2": (0.93, 0.95, 0.945),
        "moc_k1_of_a_rather_long_name": (0.80, 0.76, 0.81),
        "own_shot": (0.004, 0.008, 0.002),
        "random_shot": (0.012, 0.01, None),
    }
    attention = {key: {"name": key} for key in recalls} | {
        "moc_k2": {"name": "moc", "top_k": 2, "anchors": ["text", "shot"]},
        "moc_k1_of_a_rather_long_name": {"name": "moc", "top_k": 1, "anchors": ["text", "shot"]},
    }
    write_sweep_of(name, recalls, attention)
    return name
