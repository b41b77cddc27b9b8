"""Runs on disk. A run's `result.json` is the only record of what became of it.

`<home>/<sweep>/sweep.json` lists the cells of the last command; `<home>/<sweep>/<cell>-<id>/result.json` holds the
result of one. The id is a hash of what the config computes (`tracking.identity`), so a changed cell gets a new folder
and no result is lost.

MLflow holds a copy for its own pages. Whether a cell is finished is never looked up there, so a sweep resumes without a
server. The process that runs a cell holds the lock in its folder; the kernel frees it when the process ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shlex
import sys
import traceback as tracebacks
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from experiments.redact import redact
from experiments.tracking import schema
from experiments.tracking.identity import identity
from sparse_zoo.errors import ZooError

TRIALS = "-trials"  # ends the name of the sweep that tries settings for another one

Status = Literal["finished", "failed", "running", "missing", "unreadable"]


def home() -> Path:
    """The folder that holds every run: $ZOO_HOME, or `runs` in the current directory."""
    return Path(os.path.expanduser(os.environ.get("ZOO_HOME") or "runs")).absolute()


def config_id(config: Mapping[str, Any]) -> str:
    """12 hex digits that name a resolved config by its content."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    `name` is unique in the sweep, `config` is resolved, and `group` is the name that runs share which differ only by
    their seed. `id` is by default that of the config as it is written; `experiments.config.resolve.cell` adds
    the defaults.
    """

    name: str
    config: dict[str, Any]
    group: str | None = None
    id: str = ""

    def __post_init__(self) -> None:
        """Derive the id where none is given."""
        if not self.id:
            object.__setattr__(self, "id", config_id(identity(self.config)))

    def folder(self, sweep: str) -> Path:
        """Return the cell's folder in a sweep."""
        return home() / sweep / f"{self.name}-{self.id}"


@dataclass
class Result:
    """What became of one cell; every figure is measured, None where the run did not come that far.

    `first_loss` and `last_loss` are means of the training flow loss, auxiliary losses left out, over the first 3 and
    the last 20 steps; `val_loss` is the last validation's. `density` and `flops` (attention, one forward, all layers)
    are those of the plans that ran; `costs` is the whole ledger. `peak_memory` is in bytes; what it is the peak of
    stands in `costs`. `seconds` leaves out what was lost to interruptions; `resumed` has, for each of them, the step
    from which the run went on and the provenance of the process that took over. `diagnostics` is what routing did at
    the last probe, see `lit_modules.RoutingWatch`. `chance` is what guessing scores in some of the `metrics`; `films`
    are their outcomes per validation film, in order, where a metric keeps them. `curves` maps a loss to (step, value)
    pairs. `pictures`, {"file", "label"} each, and `strips`, the sampled films, name `.npz` files in the cell's folder
    (`experiments.reporting.run_pictures`).
    """

    name: str
    attention: dict[str, Any] | list[dict[str, Any]]
    status: Status
    seed: int
    first_loss: float | None = None
    val_loss: float | None = None
    density: float | None = None
    flops: float | None = None
    kernel: str | None = None
    seconds_per_step: float | None = None
    last_loss: float | None = None
    reason: str | None = None
    id: str = ""
    steps: int = 0
    seconds: float | None = None
    peak_memory: int | None = None
    costs: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    films: dict[str, list[float]] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    pictures: list[dict[str, str]] = field(default_factory=list)
    strips: list[str] = field(default_factory=list)
    checkpoint: str | None = None
    folder: str = ""
    mlflow_run: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    resumed: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    traceback: str | None = None

    @property
    def state(self) -> str:
        """The status as users are shown it: a run that was begun and is not there to its end was interrupted."""
        return "interrupted" if self.status == "missing" and self.provenance else self.status

    @property
    def attention_flops(self) -> float | None:
        """FLOPs of attention in one training step, forward and backward, routing and terms included, over all layers.

        None where not all of them were counted.
        """
        parts = [self.costs.get(key) for key in ("flops", "flops_backward", "routing_flops")]
        known = [float(part) for part in parts if isinstance(part, int | float)]
        return sum(known) if len(known) == len(parts) else None

    def fail(self, error: BaseException) -> None:
        """Record what was raised; to be called while it is handled."""
        self.status, self.reason = "failed", redact(f"{type(error).__name__}: {error}")
        self.traceback = redact(tracebacks.format_exc())

    def to_json(self) -> dict[str, Any]:
        """Return this as plain data; non-finite numbers become None."""
        plain: dict[str, Any] = _finite(vars(self))
        return plain | {"version": schema.VERSION}

    def write(self, folder: Path) -> None:
        """Write `result.json` into the cell's folder."""
        write_json(folder / "result.json", self.to_json())


def read(cell: Cell, sweep: str) -> Result:
    """The cell's result; "missing" where there is none, "unreadable" where it cannot be used, with the reason."""
    folder = cell.folder(sweep)
    blank = Result(cell.name, cell.config["attention"], "missing", cell.config["seed"], id=cell.id, folder=str(folder))
    try:
        result = _parse(folder)
        found, wanted = (result.name, result.seed), (cell.name, cell.config["seed"])
        if found != wanted:
            raise ValueError(f"it is of the cell (name, seed) {found}, not {wanted}")
        if result.status == "running" and not running(folder):
            result = _parse(folder)  # it may just have ended
            if result.status == "running":
                result.status, result.reason = "missing", "was interrupted before its end"
    except FileNotFoundError:
        blank.reason = "has not run yet"
        return blank
    except (ValueError, OSError) as error:
        blank.status, blank.reason = "unreadable", f"{folder / 'result.json'} cannot be read: {error}"
        return blank
    result.folder = str(folder)  # the runs may have been moved since
    return result


@contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Whether this process has the cell of that folder to itself meanwhile; False at once where another one has.

    On network file systems too, where they know flock: NFS does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: loaders' processes may have the file open too


def running(folder: Path) -> bool:
    """Whether a process, here or on another machine, holds the lock of that folder."""
    if not (folder / "lock").is_file():  # opening a pipe, say, would wait for ever
        return False
    try:
        with (folder / "lock").open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@dataclass(frozen=True)
class SweepRequest:
    """What a sweep command asked for: one line about it, its cells, the MLflow run above them, the command line.

    `tuning` says which settings were tried for the cells, and which of them were chosen; None where none were.
    """

    about: str
    cells: tuple[Cell, ...]
    mlflow_run: str | None = None
    command: str = field(default_factory=lambda: redact(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])))
    tuning: schema.TuningFile | None = None


def write_sweep(name: str, asked: SweepRequest) -> None:
    """Store the request, so that a report can name the cells that are missing."""
    write_json(home() / name / "sweep.json", {"version": schema.VERSION, "name": name, **asdict(asked)})


def read_sweep(name: str) -> SweepRequest:
    """Return the last request under this name.

    Raises:
        ZooError: if there is no such sweep, or its file cannot be read.
    """
    path = home() / name / "sweep.json"
    if not path.exists():
        known = sorted(found.parent.name for found in home().glob("*/sweep.json"))
        raise ZooError(f"no sweep {name!r} in {home()}; there: {', '.join(known) or 'none'}")
    try:
        plain = schema.read_sweep(path)
    except (ValueError, OSError) as error:
        raise ZooError(f"{path} cannot be read ({error}); remove it, and `zoo sweep` writes it again") from error
    cells = tuple(
        Cell(cell["name"], dict(cell["config"]), cell.get("group"), cell.get("id", "")) for cell in plain["cells"]
    )
    return SweepRequest(plain["about"], cells, plain.get("mlflow_run"), plain.get("command", ""), plain.get("tuning"))


def last_request(name: str) -> SweepRequest | None:
    """Return the last request under this name; None if there is none that can be read."""
    try:
        return read_sweep(name)
    except ZooError:
        return None


def write_json(path: Path, plain: Any) -> None:
    """Write JSON atomically: a reader never sees half a file."""
    with atomic_write(path) as file:
        file.write(json.dumps(plain, indent=1, allow_nan=False).encode())


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that replaces `path` at the end; if the end is never reached, the old file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _parse(folder: Path) -> Result:
    return Result(**schema.read_result(folder))


def _finite(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {str(key): _finite(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [_finite(value) for value in plain]
    if isinstance(plain, float) and not math.isfinite(plain):
        return None
    return plain
