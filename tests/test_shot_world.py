"""ShotWorld: its films are what their captions and truth say, its metric sees what is there, its order resumes."""

from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from datamodules import IdentityRecall, ShotWorld
from datamodules.identities import Shown
from sparse_zoo.errors import ZooError

RANGES: dict[str, Any] = {"subjects": [2, 4], "frames_per_shot": [2, 6], "patch": (2, 4, 4), "batch_size": 5}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["names"] == b["names"] and all(map(torch.equal, (*a["clips"], a["text"]), (*b["clips"], b["text"])))


def score(world: ShotWorld, batch: dict[str, Any], clips: list[Tensor] | None = None) -> dict[str, float]:
    metric = world.sample_metrics()["identity"]
    metric.update(batch["clips"] if clips is None else clips, batch)
    return {name: float(value) for name, value in metric.compute().items()}


def repaint(world: ShotWorld, batch: dict[str, Any], shot: int, identity: Tensor) -> list[Tensor]:
    """The batch's clips with that shot's subject replaced, in each film, by `identity` (B,); stacked films only."""
    clips = list(batch["clips"])
    rows, frames = clips[shot].shape[:2]
    before = sum(clip.shape[1] for clip in clips[:shot])
    position = batch["truth"]["position"][:, before : before + frames].flatten(0, 1)
    background = batch["truth"]["background"][:, shot].repeat_interleave(frames)
    painted = world.identities.render(identity.repeat_interleave(frames), position, background, (12, 12))
    clips[shot] = painted.view(rows, frames, *painted.shape[1:])
    return clips


# Films


def test_the_world_that_was_tried() -> None:
    world = ShotWorld()
    batch = world.batch("train", range(16))
    assert len(batch["layout"]) == 132
    assert [clip.shape for clip in batch["clips"]] == [(16, 2, 3, 12, 12)] * 6
    assert batch["text"].shape == (16, 24)
    assert len(world.identities) == 192
    assert world.vocabulary == 6 + 4 + 4 + 4
    assert all(-1 <= clip.min() < clip.max() <= 1 for clip in batch["clips"])


def test_all_identities_look_different_on_every_background() -> None:
    of = ShotWorld().identities
    ground = of.grounds[:, :, None, None].expand(-1, -1, 8, 8)
    sprites = of.templates(torch.zeros(4, dtype=torch.int64), ground).flatten(2)
    apart = torch.cdist(sprites, sprites) + 9 * torch.eye(192)
    assert apart.min() > 1.8


def test_captions_say_where_the_subject_is_and_on_what_ground() -> None:
    world = ShotWorld(grid=(4, 5), frames_per_shot=3)
    batch = world.batch("train", range(8))
    cells, across = 12, 4
    tag, start, end, ground = batch["text"].view(8, 6, 4).sub(torch.tensor([0, 6, 6 + cells, 6 + 2 * cells])).unbind(-1)
    assert tag.min() >= 0
    assert tag.max() < 6
    for at, cell in ((0, start), (2, end)):
        where = batch["truth"]["position"].view(8, 6, 3, 2)[:, :, at]
        assert torch.equal(where, torch.stack([cell // across, cell % across], -1) * 4)
    assert torch.equal(ground, batch["truth"]["background"])
    colours = world.identities.grounds[ground]
    for shot, clip in enumerate(batch["clips"]):
        for frame in range(3):
            row, col = batch["truth"]["position"].view(8, 6, 3, 2)[:, shot, frame].unbind(-1)
            for film in range(8):
                seen = clip[film, frame].clone()
                box = seen[:, row[film] : row[film] + 8, col[film] : col[film] + 8]
                assert (box != colours[film, shot, :, None, None]).any()
                box[:] = colours[film, shot, :, None, None]
                assert (seen == colours[film, shot, :, None, None]).all()


def test_a_tag_means_one_identity_within_a_film_and_another_in_the_next() -> None:
    batch = ShotWorld(returns=5).batch("train", range(2000))
    tags, identities = batch["text"].view(2000, 8, 4)[..., 0], batch["truth"]["identity"]
    same_tag, same_identity = tags[:, :, None] == tags[:, None], identities[:, :, None] == identities[:, None]
    assert (same_identity | ~same_tag).all()
    # Introductions have tags of their own, and the returns go through all before any comes again.
    for part in (slice(0, 3), slice(3, 6)):
        assert all(len(set(film)) == 3 for film in tags[:, part].tolist())
    # Over films a tag says nothing about the identity.
    assert len(set(identities[tags == 0].tolist())) > 180


def test_the_text_does_not_depend_on_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    world = ShotWorld()
    before, script = world.batch("train", range(4)), world.script
    monkeypatch.setattr(world, "script", lambda *film: replace(script(*film), identity=script(*film).identity * 0 + 7))
    after = world.batch("train", range(4))
    assert torch.equal(before["text"], after["text"])
    assert not torch.equal(before["clips"][0], after["clips"][0])


def test_a_film_is_a_function_of_seed_split_and_number() -> None:
    world = ShotWorld(seed=3)
    together, alone = world.batch("train", range(8)), world.batch("train", [5])
    assert all(torch.equal(a[5:6], b) for a, b in zip(together["clips"], alone["clips"], strict=True))
    assert torch.equal(together["text"][5:6], alone["text"])
    assert equal(together, ShotWorld(seed=3).batch("train", range(8)))
    for other in (ShotWorld(seed=4).batch("train", [5]), world.batch("validation", [5])):
        assert not torch.equal(other["text"], alone["text"])


def test_films_of_many_shapes_are_packed_into_one_stream() -> None:
    world = ShotWorld(**RANGES)
    batch = world.batch("train", range(12))
    layout, shots = batch["layout"], [shot for film in batch["layout"].films for shot in film.shots]
    assert {len(film.shots) for film in layout.films} == {4, 6, 8}
    assert {shot.frames for shot in shots} == {1, 2, 3}
    assert [clip.shape for clip in batch["clips"]] == [(1, 2 * shot.frames, 3, 12, 12) for shot in shots]
    assert batch["text"].shape == (1, int(layout.is_text.sum()))
    assert batch["truth"]["identity"].shape == batch["truth"]["background"].shape == (1, len(shots))
    alone = world.batch("train", [11])
    assert all(map(torch.equal, batch["clips"][-len(alone["clips"]) :], alone["clips"]))
    assert score(world, batch)["identity_recall"] == 1


def test_a_batch_of_sixteen_takes_less_than_ten_milliseconds() -> None:
    world, times = ShotWorld(), []
    for turn in range(10):
        began = process_time()  # others may share the machine
        world.batch("train", range(16 * turn, 16 * turn + 16))
        times.append(process_time() - began)
    assert min(times) < 0.01


# Decoder and metric


@pytest.mark.parametrize("settings", [{}, RANGES, {"grid": (4, 6), "subject_size": 3, "frames_per_shot": 1}])
def test_the_truth_scores_one(settings: dict[str, Any]) -> None:
    world = ShotWorld(**settings, val_films=100)
    metric = world.sample_metrics()["identity"]
    for batch in world.val_dataloader():
        metric.update(batch["clips"], batch)
    assert len(metric.film_outcomes()["identity_recall"]) == 100
    values = {name: float(value) for name, value in metric.compute().items()}
    assert values.pop("wrong_subject") == 0
    assert set(values.values()) == {1.0}


def test_noise_of_half_the_range_is_seen_through_and_pure_noise_is_not() -> None:
    world = ShotWorld()
    batch = world.batch("validation", range(500))
    torch.manual_seed(0)
    noisy = [clip + 0.5 * torch.randn_like(clip) for clip in batch["clips"]]
    assert score(world, batch, noisy)["identity_recall"] > 0.95
    noise = score(world, batch, [torch.randn_like(clip) for clip in batch["clips"]])
    assert noise["identity_recall"] < 0.03
    assert noise["wrong_subject"] < 0.04
    assert max(noise["shape_recall"], noise["colour_recall"], noise["texture_recall"]) < 0.45


def nearest(world: ShotWorld, clip: Tensor, position: Tensor, background: Tensor) -> int:
    """The identity whose rendering of all frames (F, 3, H, W) is nearest, one by one."""
    ground = background.repeat(len(clip))
    errors = [
        (world.identities.render(torch.tensor([identity] * len(clip)), position, ground, clip.shape[-2:]) - clip)
        .square()
        .sum()
        for identity in range(192)
    ]
    return int(torch.stack(errors).argmin())


@pytest.mark.slow
def test_the_metric_decodes_as_comparing_whole_renderings_does() -> None:
    world = ShotWorld(**RANGES)
    batch = world.batch("validation", range(30))
    clips = [torch.randn_like(clip) for clip in batch["clips"]]
    truth = {name: tensor[0] for name, tensor in batch["truth"].items()}
    places = truth["position"].split([clip.shape[1] for clip in clips])
    last = torch.tensor([len(film.shots) for film in batch["layout"].films]).cumsum(0) - 1
    seen = torch.tensor([nearest(world, clips[i][0], places[i], truth["background"][i]) for i in last])
    for i, identity in zip(last.tolist(), seen, strict=True):
        shot = Shown(clips[i], places[i][None], truth["background"][i, None], truth["view"][i, None])
        assert world.identities.decode(shot) == identity
    metric = world.sample_metrics()["identity"]
    metric.update(clips, batch)
    assert torch.cat(metric.scored)[:, 0].tolist() == seen.tolist()


@pytest.mark.slow
def test_guessing_scores_what_the_metric_calls_chance() -> None:
    world, films = ShotWorld(), 2000
    batch = world.batch("validation", range(films))
    guess = torch.randint(192, (films,), generator=torch.Generator().manual_seed(0))
    found = score(world, batch, repaint(world, batch, 5, guess))
    chance = IdentityRecall(world.identities).chance
    assert chance == {
        "identity_recall": 1 / 192,
        "shape_recall": 1 / 6,
        "colour_recall": 1 / 8,
        "texture_recall": 1 / 4,
    }
    for name, p in chance.items():
        assert abs(found[name] - p) < 4 * (p * (1 - p) / films) ** 0.5, name
    assert found["wrong_subject"] < 0.03


def test_recall_keeps_its_outcome_for_every_film() -> None:
    world = ShotWorld()
    metric = world.sample_metrics()["identity"]
    wrong = [torch.tensor([0, 1, 0, 0, 1]), torch.tensor([1, 0])]
    for batch, rows in zip(
        [world.batch("validation", range(5)), world.batch("validation", range(5, 7))], wrong, strict=True
    ):
        identity = (batch["truth"]["identity"][:, 5] + rows) % 192
        metric.update(repaint(world, batch, 5, identity), batch)
    assert metric.film_outcomes() == {"identity_recall": [1, 0, 1, 1, 0, 0, 1]}
    metric.reset()
    batch = world.batch("validation", range(2))
    metric.update(batch["clips"], batch)
    assert metric.film_outcomes() == {"identity_recall": [1, 1]}


def test_copy_of_the_wrong_subject_is_distinguished_from_a_wrong_identity() -> None:
    world = ShotWorld()
    batch = world.batch("validation", range(64))
    identity = batch["truth"]["identity"]
    other = torch.stack([next(i for i in film if i != film[-1]) for film in identity])
    copied = score(world, batch, repaint(world, batch, 5, other))
    assert (copied["identity_recall"], copied["wrong_subject"]) == (0, 1)
    shape = world.identities.attributes(identity[:, 5])["shape"]
    # Another texture: shape and colour are right, and the identity is of no subject of the film.
    changed = score(world, batch, repaint(world, batch, 5, identity[:, 5] // 4 * 4 + (identity[:, 5] + 1) % 4))
    assert changed["identity_recall"] == changed["texture_recall"] == 0
    assert changed["shape_recall"] == changed["colour_recall"] == 1
    assert changed["wrong_subject"] < 0.05
    assert shape.unique().numel() == 6


def test_only_the_last_shot_of_each_film_is_scored() -> None:
    world = ShotWorld(**RANGES)
    batch = world.batch("validation", range(10))
    ends = torch.tensor([len(film.shots) for film in batch["layout"].films]).cumsum(0) - 1
    blank = [clip if shot in ends else torch.zeros_like(clip) for shot, clip in enumerate(batch["clips"])]
    assert score(world, batch, blank)["identity_recall"] == 1
    # One film spoilt of ten.
    position = batch["truth"]["position"]
    spoilt = list(batch["clips"])
    last = int(ends[3])
    true = batch["truth"]["identity"][:, last]
    frames = spoilt[last].shape[1]
    before = sum(clip.shape[1] for clip in spoilt[:last])
    spoilt[last] = world.identities.render(
        ((true + 97) % 192).repeat(frames),
        position[0, before : before + frames],
        batch["truth"]["background"][:, last].repeat(frames),
        (12, 12),
    )[None]
    assert score(world, batch, spoilt)["identity_recall"] == pytest.approx(0.9)


def test_recall_is_split_by_how_long_ago_the_subject_was_seen() -> None:
    world = ShotWorld(subjects=3, returns=5)
    batch, (rows, last) = world.batch("validation", range(200)), (200, 7)
    subject, identity = batch["truth"]["subject"], batch["truth"]["identity"]
    back = torch.tensor([next(d for d in range(1, 8) if film[last - d] == film[last]) for film in subject])
    right = torch.rand(rows, generator=torch.Generator().manual_seed(1)) < back / 6
    found = score(
        world, batch, repaint(world, batch, last, torch.where(right, identity[:, last], identity[:, last] ^ 1))
    )
    told = {int(name.rpartition("_")[2]): value for name, value in found.items() if "_back_" in name}
    expected = {d: right[back == d].float().mean().item() for d in set(back.tolist())}
    assert told == pytest.approx(expected)
    assert len(told) == 3  # 2 to 4: the second return of a subject is of the second round


@pytest.mark.slow
def test_a_whole_film_is_right_if_it_agrees_with_itself() -> None:
    world, films = ShotWorld(), 300
    batch, draw = world.batch("test", range(films)), torch.Generator().manual_seed(0)
    subject = batch["truth"]["subject"]
    drawn = torch.randint(192, (films, 3), generator=draw)  # what a model makes of the three subjects
    shown = drawn.gather(1, subject)
    right = torch.rand(films, generator=draw) < 0.6
    shown[:, 5] = torch.where(right, shown[:, 5], drawn.gather(1, (subject[:, 5:] + 1) % 3)[:, 0])
    clips = batch["clips"]
    for shot in range(6):
        clips = repaint(world, batch | {"clips": clips}, shot, shown[:, shot])
    metric = world.whole_metrics()["whole"]
    metric.update(clips, batch)
    found = {name: float(value) for name, value in metric.compute().items()}
    agrees = shown[:, 5] == drawn.gather(1, subject[:, 5:])[:, 0]
    assert found["whole_identity_recall"] == pytest.approx(agrees.float().mean().item())
    assert found["whole_identity_recall"] + found["whole_wrong_subject"] == pytest.approx(1)
    assert metric.film_outcomes() == {"whole_identity_recall": agrees.float().tolist()}
    assert score(world, batch, clips)["identity_recall"] < 0.05  # held against the truth it is nothing
    assert found["whole_identity_chance"] < 0.02
    # One subject everywhere agrees with itself, and by chance as well.
    for shot in range(6):
        clips = repaint(world, batch | {"clips": clips}, shot, torch.full((films,), 17))
    metric.reset()
    metric.update(clips, batch)
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found["whole_identity_recall"] == found["whole_identity_chance"] == 1


def test_films_of_the_test_are_others() -> None:
    world = ShotWorld(test_films=20)
    assert sum(len(batch["names"]) for batch in world.test_dataloader()) == 20
    assert world.summary()["test"]["films"] == 20
    assert "test" not in ShotWorld().summary()
    others = [world.batch(split, [5])["clips"][0] for split in ("train", "validation")]
    assert not any(torch.equal(world.batch("test", [5])["clips"][0], other) for other in others)


# Order, loaders, errors


def test_every_epoch_draws_new_films() -> None:
    world = ShotWorld(films_per_epoch=20, batch_size=8)
    loader, names = world.train_dataloader(), []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches = list(loader)
        assert [len(batch["names"]) for batch in batches] == [8, 8, 4]
        names += [name for batch in batches for name in batch["names"]]
    assert sorted(names) == sorted(f"train {number}" for number in range(60))
    assert names != sorted(names, key=lambda name: int(name.split()[1]))


class Watcher(LightningModule):
    """Notes the names of the films that it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        self.seen.append(batch["names"])
        return self.weight * batch["clips"][0].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(folder: Path, steps: int, resume: Path | None = None) -> list[list[str]]:
    model = Watcher()
    quiet: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "accelerator": "cpu",
    }
    save = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    world = ShotWorld(films_per_epoch=20, batch_size=8)
    Trainer(max_steps=steps, max_epochs=-1, callbacks=[save], **quiet).fit(model, world, ckpt_path=resume)
    return model.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [2, 3, 5])
def test_training_resumes_with_the_next_batch(tmp_path: Path, stop: int) -> None:
    whole = train(tmp_path / "a", 8)
    assert len(whole) == 8
    again = train(tmp_path / "b", 8, resume=tmp_path / "a" / f"step={stop}.ckpt")
    assert again == whole[stop:]


def test_ranges_and_settings_are_refused_all_at_once() -> None:
    with pytest.raises(ZooError) as error:
        ShotWorld(subjects=[4, 2], frames_per_shot=3, patch=(2, 4, 4), subject_size=4, batch_size=0, returns=0)
    for part in (
        "subjects must be a count or a range [least, most] from 1, got [4, 2]",
        "frames_per_shot 3 is not in whole patches of 2 frames",
        "a subject of 4 patches does not fit into a grid of [3, 3]",
        "batch_size must be at least 1, got 0",
        "returns must be at least 1, got 0",
    ):
        assert part in str(error.value)
    with pytest.raises(ZooError, match="7 subjects need as many tags, got 6"):
        ShotWorld(subjects=7)
    with pytest.raises(ZooError, match=r"(?s)shapes must be from 1 to 6, got 7.*a subject must be at least 6 pixels"):
        ShotWorld(shapes=7, patch=(1, 2, 2))


def test_the_summary_counts_films_shots_frames_and_video_tokens() -> None:
    found = ShotWorld(films_per_epoch=10, val_films=4).summary()
    assert found["train"] == {"films": 10, "shots": 60, "frames": 120, "tokens": 1080}
    assert found["validation"] == {"films": 4, "shots": 24, "frames": 48, "tokens": 432}
    assert found["skipped"] == []
    longer = ShotWorld(films_per_epoch=1, val_films=4, subjects=[2, 4], frames_per_shot=[2, 6], patch=(2, 4, 4))
    of_films = [longer.batch("validation", [number])["layout"].video_tokens for number in range(4)]
    assert longer.summary()["validation"]["tokens"] == sum(of_films)
    assert len(set(of_films)) > 1
