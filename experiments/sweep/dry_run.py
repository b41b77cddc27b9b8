"""What a sweep would take: its cells, their costs and seconds, and how far each has come. Nothing is trained."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from experiments.analysis.formatting import percent, si
from experiments.escape import for_terminal as escape
from experiments.sweep.expand import Sweep
from experiments.sweep.grid import varying_settings
from experiments.sweep.preflight import TIMED, first_of_groups, run_preflight, step_seconds
from experiments.tracking.provenance import provenance
from experiments.tracking.store import Cell, Result, read

NOTES = (
    "Density and FLOPs: counted from the plans of the freshly built model on its first training batches; FLOPs of one "
    "training step, forward and backward. ~: layers, heads or films differ, and training may move it.",
    "Seconds of a cell: the mean of finished runs of it on this machine, or else an estimate: the median of "
    f"{TIMED} training steps (forward and backward) timed now, times the steps; validation, generated films and "
    "the optimizer's own work come on top. Unknown where the device that it asks for is not here.",
)
TIMED_NOW, FINISHED = "steps timed now", "finished runs here"


@dataclass(frozen=True)
class Row:
    """Cells that differ by their seed alone.

    settings: those that not all rows have in common, by dotted key. density: mean over layers; density_varies:
    whether it differs between layers, heads or films. attention_flops, flops: of one training step. seconds: of one
    cell, None where it cannot be known here; seconds_from: `TIMED_NOW` or `FINISHED`. match: what the budget asked
    for, and under "set" the settings that were solved. cells: {"name", "id", "seed", "status", "steps"} each, status
    "finished", "failed", "running", "half done" (at step `steps`), "interrupted" (before the first) or "missing".
    """

    name: str
    settings: dict[str, Any]
    tokens: float
    streams: int
    density: float
    density_varies: bool
    attention_flops: float
    flops: float
    parameters: int
    seconds: float | None
    seconds_from: str | None
    match: dict[str, Any] | None
    cells: list[dict[str, Any]]
    left: float  # of its cells' training, in cells


@dataclass(frozen=True)
class Forecast:
    """A sweep before it runs."""

    name: str
    about: str
    rows: tuple[Row, ...]
    trials: Forecast | None = None
    waiting: tuple[str, ...] = ()  # rows whose settings are chosen when their trials have ended; as written until then

    @staticmethod
    def of(sweep: Sweep, told: Callable[[str], object] = lambda _: None) -> Forecast:
        """Try every cell and time its steps; `told` gets the name of each. Raises `ZooError` like `run_preflight`."""
        first = first_of_groups(sweep.cells)
        settings = varying_settings([_shown(cell.config) for cell in first.values()])
        rows, here = [], provenance()
        groups: dict[str, list[Cell]] = {}
        for cell in sweep.cells:
            groups.setdefault(cell.group or cell.name, []).append(cell)
        for (name, cell), own in zip(first.items(), settings, strict=True):
            told(name)
            runs = [(other, read(other, sweep.name)) for other in groups[name]]
            rows.append(_row(name, cell, own, runs, here))
        if sweep.trials is None:
            return Forecast(sweep.name, sweep.about, tuple(rows))
        trials = Forecast.of(sweep.trials.sweep, told)
        return Forecast(sweep.name, sweep.about, tuple(rows), trials, sweep.trials.waiting)

    @property
    def seconds(self) -> float | None:
        """For all that is left to do, trials too, one cell after the other; None where a row's are not known."""
        needed = [row for row in (*(self.trials.rows if self.trials else ()), *self.rows) if row.left]
        return (
            None if any(row.seconds is None for row in needed) else sum(row.left * (row.seconds or 0) for row in needed)
        )

    def to_json(self) -> dict[str, Any]:
        """{"name", "about", "rows": the fields of `Row` each, "seconds", "notes", "trials", "waiting"}.

        "trials" is the same of the settings that are tried first, or null; "waiting" names the rows whose settings are
        chosen then.
        """
        return {
            "name": self.name,
            "about": self.about,
            "rows": [asdict(row) for row in self.rows],
            "seconds": self.seconds,
            "notes": list(NOTES),
            "trials": self.trials.to_json() if self.trials else None,
            "waiting": list(self.waiting),
        }

    def tables(self) -> list[Table]:
        """For a terminal: the trials, then which cells, and what they take; the last line is the total."""
        cells = [cell for row in self.rows for cell in row.cells]
        finished = sum(cell["status"] == "finished" for cell in cells)
        which = _table(f"{escape(self.name)}: {len(cells)} cells, {finished} finished")
        for column in ("cell", "settings", "seeds", "status"):
            which.add_column(column, overflow="fold")
        costs = _table("")
        for column in ("cell", "tokens", "density", "attention", "step", "parameters", "time"):
            costs.add_column(column, justify="left" if column == "cell" else "right", no_wrap=True)
        for row in self.rows:
            seeds = ", ".join(str(cell["seed"]) for cell in row.cells)
            status = "setting not chosen yet" if row.name in self.waiting else _status(row)
            which.add_row(escape(row.name), escape(_settings(row)), seeds, escape(status))
            costs.add_row(
                escape(row.name),
                f"{row.streams} × {row.tokens:,.0f}",
                ("~" if row.density_varies else "") + percent(row.density),
                si(row.attention_flops, "FLOP"),
                si(row.flops, "FLOP"),
                si(row.parameters),
                _clock(row.seconds),
            )
        costs.caption = f"left to do: {_clock(self.seconds)}, one cell after the other"
        costs.caption_justify = "left"
        return [*(self.trials.tables() if self.trials else ()), which, costs]


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _row(
    name: str, cell: Cell, settings: dict[str, Any], runs: Sequence[tuple[Cell, Result]], here: dict[str, Any]
) -> Row:
    found = run_preflight(cell.config)
    steps = cell.config["trainer"].get("max_steps") or 0
    done = [r for _, r in runs if r.status == "finished" and r.seconds and _same_machine(r.provenance, here)]
    each = step_seconds(cell.config) if not done and steps > 0 else None
    seconds = statistics.fmean(r.seconds or 0 for r in done) if done else None if each is None else each * steps
    left = sum(1 - min(1, r.steps / steps if steps > 0 else 0) for _, r in runs if r.status != "finished")
    return Row(
        name=name,
        settings=settings,
        tokens=found.tokens,
        streams=found.items,
        density=found.density,
        density_varies=found.varies,
        attention_flops=found.attention_flops,
        flops=found.flops,
        parameters=found.parameters,
        seconds=seconds,
        seconds_from=None if seconds is None else FINISHED if done else TIMED_NOW,
        match=cell.config.get("match"),
        cells=[
            {
                "name": one.name,
                "id": one.id,
                "seed": one.config["seed"],
                "status": _state(result),
                "steps": result.steps,
            }
            for one, result in runs
        ],
        left=left,
    )


def _shown(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what the match says again and what the seed decides."""
    return {key: value for key, value in config.items() if key not in ("match", "seed")}


def _same_machine(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ("host", "processor", "threads"))


def _state(result: Result) -> str:
    return "half done" if result.status == "missing" and result.steps else result.state


def _status(row: Row) -> str:
    """finished, missing, or both: 1 finished, 1 half done at step 40, 1 missing."""
    told = [f"half done at step {c['steps']}" if c["status"] == "half done" else c["status"] for c in row.cells]
    distinct = list(dict.fromkeys(told))
    return distinct[0] if len(distinct) == 1 else ", ".join(f"{told.count(x)} {x}" for x in distinct)


def _settings(row: Row) -> str:
    """attention.name moc, top_k 3 (solved)."""
    solved = (row.match or {}).get("set", {})
    names = set().union(*solved) if isinstance(solved, list) else set(solved)
    return ", ".join(
        f"{key.removeprefix('attention.')} {'null' if value is None else value}"
        + (" (solved)" if key.removeprefix("attention.") in names else "")
        for key, value in row.settings.items()
    )


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
