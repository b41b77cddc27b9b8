"""A report of a sweep: what was measured, what is significant, and the sentences that say so.

Each part has its module: `loading` reads the results, `leaderboard` orders rows and columns, `comparison` tests,
`sentences` words. `html`, `tables`, `terminal`, `report_json` and `record` write a report, each in its format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.reporting.comparison import Comparison, compare
from experiments.reporting.equal_cost import CostOrder, order_by_costs
from experiments.reporting.leaderboard import Columns, Leaderboard, choose_columns, rank_groups
from experiments.reporting.loading import SweepResults, load_sweep, without_garbage_collection
from experiments.reporting.sentences import Sentences, write_sentences
from experiments.tracking.store import SweepRequest
from sparse_zoo.errors import refuse, unknown


@dataclass(frozen=True)
class Report:
    """The parts of a report, for the modules that write it.

    `costs` orders the methods by each sense of cost; `read_by` is the sense that tables of costs are ordered by.
    """

    sweep: SweepResults
    leaderboard: Leaderboard
    columns: Columns
    comparison: Comparison
    sentences: Sentences
    costs: dict[str, CostOrder]
    read_by: str | None = None


@without_garbage_collection()
def build_report(
    name: str, by: str | None = None, request: SweepRequest | None = None, read_by: str | None = None
) -> Report:
    """Read a sweep's results and analyse them.

    Args:
        name: The sweep's name, a folder of the runs.
        by: The headline measure; see `load_sweep`.
        request: The cells to report. By default those that were last requested under that name.
        read_by: One of `COST_SENSES`: the leaderboard is shown in this order, cheapest first.

    Returns:
        The report. Results of a long sweep that nothing shows in full have no curves.

    Raises:
        ZooError: if there is no such sweep, or the measure is unknown or cannot rank.
    """
    sweep = load_sweep(name, by, request)
    leaderboard, columns = rank_groups(sweep), choose_columns(sweep)
    if not sweep.shows_full_results:
        plotted = {group.name for group in leaderboard.plotted}
        for group in sweep.groups:
            for result in group.results if group.name not in plotted else ():
                result.curves = {}  # millions of points that nothing shows; to free them at the end takes seconds
    comparison = compare(sweep, leaderboard)
    sentences, costs = write_sentences(sweep, leaderboard, columns, comparison), order_by_costs(sweep)
    if read_by is not None:
        refuse(f"report {name}", [unknown("cost that was measured", read_by, costs)] if read_by not in costs else [])
    return Report(sweep, leaderboard, columns, comparison, sentences, costs, read_by)


def list_machines(sweep: SweepResults) -> list[dict[str, Any]]:
    """List the distinct machines and versions: {"about", "runs"}, the facts and the names of the runs."""
    machines: list[dict[str, Any]] = []
    for result in sweep.results:
        about = {key: value for key, value in result.provenance.items() if key not in ("pid", "started")}
        if about and not any(one["about"] == about for one in machines):
            machines.append({"about": about, "runs": []})
        for one in machines:
            if one["about"] == about:
                one["runs"].append(result.name)
    return machines
