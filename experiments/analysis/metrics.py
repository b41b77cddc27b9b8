"""What is measured of a run: how it reads, which way is better, where it ends. The one place that says so."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from experiments.tracking.store import Result

HEADLINES = ("identity_recall", "val_loss")  # what a leaderboard goes by: the first that was measured
COSTS = ("density", "flops", "seconds_per_step")
TOLERANCE = 0.02  # of a budget, within which a cost meets it
FIGURES = ("val_loss", "first_loss", "last_loss", *COSTS)  # fields of a `Result`; the others are in its `metrics`
RECALL = "identity_recall"  # where it was measured, the sweep is a test of memory across shots
WHOLE = "whole_"  # begins the names of what is measured of films drawn wholly from noise, not of their last shot alone
# What a test of memory is read with: a column each beside recall, under these names.
BESIDE = {
    "shape_recall": "shape",
    "colour_recall": "colour",
    "texture_recall": "texture",
    "wrong_subject": "wrong subject",
    WHOLE + RECALL: "whole film",
}

LABELS = {
    "val_loss": "validation loss",
    "first_loss": "first training loss",
    "last_loss": "last training loss",
    "flops": "attention GFLOPs",
    "density": "density, %",
    "seconds_per_step": "seconds per step",
}
UNITS = {"flops": 1e-9, "density": 100.0}  # a figure times this is what its label names
# By a word of the name, so that a measure of one's own, or one at a certain distance, needs no entry.
HIGHER = ("recall", "consistency", "smoothness", "accuracy")
LOWER = ("loss", "wrong", "error", *COSTS)
SHARES = (*HIGHER, "wrong", "degree", "density")

# Attention that no method has to beat or to fear: what the others are read against, by name of cell or method.
CONTROLS = {"dense": "dense ceiling", "own_shot": "own shot only", "random_shot": "random null"}
# Cells that look like controls and are none: where all captions are read, those that read video relay it from shot to
# shot, and those that do not show that it was they; draws for each token and head cover the film when taken together.
NO_CONTROLS = {"text_relay": "relay", "text_alone": "no relay", "random_each": "no null"}


@dataclass(frozen=True)
class Measure:
    """`higher`: whether more is better, None where that is not known. `bounds`: least and most possible values."""

    name: str
    higher: bool | None
    bounds: tuple[float, float]

    @staticmethod
    def of(name: str) -> Measure:
        def has(words: tuple[str, ...]) -> bool:
            return any(word in name for word in words)

        higher = False if has(LOWER) else True if has(HIGHER) else None
        return Measure(name, higher, (0.0, 1.0) if has(SHARES) else (-float("inf"), float("inf")))

    @property
    def label(self) -> str:
        plain = self.name.removeprefix(WHOLE)
        return "whole film, " * (plain != self.name) + LABELS.get(plain, plain.replace("_", " "))

    @property
    def distance(self) -> tuple[str, int] | None:
        """("identity_recall", 4) of "identity_recall_back_4": what is measured at how many shots; None without one."""
        found = re.fullmatch(r"(\w+)_back_(\d{1,9})", self.name)
        return (found[1], int(found[2])) if found else None

    @property
    def unit(self) -> float:
        return UNITS.get(self.name, 1.0)

    @property
    def better(self) -> str:
        return {True: "higher is better", False: "lower is better", None: ""}[self.higher]

    def rank(self, value: float | None) -> float:
        """Smaller for better, infinite for what was not measured."""
        return float("inf") if value is None else -value if self.higher else value


def measures_to_rank_by(results: Iterable[Result]) -> list[str]:
    """Return the measures that finished runs have and a report can rank by: all but the costs."""
    finished = [result for result in results if result.status == "finished"]
    names = dict.fromkeys((*FIGURES, *(name for result in finished for name in result.metrics)))

    def measured(name: str) -> bool:
        return any((vars(x) if name in FIGURES else x.metrics).get(name) is not None for x in finished)

    return [name for name in names if name not in COSTS and measured(name)]
