"""Cells as tasks of Ray: what it is asked for, with a Ray that is made up, and a sweep on a real one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_cli import zoo
from test_launch import KILLED, Silent
from tiny import BASE, write_sweep
from toy_encoding import assert_jobs_encode_once, run

from experiments.execution import ray_jobs
from experiments.execution.scheduler import execute
from experiments.sweep.expand import read
from experiments.tracking import store
from experiments.tracking.store import Result
from sparse_zoo.errors import ZooError


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("ZOO_SAVE_SECONDS", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////dev/null/mlflow.db")  # it is told of once, and not missed
    monkeypatch.chdir(tmp_path)
    return tmp_path


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class MadeUp(ModuleType):
    """A Ray of two nodes that begins a task when it is submitted, and ends the oldest when it is waited for."""

    def __init__(self, **there: float) -> None:
        super().__init__("ray")
        self.__spec__ = ModuleSpec("ray", None)
        self.there = there
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.asked: list[dict[str, Any]] = []
        self.most, self.alive, self.cancelled, self.stopped = 0, 0, 0, False
        self.serve: Callable[..., None] = lambda job, *_: finish(job)

    def init(self, **_: object) -> None: ...

    def cluster_resources(self) -> dict[str, float]:
        return self.there

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": self.there["CPU"] / 2}}] * 2

    def remote(self, **always: Any) -> Any:
        def options(**more: Any) -> SimpleNamespace:
            def remote(*given: Any) -> Callable[[], None]:
                self.asked.append(always | more)
                self.alive += 1
                self.most = max(self.most, self.alive)
                return lambda: self.serve(*given)

            return SimpleNamespace(remote=remote)

        return lambda _: SimpleNamespace(options=options)

    def wait(self, tasks: list[Any], **_: object) -> tuple[list[Any], list[Any]]:
        return tasks[:1], tasks[1:]

    def get(self, task: Callable[[], None]) -> None:
        self.alive -= 1
        try:
            task()
        except RayError:
            raise
        except Exception as error:  # as Ray, which wraps whatever a task raises
            raise RayTaskError(error) from error

    def cancel(self, _: object) -> None:
        self.cancelled += 1

    def shutdown(self) -> None:
        self.stopped = True


def finish(job: Any) -> None:
    cell = job.work.cell
    Result(cell.name, cell.config["attention"], "finished", 0).write(cell.folder(job.work.sweep))


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[..., MadeUp]:
    def make(**there: float) -> MadeUp:
        fake = MadeUp(**there)
        monkeypatch.setitem(sys.modules, "ray", fake)
        return fake

    return make


AXES = {"attention": ["dense", "moc", "moga"]}


@pytest.mark.parametrize(
    ("there", "accelerator", "jobs", "most", "asked"),
    [
        ({"CPU": 8.0}, "auto", None, 3, {"num_gpus": 0, "num_cpus": 2}),
        ({"CPU": 8.0}, "auto", 2, 2, {"num_gpus": 0, "num_cpus": 4}),
        ({"CPU": 8.0}, "auto", 1, 1, {"num_gpus": 0, "num_cpus": 4}),  # no node has more
        ({"CPU": 2.0}, "auto", 3, 3, {"num_gpus": 0, "num_cpus": 1}),
        ({"CPU": 8.0, "GPU": 2.0}, "auto", None, 2, {"num_gpus": 1, "num_cpus": 4}),
        ({"CPU": 8.0, "GPU": 2.0}, "cpu", None, 3, {"num_gpus": 0, "num_cpus": 2}),
    ],
)
def test_cells_get_their_share(
    made_up: Callable[..., MadeUp],
    runs: Path,
    there: dict[str, float],
    accelerator: str,
    jobs: int | None,
    most: int,
    asked: dict[str, int],
) -> None:
    ray = made_up(**there)
    sweep = read(write_sweep(runs / "shared.yaml", base=BASE | {"trainer.accelerator": accelerator}, axes=AXES))
    results = execute(sweep, Silent(), ray=True, jobs=jobs)
    assert [result.status for result in results] == ["finished"] * 3
    assert (ray.most, len(ray.asked)) == (most, 3)
    assert all(asked.items() <= options.items() for options in ray.asked)
    assert all(options["max_calls"] == 1 for options in ray.asked)  # a process for each cell
    assert ray.stopped
    assert execute(sweep, Silent(), ray=True) == results
    assert len(ray.asked) == 3


def test_a_task_trains_its_cell_in_the_surroundings_of_the_sweep(
    made_up: Callable[..., MadeUp], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray, seen = made_up(CPU=1.0), []

    def serve(job: Any, cpus: int, variables: dict[str, str]) -> None:
        seen.append(variables)
        monkeypatch.setenv("ZOO_HOME", "elsewhere")
        monkeypatch.setenv("ZOO_SAVE_SECONDS", "600")
        ray_jobs._serve(job, cpus, variables)

    ray.serve = serve
    (result,) = execute(read(write_sweep(runs / "alone.yaml")), Silent(), ray=True)
    assert result.status == "finished"
    assert result.provenance["threads"] == 1
    assert (os.environ["ZOO_HOME"], os.environ["ZOO_SAVE_SECONDS"]) == (str(runs / "runs"), "0")
    assert seen[0].keys() >= {"ZOO_HOME", "ZOO_SAVE_SECONDS", "MLFLOW_TRACKING_URI"}
    assert "PATH" not in seen[0]


def test_dead_and_failed_tasks_are_reported_and_the_others_run(made_up: Callable[..., MadeUp], runs: Path) -> None:
    ray = made_up(CPU=2.0)

    def serve(job: Any, *_: object) -> None:
        if job.work.cell.name == "dense":
            raise RayError("the node\ndied")
        if job.work.cell.name == "moc":
            raise OSError("no such file")
        finish(job)

    ray.serve = serve
    bar = Silent()
    results = execute(read(write_sweep(runs / "some.yaml", axes=AXES)), bar, ray=True)
    assert [result.status for result in results] == ["missing", "missing", "finished"]
    assert bar.lost == [
        "dense: its process died 4 times: the node died; the same command resumes it",
        "moc: its task failed: OSError('no such file'); the same command resumes it",
    ]


@pytest.mark.parametrize("error", [ZooError("dense was stopped: no space left"), KeyboardInterrupt("Ctrl-C")])
def test_what_ends_the_sweep_ends_its_tasks(made_up: Callable[..., MadeUp], runs: Path, error: BaseException) -> None:
    ray = made_up(CPU=2.0)

    def serve(*_: object) -> None:
        raise error

    ray.serve = serve
    with pytest.raises(type(error), match=str(error)):
        execute(read(write_sweep(runs / "ended.yaml", axes=AXES)), Silent(), ray=True)
    assert (ray.cancelled, ray.stopped) == (1, True)  # of two tasks one had come to its end
    assert len(ray.asked) == 2


def test_without_ray_it_is_one_line_before_anything_starts(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "find_spec", lambda _: None)
    monkeypatch.setattr("experiments.sweep.expand.read", lambda *_: pytest.fail("cells are read"))
    result = zoo("sweep", write_sweep(runs / "none.yaml"), "--executor", "ray")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "Error: --executor ray: needs Ray: pip install 'sparse-attention-zoo[ray]'\n"
    assert not store.home().exists()


@pytest.mark.parametrize(
    "error", [ConnectionError("no cluster at x"), Exception("The current node timed out\nduring startup")]
)
def test_a_ray_that_does_not_start_is_one_line(
    made_up: Callable[..., MadeUp], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def init(**_: object) -> None:
        raise error

    monkeypatch.setattr(made_up(CPU=2), "init", init)
    with pytest.raises(ZooError, match=f"--executor ray: {' '.join(str(error).split())}"):
        ray_jobs.start()


def test_a_ray_that_lacks_a_package_of_its_own_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ray.py").write_text("import not_there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    with pytest.raises(ZooError, match="--executor ray: No module named 'not_there'"):
        ray_jobs.start()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'sparse-attention-zoo[ray]'")
def test_a_sweep_on_ray_outlives_the_death_of_a_process(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background of a shell
    (runs / "killed.py").write_text(KILLED)
    base = BASE | {"trainer.max_steps": 4}
    sweep = read(
        write_sweep(runs / "on_ray.yaml", base=base, plugins=["killed.py"], axes={"attention": ["killed", "dense"]})
    )
    bar = Silent()
    killed, dense = execute(sweep, bar, ray=True)
    assert [killed.status, dense.status] == ["finished"] * 2
    assert [part["step"] for part in killed.resumed] == [1]
    assert len({os.getpid(), killed.resumed[0]["pid"], killed.provenance["pid"], dense.provenance["pid"]}) == 4
    assert bar.lost == []
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'sparse-attention-zoo[ray]'")
def test_tasks_encode_a_manifest_once(tmp_path: Path, wan: Path, films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    assert_jobs_encode_once(tmp_path, wan, films.relative_to(tmp_path), "ray")
    missing = run(films, tmp_path, tmp_path / "none", "--executor", "ray")
    assert missing.exit_code == 2
    assert "config.json is missing" in missing.stderr


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'sparse-attention-zoo[ray]'")
def test_a_cell_of_two_devices_trains_in_one_task(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    base = BASE | {"parallel": {"sequence": 2}}
    (result,) = execute(read(write_sweep(runs / "two.yaml", base=base)), Silent(), ray=True)
    assert (result.status, result.steps) == ("finished", 2), result.reason
