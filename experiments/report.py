"""What a sweep found, from the results on disk: means, intervals, tests; a JSON object, tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from experiments.effects import Cells, Effect, effects
from experiments.measures import BESIDE, CONTROLS, COSTS, FIGURES, HEADLINES, NO_CONTROLS, RECALL, WHOLE, Measure
from experiments.statistics import Difference, Figure, Films, detectable, differences, letters, over_films
from experiments.store import Result, asked_before, home, read, read_sweep, write_json
from sparse_zoo.errors import refuse, unknown

MEASURES_ABREAST = 5  # columns of measures in a terminal 80 wide
FEW_SEEDS = 5  # up to here the sign-flip test cannot rule chance out at 5 %: 2 / 2^5 is more


@dataclass(frozen=True)
class Group:
    """Runs of a sweep that differ by their seed alone, by the name that they share; most often there is one run.

    `of` is the group that a run was taken from to stand alone, `sweep` the other sweep that a control was found in.
    """

    name: str
    results: tuple[Result, ...]
    of: str | None = None
    sweep: str | None = None

    @property
    def finished(self) -> list[Result]:
        return [result for result in self.results if result.status == "finished"]

    @property
    def one(self) -> Result:
        """The run that stands for all where one must: the first that finished, or else the first."""
        return (self.finished or self.results)[0]

    @property
    def control(self) -> str | None:
        """Which control the group is, by its name or its method: one of `CONTROLS`, None for a method."""
        name, attention = self.of or self.name, self.one.attention
        method = attention["name"] if isinstance(attention, dict) else None
        return None if name in NO_CONTROLS else CONTROLS.get(name) or CONTROLS.get(str(method))

    @property
    def remark(self) -> str:
        """What a reader must know beside the name: which control it is, and whence, or that it is none; or nothing."""
        told = self.control or NO_CONTROLS.get(self.of or self.name, "")
        return f"{told}, of {self.sweep}" if self.sweep else told

    @property
    def titled(self) -> str:
        """The name with the remark, in plain text."""
        return f"{self.name} ({self.remark})" if self.remark else self.name

    def values(self, name: str) -> dict[int, float]:
        """Of a measure, by seed, over the finished runs that have it."""
        found = {r.seed: getattr(r, name) if name in FIGURES else r.metrics.get(name) for r in self.finished}
        return {seed: value for seed, value in found.items() if value is not None}

    def figure(self, name: str) -> Figure | None:
        """Mean and interval of one of `FIGURES` or of the sample metrics."""
        return Figure.of([*self.values(name).values()], Measure.of(name).bounds)

    def source(self, name: str) -> str:
        """Where a figure comes from, a line per run: the value, the file that holds it, the commit."""
        where = name if name in FIGURES else f"metrics.{name}"
        values = self.values(name)
        return "\n".join(
            f"{number(values[r.seed], 4)}  {where} in {Path(r.folder).name}/result.json, commit {_commit(r)[:9]}"
            for r in self.finished
            if r.seed in values
        )


@dataclass(frozen=True)
class Line:
    """What methods are read against: a group, or chance where there is none, or, if `missing`, why it is not there."""

    label: str
    group: Group | None = None
    missing: str = ""

    @property
    def title(self) -> str:
        """The label, or the name of a group of another name or of a single run."""
        if self.group is None:
            return self.label
        if self.group.name in CONTROLS:
            return self.group.remark
        return self.group.name if self.group.of else self.group.titled


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
    def of(name: str, by: str | None = None) -> Report:
        """The sweep of that name among the runs, by a measure of one's choice; raises `ZooError` where there is none.

        By default the headline is the first of `HEADLINES` that any finished run has. A cost is none.
        """
        asked = read_sweep(name)
        by_name: dict[str, list[Result]] = {}
        for cell in asked.cells:
            by_name.setdefault(cell.group or cell.name, []).append(read(cell, name))
        groups = [Group(key, tuple(runs)) for key, runs in by_name.items()]
        known = [key for key in (*FIGURES, *_metrics(groups)) if key not in COSTS]
        measured = [key for key in known if any(group.values(key) for group in groups)]
        refuse(f"report {name}", [unknown("measure", by, measured)] if by is not None and by not in measured else [])
        headline = Measure.of(by or next((key for key in HEADLINES if key in measured), HEADLINES[-1]))
        refuse(
            f"report {name}",
            [f"whether more or less {headline.label} is better is not known, so nothing can be ranked by it"]
            if headline.higher is None
            else [],
        )
        memory = RECALL in _metrics(groups)
        elsewhere = _controls_elsewhere(name, groups) if memory else ()
        return Report(name, asked.about, _best_first(groups, headline), headline, asked.command, elsewhere)

    @property
    def results(self) -> list[Result]:
        return [result for group in self.groups for result in group.results]

    @property
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
        return {", ".join(result.name for result in some): some[0] for some in alike.values()}

    @property
    def measured(self) -> list[Group]:
        """The groups that have the headline."""
        return [group for group in self.groups if group.values(self.headline.name)]

    @property
    def memory(self) -> bool:
        """Whether any finished run was asked for what earlier shots showed."""
        return RECALL in self.measures

    @property
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

    @property
    def rows(self) -> list[Group]:
        """The groups that any run finished of, as the leaderboard has them: methods, then controls."""
        return self.ranked + [line.group for line in self.lines if line.group]

    @property
    def best(self) -> Group | None:
        """The first of the leaderboard, if it has the headline."""
        return next((group for group in self.rows if group.values(self.headline.name)), None)

    @property
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

    @property
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
        return sorted({_commit(result) for result in self.finished})

    @cached_property
    def differences(self) -> list[Difference]:
        """Every pair of groups that have the headline, in their order, better first."""
        return differences({group.name: group.values(self.headline.name) for group in self.measured})

    @property
    def tested(self) -> list[Difference]:
        return [pair for pair in self.differences if pair.p is not None]

    @cached_property
    def films(self) -> list[Films]:
        """The same pairs, by the films that the models at hand judged, where they kept outcomes of the same films."""
        name = self.headline.name
        judged = [(group, {r.seed: r.films[name] for r in group.finished if name in r.films}) for group in self.groups]
        same = [group.one.config.get("data") for group, kept in judged if kept]
        if any(data != same[0] for data in same):
            return []
        return over_films({group.name: kept for group, kept in judged if kept})

    @cached_property
    def letters(self) -> dict[str, str]:
        """Groups that share a letter were not told apart; empty where nothing could be tested."""
        held = [(pair.a, pair.b) for pair in self.differences if pair.holds]
        return letters([group.name for group in self.measured], held) if self.tested else {}

    @cached_property
    def effects(self) -> list[Effect]:
        """What each setting that differs between cells does to the headline."""
        values = [Cells(group.name, group.one.config, group.values(self.headline.name)) for group in self.measured]
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

    def singly(self) -> Report:
        """The same with every run a group of its own."""
        singles = [Group(result.name, (result,), group.name) for group in self.groups for result in group.results]
        elsewhere = [Group(r.name, (r,), group.name, group.sweep) for group in self.elsewhere for r in group.results]
        return replace(self, groups=_best_first(singles, self.headline), elsewhere=tuple(elsewhere))

    def to_json(self) -> dict[str, Any]:
        """{"name", "cells", "groups", "headline", "command", "verdict", "caution", "differences", "films", "effects"}.

        A group names its cells; its figures are `Figure`s over those that finished, its letters those of `letters`.
        null stands for what was not measured.
        """
        groups = [
            {
                "name": group.name,
                "cells": [result.name for result in group.results],
                "control": group.control,
                "letters": self.letters.get(group.name),
                "figures": {
                    key: asdict(figure) if (figure := group.figure(key)) else None for key in (*FIGURES, *self.measures)
                },
            }
            for group in self.groups
        ]
        return {
            "name": self.name,
            "cells": [result.to_json() for result in self.results],
            "groups": groups,
            "headline": self.headline.name,
            "command": self.command,
            "verdict": self.verdict,
            "caution": self.caution,
            "differences": [asdict(pair) | {"holds": pair.holds} for pair in self.differences],
            "films": [asdict(pair) | {"holds": pair.holds} for pair in self.films],
            "effects": [asdict(effect) for effect in self.effects],
        }

    def write(self) -> Path:
        """Write `report.json` and `report.html` into the sweep's folder; the path of the page."""
        from experiments.page import html  # here: matplotlib takes a second to import, for which no terminal need wait

        folder = home() / self.name
        write_json(folder / "report.json", self.to_json())
        page = folder / "report.html"
        page.write_text(html(self))
        return page

    def tables(self, *, runs: bool = False) -> list[Table]:
        """For a terminal: the leaderboard, and the other measures; of single `runs`, or means over seeds."""
        shown = self.singly() if runs else self
        several, head = shown.seeds > 1, self.headline
        title = f"{self.name}: {len(self.finished)} of {len(self.results)} cells finished, by {head.label}"
        if several:
            title += (
                f"; means over up to {shown.seeds} seeds, their 95 % intervals; who shares a letter was not told apart"
            )
        table = _table(title)
        spread = ("95 %", "", "n") if several else ("first", "last")
        for name in (
            "cell",
            _short(head.name),
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
            table.add_row(title, number(mean(figure)), *own, *costs, *([] if several else [group.one.kernel]))

        for group in shown.ranked:
            add(group, group.name)
        table.add_section()
        for line in shown.lines:
            if line.group:
                add(line.group, line.title)
            elif line.missing:
                table.add_row(f"{line.title}: {line.missing}")
            else:
                table.add_row(line.title, number(shown.chance.get(head.name)))
        for group in shown.groups:
            for status in dict.fromkeys(r.status for r in group.results if r.status != "finished"):
                table.add_row(group.name, f"[red]{status}[/red]")
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
                table.add_column(columns[name], justify="right", overflow="fold")
            for group in self.rows:
                table.add_row(group.name, *(half(group.figure(name)) for name in names))
            if any(name in self.chance for name in names):
                table.add_row("[dim]chance[/dim]", *(number(self.chance.get(name)) for name in names))
            yield table


def _controls_elsewhere(name: str, groups: Sequence[Group]) -> tuple[Group, ...]:
    """Controls that these groups of sweep `name` lack, finished in another sweep, alike but for their attention."""
    worlds = [_world(result.config) for group in groups for result in group.finished]
    lacking = {*CONTROLS.values()} - {group.control for group in groups}
    if not lacking or any(world != worlds[0] for world in worlds):
        return ()
    found: dict[str, Group] = {}
    for path in sorted(home().glob("*/sweep.json")):
        other = path.parent.name
        asked = asked_before(other) if other != name else None
        runs: dict[str, list[Result]] = {}
        for cell in asked.cells if asked else ():
            if _world(cell.config) == worlds[0] and (result := read(cell, other)).status == "finished":
                runs.setdefault(cell.group or cell.name, []).append(result)
        for key, results in runs.items():
            group = Group(key, tuple(results), sweep=other)
            if group.control in lacking:
                found.setdefault(str(group.control), group)
    return tuple(found.values())


def _world(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is apart from its attention and seed."""
    data = {key: value for key, value in config.get("data", {}).items() if key != "seed"}
    return {key: value for key, value in config.items() if key not in ("attention", "match", "seed")} | {"data": data}


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


def mean(figure: Figure | None) -> float | None:
    return None if figure is None else figure.mean


def interval(figure: Figure | None) -> str:
    """`[0.863, 1.000]`, nothing of one run."""
    return "" if figure is None or figure.low is None else f"[{number(figure.low)}, {number(figure.high)}]"


def half(figure: Figure | None) -> str:
    """`0.941`, or with several runs `.941±.012`, half of the interval before it is cut."""
    if figure is None or figure.sd is None:
        return number(mean(figure))
    return "±".join(number(value).removeprefix("0") for value in (figure.mean, figure.half))


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """`+0.035`; a difference that three digits would hide has one that counts."""
    if value is None:
        return "–"
    return f"{value:+.1g}" if 0 < abs(value) < 0.001 else f"{value:+.3f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def giga(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e9:.3g}"


def mib(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:.0f} MiB"


def p_value(value: float | None) -> str:
    return "–" if value is None else "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def settings(attention: dict[str, Any] | list[dict[str, Any]], without: Iterable[str] = ()) -> str:
    """`moc · top_k 2 · anchors text` for people, `without` some keys; layers that differ are joined:
    `dense ×2 / moc · top_k 2 ×10`."""
    if isinstance(attention, list):
        named = groupby(settings(layer, without) for layer in attention)
        alike = [(name, len(list(layers))) for name, layers in named]
        return " / ".join(name if count == 1 else f"{name} ×{count}" for name, count in alike)
    kept = {key: value for key, value in attention.items() if key not in without}
    return " · ".join(str(value) if key == "name" else f"{key} {plain(value)}" for key, value in kept.items())


def plain(value: Any) -> str:
    """The value of a setting for people."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key}: {plain(inner)}" for key, inner in value.items()) + ")"
    if isinstance(value, list | tuple):
        return ("×" if value and isinstance(value[0], int) else "+").join(map(plain, value)) or "none"
    return "off" if value is None else value if isinstance(value, str) else json.dumps(value)


def _metrics(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(name for group in groups for result in group.finished for name in result.metrics))


def _best_first(groups: Sequence[Group], headline: Measure) -> tuple[Group, ...]:
    def rank(group: Group) -> tuple[bool, float]:
        return not group.finished, headline.rank(mean(group.figure(headline.name)))

    return tuple(sorted(groups, key=rank))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)


def plain_values(values: Sequence[Any]) -> str:
    """The value of a setting, or of several that change together, for people."""
    return ", ".join(plain(value) for value in values)


def _short(name: str) -> str:
    return {"val_loss": "val", "identity_recall": "recall"}.get(name, name.replace("_", " "))


def _commit(result: Result) -> str:
    return str(result.provenance.get("commit", "unknown")) + ("+" if result.provenance.get("changed since") else "")
