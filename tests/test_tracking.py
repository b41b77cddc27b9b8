"""A store that does not answer costs a run seconds; passwords in its address are shown nowhere."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_launch import Silent
from tiny import BASE, write_sweep

from experiments.execution.scheduler import execute
from experiments.redact import redact
from experiments.sweep.expand import read
from experiments.tracking import mlflow_logger
from experiments.tracking.mlflow_logger import Tracker

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def silent_server() -> Iterator[int]:
    """The port of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
    for connection in held:
        connection.close()


@pytest.mark.slow
def test_server_that_never_answers_costs_seconds_and_shows_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_server: int
) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    monkeypatch.setenv("ZOO_SAVE_SECONDS", "0")
    monkeypatch.setattr(mlflow_logger, "PATIENCE", 1.0)
    alone = read(write_sweep(tmp_path / "alone.yaml"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////dev/null/mlflow.db")
    start = time.monotonic()
    execute(alone, Silent())
    without = time.monotonic() - start
    address = f"http://me:hunter2@127.0.0.1:{silent_server}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    bar, start = Silent(), time.monotonic()
    (result,) = execute(read(write_sweep(tmp_path / "stalled.yaml")), bar)
    assert time.monotonic() - start < 2 * without + 6
    assert result.status == "finished", result.traceback
    assert len(result.curves["train/flow"]) == BASE["trainer"]["max_steps"]
    assert bar.notes == [
        f"MLflow's store http://***@127.0.0.1:{silent_server} failed (no answer for 1 seconds); "
        "results on disk are whole without it"
    ]
    kept = json.loads((Path(result.folder) / "result.json").read_text())
    assert kept["provenance"]["tracking"] == "incomplete: no answer for 1 seconds"
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path


def test_store_that_stalls_while_training_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker("stalls", print)
    log = tracker.run("cell", "0123", parent=None, before=None)
    assert log.run_id is not None  # the store is made, however slow the machine, before it stalls
    free = threading.Event()
    monkeypatch.setattr(tracker.client, "log_batch", lambda *_, **__: free.wait(60))
    tracker._left = 0.5
    start = time.monotonic()
    for step in range(20):
        log.log_metrics({"loss": 1.0}, step)
        log.flush()
    log.end("FINISHED")
    free.set()
    assert time.monotonic() - start < 3
    assert tracker.incomplete is not None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://me:p@ss@host:5000/x: down", "at http://***@host:5000/x: down"),
        ("https://host/a?token=abc&b=1", "https://host/a?token=***&b=1"),
        ("'postgresql://u:p@h/db?sslpassword=x'", "'postgresql://***@h/db?sslpassword=***'"),
        ("https://host/a?b=1&X-Amz-Signature=abc", "https://host/a?b=1&X-Amz-Signature=***"),
        ("postgresql://me:se/cr?et@host/db failed", "postgresql://***@host/db failed"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("mail me@host", "mail me@host"),
        ("sqlite:////runs/mlflow.db", "sqlite:////runs/mlflow.db"),
    ],
)
def test_secrets_of_addresses_are_redacted(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_mlflow_page_gets_its_address_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+none://me:hunter2@x/y")
    child = {}

    class Server:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            child.update(command=command, env=env)

        def wait(self, _: float = 0) -> int:
            return 0

        def terminate(self) -> None: ...

    monkeypatch.setattr(subprocess, "Popen", Server)
    assert mlflow_logger.serve(5000) == 0
    assert child["command"][0] == sys.executable
    assert not any("hunter2" in part for part in child["command"])
    assert child["env"]["MLFLOW_BACKEND_STORE_URI"] == os.environ["MLFLOW_TRACKING_URI"]


def test_metrics_logged_while_others_are_sent_are_sent_too() -> None:
    sent: list[str] = []

    class Client:
        def log_batch(self, run_id: str, metrics: list[Any]) -> None:  # noqa: ARG002
            sent.extend(metric.key for metric in metrics)
            if len(sent) == 1:  # the training goes on in another thread
                log.log_metrics({"attention/flops": 2.0}, step=1)

    tracker: Any = SimpleNamespace(client=Client(), post=lambda ask: ask(), experiment="sweep")
    log = mlflow_logger.Log(tracker, "run", {})
    log.log_metrics({"train/loss": 1.0}, step=1)
    log.save()
    assert sent == ["train/loss", "attention/flops"]
