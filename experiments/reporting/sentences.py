"""The sentences of a report, the same in the page, the tables, the terminal and report.json."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.analysis.formatting import mean, number, p_value, percent, signed
from experiments.analysis.metrics import RECALL, TOLERANCE, WHOLE
from experiments.analysis.power import MOST_SEEDS, SeedPlan
from experiments.analysis.significance import detectable_effect
from experiments.analysis.trials import Tuning
from experiments.reporting.comparison import Comparison
from experiments.reporting.equal_cost import word_timing
from experiments.reporting.leaderboard import Columns, Leaderboard
from experiments.reporting.limits import MAX_LISTED_PAIRS, MAX_PLOTTED_GROUPS, join_names
from experiments.reporting.loading import SweepResults
from experiments.tracking.store import Result

FEW_SEEDS = 5  # up to here the sign-flip test cannot reach 5 %: its smallest p is 2 / 2^n


@dataclass(frozen=True)
class Sentences:
    """What a report says in words; each is empty where there is nothing to say.

    `conclusion` names the winner, or says why there is none. `verdict` counts the significant differences, and
    `caution` says what so few seeds cannot show. `deviation` names the cells that left their budget in training.
    `shortened` says what a long report leaves out. `task` says how memory was tested. `power` says which difference so
    many seeds find, `timing` why seconds cannot be compared, `tuning` how settings were tried.
    """

    conclusion: str
    verdict: str
    caution: str
    deviation: str
    shortened: str
    task: str
    power: str
    timing: str
    tuning: str


def write_sentences(
    sweep: SweepResults, leaderboard: Leaderboard, columns: Columns, comparison: Comparison
) -> Sentences:
    """Word the findings of a sweep."""
    return Sentences(
        conclusion=word_conclusion(sweep, comparison),
        verdict=word_verdict(sweep.headline.label, comparison),
        caution=word_caution(comparison),
        deviation=word_deviation(leaderboard),
        shortened=word_shortened(sweep, comparison),
        task=word_task(sweep, columns),
        power=word_power(sweep, comparison.seeds),
        timing=word_timing(sweep),
        tuning=word_tuning(sweep.tuning),
    )


def word_conclusion(sweep: SweepResults, comparison: Comparison) -> str:
    """Say which method wins, or why none does."""
    contest, label = comparison.contest, sweep.headline.label
    if not contest:
        return ""
    if comparison.winner is not None:
        value = number(mean(contest[0].estimate(sweep.headline.name)))
        return f"Best {label}: {value}, by {contest[0].name}; its difference from every other method is significant."
    pairs = comparison.against_best
    if not pairs:
        return f"No significant winner: only one method has {label}."
    if all(pair.p is None for pair in pairs):
        one_seed = sweep.seeds == 1
        why = "each method has one seed" if one_seed else "the best method shares fewer than two seeds with every other"
        return f"No significant winner: no test is possible, because {why}."
    pair = next((pair for pair in pairs if not pair.significant), None)
    if pair is None:
        chance = number(sweep.chance[sweep.headline.name])
        return f"No significant winner: the best method, {contest[0].name}, does not beat chance ({chance})."
    if pair.p is None:
        return f"No significant winner: {pair.a} and {pair.b} share fewer than two seeds, so no test is possible."
    gap = f"{pair.a} and {pair.b} differ by {signed(pair.mean)}"
    return f"No significant winner: {gap}, which is not significant (p {p_value(pair.p_holm)}, Holm)."


def word_verdict(label: str, comparison: Comparison) -> str:
    """Say how many differences in the measure `label` are significant."""
    tested, significant = len(comparison.tested), len(comparison.significant)
    if not tested:
        return "No two methods have two seeds in common, so no difference can be tested."
    seeds = {pair.n for pair in comparison.tested}
    test = f"paired t tests over {'up to ' if len(seeds) > 1 else ''}{max(seeds)} seeds, at 5\u00a0%"
    if tested == 1:
        return f"The difference in {label} is {'' if significant else 'not '}significant: {test}."
    verb = "is" if significant == 1 else "are"
    return (
        f"{significant} of {tested} differences in {label} {verb} significant: {test} for all pairs together"
        " (Holm's correction)."
    )


def word_caution(comparison: Comparison) -> str:
    """Say what so few seeds cannot show."""
    if not comparison.tested:
        return "Set `seeds: 3` or more in the sweep file."
    pairs, n = len(comparison.tested), max(pair.n for pair in comparison.tested)
    if n > FEW_SEEDS:
        return ""
    return (
        f"With {n} seeds only large and steady differences are significant: the mean difference of a pair must exceed"
        f" {detectable_effect(n, pairs):.1f} of its standard deviations (with {n + 2} seeds"
        f" {detectable_effect(n + 2, pairs):.1f}). A difference that is not significant may still be real. The t test"
        " assumes normal differences, which so few seeds cannot confirm. The sign-flip test assumes nothing, but its"
        f" smallest possible p is {2 / 2**n:.2g}."
    )


def word_power(sweep: SweepResults, plan: SeedPlan | None) -> str:
    """Say which difference the seeds of a sweep find, and how many seeds would find the target."""
    if plan is None:
        return ""
    label, chance = sweep.headline.label, percent(plan.probability).replace(".0 %", "\u00a0%")
    seeds = f"With {plan.spread.seeds} seeds"
    low, high = sweep.headline.bounds
    if plan.difference < high - low:
        shown = number(plan.difference)
        text = f"{seeds} a true difference of {shown} in {label} is found with {chance} probability; a smaller one "
        text += f"could not be shown reliably ({plan.methods} groups, all pairs tested, Holm's correction)."
    else:
        text = f"{seeds} and {plan.methods} groups no difference in {label} is found with {chance} probability."
    if plan.target is None:
        return text
    needed = f"more than {MOST_SEEDS}" if plan.needed is None else str(plan.needed)
    widest = f"more than {MOST_SEEDS}" if plan.needed_widest is None else str(plan.needed_widest)
    return f"{text} A difference of {plan.target:g} needs {needed} seeds" + (
        "." if widest == needed else f", and {widest} if all pairs varied like {' and '.join(plan.spread.widest)}."
    )


def word_tuning(tuning: Tuning | None) -> str:
    """Say how settings were tried before the runs of a sweep."""
    if tuning is None:
        return ""
    label, seeds = tuning.measure.label, ", ".join(map(str, tuning.seeds))
    return (
        f"For each cell {tuning.trials} settings were tried with seed{'s' * (len(tuning.seeds) > 1)} {seeds}, which its"
        f" own runs do not use. The best by {label} is used in its own runs; of equal ones the first, which is the cell"
        " as written in the sweep file."
    )


def word_deviation(leaderboard: Leaderboard) -> str:
    """Name the cells whose density left its budget in training."""
    deviating = []
    for group in leaderboard.rows:
        match = group.first.config.get("match") or {}
        budget, within = match.get("density"), match.get("within", TOLERANCE)
        density = mean(group.estimate("density"))
        if budget is not None and density is not None and abs(density - budget) > within * budget:
            deviating.append(f"{group.name} {percent(density)} (budget {percent(budget)})")
    named = join_names(deviating).replace(" %", "\u00a0%")
    return f"Cells met their density budget before training and left it in training: {named}." if deviating else ""


def word_shortened(sweep: SweepResults, comparison: Comparison) -> str:
    """Say what a long report leaves out."""
    parts = []
    if sweep.is_long:
        shown = f"the first {MAX_PLOTTED_GROUPS} of {len(sweep.groups)} groups and the controls"
        parts.append(f"plots and pictures show {shown}")
        parts.append("the matrix of differences, the letters and the comparison by film are left out")
    if len(comparison.tested) > len(comparison.listed):
        parts.append(
            f"only the significant ones of {len(comparison.tested)} pairs are listed, at most {MAX_LISTED_PAIRS}"
        )
    if not sweep.shows_full_results:
        parts.append("configs and curves of single runs are only in their result.json")
    return f"This report is long: {'; '.join(parts)}." if parts else ""


def word_task(sweep: SweepResults, columns: Columns) -> str:
    """Say how memory was tested."""
    if not sweep.is_memory_test:
        return ""
    data = [result.config.get("data") for group in sweep.groups for result in group.results]
    returns = any(isinstance(own, dict) and own.get("judged") == "returns" for own in data)
    last = (
        "Recall is measured on all returns of a film, generated at once beside the true introductions."
        if returns
        else "Recall is measured on the last shot, generated after the true shots before it."
    )
    whole = " Whole film: every shot is generated from noise, and counts as right if it shows the subject as its"
    return last + f"{whole} earlier generated shots do." * (WHOLE + RECALL in columns.beside)


def group_unfinished(sweep: SweepResults) -> dict[str, Result]:
    """Group the unfinished runs that have one status, reason and checkpoint: their names -> one of them."""
    alike: dict[tuple[str | None, ...], list[Result]] = {}
    for result in sweep.unfinished:
        alike.setdefault((result.status, result.reason, result.checkpoint), []).append(result)
    return {join_names([result.name for result in results]): results[0] for results in alike.values()}
