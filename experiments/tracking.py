"""MLflow: one experiment per sweep, one parent run, one child per cell. Nothing else in the tree imports mlflow."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read while mlflow is imported
for _name in ("alembic", "mlflow.store.db.utils", "lightning.pytorch.loggers.mlflow"):
    logging.getLogger(_name).setLevel(logging.ERROR)

import mlflow  # noqa: E402
from lightning.pytorch.loggers import MLFlowLogger  # noqa: E402
from mlflow.entities import Metric, RunStatus, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

from experiments.store import home  # noqa: E402


def uri() -> str:
    """$MLFLOW_TRACKING_URI, or the SQLite file among the runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


class Tracker:
    """The runs of one experiment. Opening it makes the database if there is none, safely beside other processes."""

    def __init__(self, experiment: str) -> None:
        self.uri = uri()
        home().mkdir(parents=True, exist_ok=True)
        with _locked(home() / "mlflow.lock"):  # processes that open a fresh database at once race in its migrations
            self.client = mlflow.MlflowClient(self.uri)
            found = self.client.get_experiment_by_name(experiment)
            # A server knows where artifacts go; a bare database would have them put beside the shell.
            served = self.uri.startswith(("http://", "https://", "databricks"))
            local = None if served else (home() / "artifacts" / experiment).as_uri()
            self.experiment_id: str = (
                found.experiment_id if found else self.client.create_experiment(experiment, artifact_location=local)
            )
        self.experiment = experiment

    def parent(self, name: str, run_id: str | None) -> str:
        """The run above all cells: that of before, if this store still has it, or a new one."""
        if run_id is not None:
            try:
                self.client.update_run(run_id, status=RunStatus.to_string(RunStatus.RUNNING))
                return run_id
            except MlflowException:
                pass  # another store, or the run was deleted there: its children get a new parent
        return str(self.client.create_run(self.experiment_id, run_name=name, tags={"zoo.sweep": name}).info.run_id)

    def logger(self, name: str, tags: Mapping[str, str], parent: str | None) -> MLFlowLogger:
        """A logger for one new run, under `parent` if there is one."""
        above = {"mlflow.parentRunId": parent} if parent else {}
        return MLFlowLogger(self.experiment, name, self.uri, tags={**tags, **above})

    def metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(run_id, metrics=[Metric(key, float(value), now, 0) for key, value in metrics.items()])

    def tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        self.client.log_batch(run_id, tags=[RunTag(_tag(key), value[:5000]) for key, value in tags.items()])

    def plain(self, run_id: str, plain: dict[str, Any], name: str) -> None:
        """A JSON artifact."""
        self.client.log_dict(run_id, plain, name)

    def file(self, run_id: str, path: Path, folder: str | None = None) -> None:
        self.client.log_artifact(run_id, str(path), folder)

    def end(self, run_id: str, status: str) -> None:
        """`status`: "FINISHED", "FAILED" or "KILLED"."""
        self.client.set_terminated(run_id, status)


def serve(port: int) -> int:
    """MLflow's own page on this store, until it is stopped; its exit code."""
    Tracker("Default")
    return subprocess.call(
        [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri(), "--port", str(port)],
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
    )


def _tag(name: str) -> str:
    return name.replace(" ", "_")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
