"""Kills a sweep's drivers at random moments and starts them again: nothing may be lost, repeated or doubled.

`python -m tests.crash_harness --kills 20` prints what was found, on synthetic films of several shots and on one video
clip, whose single shot fills the stream. Two drivers work on the same sweep at once; they are
forked from this process, which has run a cell of its own and so imported everything, and killed together, with all
their children. Their database it opens at the very end alone: SQLite's connections do not survive a fork.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import sqlite3
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import av
import mlflow
import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch import LightningDataModule
from rich.console import Console

from datamodules import ShotWorld, VideoFilms
from experiments.execution.progress import Bar
from experiments.execution.scheduler import execute
from experiments.reporting.report import build_report
from experiments.sweep.expand import Sweep, read
from experiments.tracking import store
from experiments.tracking.address import sqlite_file
from experiments.tracking.mlflow_logger import uri

CELLS = 6
DRIVERS = 2
THREADS = 2  # of each: sums in the order of threads would tell
STAGGER = 0.3  # seconds by which one driver starts after the other, and finds a cell of the other half-done
STEPS = 6


class Counted(LightningDataModule):
    """Writes a line into the file $STARTS whenever a cell begins to use it."""

    started = False
    seed: int

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if not self.started:
            self.started = True
            with open(os.environ["STARTS"], "a") as file:
                file.write(f"{self.seed}\n")


class Worlds(Counted, ShotWorld):
    """Synthetic films of several shots."""


class Clip(Counted, VideoFilms):
    """One video of one shot."""


FILMS: dict[str, dict[str, Any]] = {
    "Worlds": {
        "subjects": 1,
        "tags": 1,
        "grid": [2, 2],
        "patch": [1, 3, 3],
        "frames_per_shot": 1,
        "batch_size": 1,
        "films_per_epoch": 4,
        "val_films": 1,
    },
    "Clip": {"fps": None, "size": [16, 24], "patch": [1, 8, 8], "films_per_epoch": 4},
}


@dataclass
class Found:
    """What a round of kills came to; `wrong` is empty if all is well."""

    kills: int = 0
    amid_work: int = 0  # kills before the sweep was done
    starts: int = 0
    resumed: int = 0
    wrong: list[str] = field(default_factory=list)


def sweep_file(folder: Path, name: str, films: str) -> Path:
    """`CELLS` cells that differ by their seed, of a second at most each."""
    place = {"folder": str(folder / "videos"), "cache": str(folder / "cache")} if films == "Clip" else {}
    base = {
        "attention": {"name": "moc", "top_k": 1},
        "data": {"name": f"{Path(__file__).resolve()}:{films}", **FILMS[films], **place},
        "model": {"dim": 16, "depth": 1, "heads": 2},
        "trainer": {"max_steps": STEPS, "val_check_interval": 4, "accelerator": "cpu", "log_every_n_steps": 2},
        "sampling": {"steps": 1, "every": 10},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"base": base, "seeds": CELLS}))
    return path


def write_clip(path: Path) -> None:
    """A video of one shot: a bright square that moves over a grey ground."""
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 24, 16, "yuv420p"
        for number in range(8):
            picture = np.full((16, 24, 3), 96, np.uint8)
            picture[4:12, 2 * number : 2 * number + 8] = 224
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


def drivers(path: Path, count: int) -> int:
    """Start so many drivers of the sweep; the number of their process group, whose leader ends with the last one."""
    leader = os.fork()
    if not leader:
        code = 1
        try:
            os.setpgid(0, 0)
            others = [other for _ in range(count - 1) if (other := os.fork())]
            if os.getpid() != os.getpgid(0):
                time.sleep(STAGGER)
            torch.set_num_threads(THREADS)
            execute(read(path), _quiet())
            code = max((os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) for other in others), default=0)
        finally:
            os._exit(code)
    with suppress(PermissionError):  # the child may have done it, and even ended
        os.setpgid(leader, leader)
    return leader


def torture(folder: Path, kills: int, seed: int, films: str) -> Found:
    """Run a sweep with so many kills, and compare it with one that was left alone.

    This process computes with one thread: a fork of it could not go on with threads of its own.
    """
    write_clip(folder / "videos" / "clip.mp4")
    os.environ |= {"ZOO_HOME": str(folder / "runs"), "STARTS": str(folder / "starts"), "ZOO_SAVE_SECONDS": "0"}
    torch.set_num_threads(1)
    logging.getLogger("datamodules").setLevel(logging.ERROR)  # the clip has no caption
    random_ = random.Random(seed)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'warm.db'}"
    warm = read(sweep_file(folder, "warm", films))
    execute(replace(warm, cells=warm.cells[:1]), _quiet())
    del os.environ["MLFLOW_TRACKING_URI"]
    start = time.monotonic()
    whole = sweep_file(folder, "whole", films)
    code = os.waitstatus_to_exitcode(os.waitpid(drivers(whole, 1), 0)[1])
    seconds = time.monotonic() - start
    starts = folder / "starts"
    starts.write_text("")
    path = sweep_file(folder, "killed", films)
    sweep, found = read(path), Found()
    found.wrong += [f"the sweep that was left alone ended with exit code {code}"] if code else []
    done: dict[str, bytes] = {}
    for kill in range(kills + 1):
        group = drivers(path, DRIVERS)
        if kill < kills:
            if random_.random() < 0.8:  # else while the drivers start
                _wait_for_work(starts, group)
            time.sleep(random_.uniform(0, 2 * seconds / kills))
            os.killpg(group, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(group, 0)[1])
        found.amid_work += code == -signal.SIGKILL
        found.wrong += _changed(sweep, done)
        found.wrong += [f"start {kill + 1} ended with exit code {code}"] if code not in (0, -signal.SIGKILL) else []
    found.kills = kills
    found.starts = len(starts.read_text().splitlines())
    found.wrong += _results(sweep, [store.read(cell, whole.stem) for cell in read(whole).cells], found) + _store(sweep)
    return found


def _wait_for_work(starts: Path, group: int) -> None:
    """Until a cell has begun, or the drivers have ended since nothing is left."""
    before = starts.stat().st_size
    while starts.stat().st_size == before and not os.waitid(os.P_PID, group, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.005)


def _quiet() -> Bar:
    return Bar(Console(quiet=True), CELLS)


def _changed(sweep: Sweep, done: dict[str, bytes]) -> list[str]:
    """The cells that were finished once and are not as they were; `done` gets those that are finished now."""
    wrong = [f"{name} was finished and is not as it was" for name, was in done.items() if _bytes(sweep, name) != was]
    for cell in sweep.cells:
        if store.read(cell, sweep.name).status == "finished":
            done.setdefault(cell.name, _bytes(sweep, cell.name))
    return wrong


def _bytes(sweep: Sweep, name: str) -> bytes:
    cell = next(cell for cell in sweep.cells if cell.name == name)
    path = cell.folder(sweep.name) / "result.json"
    return path.read_bytes() if path.exists() else b""


def _results(sweep: Sweep, whole: list[store.Result], found: Found) -> list[str]:
    report = build_report(sweep.name)
    names = Counter(result.name for result in report.sweep.results)
    wrong = [f"the report has {names[cell.name]} of {cell.name}" for cell in sweep.cells if names[cell.name] != 1]
    wrong += [f"{result.name} is {result.status}: {result.reason}" for result in report.sweep.unfinished]
    by_name = {result.name: result for result in report.sweep.results}
    for other in whole:
        one = by_name[other.name.replace("whole", sweep.name)]
        found.resumed += len(one.resumed)
        same = ("curves", "metrics", "val_loss", "density", "steps", "strips", "pictures")
        a, b = one.to_json(), other.to_json()
        wrong += [f"{one.name}: {key} is not that of a run left alone" for key in same if a[key] != b[key]]
        left = [path.name for path in Path(one.folder).glob("**/*") if path.suffix == ".part" or path.stem == "resume"]
        wrong += [f"{one.name}: {name} was left behind" for name in left]
    return wrong


def _store(sweep: Sweep) -> list[str]:
    """What is wrong with MLflow's copy."""
    with sqlite3.connect(str(sqlite_file(uri()))) as database:
        state = database.execute("PRAGMA integrity_check").fetchone()[0]
    wrong = [] if state == "ok" else [f"the database: {state}"]
    client = mlflow.MlflowClient(uri())
    runs = client.search_runs([client.get_experiment_by_name(sweep.name).experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    wrong += [f"there are {len(parents)} runs above the cells"] if len(parents) != 1 else []
    of_cell = Counter(run.data.tags.get("zoo.cell") for run in runs if run not in parents)
    wrong += [f"{cell.name} has {of_cell[cell.id]} runs" for cell in sweep.cells if of_cell[cell.id] != 1]
    for run in runs:
        wrong += [f"run {run.info.run_name} is {run.info.status}"] if run.info.status != "FINISHED" else []
        for key in run.data.metrics if run not in parents else ():  # whose means move on with every cell
            steps = Counter(point.step for point in client.get_metric_history(run.info.run_id, key))
            twice = [step for step, count in steps.items() if count > 1]
            wrong += [f"run {run.info.run_name} has {key} twice at steps {twice}"] if twice else []
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--films", choices=[*FILMS], nargs="+", default=[*FILMS])
    asked = parser.parse_args()
    wrong = False
    for films in asked.films:
        with tempfile.TemporaryDirectory() as place:
            end = torture(Path(place), asked.kills, asked.seed, films)
        told = f"{films}: {end.kills} kills, {end.amid_work} of them amid work; {CELLS} cells: {end.starts} starts"
        print(f"{told}, {end.resumed} of them from a checkpoint")
        print("\n".join(end.wrong) or "nothing lost, repeated or doubled")
        wrong = wrong or bool(end.wrong)
    raise SystemExit(1 if wrong else 0)
