"""A leaderboard read at equal cost, in each of the three senses of cost: pairs, FLOPs of attention, seconds."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.analysis.formatting import mean, percent
from experiments.analysis.metrics import COST_SENSES, Measure
from experiments.analysis.seed_groups import Group
from experiments.analysis.significance import pareto_front
from experiments.reporting.limits import join_names
from experiments.reporting.loading import SweepResults

STEADY = 0.1  # seconds of seeds that differ by more than this standard deviation, relative to the mean, are not steady


@dataclass(frozen=True)
class CostOrder:
    """The groups that have the headline measure and one sense of cost, cheapest first.

    `front` names those that no other group beats: none is at least as good and costs at most as much.
    """

    sense: str
    measure: Measure
    groups: tuple[Group, ...]
    front: tuple[str, ...]


def order_by_costs(sweep: SweepResults) -> dict[str, CostOrder]:
    """Order the measured groups of a sweep by each sense of cost; a sense that no run has is left out."""
    found = {}
    for sense, figure in COST_SENSES.items():
        costs = {group.name: cost for group in sweep.measured if (cost := mean(group.estimate(figure))) is not None}
        groups = sorted((group for group in sweep.measured if group.name in costs), key=lambda g: costs[g.name])
        ranks = {g.name: sweep.headline.rank(mean(g.estimate(sweep.headline.name))) for g in groups}
        if groups:
            front = tuple(pareto_front(costs, ranks.__getitem__))
            found[sense] = CostOrder(sense, Measure.of(figure), tuple(groups), front)
    return found


def cost_figure(group: Group, cost: Measure) -> str:
    """Return a group's mean cost in the unit of its label, a dash where it was not measured."""
    found = mean(group.estimate(cost.name))
    return "–" if found is None else f"{cost.unit * found:.3g}"


def word_timing(sweep: SweepResults) -> str:
    """Say why seconds of these runs cannot be compared; empty where nothing speaks against it."""
    facts = [result.provenance for result in sweep.finished if result.seconds_per_step is not None]
    machines = {(fact.get("host"), fact.get("processor"), fact.get("threads")) for fact in facts}
    parts = []
    if len(machines) > 1:
        parts.append(f"they were measured on {len(machines)} machines or numbers of threads")
    unsteady = []
    for group in sweep.measured:
        seconds = group.estimate("seconds_per_step")
        if seconds is not None and seconds.sd is not None and seconds.sd > STEADY * seconds.mean:
            unsteady.append(f"{group.name} ({percent(seconds.sd / seconds.mean)})")
    if unsteady:
        parts.append(
            f"the machine was not quiet, because seconds vary between seeds by more than {percent(STEADY)}: "
            f"{join_names(unsteady)}"
        )
    return f"Compare seconds with care: {'; '.join(parts)}.".replace(" %", "\u00a0%") if parts else ""
