"""The measures of a run: their labels, units and bounds, and whether more or less of one is better."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from experiments.tracking.store import Result

HEADLINES = ("identity_recall", "val_loss")  # measures that rank a leaderboard: the first that was measured
COSTS = ("density", "flops", "seconds_per_step")
# What methods can be compared at, and the figure that measures it: pairs, FLOPs of attention with all that belongs to
# it, seconds.
COST_SENSES = {"pairs": "density", "flops": "attention_flops", "seconds": "seconds_per_step"}
TOLERANCE = 0.02  # of a budget, within which a cost meets it
# Attributes of a `Result`; the others are in its `metrics`.
FIGURES = ("val_loss", "first_loss", "last_loss", *COSTS, "attention_flops")
RECALL = "identity_recall"  # where it was measured, the sweep is a test of memory across shots
WHOLE = "whole_"  # begins the names of what is measured of films drawn wholly from noise, not of their last shot alone
# What a test of memory is read with: a column each beside recall, under these names.
BESIDE = {
    "shape_recall": "shape",
    "colour_recall": "colour",
    "texture_recall": "texture",
    "wrong_subject": "wrong subject",
    "subject_shown": "subject shown",
    "shown_identity_recall": "recall where shown",
    WHOLE + RECALL: "whole film",
}

LABELS = {
    "val_loss": "validation loss",
    "first_loss": "first training loss",
    "last_loss": "last training loss",
    "flops": "attention GFLOPs",
    "attention_flops": "attention GFLOPs of a step",
    "density": "density, %",
    "seconds_per_step": "seconds per step",
    "subject_shown": "share of shots with a subject",
    "shown_identity_recall": "identity recall where a subject is shown",
}
UNITS = {"flops": 1e-9, "attention_flops": 1e-9, "density": 100.0}  # a figure times this is what its label names
# By a word of the name, so that a measure of one's own, or one at a certain distance, needs no entry.
HIGHER = ("recall", "consistency", "smoothness", "accuracy")
LOWER = ("loss", "wrong", "error", *COSTS)
SHARES = (*HIGHER, "wrong", "degree", "density", "shown")

# Controls of a memory test, by the name of the cell or the method: references that methods are compared with.
CONTROLS = {"dense": "dense ceiling", "own_shot": "own shot only", "random_shot": "random baseline"}
# Cells that look like controls and are not. `text_relay` lets captions attend to video, so information can leak between
# shots; `text_alone` blocks that path. In `random_each` every token and head makes its own random choice, so that
# together they cover the film.
NO_CONTROLS = {"text_relay": "relay", "text_alone": "no relay", "random_each": "no baseline"}


@dataclass(frozen=True)
class Measure:
    """A measure. `higher`: whether more is better, None if unknown. `bounds`: its least and largest possible values."""

    name: str
    higher: bool | None
    bounds: tuple[float, float]

    @staticmethod
    def of(name: str) -> Measure:
        """Return the measure of that name; words of the name say which way is better."""

        def has(words: tuple[str, ...]) -> bool:
            return any(word in name for word in words)

        higher = False if has(LOWER) else True if has(HIGHER) else None
        return Measure(name, higher, (0.0, 1.0) if has(SHARES) else (-float("inf"), float("inf")))

    @property
    def label(self) -> str:
        """The name for people, with its unit."""
        plain = self.name.removeprefix(WHOLE)
        return "whole film, " * (plain != self.name) + LABELS.get(plain, plain.replace("_", " "))

    @property
    def distance(self) -> tuple[str, int] | None:
        """Base measure and shots back, ("identity_recall", 4) of "identity_recall_back_4"; None without a distance."""
        found = re.fullmatch(r"(\w+)_back_(\d{1,9})", self.name)
        return (found[1], int(found[2])) if found else None

    @property
    def unit(self) -> float:
        """The factor from a value to the unit of the label."""
        return UNITS.get(self.name, 1.0)

    @property
    def better(self) -> str:
        """Which way is better, in words; empty if unknown."""
        return {True: "higher is better", False: "lower is better", None: ""}[self.higher]

    def rank(self, value: float | None) -> float:
        """Return a key to sort by: smaller for better values, infinite for None."""
        return float("inf") if value is None else -value if self.higher else value


def get_figure(result: Result, name: str) -> float | None:
    """Return one of `FIGURES` or of the sample metrics of a run; None where it was not measured."""
    found: float | None = getattr(result, name) if name in FIGURES else result.metrics.get(name)
    return found


def measures_to_rank_by(results: Iterable[Result]) -> list[str]:
    """Return the measures that finished runs have and a report can rank by: all but the costs."""
    finished = [result for result in results if result.status == "finished"]
    names = dict.fromkeys((*FIGURES, *(name for result in finished for name in result.metrics)))

    costs = (*COSTS, *COST_SENSES.values())
    return [name for name in names if name not in costs and any(get_figure(x, name) is not None for x in finished)]
