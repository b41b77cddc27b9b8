"""What is kept of a sweep when its runs are gone: the figures alone, in a file small enough for the repository."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.analysis.metrics import get_figure
from experiments.analysis.significance import Estimate
from experiments.escape import for_json
from experiments.reporting.report import Report
from experiments.tracking.store import Result, atomic_write

DIGITS = 4  # that count


def record(report: Report) -> dict[str, Any]:
    """Where the sweep ran, mean and spread of every group, the figures of every run, to four digits that count.

    Of the finished runs alone; the others stand under "unfinished". Controls that another sweep lent name it. A fact
    about machines, code or films that is not the same for all runs is the list of what it was.
    """
    done = report.sweep.finished
    facts = [result.provenance for result in done]
    names = ("density", "flops", "attention_flops", "seconds_per_step", "val_loss", *report.sweep.metrics)
    return {
        "name": report.sweep.name,
        "command": report.sweep.command,
        "commit": _one(report.sweep.commits),
        "started": min((fact["started"] for fact in facts if "started" in fact), default=None),
        **{key: _one(fact.get(key) for fact in facts) for key in ("processor", "threads", "torch")},
        "minutes": _minutes(result.seconds or 0.0 for result in done),
        "steps": _one(result.steps for result in done),
        "films_judged_per_run": _one(len(outcomes) for result in done for outcomes in result.films.values()),
        "tokens_per_film": _one(map(_tokens_per_film, done)),
        "chance": {name: _short(value) for name, value in report.sweep.chance.items()},
        "groups are": "[mean, sample standard deviation] over n seeds",
        "groups": [
            {
                "name": group.name,
                "n": len(group.finished),
                **({"sweep": group.sweep} if group.sweep else {}),
                **{
                    name: [_short(figure.mean), _short(_spread(figure))]
                    for name in names
                    if (figure := group.estimate(name)) is not None
                },
            }
            for group in report.leaderboard.rows
        ],
        "runs": [
            _run(result, names) for group in report.leaderboard.rows if not group.sweep for result in group.finished
        ],
        "unfinished": [{"name": r.name, "status": r.status, "reason": r.reason} for r in report.sweep.unfinished],
    }


def write_record(report: Report, path: Path) -> None:
    """`record` as JSON, a group or a run a line, so that a change of one is a line of a diff."""
    lines = []
    for key, value in record(report).items():
        each = [for_json(one) for one in value] if isinstance(value, list) else []
        plain = "[\n  " + ",\n  ".join(each) + "\n ]" if each else for_json(value)
        lines.append(f" {json.dumps(key)}: {plain}")
    with atomic_write(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def _tokens_per_film(result: Result) -> int | None:
    """Video tokens of a film that is judged, the mean where films differ; None where the data does not count them."""
    test = result.data.get("test", {})
    return round(test["tokens"] / test["films"]) if "tokens" in test else None


def _run(result: Result, names: Iterable[str]) -> dict[str, Any]:
    values = {name: get_figure(result, name) for name in names}
    return {
        "name": result.name,
        "seed": result.seed,
        "id": result.id,
        "minutes": _minutes([result.seconds or 0.0]),
        **{name: _short(one) for name, one in values.items() if one is not None},
    }


def _spread(figure: Estimate) -> float | None:
    """None of one run; what rounding alone leaves of runs that agree is none."""
    return 0.0 if figure.sd is not None and figure.sd < 1e-12 * abs(figure.mean) else figure.sd


def _one(values: Iterable[Any]) -> Any:
    """The value that all have, or the list of those that there are; None of none."""
    found = list(dict.fromkeys(values))
    return found[0] if len(found) == 1 else found or None


def _minutes(seconds: Iterable[float]) -> float:
    return round(sum(seconds) / 60, 1)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")
