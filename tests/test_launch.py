"""Only what is missing runs; a failure or Ctrl-C loses nothing."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import time
import zlib
from base64 import b64decode
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.exceptions import MlflowException
from rich.console import Console
from test_cli import zoo as zoo_command
from tiers import cases
from tiny import BASE, DIVERGES, write_sweep

import sparse_zoo as zoo
from experiments.escape import for_mlflow
from experiments.execution import train
from experiments.execution.processes import Worker, end
from experiments.execution.progress import Bar
from experiments.execution.scheduler import Work, _serve, execute, loaded_plugins, varying_params
from experiments.execution.slurm import Job
from experiments.reporting.html import html, write
from experiments.reporting.report import build_report
from experiments.sweep.expand import Sweep, read
from experiments.tracking import store
from experiments.tracking.mlflow_logger import Tracker, cells_view, uri
from sparse_zoo.errors import ZooError

METHODS = {"attention": ["dense", "moc"]}


class Silent(Bar):
    """Remembers the cells that ran and what was told."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True), 1)
        self.ran: list[str] = []
        self.notes: list[str] = []
        self.lost: list[str] = []

    def started(self, name: str) -> None:
        super().started(name)
        self.ran.append(name)

    def note(self, line: str) -> None:
        self.notes.append(line)

    def dropped(self, name: str, why: str) -> None:
        super().dropped(name, why)
        self.lost.append(f"{name}: {why}")


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
    assert first.notes == []
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


@pytest.mark.slow
def test_changed_config_runs_again_and_loses_nothing(runs: Path) -> None:
    path = write_sweep(runs / "changed.yaml", cells={"dense": {"attention": "dense"}})
    execute(read(path), Silent())
    longer = read(path, [{"trainer.max_steps": 1}])
    bar = Silent()
    execute(longer, bar)
    assert bar.ran == ["dense"]
    assert store.read(read(path).cells[0], "changed").steps == 2


@pytest.mark.slow
def test_a_report_is_about_the_cells_of_the_last_command(runs: Path) -> None:
    path = write_sweep(runs / "fewer.yaml", axes=METHODS)
    execute(read(path), Silent())
    parent = store.read_sweep("fewer").mlflow_run
    write_sweep(path, about="One is enough.", axes={"attention": ["moc"]})
    bar = Silent()
    execute(read(path), bar)
    asked = store.read_sweep("fewer")
    assert bar.ran == []
    assert (asked.about, [cell.name for cell in asked.cells]) == ("One is enough.", ["moc"])
    assert asked.mlflow_run == parent
    (store.home() / "fewer" / "sweep.json").write_text("{")
    with pytest.raises(ZooError, match=r"sweep\.json cannot be read"):
        store.read_sweep("fewer")
    folder = read(path).cells[0].folder("fewer")
    for number in (1, 2):
        (folder / "result.json").write_text(f"{{{number}")
        there = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        bar = Silent()
        execute(read(path), bar)
        assert bar.ran == ["moc"]
        aside = folder.with_name(f"{folder.name}.unreadable-{number}")
        (line,) = (note for note in bar.notes if note.startswith("moc starts again from step 0: "))
        assert "result.json cannot be read" in line
        assert line.endswith(f"; what there was is kept in {aside}")
        kept = {str(file.relative_to(aside)): file.read_bytes() for file in aside.rglob("*") if file.is_file()}
        assert kept == {name: held for name, held in there.items() if name != "lock"}
        assert "checkpoints/step=2.ckpt" in kept
    assert [cell.name for cell in store.read_sweep("fewer").cells] == ["moc"]


@pytest.mark.slow
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


@pytest.mark.parametrize("given", ["often", "-1", "nan"])
def test_odd_seconds_between_checkpoints_are_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("ZOO_SAVE_SECONDS", given)
    with pytest.raises(ZooError, match=f"ZOO_SAVE_SECONDS: must be a number of seconds, at least 0, got '{given}'"):
        train._seconds_between_saves()
    monkeypatch.setenv("ZOO_SAVE_SECONDS", "")
    assert train._seconds_between_saves() == train.SAVE_EVERY


@pytest.mark.parametrize("port", ["0", "-1", "70000"])
def test_page_of_mlflow_has_a_port(port: str) -> None:
    assert zoo_command("ui", "--port", port).exit_code == 2


def test_port_that_is_taken_is_refused_before_mlflow_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.tracking.mlflow_logger.serve", lambda _: pytest.fail("started"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = zoo_command("ui", "--port", str(port))
    assert said.exit_code == 2
    assert f"port {port} cannot be opened: Address already in use; give another one with --port" in said.stderr


def test_method_that_exits_fails_its_own_cell_alone(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exits(*_: object, **__: object) -> None:
        raise SystemExit(0)

    sweep = read(write_sweep(runs / "exits.yaml", axes=METHODS))
    monkeypatch.setattr("experiments.execution.run.train", exits)
    results = execute(sweep, Silent())
    assert [(result.status, result.reason) for result in results] == [("failed", "SystemExit: 0")] * 2


@pytest.mark.slow
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
    shown = zoo_command("report", "stopped").output
    assert "moc, interrupted: was interrupted after 1 steps" in shown
    for text in (html(build_report("stopped")), zoo_command("report", "stopped", "--markdown").output):
        assert "interrupted" in text
        assert "missing" not in text
    again = Silent()
    execute(sweep, again)
    assert again.ran == ["moc"]


def test_a_run_is_on_as_long_as_its_lock_is_held(runs: Path) -> None:
    cell = read(write_sweep(runs / "killed.yaml")).cells[0]
    folder = cell.folder("killed")
    with store.lock(folder) as mine:
        assert mine
        store.Result("killed", {"name": "dense"}, "running", 0).write(folder)
        assert store.read(cell, "killed").status == "running"
        with store.lock(folder) as again:
            assert not again
        child = os.fork()
        if not child:  # as a loader's process does, it has the lock's file open
            time.sleep(60)
    try:
        assert store.read(cell, "killed").status == "missing"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for broken in (b'{"name": ', b"", b"[]", b"\xff\x00"):
        (folder / "result.json").write_bytes(broken)
        assert "cannot be read" in str(store.read(cell, "killed").reason)


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("end", cases(["finished", "failed", "killed"], ["finished"]))
def test_a_cell_that_runs_elsewhere_is_waited_for(
    runs: Path, monkeypatch: pytest.MonkeyPatch, end: store.Status, begun: bool
) -> None:
    sweep = read(write_sweep(runs / f"{end}{begun}.yaml", axes=METHODS))
    dense = sweep.cells[0]
    there = store.Result("dense", {"name": "dense"}, "running", 0, provenance={"host": "another"})
    with ExitStack() as elsewhere:
        assert elsewhere.enter_context(store.lock(dense.folder(sweep.name)))
        if begun:  # before this sweep is started
            there.write(dense.folder(sweep.name))

        def other_driver(_: float) -> None:
            assert bar.ran == ["moc"]
            if end != "killed":
                replace(there, status=end).write(dense.folder(sweep.name))
            elsewhere.close()

        monkeypatch.setattr("experiments.execution.scheduler.time.sleep", other_driver)
        bar = Silent()
        results = execute(sweep, bar)
    assert bar.notes[0] == "dense is running elsewhere"
    assert len(bar.notes) == 1 + (begun and end == "killed")  # it starts anew, and says so
    assert bar.ran == (["moc", "dense"] if end == "killed" else ["moc"])
    assert results[0].status == ("finished" if end == "killed" else end)
    assert (results[0].provenance.get("host") == "another") == (end != "killed")


@pytest.mark.slow
def test_two_drivers_of_one_sweep_each_show_their_own_cells(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file = write_sweep(runs / "twice.yaml", axes={"attention": ["dense"]})
    other = read(file, [{"trainer.max_steps": 3}])

    def both(sweep: Sweep, bar: Bar, **given: Any) -> list[store.Result]:
        found = execute(sweep, bar, **given)
        store.write_sweep("twice", store.SweepRequest("other", other.cells, command="zoo sweep twice --max-steps 3"))
        write(build_report("twice"))
        return found

    alone = zoo_command("sweep", file)
    assert alone.exit_code == 0
    assert "Report: " in alone.output
    monkeypatch.setattr("experiments.execution.scheduler.execute", both)
    found = zoo_command("sweep", file)
    assert found.exit_code == 0  # the other one's cell has not run, which is no fault of this command
    assert "1 of 1 cells finished" in found.output
    assert "asked for with other cells meanwhile (zoo sweep twice --max-steps 3)" in found.output
    page = json.loads((runs / "runs" / "twice" / "report.json").read_text())
    assert [cell["status"] for cell in page["cells"]] == ["missing"]


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("uri", ["http://127.0.0.1:1", "sqlite:////proc/x.db", "postgresql+none://x/y", "mysql://x/y"])
def test_store_that_cannot_be_opened_is_one_line_soon(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    told: list[str] = []
    start = time.monotonic()
    assert Tracker("nowhere", told.append).parent("nowhere", "") is None
    assert time.monotonic() - start < 25  # MLflow itself would try for a minute
    (line,) = told
    assert line.startswith(f"MLflow's store {uri} failed (")
    assert "\n" not in line


@pytest.mark.slow
def test_a_store_out_of_reach_costs_no_run(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////dev/null/mlflow.db")
    bar = Silent()
    results = execute(read(write_sweep(runs / "alone.yaml", axes=METHODS)), bar)
    assert [result.status for result in results] == ["finished"] * 2
    assert [result.mlflow_run for result in results] == [None, None]
    (line,) = bar.notes
    assert line.startswith("MLflow's store sqlite:////dev/null/mlflow.db failed (")
    assert "\n" not in line


def test_a_store_that_is_lost_halfway_costs_its_points_alone(runs: Path) -> None:
    def locked(*_: object, **__: object) -> None:
        raise MlflowException("database is locked")

    sweep = read(write_sweep(runs / "halfway.yaml"))
    with pytest.MonkeyPatch.context() as patched:

        class Losing(Silent):
            def step(self, *told: Any) -> None:
                super().step(*told)
                patched.setattr(mlflow.MlflowClient, "log_batch", locked)

        bar = Losing()
        (result,) = execute(sweep, bar)
    assert result.status == "finished"
    assert len(result.curves["train/flow"]) == 2
    assert len(bar.notes) == 1
    assert "database is locked" in bar.notes[0]

    # The same command, when the store is back, ends what seems to run there.
    ours = [str(result.mlflow_run), str(store.read_sweep("halfway").mlflow_run)]
    assert mlflow.MlflowClient(uri()).get_run(ours[0]).info.status == "RUNNING"
    again = Silent()
    execute(sweep, again)
    assert again.ran == []
    assert [mlflow.MlflowClient(uri()).get_run(run).info.status for run in ours] == ["FINISHED"] * 2


@pytest.mark.slow
def test_database_is_created_atomically(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    told: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr("experiments.tracking.mlflow_logger.os.replace", lambda *_: os.stat(runs / "nowhere"))
        assert Tracker("first", told.append).parent("first", "") is None
    assert len(told) == 1
    assert not (store.home() / "mlflow.db").exists()
    assert Tracker("first", told.append).parent("first", "") is not None
    assert len(told) == 1


@pytest.mark.usefixtures("runs")
def test_resumed_run_logs_no_step_twice() -> None:
    tracker = Tracker("again", print)
    first = tracker.run("moc", "0123", parent=None, before=None)
    for before, steps in ((None, range(4)), (first.run_id, range(2, 6))):
        log = first if before is None else tracker.run("moc", "0123", parent=None, before=before)
        for step in steps:
            log.log_metrics({"loss": step / 2}, step)
            log.log_metrics({f"only_at_{step}": 1.0}, step)
        log.flush()
    assert log.run_id == first.run_id
    history = tracker.client.get_metric_history(str(first.run_id), "loss")
    assert [(point.step, point.value) for point in history] == [(step, step / 2) for step in range(6)]
    assert len(tracker.client.get_run(str(first.run_id)).data.metrics) == 7

    anew = tracker.run("moc", "0123", parent=None, before=None)  # it takes the unfinished one's place
    (found,) = tracker.client.search_runs([tracker.experiment_id])
    assert found.info.run_id == anew.run_id


@pytest.mark.slow
def test_mlflow_shows_what_differs_what_was_seen_and_what_came_out(runs: Path) -> None:
    axes = {"attention": ["dense", {"name": "moc", "top_k": 1}], "optim.lr": [0.5, 0.25]}
    sweep = read(write_sweep(runs / "shown.yaml", about="Which one?", axes=axes))
    assert varying_params(sweep.cells)["moc_top_k=1-lr=0.25"] == {
        "attention.name": "moc", "attention.top_k": 1, "optim.lr": 0.25,
    }  # fmt: skip
    bar = Silent()
    results = execute(replace(sweep, cells=sweep.cells[-2:]), bar)
    result = results[0]
    assert bar.notes == []
    client = mlflow.MlflowClient(uri())
    run = client.get_run(str(result.mlflow_run))
    assert run.info.run_name == "moc_top_k=1-lr=0.5"
    assert run.data.params == {"attention.name": "moc", "attention.top_k": "1", "optim.lr": "0.5"}
    assert {entry.dataset.name for entry in run.inputs.dataset_inputs} == {"shot_world"}
    assert json.loads(run.inputs.dataset_inputs[0].dataset.profile) == result.data
    assert {tag.value for entry in run.inputs.dataset_inputs for tag in entry.tags} == {"training", "validation"}
    (output,) = run.outputs.model_outputs
    assert client.get_logged_model(output.model_id).tags["zoo.checkpoint"] == result.checkpoint
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.info.run_name == "shown"
    assert parent.data.tags["mlflow.note.content"].startswith("Which one?")
    assert parent.data.params == {"attention.name": "moc", "attention.top_k": "1", "optim.lr": "0.5, 0.25"}
    assert parent.data.metrics.keys() == {key for key in run.data.metrics if key.startswith("result/")}
    losses = [float(one.val_loss or 0) for one in results]
    assert parent.data.metrics["result/val_loss"] == pytest.approx(sum(losses) / 2)
    table = mlflow.artifacts.load_dict(f"{parent.info.artifact_uri}/cells.json")
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["cell"] for row in rows] == ["moc_top_k=1-lr=0.5", "moc_top_k=1-lr=0.25"]
    assert [(row["status"], row["optim.lr"], row["result/val_loss"]) for row in rows] == [
        ("finished", 0.5, losses[0]), ("finished", 0.25, losses[1]),
    ]  # fmt: skip
    execute(sweep, bar)  # more cells, under the same run
    parent = client.get_run(parent.info.run_id)
    assert parent.data.params["attention.name"] == "moc"
    assert parent.data.params["attention.name: 4 cells"] == "dense, moc"
    assert "optim.lr: 4 cells" not in parent.data.params
    every = [float(store.read(cell, "shown").val_loss or 0) for cell in sweep.cells]
    assert parent.data.metrics["result/val_loss"] == pytest.approx(sum(every) / 4)
    assert len(mlflow.artifacts.load_dict(f"{parent.info.artifact_uri}/cells.json")["data"]) == 4

    view = view_of_cells(client, run.info.experiment_id)
    columns = [f"metrics.`{key}`" for key in parent.data.metrics] + [f"params.`{key}`" for key in parent.data.params]
    assert sorted(view["selectedColumns"]) == sorted(columns)
    assert view["orderByKey"] == "tags.`zoo.parent`"  # by time, the page would fold the cells
    ordered = client.search_runs([run.info.experiment_id], order_by=[view["orderByKey"] + " ASC"])
    assert next(one.info.run_name for one in ordered) == "shown"
    assert len(ordered) == 5


def view_of_cells(client: mlflow.MlflowClient, experiment: str) -> dict[str, Any]:
    """The view "Cells" of an experiment, read as MLflow's page reads it."""
    named = json.loads(client.get_experiment(experiment).tags["mlflow.sharedViewState.cells"])
    assert named["name"] == "Cells"
    assert isinstance(named["createdAt"], int)  # the page lists no view without it
    packed = named["state"].removeprefix("deflate;")
    assert packed != named["state"]
    view: dict[str, Any] = json.loads(zlib.decompress(b64decode(packed)))
    return view


def test_view_of_too_many_columns_keeps_the_first_that_fit() -> None:
    keys = [f"metrics.`{hashlib.sha256(str(number).encode()).hexdigest()}`" for number in range(500)]
    text = cells_view(keys, 1)
    assert len(text) <= 5000
    kept = json.loads(zlib.decompress(b64decode(json.loads(text)["state"].removeprefix("deflate;"))))["selectedColumns"]
    assert kept == keys[: len(kept)]
    assert len(kept) > 50


def test_odd_names_of_parameters_and_metrics_reach_the_parent(runs: Path) -> None:
    sweep = read(write_sweep(runs / "odd.yaml"))
    notes: list[str] = []
    tracker = Tracker("odd", notes.append)
    parent = tracker.parent("odd", "")
    names = ["a:b", "a//b", "/a", "a/", "..", "../a", ".", "", "é\n", "x" * 300, "`", "a/./b"]
    result = store.read(sweep.cells[0], "odd")
    result = replace(result, status="finished", metrics=dict.fromkeys(names, 1.0))
    tracker.overview(parent, {result.name: dict.fromkeys(names, "v\x1b")}, [result])
    assert tracker.reach(lambda: True)
    assert notes == []
    data = mlflow.MlflowClient(uri()).get_run(str(parent)).data
    assert {for_mlflow(f"result/{name}") for name in names} <= data.metrics.keys()
    assert set(data.params) == set(map(for_mlflow, names))
    assert set(data.params.values()) == {r"v\x1b"}


@pytest.mark.usefixtures("runs")
def test_page_of_mlflow_is_opened_where_all_cells_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first[red]", "second"):
        tracker = Tracker(name, str)
        tracker.overview(tracker.parent(name, ""), {}, [])
        tracker.reach(lambda: None)
    monkeypatch.setattr("experiments.tracking.mlflow_logger.serve", lambda port: port - 5001)
    said = zoo_command("ui", "--port", 5001)
    assert said.exit_code == 0
    ids = {one.name: one.experiment_id for one in mlflow.MlflowClient(uri()).search_experiments()}
    for name in ("first[red]", "second"):
        page = f"experiments/{ids[name]}/runs?workflowType=machine_learning&viewStateShareKey=cells"
        assert f"Cells of the sweep {name}: http://127.0.0.1:5001/#/{page}\n" in said.stdout


def test_too_many_jobs_are_refused(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = read(write_sweep(runs / "many.yaml", base=BASE | {"trainer.accelerator": "auto"}))
    with pytest.raises(ZooError, match="--jobs: must be at least 1, got 0"):
        execute(sweep, Silent(), jobs=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ZooError, match="a job has a GPU to itself, and there are 2; got 3; small models can share one"):
        execute(sweep, Silent(), jobs=3)
    with pytest.raises(ZooError, match="a job has a GPU with at most 4 jobs on each, and there are 2; got 9"):
        execute(sweep, Silent(), jobs=9, jobs_per_gpu=4)


def test_jobs_share_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    workers = [Worker(number, 4, tell_gpus) for number in range(4)]
    assert [worker.pipe.recv() for worker in workers] == ["4", "7", "4", "7"]
    end(workers)


def tell_gpus(pipe: Connection, _: int) -> None:
    pipe.send(os.environ["CUDA_VISIBLE_DEVICES"])


KILLED = '''
import os
import signal

import sparse_zoo as zoo


@zoo.register("killed")
class Killed(zoo.Attention):
    """Dense attention whose process is killed after the second step, once."""

    def plan(self, q, k, layout):
        return zoo.Plan.dense(layout)

    def losses(self, call):
        once = __file__ + ".once"
        if (call.step or 0) > 1 and not os.path.exists(once):
            open(once, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return {}
'''


FILMS = """
from datamodules import ShotWorld


class Films(ShotWorld):
    pass
"""


class OneWork:
    """The pipe of a worker that is given one work, and then none."""

    def __init__(self, work: Work) -> None:
        self.works, self.told = [work], list[tuple[Any, ...]]()

    def recv(self) -> Work:
        if not self.works:
            raise EOFError
        return self.works.pop()

    def send(self, told: tuple[Any, ...]) -> None:
        self.told.append(told)


@pytest.mark.slow
def test_files_of_data_are_loaded_by_workers_and_jobs(runs: Path) -> None:
    (runs / "films.py").write_text(FILMS)
    base = BASE | {"data": BASE["data"] | {"name": f"{runs}/films.py:Films"}}
    sweep = read(write_sweep(runs / "own.yaml", base=base, axes={"attention": ["dense"]}))
    (cell,) = sweep.cells
    plugins = loaded_plugins()
    assert runs / "films.py" in plugins
    work = Work(cell, "own", store.read(cell, "own"), None, {}, plugins, fresh=False)
    pipe: Any = OneWork(work)
    _serve(pipe, 1)
    assert pipe.told[-1][0] == "done"
    assert pipe.told[-1][1].status == "finished"
    Job(work, store.home())()


@pytest.mark.slow
def test_jobs_share_cells_and_survive_the_death_of_one(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_SAVE_SECONDS", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    (runs / "killed.py").write_text(KILLED)
    axes = {"attention": ["killed", "dense", "moc"]}
    base = BASE | {"trainer.max_steps": 4}
    sweep = read(write_sweep(runs / "jobs.yaml", base=base, plugins=["killed.py"], axes=axes))
    bar = Silent()
    killed, *others = execute(sweep, bar, jobs=2)
    assert killed.status == "missing"
    assert bar.lost == ["killed: its process was killed by SIGKILL; the same command resumes it"]
    assert [result.status for result in others] == ["finished"] * 2
    assert os.getpid() not in {result.provenance["pid"] for result in others}
    assert {result.provenance["threads"] for result in (killed, *others)} == {2}
    killed, *again = execute(sweep, bar, jobs=2)
    assert killed.status == "finished"
    assert [part["step"] for part in killed.resumed] == [1]
    assert [result.to_json() for result in again] == [result.to_json() for result in others]
