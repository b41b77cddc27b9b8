"""Read the results of a sweep from disk: its runs in groups of one config, ordered by the headline measure."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from experiments.analysis.formatting import mean
from experiments.analysis.metrics import HEADLINES, RECALL, Measure, measures_to_rank_by
from experiments.analysis.seed_groups import Group, borrow_controls, describe_commit
from experiments.analysis.trials import Tuning
from experiments.reporting.limits import MAX_FULL_RESULTS, MAX_PLOTTED_GROUPS
from experiments.tracking.store import Result, SweepRequest, read, read_sweep
from sparse_zoo.errors import refuse, unknown


@dataclass(frozen=True)
class SweepResults:
    """The results of a sweep.

    `groups` holds runs that differ only by their seed. Groups are ordered by the headline, best first. Groups without a
    finished run come last, in the order of the sweep file. `borrowed` holds controls that another sweep ran with the
    same films, model and training. `tuning` holds the settings that were tried first; None where none were.
    """

    name: str
    about: str
    groups: tuple[Group, ...]
    headline: Measure
    command: str = ""
    borrowed: tuple[Group, ...] = ()
    tuning: Tuning | None = None

    @cached_property
    def results(self) -> list[Result]:
        """Every run, in the order of the groups."""
        return [result for group in self.groups for result in group.results]

    @cached_property
    def finished(self) -> list[Result]:
        """The runs that finished."""
        return [result for result in self.results if result.status == "finished"]

    @cached_property
    def unfinished(self) -> list[Result]:
        """The runs that failed, were interrupted, cannot be read or have not run."""
        return [result for result in self.results if result.status != "finished"]

    @cached_property
    def measured(self) -> list[Group]:
        """The groups that have the headline measure."""
        return [group for group in self.groups if group.values(self.headline.name)]

    @cached_property
    def metrics(self) -> list[str]:
        """The names of the sample metrics that any finished run has."""
        return list_metrics(self.groups)

    @property
    def is_memory_test(self) -> bool:
        """Whether any finished run measured the recall of what earlier shots showed."""
        return RECALL in self.metrics

    @property
    def seeds(self) -> int:
        """The largest number of finished runs in one group."""
        return max((len(group.finished) for group in self.groups), default=0)

    @cached_property
    def chance(self) -> dict[str, float]:
        """The score of guessing, by measure, where all finished runs agree on it."""
        scores: dict[str, set[float]] = {}
        for result in self.finished:
            for name, value in result.chance.items():
                scores.setdefault(name, set()).add(value)
        return {name: min(values) for name, values in scores.items() if len(values) == 1}

    @property
    def commits(self) -> list[str]:
        """The commits of the code that made the finished runs; a plus marks uncommitted changes."""
        return sorted({describe_commit(result) for result in self.finished})

    @property
    def is_long(self) -> bool:
        """Whether there are more groups than plots and matrices have room for."""
        return len(self.groups) > MAX_PLOTTED_GROUPS

    @property
    def shows_full_results(self) -> bool:
        """Whether the runs are few enough to list each with its config and curves."""
        return len(self.results) <= MAX_FULL_RESULTS

    def split_runs(self) -> SweepResults:
        """Return these results with every run as a group of its own."""
        singles = [Group(result.name, (result,), group.name) for group in self.groups for result in group.results]
        borrowed = [Group(r.name, (r,), group.name, group.sweep) for group in self.borrowed for r in group.results]
        return replace(self, groups=_best_first(singles, self.headline), borrowed=tuple(borrowed))


def load_sweep(name: str, by: str | None = None, request: SweepRequest | None = None) -> SweepResults:
    """Read the results of a sweep.

    Args:
        name: The sweep's name, a folder of the runs.
        by: The headline measure. By default the first of `HEADLINES` that any finished run has. A cost is refused.
        request: The cells to read. By default those that were last requested under that name.

    Returns:
        The results, in groups of runs that differ only by their seed.

    Raises:
        ZooError: if there is no such sweep, or the measure is unknown or cannot rank.
    """
    request = request or read_sweep(name)
    by_name: dict[str, list[Result]] = {}
    with without_garbage_collection():
        for cell in request.cells:
            by_name.setdefault(cell.group or cell.name, []).append(read(cell, name))
    groups = [Group(key, tuple(runs)) for key, runs in by_name.items()]
    metrics = list_metrics(groups)
    measured = measures_to_rank_by(result for group in groups for result in group.results)
    refuse(f"report {name}", [unknown("measure", by, measured)] if by is not None and by not in measured else [])
    headline = Measure.of(by or next((key for key in HEADLINES if key in measured), HEADLINES[-1]))
    unranked = f"{headline.label} cannot rank methods: it is not known whether more or less of it is better"
    refuse(f"report {name}", [unranked] if headline.higher is None else [])
    borrowed = borrow_controls(name, groups) if RECALL in metrics else ()
    tuning = Tuning.of(request.tuning) if request.tuning else None
    ordered = _best_first(groups, headline)
    return SweepResults(name, request.about, ordered, headline, request.command, borrowed, tuning)


def list_metrics(groups: Sequence[Group]) -> list[str]:
    """List the sample metrics that any finished run of these groups has, in the order of the first that has them."""
    return list(dict.fromkeys(name for group in groups for result in group.finished for name in result.metrics))


def _best_first(groups: Sequence[Group], headline: Measure) -> tuple[Group, ...]:
    def rank(group: Group) -> tuple[bool, float]:
        return not group.finished, headline.rank(mean(group.estimate(headline.name)))

    return tuple(sorted(groups, key=rank))


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pause garbage collection: results hold no cycles, and a search of millions of their parts doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
