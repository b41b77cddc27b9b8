"""Runs the cells of a sweep that have not finished: here, in several processes, beside other drivers of the same sweep.

Who runs a cell holds the lock in its folder meanwhile, so that processes that know nothing of each other share a sweep:
each takes what is neither finished nor locked. A driver, or a machine, can be killed at any time; the same command then
runs the missing cells, and resumes an interrupted one from its last checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from experiments.execution import signals
from experiments.execution.processes import PipeObserver, loaded_plugins, work_through
from experiments.execution.progress import Bar
from experiments.execution.work import POLL, Work, devices, on_gpu
from experiments.sweep.expand import Sweep
from experiments.tracking.identity import flatten
from experiments.tracking.mlflow_logger import Tracker
from experiments.tracking.store import Cell, Result, last_request, read, write_sweep
from sparse_zoo.errors import ZooError, refuse
from sparse_zoo.registry import import_file

OVERVIEW = 60.0  # seconds between looks of MLflow's parent run at its cells
ABOVE = "Parameters list the values of all cells, metrics are means over finished ones, cells.json has each. Report:"


def execute(
    sweep: Sweep,
    bar: Bar,
    *,
    fresh: bool = False,
    jobs: int | None = None,
    jobs_per_gpu: int = 1,
    slurm: Mapping[str, Any] | None = None,
    ray: bool = False,
    wait: bool = True,
) -> list[Result]:
    """Run the cells that have no finished result on disk, or with `fresh` all of them, `jobs` at a time.

    One at a time, in this process, unless `jobs` says otherwise; `jobs_per_gpu` of them share a GPU. With `slurm`,
    parameters of sbatch, as array job of a cluster, as many at a time as it has room for. Unless `wait`, it is left to
    itself, and what is there is returned. With `ray`, as tasks of Ray, likewise as many as there is room for.

    A cell that fails is recorded and the next one runs; a failed cell is tried again the next time. A cell that another
    process runs is waited for, and its result is taken in; should that process die, the cell is run here. Ctrl-C passes
    on as KeyboardInterrupt, with every finished cell kept.
    """
    found = {cell.name: read(cell, sweep.name) for cell in sweep.cells}
    params = varying_params(sweep.cells)
    todo = [cell for cell in sweep.cells if fresh or found[cell.name].status != "finished"]
    bar.kept(len(sweep.cells) - len(todo))
    if not todo:
        parent = _record_sweep(sweep)
        tracker = Tracker(sweep.name, bar.note)
        tracker.settle({parent: "FINISHED"} | _ended(found.values()))
        tracker.overview(parent, params, list(found.values()))
        tracker.reach(lambda: None)
        return list(found.values())
    refuse("--jobs", _too_many(1 if jobs is None else jobs, jobs_per_gpu, [] if slurm is not None or ray else todo))
    tracker = Tracker(sweep.name, bar.note)
    tracker.settle(_ended(found.values()))
    parent = tracker.parent(sweep.name, f"{sweep.about}\n\n{len(sweep.cells)} cells. {ABOVE} `zoo report {sweep.name}`")
    write_sweep(sweep.name, replace(sweep.request, mlflow_run=parent))
    plugins = loaded_plugins()
    works = [Work(cell, sweep.name, found[cell.name], parent, params[cell.name], plugins, fresh) for cell in todo]
    ended, shown = "KILLED", time.monotonic()
    tracker.overview(parent, params, list(found.values()))
    try:
        for result in _results(works, tracker, bar, jobs, slurm, ray, wait):
            found[result.name] = result
            if time.monotonic() - shown > OVERVIEW:
                tracker.overview(parent, params, list(found.values()))
                shown = time.monotonic()
        ended = "FINISHED" if all(result.status == "finished" for result in found.values()) else "FAILED"
    finally:
        if wait:
            tracker.overview(parent, params, list(found.values()))
            tracker.end(parent, ended)
    return list(found.values())


def _record_sweep(sweep: Sweep) -> str | None:
    """Store these cells as the sweep's last request, which the report describes; return MLflow's parent run."""
    asked = last_request(sweep.name)
    parent = asked.mlflow_run if asked else None
    if asked is None or (asked.about, asked.cells, asked.tuning) != (sweep.about, sweep.cells, sweep.request.tuning):
        write_sweep(sweep.name, replace(sweep.request, mlflow_run=parent))
    return parent


def _ended(results: Iterable[Result]) -> dict[str | None, str]:
    """MLflow's status of the runs of finished cells."""
    return {result.mlflow_run: "FINISHED" for result in results if result.status == "finished"}


def _results(
    works: list[Work],
    tracker: Tracker,
    bar: Bar,
    jobs: int | None,
    slurm: Mapping[str, Any] | None,
    ray: bool,
    wait: bool,
) -> Iterator[Result]:
    if slurm is not None:
        from experiments.execution.slurm import results, submit

        queued = submit(works, slurm, jobs)
        bar.note(f"{len(queued)} cells are SLURM's jobs {', '.join(queued)}; scancel ends them")
        return results(queued, bar) if wait else iter(())
    if ray:
        from experiments.execution import ray_jobs

        return ray_jobs.results(works, jobs, bar)
    if jobs is None or jobs == 1:
        return _here(works, tracker, bar)
    return _in_processes(works, min(jobs, len(works)), bar)


def varying_params(cells: tuple[Cell, ...]) -> dict[str, dict[str, Any]]:
    """By cell: its attention and whatever is not the same in all of them, by dotted keys."""
    configs = {cell.name: flatten(cell.config) for cell in cells}
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    alike = {key for key in keys if len({repr(config.get(key)) for config in configs.values()}) == 1}
    return {
        name: {key: value for key, value in config.items() if key not in alike or key.startswith("attention")}
        for name, config in configs.items()
    }


def _here(works: list[Work], tracker: Tracker, bar: Bar) -> Iterator[Result]:
    elsewhere: list[Work] = []
    for work in works:
        result = work.attempt(tracker, bar)
        if result is None:
            bar.note(f"{work.cell.name} is running elsewhere")
            elsewhere.append(work)
        else:
            yield result
    while elsewhere:
        time.sleep(POLL)
        for work in list(elsewhere):
            result = work.attempt(tracker, bar)
            if result is not None:
                elsewhere.remove(work)
                yield result


def _too_many(jobs: int, per_gpu: int, cells: list[Cell]) -> list[str]:
    with_gpus = torch.cuda.is_available() and any(map(on_gpu, cells))
    gpus, each = torch.cuda.device_count(), max(map(devices, cells), default=1)
    has = "a GPU" if each == 1 else f"{each} GPUs"
    shared = "to itself" if per_gpu == 1 else f"with at most {per_gpu} jobs on each"
    hint = "; small models can share one (--jobs-per-gpu)" if per_gpu == 1 else ""
    most = gpus * per_gpu // each
    return [
        f"must be at least 1, got {jobs}" if jobs < 1 else "",
        f"a job has {has} {shared}, and there are {gpus}; got {jobs}{hint}" if with_gpus and jobs > most else "",
    ]


def _in_processes(works: list[Work], jobs: int, bar: Bar) -> Iterator[Result]:
    """Each of `jobs` processes is given one cell after the other."""
    waiting, noted = deque(works), set[str]()
    each = max(devices(work.cell) for work in works)
    with closing(work_through(waiting, jobs, _serve, gpus=each)) as messages:
        for work, kind, rest in messages:
            if kind == "died":
                bar.dropped(work.cell.name, f"its process {rest[0]}; the same command resumes it")
                yield read(work.cell, work.sweep)
            elif kind != "done":
                getattr(bar, kind)(*rest)
            elif rest[0] is not None:
                yield rest[0]
            else:
                if work.cell.name not in noted:
                    bar.note(f"{work.cell.name} is running elsewhere")
                    noted.add(work.cell.name)
                waiting.append(work)


def _serve(pipe: Connection, threads: int) -> None:
    """What such a process does."""
    torch.set_num_threads(threads)
    logging.getLogger("datamodules").setLevel(logging.ERROR)  # what the data leaves out was said before the first cell
    observer, trackers = PipeObserver(pipe), dict[str, Tracker]()
    # Ctrl-C reaches all processes of a terminal: the driver alone answers it, and ends the others by SIGTERM.
    with signals.caught(patient=True), suppress(EOFError, KeyboardInterrupt):
        while True:
            work: Work = pipe.recv()
            for plugin in work.plugins:
                import_file(plugin)
            if work.sweep not in trackers:
                trackers[work.sweep] = Tracker(work.sweep, observer.note)
            try:
                result = work.attempt(trackers[work.sweep], observer)
            except ZooError as error:
                observer.tell("refused", str(error))
                continue
            if result is None:
                time.sleep(POLL)
            observer.tell("done", result)
