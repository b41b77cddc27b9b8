"""Training under a schedule: which phase is trained, judged and drawn, and that resuming meets the same one."""

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from test_module import Record, Seen, lit, loader, trainer, world
from toy_films import FIRST, PACKED, batch
from typing_extensions import override

import sparse_zoo as zoo
from lit_modules import SampleFilms

pytestmark = pytest.mark.filterwarnings("ignore")
CHANGING = {
    "name": "moc",
    "top_k": 3,
    "schedule": {"top_k": {2: 2, 4: 1}, "chunk": {4: "fixed"}, "chunk_tokens": {4: 5}},
}


class Told(Callback):
    """What attention was told in training and in eval mode: the step of training, `step`, `seed` and top_k, by call."""

    def __init__(self):
        self.trained, self.judged = [], []

    @override
    def on_fit_start(self, trainer, pl_module):
        def tell(attention, _, told):
            at = attention.at(told["step"]) if isinstance(attention, zoo.Scheduled) else attention
            (self.trained if attention.training else self.judged).append(
                (trainer.global_step, told["step"], told["seed"], at.top_k)
            )

        attention = pl_module.model.blocks[0].attention
        attention.register_forward_pre_hook(tell, with_kwargs=True)


@pytest.mark.slow
def test_the_phase_goes_by_optimizer_steps_in_training_and_judging(tmp_path):
    told, films = Told(), SampleFilms(tmp_path, steps=1)
    module = lit(attention=CHANGING, sample_metrics={"seen": Seen()}, sampling={"steps": 1})
    run = trainer(5, told, films, accumulate_grad_batches=2, val_check_interval=2)
    run.fit(module, loader(batch(PACKED), times=10), loader(batch(PACKED)))
    assert [(step, top_k) for _, step, _, top_k in told.trained] == [
        (0, 3), (0, 3), (1, 3), (1, 3), (2, 2), (2, 2), (3, 2), (3, 2), (4, 1), (4, 1),
    ]  # fmt: skip
    assert {now - step for now, step, _, _ in [*told.trained, *told.judged]} == {0}
    # Four times of the loss, a film for the metrics, a guess and a film for the strips.
    assert [step for _, step, _, _ in told.judged] == [step for step in (1, 2, 3, 4, 5) for _ in range(7)]
    assert [top_k for *_, top_k in told.judged[::7]] == [3, 2, 2, 1, 1]


@pytest.mark.slow
def test_draws_differ_between_accumulated_batches_ranks_and_seeds(monkeypatch):
    seen = {}
    for name, seed, rank in (("a", 0, 0), ("again", 0, 0), ("other rank", 0, 1), ("other seed", 1, 0)):
        told, module = Told(), lit(seed=seed, attention={"name": "moc"})
        monkeypatch.setattr(type(module), "global_rank", rank)
        trainer(2, told, accumulate_grad_batches=2).fit(module, loader(batch(FIRST), times=4))
        seen[name] = [seed for _, _, seed, _ in told.trained]
        assert len(set(seen[name])) == 4
        assert all(isinstance(seed, int) for seed in seen[name])
    assert seen["a"] == seen.pop("again")
    assert len({seed for seeds in seen.values() for seed in seeds}) == 12


@pytest.mark.parametrize("attention", [CHANGING, {"name": "dense", "schedule": {"name": {3: "moga"}}, "groups": 2}])
def test_a_run_resumed_across_a_change_repeats_the_uninterrupted_one(tmp_path, attention):
    model = {"attention": attention, "channels": 3, "patch": (1, 4, 4), "vocabulary": world().vocabulary}
    whole, rest = Record(), Record()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    first = lit(**model)
    trainer(6, whole, keep).fit(first, world())
    torch.manual_seed(99)
    second = lit(**model)
    trainer(6, rest).fit(second, world(), ckpt_path=tmp_path / "step=3.ckpt")
    assert len(whole.losses) == 6
    assert rest.losses == whole.losses[3:]
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_until_the_first_change_a_run_is_that_without_a_schedule():
    found = []
    for attention in (CHANGING, {"name": "moc", "top_k": 3}):
        record = Record()
        trainer(3, record).fit(lit(attention=attention), loader(batch(PACKED), times=3))
        found.append(record.losses)
    assert found[0][:2] == found[1][:2]
    assert found[0][2] != found[1][2]


def test_what_is_in_force_is_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(5, logger=logger, log_every_n_steps=1).fit(lit(attention=CHANGING), loader(batch(FIRST), times=5))
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    shown = {name: [float(row[name]) for row in rows if row[name]] for name in rows[0] if name.startswith("schedule/")}
    assert shown == {
        "schedule/phase": [0, 0, 1, 1, 2],
        "schedule/top_k": [3, 3, 2, 2, 1],
        "schedule/chunk_tokens": [1280] * 4 + [5],
    }  # "chunk" is no number


def test_films_are_sampled_in_the_configured_order(tmp_path):
    films = SampleFilms(tmp_path, steps=1, order="shots", context=1)
    assert (films.euler.order, films.euler.context) == ("shots", 1)
    module = lit(sampling={"steps": 1, "order": "shots"}, sample_metrics={"seen": Seen()})
    trainer(1, films).fit(module, loader(batch(PACKED)), loader(batch(PACKED)))
    assert len(films.paths) == 3
