"""One run: a cell trained, measured and written down, with whatever ended it."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from experiments.execution import signals
from experiments.execution.checkpointing import saved_step
from experiments.execution.ranks import train_on_ranks
from experiments.execution.train import RESUME, Observer, RankDied, interruptible, quiet, train
from experiments.reporting.run_pictures import draw
from experiments.tracking.identity import flatten
from experiments.tracking.mlflow_logger import Log, Tracker, figures
from experiments.tracking.provenance import provenance
from experiments.tracking.store import Cell, Result, home, read
from lit_modules.settings import Parallel
from sparse_zoo.errors import ZooError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


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

    The caller holds the lock of the folder. The folder holds `result.json`, `checkpoints`, `diagnostics.jsonl`, arrays
    of the plans and of who routed to which shot, film strips, and, until the run ends, `resume.ckpt`. `checkpoints` has
    one file: of the last step, or, if the run has not finished, of the last validation, whose loss was finite. An
    interrupted run resumes from `resume.ckpt`, unless `fresh`. A failed run starts again from step 0, since its cause
    may be fixed by now.

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
                    train_on_ranks(cell, folder, result, log, observer, resume=bool(step))
                else:
                    train(cell.config, folder, result, log, observer, resume=bool(step))
            result.status, ended = "finished", "FINISHED"
        except KeyboardInterrupt as error:
            by = f" by {error}" if isinstance(error, signals.Ended) else ""
            result.status, result.reason = "missing", f"was interrupted{by} after {result.steps} steps"
            raise
        except RankDied as error:  # as if this process had died: the same command resumes the run
            result.status, result.reason = "missing", f"was interrupted after {result.steps} steps: {error}"
            observer.note(f"{cell.name}: {error}; the same command resumes it")
        except OSError as error:
            if error.errno in NO_ROOM:
                result.status, result.reason = "missing", f"was interrupted after {result.steps} steps: {error}"
                raise
            result.fail(error)
        # A bug in one method must not end the other cells, nor may its sys.exit(); the result keeps the traceback.
        except (Exception, SystemExit) as error:
            result.fail(error)
        finally:
            with signals.deferred():
                ended = "FAILED" if result.status == "failed" else ended
                checkpoints = (folder / "checkpoints").glob("step=*.ckpt")
                last = max(checkpoints, key=lambda path: int(path.stem.partition("=")[2]), default=None)
                result.checkpoint = str(last) if last else None
                result.seconds = (result.seconds or 0.0) + time.perf_counter() - start
                if result.status != "finished":  # "finished" is written last: it ends all repeats
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
    """The result to be filled in, and the step from which the run resumes; at 0 the folder is empty."""
    folder = cell.folder(sweep)
    folder.mkdir(parents=True, exist_ok=True)
    before = read(cell, sweep)
    interrupted = before.status in ("running", "missing") and bool(before.provenance)
    step = 0
    if interrupted and not fresh:
        try:
            step = saved_step(folder / RESUME)
            observer.note(f"{cell.name} resumes from step {step}")
        except ValueError as error:
            observer.note(f"{cell.name} starts again from step 0: no checkpoint to resume from ({error})")
    elif before.status == "unreadable":
        aside = _set_aside(folder)
        observer.note(f"{cell.name} starts again from step 0: {before.reason}; what there was is kept in {aside}")
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


def _record(log: Log, result: Result, folder: Path) -> None:
    """What the run did not log while it trained: its figures and files."""
    log.log_metrics(figures(result), 0)
    tags: dict[str, str | None] = {f"zoo.{key}": str(value) for key, value in result.provenance.items()}
    tags |= {"zoo.kernel": result.kernel, "zoo.status": result.state, "zoo.reason": result.reason}
    log.about({}, {key: value for key, value in tags.items() if value})
    if result.diagnostics:
        log.file(folder / "diagnostics.jsonl")
    for name in [picture["file"] for picture in result.pictures]:
        log.image(draw(folder, name), f"plans/{Path(name).stem}.png")
    for name in result.strips:
        log.image(draw(folder, name), f"films/{Path(name).stem}.png")
    log.plain({"config": result.config, "data": result.data}, "config.json")
    if result.checkpoint is not None:
        log.model(result.name, Path(result.checkpoint), flatten({"attention": result.attention}), result.steps)
