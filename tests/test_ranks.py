"""Runs on several devices, a process each over gloo: what they learn, how they resume, and how they end."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console
from tiny import BASE, DIVERGES, write_sweep

from datamodules.loading import train_loader
from experiments.config.datamodule import build
from experiments.config.resolve import cell, load
from experiments.execution.progress import Bar
from experiments.execution.run import run
from experiments.execution.scheduler import execute
from experiments.sweep.expand import read
from experiments.tracking.mlflow_logger import Tracker
from experiments.tracking.store import Cell, Result
from lit_modules import LitVideoDiT
from lit_modules.flow import generator
from sparse_zoo.registry import import_file

pytestmark = pytest.mark.slow


class Told:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.notes: list[str] = []

    def started(self, name: str) -> None: ...

    def step(self, name: str, step: int, total: int | None, note: str) -> None:  # noqa: ARG002
        self.steps.append(step)

    def ended(self, result: Result) -> None: ...

    def note(self, line: str) -> None:
        self.notes.append(line)


def asked(*overrides: Any) -> Cell:
    # Without a warm-up: updates as large as the learning rate, beside which the tolerances are small.
    small = {"model": {"dim": 32, "depth": 1, "heads": 4}, "optim": {"ema_decay": 0.5, "warmup_steps": 0}}
    return cell("cell", load([BASE, small, *overrides]))


def train(one: Cell, observer: Told | None = None) -> Result:
    told = observer or Told()
    return run(one, "ranks", Tracker("ranks", told.note), told)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))


def weights(result: Result) -> dict[str, torch.Tensor]:
    return dict(torch.load(str(result.checkpoint), weights_only=True)["state_dict"])


def assert_learnt_the_same(ours: Result, theirs: Result, atol: float = 2e-6) -> None:
    assert (ours.status, theirs.status) == ("finished", "finished"), ours.traceback or ours.reason
    assert [step for step, _ in ours.curves["train/flow"]] == [step for step, _ in theirs.curves["train/flow"]]
    for curve in ("train/flow", "val/loss"):
        for (_, got), (_, want) in zip(ours.curves[curve], theirs.curves[curve], strict=True):
            assert got == pytest.approx(want, abs=atol)
    want = weights(theirs)
    for name, got in weights(ours).items():
        torch.testing.assert_close(got, want[name], rtol=0, atol=atol)


class Killer(Told):
    """An observer that kills a rank at a step."""

    def __init__(self, rank: int, at: int) -> None:
        super().__init__()
        self.rank, self.at, self.when = rank, at, 0.0

    def step(self, name: str, step: int, total: int | None, note: str) -> None:
        super().step(name, step, total, note)
        if step == self.at and not self.when:
            victim = next(one for one in active_children() if one.name == f"rank {self.rank}")
            self.when = time.monotonic()
            os.kill(int(victim.pid or 0), signal.SIGKILL)


MOGA = {"name": "moga", "groups": 3}
MOC = {"name": "moc", "top_k": 1, "drop_off": 0.9}
STEPS = {"trainer": {"max_steps": 4, "val_check_interval": 2}}
PAIR = ("parallel.sequence=2",)


def by_one_process(one: Cell, replicas: int) -> dict[str, torch.Tensor]:
    """The weights after training on the films of all data ranks in turn, without any of what trains on several."""
    config = one.config
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    data = build(config["data"])
    data.prepare_data()
    data.setup("fit")
    shape = {"channels": data.channels, "patch": list(data.patch), "vocabulary": data.vocabulary}
    module = LitVideoDiT(
        {**config["model"], **shape, "attention": config["attention"]}, config["flow"], config["optim"]
    )
    optim, steps = module.optim, config["trainer"]["max_steps"]
    linear = dict.fromkeys(m.weight for m in module.model.modules() if isinstance(m, torch.nn.Linear))
    rest = [p for p in module.model.parameters() if all(p is not q for q in linear)]
    groups = [{"params": list(linear), "weight_decay": optim.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: optim.rate(step, steps))
    films = [
        train_loader(data.train_dataloader().dataset, config["data"]["batch_size"], config["seed"], 0, Replica(r))
        for r in range(replicas)
    ]
    streams = [iter(loader) for loader in films]
    for step in range(steps):
        for rank, stream in enumerate(streams):
            purpose = (config["seed"], rank, step)
            draws, seed = generator("train", *purpose), generator("attention", *purpose).initial_seed()
            found = module.flow.training_loss(module.model, next(stream), draws, step=step, seed=seed)
            ((found.loss + sum(found.output.losses.values())) / replicas).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config["trainer"]["gradient_clip_val"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in module.named_parameters()}


class Replica:
    """What a loader asks of a trainer on one of two data ranks."""

    def __init__(self, rank: int) -> None:
        self.distributed_sampler_kwargs = {"num_replicas": 2, "rank": rank}
        self.limit_train_batches = 1.0


@pytest.mark.parametrize("attention", [MOGA, MOC], ids=["moga", "moc"])
def test_two_by_two_ranks_learn_what_one_process_learns(attention: dict[str, Any]) -> None:
    one = asked(STEPS, {"attention": attention, "optim": {"ema_decay": 0.0}, "parallel": {"data": 2, "sequence": 2}})
    result = train(one)
    assert result.status == "finished", result.traceback or result.reason
    want = by_one_process(one, 2)
    got = weights(result)
    assert got.keys() == want.keys()
    for name, weight in want.items():
        torch.testing.assert_close(got[name], weight, rtol=0, atol=1e-6)


TWO = {"trainer": {"max_steps": 2, "val_check_interval": 2}, "attention": MOC, "optim": {"ema_decay": 0.0}}
SETTINGS: dict[str, dict[str, Any]] = {
    "recomputed activations": {"model": {"checkpoint": True}},
    # Below AdamW's epsilon, so that the size of a gradient is the size of its update.
    "clipped gradients": {"trainer": {"gradient_clip_val": 1e-7}},
    "averaged weights": {"optim": {"ema_decay": 0.5}},
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=list(SETTINGS))
def test_shards_learn_what_one_device_learns(setting: dict[str, Any]) -> None:
    one, two = (train(replace(asked(TWO, setting, *more), name=f"on {len(more)}")) for more in ((), PAIR))
    assert_learnt_the_same(two, one)


def test_shards_in_half_precision_are_nearer_to_one_device_than_that_is_to_float32() -> None:
    half = {"trainer": {"precision": "bf16-mixed"}}
    asked_for = {"one": (TWO, half), "two": (TWO, half, *PAIR), "float32": (TWO,)}
    one, two, single = (weights(train(replace(asked(*given), name=name))) for name, given in asked_for.items())
    assert {x.dtype for x in two.values()} == {torch.float32}

    def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return sum(float((a[name].double() - b[name].double()).square().sum()) for name in a) ** 0.5

    assert 0 < apart(two, one) < apart(one, single)


def test_a_killed_run_resumes_exactly_and_on_another_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_SAVE_SECONDS", "0")
    on_two = asked(STEPS, {"attention": MOGA}, "parallel.sequence=2")
    whole = train(on_two)
    for first, atol in ((2, 0.0), (4, 2e-6)):
        name, killer = f"killed on {first}", Killer(1, 3)
        killed = train(replace(asked(STEPS, {"attention": MOGA}, f"parallel.sequence={first}"), name=name), killer)
        assert time.monotonic() - killer.when < 30
        died = f"rank 1 of {first} was killed by SIGKILL; the others were ended"
        assert killed.status == "missing"
        assert died in str(killed.reason)
        assert any(died in note for note in killer.notes)
        told = Told()
        resumed = train(replace(on_two, name=name), told)
        assert any("resumes from step" in note for note in told.notes)
        assert_learnt_the_same(resumed, whole, atol)
        assert not list(Path(resumed.folder).glob("resume.ckpt*"))


def test_nan_on_one_rank_stops_all(tmp_path: Path) -> None:
    plugin = tmp_path / "diverges_on_one.py"
    plugin.write_text(
        DIVERGES.replace('"diverges"', '"diverges_on_one"')
        .replace("if call.step", "if call.step and LAST")
        .replace("import torch", "import os\n\nimport torch\n\nLAST = os.environ.get('LOCAL_RANK') == '1'", 1)
    )
    import_file(plugin)
    result = train(asked(STEPS, {"attention": {"name": "diverges_on_one"}}, "parallel.data=2"))
    assert result.status == "failed"
    assert "NonFiniteLoss: step 1: aux/bad is nan" in str(result.reason)


def test_sweep_continues_after_a_rank_has_died(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = tmp_path / "dies_on_one.py"
    plugin.write_text(
        DIVERGES.replace('"diverges"', '"dies_on_one"')
        .replace(
            'return {"bad": torch.tensor(float("nan") if call.step else 0.0)}',
            "if call.step and os.environ.get('LOCAL_RANK') == '1':\n            os.abort()\n        return {}",
        )
        .replace("import torch", "import os", 1)
    )
    import_file(plugin)
    base = BASE | {"parallel": {"sequence": 2}}
    sweep = read(write_sweep(tmp_path / "ranks.yaml", base=base, axes={"attention": ["dies_on_one", "dense"]}))
    with Bar(Console(width=200), 2) as bar:
        results = execute(sweep, bar)
    assert [result.status for result in results] == ["missing", "finished"]
    assert "dies_on_one: rank 1 of 2 was killed by SIGABRT; the others were ended" in capsys.readouterr().out
