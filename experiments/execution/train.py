"""Trains, validates and tests a config in one process; `run` records it, `ranks` has several processes do it."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from typing_extensions import override

from experiments.config.datamodule import FilmData, build, shape
from experiments.config.init_from import find_start
from experiments.config.names import is_pretrained
from experiments.config.resolve import Config, resolve
from experiments.execution import signals
from experiments.execution.checkpointing import Saving, WholeCheckpoints
from experiments.execution.initial_weights import load_initial_weights
from experiments.redact import redact, redact_all
from experiments.reporting.run_pictures import save_picks, save_plans
from experiments.tracking.mlflow_logger import Log
from experiments.tracking.store import Result
from lit_modules import AttentionCost, LitPretrained, LitVideoDiT, RoutingWatch, SampleFilms, StepTimer
from lit_modules.parallel import strategy
from lit_modules.precision import default_precision
from lit_modules.settings import Parallel
from sparse_zoo.errors import refuse

FIRST, LAST = 3, 20  # steps whose mean is the first and the last training loss
CURVE_POINTS = 500
VALIDATED = ("val/loss", "val/identity_recall")  # of what validations find, the curves
RESUME = "resume.ckpt"
PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}

SAVE_EVERY = 60.0  # seconds of training that a kill may cost, unless $ZOO_SAVE_SECONDS says otherwise


class RankDied(RuntimeError):
    """A process of a run on several devices died; the message names it."""


class Observer(Protocol):
    """Receives the progress of a run."""

    def started(self, name: str) -> None:
        """Called once, before the run `name` trains."""
        ...

    def step(self, name: str, step: int, total: int | None, note: str) -> None:
        """Called during training and testing: `step` of `total` (None: not known), and a note to show."""
        ...

    def ended(self, result: Result) -> None:
        """Called with the result of a run that has ended."""
        ...

    def note(self, line: str) -> None:
        """Called with a line for the user to read."""
        ...


class History(Callback):
    """Curves, (step, value) each: the flow loss, auxiliary ones left out so that methods compare, and validations."""

    def __init__(self, result: Result, observer: Observer) -> None:
        self.result, self.observer = result, observer
        self.losses: list[tuple[int, torch.Tensor]] = []
        self.validations: dict[str, list[tuple[int, float]]] = {}
        self._start = time.perf_counter()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": [(step, float(loss)) for step, loss in self.losses],
            "validations": self.validations,
            "seconds": (self.result.seconds or 0.0) + time.perf_counter() - self._start,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses = [(step, torch.tensor(loss)) for step, loss in state_dict["losses"]]
        self.validations, self.result.seconds = state_dict["validations"], state_dict["seconds"]

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
            self.observer.step(
                self.result.name,
                trainer.global_step,
                int(total) if total != float("inf") else None,
                f"loss {float(loss):.3f}",
            )

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for name in VALIDATED:
            if name in trainer.callback_metrics:
                points = self.validations.setdefault(name, [])
                if points and points[-1][0] == trainer.global_step:  # validated once more, after a resumption
                    points.pop()
                points.append((trainer.global_step, float(trainer.callback_metrics[name])))

    @override
    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.observer.step(self.result.name, batch_idx + 1, int(trainer.num_test_batches[0]), "judging")

    def write(self) -> None:
        """Write the curves, the first and last training loss and the last validation loss into the result."""
        train = [(step, float(loss)) for step, loss in self.losses]
        stride = max(1, len(train) // CURVE_POINTS)
        self.result.curves = {"train/flow": train[::stride], "val/loss": [], **self.validations}
        if train:
            self.result.first_loss = statistics.fmean(loss for _, loss in train[:FIRST])
            self.result.last_loss = statistics.fmean(loss for _, loss in train[-LAST:])
        if points := self.validations.get("val/loss"):
            self.result.val_loss = points[-1][1]


def train(stored: Config, folder: Path, result: Result, log: Logger, observer: Observer, *, resume: bool) -> None:
    """Train, validate and test a config, and write what was found into `result` and `folder`.

    Of a run on several devices each process does this; all but the first write pictures and diagnostics elsewhere.

    Args:
        stored: The config, as it is stored.
        folder: The run's folder.
        result: What was found goes here.
        log: Of metrics.
        observer: Receives the progress.
        resume: Resume the folder's `resume.ckpt`.
    """
    config = resolve(stored)  # the environment's values are for the parts alone
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    pretrained = is_pretrained(config["model"])
    data = build(config["data"], pretrained=pretrained)
    assert isinstance(data, pl.LightningDataModule)
    data.prepare_data()
    data.setup("fit")
    result.data = redact_all(data.summary())
    module = _pretrained(config) if pretrained else _own(config, stored, data)
    if isinstance(log, Log):
        log.data(stored["data"]["name"], stored["data"], result.data)
    parallel, rank = Parallel(**config.get("parallel", {})), int(os.environ.get("LOCAL_RANK", 0))
    several = parallel.devices > 1
    if "init_from" in config and isinstance(module, LitVideoDiT) and not resume:
        start = find_start(config["init_from"])
        line = load_initial_weights(module, start)
        result.provenance["init_from"] = f"{start.folder.name} ({start.id}) after {start.steps} steps"
        if not rank:
            observer.note(f"{result.name} {line}")
    own = Path(tempfile.mkdtemp(prefix="zoo-rank-")) if several and rank else folder
    history, cost, timer = History(result, observer), AttentionCost(every=10), StepTimer()
    decode = getattr(data, "decoder", None)
    films = None if pretrained else SampleFilms(own, decode=decode, **config["sampling"])
    routing = None if pretrained else RoutingWatch(own)
    # Latents without their VAE are not shown.
    shown = films if decode is not None or pretrained or data.channels in (1, 3) else None
    # After validation, which raises on a loss that is not finite: what is kept is good.
    # A resumed run may write a checkpoint that it had written when it was killed: over it, not beside it.
    keep = ModelCheckpoint(
        folder / "checkpoints", filename="{step}", save_on_train_epoch_end=False, enable_version_counter=False
    )
    saving = Saving(folder / RESUME, _seconds_between_saves())
    accelerator = config["trainer"].get("accelerator", "auto")
    # Lightning would take all GPUs there are, in float32.
    where = {"devices": 1, "precision": default_precision(accelerator), **config["trainer"]}
    if profiler := where.get("profiler"):  # of its own, Lightning's would print where nobody looks
        where["profiler"] = PROFILERS[profiler](dirpath=own, filename="profile")
    if several:
        device = "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"
        where |= {
            "accelerator": device,
            "devices": parallel.devices,
            "strategy": strategy(parallel, device, folder / RESUME),
            "use_distributed_sampler": False,  # training films are shared out by their loader; all validate all
        }
    trainer = pl.Trainer(
        **where,
        logger=log,
        default_root_dir=folder,
        callbacks=[
            *(history, cost, timer),
            *(one for one in (routing, shown) if one is not None),
            *(LearningRateMonitor("step"), keep, saving),
        ],
        # Lightning would take a SLURM allocation of several tasks for one run of several processes.
        plugins=[WholeCheckpoints(), LightningEnvironment()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    result.provenance["precision"] = str(trainer.precision)
    # Its own handler ends a run on SIGTERM as if it had finished.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    try:
        with signals.deferred():
            trainer.fit(module, datamodule=data, ckpt_path=folder / RESUME if resume else None, weights_only=True)
        validated = history.validations.get("val/loss", [(-1, 0.0)])[-1][0] == trainer.global_step
        if not validated or "val/loss" not in trainer.callback_metrics:
            trainer.validate(module, datamodule=data, verbose=False)
        _keep_last(trainer, keep, folder / "checkpoints")
        trainer.strategy.barrier()
        if isinstance(module, LitPretrained):
            if trainer.is_global_zero:
                module.export(folder)
        elif getattr(data, "test_films", 0):
            trainer.test(module, datamodule=data, verbose=False)
    finally:
        history.write()
        counted, timed = cost.summary(), timer.summary()
        result.density, result.flops, result.kernel = (counted.get(key) for key in ("density", "flops", "kernel"))
        result.seconds_per_step, result.peak_memory = timed["seconds_per_step"], timed["peak_memory_bytes"]
        result.costs = {**counted, **timed}
        # Of the last stage: of the test, where there was one.
        result.metrics = {
            name: float(value)
            for key, value in trainer.callback_metrics.items()
            if (name := key.partition("/")[2]) and key.startswith(("val/", "test/")) and not name.startswith("loss")
        }
        result.pictures = save_plans(cost.results, own)
        if isinstance(module, LitVideoDiT):
            guessing = [getattr(metric, "chance", {}) for metric in module.sample_metrics.values()]
            result.chance = {name: score for scores in guessing for name, score in scores.items()}
            result.films = module.film_outcomes
        if routing is not None:
            result.diagnostics = routing.summary()
            result.pictures += save_picks(routing.layers, own)
        if films is not None:
            last = max((path.name.rpartition("_film_")[0] for path in films.paths), default="")
            result.strips = [path.name for path in films.paths if path.name.rpartition("_film_")[0] == last]
        if own != folder:
            shutil.rmtree(own, ignore_errors=True)


def _seconds_between_saves() -> float:
    given = os.environ.get("ZOO_SAVE_SECONDS") or str(SAVE_EVERY)
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    wrong = f"must be a number of seconds, at least 0, got {given!r}; unset it for {SAVE_EVERY:g}"
    refuse("ZOO_SAVE_SECONDS", [] if seconds >= 0 else [wrong])
    return seconds


def _own(config: Config, stored: Config, data: FilmData) -> LitVideoDiT:
    module = LitVideoDiT(
        {**config["model"], **shape(data), "attention": config["attention"]},
        config["flow"],
        config["optim"],
        seed=config["seed"],
        sample_metrics=data.sample_metrics(),
        sampling={key: value for key, value in config["sampling"].items() if key != "every"},
        whole_metrics=getattr(data, "whole_metrics", dict)(),
    )
    module.hparams["model"] |= {"attention": stored["attention"]}  # which checkpoints keep
    return module


def _pretrained(config: Config) -> LitPretrained:
    return LitPretrained(**{key: config[key] for key in ("model", "attention", "flow", "optim", "seed", "sampling")})


def _keep_last(trainer: pl.Trainer, keep: ModelCheckpoint, folder: Path) -> None:
    """The weights of the last step, after which the interval need not ask for a validation, and no others."""
    last = folder / f"step={trainer.global_step}.ckpt"
    if keep.best_model_path != str(last):
        trainer.save_checkpoint(last)
    for earlier in set(folder.glob("*.ckpt")) - {last} if trainer.is_global_zero else ():
        earlier.unlink()


@contextmanager
def quiet(path: Path) -> Iterator[None]:
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
            path.write_text(redact("\n".join(lines)) + "\n", encoding="utf-8")


@contextmanager
def interruptible() -> Iterator[None]:
    """Lightning answers Ctrl-C with exit code 1 and leaves SIGINT ignored; here it stays a KeyboardInterrupt.

    What fails while a signal waits, say because a data loader was sent the signal too, was ended by the signal.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    except Exception:  # of any type: it is raised again, unless the signal that caused it waits
        signals.raise_pending()
        raise
    finally:
        signal.signal(signal.SIGINT, before)
