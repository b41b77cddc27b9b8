"""Where MLflow's store is: any path of runs can hold it, and an address that cannot be one is refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.tracking.address import sqlite_file, sqlite_uri, tracking_uri
from experiments.tracking.mlflow_logger import Tracker
from experiments.tracking.store import home
from sparse_zoo.errors import ZooError


@pytest.mark.slow
def test_a_store_opens_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a URL would take for a query, a fragment or an escape, and what a shell must quote."""
    folder = tmp_path / "who? #1 100% ünï 'x' \"y\" &a=b+c %41;d"
    monkeypatch.setenv("ZOO_HOME", str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    told: list[str] = []
    tracker = Tracker("sweep", told.append)
    log = tracker.run("cell", "0123", parent=None, before=None)
    log.log_metrics({"loss": 1.5}, 1)
    log.plain({"a": 1}, "config.json")
    log.end("FINISHED")
    assert not told
    assert (folder / "mlflow.db").stat().st_size > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]
    again = Tracker("sweep", told.append)
    assert again.client.get_run(str(log.run_id)).data.metrics == {"loss": 1.5}
    assert [path.name for path in folder.rglob("config.json")] == ["config.json"]
    assert not told


@pytest.mark.parametrize("path", ["/a/mlflow.db", "/a?b/mlflow.db", "/a%20b#c/x.db"])
def test_the_file_of_an_address_is_found(path: str) -> None:
    assert sqlite_file(sqlite_uri(Path(path))) == Path(path)


def test_plain_addresses_keep_their_file() -> None:
    assert sqlite_file("sqlite:////tmp/a.db") == Path("/tmp/a.db")
    assert sqlite_file("sqlite:///a.db") == Path("a.db")
    for other in ("sqlite:////tmp/a.db?timeout=3", "sqlite:///:memory:", "http://host:5000", "postgresql://u@h/d"):
        assert sqlite_file(other) is None


@pytest.mark.parametrize(
    "given",
    ["htp://host", "localhost:5000", "http://", "http:/host", "http://host:port", "http//host", "sqlite://a.db",
     "sqlite:", "postgres://u@h/d", "postgresql://", "postgresql:///", "://", "tracking", "http://[::1", "http://h]:5"],
)  # fmt: skip
def test_a_malformed_address_is_refused_with_what_is_allowed(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    with pytest.raises(ZooError, match="is no address of a store; use http://HOST:PORT, ") as caught:
        tracking_uri()
    assert "\n" not in str(caught.value)


def test_a_password_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgres://me:secret@host/d")
    with pytest.raises(ZooError) as caught:
        tracking_uri()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    ["http://host:5000", "https://u:p@host/path", "sqlite:///a.db", "postgresql+psycopg2://u:p@h:5432/d", "mysql://h/d",
     "databricks", "databricks://profile", "file:///tmp/x", "/tmp/x", "./mlruns"],
)  # fmt: skip
def test_addresses_are_passed_on(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert tracking_uri() == given


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ZOO_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")
    assert home() == tmp_path / "runs"
    assert sqlite_file(tracking_uri()) == tmp_path / "runs" / "mlflow.db"
    monkeypatch.setenv("ZOO_HOME", "~/zoo")
    assert home() == Path.home() / "zoo"
