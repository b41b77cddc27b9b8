"""One cell to be run, as it is sent to another process, a SLURM job or a Ray task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.execution.run import run
from experiments.execution.train import Observer
from experiments.redact import redacted_messages
from experiments.tracking.mlflow_logger import Tracker
from experiments.tracking.store import Cell, Result, lock, read
from lit_modules.settings import Parallel

POLL = 1.0  # seconds between looks at cells that run elsewhere


@dataclass(frozen=True)
class Work:
    """One cell to be run, and what that takes: ready to be sent to another process or machine.

    `before` is what was known of it when the sweep was started.
    """

    cell: Cell
    sweep: str
    before: Result
    parent: str | None
    params: dict[str, Any]
    plugins: tuple[Path, ...]
    fresh: bool

    def since(self) -> Result | None:
        """The cell's result, if any process has begun or ended it since the sweep was started."""
        now, before = read(self.cell, self.sweep), self.before
        begun = (now.provenance, now.resumed) != (before.provenance, before.resumed)
        ended = now.status in ("finished", "failed") and now.status != before.status
        return now if begun or ended else None

    def attempt(self, tracker: Tracker, observer: Observer) -> Result | None:
        """Run the cell and return its result; None if another process runs it."""
        with redacted_messages(), lock(self.cell.folder(self.sweep)) as mine:
            if not mine:
                return None
            since = self.since()
            if since is not None and since.status in ("finished", "failed"):
                observer.ended(since)  # elsewhere
                return since
            fresh = self.fresh and since is None  # resume cells that this sweep started
            return run(self.cell, self.sweep, tracker, observer, parent=self.parent, params=self.params, fresh=fresh)


def devices(cell: Cell) -> int:
    """How many devices a cell's run has."""
    return Parallel(**cell.config.get("parallel", {})).devices


def on_gpu(cell: Cell) -> bool:
    """Whether a cell takes a GPU where there is one."""
    return bool(cell.config["trainer"].get("accelerator") != "cpu")
