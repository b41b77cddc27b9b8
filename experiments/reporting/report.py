"""What a sweep found, from the results on disk: means, intervals, tests; a JSON object, tables for the terminal."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from rich import box
from rich.table import Table

from experiments.analysis.ablations import Cells, Effect, effects
from experiments.analysis.formatting import giga, half, interval, mean, number, p_value, percent, signed
from experiments.analysis.metrics import (
    BESIDE,
    CONTROLS,
    COSTS,
    FIGURES,
    HEADLINES,
    RECALL,
    TOLERANCE,
    WHOLE,
    Measure,
    measures_to_rank_by,
)
from experiments.analysis.seed_groups import Group, Line, commit, controls_elsewhere
from experiments.analysis.significance import Difference, Films, detectable, differences, letters, over_films
from experiments.escape import for_terminal as escape
from experiments.tracking.schema import VERSION
from experiments.tracking.store import Asked, Result, read, read_sweep
from sparse_zoo.errors import refuse, unknown

MEASURES_ABREAST = 5  # columns of measures in a terminal 80 wide
MANY = 40  # groups that plots and matrices have room for
MOST_PAIRS = 800  # that are listed one by one
MOST_WHOLE = 120  # results that report.json and the page hold whole
MOST_ROWS = 60  # of a terminal's table
MOST_NAMED = 40  # cells that a sentence names
LEFT_OUT = ("curves", "films", "diagnostics", "costs", "config", "data", "traceback")  # of the results of a long report
FEW_SEEDS = 5  # up to here the sign-flip test cannot rule chance out at 5 %: 2 / 2^5 is more


@dataclass(frozen=True)
class Report:
    """The groups of cells of a sweep, best first by the headline, those without it after, in file order."""

    name: str
    about: str
    groups: tuple[Group, ...]
    headline: Measure
    command: str = ""
    elsewhere: tuple[Group, ...] = ()

    @staticmethod
    def of(name: str, by: str | None = None, asked: Asked | None = None) -> Report:
        """The sweep of that name among the runs, by a measure of one's choice; raises `ZooError` where there is none.

        By default the headline is the first of `HEADLINES` that any finished run has. A cost is none. The cells are
        those of `asked`, by default those that were asked for last under that name.
        """
        asked = asked or read_sweep(name)
        by_name: dict[str, list[Result]] = {}
        with _without_collection():
            for cell in asked.cells:
                by_name.setdefault(cell.group or cell.name, []).append(read(cell, name))
        groups = [Group(key, tuple(runs)) for key, runs in by_name.items()]
        measured = measures_to_rank_by(result for group in groups for result in group.results)
        refuse(f"report {name}", [unknown("measure", by, measured)] if by is not None and by not in measured else [])
        headline = Measure.of(by or next((key for key in HEADLINES if key in measured), HEADLINES[-1]))
        refuse(
            f"report {name}",
            [f"whether more or less {headline.label} is better is not known, so nothing can be ranked by it"]
            if headline.higher is None
            else [],
        )
        memory = RECALL in _metrics(groups)
        elsewhere = controls_elsewhere(name, groups) if memory else ()
        found = Report(name, asked.about, _best_first(groups, headline), headline, asked.command, elsewhere)
        if not found.entire:
            drawn = {group.name for group in found.plotted}
            for result in (result for group in found.groups if group.name not in drawn for result in group.results):
                result.curves = {}  # millions of points that nothing shows; to free them at the end takes seconds
        return found

    @cached_property
    def results(self) -> list[Result]:
        return [result for group in self.groups for result in group.results]

    @cached_property
    def finished(self) -> list[Result]:
        return [result for result in self.results if result.status == "finished"]

    @property
    def unfinished(self) -> list[Result]:
        return [result for result in self.results if result.status != "finished"]

    @property
    def unfinished_alike(self) -> dict[str, Result]:
        """The unfinished, those with one reason together: names -> one of them."""
        alike: dict[tuple[str | None, ...], list[Result]] = {}
        for result in self.unfinished:
            alike.setdefault((result.status, result.reason, result.checkpoint), []).append(result)
        return {_named([result.name for result in some]): some[0] for some in alike.values()}

    @cached_property
    def measured(self) -> list[Group]:
        """The groups that have the headline."""
        return [group for group in self.groups if group.values(self.headline.name)]

    @property
    def memory(self) -> bool:
        """Whether any finished run was asked for what earlier shots showed."""
        return RECALL in self.measures

    @cached_property
    def ranked(self) -> list[Group]:
        """The groups that any run finished of, best first; without controls in a test of memory."""
        return [group for group in self.groups if group.finished and not (self.memory and group.control)]

    @cached_property
    def lines(self) -> list[Line]:
        """Of a test of memory: chance and every control, in the order of `CONTROLS`, missing or not.

        What this sweep has not may come from another, of the same films, model and training.

        Else chance where the headline has one, and controls are ranked with the methods.
        """
        if not self.memory:
            return [Line("chance")] if self.headline.name in self.chance else []
        told = any(name in self.chance for name in (self.headline.name, *self.beside))
        found = [Line("chance", missing="" if told else "not told alike by all runs")]
        for label in CONTROLS.values():
            asked = [group for group in (*self.groups, *self.elsewhere) if group.control == label]
            found += [Line(label, group) for group in asked if group.finished] or [
                Line(label, missing="did not finish" if asked else "not in this sweep")
            ]
        return found

    @cached_property
    def rows(self) -> list[Group]:
        """The groups that any run finished of, as the leaderboard has them: methods, then controls."""
        return self.ranked + [line.group for line in self.lines if line.group]

    @property
    def best(self) -> Group | None:
        """The first of the leaderboard, if it has the headline."""
        return next((group for group in self.rows if group.values(self.headline.name)), None)

    @property
    def many(self) -> bool:
        """Whether there are more groups than plots and matrices have room for."""
        return len(self.groups) > MANY

    @cached_property
    def plotted(self) -> list[Group]:
        """The groups that plots and pictures show: all, or of `many` the first of the leaderboard and the controls."""
        if not self.many:
            return [*self.groups]
        return [group for i, group in enumerate(self.rows) if i < MANY or group.control]

    @property
    def entire(self) -> bool:
        """Whether every result is few enough to be listed with its config and curves."""
        return len(self.results) <= MOST_WHOLE

    @property
    def shortened(self) -> str:
        """What a long report leaves out, in a sentence; or nothing."""
        told = []
        if self.many:
            told.append(f"plots and pictures show the first {MANY} of {len(self.groups)} groups and the controls")
            told.append("the matrix of differences, the letters and the comparison by film are left out")
        if len(self.tested) > len(self.listed):
            told.append(f"of {len(self.tested)} pairs only significant ones are listed, at most {MOST_PAIRS}")
        if not self.entire:
            told.append("configs and curves of single runs stand in their result.json alone")
        return f"This report is long: {'; '.join(told)}." if told else ""

    @cached_property
    def listed(self) -> list[Difference]:
        """The pairs that are listed: all that were tested, or of too many the most significant ones."""
        if len(self.tested) <= MOST_PAIRS:
            return self.tested
        return sorted((pair for pair in self.tested if pair.holds), key=lambda pair: pair.p_holm or 0.0)[:MOST_PAIRS]

    @cached_property
    def winner(self) -> Group | None:
        """The first of the leaderboard, where its difference from every other method is significant."""
        if len(self._contest) < 2:
            return None
        first = self._contest[0]
        return first if all(pair.holds for pair in self._of_the_first) else None

    @property
    def conclusion(self) -> str:
        """Which method wins, or why none does, in a sentence; nothing where nothing was measured."""
        contest, label = self._contest, self.headline.label
        if not contest:
            return ""
        first, *others = contest
        if self.winner is not None:
            value = number(mean(first.figure(self.headline.name)))
            return f"Best {label}: {value}, by {first.name}; its difference from every other method is significant."
        if not others:
            return f"No significant winner: only one method has {label}."
        if all(pair.p is None for pair in self._of_the_first):
            why = "each method has one seed" if self.seeds == 1 else "the first has no two seeds in common with another"
            return f"No significant winner: no test is possible, because {why}."
        pair = next(pair for pair in self._of_the_first if not pair.holds)
        if pair.p is None:
            return f"No significant winner: {pair.a} and {pair.b} share fewer than two seeds, so no test is possible."
        gap = f"{pair.a} and {pair.b} differ by {signed(pair.mean)}"
        return f"No significant winner: {gap}, which is not significant (p {p_value(pair.p_holm)}, Holm)."

    @property
    def _contest(self) -> list[Group]:
        """The methods that can win: those of the leaderboard that have the headline."""
        return [group for group in self.ranked if group.values(self.headline.name)]

    @cached_property
    def _of_the_first(self) -> list[Difference]:
        """The differences of the first of the contest from all others of it."""
        first, *others = [group.name for group in self._contest]
        pairs = {pair.b: pair for pair in self.differences if pair.a == first}
        return [pairs[other] for other in others]

    @cached_property
    def measures(self) -> list[str]:
        """The names of the sample metrics that any finished run has."""
        return _metrics(self.groups)

    @property
    def task(self) -> str:
        """How memory was tested, in a sentence; empty where it was not."""
        if not self.memory:
            return ""
        whole = "; whole film: of all shots, drawn from noise, right if as an earlier one of them shows the subject"
        return (
            f"Recall is of the last shot, drawn after the true ones before it{whole * (WHOLE + RECALL in self.beside)}."
        )

    @property
    def beside(self) -> dict[str, str]:
        """Of a test of memory: what the leaderboard has beside its headline, measure -> column. Else nothing."""
        columns = {RECALL: Measure.of(RECALL).label, **BESIDE} if self.memory else {}
        return {
            name: column for name, column in columns.items() if name in self.measures and name != self.headline.name
        }

    @property
    def last_shots(self) -> dict[str, str]:
        """What is measured of last shots, drawn after true ones, measure -> column; but for what is `at_distances`."""
        plain = [Measure.of(name) for name in self.measures if not name.startswith(WHOLE)]
        return {one.name: one.label for one in plain if one.distance is None}

    @property
    def whole_films(self) -> dict[str, str]:
        """The same of films drawn wholly from noise."""
        plain = [Measure.of(name.removeprefix(WHOLE)) for name in self.measures if name.startswith(WHOLE)]
        return {WHOLE + one.name: one.label for one in plain if one.distance is None}

    @property
    def others(self) -> dict[str, str]:
        """What the leaderboard lacks of the loss and of last shots, measure -> column; nothing without any samples."""
        columns = {"val_loss": Measure.of("val_loss").label, **self.last_shots} if self.measures else {}
        return {name: label for name, label in columns.items() if name not in (self.headline.name, *self.beside)}

    def at_distances(self, measure: str) -> dict[int, str]:
        """Number of shots back -> the name of that measure there, nearest first."""
        found = {
            place[1]: name for name in self.measures if (place := Measure.of(name).distance) and place[0] == measure
        }
        return dict(sorted(found.items()))

    @property
    def seeds(self) -> int:
        """The most finished runs that differ by their seed alone."""
        return max((len(group.finished) for group in self.groups), default=0)

    @cached_property
    def chance(self) -> dict[str, float]:
        """What guessing scores, by measure, where all finished runs agree on it."""
        found: dict[str, set[float]] = {}
        for result in self.finished:
            for name, value in result.chance.items():
                found.setdefault(name, set()).add(value)
        return {name: min(values) for name, values in found.items() if len(values) == 1}

    @property
    def levels(self) -> list[tuple[str, float]]:
        """What the headline is read against: chance, and the mean of every control."""
        name = self.headline.name
        found = [("chance", self.chance[name])] if name in self.chance else []
        controls = [(group.control, group.figure(name)) for group in self.measured]
        return found + [(label, figure.mean) for label, figure in controls if label is not None and figure is not None]

    @property
    def commits(self) -> list[str]:
        """Of the code that made the finished runs; a plus stands for changes that were not committed."""
        return sorted({commit(result) for result in self.finished})

    @cached_property
    def differences(self) -> list[Difference]:
        """Every pair of groups that have the headline, in their order, better first."""
        return differences({group.name: group.values(self.headline.name) for group in self.measured})

    @cached_property
    def tested(self) -> list[Difference]:
        return [pair for pair in self.differences if pair.p is not None]

    @cached_property
    def films(self) -> list[Films]:
        """The same pairs, by the films that the models at hand judged, where they kept outcomes of the same films.

        None of `many` groups, whose pairs nobody reads one by one.
        """
        if self.many:
            return []
        name = self.headline.name
        judged = [
            (group, {r.seed: r.films[name] for r in group.finished if r.films.get(name)}) for group in self.groups
        ]
        same = [group.one.config.get("data") for group, kept in judged if kept]
        if any(data != same[0] for data in same):
            return []
        return over_films({group.name: kept for group, kept in judged if kept})

    @cached_property
    def letters(self) -> dict[str, str]:
        """Groups that share a letter were not told apart; empty where nothing could be tested."""
        if self.many:
            return {}
        held = [(pair.a, pair.b) for pair in self.differences if pair.holds]
        return letters([group.name for group in self.measured], held) if self.tested else {}

    @cached_property
    def effects(self) -> list[Effect]:
        """What each setting that differs between cells does to the headline."""
        values = [
            Cells(group.name, {"attention": group.one.attention} | group.one.config, group.values(self.headline.name))
            for group in self.measured
        ]
        return effects(values, self.headline)

    @property
    def verdict(self) -> str:
        """How many differences hold, in a sentence."""
        pairs = len(self.tested)
        if not pairs:
            return "No two methods have two seeds in common, so no difference can be told from chance."
        held, seeds = sum(pair.holds for pair in self.tested), {pair.n for pair in self.tested}
        how = f"paired t tests over {'up to ' if len(seeds) > 1 else ''}{max(seeds)} seeds, at 5\u00a0%"
        if pairs == 1:
            return f"The difference in {self.headline.label} {'holds' if held else 'is not shown to hold'}: {how}."
        return (
            f"{held} of {pairs} differences in {self.headline.label} hold beyond chance: {how} for all pairs together"
            " (Holm's correction)."
        )

    @property
    def caution(self) -> str:
        """What so few seeds cannot show; empty where there are enough."""
        if not self.tested:
            return "Give the sweep file `seeds: 3` or more."
        pairs, n = len(self.tested), max(pair.n for pair in self.tested)
        if n > FEW_SEEDS:
            return ""
        return (
            f"{n} seeds see large and steady differences only: the mean difference of a pair must pass"
            f" {detectable(n, pairs):.1f} of its own standard deviations to be the first that holds (with {n + 2} seeds"
            f" {detectable(n + 2, pairs):.1f} would do). What is not shown may well be there. And t trusts the"
            " differences to be normal, which so few cannot show: flipping their signs, which trusts nothing, cannot"
            f" give less than p = {2 / 2**n:.2g}."
        )

    @property
    def drift(self) -> str:
        """Which cells met their budget of pairs as they were made and not in training, in a sentence; or nothing."""
        moved = []
        for group in self.rows:
            match = group.one.config.get("match") or {}
            asked, within, found = match.get("density"), match.get("within", TOLERANCE), mean(group.figure("density"))
            if asked is not None and found is not None and abs(found - asked) > within * asked:
                moved.append(f"{group.name} {percent(found)} for {percent(asked)}")
        told = _named(moved).replace(" %", "\u00a0%")
        return f"Budgets were met before training; in training moved {told}." if moved else ""

    def singly(self) -> Report:
        """The same with every run a group of its own."""
        singles = [Group(result.name, (result,), group.name) for group in self.groups for result in group.results]
        elsewhere = [Group(r.name, (r,), group.name, group.sweep) for group in self.elsewhere for r in group.results]
        return replace(self, groups=_best_first(singles, self.headline), elsewhere=tuple(elsewhere))

    def to_json(self) -> dict[str, Any]:
        """{"name", "cells", "groups", "headline", "command", "verdict", "caution", "drift", "differences", "films",
        "effects", "winner", "conclusion", "shortened", "version"}.

        A group names its cells; its figures are `Figure`s over those that finished, its letters those of `letters`.
        null stands for what was not measured. Of a long report `shortened` says what is left out here too.
        """
        blank = {key: type(getattr(Result("", {}, "missing", 0), key))() for key in LEFT_OUT if key != "traceback"}
        cells = self.results if self.entire else [replace(one, traceback=None, **blank) for one in self.results]
        listed = self.differences if len(self.differences) <= MOST_PAIRS else self.listed
        groups = [
            {
                "name": group.name,
                "cells": [result.name for result in group.results],
                "control": group.control,
                "letters": self.letters.get(group.name),
                "figures": {
                    key: {**vars(figure)} if (figure := group.figure(key)) else None
                    for key in (*FIGURES, *self.measures)
                },
            }
            for group in self.groups
        ]
        return {
            "name": self.name,
            "cells": [result.to_json() for result in cells],
            "groups": groups,
            "headline": self.headline.name,
            "command": self.command,
            "verdict": self.verdict,
            "caution": self.caution,
            "drift": self.drift,
            "differences": [vars(pair) | {"holds": pair.holds} for pair in listed],
            "films": [vars(pair) | {"holds": pair.holds} for pair in self.films],
            "effects": [asdict(effect) for effect in self.effects],
            "winner": self.winner.name if self.winner else None,
            "conclusion": self.conclusion,
            "shortened": self.shortened,
            "version": VERSION,
        }

    def tables(self, *, runs: bool = False) -> list[Table]:
        """For a terminal: the leaderboard, and the other measures; of single `runs`, or means over seeds."""
        shown = self.singly() if runs else self
        several, head = shown.seeds > 1, self.headline
        title = (
            f"{escape(self.name)}: {len(self.finished)} of {len(self.results)} cells finished, by {escape(head.label)}"
        )
        if several:
            title += (
                f"; means over up to {shown.seeds} seeds, their 95 % intervals; who shares a letter was not told apart"
            )
        table = _table(title)
        spread = ("95 %", "", "n") if several else ("first", "last")
        for name in (
            "cell",
            escape(_short(head.name)),
            *spread,
            "density",
            "GFLOPs",
            "s/step",
            *(() if several else ("kernel",)),
        ):
            table.add_column(
                name,
                justify="left" if name in ("cell", "", "kernel") else "right",
                no_wrap=name != "cell",
                overflow="fold",
            )

        def add(group: Group, title: str) -> None:
            figure = group.figure(head.name)
            density, flops, seconds = (mean(group.figure(name)) for name in COSTS)
            if several:
                own = [interval(figure), self.letters.get(group.name, ""), str(len(group.finished))]
            else:
                own = [number(mean(group.figure(name))) for name in ("first_loss", "last_loss")]
            costs = [percent(density), giga(flops), number(seconds)]
            kernel = [] if several else [escape(group.one.kernel or "–")]
            table.add_row(escape(title), number(mean(figure)), *map(escape, own), *costs, *kernel)

        for group in shown.ranked[:MOST_ROWS]:
            add(group, group.name)
        _add_rest(table, shown.ranked)
        table.add_section()
        for line in shown.lines:
            if line.group:
                add(line.group, line.title)
            elif line.missing:
                table.add_row(escape(f"{line.title}: {line.missing}"))
            else:
                table.add_row(escape(line.title), number(shown.chance.get(head.name)))
        odd = [group for group in shown.groups if len(group.finished) < len(group.results)]
        for group in odd[:MOST_ROWS]:
            for status in dict.fromkeys(r.state for r in group.results if r.status != "finished"):
                table.add_row(escape(group.name), f"[red]{status}[/red]")
        _add_rest(table, odd)
        others = "Other measures; of last shots, drawn after the true ones before them, but for the loss."
        halves = " ± half a 95 % interval." if several else ""
        return [
            table,
            *shown._abreast(shown.beside, shown.task + halves),
            *shown._abreast(shown.whole_films, f"Whole films, drawn from noise.{halves}"),
            *shown._abreast(shown.others, others + halves),
        ]

    def _abreast(self, columns: Mapping[str, str], title: str) -> Iterator[Table]:
        """As many measures (their columns by name) to a table as fit into a terminal, the first with a title."""
        for first in range(0, len(columns), MEASURES_ABREAST):
            names = list(columns)[first : first + MEASURES_ABREAST]
            table = _table("" if first else title)
            table.add_column("cell", overflow="fold")
            for name in names:
                table.add_column(escape(columns[name]), justify="right", overflow="fold")
            for group in self.rows[:MOST_ROWS]:
                table.add_row(escape(group.name), *(half(group.figure(name)) for name in names))
            _add_rest(table, self.rows)
            if any(name in self.chance for name in names):
                table.add_row("[dim]chance[/dim]", *(number(self.chance.get(name)) for name in names))
            yield table


def machines(report: Report) -> list[dict[str, Any]]:
    """The distinct machines and versions, each with the runs that it made."""
    found: list[dict[str, Any]] = []
    for result in report.results:
        kept = {key: value for key, value in result.provenance.items() if key not in ("pid", "started")}
        if kept and not any(one["about"] == kept for one in found):
            found.append({"about": kept, "runs": []})
        for one in found:
            if one["about"] == kept:
                one["runs"].append(result.name)
    return found


@contextmanager
def _without_collection() -> Iterator[None]:
    """No garbage collection meanwhile: results hold no cycles, and looking for some in millions of points takes as long
    as to read them."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _metrics(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(name for group in groups for result in group.finished for name in result.metrics))


def _best_first(groups: Sequence[Group], headline: Measure) -> tuple[Group, ...]:
    def rank(group: Group) -> tuple[bool, float]:
        return not group.finished, headline.rank(mean(group.figure(headline.name)))

    return tuple(sorted(groups, key=rank))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)


def _add_rest(table: Table, groups: Sequence[Group]) -> None:
    """A line for the groups that have no row, where there are too many."""
    if len(groups) > MOST_ROWS:
        table.add_row(f"[dim]and {len(groups) - MOST_ROWS} more[/dim]")


def _named(names: Sequence[str]) -> str:
    """The names in a sentence, cut where they are too many."""
    more = f", and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _short(name: str) -> str:
    return {"val_loss": "val", "identity_recall": "recall"}.get(name, name.replace("_", " "))
