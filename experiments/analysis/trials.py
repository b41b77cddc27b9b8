"""The settings that were tried for each cell of a sweep before its own runs, and which of them was best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.analysis.metrics import HEADLINES, Measure, get_figure, measures_to_rank_by
from experiments.tracking.schema import TuningFile
from experiments.tracking.store import Result, last_request, read
from sparse_zoo.errors import refuse, unknown


@dataclass(frozen=True)
class Trial:
    """One setting that was tried: what it lays over the cell as written, and its runs, one a seed."""

    name: str
    settings: Mapping[str, Any]
    results: tuple[Result, ...]

    @property
    def has_ended(self) -> bool:
        """Whether every run finished or failed, so that nothing is left to wait for."""
        return bool(self.results) and all(result.status in ("finished", "failed") for result in self.results)

    @property
    def seconds(self) -> float:
        """What all runs took together."""
        return sum(result.seconds or 0.0 for result in self.results)

    def score(self, measure: Measure) -> float | None:
        """Return the mean of a measure over the seeds; None unless every run finished and has it."""
        values = [get_figure(result, measure.name) if result.status == "finished" else None for result in self.results]
        known = [one for one in values if one is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    def why_unscored(self, measure: Measure) -> str:
        """Return why there is no score; empty where there is one."""
        if self.score(measure) is not None:
            return ""
        bad = [result for result in self.results if result.status != "finished"]
        if bad:
            return f"{bad[0].state}: {bad[0].reason or 'no reason was recorded'}"
        return f"{measure.label} was not measured" if self.results else "its runs are not there"


@dataclass(frozen=True)
class TriedCell:
    """A cell, its trials in the order in which they were tried, and the name of the one that its runs have."""

    name: str
    trials: tuple[Trial, ...]
    chosen: str | None = None

    @property
    def has_ended(self) -> bool:
        """Whether every trial ended."""
        return all(trial.has_ended for trial in self.trials)

    def best(self, measure: Measure) -> Trial | None:
        """Return the trial with the best score; of equal ones the first, which begins with the cell as written."""
        scored = [trial for trial in self.trials if trial.score(measure) is not None]
        return min(scored, key=lambda trial: measure.rank(trial.score(measure)), default=None)


@dataclass(frozen=True)
class Tuning:
    """What was tried for a sweep: in which other sweep, with which seeds, and by which measure the best was chosen."""

    sweep: str
    seeds: tuple[int, ...]
    measure: Measure
    cells: tuple[TriedCell, ...]

    @staticmethod
    def of(plan: TuningFile) -> Tuning:
        """Read the trials that a sweep planned, with their results as far as they are there."""
        request = last_request(plan["sweep"])
        runs: dict[str, list[Result]] = {}
        for cell in request.cells if request else ():
            runs.setdefault(cell.group or cell.name, []).append(read(cell, plan["sweep"]))
        cells = tuple(
            TriedCell(
                name,
                tuple(Trial(one["name"], one["settings"], tuple(runs.get(one["name"], ()))) for one in tried),
                plan["chosen"].get(name),
            )
            for name, tried in plan["cells"].items()
        )
        measured = measures_to_rank_by(result for own in runs.values() for result in own)
        return Tuning(plan["sweep"], tuple(plan["seeds"]), choose_measure(plan["by"], measured), cells)

    @property
    def trials(self) -> int:
        """How many settings were tried for each cell."""
        return max((len(cell.trials) for cell in self.cells), default=0)


def choose_measure(by: str | None, measured: Sequence[str]) -> Measure:
    """Return the measure that chooses between trials: `by`, or the first of `HEADLINES` that was measured."""
    return Measure.of(by or next((name for name in HEADLINES if name in measured), HEADLINES[-1]))


def choose(sweep: str, by: str | None, cells: Sequence[TriedCell]) -> dict[str, Trial | None]:
    """Return the best trial of every cell whose trials have all ended; None where none of them has a score.

    Raises:
        ZooError: if trials finished and none of them has the measure `by`.
    """
    measured = measures_to_rank_by(result for cell in cells for trial in cell.trials for result in trial.results)
    refuse(f"tune.by of {sweep}", [unknown("measure", by, measured)] if by and measured and by not in measured else [])
    measure = choose_measure(by, measured)
    return {cell.name: cell.best(measure) for cell in cells if cell.has_ended}
