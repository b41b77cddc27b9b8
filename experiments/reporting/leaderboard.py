"""The rows of a leaderboard (methods, then chance and controls) and the columns of measures beside them."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.analysis.metrics import BESIDE, CONTROLS, RECALL, WHOLE, Measure
from experiments.analysis.seed_groups import Group, Reference
from experiments.reporting.limits import MAX_PLOTTED_GROUPS
from experiments.reporting.loading import SweepResults


@dataclass(frozen=True)
class Leaderboard:
    """The rows of a leaderboard.

    `ranked` holds the groups with a finished run, best first; controls of a memory test are among the `references`
    instead. `references` holds what methods are compared with: chance, and every control of a memory test, missing or
    not. `levels` holds (label, value) of the headline for chance and the controls: the dotted lines of plots. `plotted`
    holds the groups that plots and pictures show: all, or of a long sweep the first and the controls.
    """

    ranked: list[Group]
    references: list[Reference]
    levels: list[tuple[str, float]]
    plotted: list[Group]

    @property
    def rows(self) -> list[Group]:
        """The groups with a finished run, methods before controls."""
        return _list_rows(self.ranked, self.references)


@dataclass(frozen=True)
class Columns:
    """The measures that tables show, name -> heading.

    `beside` stands in the leaderboard of a memory test, next to the headline. `last_shots` is measured on last shots
    that were generated after the true ones, `whole_films` on films that were generated from noise. `others` is what the
    leaderboard lacks of the loss and of last shots. Measures at one distance are in none of them, see `list_distances`.
    """

    beside: dict[str, str]
    last_shots: dict[str, str]
    whole_films: dict[str, str]
    others: dict[str, str]


def rank_groups(sweep: SweepResults) -> Leaderboard:
    """Order the groups of a sweep into the rows of its leaderboard."""
    memory = sweep.is_memory_test
    ranked = [group for group in sweep.groups if group.finished and not (memory and group.control)]
    references = _list_references(sweep)
    rows = _list_rows(ranked, references)
    shown = [group for i, group in enumerate(rows) if i < MAX_PLOTTED_GROUPS or group.control]
    return Leaderboard(ranked, references, _list_levels(sweep), shown if sweep.is_long else [*sweep.groups])


def choose_columns(sweep: SweepResults) -> Columns:
    """Choose the measures that the tables of a sweep show."""
    names, headline = sweep.metrics, sweep.headline.name
    memory = {RECALL: Measure.of(RECALL).label, **BESIDE} if sweep.is_memory_test else {}
    beside = {name: column for name, column in memory.items() if name in names and name != headline}
    last = [Measure.of(name) for name in names if not name.startswith(WHOLE)]
    whole = [Measure.of(name.removeprefix(WHOLE)) for name in names if name.startswith(WHOLE)]
    last_shots = {one.name: one.label for one in last if one.distance is None}
    losses = {"val_loss": Measure.of("val_loss").label} if names else {}
    return Columns(
        beside,
        last_shots,
        {WHOLE + one.name: one.label for one in whole if one.distance is None},
        {name: label for name, label in (losses | last_shots).items() if name not in (headline, *beside)},
    )


def list_distances(sweep: SweepResults, measure: str) -> dict[int, str]:
    """List where a measure was taken at single distances: shots back -> name of the measure there, nearest first."""
    places = {name: place for name in sweep.metrics if (place := Measure.of(name).distance)}
    return dict(sorted((back, name) for name, (base, back) in places.items() if base == measure))


def _list_rows(ranked: list[Group], references: list[Reference]) -> list[Group]:
    return ranked + [reference.group for reference in references if reference.group]


def _list_references(sweep: SweepResults) -> list[Reference]:
    """Chance and every control of a memory test, in the order of `CONTROLS`; other sweeps rank controls as methods."""
    if not sweep.is_memory_test:
        return [Reference("chance")] if sweep.headline.name in sweep.chance else []
    shown = (sweep.headline.name, *choose_columns(sweep).beside)
    agreed = any(name in sweep.chance for name in shown)
    references = [Reference("chance", missing="" if agreed else "runs do not agree on it")]
    for label in CONTROLS.values():
        groups = [group for group in (*sweep.groups, *sweep.borrowed) if group.control == label]
        references += [Reference(label, group) for group in groups if group.finished] or [
            Reference(label, missing="did not finish" if groups else "not in this sweep")
        ]
    return references


def _list_levels(sweep: SweepResults) -> list[tuple[str, float]]:
    name = sweep.headline.name
    levels = [("chance", sweep.chance[name])] if name in sweep.chance else []
    controls = [(group.control, group.estimate(name)) for group in sweep.measured]
    return levels + [(label, one.mean) for label, one in controls if label is not None and one is not None]
