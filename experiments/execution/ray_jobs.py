"""Cells on a Ray cluster, or on a Ray that is started here: a task for each that is missing."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from experiments.execution import signals
from experiments.execution.progress import Bar
from experiments.execution.slurm import Job
from experiments.execution.work import POLL, Work, devices, on_gpu
from experiments.tracking.store import Result, home, read
from sparse_zoo.errors import ZooError, refuse

RETRIES = 3  # how often the process or the node of a cell may die; another process then resumes the cell
ENDING = signals.GRACE + 10  # seconds that cells have to end in when the sweep is interrupted
PASSED_ON = ("ZOO_", "MLFLOW_")  # variables of this process that hold in the cells' too


def needed() -> None:
    """Raises `ZooError` where there is no Ray."""
    refuse("--executor ray", ["needs Ray: pip install 'sparse-attention-zoo[ray]'"] if find_spec("ray") is None else [])


def start() -> None:
    """Connect to the Ray that there is, or start one on this machine.

    Raises:
        ZooError: If there is no Ray, or it does not come up.
    """
    needed()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray

        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except Exception as error:  # a plain Exception, where a machine is too busy for it
        raise ZooError(f"--executor ray: {' '.join(str(error).split())}") from error


def results(works: Sequence[Work], jobs: int | None, bar: Bar) -> Iterator[Result]:
    """Run the cells, `jobs` at a time or as many as there is room for, and give their results as they come in.

    On the cluster that $RAY_ADDRESS names or that runs on this machine, else on one of this machine's own for the time
    being. Each cell has a process to itself, with its share of the CPUs and, where the cluster has GPUs and the cell
    wants one, a GPU. If its process dies, another one resumes its checkpoint, `RETRIES` times.
    """
    start()
    # Ray has put a handler of its own in the place of ours.
    with signals.caught():
        yield from _tasks(works, jobs, bar)


def _tasks(works: Sequence[Work], jobs: int | None, bar: Bar) -> Iterator[Result]:
    import ray

    waiting, running = deque(works), dict[Any, Work]()
    try:
        there = ray.cluster_resources()
        wanted = {work.cell.id: devices(work.cell) if "GPU" in there and on_gpu(work.cell) else 0 for work in works}
        most = max(devices(work.cell) for work in works)
        room = int(there["GPU" if any(wanted.values()) else "CPU"]) // most
        refuse(
            "--executor ray",
            [f"a cell asks for {most} devices, and the cluster has fewer; lower parallel.data or parallel.sequence"]
            if not room
            else [],
        )
        at_once = min(len(works), room if jobs is None else jobs)
        largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        cpus = int(max(1, min(largest, there["CPU"] // at_once)))
        variables = {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON)}
        task = ray.remote(max_calls=1, max_retries=RETRIES, num_cpus=cpus)(_serve)
        while waiting or running:
            while waiting and len(running) < at_once:
                work = waiting.popleft()
                options = task.options(num_gpus=wanted[work.cell.id], name=work.cell.name)
                running[options.remote(Job(work, home()), cpus, variables)] = work
            done, _ = ray.wait(list(running), timeout=POLL)
            for each in done:
                yield _ended(each, running.pop(each), bar)
    finally:
        for each in running:
            ray.cancel(each)  # as by Ctrl-C
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=ENDING)
        ray.shutdown()


def _serve(job: Job, cpus: int, variables: dict[str, str]) -> None:
    """Run the job in a task's process."""
    os.environ.update(variables)
    torch.set_num_threads(cpus)
    job()


def _ended(task: Any, work: Work, bar: Bar) -> Result:
    """What became of a task's cell."""
    import ray

    try:
        ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ZooError):  # no other cell would come further
            raise ZooError(str(error.cause)) from error
        bar.dropped(work.cell.name, f"its task failed: {error.cause!r}; the same command resumes it")
    except ray.exceptions.RayError as error:
        why = " ".join(str(error).split())
        bar.dropped(work.cell.name, f"its process died {RETRIES + 1} times: {why}; the same command resumes it")
    result = read(work.cell, work.sweep)
    if result.status in ("finished", "failed"):
        bar.ended(result)
    return result
