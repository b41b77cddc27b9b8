"""The `match` section of a config: the cost that every cell of a sweep is to have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sparse_zoo as zoo
from experiments.analysis.metrics import TOLERANCE
from experiments.config.declared import fits, parameters
from experiments.config.sections import Match
from sparse_zoo.errors import refuse, unknown, unknown_setting

KINDS = {
    "density": "attended share of pairs, mean over layers",
    "flops": "attention of one training step, forward and backward, routing included",
    "seconds": "one training step, forward and backward",
}


@dataclass(frozen=True)
class Budget:
    """What every method is to cost: one of `KINDS` and how much of it.

    `also`: for methods whose knob is too coarse, {method: {setting: candidates}}; they are tried in their order, each
    with the whole range of the knob, until one comes near enough. `within`: how far from the target, relative to it,
    is near enough.
    """

    kind: str
    target: float
    also: Mapping[str, Mapping[str, Sequence[Any]]]
    within: float = TOLERANCE

    @staticmethod
    def of(asked: Mapping[str, Any]) -> Budget:
        """From {"density": 0.16}, {"flops": 1e9} or {"seconds": 0.5}, with "within" and "also" or without.

        Raises `ZooError` with all reasons.
        """
        kinds = [key for key in asked if key in KINDS]
        also, within = asked.get("also", {}), asked.get("within", TOLERANCE)
        well = isinstance(also, Mapping) and all(isinstance(own, Mapping) for own in also.values())
        known = parameters(Match)
        reasons = [unknown("key of match", key, known) for key in asked if key not in known]
        reasons += (
            [] if len(kinds) == 1 else [f"match needs one of {', '.join(KINDS)}, got {', '.join(kinds) or 'none'}"]
        )
        reasons += [
            f"match.{kind} must be a number above 0, got {asked[kind]!r}"
            for kind in kinds
            if not fits(asked[kind], float) or not asked[kind] > 0
        ]
        if not fits(within, float) or not 0 < within < 1:
            reasons.append(f"match.within must be a number between 0 and 1, relative to the target, got {within!r}")
        reasons += [] if well else [f"match.also must be {{method: {{setting: candidates}}}}, got {also!r}"]
        for name, own in also.items() if well else ():
            if name not in zoo.names():
                reasons.append(unknown("method under match.also", name, zoo.names()))
                continue
            settings = [*zoo.settings(name)]
            reasons += [f"match.also.{name}: {unknown_setting(key, settings)}" for key in own if key not in settings]
            reasons += [
                f"match.also.{name}.{key} must be a list of candidates, got {values!r}"
                for key, values in own.items()
                if not isinstance(values, list) or not values
            ]
        refuse("match", reasons)
        return Budget(kinds[0], float(asked[kinds[0]]), also, float(within))
