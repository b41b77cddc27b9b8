"""What is measured on drawn shots: the truth scores its bound, noise its floor, and each measure sees what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules import ShotQuality, ShotWorld
from datamodules.identities import Shown
from datamodules.quality import MEASURES, pixel_similarity

FILMS = 200
MOTION = {"motion_smoothness", "dynamic_degree", "subject_consistency", "background_consistency"}


def world(**settings: Any) -> ShotWorld:
    return ShotWorld(**{"grid": (4, 5), "frames_per_shot": 4, **settings})


def measure(world: ShotWorld, batch: dict[str, Any], clips: list[Tensor] | None = None) -> dict[str, float]:
    metric = world.sample_metrics()["quality"]
    assert isinstance(metric, ShotQuality)
    metric.update(batch["clips"] if clips is None else clips, batch)
    return {name: float(value) for name, value in metric.compute().items()}


def with_last(batch: dict[str, Any], last: Tensor) -> list[Tensor]:
    return [*batch["clips"][:-1], last]


def paint(world: ShotWorld, batch: dict[str, Any], identity: Tensor, position: Tensor) -> Tensor:
    """The last shot of each film (B, F, 3, H, W) with these identities (B,) at these places (B, F, 2)."""
    rows, frames = position.shape[:2]
    ground = batch["truth"]["background"][:, -1].repeat_interleave(frames)
    size = (world.grid[0] * 4, world.grid[1] * 4)
    painted = world.identities.render(identity.repeat_interleave(frames), position.flatten(0, 1), ground, size)
    return painted.unflatten(0, (rows, frames))


@pytest.mark.parametrize("settings", [{}, {"subjects": [2, 3], "frames_per_shot": [2, 6], "patch": (2, 4, 4)}])
def test_real_films_score_the_upper_bounds(settings: dict[str, Any]) -> None:
    films = world(**settings)
    found = measure(films, films.batch("validation", range(FILMS)))
    assert set(found) == set(MEASURES)
    for name in ("cross_shot_consistency", "subject_consistency", "background_consistency", "motion_accuracy"):
        assert found[name] == pytest.approx(1, abs=1e-6), name
    assert 0.9 < found["motion_smoothness"] < 1  # whole patches are jumps
    cells = films.cells[0] * films.cells[1]
    p = 1 - 1 / cells  # start and end are drawn apart: the shots that stand still are those where they agree
    assert abs(found["dynamic_degree"] - p) < 4 * (p * (1 - p) / FILMS) ** 0.5


def test_noise_scores_the_lower_bounds() -> None:
    films = world()
    batch = films.batch("validation", range(FILMS))
    torch.manual_seed(0)
    found = measure(films, batch, with_last(batch, torch.randn_like(batch["clips"][-1])))
    # Two clamped normal draws lie .83 apart on average, a half of which is .41.
    assert found["subject_consistency"] == pytest.approx(1 - 0.414, abs=0.01)
    assert found["background_consistency"] == pytest.approx(1 - 0.414, abs=0.01)
    assert found["motion_smoothness"] < 0.65
    assert found["cross_shot_consistency"] < 0.65
    assert found["motion_accuracy"] < 0.2  # one of twelve places by chance
    assert found["dynamic_degree"] > 0.95  # it is located anywhere: more is not better


def test_few_frames_leave_out_what_they_cannot_show() -> None:
    for frames, missing in ((1, MOTION), (2, {"motion_smoothness"})):
        films = world(frames_per_shot=frames)
        assert set(measure(films, films.batch("validation", range(4)))) == set(MEASURES) - missing


def test_no_background_is_no_figure() -> None:
    films = world(grid=(2, 2))
    found = measure(films, films.batch("validation", range(4)))
    assert set(found) == set(MEASURES) - {"background_consistency"}


def slow_cross_shot(films: ShotWorld, batch: dict[str, Any], clips: list[Tensor]) -> float:
    """Film by film, frame by frame, from the true identities and their masks."""
    truth, pixels = batch["truth"], films.identities.pixels
    ground = films.identities.grounds[:, :, None, None].expand(-1, -1, pixels, pixels)
    sprites = films.identities.templates(torch.zeros(4, dtype=torch.int64), ground)
    lengths = [clip.shape[1] for clip in clips]
    total = []
    for b in range(len(clips[0])):
        identity = truth["identity"][b].tolist()
        source = identity.index(identity[-1])
        shots = truth["position"][b].split(lengths)
        crops = []
        for shot in (source, len(clips) - 1):
            crops.append(
                [
                    frame[:, row : row + pixels, col : col + pixels]
                    for frame, (row, col) in zip(clips[shot][b], shots[shot].tolist(), strict=True)
                ]
            )
        ground = films.identities.grounds[truth["background"][b]]
        mean = torch.stack(crops[0]).mean(0)
        other = (truth["background"][b, source] + 1) % 4  # where a sprite is alike on two grounds it covers them
        outline = (sprites[other, identity[-1]] == sprites[truth["background"][b, source], identity[-1]]).all(0)
        expected = torch.where(outline, mean, ground[-1][:, None, None])
        total += [float(1 - (crop - expected).abs().mean() / 2) for crop in crops[1]]
    return sum(total) / len(total)


def test_cross_shot_consistency_compares_with_the_introduction() -> None:
    films = world(returns=5)
    batch = films.batch("validation", range(40))
    torch.manual_seed(0)
    clips = [(clip + 0.3 * torch.randn_like(clip)).clamp(-1, 1) for clip in batch["clips"]]
    assert measure(films, batch, clips)["cross_shot_consistency"] == pytest.approx(
        slow_cross_shot(films, batch, clips), abs=1e-5
    )
    # Another subject of the film is less like its introduction, and one that agrees in part is in between.
    position = batch["truth"]["position"][:, -4:]
    true = batch["truth"]["identity"][:, -1]
    other = torch.stack([next(i for i in film if i != film[-1]) for film in batch["truth"]["identity"]])
    texture = true // 4 * 4 + (true + 1) % 4
    scores = [
        measure(films, batch, with_last(batch, paint(films, batch, identity, position)))["cross_shot_consistency"]
        for identity in (true, texture, other)
    ]
    assert scores[0] == pytest.approx(1)
    assert scores[0] - 0.02 > scores[1] > scores[2] + 0.05


def test_cross_shot_consistency_compares_with_the_generated_introduction() -> None:
    films = world()
    batch = films.batch("validation", range(40))
    clips = list(batch["clips"])
    truth = batch["truth"]
    changed = (truth["identity"] + 40) % 192  # all shots show others, alike within a film
    ground = truth["background"].repeat_interleave(4, dim=1).flatten()
    shown = films.identities.render(
        changed.repeat_interleave(4, dim=1).flatten(), truth["position"].flatten(0, 1), ground, (16, 20)
    )
    clips = list(shown.unflatten(0, (40, 24)).split(4, dim=1))
    found = measure(films, batch, clips)
    assert found["cross_shot_consistency"] == pytest.approx(1)
    assert measure(films, batch, with_last(batch, clips[-1]))["cross_shot_consistency"] < 0.95


def test_consistencies_follow_vbenchs_mean_and_tell_subject_from_background() -> None:
    films = world()
    batch = films.batch("validation", range(10))
    last, position = batch["clips"][-1], batch["truth"]["position"][:, -4:]
    torch.manual_seed(0)
    noisy = (last + 0.4 * torch.randn_like(last)).clamp(-1, 1)
    found = measure(films, batch, with_last(batch, noisy))
    subject, background = [], []
    for film, places in zip(noisy, position.tolist(), strict=True):
        crops = [frame[:, r : r + 8, c : c + 8] for frame, (r, c) in zip(film, places, strict=True)]
        outside = torch.ones(4, 1, 16, 20, dtype=torch.bool)
        for away, (r, c) in zip(outside, places, strict=True):
            away[:, r : r + 8, c : c + 8] = False
        for t in (1, 2, 3):
            pairs = ((t, t - 1), (t, 0))
            subject += [1 - float((crops[a] - crops[b]).abs().mean()) / 2 for a, b in pairs]
            background += [
                1 - float((film[a] - film[b]).abs()[(outside[a] & outside[b]).expand(3, -1, -1)].mean()) / 2
                for a, b in pairs
            ]
    assert found["subject_consistency"] == pytest.approx(sum(subject) / len(subject), abs=1e-5)
    assert found["background_consistency"] == pytest.approx(sum(background) / len(background), abs=1e-5)
    smooth = [1 - float((film[t] - (film[t - 1] + film[t + 1]) / 2).abs().mean()) / 2 for film in noisy for t in (1, 2)]
    assert found["motion_smoothness"] == pytest.approx(sum(smooth) / len(smooth), abs=1e-5)


def test_motion_is_where_the_subject_is_seen() -> None:
    films = world()
    batch = films.batch("validation", range(60))
    identity, position = batch["truth"]["identity"][:, -1], batch["truth"]["position"][:, -4:]
    still = position[:, :1].expand(-1, 4, -1)
    found = measure(films, batch, with_last(batch, paint(films, batch, identity, still)))
    assert found["dynamic_degree"] == 0
    assert found["motion_accuracy"] == pytest.approx(float((still == position).all(-1).float().mean()))
    assert found["motion_smoothness"] == found["background_consistency"] == pytest.approx(1)
    # The wrong identity at the right places moves rightly: who is seen is recall's matter.
    moved = measure(films, batch, with_last(batch, paint(films, batch, (identity + 50) % 192, position)))
    assert moved["motion_accuracy"] == 1
    assert moved["dynamic_degree"] == measure(films, batch)["dynamic_degree"]


def test_locating_is_comparing_whole_frames_with_every_rendering() -> None:
    films = ShotWorld(grid=(3, 4), frames_per_shot=2, shapes=3, colours=3, textures=2)
    batch = films.batch("validation", range(6))
    torch.manual_seed(0)
    clip = batch["clips"][-1] + 0.9 * torch.randn_like(batch["clips"][-1])
    ground = batch["truth"]["background"][:, -1]
    places = torch.tensor([(4 * row, 4 * col) for row in range(2) for col in range(3)])
    found = films.identities.locate(Shown(clip, places[:1].expand(6, 2, 2), ground, torch.zeros_like(ground)), places)
    for b in range(6):
        for f in range(2):
            errors = []
            for place in places:
                drawn = films.identities.render(
                    torch.arange(18), place.expand(18, 2), ground[b].expand(18), clip.shape[-2:]
                )
                errors.append((drawn - clip[b, f]).double().square().sum((1, 2, 3)).min())
            assert torch.equal(found[b, f], places[int(torch.stack(errors).argmin())])


def test_similarity_is_one_for_identical_and_zero_for_opposite_pixels() -> None:
    x = torch.rand(4, 3, 5, 6) * 2 - 1
    assert torch.equal(pixel_similarity(x, x), torch.ones(4))
    assert torch.equal(pixel_similarity(torch.ones(2, 3, 5, 6), -torch.ones(2, 3, 5, 6)), torch.zeros(2))
    assert torch.equal(pixel_similarity(3 * torch.ones(2, 3, 5, 6), torch.ones(2, 3, 5, 6)), torch.ones(2))  # clamped
    assert pixel_similarity(x, x, torch.zeros(4, 1, 5, 6, dtype=torch.bool)).isnan().all()


def test_batches_add_up() -> None:
    films = world()
    metric = films.sample_metrics()["quality"]
    torch.manual_seed(0)
    parts = [films.batch("validation", numbers) for numbers in (range(5), range(5, 20))]
    noisy = [with_last(part, part["clips"][-1] + 0.5 * torch.randn_like(part["clips"][-1])) for part in parts]
    for part, clips in zip(parts, noisy, strict=True):
        metric.update(clips, part)
    singly = [measure(films, part, clips) for part, clips in zip(parts, noisy, strict=True)]
    for name, value in metric.compute().items():
        assert float(value) == pytest.approx((5 * singly[0][name] + 15 * singly[1][name]) / 20)
