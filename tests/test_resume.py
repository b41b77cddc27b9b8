"""A run that is killed, again and again, ends as one that never was: weights, losses, diagnostics, curves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
import mlflow
import pytest
import torch
from tiny import BASE
from torch.utils._pytree import tree_leaves

import sparse_zoo as zoo
from datamodules.loading import train_loader
from experiments.config.resolve import load
from experiments.execution import checkpointing
from experiments.execution.checkpointing import Saving, saved_step
from experiments.execution.run import _begin, run
from experiments.execution.train import RESUME
from experiments.tools.tiny_models import write
from experiments.tracking import store
from experiments.tracking.mlflow_logger import Tracker, uri
from experiments.tracking.store import Cell, Result
from lit_modules import SampleFilms
from lit_modules.metrics import LossByTime
from sparse_zoo.errors import ZooError

pytestmark = pytest.mark.filterwarnings("ignore")

# Films of an epoch, the validation's interval and the diagnosed steps have no common beat; routing has random draws.
LONG = {
    "data.films_per_epoch": 5,
    "data.subjects": 2,
    "data.tags": 2,
    "attention": {"name": "moc", "top_k": 1, "drop_off": 0.5},
    "trainer.max_steps": 8,
    "trainer.val_check_interval": 3,
    "trainer.log_every_n_steps": 5,
    "sampling.every": 2,
    "flow": {"drop_text": 0.5},
}


class Killing:
    """Kills its own process once `batches` were trained on; `told` are the lines a user would see."""

    def __init__(self, batches: int = 0) -> None:
        self.left, self.told = batches, list[str]()

    def started(self, *_: object) -> None: ...

    def step(self, *_: object) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)

    def ended(self, *_: object) -> None: ...

    def note(self, line: str) -> None:
        self.told.append(line)


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Path) -> Path:
    shutil.copy(database, tmp_path / "mlflow.db")
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("ZOO_SAVE_SECONDS", "0")
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database to be copied; a run beside it, since what is imported before a fork is there after it."""
    home = tmp_path_factory.mktemp("warm")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ZOO_HOME", str(home))
        patched.delenv("MLFLOW_TRACKING_URI", raising=False)
        Tracker("empty", print)
        shutil.copy(home / "mlflow.db", home / "empty.db")
        go(Cell("warm", load([BASE])), "warm", Killing())
    return home / "empty.db"


def go(cell: Cell, sweep: str, watch: Killing) -> Result:
    return run(cell, sweep, Tracker(sweep, watch.note), watch)


def killed_or_done(cell: Cell, sweep: str, batches: int) -> int:
    """Exit code of a process that runs the cell and kills itself after so many batches, if any.

    Always a process of its own: SQLite's connections do not survive a fork.
    """
    child = os.fork()
    if not child:
        code = 1
        try:
            code = 0 if go(cell, sweep, Killing(batches)).status == "finished" else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def end_state(result: Result) -> dict[str, Any]:
    """What must not depend on interruptions."""
    timed = {"seconds", "seconds_per_step", "steps_timed", "peak_memory_bytes", "share_of_time"}
    apart = {"folder", "checkpoint", "mlflow_run", "provenance", "resumed", "seconds", "seconds_per_step"}
    plain = {key: value for key, value in result.to_json().items() if key not in apart | {"peak_memory"}}
    for part in ("costs", "diagnostics"):
        plain[part] = {key: value for key, value in plain[part].items() if key not in timed}
    return plain


def points(run_id: str) -> dict[str, list[tuple[int, float]]]:
    client = mlflow.MlflowClient(uri())
    names = client.get_run(run_id).data.metrics
    timed = ("result/", "diagnostics/share_of_time")
    return {
        name: sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))
        for name in names
        if not name.startswith(timed)
    }


@pytest.mark.parametrize(("batches", "accumulate"), [(3, 1), pytest.param(5, 2, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_ends_like_one_that_was_not(batches: int, accumulate: int) -> None:
    cell = Cell("moc", load([BASE, LONG, {"trainer.accumulate_grad_batches": accumulate}]))
    assert killed_or_done(cell, "whole", 0) == 0
    codes = list(iter(lambda: killed_or_done(cell, "killed", batches), 0))
    assert set(codes) == {-signal.SIGKILL}
    whole, parts = (store.read(cell, sweep) for sweep in ("whole", "killed"))

    each = (batches - 1) // accumulate  # the last step is not saved before the kill
    assert [part["step"] for part in parts.resumed] == [each * n for n in range(1, len(codes) + 1)]
    assert end_state(parts) == end_state(whole)
    one, other = (torch.load(str(result.checkpoint), weights_only=True) for result in (whole, parts))
    for state in ("state_dict", "optimizer_states"):  # the averaged weights, and what only the trained ones give
        leaves = [tree_leaves(checkpoint[state]) for checkpoint in (one, other)]
        tensors, others = ([leaf for leaf in found if isinstance(leaf, torch.Tensor)] for found in leaves)
        assert all(torch.equal(tensor, its) for tensor, its in zip(tensors, others, strict=True))
        assert tensors
    assert len(list(Path(parts.folder).glob("**/*.ckpt"))) == 1

    def probes(result: Result) -> list[Any]:
        return [json.loads(line) for line in (Path(result.folder) / "diagnostics.jsonl").read_text().splitlines()]

    assert probes(parts) == probes(whole)
    assert {path.name for path in Path(parts.folder).iterdir()} == {path.name for path in Path(whole.folder).iterdir()}

    assert points(str(parts.mlflow_run)) == points(str(whole.mlflow_run))
    assert all(len(dict(found)) == len(found) for found in points(str(parts.mlflow_run)).values())
    client = mlflow.MlflowClient(uri())
    assert len(client.search_runs([client.get_run(str(parts.mlflow_run)).info.experiment_id])) == 1


class Numbers(pl.LightningDataModule):
    """Films that are their numbers, `films` to an epoch."""

    def __init__(self, films: int) -> None:
        super().__init__()
        self.films = films

    def __len__(self) -> int:
        return self.films

    def __getitem__(self, number: int) -> Any:
        return number

    def __getitems__(self, numbers: Sequence[int]) -> Any:
        return list(numbers)

    def train_dataloader(self) -> Any:
        return train_loader(self, 1, seed=0, workers=0, trainer=self.trainer)


class Seeing(pl.LightningModule):
    """Notes which film it trains on in each step, and stops as if it was killed before step `last`."""

    def __init__(self, seen: dict[int, int], last: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self.last = seen, last

    def training_step(self, batch: list[int], _: int) -> Any:
        if self.global_step == self.last:
            raise InterruptedError
        self.seen[self.global_step] = batch[0]
        return 0 * self.weight.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("killed_every", [2, 3])
@pytest.mark.parametrize(("films", "limit"), [(2, 1.0), (5, 2), (4, 0.5)])
def test_run_killed_at_the_end_of_epochs_goes_on_with_the_next_films(
    tmp_path: Path, killed_every: int, films: int, limit: float
) -> None:
    """An epoch ends before the loader does where its batches are limited."""

    def train(seen: dict[int, int], resume: Path | None, last: int) -> None:
        trainer = pl.Trainer(
            max_steps=7, limit_train_batches=limit, callbacks=[Saving(tmp_path / RESUME, 0)], accelerator="cpu",
            logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        with suppress(InterruptedError):
            trainer.fit(Seeing(seen, last), datamodule=Numbers(films), ckpt_path=resume, weights_only=True)

    whole: dict[int, int] = {}
    killed: dict[int, int] = {}
    train(whole, None, -1)
    for last in (*range(killed_every, 7, killed_every), -1):
        train(killed, tmp_path / RESUME if killed else None, last)
    assert whole == killed
    assert len(whole) == 7
    assert len({*whole.values()}) == 7


@pytest.mark.slow
def test_a_pretrained_run_that_was_killed_ends_like_one_that_was_not(tmp_path: Path) -> None:
    """Adapters, routers, averages, noise and the interval of sampling go on from where they were."""
    model = {"folder": str(write(tmp_path / "models", ["wan"])[0]), "lora_rank": 2, "distill_output": 1.0}
    long = {
        "model": model,
        "data": f"{Path(__file__).parent / 'toy_latents.py'}:ToyLatents",
        "attention": {"name": "moga", **zoo.get("moga").small},
        "optim": {"ema_decay": 0.5},
        "trainer": {"max_steps": 5, "val_check_interval": 2, "accelerator": "cpu"},
        "sampling": {"every": 2, "steps": 2},
    }
    cell = Cell("moga", load([long]))
    assert killed_or_done(cell, "whole", 0) == 0
    codes = list(iter(lambda: killed_or_done(cell, "killed", 3), 0))
    assert codes == [-signal.SIGKILL] * 2
    whole, parts = (store.read(cell, sweep) for sweep in ("whole", "killed"))
    assert [part["step"] for part in parts.resumed] == [2, 4]
    assert end_state(parts) == end_state(whole)
    one, other = (torch.load(str(result.checkpoint), weights_only=True) for result in (whole, parts))
    for state in ("state_dict", "optimizer_states"):
        pairs = list(zip(tree_leaves(one[state]), tree_leaves(other[state]), strict=True))
        assert all(x.equal(y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)
        assert pairs
    assert points(str(parts.mlflow_run)) == points(str(whole.mlflow_run))


@pytest.mark.slow
def test_a_run_that_was_killed_in_a_validation_validates_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("moc", load([BASE, LONG]))
    with monkeypatch.context() as patched:
        patched.setattr(SampleFilms, "on_validation_batch_end", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert killed_or_done(cell, "sweep", 0) == -signal.SIGKILL
    assert saved_step(cell.folder("sweep") / RESUME) == 2
    assert killed_or_done(cell, "sweep", 0) == 0
    assert [step for step, _ in store.read(cell, "sweep").curves["val/loss"]] == [3, 6, 8]


@pytest.fixture(scope="module")
def killed_home(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Path:
    """Holds the half-done cell of `half_done`."""
    home = tmp_path_factory.mktemp("half_done")
    shutil.copy(database, home / "mlflow.db")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ZOO_HOME", str(home))
        patched.setenv("ZOO_SAVE_SECONDS", "0")
        assert killed_or_done(Cell("moc", load([BASE, LONG])), "sweep", 4) == -signal.SIGKILL
    return home


@pytest.fixture
def half_done(runs: Path, killed_home: Path) -> Cell:
    """Killed in its fourth step."""
    shutil.copytree(killed_home, runs, dirs_exist_ok=True)
    cell = Cell("moc", load([BASE, LONG]))
    assert store.read(cell, "sweep").reason == "was interrupted before its end"
    return cell


@pytest.mark.parametrize("damage", ["removed", "cut", "one byte"])
def test_damaged_checkpoint_starts_the_run_again(half_done: Cell, damage: str) -> None:
    path = half_done.folder("sweep") / RESUME
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda entry: entry.file_size)
        # Within what the entry holds: bytes between entries are padding, and harm nobody.
        middle = whole.index(file.read(largest)) + largest.file_size // 2
    changed = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    path.write_bytes({"cut": whole[:middle], "one byte": changed, "removed": b""}[damage])
    if damage == "removed":
        path.unlink()
    with pytest.raises(ValueError, match="there is none" if damage == "removed" else ""):
        saved_step(path)
    step, told = begun(half_done)
    assert step == 0
    assert told[0].startswith("moc starts again from step 0: no checkpoint to resume from (")
    assert not list(half_done.folder("sweep").iterdir())


def test_fresh_starts_the_run_again(half_done: Cell) -> None:
    part = half_done.folder("sweep") / "checkpoints" / "step=9.ckpt.1.part"  # what a kill amid a write leaves
    part.touch()
    assert begun(half_done) == (3, ["moc resumes from step 3"])
    assert not part.exists()
    assert begun(half_done, fresh=True) == (0, [])


def begun(cell: Cell, fresh: bool = False) -> tuple[int, list[str]]:
    watch = Killing()
    result, step = _begin(cell, "sweep", watch, fresh)
    assert len(result.resumed) == bool(step)
    return step, watch.told


@pytest.mark.slow
def test_a_full_disk_loses_nothing(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint finds no room; the one before it stays whole, and the run goes on from it."""
    cell, saved = Cell("moc", load([BASE, LONG])), list[str]()

    @contextmanager
    def full(path: Path) -> Iterator[IO[bytes]]:
        saved.append(path.name)
        with store.atomic_write(path) as file, open("/dev/full", "wb", buffering=0) as no_room:
            yield no_room if saved.count(RESUME) == 4 else file

    watch = Killing()
    with monkeypatch.context() as patched:
        patched.setattr(checkpointing, "atomic_write", full)
        with pytest.raises(ZooError, match=r"moc was stopped: .*No space left on device.* give the command again"):
            go(cell, "sweep", watch)
    assert not list(runs.glob("**/*.part"))
    assert store.read(cell, "sweep").status == "missing"
    assert "No space left" in str(store.read(cell, "sweep").reason)
    assert saved_step(cell.folder("sweep") / RESUME) == 3
    assert go(cell, "sweep", watch).status == "finished"
    assert watch.told == ["moc resumes from step 3"]
    assert not list(runs.glob("**/*.part"))


@pytest.mark.parametrize("steps", [5, 2])
def test_the_last_weights_are_kept_whatever_the_interval(steps: int) -> None:
    """A validation at step 3 and the end at 5, or before any; beside a run that the interval makes end with one."""
    kept = []
    for every in (3, steps):
        config = load([BASE, LONG, {"trainer.max_steps": steps, "trainer.val_check_interval": every}])
        result = go(Cell("moc", config), "sweep", Killing())
        assert result.status == "finished", result.traceback
        assert result.checkpoint == str(Path(result.folder) / "checkpoints" / f"step={steps}.ckpt")
        assert len(list(Path(result.folder).glob("checkpoints/*"))) == 1
        kept.append(torch.load(str(result.checkpoint), weights_only=True))
    one, other = kept
    assert one["global_step"] == other["global_step"] == steps
    assert all(torch.equal(tensor, one["state_dict"][name]) for name, tensor in other["state_dict"].items())


@pytest.mark.slow
def test_weights_whose_validation_is_not_finite_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one after the last step is not: what is kept is from the validation before."""
    compute, left = LossByTime.compute, [1.0, float("nan")]
    monkeypatch.setattr(LossByTime, "compute", lambda own: compute(own) * left.pop(0))
    result = go(Cell("moc", load([BASE, LONG, {"trainer.max_steps": 5}])), "sweep", Killing())
    assert "NonFiniteLoss" in str(result.reason)
    assert left == []
    assert Path(str(result.checkpoint)).name == "step=3.ckpt"
    assert len(list(Path(result.folder).glob("checkpoints/*"))) == 1


@pytest.mark.slow
def test_a_checkpoint_that_is_written_again_takes_its_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the weights of step 3 were kept, before the state to go on from was written."""
    cell = Cell("moc", load([BASE, LONG]))
    with monkeypatch.context() as patched:
        saves = Saving._save
        patched.setattr(Saving, "_save", lambda own, trainer: kill_at(3, trainer) or saves(own, trainer))
        assert killed_or_done(cell, "sweep", 0) == -signal.SIGKILL
    folder = cell.folder("sweep")
    assert [path.name for path in folder.glob("checkpoints/*")] == ["step=3.ckpt"]
    assert saved_step(folder / RESUME) == 2
    assert killed_or_done(cell, "sweep", 4) == -signal.SIGKILL
    assert [path.name for path in folder.glob("checkpoints/*")] == ["step=3.ckpt"]
    assert killed_or_done(cell, "sweep", 0) == 0
    assert [path.name for path in folder.glob("checkpoints/*")] == ["step=8.ckpt"]


def kill_at(step: int, trainer: Any) -> None:
    if trainer.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)
