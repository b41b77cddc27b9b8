"""A report's tables for a paper's appendix, as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from experiments.analysis.formatting import (
    giga,
    interval,
    mean,
    number,
    p_value,
    percent,
    plain_values,
    plus_minus,
    settings,
    signed,
    tried,
)
from experiments.analysis.metrics import RECALL, WHOLE, Measure
from experiments.analysis.seed_groups import Group, Reference
from experiments.escape import for_latex, for_markdown, for_markdown_code
from experiments.reporting.equal_cost import cost_figure
from experiments.reporting.leaderboard import list_distances
from experiments.reporting.report import Report, list_machines
from experiments.reporting.sentences import group_unfinished

COLUMNS = 7  # of a LaTeX table, beside the first, that fit a page


def markdown(report: Report) -> str:
    """Return the tables as Markdown, one section each."""
    return _rendered(report, "report.md.j2", for_markdown)


def latex(report: Report) -> str:
    r"""Return the tables as LaTeX, for `\input`; they need the package booktabs. Wide ones are cut to fit a page."""
    return _rendered(report, "report.tex.j2", for_latex, COLUMNS)


def _rendered(report: Report, template: str, cell: Callable[[str], str], columns: int = 1000) -> str:
    environment = Environment(
        loader=PackageLoader("experiments.reporting"),
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else cell(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["row"] = lambda cells, between: Markup(between.join(map(cell, cells)))
    environment.filters["code"] = lambda text: Markup(for_markdown_code(text))
    return environment.get_template(template).render(
        sweep=report.sweep,
        made=datetime.now().astimezone().strftime("%Y-%m-%d"),
        sheets=[part for sheet in _sheets(report) if sheet.rows for part in sheet.cut(columns)],
        machines=list_machines(report.sweep),
    )


@dataclass(frozen=True)
class Sheet:
    """A table in plain text, its first column on the left, the others on the right."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def cut(self, columns: int) -> Iterator[Sheet]:
        """This in parts of so many columns beside the first, which each of them has."""
        for first in range(1, len(self.head), columns):
            head, *rows = [[row[0], *row[first : first + columns]] for row in (self.head, *self.rows)]
            title, note = (self.title, self.note) if first == 1 else (f"{self.title}, continued", "")
            yield Sheet(title, note, head, rows)


def _sheets(report: Report) -> Iterator[Sheet]:
    head = report.sweep.headline
    done = report.leaderboard.rows

    def row(group: Group, title: str) -> list[str]:
        return [
            title,
            number(mean(group.estimate(head.name))),
            interval(group.estimate(head.name)),
            report.comparison.letters.get(group.name, ""),
            str(len(group.finished)),
            percent(mean(group.estimate("density"))),
            giga(mean(group.estimate("flops"))),
            number(mean(group.estimate("seconds_per_step"))),
            *(plus_minus(group.estimate(name)) for name in report.columns.beside),
        ]

    def across(reference: Reference) -> list[str]:
        if reference.group:
            return row(reference.group, reference.title)
        if reference.missing:
            return [reference.label, reference.missing] + [""] * (6 + len(report.columns.beside))
        chance = [number(report.sweep.chance.get(name)) for name in (head.name, *report.columns.beside)]
        return [reference.label, chance[0]] + [""] * 6 + chance[1:]

    def sheet(title: str, columns: Mapping[str, str], note: str = "") -> Sheet:
        rows = [[group.name, *(plus_minus(group.estimate(name)) for name in columns)] for group in done]
        chance = [["chance", *(number(report.sweep.chance.get(name)) for name in columns)]]
        told = any(name in report.sweep.chance for name in columns)
        head = ["method", *columns.values()]
        return Sheet(
            title, f"{note}Mean ± half of the 95 % interval over seeds.", head, (rows + chance * told) * bool(columns)
        )

    yield Sheet(
        "Leaderboard",
        f"By {head.label} ({head.better}): mean and 95 % interval over n seeds (Student's t). Methods that share a"
        " letter do not differ significantly. Density and FLOPs are those of the plans that ran."
        + (f" {report.sentences.task} Beside it mean ± half of the interval." if report.sentences.task else "")
        + "".join(
            f" {told}"
            for told in (report.sentences.conclusion, report.sentences.deviation, report.sentences.shortened)
            if told
        ),
        [
            "method",
            head.label,
            "95 % interval",
            "",
            "n",
            "density",
            "GFLOPs",
            "s / step",
            *report.columns.beside.values(),
        ],
        [
            *(row(group, group.titled) for group in report.leaderboard.ranked),
            *map(across, report.leaderboard.references),
        ],
    )
    yield Sheet(
        "Settings", "", ["method", "settings"], [[group.name, settings(group.first.attention)] for group in done]
    )
    yield Sheet(
        "Differences",
        f"In {head.label}, the first less the second, paired by seed, each with its own 95 % interval; p of the paired"
        f" t test, corrected by Holm, and of the sign-flip test. {report.sentences.verdict} {report.sentences.caution}"
        f" {report.sentences.power}".rstrip(),
        ["pair", "difference", "95 % interval", "n", "p", "p (Holm)", "p (signs)", "significant"],
        [
            [
                f"{pair.a} – {pair.b}",
                signed(pair.mean),
                "" if pair.low is None else f"[{signed(pair.low)}, {signed(pair.high)}]",
                str(pair.n),
                *map(p_value, (pair.p, pair.p_holm, pair.p_exact)),
                "yes" if pair.significant else "no",
            ]
            for pair in report.comparison.listed
        ],
    )
    yield Sheet(
        "Cost",
        "Cheapest first by density. *: no other method is at least as good and costs at most as much, in that sense of"
        f" cost. FLOPs are those of a training step, routing and terms included. {report.sentences.timing}".rstrip(),
        ["method", head.label, *(cost.measure.label for cost in report.costs.values())],
        [
            [
                group.name,
                number(mean(group.estimate(head.name))),
                *(
                    cost_figure(group, cost.measure) + "*" * (group.name in cost.front)
                    for cost in report.costs.values()
                ),
            ]
            for group in next(iter(report.costs.values())).groups
        ]
        if report.costs
        else [],
    )
    yield Sheet(
        "Films",
        "The same by film. This compares the trained models, not the methods: on how many films the first did better"
        " and worse than the second; exact sign test, corrected by Holm.",
        ["pair", "films", "better", "worse", "p", "p (Holm)"],
        [
            [f"{one.a} – {one.b}", *map(str, (one.films, one.better, one.worse)), p_value(one.p), p_value(one.p_holm)]
            for one in report.comparison.films
        ],
    )
    for measure in (RECALL, WHOLE + RECALL):
        places = {name: str(back) for back, name in list_distances(report.sweep, measure).items()}
        label = Measure.of(measure).label.capitalize()
        yield sheet(
            f"{label} by distance", places, "Across: shots back to the nearest earlier one that shows the subject. "
        )
    yield sheet("Whole films", report.columns.whole_films, "Generated from noise. ")
    yield sheet("Other measures", report.columns.others)
    yield Sheet(
        "Main effects of settings",
        f"Mean {head.label} at each value, over the combinations of other settings that were run with every value.",
        ["setting", "value", "mean", "95 % interval", "cells"],
        [
            [
                effect.name if first else "",
                plain_values(level.value),
                number(level.estimate.mean),
                interval(level.estimate),
                str(len(level.cells)),
            ]
            for effect in report.comparison.effects
            for first, level in ((i == 0, level) for i, level in enumerate(effect.levels))
        ],
    )
    tuning = report.sweep.tuning
    yield Sheet(
        "Settings that were tried",
        report.sentences.tuning,
        ["cell", "setting", tuning.measure.label if tuning else "", "outcome"],
        [
            [
                cell.name,
                tried(trial.settings),
                number(trial.score(tuning.measure)),
                "used" if trial.name == cell.chosen else trial.why_unscored(tuning.measure),
            ]
            for cell in tuning.cells
            for trial in cell.trials
        ]
        if tuning
        else [],
    )
    yield Sheet(
        "Not finished",
        "",
        ["cell", "status", "reason"],
        [[names, result.state, result.reason or ""] for names, result in group_unfinished(report.sweep).items()],
    )
