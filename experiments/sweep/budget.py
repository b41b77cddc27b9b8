"""Equal budgets: the setting that a method declares as its knob, solved so that the measured cost is what was asked."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import sparse_zoo as zoo
from experiments.analysis.metrics import TOLERANCE
from experiments.config.budget import Budget
from experiments.config.resolve import Config, attention_shape, refusals, resolve
from experiments.sweep.preflight import layer_settings, run_preflight, step_seconds
from experiments.tracking.identity import identity
from lit_modules.flops import ModelShape, inner
from sparse_zoo.errors import ZooError, refuse
from sparse_zoo.simulate import simulate

POINTS = 1 << 14  # a range of fractions is searched at so many values
AROUND = 8  # values at either side that are measured too where bisection found nothing

Settings = dict[str, Any]
Measure = Callable[[Settings], float]


@dataclass(frozen=True)
class Solution:
    """The nearest to `goal` that was found: settings (the knob's last) and what they cost.

    below, above: with the same further settings, the knob's values nearest to the goal at either side, and their costs.
    within: how far the cost may be from the goal, relative to it. reach: the least and the most that the method can
    cost, known where the goal was missed.
    """

    goal: float
    settings: Settings
    cost: float
    below: tuple[Any, float] | None
    above: tuple[Any, float] | None
    within: float = TOLERANCE
    reach: tuple[float, float] | None = None

    @property
    def error(self) -> float:
        """Relative to the goal."""
        return abs(self.cost - self.goal) / self.goal

    @property
    def reached(self) -> bool:
        """Whether the cost is near enough to the budget."""
        return self.error <= self.within

    def why_not(self, knob: zoo.Knob, method: str, kind: str, advice: str) -> str:
        """What keeps the method from the goal, for people; with `advice` where other settings may reach it."""
        settings, reach = ", ".join(f"{key}={value}" for key, value in self.settings.items()), ""
        text = f"{method} cannot reach {kind} {self.goal:.4g}: the closest is {self.cost:.4g} at {settings}"
        if self.reach:
            low, high = self.reach
            reach = f"it can reach {low:.4g} to {high:.4g}, with {knob.setting} from {knob.low} to {knob.high}"
        if self.above is None or self.below is None:
            end = knob.high if self.above is None else knob.low
            bound = "lower" if end == min(knob.low, knob.high) else "upper"
            return text + (f", its {bound} bound" if self.settings[knob.setting] == end else "") + f"; {reach}"
        steps = ", ".join(f"{cost:.4g} at {knob.setting}={value}" for value, cost in (self.below, self.above))
        return f"{text}, not within {self.within:.3g} of it ({steps}); {reach}. {advice}"


def solve(
    knob: zoo.Knob,
    measure: Measure,
    goal: float,
    also: Mapping[str, Sequence[Any]] | None = None,
    accepts: Callable[[Settings], bool] = lambda _: True,
    within: float = TOLERANCE,
) -> Solution:
    """Turn a knob until `measure(settings)` is `within` of `goal`, relative to it, or as near as can be.

    Bisection, since cost never falls from the knob's low to its high; of several sizes, as a window's, the last is
    bisected for every choice of the others. The nearest value is taken; of equally near ones the first from low, of
    several sizes the most even. With `also`, {setting: candidates}, all this for one choice of candidates after the
    other, until one is near enough. Where none is, more values around the nearest are measured: with a random
    router cost rises in the mean alone. `accepts(settings)`, without measuring, tells whether the method takes even
    numbers where a range goes from odd to odd.
    """
    ranges = _ranges(knob, measure, also, accepts)
    for search in (_Range.bisect, _Range.look_around):
        for each in ranges:
            search(each, goal)
            if (found := replace(each.nearest(goal), within=within)).reached:
                return found
    nearest = min((each.nearest(goal) for each in ranges), key=lambda found: found.error)
    return replace(nearest, within=within, reach=_reach(ranges))


def _ranges(
    knob: zoo.Knob,
    measure: Measure,
    also: Mapping[str, Sequence[Any]] | None,
    accepts: Callable[[Settings], bool],
) -> list[_Range]:
    """The range of a knob for each choice of candidates."""
    also = also or {}
    choices = (dict(zip(also, choice, strict=True)) for choice in product(*also.values()))
    return [_Range(knob, others, measure, accepts) for others in choices]


def _reach(ranges: Sequence[_Range]) -> tuple[float, float]:
    """The least and the most that these ranges cost: at their ends, or where else it was measured."""
    for each in ranges:
        for end in each.ends():
            each.cost(end)
    costs = [cost for each in ranges for cost in each.costs.values()]
    return min(costs), max(costs)


Place = tuple[int, ...]  # for each of a knob's sizes, the number of its value, from low; of a plain number, one


class _Range:
    """The values of a knob beside other settings, and what those cost that have been measured."""

    def __init__(self, knob: zoo.Knob, others: Settings, measure: Measure, accepts: Callable[[Settings], bool]) -> None:
        self.knob, self.others, self.measure = knob, others, measure
        self.several = isinstance(knob.low, list | tuple)
        lows, highs = (list(end) if self.several else [end] for end in (knob.low, knob.high))

        def accepted(axis: int, value: float) -> bool:
            sizes = [*lows[:axis], value, *lows[axis + 1 :]]
            return accepts(others | {knob.setting: sizes if self.several else value})

        ends = zip(lows, highs, strict=True)
        self.axes = [_values(low, high, partial(accepted, axis)) for axis, (low, high) in enumerate(ends)]
        self.costs: dict[Place, float] = {}

    def value(self, place: Place) -> Any:
        sizes = [axis[at] for axis, at in zip(self.axes, place, strict=True)]
        return sizes if self.several else sizes[0]

    def cost(self, place: Place) -> float:
        if place not in self.costs:
            self.costs[place] = self.measure(self.others | {self.knob.setting: self.value(place)})
        return self.costs[place]

    def ends(self) -> tuple[Place, Place]:
        """Where it costs least and most."""
        return tuple(0 for _ in self.axes), tuple(len(axis) - 1 for axis in self.axes)

    def nearest(self, goal: float) -> Solution:
        ranked = self._ranked(goal)
        sides = ([at for at in ranked if (self.costs[at] < goal) == below] for below in (True, False))
        below, above = ((self.value(side[0]), self.costs[side[0]]) if side else None for side in sides)
        best = ranked[0]
        return Solution(goal, self.others | {self.knob.setting: self.value(best)}, self.costs[best], below, above)

    def _ranked(self, goal: float) -> list[Place]:
        return sorted(self.costs, key=lambda at: (abs(self.costs[at] - goal), max(at) - min(at), at))

    def bisect(self, goal: float) -> None:
        """Measure the values at both sides of the goal."""
        *outer, last = self._ends()
        beyond = last
        for place in product(*map(range, outer)):
            # With more of the size before it, the last one crosses the goal no later, and costs more where it did.
            reach = last if not place or not place[-1] else beyond
            line = [(*place, at) for at in range(reach)]
            beyond = bisect_left(line, goal, key=self.cost)
            if not place:  # of a plateau the first value
                for end in line[max(0, beyond - 1) : beyond + 1]:
                    bisect_left(line, self.cost(end), key=self.cost)

    def _ends(self) -> list[int]:
        """How many values of each size there are until more of it buys nothing, the others being at their high ends."""
        high = tuple(len(axis) - 1 for axis in self.axes)
        if not self.several:
            return [high[0] + 1]
        lines = [[(*high[:axis], at, *high[axis + 1 :]) for at in range(end + 1)] for axis, end in enumerate(high)]
        return [bisect_left(line, self.cost(high), key=self.cost) + 1 for line in lines]

    def look_around(self, goal: float) -> None:
        """Where the goal lies between two whole numbers, measure some more at either side of it."""
        found, (at, *_) = self.nearest(goal), self._ranked(goal)[0]
        if isinstance(self.axes[0][0], int) and not self.several and found.below and found.above:
            for near in range(max(0, at - AROUND), min(len(self.axes[0]), at + AROUND + 1)):
                self.cost((near,))


def _values(low: float, high: float, accepted: Callable[[float], bool]) -> list[Any]:
    """From low to high: whole numbers, odd ones where both ends are odd and even ones refused; fractions at `POINTS`.

    Fractions have 5 digits; they are spaced evenly or, where the ends are a hundredfold apart, by a constant factor.
    """
    if isinstance(low, int) and isinstance(high, int):
        step = -1 if high < low else 1
        odd = low % 2 == high % 2 == 1 and low != high and not accepted(low + step)
        return list(range(low, high + step, 2 * step if odd else step))
    parts = [i / (POINTS - 1) for i in range(POINTS)]
    far = low > 0 and high > 0 and not 0.01 < high / low < 100
    values = [low * (high / low) ** part if far else low + (high - low) * part for part in parts]
    return list(dict.fromkeys(float(f"{value:.5g}") for value in values))


def solved(config: Config, earlier: Iterable[Config] = ()) -> Config:
    """The config with the settings in its attention that buy what its `match` asks; itself, if it asks for nothing.

    `match.set` then holds what was solved: settings, or with a method for each layer a list of them. Cost is measured
    on the config's own data with a freshly built model, see `sweep.preflight`; density in training mode, so that
    chunks dropped at random count as they will. In a list of layers, those whose method has no knob keep what they
    cost, and the others share the rest evenly. A solution among `earlier` configs is kept if it answers the same
    question and, unless it was timed, still holds.

    Raises `ZooError` with every reason why the target cannot be reached.
    """
    if not config.get("match") or "set" in config["match"]:
        return config
    budget = Budget.of(config["match"])
    for before in earlier:
        if "set" in (before.get("match") or {}) and _question(before) == _question(config):
            found = with_settings(config, before["match"]["set"])
            if budget.kind == "seconds" or abs(_total(budget, found) - budget.target) <= budget.within * budget.target:
                return found
    return with_settings(config, _solve(resolve(config), budget))  # methods are built while it is solved


class Unreached(ZooError):
    """A budget that a method cannot come near to."""


@dataclass(frozen=True)
class _Search:
    """The search for the knob of a distinct entry of a config's attention: `layers` are the numbers of those it fills.

    What is measured is the mean cost of these layers, or the seconds of a step.
    """

    config: Config
    budget: Budget
    entry: Settings
    layers: Sequence[int]
    knob: zoo.Knob

    def measure(self, settings: Settings) -> float:
        count = len(layer_settings(self.config))
        candidate = with_settings(self.config, [settings if i in self.layers else {} for i in range(count)])
        if self.budget.kind == "seconds":
            return _total(self.budget, candidate)
        costs = _by_layer(self.budget, candidate)
        return sum(costs[i] for i in self.layers) / len(self.layers)

    def accepts(self, settings: Settings) -> bool:
        own = attention_shape(self.config["model"])
        shape: dict[str, Any] = {"heads": own.heads, "head_dim": own.head_dim, "dim": own.dim}
        return not refusals(lambda: zoo.build(**self.entry, **settings, **shape))

    @property
    def also(self) -> Mapping[str, Sequence[Any]]:
        return self.budget.also.get(self.entry["name"], {})


def _searches(config: Config, budget: Budget) -> tuple[list[_Search], float]:
    """A search for each distinct entry whose method has a knob, and what the layers of the others cost together.

    Raises `ZooError` where no search can begin.
    """
    layers = layer_settings(config)
    entries = [layer for i, layer in enumerate(layers) if layer not in layers[:i]]
    knobs = {entries.index(x): knob for x in entries if (knob := zoo.get(x["name"]).knob) is not None}
    hindrances = _hindrances(entries, knobs, budget)
    if not knobs:
        names = ", ".join(dict.fromkeys(entry["name"] for entry in entries))
        hindrances.append(_without_knob(names, budget, _total(budget, config)))
    refuse("match", hindrances)
    found = [
        _Search(
            config, budget, entries[number], [i for i, layer in enumerate(layers) if layer == entries[number]], knob
        )
        for number, knob in knobs.items()
    ]
    turned = {i for each in found for i in each.layers}
    if budget.kind == "seconds" or len(turned) == len(layers):
        return found, 0.0
    return found, sum(cost for i, cost in enumerate(_by_layer(budget, config)) if i not in turned)


def _solve(config: Config, budget: Budget) -> Settings | list[Settings]:
    layers = layer_settings(config)
    searches, fixed = _searches(config, budget)
    # What each layer whose knob is turned is to cost.
    goal = budget.target
    if budget.kind != "seconds":
        total = budget.target * (len(layers) if budget.kind == "density" else 1)
        refuse("match", ["layers whose method has no knob take it all"] if total <= fixed else [])
        goal = (total - fixed) / sum(len(each.layers) for each in searches)
    each: list[Settings] = [{} for _ in layers]
    reasons = []
    for search in searches:
        found = solve(search.knob, search.measure, goal, search.also, search.accepts, budget.within)
        for i in search.layers:
            each[i] = found.settings
        if not found.reached:
            name = search.entry["name"]
            advice = f"Widen match.within, or let match.also.{name} vary another setting too"
            reasons.append(found.why_not(search.knob, name, budget.kind, advice))
    if reasons:
        raise Unreached("; ".join(reasons))
    return each if isinstance(config["attention"], list) else each[0]


def reach(config: Config) -> tuple[float, float]:
    """The least and the most that a config can cost with its knobs at their ends, as `Budget` counts it."""
    budget = Budget.of(config["match"])
    searches, fixed = _searches(config, budget)
    ends = [(len(x.layers), _reach(_ranges(x.knob, x.measure, x.also, x.accepts))) for x in searches]
    if budget.kind == "seconds":
        return ends[0][1]
    share = len(layer_settings(config)) if budget.kind == "density" else 1
    low, high = ((fixed + sum(count * costs[end] for count, costs in ends)) / share for end in (0, 1))
    return low, high


def shared_reach(configs: Mapping[str, Config]) -> list[str]:
    """For each kind of budget, which costs all configs that ask for it can reach; those without a knob apart."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name, config in configs.items():
        with suppress(ZooError):
            found.setdefault(Budget.of(config["match"]).kind, {})[name] = reach(config)
    lines = []
    for kind, ends in found.items():
        least, most = max(ends, key=lambda name: ends[name][0]), min(ends, key=lambda name: ends[name][1])
        low, high = ends[least][0], ends[most][1]
        lines.append(
            f"all cells can reach {kind} {low:.4g} to {high:.4g}"
            if low <= high
            else f"no {kind} is in reach of all cells: {least} costs at least {low:.4g}, {most} at most {high:.4g}"
        )
    return lines


def _hindrances(entries: Sequence[Settings], knobs: Mapping[int, zoo.Knob], budget: Budget) -> list[str]:
    """Why no search can begin."""
    reasons = []
    for number, entry in enumerate(entries):
        name, knob = entry["name"], knobs.get(number)
        if knob is None:
            continue
        turned = [knob.setting, *budget.also.get(name, {})]
        reasons += [f"{key} of {name} is to be solved: leave it out" for key in turned if key in entry]
        if entry.get("schedule"):
            reasons.append(f"{name} has a schedule, whose phases do not cost the same: leave it out")
    if budget.kind == "seconds" and len(knobs) > 1:
        reasons.append("seconds are those of all layers: only one of several methods may have a knob")
    return reasons


def _without_knob(names: str, budget: Budget, cost: float) -> str:
    """Why methods without a knob cannot meet a budget."""
    return (
        f"{names} has no knob that sets its cost: its {budget.kind} is always {cost:.4g}, got match.{budget.kind} "
        f"{budget.target:.4g}; `match: null` in a cell excludes it"
    )


def _by_layer(budget: Budget, config: Config) -> list[float]:
    return [layer.density if budget.kind == "density" else layer.flops for layer in run_preflight(config).layers]


def _total(budget: Budget, config: Config) -> float:
    """What a config costs, as `Budget` counts it."""
    if budget.kind == "seconds":
        seconds = step_seconds(config)
        refuse("match", ["there is no GPU here to time a step on"] if seconds is None else [])
        assert seconds is not None
        return seconds
    found = run_preflight(config)
    return found.density if budget.kind == "density" else found.attention_flops


def with_settings(config: Config, settings: Settings | list[Settings]) -> Config:
    """The config with these settings in its attention, or in that of each layer, and under `match.set`."""
    given = config["attention"]
    attention: Any = [layer | own for layer, own in zip(layer_settings(config), _each(config, settings), strict=True)]
    return config | {
        "attention": attention if isinstance(given, list) else attention[0],
        "match": config["match"] | {"set": settings},
    }


def _each(config: Config, settings: Settings | list[Settings]) -> list[Settings]:
    return settings if isinstance(settings, list) else [settings] * len(layer_settings(config))


def _question(config: Config) -> Config:
    """What decides a solution: the parts of an unsolved config that do."""
    asked = deepcopy({key: identity(config)[key] for key in ("data", "model", "flow", "attention", "match")})
    settings = asked["match"].pop("set", None)
    if settings is not None:
        layers = [asked["attention"]] if isinstance(settings, dict) else asked["attention"]
        for layer, own in zip(layers, [settings] if isinstance(settings, dict) else settings, strict=True):
            for key in own:
                layer.pop(key, None)
    return asked


def solved_alone(
    method: str,
    settings: Settings,
    asked: Mapping[str, Any],
    layout: zoo.Layout,
    shape: ModelShape,
    *,
    batch: int = 1,
    every_head: bool = False,
) -> Settings:
    """The same for a method by itself on random q and k, see `sparse_zoo.simulate`: the settings to add to its own.

    `layout` is the joint one, captions included. Raises `ZooError` where the target cannot be reached.
    """
    budget = Budget.of(asked)
    size: dict[str, Any] = {"heads": shape.heads, "head_dim": shape.head_dim, "dim": shape.dim}
    stream = inner(shape, layout)

    def measure(own: Settings) -> float:
        cost = simulate(method, stream, **size, batch=batch, settings=settings | own, every_head=every_head).cost
        return cost.density if budget.kind == "density" else shape.depth * total_flops(cost)

    return solve_knob(method, settings, budget, size, measure)


def total_flops(cost: zoo.Cost) -> int:
    """FLOPs of an attention, forward and backward, what deciding takes included."""
    return cost.flops + cost.flops_backward + cost.routing_flops


def solve_knob(method: str, settings: Settings, budget: Budget, size: Mapping[str, Any], measure: Measure) -> Settings:
    """The knob of a method by itself, turned until `measure` of the setting comes to the budget; `size`: its heads.

    Raises `ZooError` where it cannot.
    """
    knob = zoo.get(method).knob
    refuse("match", ["seconds can be matched in zoo train and zoo sweep alone"] if budget.kind == "seconds" else [])
    refuse("match", [] if knob else [_without_knob(method, budget, measure({}))])
    assert knob is not None
    refuse("match", _hindrances([{"name": method, **settings}], {0: knob}, budget))

    def accepts(own: Settings) -> bool:
        return not refusals(lambda: zoo.build(method, **size, **settings, **own))

    found = solve(knob, measure, budget.target, budget.also.get(method), accepts, budget.within)
    advice = f"Another setting of {method} may bring it nearer"
    refuse(f"match.{budget.kind}", [] if found.reached else [found.why_not(knob, method, budget.kind, advice)])
    return found.settings
