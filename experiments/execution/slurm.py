"""Cells on a SLURM cluster, through submitit: one array job for all that are missing."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from experiments.execution import signals
from experiments.execution.progress import Bar
from experiments.execution.work import POLL, Work, devices, on_gpu
from experiments.tracking.mlflow_logger import Tracker
from experiments.tracking.store import Result, home, write_json
from sparse_zoo.errors import ZooError, refuse
from sparse_zoo.registry import import_file

NOTICE_SIGNAL = signal.SIGUSR2  # submitit's, by which SLURM tells a job that it is preempted or its time is over
NOTICE = 60  # seconds before the end of its time at which SLURM tells a job, which then queues up again
TIME = "1:00:00"  # of a job, by default
REQUEUES = 100  # how often, at most, a cell may use up the time of its job and be resumed in another one
GONE = 5  # looks at the queue, one after the other, in which a job must be missing to be given up


@dataclass(frozen=True)
class Job:
    """One cell as submitit runs it on a node."""

    work: Work
    home: Path

    def __call__(self) -> None:
        """Run the cell in this job; ask for a new job if it is preempted or its time is over."""
        os.environ["ZOO_HOME"] = str(self.home)
        for plugin in self.work.plugins:
            import_file(plugin)
        observer = _LogObserver()
        tracker = Tracker(self.work.sweep, observer.note)
        requeue = signal.getsignal(NOTICE_SIGNAL)  # submitit's own, in a job of it
        try:
            with signals.caught(*[NOTICE_SIGNAL] if callable(requeue) else []):
                while self.work.attempt(tracker, observer) is None:
                    time.sleep(POLL)
        except signals.Ended as ended:
            observer.note(f"{self.work.cell.name} was ended by {ended}")
            if ended.number == NOTICE_SIGNAL and callable(requeue):
                requeue(ended.number, None)  # ends this process
            raise SystemExit(ended.code) from ended

    def checkpoint(self) -> Any:
        """The job that submitit queues when this one is preempted or out of time: the same, which then resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def parameters(texts: Sequence[str]) -> dict[str, str | int]:
    """key=value each; not as YAML, to which a time of 1:30:00 is a number."""
    refuse("--slurm", [f"a parameter is key=value, got {text!r}" for text in texts if not text.partition("=")[1]])
    pairs = [text.partition("=") for text in texts]
    found: dict[str, str | int] = {key.strip(): int(text) if text.isdecimal() else text for key, _, text in pairs}
    return {**found, "time": minutes(str(found.get("time", TIME)))}


def minutes(text: str) -> int:
    """A time as sbatch takes it, MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, in whole minutes, rounded up.

    submitit computes with it when the time is over; a text would fail just then.
    """
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    refuse(
        "--slurm",
        [f"time must be like 90, 1:30:00 or 2-12, got {text!r}"]
        if len(parts) > 3 or not all(part.isdecimal() for part in (*parts, *([days] if dash else [])))
        else [],
    )
    numbers = [int(part) for part in parts]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    seconds = int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))
    return -(-seconds // 60)


def submit(works: list[Work], settings: Mapping[str, Any], at_once: int | None) -> dict[str, Work]:
    """Queue up the cells that are not queued up already, `at_once` of them at a time; SLURM's job of each.

    `settings` are parameters of sbatch: those that submitit knows, or else as they are.
    """
    needed()
    folder = home() / works[0].sweep / "slurm"
    register = folder / "jobs.json"
    before: dict[str, str] = json.loads(register.read_text(encoding="utf-8")) if register.exists() else {}
    alive = queued()
    jobs = {before[work.cell.id]: work for work in works if before.get(work.cell.id) in alive}
    new = [work for work in works if before.get(work.cell.id) not in alive]
    if new:
        each = max(devices(work.cell) for work in new)  # one process of a job starts those of all its devices
        gpus = {"gpus_per_node": each} if each > 1 and all(on_gpu(work.cell) for work in new) else {}
        jobs_of = [Job(work, home()) for work in new]
        made = queue_up(jobs_of, folder, works[0].sweep, {**gpus, **settings}, at_once or len(new))
        jobs |= {job.job_id: work for job, work in zip(made, new, strict=True)}
    write_json(register, before | {work.cell.id: job for job, work in jobs.items()})
    return jobs


def needed() -> None:
    """Raise `ZooError` where there is no SLURM."""
    refuse(
        "--executor slurm",
        [
            "needs submitit: pip install 'sparse-attention-zoo[slurm]'" if find_spec("submitit") is None else "",
            "there is no sbatch on this machine" if shutil.which("sbatch") is None else "",
        ],
    )


def queue_up(
    calls: Sequence[Callable[[], object]], folder: Path, name: str, settings: Mapping[str, Any], at_once: int
) -> list[Any]:
    """Submit calls as one array job.

    Args:
        calls: One an element of the array.
        folder: For submitit's files and the logs.
        name: Of the job.
        settings: Parameters of sbatch: those that submitit knows, or else as they are.
        at_once: How many elements run at a time.

    Returns:
        submitit's job of each call.

    Raises:
        ZooError: if SLURM does not take the job.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(folder, max_num_timeout=REQUEUES, python=shlex.quote(sys.executable))
    known = {key: value for key, value in settings.items() if key in executor._valid_parameters()}
    rest = {key: value for key, value in settings.items() if key not in known}
    executor.update_parameters(
        **{
            "job_name": name,
            "signal_delay_s": NOTICE,
            "array_parallelism": at_once,
            "additional_parameters": rest,
            **known,
        }
    )
    try:
        with executor.batch():
            return [executor.submit(call) for call in calls]
    except (FailedJobError, FailedSubmissionError) as error:
        raise ZooError(f"--executor slurm: {' '.join(str(error).split())}") from error


def results(jobs: Mapping[str, Work], bar: Bar) -> Iterator[Result]:
    """The results of the cells as they come in."""
    missed = dict.fromkeys(jobs, 0)
    while missed:
        time.sleep(POLL)
        alive = queued()  # before the results are looked at: a job that is gone has written its own
        for job, work in jobs.items():
            if job not in missed:
                continue
            if job in alive:  # what it writes is read once it is gone
                missed[job] = 0
                continue
            missed[job] += 1
            since = work.since()
            if since is not None and since.status in ("finished", "failed"):
                del missed[job]
                bar.ended(since)
                yield since
            elif missed[job] >= GONE:
                del missed[job]
                log = home() / work.sweep / "slurm" / f"{job}_0_log.err"
                bar.dropped(work.cell.name, f"SLURM's job {job} ended without a result, see {log}")


def queued() -> set[str]:
    """Return the jobs of this user that wait or run, elements of arrays as 12_3.

    Raises:
        ZooError: where SLURM does not answer.
    """
    command = ["squeue", "--noheader", "--array", "--me", "--format=%i"]
    for _ in range(GONE):
        found = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        if not found.returncode:
            return set(found.stdout.split())
        time.sleep(POLL)
    raise ZooError(f"squeue: {found.stderr.strip()}; the jobs continue, and the same command watches them again")


class _LogObserver:
    """An `Observer` that writes into the job's log."""

    def started(self, name: str) -> None:
        self.note(f"{name} begins")

    def step(self, name: str, step: int, total: int | None, note: str) -> None: ...

    def ended(self, result: Result) -> None:
        self.note(f"{result.name} {result.status}")

    def note(self, line: str) -> None:
        print(line, flush=True)
