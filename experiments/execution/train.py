"""One run: a resolved config trained, measured and written down."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from typing_extensions import override

from experiments.config.datamodule import FilmData, build, shape
from experiments.config.names import is_pretrained
from experiments.config.resolve import Config, resolve
from experiments.execution import signals
from experiments.execution.checkpointing import Saving, WholeCheckpoints, saved_step
from experiments.redact import redact, redact_all
from experiments.reporting.run_pictures import draw, save_picks, save_plans
from experiments.tracking.identity import flatten
from experiments.tracking.mlflow_logger import Log, Tracker, figures
from experiments.tracking.provenance import provenance
from experiments.tracking.store import Cell, Result, home, read
from lit_modules import AttentionCost, LitPretrained, LitVideoDiT, RoutingWatch, SampleFilms, StepTimer
from lit_modules.parallel import strategy
from lit_modules.precision import default_precision
from lit_modules.settings import Parallel
from sparse_zoo.errors import ZooError

FIRST, LAST = 3, 20  # steps whose mean is the first and the last training loss
CURVE_POINTS = 500
VALIDATED = ("val/loss", "val/identity_recall")  # of what validations find, the curves
RESUME = "resume.ckpt"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


SAVE_EVERY = 60.0  # seconds of training that a kill may cost, unless $ZOO_SAVE_SECONDS says otherwise


class RankDied(RuntimeError):
    """A process of a run on several devices died; the message names it."""


class Observer(Protocol):
    """Receives the progress of a run."""

    def started(self, name: str) -> None: ...
    def step(self, name: str, step: int, total: int | None, note: str) -> None: ...
    def ended(self, result: Result) -> None: ...
    def note(self, line: str) -> None: ...


def run(
    cell: Cell,
    sweep: str,
    tracker: Tracker,
    observer: Observer,
    *,
    parent: str | None = None,
    params: Mapping[str, Any] | None = None,
    fresh: bool = False,
) -> Result:
    """Train one cell and write its folder; whatever it raises is recorded as its failure.

    The caller holds the lock of the folder. It holds `result.json`, `checkpoints` (one: of the last step or, while the
    run goes on and where it failed, of the last validation, whose loss was finite), `diagnostics.jsonl`, pictures of
    the plans and of who routed to which shot, film strips, and, until the run ends, `resume.ckpt`. From that an
    interrupted run goes on, unless `fresh`; one that failed starts anew, since what made it fail may have been mended.

    A signal comes through as `signals.Ended`, a KeyboardInterrupt, once the step that runs is done and saved. A disk
    that takes no more comes through as `ZooError`: then no other cell would come further, and this one resumes the next
    time. `params` are the settings that MLflow shows in columns.
    """
    folder = cell.folder(sweep)
    result, step = _begin(cell, sweep, observer, fresh)
    observer.started(cell.name)
    start = time.perf_counter()
    ended = "KILLED"
    with _whole_disk(cell.name):
        result.write(folder)
        log = tracker.run(cell.name, cell.id, parent=parent, before=result.mlflow_run)
        result.mlflow_run = log.run_id
        result.write(folder)
        log.about(params or flatten(cell.config), {})
        try:
            with quiet(folder / "warnings.txt"), signals.caught(), interruptible():
                if Parallel(**cell.config.get("parallel", {})).devices > 1:
                    from experiments.execution.ranks import train_on_ranks  # its processes run this module

                    train_on_ranks(cell, folder, result, log, observer, resume=bool(step))
                else:
                    train(cell.config, folder, result, log, observer, resume=bool(step))
            result.status, ended = "finished", "FINISHED"
        except KeyboardInterrupt as error:
            by = f" by {error}" if isinstance(error, signals.Ended) else ""
            result.status, result.reason = "missing", f"was interrupted{by} after {result.steps} steps"
            raise
        except RankDied as error:  # as if this process had died: the same command goes on with the run
            result.status, result.reason = "missing", f"was interrupted after {result.steps} steps: {error}"
            observer.note(f"{cell.name}: {error}; the same command goes on with it")
        except OSError as error:
            if error.errno in NO_ROOM:
                result.status, result.reason = "missing", f"was interrupted after {result.steps} steps: {error}"
                raise
            result.fail(error)
        except Exception as error:  # a bug in one method must not end the other cells; the result keeps the traceback
            result.fail(error)
        finally:
            with signals.deferred():
                ended = "FAILED" if result.status == "failed" else ended
                checkpoints = (folder / "checkpoints").glob("step=*.ckpt")
                last = max(checkpoints, key=lambda path: int(path.stem.partition("=")[2]), default=None)
                result.checkpoint = str(last) if last else None
                result.seconds = (result.seconds or 0.0) + time.perf_counter() - start
                if result.status != "finished":  # which is written last: what is finished is not gone through again
                    result.write(folder)
                _record(log, result, folder)
                log.end(ended)
                if tracker.incomplete is not None:
                    result.provenance["tracking"] = f"incomplete: {tracker.incomplete}"
                result.write(folder)
        if result.status != "missing":
            _remove(folder / RESUME)
    observer.ended(result)
    return result


def _begin(cell: Cell, sweep: str, observer: Observer, fresh: bool) -> tuple[Result, int]:
    """The result to be filled in, and the step from which the run goes on; at 0 the folder is empty."""
    folder = cell.folder(sweep)
    folder.mkdir(parents=True, exist_ok=True)
    before = read(cell, sweep)
    interrupted = before.status in ("running", "missing") and bool(before.provenance)
    step = 0
    if interrupted and not fresh:
        try:
            step = saved_step(folder / RESUME)
            observer.note(f"{cell.name} goes on from step {step}")
        except ValueError as error:
            observer.note(f"{cell.name} starts anew: no checkpoint to go on from ({error})")
    elif before.status == "unreadable":
        aside = _set_aside(folder)
        observer.note(f"{cell.name} starts anew: {before.reason}; what there was is kept in {aside}")
    for path in list(folder.glob("**/*.part")) if step else [path for path in folder.iterdir() if path.name != "lock"]:
        _remove(path)
    result = Result(
        name=cell.name,
        attention=cell.config["attention"],
        status="running",
        seed=cell.config["seed"],
        id=cell.id,
        folder=str(folder),
        config=cell.config,
        provenance=before.provenance if step else provenance(),
        resumed=[*before.resumed, {"step": step, **provenance()}] if step else [],
        mlflow_run=before.mlflow_run if step else None,
    )
    return result, step


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _set_aside(folder: Path) -> Path:
    """Move what a folder holds into a new one beside it: it may be a finished run, written by another version."""
    names = (folder.with_name(f"{folder.name}.unreadable-{number}") for number in count(1))
    aside = next(path for path in names if not path.exists())
    aside.mkdir()
    for path in folder.iterdir():
        if path.name != "lock":
            path.rename(aside / path.name)
    return aside


@contextmanager
def _whole_disk(name: str) -> Iterator[None]:
    """A disk that takes no more ends the sweep in one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise ZooError(
            f"{name} was stopped: {error}. Finished cells are kept; make room under {home()} and give the command again"
        ) from error


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
        """Into the result."""
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
        observer: Is told of progress.
        resume: Go on from the folder's `resume.ckpt`.
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
    own = Path(tempfile.mkdtemp(prefix="zoo-rank-")) if several and rank else folder
    history, cost, timer = History(result, observer), AttentionCost(every=10), StepTimer()
    decode = getattr(data, "decoder", None)
    films = None if pretrained else SampleFilms(own, decode=decode, **config["sampling"])
    routing = None if pretrained else RoutingWatch(own)
    # Latents without their VAE are not shown.
    shown = films if decode is not None or pretrained or data.channels in (1, 3) else None
    # After validation, which raises on a loss that is not finite: what is kept is good.
    # A run that goes on may write one anew that it had written when it was killed: over it, not beside it.
    keep = ModelCheckpoint(
        folder / "checkpoints", filename="{step}", save_on_train_epoch_end=False, enable_version_counter=False
    )
    saving = Saving(folder / RESUME, float(os.environ.get("ZOO_SAVE_SECONDS") or SAVE_EVERY))
    accelerator = config["trainer"].get("accelerator", "auto")
    # Lightning would take all GPUs there are, in float32.
    where = {"devices": 1, "precision": default_precision(accelerator), **config["trainer"]}
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


def _record(log: Log, result: Result, folder: Path) -> None:
    """What the run did not log while it trained: its figures and files."""
    log.log_metrics(figures(result), 0)
    told: dict[str, str | None] = {f"zoo.{key}": str(value) for key, value in result.provenance.items()}
    told |= {"zoo.kernel": result.kernel, "zoo.status": result.state, "zoo.reason": result.reason}
    log.about({}, {key: value for key, value in told.items() if value})
    if result.diagnostics:
        log.file(folder / "diagnostics.jsonl")
    for name in [picture["file"] for picture in result.pictures]:
        log.image(draw(folder, name), f"plans/{Path(name).stem}.png")
    for name in result.strips:
        log.image(draw(folder, name), f"films/{Path(name).stem}.png")
    log.plain({"config": result.config, "data": result.data}, "config.json")
    if result.checkpoint is not None:
        log.model(result.name, Path(result.checkpoint), flatten({"attention": result.attention}), result.steps)


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
    except Exception:
        signals.raise_pending()
        raise
    finally:
        signal.signal(signal.SIGINT, before)
