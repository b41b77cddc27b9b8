"""The process of one stage: python3 -m experiments.tools.gpu.stage --out DIR, then one JSON line on standard input.

It imports what stages need before it reads which one to run, so that the parent can start it while another stage runs.
Until then it touches no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from experiments.tools.gpu.rows import Row, Rows


class Run:
    """What a stage function is given: the rows so far, the folder, the end of its time, and its sizes.

    `tiny` makes every stage small enough for a CPU: it is how the tests go through the code of all of them.
    """

    def __init__(self, out: Path, seconds: float, *, tiny: bool = False) -> None:
        self.out, self.tiny, self.end = out, tiny, time.monotonic() + seconds
        self.rows = Rows(out / "results.jsonl")

    def left(self) -> float:
        """Seconds until the stage is stopped."""
        return self.end - time.monotonic()


def in_one_line(error: BaseException) -> str:
    """What kind of failure an exception is, and its first line."""
    said = f"{type(error).__name__}: {error}".strip()
    line = next((line.strip() for line in said.splitlines() if line.strip()), "")
    kinds = {
        "out of memory": ("outofmemoryerror", "memoryerror", "out of memory", "can't allocate memory"),
        "illegal access": ("illegal memory access", "misaligned address", "device-side assert", "unspecified launch"),
        "compile error": ("compilationerror", "ptxaserror", "ptxas", "outofresources", "passmanager"),
    }
    for kind, signs in kinds.items():
        if any(sign in said.lower() for sign in signs):
            return f"{kind}: {line}"
    return line


def run_stage(name: str, function: str, run: Run) -> bool:
    """Write the rows of a stage as it yields them; whether it came to its end and no check failed."""
    fine = True
    try:
        module, _, attribute = function.partition(":")
        rows: Iterator[Row] = getattr(import_module(module), attribute)(run)
        for row in rows:
            run.rows.add({"stage": name, **row})
            fine &= row.get("status") != "failed"
    except Exception as error:  # any failure becomes a row, and the parent runs the next stage
        import traceback

        traceback.print_exc()
        run.rows.add({"stage": name, "kind": "error", "name": name, "reason": in_one_line(error)})
        return False
    return fine


def main(arguments: list[str] | None = None) -> int:
    """Import the modules of `--load`, read one stage from standard input and run it; return 0, or 1 if it failed."""
    parser = argparse.ArgumentParser(prog="python3 -m experiments.tools.gpu.stage")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--load", nargs="*", default=[], help="modules to import before a stage is named")
    given = parser.parse_args(arguments)
    for module in given.load:
        try:
            import_module(module)
        except ImportError as error:  # the stage that needs it says so
            print(f"{module}: {error}", flush=True)
    line = sys.stdin.readline()
    if not line:  # no stage was left to run
        return 0
    asked: dict[str, Any] = json.loads(line)
    return 0 if run_stage(asked["name"], asked["function"], Run(given.out, asked["seconds"])) else 1


if __name__ == "__main__":
    sys.exit(main())
