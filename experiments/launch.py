"""Runs the cells of a sweep that have not finished; all of them are remembered."""

from __future__ import annotations

from dataclasses import replace

from experiments.progress import Bar
from experiments.run import run
from experiments.store import Asked, Result, home, read, read_sweep, write_sweep
from experiments.sweep import Sweep
from experiments.tracking import Tracker


def execute(sweep: Sweep, bar: Bar, *, fresh: bool = False) -> list[Result]:
    """Run, one after the other, the cells that have no finished result on disk, or with `fresh` all of them.

    A cell that fails is recorded and the next one runs; a failed cell is tried again the next time. Ctrl-C passes on as
    KeyboardInterrupt, with every finished cell kept.
    """
    found = {cell.name: read(cell, sweep.name) for cell in sweep.cells}
    todo = [cell for cell in sweep.cells if fresh or found[cell.name].status != "finished"]
    bar.kept(len(sweep.cells) - len(todo))
    if not todo:
        return list(found.values())
    tracker = Tracker(sweep.name)
    asked = Asked(sweep.about, sweep.cells, _parent_before(sweep.name))
    parent = tracker.parent(sweep.name, asked.mlflow_run)
    write_sweep(sweep.name, replace(asked, mlflow_run=parent))
    ended = "KILLED"
    try:
        for cell in todo:
            found[cell.name] = run(cell, sweep.name, tracker, bar, parent=parent)
        ended = "FINISHED" if all(result.status == "finished" for result in found.values()) else "FAILED"
    finally:
        tracker.end(parent, ended)
    return list(found.values())


def _parent_before(name: str) -> str | None:
    return read_sweep(name).mlflow_run if (home() / name / "sweep.json").exists() else None
