"""A sweep: a YAML file becomes cells."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import sparse_zoo as zoo
from experiments.config.names import Override
from experiments.config.resolve import Config, check, known, merge
from experiments.config.resolve import cell as make_cell
from experiments.sweep.budget import Unreached, shared_reach, solved, with_settings
from experiments.sweep.grid import Choice, matches
from experiments.sweep.preflight import error_reason, first_of_groups
from experiments.sweep.schema import SWEEPS, Written, find
from experiments.sweep.tuning import choose_trials, list_trials
from experiments.tracking.schema import TrialFile, TuningFile
from experiments.tracking.store import TRIALS, Cell, SweepRequest, last_request
from sparse_zoo.errors import ZooError, refuse, unknown_setting

__all__ = ["SWEEPS", "Sweep", "find", "read"]

LONGEST = 200  # bytes of a name: file systems take 255, of which an id and suffixes have their share


@dataclass(frozen=True)
class Trials:
    """The trials of a sweep, a sweep of their own, and the plan that says which of them belong to which cell.

    `waiting` names the cells whose trials have not all ended, which are as they were written; `failed` those whose
    trials have ended, none of them with a score.
    """

    sweep: Sweep
    plan: TuningFile
    waiting: tuple[str, ...]
    failed: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """A name, one line about it, its cells, and what is tried for them before they run."""

    name: str
    about: str
    cells: tuple[Cell, ...]
    trials: Trials | None = None

    @property
    def request(self) -> SweepRequest:
        """What is written down of it when it runs."""
        return SweepRequest(self.about, self.cells, tuning=self.trials.plan if self.trials else None)

    @property
    def ready(self) -> Sweep:
        """This with the cells alone whose settings were chosen: all, unless some are tried first."""
        waiting = {*self.trials.waiting, *self.trials.failed} if self.trials else set()
        return replace(self, cells=tuple(cell for cell in self.cells if (cell.group or cell.name) not in waiting))


def read(
    path: Path,
    overrides: Sequence[Override] = (),
    size: str | None = None,
    told: Callable[[str], object] = lambda _: None,
) -> Sweep:
    """The sweep in a file, every cell resolved, checked and its budget solved; raises `ZooError` with all reasons.

    The file's keys:

    - `name` (by default the file's) and `about`, one line.
    - `base`: overrides of every cell.
    - `axes`: a mapping of dotted key -> values, whose product makes cells. The values are a list, or a mapping of
      label -> value where the values themselves are too long for a name.
    - `zip`: a mapping of dotted key -> list, walked in step, or a list of such mappings; each multiplies with the axes.
    - `exclude`: a mapping of dotted key -> value or list of values, or a list of such mappings: cells whose resolved
      settings match all of one are left out.
    - `cells`: a mapping of cell name -> overrides, for single cells besides.
    - `seeds`: how many runs of each cell, with seeds 0, 1, ..., or a list of seeds; names end in -s0, -s1, ...
    - `tune`: how settings are tried before the cells run, see `sweep.schema.Tune`. The trials are a sweep of their own,
      named NAME-trials. A cell whose trials have ended has the settings of the best.
    - `match`: what every cell is to cost, see `sweep.budget`; null in a cell's own overrides leaves it as it is.
      Solved for the first seed, and for all alike.
    - `sizes`: a mapping of size -> overrides, of which `size` lays one between `base` and the cells. The sweep of a
      size is another one, named NAME-SIZE.
    - `plugins`: files of methods, beside this file.
    - `extends`: a sweep file beside this one, or one that comes along by its name, of which all but the cells holds
      here too: its `seeds`, `plugins` and `about` where this one has none, its `base`, `match` and `sizes` below this
      one's.

    `overrides` go on top of all. `told` hears the name of each cell whose budget is solved.
    """
    written = Written.of(path, size)
    name, rules = written.name, written.rules
    for plugin in written.plugins:
        zoo.load_plugin(plugin)
    drafts = _drafts(written.choices, written.seeds)
    reasons = _resolve(drafts, written.below, overrides, written.keys)
    idle = [rule for rule in rules if not any(matches(draft.config, rule) for draft in drafts)]
    reasons += [f"exclude {rule} leaves out no cell" for rule in idle]
    drafts = [draft for draft in drafts if not any(matches(draft.config, rule) for rule in rules)]
    reasons += [] if drafts else ["exclude leaves out every cell"]
    reasons += _wrong(drafts) + _misnamed(name, drafts)
    refuse(f"sweep {name}", reasons)
    if written.tune is None:
        return Sweep(name, written.about, tuple(_distinct(_matched(drafts, name, told), name)))

    _distinct([make_cell(draft.name, draft.config) for draft in drafts], name)
    drafted, tried = _trials(written, drafts, overrides)
    beside = f"{name}{TRIALS}"
    trials = Sweep(beside, f"Settings tried for {name}.", tuple(_matched(drafted, beside, told)))
    best = choose_trials(beside, written.tune.by, tried, trials.cells)
    chosen = {label: trial for label, trial in best.items() if trial is not None}
    for draft in drafts:
        draft.own |= chosen[draft.label].settings if draft.label in chosen else {}
    refuse(f"sweep {name}", _resolve(drafts, written.below, overrides, {}))
    plan = TuningFile(
        sweep=beside,
        seeds=written.tune.seeds,
        by=written.tune.by,
        cells=tried,
        chosen={label: trial.name for label, trial in chosen.items()},
    )
    waiting, failed = ([label for label in tried if best.get(label, "") == other] for other in ("", None))
    return Sweep(
        name,
        written.about,
        tuple(_matched(drafts, name, told)),
        Trials(trials, plan, tuple(waiting), tuple(failed)),
    )


@dataclass
class _Draft:
    """A cell before it is checked: its overrides; then its config, and why some of them could not be laid over it."""

    name: str
    group: str | None
    own: dict[str, Any]
    config: Config = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The name without the seed."""
        return self.group or self.name


def _drafts(choices: Sequence[Choice], seeds: Sequence[int] | None) -> list[_Draft]:
    if seeds is None:
        return [_Draft(label, None, own) for label, own in choices]
    return [_Draft(f"{label}-s{n}", label, own | {"seed": n}) for label, own in choices for n in seeds]


def _first_drafts(drafts: Iterable[_Draft]) -> dict[str, _Draft]:
    """Of drafts that differ by their seed alone the first, by the name that they share."""
    first: dict[str, _Draft] = {}
    for draft in drafts:
        first.setdefault(draft.label, draft)
    return first


def _trials(
    written: Written, drafts: Sequence[_Draft], overrides: Sequence[Override]
) -> tuple[list[_Draft], dict[str, list[TrialFile]]]:
    """The trials of these cells, resolved; and by cell the names and settings of its own. Raises `ZooError`."""
    tune = written.tune
    assert tune is not None
    used = sorted({draft.config["seed"] for draft in drafts} & {*tune.seeds})
    both = f"{', '.join(map(str, used))} are seeds of the cells' own runs too; try settings with other seeds"
    reasons = [f"tune.seeds: {both}"] if used else []
    labels = [draft.label for draft in drafts]
    reasons += [f"tune.cells: exclude leaves out {label!r}" for label in tune.cells if label not in labels]
    steps = {} if tune.max_steps is None else {"trainer.max_steps": tune.max_steps}
    trials: list[_Draft] = []
    tried: dict[str, list[TrialFile]] = {}
    for draft in _first_drafts(drafts).values():

        def identify(settings: dict[str, Any], draft: _Draft = draft) -> str:
            try:
                return make_cell(draft.name, merge([*written.below, draft.own | settings, *overrides])[0]).id
            except ZooError:
                return repr(settings)  # what is wrong is told with the other trials

        try:
            choices = list_trials(draft.label, draft.config, written, identify)
        except ZooError as error:
            reasons.append(str(error))
            continue
        tried[draft.label] = [{"name": f"{draft.label}-{name}", "settings": own} for name, own in choices]
        trials += [
            _Draft(f"{draft.label}-{name}-s{seed}", f"{draft.label}-{name}", draft.own | own | steps | {"seed": seed})
            for name, own in choices
            for seed in tune.seeds
        ]
    refuse(f"sweep {written.name}", reasons)
    reasons = _resolve(trials, written.below, overrides, {}) + _wrong(trials)
    refuse(f"sweep {written.name}", reasons + _misnamed(f"{written.name}{TRIALS}", trials))
    return trials, tried


def _resolve(
    drafts: Sequence[_Draft], below: Sequence[Override], overrides: Sequence[Override], keys: Mapping[str, set[str]]
) -> list[str]:
    """Give every draft its config. Of `keys`, by kind, those that no config knows are told once, and then left out."""

    def lay(without: Iterable[str]) -> None:
        for draft in drafts:
            own = {key: value for key, value in draft.own.items() if key not in without}
            try:
                draft.config, draft.wrong = merge([*below, own, *overrides])
            except ZooError as error:
                draft.wrong = [str(error)]

    lay(without=())
    # What a config knows follows from its classes alone.
    kinds = {
        repr([_names(draft.config[key]) for key in ("attention", "data")]): draft.config
        for draft in drafts
        if draft.config
    }
    names = set().union(*map(known, kinds.values()))
    strange = {key: kind for kind, own in keys.items() for key in sorted(own) if not names & {key, _two_deep(key)}}
    if strange and names:
        lay(without=strange)
    return [unknown_setting(key, _like(key, names), kind) for key, kind in strange.items() if names]


def _misnamed(sweep: str, drafts: Sequence[_Draft]) -> list[str]:
    """Why a sweep and its cells cannot have their names; nothing if they can."""
    labels = [draft.name for draft in drafts]
    reasons = _unfit("sweep", sweep)
    reasons += [reason for label in dict.fromkeys(labels) if label != sweep for reason in _unfit("cell", label)]
    return reasons + [f"two cells are named {label!r}" for label, count in Counter(labels).items() if count > 1]


def _distinct(cells: Sequence[Cell], sweep: str) -> Sequence[Cell]:
    """The cells, of which no two have the same config; raises `ZooError` if some have."""
    by_id: dict[str, str] = {}
    reasons = [
        f"cells {by_id[cell.id]!r} and {cell.name!r} are the same config"
        for cell in cells
        if by_id.setdefault(cell.id, cell.name) != cell.name
    ]
    refuse(f"sweep {sweep}", reasons)
    return cells


def _unfit(kind: str, name: str) -> list[str]:
    """Why a name cannot be a folder's, nor stand in quotes where MLflow is asked for a run; nothing if it can."""
    apart = re.fullmatch(r"[^/\\'\"\x00-\x1f\ud800-\udfff]+", name) and name not in (".", "..")
    fit = apart and len(name.encode()) <= LONGEST
    limits = f"1 to {LONGEST} bytes, without slashes, quotes, line breaks and what is no text"
    return [] if fit else [f"a {kind}'s name is that of its folder: {limits}; got {name!r}"]


def _names(part: Any) -> Any:
    """The name of a method or of data; None of a list for the layers."""
    return part.get("name") if isinstance(part, Mapping) else None


def _two_deep(key: str) -> str:
    return ".".join(key.split(".")[:2])


def _like(key: str, names: set[str]) -> list[str]:
    """The names among which one may have meant a key: of its section, or of its last part in others."""
    section, _, last = key.rpartition(".")
    inside = [name for name in names if name.startswith(f"{section}.")] if section else []
    elsewhere = [name for name in names if name.endswith(f".{last}")]
    return inside or elsewhere or [name for name in names if "." not in name]


def _wrong(drafts: Sequence[_Draft]) -> list[str]:
    """Why cells cannot run, of those that differ by their seed alone the first; what all have in common once."""
    found = {label: draft.wrong or check(draft.config) for label, draft in _first_drafts(drafts).items()}
    common = [reason for reason in next(iter(found.values()), []) if all(reason in own for own in found.values())]
    if len(found) == 1:
        common = []
    own = ((label, reason) for label, reasons in found.items() for reason in reasons if reason not in common)
    return [f"every cell: {reason}" for reason in common] + [f"cell {label}: {reason}" for label, reason in own]


def _matched(drafts: Sequence[_Draft], sweep: str, told: Callable[[str], object]) -> list[Cell]:
    """The cells with their budgets solved, once for those that differ by their seed alone."""
    cells = [make_cell(draft.name, draft.config, draft.group) for draft in drafts]
    asked = last_request(sweep)
    earlier = [cell.config for cell in asked.cells] if asked else []
    found, reasons, unreached = {}, [], False
    for label, cell in first_of_groups(cells).items():
        if "match" not in cell.config:
            continue
        told(label)
        try:
            found[label] = solved(cell.config, earlier)["match"]["set"]
        except (Exception, SystemExit) as error:  # of a plug-in, which may raise anything; the others' are told beside
            reasons.append(f"cell {label}: {error_reason(error)}")
            unreached = unreached or isinstance(error, Unreached)
    if unreached:
        reasons += shared_reach(
            {x: cell.config for x, cell in first_of_groups(cells).items() if "match" in cell.config}
        )
    refuse(f"sweep {sweep}", reasons)
    groups = [cell.group or cell.name for cell in cells]
    return [
        make_cell(cell.name, with_settings(cell.config, found[group]), cell.group) if group in found else cell
        for cell, group in zip(cells, groups, strict=True)
    ]
