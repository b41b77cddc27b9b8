"""The harder ShotWorld: views, distractors, scenery, judged returns; and the first level, which stays as it was."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules import ShotWorld
from datamodules.identities import BACKGROUNDS, COLOURS, SCREEN, SHAPES, TEXTURES, Identities, Shown
from datamodules.judged_shots import judged_shots
from sparse_zoo.errors import ZooError

HARD: dict[str, Any] = {
    "subjects": 4,
    "returns": 5,
    "grid": (4, 4),
    "poses": 8,
    "scales": 2,
    "screens": 5,
    "distractors": 2,
    "scenery": True,
    "judged": "returns",
}


# An independent renderer, pixel by pixel in float64.


def covers(shape: str, x: float, y: float) -> bool:
    radius = (x * x + y * y) ** 0.5
    return {
        "square": True,
        "disc": radius <= 1,
        "diamond": abs(x) + abs(y) <= 1,
        "triangle": 2 * abs(x) <= y + 1,
        "cross": abs(x) <= 0.4 or abs(y) <= 0.4,
        "ring": 0.55 < radius <= 1,
    }[shape]


def source_pixel(row: int, col: int, pose: int, width: int) -> tuple[int, int]:
    """The pixel of the upright drawing that is seen at (row, col): turn back by 90 degrees, then mirror."""
    for _ in range(pose % 4):
        row, col = col, width - 1 - row
    return (row, width - 1 - col) if pose >= 4 else (row, col)


def ground_pixel(background: int, frame: int, row: int, col: int, *, scenery: bool) -> list[float]:
    colour = [*BACKGROUNDS.values()][background]
    along = [row, col, row + col, row - col][background % 4] + frame
    dark = scenery and along // 4 % 2 == 1
    return [(c + 1) / 2 - 1 if dark else c for c in colour]


def window_pixel(
    world: ShotWorld, identity: int, view: int, row: int, col: int
) -> list[float] | tuple[float, ...] | None:
    """The colour at a pixel of the window; None where the ground is seen."""
    of = world.identities
    pose, scale, screen = view // (of.scales * of.screens), view // of.screens % of.scales, view % of.screens
    half = of.pixels // 2
    if screen and (row // half, col // half) == ((screen - 1) // 2, (screen - 1) % 2):
        return SCREEN
    width = of.pixels * (4, 3)[scale] // 4
    edge = (of.pixels - width) // 2
    if not (edge <= row < edge + width and edge <= col < edge + width):
        return None
    r, c = source_pixel(row - edge, col - edge, pose, width)
    shape = SHAPES[identity // (of.colours * of.textures)]
    if not covers(shape, (c + 0.5) / width * 2 - 1, (r + 0.5) / width * 2 - 1):
        return None
    bar = [r * 4 // width % 2 == 1, c * 4 // width % 2 == 1]
    texture = TEXTURES[identity % of.textures]
    dark = {"plain": False, "rows": bar[0], "columns": bar[1], "checks": bar[0] != bar[1]}[texture]
    colour = [*COLOURS.values()][identity // of.textures % of.colours]
    return [(x + 1) / 2 - 1 if dark else x for x in colour]


def slow_frame(world: ShotWorld, script: Any, shot: int, frame: int, position: tuple[int, int]) -> np.ndarray[Any, Any]:
    size, pixels = [a * b for a, b in zip(world.grid, world.patch[1:], strict=True)], world.identities.pixels
    background, plain = int(script.background[shot]), world.identities.scenery
    made = np.array(
        [[ground_pixel(background, frame, row, col, scenery=plain) for col in range(size[1])] for row in range(size[0])]
    )
    cols = world.cells[1]
    objects = [
        (int(other), 0, (int(cell) // cols * world.patch[1], int(cell) % cols * world.patch[1]))
        for other, cell in zip(script.others[shot], script.other_cells[shot], strict=True)
    ]
    objects = objects if shot <= script.subject.max() else []  # introductions come first
    for identity, view, (top, left) in [*objects, (int(script.identity[shot]), int(script.view[shot]), position)]:
        for row in range(pixels):
            for col in range(pixels):
                seen = window_pixel(world, identity, view, row, col)
                behind = ground_pixel(background, frame, top + row, left + col, scenery=plain)
                made[top + row, left + col] = behind if seen is None else seen
    return made


def render(world: ShotWorld, batch: dict[str, Any], identity: Tensor) -> list[Tensor]:
    """The batch's films (stacked, without distractors) with other identities (B, shots)."""
    truth, lengths = batch["truth"], [clip.shape[1] for clip in batch["clips"]]
    rows, frames = len(identity), sum(lengths)
    shot = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    frame = torch.cat([torch.arange(n) for n in lengths]).repeat(rows)
    flat = (x[:, shot].flatten() for x in (identity, truth["background"], truth["view"]))
    number, ground, view = flat
    size = (world.grid[0] * world.patch[1], world.grid[1] * world.patch[2])
    made = world.identities.render(number, truth["position"].flatten(0, 1), ground, size, view=view, frame=frame)
    return list(made.view(rows, frames, *made.shape[1:]).split(lengths, dim=1))


def score(metric: Any, clips: list[Tensor], batch: dict[str, Any]) -> dict[str, float]:
    metric.reset()
    metric.update(clips, batch)
    return {name: float(value) for name, value in metric.compute().items()}


def test_frames_are_those_of_a_slow_renderer() -> None:
    world = ShotWorld(**HARD)
    batch, script = world.batch("train", [3]), world.script("train", 3)
    places = batch["truth"]["position"][0].view(-1, 2, 2)
    for shot, clip in enumerate(batch["clips"]):
        for frame in range(2):
            top, left = places[shot, frame].tolist()
            expected = slow_frame(world, script, shot, frame, (top, left))
            assert np.allclose(clip[0, frame].permute(1, 2, 0).double().numpy(), expected, atol=1e-6)


def test_decoder_is_exact_on_true_films() -> None:
    world = ShotWorld(**HARD)
    batch = world.batch("validation", range(64))
    found = score(world.sample_metrics()["identity"], batch["clips"], batch)
    assert found["identity_recall"] == found["subject_shown"] == found["shown_identity_recall"] == 1
    assert found["wrong_subject"] == 0
    whole = score(world.whole_metrics()["whole"], batch["clips"], batch)
    assert whole["whole_identity_recall"] == whole["whole_subject_shown"] == 1


def test_identities_differ_in_every_view() -> None:
    of = Identities(6, 8, 4, 4, 8, poses=8, scales=2, screens=5)
    view = torch.arange(of.views)
    ground = of.grounds[1].view(1, 3, 1, 1).expand(of.views, -1, 8, 8)
    templates = of.templates(view, ground).flatten(2)
    apart = torch.cdist(templates, templates) + 9 * torch.eye(len(of))
    assert apart.min() > 0.5


def test_errors_are_those_of_comparing_pixel_by_pixel() -> None:
    world = ShotWorld(**HARD)
    batch = world.batch("validation", range(3))
    generator = torch.Generator().manual_seed(0)
    clip = batch["clips"][5] + torch.randn(batch["clips"][5].shape, generator=generator)
    truth = batch["truth"]
    position = truth["position"][:, 10:12]
    shot = Shown(clip, position, truth["background"][:, 5], truth["view"][:, 5])
    each, bare = world.identities.errors(shot)
    for film, identity in ((0, 0), (1, 77), (2, 191)):
        slow = slow_bare = 0.0
        for frame in range(2):
            top, left = position[film, frame].tolist()
            for row in range(8):
                for col in range(8):
                    pixel = clip[film, frame, :, top + row, left + col].double().tolist()
                    behind = ground_pixel(int(shot.background[film]), frame, top + row, left + col, scenery=True)
                    seen = window_pixel(world, identity, int(shot.view[film]), row, col)
                    hidden = seen if seen is SCREEN else behind
                    slow += sum((a - b) ** 2 for a, b in zip(pixel, behind if seen is None else seen, strict=True))
                    slow_bare += sum((a - b) ** 2 for a, b in zip(pixel, hidden, strict=True))
        assert float(each[film, identity]) == pytest.approx(slow, rel=1e-4)
        assert float(bare[film]) == pytest.approx(slow_bare, rel=1e-4)


def test_captions_name_the_view() -> None:
    world = ShotWorld(**HARD)
    batch = world.batch("train", range(20))
    words = batch["text"].view(20, 9, 7)
    first = world.tags + 2 * 9 + 4
    pose, scale, screen = (words[..., 4 + i] - first - before for i, before in enumerate((0, 8, 10)))
    assert torch.equal(batch["truth"]["view"], (pose * 2 + scale) * 5 + screen)
    assert words.max() < world.vocabulary == first + 15
    assert {len(x.unique()) for x in (pose, scale, screen)} == {8, 2, 5}


def test_distractors_share_the_shape_or_the_colour_of_the_subject() -> None:
    world = ShotWorld(**HARD | {"distractors": 3})
    of, kinds = world.identities, set()
    for number in range(100):
        script = world.script("train", number)
        own, other = (of.attributes(torch.from_numpy(x)) for x in (script.identity[:, None], script.others))
        shape, colour = own["shape"] == other["shape"], own["colour"] == other["colour"]
        assert bool((shape ^ colour).all())
        kinds |= set(shape.flatten().tolist())
    assert kinds == {False, True}


def test_returns_are_judged_together_and_films_keep_their_share() -> None:
    world = ShotWorld(**HARD | {"distractors": 0})
    batch = world.batch("validation", range(6))
    assert batch["known"] == [True] * 4 + [False] * 5
    identity = batch["truth"]["identity"].clone()
    assert [len(film) for film in judged_shots(batch["clips"], batch)] == [5]
    identity[0, 4:6] = (identity[0, 4:6] + 97) % 192  # two wrong returns of film 0
    identity[2, 8] = (identity[2, 8] + 97) % 192  # and one of film 2
    metric = world.sample_metrics()["identity"]
    found = score(metric, render(world, batch, identity), batch)
    assert found["identity_recall"] == pytest.approx(27 / 30)
    shares = metric.film_outcomes()["identity_recall"]
    assert shares == pytest.approx([0.6, 1, 0.8, 1, 1, 1])


def test_recall_where_a_subject_was_generated_at_all() -> None:
    world = ShotWorld(**HARD | {"distractors": 0})
    batch = world.batch("validation", range(10))
    clips = render(world, batch, batch["truth"]["identity"])
    size = (16, 16)
    for shot in (4, 5):  # of five returns: empty scenes
        ground = batch["truth"]["background"][:, shot].repeat_interleave(2)
        clips[shot] = world.identities.scene(ground, torch.arange(2).repeat(10), size).view(10, 2, 3, *size)
    found = score(world.sample_metrics()["identity"], clips, batch)
    assert found["subject_shown"] == pytest.approx(0.6)
    assert found["shown_identity_recall"] == 1
    assert found["identity_recall"] < 0.65
    noise = [torch.randn_like(clip) for clip in clips]
    found = score(world.sample_metrics()["identity"], noise, batch)
    assert found["subject_shown"] == found["shown_identity_recall"] == 0
    # In whole films the earlier shot must show it, too: nothing is seen in the introductions.
    clips = render(world, batch, batch["truth"]["identity"])
    clips[:4] = [torch.randn_like(clip) for clip in clips[:4]]
    whole = score(world.whole_metrics()["whole"], clips, batch)
    first_returns = 4 / 5  # the fifth return's nearest earlier shot is a return, which is there
    assert whole["whole_subject_shown"] == pytest.approx(1 - first_returns)


def test_guessing_scores_what_is_called_chance() -> None:
    world = ShotWorld(**HARD | {"distractors": 0})
    batch = world.batch("validation", range(300))
    guess = torch.randint(192, (300, 9), generator=torch.Generator().manual_seed(0))
    metric = world.sample_metrics()["identity"]
    found = score(metric, render(world, batch, guess), batch)
    for name, chance in metric.chance.items():
        assert abs(found[name] - chance) < 4 * (chance * (1 - chance) / 1500) ** 0.5, name


def test_training_films_may_have_fewer_subjects_in_as_many_shots() -> None:
    world = ShotWorld(**HARD | {"least_subjects": 1})
    counts = {int(world.script("train", n).subject.max()) + 1 for n in range(60)}
    assert counts == {1, 2, 3, 4}
    assert {len(world.script("train", n).subject) for n in range(60)} == {9}
    assert {int(world.script("validation", n).subject.max()) + 1 for n in range(20)} == {4}
    assert world.batch("train", range(8))["known"] == [True] * 4 + [False] * 5


def test_settings_of_the_harder_world_are_refused_all_at_once() -> None:
    with pytest.raises(ZooError) as error:
        ShotWorld(subjects=2, least_subjects=3, judged="first", distractors=1, shapes=1)
    for part in ("least_subjects must be at most subjects", "unknown judged 'first'", "distractors need at least 2"):
        assert part in str(error.value)
    with pytest.raises(ZooError, match=r"(?s)poses must be from 1 to 8, got 9.*screens must be from 1 to 5, got 6"):
        ShotWorld(poses=9, screens=6)
    with pytest.raises(ZooError, match="at least 6 pixels wide, got 4"):
        ShotWorld(scales=2, patch=(1, 3, 3))


def test_distance_is_to_a_shot_that_is_given() -> None:
    world = ShotWorld(**HARD | {"subjects": 2, "tags": 2, "returns": 6})
    batch = world.batch("validation", range(50))
    found = score(world.sample_metrics()["identity"], batch["clips"], batch)
    back = {int(name.rpartition("_")[2]) for name in found if "_back_" in name}
    assert back == set(range(1, 8))  # two introductions, then six returns
    whole = score(world.whole_metrics()["whole"], batch["clips"], batch)
    # Each round shows both subjects, so the nearest shot of the same one is at most three back.
    assert {int(name.rpartition("_")[2]) for name in whole if "_back_" in name} == {1, 2, 3}


def test_drift_is_of_each_shot_by_its_number() -> None:
    world = ShotWorld(**HARD | {"distractors": 0})
    batch = world.batch("validation", range(8))
    identity = batch["truth"]["identity"].clone()
    identity[:2, 6] = (identity[:2, 6] + 97) % 192
    clips = render(world, batch, identity)
    clips[7] = torch.randn(clips[7].shape, generator=torch.Generator().manual_seed(0))
    drift = world.drift()
    for rows in (slice(0, 3), slice(3, 8)):
        part = batch | {"truth": {name: x[rows] for name, x in batch["truth"].items()}}
        drift.update([clip[rows] for clip in clips], part)
    found = drift.compute()
    assert (found["shot"], found["films"]) == ([*range(9)], [8] * 9)
    assert found["subject_shown"] == [1, 1, 1, 1, 1, 1, 1, 0, 1]
    assert [x != x for x in found["same_as_introduction"]] == [True] * 4 + [False] * 5
    assert found["same_as_introduction"][4:7] == [1, 1, pytest.approx(0.75)]
    assert found["window_error"][0] == pytest.approx(0, abs=1e-5)
    assert found["window_error"][7] > 0.5


@pytest.mark.parametrize(
    ("settings", "digest"),
    [
        ({}, "fcdf06a08fd6afbb"),
        ({"subjects": 4, "frames_per_shot": 1}, "5ac5f0e6563222fe"),
    ],
)
def test_films_of_the_first_level_are_unchanged(settings: dict[str, Any], digest: str) -> None:
    batch = ShotWorld(**settings).batch("test", range(12))
    truth = (batch["truth"][name] for name in ("subject", "identity", "background", "position"))
    found = hashlib.sha256(b"".join(x.numpy().tobytes() for x in (*batch["clips"], batch["text"], *truth)))
    assert found.hexdigest()[:16] == digest
    assert batch["known"] == [True] * (len(batch["known"]) - 1) + [False]


def test_ids_of_runs_on_the_first_level_are_unchanged() -> None:
    from experiments.sweep.expand import find, read

    ids = {cell.name: cell.id for cell in read(find("memory")).cells}
    assert (ids["dense-s0"], ids["moc-s2"]) == ("8f6ad776ff59", "0b55ece301bb")
