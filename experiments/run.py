"""One run: a resolved config trained, measured and written down."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import signal
import statistics
import subprocess
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from typing_extensions import override

from experiments import pictures
from experiments.config import Config
from experiments.data import build
from experiments.store import Cell, Result
from experiments.tracking import Tracker
from lit_modules import AttentionCost, LitVideoDiT, RoutingWatch, SampleFilms, StepTimer

FIRST, LAST = 3, 20  # steps whose mean is the first and the last training loss
CURVE_POINTS = 500


class Watch(Protocol):
    """Who is told how a run goes."""

    def started(self, name: str) -> None: ...
    def step(self, step: int, total: int | None, loss: float) -> None: ...
    def ended(self, result: Result) -> None: ...


def run(cell: Cell, sweep: str, tracker: Tracker, watch: Watch, *, parent: str | None = None) -> Result:
    """Train one cell and write its folder; whatever it raises is recorded as its failure.

    The folder holds `result.json`, `checkpoints` (the last one whose validation loss was finite), `diagnostics.jsonl`,
    pictures of the plans and of who routed to which shot, and film strips. Only Ctrl-C comes through, as
    KeyboardInterrupt.
    """
    folder = cell.folder(sweep)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = Result(
        name=cell.name,
        attention=cell.config["attention"],
        status="running",
        seed=cell.config["seed"],
        id=cell.id,
        folder=str(folder),
        config=cell.config,
        provenance=provenance(),
    )
    result.write(folder)
    watch.started(cell.name)
    logger = tracker.logger(cell.name, {"zoo.sweep": sweep, "zoo.cell": cell.id}, parent)
    result.mlflow_run = str(logger.run_id)
    start = time.perf_counter()
    ended = "FAILED"
    try:
        with _quiet(folder / "warnings.txt"), _interruptible():
            _train(cell.config, folder, result, logger, watch)
        result.status, ended = "finished", "FINISHED"
    except KeyboardInterrupt:
        result.status, result.reason, ended = "missing", f"was interrupted after {result.steps} steps", "KILLED"
        raise
    except Exception as error:  # a bug in one method must not end the other cells; the result keeps the traceback
        result.status, result.reason = "failed", f"{type(error).__name__}: {error}"
        result.traceback = traceback.format_exc()
    finally:
        checkpoints = sorted((folder / "checkpoints").glob("*.ckpt"))
        result.checkpoint = str(checkpoints[-1]) if checkpoints else None
        result.seconds = time.perf_counter() - start
        _record(tracker, result, folder)
        tracker.end(str(logger.run_id), ended)
        result.write(folder)
    watch.ended(result)
    return result


def provenance() -> dict[str, Any]:
    """Where and on what this process computes."""
    code = Path(__file__).parent
    commit = _git(code, "rev-parse", "HEAD")
    return {
        "commit": commit or "not in a git checkout",
        "changed since": bool(_git(code, "status", "--porcelain", "--untracked-files=no")) if commit else None,
        **{package: version(package) for package in ("sparse-zoo", "torch", "lightning", "torchmetrics", "mlflow")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class History(Callback):
    """Flow losses as training goes, auxiliary ones left out so that methods compare: (step, loss) each."""

    def __init__(self, result: Result, watch: Watch) -> None:
        self.result, self.watch = result, watch
        self.losses: list[tuple[int, torch.Tensor]] = []
        self.validations: list[tuple[int, float]] = []

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.result.steps = trainer.global_step
        loss = outputs["flow"].detach()
        self.losses.append((trainer.global_step, loss))
        every = 1 if loss.device.type == "cpu" else 20  # reading a loss makes the device wait
        if trainer.global_step % every == 0:
            total = trainer.estimated_stepping_batches
            self.watch.step(trainer.global_step, int(total) if total != float("inf") else None, float(loss))

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and "val/loss" in trainer.callback_metrics:
            self.validations.append((trainer.global_step, float(trainer.callback_metrics["val/loss"])))

    def write(self) -> None:
        """Into the result."""
        train = [(step, float(loss)) for step, loss in self.losses]
        stride = max(1, len(train) // CURVE_POINTS)
        self.result.curves = {"train/flow": train[::stride], "val/loss": self.validations}
        if train:
            self.result.first_loss = statistics.fmean(loss for _, loss in train[:FIRST])
            self.result.last_loss = statistics.fmean(loss for _, loss in train[-LAST:])
        if self.validations:
            self.result.val_loss = self.validations[-1][1]


def _train(config: Config, folder: Path, result: Result, logger: Any, watch: Watch) -> None:
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    data = build(config["data"])
    assert isinstance(data, pl.LightningDataModule)
    data.prepare_data()
    data.setup("fit")
    result.data = data.summary()
    shape = {"channels": data.channels, "patch": list(data.patch), "vocabulary": data.vocabulary}
    sampling = {key: value for key, value in config["sampling"].items() if key != "every"}
    module = LitVideoDiT(
        {**config["model"], **shape, "attention": config["attention"]},
        config["flow"],
        config["optim"],
        seed=config["seed"],
        sample_metrics=data.sample_metrics(),
        sampling=sampling,
    )
    logger.log_hyperparams(config)
    history, cost, timer = History(result, watch), AttentionCost(every=10), StepTimer()
    films, routing = SampleFilms(folder, **config["sampling"]), RoutingWatch(folder)
    # After validation, which raises on a loss that is not finite: what is kept is good.
    keep = ModelCheckpoint(folder / "checkpoints", filename="{step}", save_on_train_epoch_end=False)
    trainer = pl.Trainer(
        **config["trainer"],
        logger=logger,
        default_root_dir=folder,
        callbacks=[history, cost, timer, routing, films, keep, LearningRateMonitor("step")],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(module, datamodule=data)
        if not history.validations or history.validations[-1][0] != trainer.global_step:
            trainer.validate(module, datamodule=data, verbose=False)
    finally:
        history.write()
        counted, timed = cost.summary(), timer.summary()
        result.density, result.flops, result.kernel = (counted.get(key) for key in ("density", "flops", "kernel"))
        result.seconds_per_step, result.peak_memory = timed["seconds_per_step"], timed["peak_memory_bytes"]
        result.costs = {**counted, **timed}
        result.metrics = {
            key.removeprefix("val/"): float(value)
            for key, value in trainer.callback_metrics.items()
            if key.startswith("val/") and not key.startswith("val/loss")
        }
        guessing = [getattr(metric, "chance", {}) for metric in module.sample_metrics.values()]
        result.chance = {name: score for scores in guessing for name, score in scores.items()}
        result.films = module.film_outcomes
        result.diagnostics = routing.summary()
        result.pictures = pictures.of_results(cost.results, folder) + pictures.of_routing(routing.layers, folder)
        last = max((path.name.rpartition("_film_")[0] for path in films.paths), default="")
        result.strips = [path.name for path in films.paths if path.name.rpartition("_film_")[0] == last]


def _record(tracker: Tracker, result: Result, folder: Path) -> None:
    """What the logger did not log: the run's figures and files."""
    run_id = str(result.mlflow_run)
    figures = ("first_loss", "last_loss", "val_loss", "density", "flops", "seconds_per_step", "peak_memory", "seconds")
    plain = result.to_json()
    tracker.metrics(run_id, {f"result/{key}": plain[key] for key in figures if plain[key] is not None})
    tracker.tags(run_id, {f"zoo.{key}": str(value) for key, value in result.provenance.items()})
    tracker.tags(
        run_id, {"zoo.kernel": result.kernel or "", "zoo.status": result.status, "zoo.reason": result.reason or ""}
    )
    if result.diagnostics:
        tracker.file(run_id, folder / "diagnostics.jsonl")
    for name in [picture["file"] for picture in result.pictures]:
        tracker.file(run_id, folder / name, "plans")
    for name in result.strips:
        tracker.file(run_id, folder / name, "films")
    tracker.plain(run_id, {"config": result.config, "data": result.data}, "config.json")


@contextmanager
def _quiet(path: Path) -> Iterator[None]:
    """Lightning's tips and the warnings of libraries go into a file, where there are any."""
    names = ("lightning.pytorch", "lightning.fabric", "mlflow", "alembic")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if caught:
            lines = dict.fromkeys(f"{warning.category.__name__}: {warning.message}" for warning in caught)
            path.write_text("\n".join(lines) + "\n")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lightning answers Ctrl-C with exit code 1 and leaves SIGINT ignored; here it stays a KeyboardInterrupt."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def _git(folder: Path, *arguments: str) -> str:
    try:
        found = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor()} × {os.cpu_count()}"
