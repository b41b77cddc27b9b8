"""Encodes a manifest: here, in several processes, as jobs of SLURM or tasks of Ray, beside others that do the same."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from datamodules.encoders import MINILM, ModelError
from datamodules.encoding import Encoder, Encoding, Film, FilmShot, write_films
from datamodules.manifest import Row
from datamodules.shards import finish_orphans
from experiments.escape import for_terminal as escape
from experiments.escape import visible
from experiments.execution import ray_jobs, signals, slurm
from experiments.execution.processes import work_through
from experiments.tracking.store import write_json
from sparse_zoo.errors import ZooError, refuse

POLL = 0.5  # seconds between looks at rows that are encoded elsewhere


@dataclass(frozen=True)
class Outcome:
    """What became of a row: its film, or why there is none."""

    row: Row
    film: Film | None
    reason: str = ""


class Observer(Protocol):
    """Receives the progress of an encoding."""

    def step(self, row: Row, done: int, total: int) -> None:
        """Called while a row is encoded: `done` of its `total` frames are encoded."""
        ...


class EncodingBar:
    """Rows done, frames a second and the time left; shown while entered."""

    def __init__(self, console: Console, rows: int) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("rows"),
            BarColumn(),
            TextColumn("{task.fields[rows]}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            speed_estimate_period=600,
        )
        self.task = self.progress.add_task("", total=rows, rows=0, note="")
        self.rows, self.text = 0, ""
        self.shares: dict[int, float] = {}  # of each row, how much is done
        self.frames: dict[int, tuple[int, int]] = {}  # of each row, encoded before and encoded by now
        self.start = time.perf_counter()

    def __enter__(self) -> EncodingBar:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def step(self, row: Row, done: int, total: int) -> None:
        """Show that `done` of a row's `total` frames are encoded, and the frames a second over all rows."""
        self.shares[row.line] = done / max(total, 1)
        self.frames[row.line] = self.frames.get(row.line, (done, done))[0], done
        seconds = max(time.perf_counter() - self.start, 1e-6)
        rate = sum(now - before for before, now in self.frames.values()) / seconds
        self._show(f"{rate:.1f} frames/s · {row.name}")

    def ended(self, outcome: Outcome) -> None:
        """Count a row that needs no more work, and print its notes or the reason why it has no film."""
        self.rows += 1
        self.shares[outcome.row.line] = 1.0
        self._show(None)
        for note in outcome.film.notes if outcome.film else ():
            self.console.print(f"[yellow]{escape(f'{outcome.row.name}: {note}')}[/yellow]", soft_wrap=True)
        if outcome.film is None:
            line = f"line {outcome.row.line} ({outcome.row.name}): {outcome.reason}"
            self.console.print(f"[red]{escape(line)}[/red]", soft_wrap=True)

    def note(self, line: str) -> None:
        """Show a line."""
        self.console.print(f"[dim]{escape(line)}[/dim]", soft_wrap=True)

    def _show(self, note: str | None) -> None:
        self.text = self.text if note is None else visible(note)
        self.progress.update(self.task, completed=sum(self.shares.values()), rows=self.rows, note=self.text)


def encode(
    rows: Sequence[Row],
    encoding: Encoding,
    bar: EncodingBar,
    *,
    jobs: int = 1,
    sbatch: Mapping[str, Any] | None = None,
    ray: bool = False,
) -> list[Outcome]:
    """Encode the rows of a manifest and write the list of films.

    Finished films are kept however this ends, and the same call encodes the missing ones. A row that fails is
    reported, and the others are still encoded.

    Args:
        rows: Of the manifest, without faults.
        encoding: What to encode and how.
        bar: Receives the progress.
        jobs: Processes of this machine, jobs of SLURM or tasks of Ray, each with a GPU where there are any.
        sbatch: Parameters for a job of SLURM; None: not on SLURM.
        ray: Whether to run as tasks of Ray.

    Raises:
        ZooError: if a model does not load or does not fit what is there, or the disk is full.
    """
    refuse("--jobs", [f"must be at least 1, got {jobs}"] if jobs < 1 else [])
    with disk_room(encoding.folder):
        found: Iterator[Outcome]
        if sbatch is not None:
            found = iter(_on_slurm(rows, encoding, bar, jobs, sbatch))
        elif ray:
            found = iter(_on_ray(rows, encoding, jobs))
        elif jobs == 1:
            found = here(rows, encoding, bar)
        else:
            found = _in_processes(rows, encoding, bar, min(jobs, max(1, len(rows))))
        outcomes = []
        for outcome in found:
            outcomes.append(outcome)
            bar.ended(outcome)
        for kind in ("latents", "text"):
            finish_orphans(encoding.folder, kind)
        write_films(encoding.folder, [outcome.film for outcome in outcomes if outcome.film is not None])
    return outcomes


@contextmanager
def disk_room(folder: Path) -> Iterator[None]:
    """A disk that takes no more, or takes nothing, ends the encoding in one line."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # it is not the system's
            raise
        raise ZooError(
            f"encode: {error.strerror}: {error.filename or folder}. What is finished is kept; put that right, or make "
            "room, and give the command again"
        ) from error


def attempt(encoder: Encoder, row: Row, observer: Observer) -> Outcome | None:
    """What became of a row; None where another process works on it."""
    try:
        film = encoder.attempt(row, lambda done, total: observer.step(row, done, total))
    except ModelError:
        raise
    except ZooError as error:
        reason = str(error).removeprefix(f"{row.path}: ").removeprefix(f"{row.name}: ")
        return Outcome(row, None, " ".join(reason.split()))
    except (RuntimeError, MemoryError) as error:  # of torch or numpy, say for want of memory: other rows may be smaller
        first = str(error).strip().partition("\n")[0]
        return Outcome(row, None, f"{type(error).__name__}: {first}" if first else type(error).__name__)
    return None if film is None else Outcome(row, film)


def here(rows: Sequence[Row], encoding: Encoding, observer: Observer) -> Iterator[Outcome]:
    """Encode in this process what no other one encodes, and wait for the rest."""
    encoder = Encoder(encoding)
    waiting, elsewhere = deque(rows), 0
    try:
        while waiting:
            row = waiting.popleft()
            outcome = attempt(encoder, row, observer)
            if outcome is not None:
                elsewhere = 0
                yield outcome
                continue
            waiting.append(row)
            elsewhere += 1
            if elsewhere >= len(waiting):
                time.sleep(POLL)
    finally:
        encoder.finish()


def _in_processes(rows: Sequence[Row], encoding: Encoding, bar: EncodingBar, jobs: int) -> Iterator[Outcome]:
    """Each of `jobs` processes is given one row after the other; one that dies costs its row one more start."""
    waiting, died = deque(rows), set[int]()
    with closing(work_through(waiting, jobs, _serve, encoding)) as messages:
        for row, kind, rest in messages:
            if kind == "os error":
                raise OSError(*rest)
            if kind == "step":
                bar.step(row, *rest)
            elif kind == "done" and rest[0] is not None:
                yield rest[0]
            elif kind == "done":
                waiting.append(row)
            elif row.line in died:
                yield Outcome(row, None, f"its process {rest[0]} twice")
            else:
                died.add(row.line)
                waiting.append(row)
                bar.note(f"{row.name}: its process {rest[0]}; another process continues it")


def _serve(pipe: Connection, threads: int, encoding: Encoding) -> None:
    """What such a process does."""
    torch.set_num_threads(threads)
    encoder: Encoder | None = None
    with signals.caught(patient=True), suppress(EOFError, KeyboardInterrupt):
        try:
            while True:
                row: Row = pipe.recv()
                try:
                    encoder = encoder or Encoder(encoding)
                    outcome = attempt(encoder, row, _PipeObserver(pipe))
                except ZooError as error:
                    pipe.send(("refused", str(error)))
                    continue
                except OSError as error:
                    pipe.send(("os error", error.errno, error.strerror, error.filename))
                    continue
                if outcome is None:
                    time.sleep(POLL)
                pipe.send(("done", outcome))
        finally:
            if encoder is not None:
                encoder.finish()


class _PipeObserver:
    """An `Observer` that sends to another process, and ends where that is gone."""

    def __init__(self, to: Connection) -> None:
        self.to = to

    def step(self, row: Row, done: int, total: int) -> None:  # noqa: ARG002
        try:
            self.to.send(("step", done, total))
        except BrokenPipeError:
            os._exit(1)  # as if killed: what is finished stays


@dataclass(frozen=True)
class Job:
    """Encoding on another machine: each job takes what no other one works on, and knows of all rows in the end."""

    rows: tuple[Row, ...]
    encoding: Encoding
    outcomes: Path | None = None
    """File for what became of every row: JSON, so that whoever waits for the job runs nothing that it reads."""

    def __call__(self) -> list[Outcome]:
        """Encode; what became of every row."""
        with disk_room(self.encoding.folder):
            found = list(here(self.rows, self.encoding, _Silent()))
        if self.outcomes is not None:
            order = {row: number for number, row in enumerate(self.rows)}
            plain = [{**asdict(outcome), "row": order[outcome.row]} for outcome in found]
            write_json(self.outcomes, plain)
        return found

    def read(self) -> list[Outcome] | None:
        """What a job wrote; None while there is nothing."""
        if self.outcomes is None or not self.outcomes.exists():
            return None
        found = []
        for one in json.loads(self.outcomes.read_text(encoding="utf-8")):
            film = one["film"] and Film(
                **{**one["film"], "shots": tuple(FilmShot(**shot) for shot in one["film"]["shots"])}
                | {"notes": tuple(one["film"]["notes"])}
            )
            found.append(Outcome(self.rows[one["row"]], film, one["reason"]))
        return found

    def checkpoint(self) -> Any:
        """The job that submitit queues when this one is preempted or out of time: the same, which then resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class _Silent:
    def step(self, row: Row, done: int, total: int) -> None: ...


def _on_slurm(
    rows: Sequence[Row], encoding: Encoding, bar: EncodingBar, jobs: int, settings: Mapping[str, Any]
) -> list[Outcome]:
    """Encode in `jobs` elements of an array job; folders are those of this machine, so they must be shared."""
    slurm.needed()
    folder = encoding.folder.absolute() / "slurm"
    job = Job(_anywhere(rows), _absolute(encoding), folder / f"outcomes-{time.time_ns()}.json")
    made = slurm.queue_up([job] * jobs, folder, f"encode-{encoding.folder.name}", settings, jobs)
    bar.note(f"{jobs} jobs of SLURM: {', '.join(one.job_id for one in made)}; scancel ends them")
    missed = dict.fromkeys((one.job_id for one in made), 0)
    reasons: list[str] = []
    while missed:
        time.sleep(POLL)
        alive = slurm.queued()
        for one in made:
            if one.job_id not in missed:
                continue
            missed[one.job_id] = 0 if one.job_id in alive else missed[one.job_id] + 1
            if (found := job.read()) is not None:
                return found
            if one.paths.result_pickle.exists():  # it ended, and wrote no outcome
                del missed[one.job_id]
                reasons.append(f"job {one.job_id} failed ({_last_line(one.paths.stderr)}), see {one.paths.stderr}")
            elif missed[one.job_id] >= slurm.GONE:
                del missed[one.job_id]
                reasons.append(f"job {one.job_id} ended without a result, see {one.paths.stderr}")
    raise ZooError(f"encode: every job failed: {'; '.join(dict.fromkeys(reasons))}. The same command resumes")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "its log is empty"


def _on_ray(rows: Sequence[Row], encoding: Encoding, jobs: int) -> list[Outcome]:
    """Encode in `jobs` tasks of Ray."""
    ray_jobs.start()
    import ray

    with signals.caught():  # Ray has put a handler of its own in the place of ours
        try:
            there = ray.cluster_resources()
            gpus = int("GPU" in there)
            cpus = max(1, int(there["CPU"]) // jobs)
            task = ray.remote(max_calls=1, max_retries=ray_jobs.RETRIES, num_cpus=cpus, num_gpus=gpus)(_serve_ray)
            running = [task.remote(Job(_anywhere(rows), _absolute(encoding)), cpus) for _ in range(jobs)]
            found: list[list[Outcome]] = ray.get(running)
            return found[0]
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ZooError):
                raise ZooError(str(error.cause)) from error
            raise
        finally:
            ray.shutdown()


def _serve_ray(job: Job, cpus: int) -> list[Outcome]:
    torch.set_num_threads(cpus)
    return job()


def _anywhere(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows whose files are found from any folder."""
    return tuple(replace(row, path=row.path.absolute()) for row in rows)


def _absolute(encoding: Encoding) -> Encoding:
    paths = {name: getattr(encoding, name) for name in ("folder", "vae", "text_encoder")}
    return replace(encoding, **{name: path.absolute() for name, path in paths.items() if str(path) != MINILM})
