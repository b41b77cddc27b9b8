"""Measure how much of the speedup that its pair count allows a method attains: `python -m sparse_zoo.bench --help`.

attained = seconds of the fastest dense attention ÷ seconds of the method, routing included, both measured in this
process, turn by turn. bound = 1 / density. A kernel that does not first agree with float64 gets no time.
"""

from sparse_zoo.bench.agreement import gate
from sparse_zoo.bench.competitors import PASSES, dense_engines, peak_bytes
from sparse_zoo.bench.intervals import NARROW, median_interval
from sparse_zoo.bench.lines import headline, table
from sparse_zoo.bench.suites import (
    CPU_ENTRIES,
    DTYPES,
    GPU_LAYOUTS,
    MOC,
    PAPER_FILM,
    PAPER_MOC,
    QUICK,
    ROUTING_DIM,
    SUITES,
    Entry,
    Round,
    chosen,
    film_of,
    suite,
)
from sparse_zoo.bench.turns import Row, about, events, measure, processor, run

__all__ = [
    "CPU_ENTRIES",
    "DTYPES",
    "GPU_LAYOUTS",
    "MOC",
    "NARROW",
    "PAPER_FILM",
    "PAPER_MOC",
    "PASSES",
    "QUICK",
    "ROUTING_DIM",
    "SUITES",
    "Entry",
    "Round",
    "Row",
    "about",
    "chosen",
    "dense_engines",
    "events",
    "film_of",
    "gate",
    "headline",
    "measure",
    "median_interval",
    "peak_bytes",
    "processor",
    "run",
    "suite",
    "table",
]
