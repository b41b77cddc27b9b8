"""A report as JSON, for programs: `report.json` and `zoo report --json`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.analysis.ablations import MainEffect
from experiments.analysis.metrics import FIGURES
from experiments.analysis.power import SeedPlan
from experiments.analysis.seed_groups import Group
from experiments.analysis.trials import Tuning
from experiments.reporting.limits import MAX_LISTED_PAIRS
from experiments.reporting.report import Report
from experiments.tracking.schema import VERSION
from experiments.tracking.store import Result

JSON_CONTROLS = {"random baseline": "random null"}  # label -> the older name, which programs look for


def to_json(report: Report) -> dict[str, Any]:
    """Return a report as plain data.

    A group names its cells; its figures are those of `Estimate`, over the runs that finished. null stands for what was
    not measured. "shortened" says what is left out of a long report.

    Returns:
        {"name", "cells", "groups", "headline", "command", "verdict", "caution", "drift", "differences", "films",
        "effects", "winner", "conclusion", "shortened", "version", "costs", "timing", "power", "tuning"}.
        "costs" has, by sense of cost, the names of the groups, cheapest first, and those on the Pareto front. "power"
        and "tuning" are null where they are not known.
    """
    sweep, comparison, sentences = report.sweep, report.comparison, report.sentences
    results = sweep.results if sweep.shows_full_results else [_shorten(result) for result in sweep.results]
    few = len(comparison.differences) <= MAX_LISTED_PAIRS
    return {
        "name": sweep.name,
        "cells": [result.to_json() for result in results],
        "groups": [_plain_group(group, report) for group in sweep.groups],
        "headline": sweep.headline.name,
        "command": sweep.command,
        "verdict": sentences.verdict,
        "caution": sentences.caution,
        "drift": sentences.deviation,
        "differences": [
            vars(pair) | {"holds": pair.significant} for pair in (comparison.differences if few else comparison.listed)
        ],
        "films": [vars(pair) | {"holds": pair.significant} for pair in comparison.films],
        "effects": [_plain_effect(effect) for effect in comparison.effects],
        "winner": comparison.winner.name if comparison.winner else None,
        "conclusion": sentences.conclusion,
        "shortened": sentences.shortened,
        "version": VERSION,
        "costs": {
            sense: {"figure": one.measure.name, "order": [group.name for group in one.groups], "front": [*one.front]}
            for sense, one in report.costs.items()
        },
        "timing": sentences.timing,
        "power": None if comparison.seeds is None else plain_seeds(comparison.seeds) | {"sentence": sentences.power},
        "tuning": None if sweep.tuning is None else _plain_tuning(sweep.tuning) | {"sentence": sentences.tuning},
    }


def plain_seeds(plan: SeedPlan) -> dict[str, Any]:
    """Return a plan of seeds as plain data: the fields of `SeedPlan` and of `Spread`."""
    return vars(plan) | {"spread": vars(plan.spread)}


def _plain_tuning(tuning: Tuning) -> dict[str, Any]:
    return {
        "sweep": tuning.sweep,
        "seeds": tuning.seeds,
        "by": tuning.measure.name,
        "cells": [
            {
                "name": cell.name,
                "chosen": cell.chosen,
                "trials": [
                    {
                        "name": trial.name,
                        "settings": dict(trial.settings),
                        "score": trial.score(tuning.measure),
                        "reason": trial.why_unscored(tuning.measure),
                        "seconds": trial.seconds,
                    }
                    for trial in cell.trials
                ],
            }
            for cell in tuning.cells
        ],
    }


def _plain_group(group: Group, report: Report) -> dict[str, Any]:
    estimates = {key: group.estimate(key) for key in (*FIGURES, *report.sweep.metrics)}
    return {
        "name": group.name,
        "cells": [result.name for result in group.results],
        "control": JSON_CONTROLS.get(str(group.control), group.control),
        "letters": report.comparison.letters.get(group.name),
        "figures": {key: None if one is None else {**vars(one)} for key, one in estimates.items()},
    }


def _plain_effect(effect: MainEffect) -> dict[str, Any]:
    levels = [
        {"value": level.value, "figure": vars(level.estimate), "cells": level.cells, "values": level.values}
        for level in effect.levels
    ]
    return {"keys": effect.keys, "levels": levels, "crossed": effect.crossed, "combinations": effect.combinations}


def _shorten(result: Result) -> Result:
    """A result without the fields that take most room."""
    return replace(result, curves={}, films={}, diagnostics={}, costs={}, config={}, data={}, traceback=None)
