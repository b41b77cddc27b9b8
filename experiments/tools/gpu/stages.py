"""The stages of `make gpu`, in the order they run. No torch: the parent reads this table.

What is riskiest is checked first; where less time is given than all stages take, those of the highest number in
`priority` are left out first.
"""

from __future__ import annotations

from typing import NamedTuple

HERE = "experiments.tools.gpu"


class Stage(NamedTuple):
    """A stage of `make gpu`: its name, its time and what it needs.

    `function` ("module:name") yields rows. `needs` are facts of the machine. `after` are stages whose checks must pass
    before this stage is timed; they also run if only this stage is asked for.
    """

    name: str
    seconds: int
    priority: int
    function: str
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


MACHINE = Stage("machine", 15, 0, f"{HERE}.machine:machine")
"""Always first: without a GPU nothing else runs, and what the machine lacks is known."""

DENSE, VARLEN, CHOICE, PLANS = "check-dense", "check-varlen", "check-choice", "check-plans"
FILM, LONG = "check-film", "check-long"
TRITON = ("triton", "sm80")

STAGES = (
    MACHINE,
    Stage(DENSE, 15, 1, f"{HERE}.checks:dense_engine", ("sm80",)),
    Stage(VARLEN, 30, 2, f"{HERE}.checks:varlen_engine", TRITON),
    Stage(CHOICE, 12, 1, f"{HERE}.checks:choice", TRITON),
    Stage(PLANS, 12, 2, f"{HERE}.checks:plans", TRITON),
    Stage(FILM, 20, 1, f"{HERE}.checks:film", TRITON),
    Stage(LONG, 12, 1, f"{HERE}.checks:long", TRITON),
    Stage("rivals", 25, 2, f"{HERE}.times:rivals"),
    Stage("breakdown", 30, 2, f"{HERE}.times:breakdown", TRITON, (LONG, CHOICE)),
    Stage("anchors", 15, 3, f"{HERE}.times:anchors", ("sm80",), (DENSE,)),
    Stage("tiles", 50, 4, f"{HERE}.times:sweep", TRITON, (LONG,)),
    Stage("varlen", 20, 5, f"{HERE}.times:varlen", TRITON, (LONG,)),
    Stage("end-to-end", 130, 3, f"{HERE}.times:end_to_end", TRITON, (FILM,)),
    Stage("step", 30, 3, f"{HERE}.model:step", (*TRITON, "lightning"), (FILM, LONG)),
    Stage("counters", 40, 6, f"{HERE}.instruments:counters", (*TRITON, "ncu")),
    Stage("memory", 40, 6, f"{HERE}.instruments:memory", (*TRITON, "compute-sanitizer")),
    Stage("suite", 60, 5, f"{HERE}.checks:suite", TRITON),
)
