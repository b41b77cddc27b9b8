"""Pictures of a run: stored as arrays in the run's folder while it trains, drawn when they are shown.

| file | arrays |
|---|---|
| `plan-LAYER-BRANCH.npz` | the fields of `sparse_zoo.picture.PlanMap` |
| `shots-LAYER-BRANCH.npz` | `picks` (S, S): how often a shot (row) chose another; `looped`: the picks in a loop |
| `step_N_film_M.npz` | `real`, `guess`, `generated`: a row of frames for each version, uint8 (H, W, 3) |
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import sparse_zoo as zoo
from experiments.analysis.seed_groups import Group
from experiments.reporting.leaderboard import Leaderboard
from experiments.reporting.limits import MAX_PICTURED_GROUPS, join_names
from experiments.reporting.loading import SweepResults
from experiments.reporting.pictures import LOOP, count_picks, loop_text, token_plans
from experiments.tracking.arrays import read_arrays, write_arrays
from experiments.tracking.store import Result
from sparse_zoo.diagnostics import Diagnosis, loops
from sparse_zoo.picture import INK, PAPER, PlanMap, draw_map, plan_map

PIXELS = 256  # of a plan's map
SHOT_PIXELS = 16  # of a shot in a matrix of picks
MAX_SIDE = 4096  # pixels
MAX_SHOTS = 256
WIDE_FILM = 12  # times as wide as high: such a film needs the whole page
HATCH = (190, 194, 200)
PLAN_FIELDS = {"kind": "u", "shot_starts": "b", "film_starts": "b"}  # name -> numpy kind
PNG = (
    "{} pictures of {} are PNG files, which an earlier version stored and which are not read; zoo sweep --fresh trains"
    " the cells again and stores data"
)


def save_plans(results: Sequence[zoo.Result], folder: Path) -> list[dict[str, str]]:
    """Store the plans of every layer's branches, for the first batch item and head.

    Plans over pooled queries or keys are left out.

    Returns:
        {"file", "label"} of each, in order.
    """
    saved = []
    for layer, result in enumerate(results):
        for branch, plan in token_plans(result).items():
            label = f"layer {layer + 1}" + (f", branch {branch + 1}" if len(result.plans) > 1 else "")
            fields = vars(plan_map(plan, result.layout, pixels=PIXELS))
            path = folder / f"plan-{layer + 1}-{branch + 1}.npz"
            write_arrays(path, {name: values.numpy() for name, values in fields.items()})
            saved.append({"file": path.name, "label": label})
    return saved


def save_picks(layers: Sequence[Sequence[Diagnosis]], folder: Path) -> list[dict[str, str]]:
    """Store who routed to which shot, for the first batch item and all heads, of every layer's routed branches.

    Returns:
        {"file", "label"} of each, in order.
    """
    saved = []
    for layer, diagnoses in enumerate(layers):
        for branch in sorted({one.branch for one in diagnoses}):
            picks = count_picks(diagnoses, branch)
            if picks is not None:
                circles = loops(picks)
                looped = np.zeros(picks.shape, bool)
                for loop in circles:
                    looped[loop, [*loop[1:], loop[0]]] = True
                path = folder / f"shots-{layer + 1}-{branch + 1}.npz"
                write_arrays(path, {"picks": picks.numpy(), "looped": looped})
                named = ", ".join(map(loop_text, circles))
                label = f"layer {layer + 1}, picks by shot" + (f", loops {named}" if named else "")
                saved.append({"file": path.name, "label": label})
    return saved


def draw(folder: Path, name: str) -> np.ndarray:
    """Draw a stored plan, matrix of picks or film (its rows stacked): uint8 (H, W, 3).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read or holds something else; the message is one line.
    """
    arrays = read_arrays(folder, name)
    if "picks" in arrays:
        return _draw_picks(arrays)
    if "share" in arrays:
        return _draw_plan(arrays)
    return np.concatenate(_check_film(arrays))


def read_film(folder: Path, name: str) -> list[np.ndarray]:
    """Read the rows of a film: real, guess, generated, uint8 (H, W, 3) each; raises as `draw` does."""
    return _check_film(read_arrays(folder, name))


@dataclass
class Film:
    """A film of the validation data and what every group made of it; images are data URIs."""

    real: str
    wide: bool
    versions: list[Versions]


class Versions(NamedTuple):
    """A group's guess from a half-noised copy of a film, and the film that it generated from the captions."""

    group: Group
    guess: str
    generated: str


class Plans(NamedTuple):
    """The pictures of a group's plans: label and data URI of each."""

    group: Group
    images: list[tuple[str, str]]


class Pictures(NamedTuple):
    """Plans, films, and a line for each picture that cannot be shown."""

    plans: list[Plans]
    films: list[Film]
    left_out: list[str]


def load_pictures(sweep: SweepResults, leaderboard: Leaderboard) -> Pictures:
    """Read and draw the pictures of the plotted groups, of one run each."""
    plans: list[Plans] = []
    films: dict[str, Film] = {}
    left_out: list[str] = []
    old: dict[str, int] = {}
    rows = {group.name for group in leaderboard.rows}
    for group in leaderboard.plotted[: MAX_PICTURED_GROUPS if sweep.is_long else None]:
        run = group.first
        images = []
        for picture in run.pictures if group.name in rows else ():
            with _collect_failures(run, picture["file"], left_out, old):
                images.append((picture["label"], _data_uri(draw(Path(run.folder), picture["file"]))))
        plans += [Plans(group, images)] * bool(images)
        for name in run.strips if group.finished else ():
            with _collect_failures(run, name, left_out, old):
                real, guess, generated = read_film(Path(run.folder), name)
                key = _data_uri(real)
                film = films.setdefault(key, Film(key, real.shape[1] > WIDE_FILM * real.shape[0], []))
                film.versions.append(Versions(group, _data_uri(guess), _data_uri(generated)))
    if old:
        left_out.append(PNG.format(sum(old.values()), join_names([*old])))
    return Pictures(plans, list(films.values()), left_out)


@contextmanager
def _collect_failures(run: Result, name: str, left_out: list[str], old: dict[str, int]) -> Iterator[None]:
    """Turn what keeps a picture from being shown into a line; PNG files of earlier versions are only counted."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        if name.endswith(".png"):
            old[run.name] = old.get(run.name, 0) + 1
        else:
            why = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
            left_out.append(f"{run.name}: {name}: {why}")


def _draw_plan(arrays: dict[str, np.ndarray]) -> np.ndarray:
    share = _check(arrays, "share", "f", MAX_SIDE, MAX_SIDE)
    size = len(share)
    fields = {name: _check(arrays, name, kind, size) for name, kind in PLAN_FIELDS.items()}
    wrong = share.shape != (size, size) or any(len(values) != size for values in fields.values())
    if wrong or not ((share >= 0) & (share <= 1)).all() or fields["kind"].max() > 2:
        raise ValueError("it is not the map of a plan")
    tensors = {name: torch.from_numpy(values.copy()) for name, values in (fields | {"share": share}).items()}
    image: np.ndarray = draw_map(PlanMap(**tensors)).numpy()
    return image


def _draw_picks(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """A matrix whose rows choose and whose columns are chosen: the darker, the larger the share of the row.

    Picks in a loop have red frames. The own shot is hatched where it cannot be chosen.
    """
    picks, looped = _check(arrays, "picks", "f", MAX_SHOTS, MAX_SHOTS), _check(arrays, "looped", "b", *[MAX_SHOTS] * 2)
    if picks.shape[0] != picks.shape[1] or looped.shape != picks.shape or not (picks >= 0).all():
        raise ValueError("it is not a matrix of picks")
    share = np.sqrt(picks / np.maximum(picks.sum(1, keepdims=True), 1))[..., None]
    small: np.ndarray = (np.asarray(PAPER) * (1 - share) + np.asarray(INK) * share).round().astype(np.uint8)
    image = small.repeat(SHOT_PIXELS, 0).repeat(SHOT_PIXELS, 1)
    across = np.arange(SHOT_PIXELS)
    for shot in np.flatnonzero(np.diag(picks) == 0):
        own = slice(shot * SHOT_PIXELS, (shot + 1) * SHOT_PIXELS)
        image[own, own][(across[:, None] + across) % 5 == 0] = HATCH
    inside = slice(2, SHOT_PIXELS - 2)
    for a, b in np.argwhere(looped):
        cell = image[a * SHOT_PIXELS : (a + 1) * SHOT_PIXELS, b * SHOT_PIXELS : (b + 1) * SHOT_PIXELS]
        middle = cell[inside, inside].copy()
        cell[:] = LOOP
        cell[inside, inside] = middle
    return image


def _check_film(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    rows = [_check(arrays, name, "u", MAX_SIDE, 16 * MAX_SIDE, 3) for name in ("real", "guess", "generated")]
    if any(row.dtype != np.uint8 or row.shape != rows[0].shape or row.shape[2] != 3 for row in rows):
        raise ValueError("it is not the rows of a film")
    return rows


def _check(arrays: dict[str, np.ndarray], name: str, kind: str, *limits: int) -> np.ndarray:
    """Return an array of a kind of numbers, as many axes as `limits` and at most so long; raises `ValueError`."""
    if name not in arrays:
        raise ValueError(f"it has no array {name!r}")
    array = arrays[name]
    fits = array.dtype.kind == kind and array.ndim == len(limits) and array.size
    if not fits or any(size > limit for size, limit in zip(array.shape, limits, strict=True)):
        raise ValueError(f"its array {name!r} has type {array.dtype} and shape {array.shape}")
    return array


def _data_uri(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
