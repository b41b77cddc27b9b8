"""Which settings are tried for a cell before its runs: the same number for every cell, in an order that is fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import sparse_zoo as zoo
from experiments.analysis.trials import Trial, TriedCell, choose
from experiments.config.resolve import Config
from experiments.sweep.grid import Choice, axis, joined
from experiments.sweep.schema import Written
from experiments.tracking.schema import TrialFile
from experiments.tracking.store import Cell, Result, read
from lit_modules.settings import Optim
from sparse_zoo.errors import refuse

AS_WRITTEN = "as_written"  # names the trial of a cell that nothing is laid over


def list_trials(
    label: str, config: Config, written: Written, identify: Callable[[dict[str, Any]], str]
) -> list[Choice]:
    """Return the settings that are tried for a cell: names, and overrides of the cell as written.

    The first is the cell as written, the second its method's defaults of all settings that are tried. The others are
    the combinations of the listed values, ordered by how far down the lists their values stand.

    Args:
        label: The cell's name.
        config: The cell as written, resolved.
        written: The sweep file, with a `tune` section.
        identify: The id that a run of the cell has with some overrides; of settings with one id the first is tried.

    Raises:
        ZooError: if there are fewer settings than trials.
    """
    tune = written.tune
    assert tune is not None
    own = tune.cells[label] if label in tune.cells else _knob_values(config)
    shared = _learning_rates(config, tune.trials) if tune.shared is None else tune.shared
    listed = own | {key: values for key, values in shared.items() if key not in own}
    defaults = {key: axis(key, [value]) for key in listed for value in _other_default(key, config)}
    axes = [[("", {}), *defaults.get(key, []), *axis(key, values)] for key, values in listed.items()]
    found: dict[str, Choice] = {}
    for name, settings in ((AS_WRITTEN, {}), joined([one for each in defaults.values() for one in each]), *_walk(axes)):
        if len(found) < tune.trials:
            found.setdefault(identify(settings), (name, settings))
    few = f"{label} has {len(found)} different settings, and tune.trials is {tune.trials}"
    advice = f"list more values under tune.cells.{label} or tune.shared, or try fewer"
    refuse(f"tune: {label}", [] if len(found) == tune.trials else [f"{few}. To mend it {advice}"])
    return list(found.values())


def choose_trials(
    sweep: str, by: str | None, tried: Mapping[str, Sequence[TrialFile]], cells: Sequence[Cell]
) -> dict[str, Trial | None]:
    """Return the best trial of every cell whose trials have ended; None where none of them has a score.

    Args:
        sweep: The sweep of the trials.
        by: The measure that chooses, see `experiments.analysis.trials.choose_measure`.
        tried: The names and settings of the trials, by cell.
        cells: The runs of all trials.
    """
    runs: dict[str, list[Result]] = {}
    for cell in cells:
        runs.setdefault(str(cell.group), []).append(read(cell, sweep))
    found = [
        TriedCell(name, tuple(Trial(one["name"], one["settings"], tuple(runs[one["name"]])) for one in own))
        for name, own in tried.items()
    ]
    return choose(sweep, by, found)


def _other_default(key: str, config: Config) -> list[Any]:
    """A method's default of a setting that the cell as written has another value of; nothing where it has none."""
    attention, (section, _, setting) = config["attention"], key.partition(".")
    if section != "attention" or not isinstance(attention, dict) or setting not in attention:
        return []
    declared = zoo.settings(attention["name"]).get(setting)
    if declared is None or declared.required:
        return []
    value = list(declared.default) if isinstance(declared.default, tuple) else declared.default
    return [] if value == attention[setting] else [value]


def _walk(axes: Sequence[Sequence[Choice]]) -> Iterator[Choice]:
    """All combinations, those first whose values stand early in their lists, and early axes varied first."""
    places = product(*(range(len(values)) for values in axes))
    for at in sorted(places, key=lambda at: (sum(at), [-place for place in at])):
        chosen = [values[place] for values, place in zip(axes, at, strict=True)]
        yield joined([choice for choice in chosen if choice[1]])


def _knob_values(config: Config) -> dict[str, list[Any]]:
    """Half and twice the number that a cell's knob is set to; none where a budget is solved, or without such a knob."""
    attention = config["attention"]
    knob = zoo.get(attention["name"]).knob if isinstance(attention, dict) else None
    if knob is None or config.get("match"):
        return {}
    value = attention.get(knob.setting, zoo.settings(attention["name"])[knob.setting].default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {}
    low, high = sorted((knob.low, knob.high))
    near = [value // 2, value * 2] if isinstance(value, int) else [value / 2, value * 2]
    return {f"attention.{knob.setting}": [min(max(one, low), high) for one in near]}


def _learning_rates(config: Config, count: int) -> dict[str, list[float]]:
    """The learning rate of the blocks halved, doubled, quartered and so on, `count` values."""
    key = "muon_lr" if config["optim"].get("optimizer") == "muon" else "lr"
    rate = config["optim"].get(key, getattr(Optim(), key))
    factors = [factor for power in range(1, count + 1) for factor in (0.5**power, 2.0**power)]
    return {f"optim.{key}": [float(f"{rate * factor:.4g}") for factor in factors[:count]]}
