"""MLflow: one experiment per sweep, one parent run, one child per cell. Nothing else in the tree imports mlflow.

The store is a copy for its own pages. If it cannot be reached, a run continues without it and says so once. Every
request is made in a separate thread, for which a run waits a few seconds at most: a server may accept and never answer.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import re
import subprocess
import sys
import threading
import time
import zlib
from argparse import Namespace
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean
from typing import Any, TypeVar

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read while mlflow is imported
# A server that is down is given up after seconds; MLflow would try for minutes, and the training waits.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
for _name in ("alembic", "mlflow.store.db.utils"):
    logging.getLogger(_name).setLevel(logging.ERROR)

import mlflow  # noqa: E402
import mlflow.store.db.utils  # noqa: E402
import numpy as np  # noqa: E402
from lightning.pytorch.loggers import Logger  # noqa: E402
from mlflow.entities import (  # noqa: E402
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    RunStatus,
    RunTag,
)
from mlflow.exceptions import MlflowException  # noqa: E402
from sqlalchemy.exc import SQLAlchemyError  # noqa: E402
from typing_extensions import override  # noqa: E402

from experiments.escape import for_mlflow, visible  # noqa: E402
from experiments.redact import redact  # noqa: E402
from experiments.tracking.address import sqlite_file, sqlite_uri, tracking_uri  # noqa: E402
from experiments.tracking.store import Result, config_id, home  # noqa: E402

mlflow.store.db.utils.MAX_RETRY_COUNT = 3  # for a database that cannot be opened; MLflow's 10 take 51 seconds

T = TypeVar("T")

FIGURES = ("first_loss", "last_loss", "val_loss", "density", "flops", "seconds_per_step", "peak_memory", "seconds")
TABLE = ("mlflow.loggedArtifacts", '[{"path": "cells.json", "type": "table"}]')  # by which its page shows a table

PATIENCE = 5.0  # seconds that a run waits, in all, for a server that does not answer
PATIENCE_DISK = 60.0  # the same for a database file, which other processes may keep busy
AGAIN = 60  # seconds after which a store that failed is tried again
TRAINING = {"mlflow.experimentKind": "custom_model_development"}  # else its page takes it for language models
SERVER_ENDS = 10.0  # seconds that MLflow's server has to end its processes
AT_ONCE = 100  # what a server takes of tags or parameters in one request; of metrics it takes more
VIEW = "cells"  # the key of the view that MLflow's page lists as "Cells"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
LONGEST_TAG = 5000  # characters that every store takes


def figures(result: Result) -> dict[str, float]:
    """What a run found, by the names of MLflow's metrics."""
    found = {key: getattr(result, key) for key in FIGURES} | result.metrics
    return {f"result/{key}": value for key, value in found.items() if value is not None and math.isfinite(value)}


def cells_view(columns: Sequence[str], now: int) -> str:
    """The value of `VIEW_TAG`: a view of MLflow's page with these columns, the parent run first, all cells below it.

    The page folds cells under their parent where runs are ordered by time, and no view can unfold them. By this tag,
    which the parent alone has, they are a list. Columns that the tag has no room for are left out, the last ones first.

    Args:
        columns: Such as "params.`optim.lr`" and "metrics.`result/val_loss`".
        now: Milliseconds since 1970.
    """
    state = {"selectedColumns": list(columns), "orderByKey": "tags.`zoo.parent`", "orderByAsc": True}
    packed = "deflate;" + b64encode(zlib.compress(json.dumps(state).encode())).decode()
    view = json.dumps({"name": "Cells", "createdAt": now, "updatedAt": now, "state": packed})
    return view if len(view) <= LONGEST_TAG else cells_view(columns[: len(columns) * 9 // 10], now)


def uri() -> str:
    """$MLFLOW_TRACKING_URI, or the SQLite file among the runs; raises `ZooError` where it is no address."""
    return tracking_uri()


class Tracker:
    """The runs of one experiment. Opening it makes the database if there is none, safely beside other processes.

    A store that fails is reported once, in one line, and left alone for a minute at a time; no method raises for it.
    """

    def __init__(self, experiment: str, report: Callable[[str], None]) -> None:
        """Open the store; `report` is called with the line about one that fails."""
        self.uri, self.experiment, self.report = uri(), experiment, report
        self._experiment_id: str | None = None
        self._silent_until = 0.0
        self._why: str | None = None
        self._reported = False
        self._patience = PATIENCE_DISK if self.uri.startswith("sqlite") else PATIENCE
        self._left = self._patience
        self._queue: SimpleQueue[Callable[[], object]] = SimpleQueue()
        threading.Thread(target=self._work, name="tracking", daemon=True).start()
        self.reach(lambda: None)

    @property
    def incomplete(self) -> str | None:
        """Why the store does not hold everything, in a line; None as far as is known."""
        return self._why

    def reach(self, ask: Callable[[], T]) -> T | None:
        """What `ask` gives, or None where the store cannot be reached or does not answer in time."""
        if time.monotonic() < self._silent_until:
            return None
        answers: list[T | None] = []
        answered = threading.Event()

        def work() -> None:
            try:
                answers.append(self._attempt(ask))
            finally:
                answered.set()

        self._queue.put(work)
        if not answered.wait(self._left):
            self._left = 0.0
            self._fail(f"no answer for {self._patience:g} seconds")
        self._report_failure()
        return answers[0] if answers else None

    def post(self, ask: Callable[[], object]) -> None:
        """Ask without waiting; `reach` comes after it."""
        self._queue.put(lambda: self._attempt(ask))
        self._report_failure()

    def _work(self) -> None:
        while True:
            work = self._queue.get()
            try:
                work()
            except Exception as error:  # of MLflow or of a plug-in of it: no reason to end the run
                self._fail(redact(f"{type(error).__name__}: {error}"))

    def _attempt(self, ask: Callable[[], T]) -> T | None:
        """In the thread: what `ask` gives, or None where the store fails or has just failed."""
        if time.monotonic() < self._silent_until:
            return None
        try:
            if self._experiment_id is None:
                self._open()
            return ask()
        # OSError: of the network or the disk; ImportError: the driver of a database that is not installed.
        except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
            self._fail(redact(str(error).strip().splitlines()[0])[:200])
            return None

    def _fail(self, why: str) -> None:
        self._silent_until = time.monotonic() + AGAIN
        self._why = self._why or why

    def _report_failure(self) -> None:
        """Once, in the thread of the run: pipes to other processes are not made for several."""
        if self._why is not None and not self._reported:
            self._reported = True
            self.report(f"MLflow's store {redact(self.uri)} failed ({self._why}); results on disk are whole without it")

    @property
    def experiment_id(self) -> str:
        """The id of the experiment, once the store has answered."""
        assert self._experiment_id is not None
        return self._experiment_id

    def _open(self) -> None:
        home().mkdir(parents=True, exist_ok=True)
        file = sqlite_file(self.uri)
        with _locked(home() / "mlflow.lock"):  # processes that open a fresh database at once race in its migrations
            if file is not None:
                _make(file)
            self.client = mlflow.MlflowClient(self.uri if file is None else sqlite_uri(file))
            found = self.client.get_experiment_by_name(self.experiment)
            # A server knows where artifacts go; a bare database would have them put beside the shell.
            served = self.uri.startswith(("http://", "https://", "databricks"))
            local = None if served else (home() / "artifacts" / self.experiment).as_uri()
            self._experiment_id = str(
                found.experiment_id
                if found
                else self.client.create_experiment(self.experiment, artifact_location=local, tags=TRAINING)
            )

    def parent(self, name: str, about: str) -> str | None:
        """Return the run above all cells of a sweep, made if there is none; None if the store cannot be reached."""

        def ask() -> str:
            with _locked(home() / "mlflow.lock"):  # two that start the same sweep at once must not make two
                found = self._search(f"tags.`zoo.parent` = '{name}'")
                if found:
                    self.client.update_run(found[0], status=RunStatus.to_string(RunStatus.RUNNING))
                    run_id = found[0]
                else:
                    tags = {"zoo.parent": name, "zoo.sweep": name}
                    run_id = str(self.client.create_run(self.experiment_id, run_name=name, tags=tags).info.run_id)
                self.client.set_tag(run_id, "mlflow.note.content", about)
            return run_id

        return self.reach(ask)

    def overview(self, run_id: str | None, params: Mapping[str, Mapping[str, Any]], results: Sequence[Result]) -> None:
        """Show the cells' parameters and metrics in the row of their parent, under which MLflow's page folds them.

        A parameter of the parent lists the values of all cells, a metric is the mean over finished cells, and
        `cells.json` is a table of all cells, and the view "Cells" of the experiment has all columns. `params` are by
        cell. MLflow never changes a parameter: where a later command has other values, they are listed under a second
        name, with the number of its cells.
        """
        if run_id is None:
            return
        given = {cell: {for_mlflow(key): value for key, value in own.items()} for cell, own in params.items()}
        values: dict[str, dict[str, None]] = {}
        for own in given.values():
            for key, value in own.items():
                values.setdefault(key, {})[visible(str(value))] = None
        found = {
            result.name: {for_mlflow(key): value for key, value in figures(result).items()}
            for result in results
            if result.status == "finished"
        }
        names = [*dict.fromkeys(key for own in found.values() for key in own)]
        means = {key: fmean(own[key] for own in found.values() if key in own) for key in names}
        table = {
            "columns": ["cell", "status", *values, *names],
            "data": [
                [
                    result.name,
                    result.state,
                    *(given[result.name].get(key) for key in values),
                    *(found.get(result.name, {}).get(key) for key in names),
                ]
                for result in results
            ],
        }

        def ask() -> None:
            there, now = self.client.get_run(run_id).data, int(time.time() * 1000)
            listed = {key: ", ".join(own)[:5000] for key, own in values.items()}
            named = {
                key if there.params.get(key, own) == own else f"{key[:230]}: {len(results)} cells": own
                for key, own in listed.items()
            }
            new = [Param(key, own) for key, own in named.items() if key not in there.params]
            moved = [Metric(key, mean, now, 0) for key, mean in means.items() if there.metrics.get(key) != mean]
            self.client.log_batch(run_id, params=new[:AT_ONCE], metrics=moved, tags=[RunTag(*TABLE)])
            self.client.log_dict(run_id, table, "cells.json")
            columns = [*(f"metrics.`{key}`" for key in names), *(f"params.`{key}`" for key in {**values, **named})]
            self.client.set_experiment_tag(self.experiment_id, VIEW_TAG, cells_view(columns, now))

        self.post(ask)

    def cells_pages(self) -> dict[str, str]:
        """Where MLflow's page shows all cells of a sweep, below its address: by sweep, the newest first."""
        found = self.reach(
            lambda: self.client.search_experiments(
                filter_string=f"tags.`{VIEW_TAG}` LIKE '%'", order_by=["last_update_time DESC"]
            )
        )
        return {
            one.name: f"experiments/{one.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"
            for one in found or []
        }

    def run(self, name: str, cell: str, *, parent: str | None, before: str | None) -> Log:
        """The run of one cell, as a logger: `before`, that of an interrupted cell which goes on, or a new one.

        A new one takes the place of unfinished ones of the same cell, which are deleted as MLflow does it: they can be
        restored.
        """

        def ask() -> Log:
            if before is not None:
                try:
                    points = self.client.get_run(before).data.metrics
                    self.client.update_run(before, status=RunStatus.to_string(RunStatus.RUNNING))
                    history = {key: self.client.get_metric_history(before, key) for key in points}
                    return Log(self, before, {key: max(p.step for p in past) for key, past in history.items()})
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                        raise  # otherwise: another store, or deleted there
            for stale in self._search(f"tags.`zoo.cell` = '{cell}'"):
                if self.client.get_run(stale).info.status in ("RUNNING", "KILLED"):
                    self.client.delete_run(stale)
            above = {"mlflow.parentRunId": parent} if parent else {}
            tags = {**above, "zoo.cell": cell, "zoo.sweep": self.experiment, "mlflow.source.name": "zoo"}
            made = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
            return Log(self, str(made.info.run_id), {})

        self._left = self._patience
        return self.reach(ask) or Log(self, None, {})

    def end(self, run_id: str | None, status: str) -> None:
        """`status`: "FINISHED", "FAILED" or "KILLED"."""
        if run_id is not None:
            self.reach(lambda: self.client.set_terminated(run_id, status))

    def settle(self, ended: Mapping[str | None, str]) -> None:
        """End those runs, by id with the status for `end`, that the store has as running: it was away as they ended."""

        def ask() -> None:
            for run_id in self._search("attributes.status = 'RUNNING'"):
                if run_id in ended:
                    self.client.set_terminated(run_id, ended[run_id])

        self.reach(ask)

    def _search(self, wanted: str) -> list[str]:
        return [str(run.info.run_id) for run in self.client.search_runs([self.experiment_id], wanted)]


class Log(Logger):
    """One run as Lightning's logger. Points are sent in batches, whenever Lightning or a checkpoint asks to save.

    `last` maps a metric to the last step that was logged of it: a run that goes on from its checkpoint repeats the
    steps after it, whose points are in the store already, and Lightning itself sends the epoch twice. `run_id` is None
    where the store could not be reached.
    """

    def __init__(self, tracker: Tracker, run_id: str | None, last: Mapping[str, int]) -> None:
        """Log to a run of `tracker`."""
        super().__init__()
        self.tracker, self.run_id, self.last = tracker, run_id, dict(last)
        self._waiting: list[Metric] = []

    @property
    @override
    def name(self) -> str:
        return self.tracker.experiment

    @property
    @override
    def version(self) -> str | None:
        return self.run_id

    @override
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Nothing: what differs between cells is logged by `about`, and the rest is an artifact."""

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        now, at = int(time.time() * 1000), step or 0
        new = {key: value for key, value in metrics.items() if at > self.last.get(key, -1)}
        self.last |= dict.fromkeys(new, at)
        if self.run_id is not None:
            self._waiting += [Metric(for_mlflow(key), float(value), now, at) for key, value in new.items()]

    @override
    def save(self) -> None:
        self._ask(self._send)

    def _send(self, client: mlflow.MlflowClient, run_id: str) -> None:
        while self._waiting:
            batch = self._waiting[:AT_ONCE]
            client.log_batch(run_id, metrics=batch)  # where it fails, they wait for the next time
            del self._waiting[: len(batch)]  # training may have added more meanwhile

    def flush(self) -> None:
        """Save, and wait until the store has it, or does not answer."""
        self.save()
        self.tracker.reach(lambda: None)

    @override
    def finalize(self, status: str) -> None:
        self.save()

    def about(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Settings, for the columns of MLflow's table, and tags."""
        self._ask(
            lambda client, run_id: client.log_batch(
                run_id,
                params=[Param(for_mlflow(key), visible(str(x))[:5000]) for key, x in list(params.items())[:AT_ONCE]],
                tags=[RunTag(for_mlflow(key).replace(" ", "_"), visible(x)[:5000]) for key, x in tags.items()],
            )
        )

    def data(self, name: str, settings: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        """The films as MLflow's dataset inputs, one each for training and validation."""
        source, profile = json.dumps({"datamodule": name, **settings}), json.dumps(summary)
        inputs = []
        for split in ("training", "validation"):  # two digests, or MLflow would take them for one
            digest = config_id({"source": source, "profile": profile, "split": split})
            films = Dataset(name, digest, "datamodule", source, None, profile)
            inputs.append(DatasetInput(films, [InputTag("mlflow.data.context", split)]))
        self._ask(lambda client, run_id: client.log_inputs(run_id, inputs))

    def model(self, name: str, checkpoint: Path, settings: Mapping[str, Any], step: int) -> None:
        """The trained model as MLflow's logged model, by the path of its checkpoint, which stays where it is."""

        def ask(client: mlflow.MlflowClient, run_id: str) -> None:
            if client.get_run(run_id).outputs.model_outputs:
                return  # the process was killed between here and the end of the run
            made = client.create_logged_model(
                self.tracker.experiment_id,
                re.sub(r"[/:.%\"']", "_", name),  # which MLflow does not take in a model's name
                run_id,
                tags={"zoo.checkpoint": str(checkpoint)},
                params={key: str(value) for key, value in settings.items()},
            )
            client.finalize_logged_model(made.model_id, LoggedModelStatus.READY)
            client.log_outputs(run_id, [LoggedModelOutput(made.model_id, step)])

        self._ask(ask)

    def plain(self, plain: dict[str, Any], name: str) -> None:
        """A JSON artifact."""
        self._ask(lambda client, run_id: client.log_dict(run_id, plain, name))

    def file(self, path: Path, folder: str | None = None) -> None:
        """Log a file as an artifact."""
        self._ask(lambda client, run_id: client.log_artifact(run_id, str(path), folder))

    def image(self, pixels: np.ndarray, name: str) -> None:
        """Log uint8 (H, W, 3) as a PNG artifact of that name."""
        self._ask(lambda client, run_id: client.log_image(run_id, pixels, name))

    def end(self, status: str) -> None:
        """`status`: "FINISHED", "FAILED" or "KILLED"."""
        self.save()
        self.tracker.end(self.run_id, status)

    def _ask(self, ask: Callable[[mlflow.MlflowClient, str], object]) -> None:
        run_id = self.run_id
        if run_id is not None:
            self.tracker.post(lambda: ask(self.tracker.client, run_id))


def serve(port: int) -> int:
    """MLflow's own page on this store, until it is stopped; its exit code."""
    # The address by the environment: it may hold a password, and a command line is visible to everybody.
    server = subprocess.Popen(
        # One process: several are ended and started again without end where a busy machine is slow to start them.
        [sys.executable, "-m", "mlflow", "ui", "--port", str(port), "--workers", "1"],
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_BACKEND_STORE_URI": uri()},
    )
    try:
        return server.wait()
    finally:
        server.terminate()  # at a signal to this process alone; it ends its own processes
        try:
            server.wait(SERVER_ENDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _make(database: Path) -> None:
    """An empty database, whole or not at all: MLflow cannot go on with one whose making was killed."""
    if not database.exists():
        for left in database.parent.glob(f"{database.name}.*.part"):
            left.unlink()
        part = database.with_name(f"{database.name}.{time.time_ns()}.part")  # MLflow keeps the one of before open
        mlflow.MlflowClient(sqlite_uri(part)).search_experiments(max_results=1)
        os.replace(part, database)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
