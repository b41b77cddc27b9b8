"""What a sweep shows beyond chance: paired tests between methods, comparisons by film, the effect of each setting."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from experiments.analysis.ablations import AblationCell, MainEffect, main_effects
from experiments.analysis.formatting import mean
from experiments.analysis.power import PROBABILITY, SeedPlan, Spread
from experiments.analysis.seed_groups import Group
from experiments.analysis.significance import (
    Difference,
    FilmComparison,
    compact_letters,
    compare_films,
    paired_differences,
)
from experiments.reporting.leaderboard import Leaderboard
from experiments.reporting.limits import MAX_LISTED_PAIRS
from experiments.reporting.loading import SweepResults

TARGET = 0.1  # difference in a share that a comparison should find


@dataclass(frozen=True)
class Comparison:
    """The tests of a sweep's headline measure.

    `differences` holds every pair of groups, better first. `films` holds the same pairs by the films that the models
    judged; it is empty for a long sweep and where the films differ. Groups that share one of their `letters` do not
    differ significantly; there are none where nothing could be tested, and none for a long sweep. `contest` holds the
    methods that can win, best first, and `against_best` the first one's difference from each of the others.
    `beats_chance` is whether the first one's mean is better than guessing, or it is not known what guessing scores.
    `seeds` says which difference so many seeds find; None where that is not known, and for a long sweep.
    """

    differences: list[Difference]
    films: list[FilmComparison]
    letters: dict[str, str]
    effects: list[MainEffect]
    contest: list[Group]
    against_best: list[Difference]
    beats_chance: bool = True
    seeds: SeedPlan | None = None

    @cached_property
    def tested(self) -> list[Difference]:
        """The pairs with at least two seeds in common."""
        return [pair for pair in self.differences if pair.p is not None]

    @cached_property
    def significant(self) -> list[Difference]:
        """The pairs whose difference is significant."""
        return [pair for pair in self.tested if pair.significant]

    @cached_property
    def listed(self) -> list[Difference]:
        """The tested pairs, or the most significant ones where there are more than `MAX_LISTED_PAIRS`."""
        if len(self.tested) <= MAX_LISTED_PAIRS:
            return self.tested
        return sorted(self.significant, key=lambda pair: pair.p_holm or 0.0)[:MAX_LISTED_PAIRS]

    @property
    def winner(self) -> Group | None:
        """The best method, if it beats chance and differs significantly from every other one."""
        wins = self.against_best and self.beats_chance and all(pair.significant for pair in self.against_best)
        return self.contest[0] if wins else None


def compare(sweep: SweepResults, leaderboard: Leaderboard) -> Comparison:
    """Test every pair of methods of a sweep, and average over the values of each setting."""
    name = sweep.headline.name
    values = {group.name: group.values(name) for group in sweep.measured}
    differences = paired_differences(values)
    contest = [group for group in leaderboard.ranked if group.values(name)]
    best = {pair.b: pair for pair in differences if contest and pair.a == contest[0].name}
    significant = [(pair.a, pair.b) for pair in differences if pair.significant]
    tested = any(pair.p is not None for pair in differences)
    cells = [
        AblationCell(group.name, {"attention": group.first.attention} | group.first.config, values[group.name])
        for group in sweep.measured
    ]
    return Comparison(
        differences,
        [] if sweep.is_long else _compare_films(sweep),
        compact_letters([*values], significant) if tested and not sweep.is_long else {},
        main_effects(cells, sweep.headline),
        contest,
        [best[group.name] for group in contest[1:]],
        not contest or name not in sweep.chance or _rank(sweep, contest[0]) < sweep.headline.rank(sweep.chance[name]),
        None if sweep.is_long else plan_seeds(sweep),
    )


def plan_seeds(
    sweep: SweepResults, methods: int | None = None, target: float | None = None, probability: float = PROBABILITY
) -> SeedPlan | None:
    """Return what the seeds of a sweep can show of its headline measure, and how many it needs.

    Args:
        sweep: The pilot. The spread over seeds is that of its methods; controls, which hardly vary, are left out.
        methods: How many groups are compared, controls included; by default those of the pilot.
        target: The difference that is to be found; by default `TARGET` of a share, and none of another measure.
        probability: With which it is to be found.
    """
    methods_alone = {g.name: g.values(sweep.headline.name) for g in sweep.measured if not g.control}
    everything = {g.name: g.values(sweep.headline.name) for g in sweep.measured}
    if target is None and sweep.headline.bounds == (0.0, 1.0):
        target = TARGET
    values = methods_alone if Spread.of(methods_alone) else everything
    return SeedPlan.of(values, methods or len(everything), target, probability)


def _rank(sweep: SweepResults, group: Group) -> float:
    return sweep.headline.rank(mean(group.estimate(sweep.headline.name)))


def _compare_films(sweep: SweepResults) -> list[FilmComparison]:
    name = sweep.headline.name
    judged = [
        (group, {run.seed: run.films[name] for run in group.finished if run.films.get(name)}) for group in sweep.groups
    ]
    judged = [(group, outcomes) for group, outcomes in judged if outcomes]
    data = [group.first.config.get("data") for group, _ in judged]
    if any(one != data[0] for one in data):
        return []
    return compare_films({group.name: outcomes for group, outcomes in judged})
