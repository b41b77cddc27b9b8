"""The command `python -m sparse_zoo.bench`."""

from __future__ import annotations

import argparse
import json
import math
import sys

import torch

from sparse_zoo import bench
from sparse_zoo.bench.lines import table
from sparse_zoo.bench.suites import DTYPES, SUITES, chosen
from sparse_zoo.bench.turns import run
from sparse_zoo.errors import ZooError


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparse_zoo.bench", description=bench.__doc__)
    suites = "; ".join(f"{name}: {what}" for name, what in SUITES.items())
    parser.add_argument("--suite", default="quick", help=f"{suites} (default: quick)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[], help="lengths of the CPU's films instead")
    parser.add_argument("--methods", nargs="+", default=[], metavar="METHOD", help="only these")
    parser.add_argument("--kernel", help="this kernel for every method")
    parser.add_argument("--dtype", help=f"one of {', '.join(DTYPES)}")
    parser.add_argument("--repeats", type=int, default=6, help="measured turns, medians are given (default: 6)")
    parser.add_argument("--max-repeats", type=int, default=24, help="turns while intervals are wide (default: 24)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for further turns (default: no limit)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() and given.suite == "gpu" else "cpu")
    try:
        rounds = chosen(given.suite, given.methods, given.tokens, given.kernel, given.dtype)
    except ZooError as error:
        parser.error(str(error))
    found = run(
        rounds,
        given.repeats,
        device,
        lambda what: print(what, file=sys.stderr),
        most=given.max_repeats,
        minutes=given.minutes,
    )
    if given.json:
        print(json.dumps(found, indent=1))
    else:
        print(*table(found["rows"]), sep="\n")
    return 1 if any("failed" in row for row in found["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
