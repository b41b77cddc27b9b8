"""Only what is missing runs; a failure or Ctrl-C loses nothing."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import mlflow
import pytest
import torch
from rich.console import Console
from tiny import DIVERGES, write_sweep

import sparse_zoo as zoo
from experiments import store
from experiments.launch import execute
from experiments.progress import Bar
from experiments.sweep import read
from experiments.tracking import uri

METHODS = {"attention": ["dense", "moc"]}


class Silent(Bar):
    """Counts the cells that ran."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True), 1)
        self.ran: list[str] = []

    def started(self, name: str) -> None:
        super().started(name)
        self.ran.append(name)


@pytest.fixture(scope="module")
def diverges(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plugin") / "diverges.py"
    path.write_text(DIVERGES)
    return zoo.load_plugin(path)[0]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: str) -> Path:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)  # one database for all tests: making it takes a second
    return tmp_path


def test_only_what_is_missing_runs(runs: Path) -> None:
    sweep = read(write_sweep(runs / "resume.yaml", axes=METHODS))
    first = Silent()
    results = execute(sweep, first)
    assert first.ran == ["dense", "moc"]
    assert [result.status for result in results] == ["finished", "finished"]
    for result in results:
        assert result.steps == 2
        assert result.kernel
        assert result.density is not None
        assert 0 < result.density <= 1
        assert result.val_loss is not None
        assert len(result.curves["val/loss"]) == 2
        folder = Path(result.folder)
        assert all((folder / name).exists() for name in [*result.strips, *(p["file"] for p in result.pictures)])
        assert result.strips
        assert result.pictures
    assert results[0].density == 1.0

    again = Silent()
    assert execute(sweep, again) == [store.read(cell, sweep.name) for cell in sweep.cells]
    assert again.ran == []

    (sweep.cells[1].folder("resume") / "result.json").unlink()
    assert store.read(sweep.cells[1], "resume").status == "missing"
    third = Silent()
    execute(sweep, third)
    assert third.ran == ["moc"]

    client = mlflow.MlflowClient(uri())
    experiment = client.get_experiment_by_name("resume")
    found = client.search_runs([experiment.experiment_id])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(parents) == 1
    assert len(children) == 3
    one = next(run for run in children if run.info.run_id == results[0].mlflow_run)
    assert one.info.status == "FINISHED"
    assert one.data.params["attention.name"] == "dense"
    assert one.data.tags["zoo.kernel"] == results[0].kernel
    assert one.data.metrics["result/density"] == 1.0
    assert {"train/loss", "val/loss", "attention/flops"} <= one.data.metrics.keys()
    assert {file.path for file in client.list_artifacts(one.info.run_id)} == {
        "config.json",
        "films",
        "plans",
        "diagnostics.jsonl",
    }


def test_a_changed_config_runs_anew_and_loses_nothing(runs: Path) -> None:
    path = write_sweep(runs / "changed.yaml", cells={"dense": {"attention": "dense"}})
    execute(read(path), Silent())
    longer = read(path, [{"trainer.max_steps": 1}])
    bar = Silent()
    execute(longer, bar)
    assert bar.ran == ["dense"]
    assert store.read(read(path).cells[0], "changed").steps == 2


def test_a_failed_cell_is_recorded_and_the_next_one_runs(runs: Path, diverges: str) -> None:
    sweep = read(write_sweep(runs / "nan.yaml", axes={"attention": [diverges, "dense"]}))
    failed, fine = execute(sweep, Silent())
    assert fine.status == "finished"
    assert failed.status == "failed"
    assert failed.reason is not None
    assert "NonFiniteLoss" in failed.reason
    assert "bad" in failed.reason
    assert failed.steps == 1
    assert failed.checkpoint is not None
    state = torch.load(failed.checkpoint, weights_only=False)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert store.read(sweep.cells[0], "nan").status == "failed"
    again = Silent()
    execute(sweep, again)
    assert again.ran == [diverges]  # what failed is tried again, what finished is kept


def test_ctrl_c_keeps_what_has_finished(runs: Path) -> None:
    class Impatient(Silent):
        def step(self, *_: object) -> None:
            if self.ran[-1] == "moc":
                raise KeyboardInterrupt

    sweep = read(write_sweep(runs / "stopped.yaml", axes=METHODS))
    with pytest.raises(KeyboardInterrupt):
        execute(sweep, Impatient())
    states = [store.read(cell, sweep.name) for cell in sweep.cells]
    assert [state.status for state in states] == ["finished", "missing"]
    assert states[1].reason == "was interrupted after 1 steps"
    again = Silent()
    execute(sweep, again)
    assert again.ran == ["moc"]


def test_a_killed_run_counts_as_missing(runs: Path) -> None:
    cell = read(write_sweep(runs / "killed.yaml")).cells[0]
    folder = cell.folder("killed")
    result = store.Result("killed", {"name": "dense"}, "running", 0, provenance={"host": "elsewhere", "pid": 1})
    result.write(folder)
    assert store.read(cell, "killed").status == "running"  # another machine is believed
    plain = json.loads((folder / "result.json").read_text())
    plain["provenance"] = {"host": platform.node(), "pid": 2**22 + 1}
    (folder / "result.json").write_text(json.dumps(plain))
    assert store.read(cell, "killed").status == "missing"
    (folder / "result.json").write_text('{"name": ')
    assert "cannot be read" in str(store.read(cell, "killed").reason)
