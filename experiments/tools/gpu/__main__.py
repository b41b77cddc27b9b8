"""The parent of `make gpu`: runs one stage after the other, each in a process group of its own. Imports no torch.

Exit code 0 if every stage ended and every check passed, 1 if one did not, 2 where there is no torch or no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from experiments.tools.gpu import __doc__ as about
from experiments.tools.gpu.pack_compile import CACHE, SITE, relocate
from experiments.tools.gpu.rows import Row, Rows
from experiments.tools.gpu.stages import MACHINE, STAGES, Stage
from experiments.tools.gpu.summary import summary

OUT = Path("runs") / "gpu"
MINUTES = 9.5
LOADED = ("torch", "sparse_zoo", "triton")
"""What every stage needs; imported while the stage before still runs."""
QUIET = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "KINETO_LOG_LEVEL": "99"}
"""Of every stage's process: its log is written as it prints, says where it crashed, and not that a profiler starts."""
LOG_BYTES = 4 << 20
"""Of the log, from its beginning and again from its end: a kernel can print without end."""
LEAST = 0.4
"""Of a stage's time, with which it is still begun."""
LONGEST = 1.5
"""Of a stage's time, where there is more than all stages need."""


class Parent:
    """One run: its folder, its stages, the end of its time."""

    def __init__(
        self,
        out: Path,
        stages: Sequence[Stage],
        minutes: float,
        loaded: Sequence[str] = LOADED,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.out, self.stages, self.loaded = out, stages, loaded
        self.environment = {**QUIET, **os.environ, **(environment or {})}
        self.begin = time.monotonic()
        self.end = self.begin + 60 * minutes
        out.mkdir(parents=True, exist_ok=True)
        self.rows = Rows(out / "results.jsonl")
        self.log = out / "log.txt"
        for old in (self.rows.path, self.log):
            old.unlink(missing_ok=True)
        self.process: subprocess.Popen[str] | None = None
        self.spare: subprocess.Popen[str] | None = None

    def run(self) -> int:
        """All stages; the exit code."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            for i, stage in enumerate(self.stages):
                row = self._left_out(stage, self.stages[i + 1 :]) or self._run(stage, self.stages[i + 1 :])
                self.rows.add({"stage": stage.name, "kind": "end", "name": stage.name, **row})
                say(f"{stage.name}: {row['status']}{', ' + row['reason'] if row['reason'] else ''}")
                self._write_summary()
                if stage is MACHINE and self._fact("gpu") is False:
                    return 2
        finally:
            for process in (self.process, self.spare):
                _kill(process)
            self._write_summary()
        rows = self.rows.read()
        failed = any(row.get("status") == "failed" for row in rows)
        return 1 if failed else 0

    def _left_out(self, stage: Stage, later: Sequence[Stage]) -> Row | None:
        """The row of a stage that cannot run here, or for which there is no time."""
        lacks: dict[str, str] = self._fact("lacks") or {}
        reasons = [lacks[need] for need in stage.needs if need in lacks]
        if reasons:
            return {"status": "skipped", "reason": "; ".join(reasons), "seconds": 0.0}
        if self._limit(stage, later) < LEAST * stage.seconds:
            return {"status": "skipped", "reason": "no time was left for it (see --minutes)", "seconds": 0.0}
        return None

    def _limit(self, stage: Stage, later: Sequence[Stage]) -> float:
        """Seconds for a stage: what is left, less what later stages need that matter more, or as much."""
        kept = sum(other.seconds for other in later if other.priority <= stage.priority)
        return min(LONGEST * stage.seconds, self.end - time.monotonic() - kept)

    def _run(self, stage: Stage, later: Sequence[Stage]) -> Row:
        limit = self._limit(stage, later)
        known = self._compiled()
        self.process = self.spare or self._start()
        self.spare = None
        begin = time.monotonic()
        with self.log.open("a", encoding="utf-8") as log:
            print(f"== {stage.name}, {limit:.0f} s", file=log)
        assert self.process.stdin is not None
        asked = json.dumps({"name": stage.name, "function": stage.function, "seconds": limit})
        with contextlib.suppress(BrokenPipeError):  # it may have ended before: its exit code tells
            self.process.stdin.write(asked + "\n")
            self.process.stdin.close()
        self.spare = self._start() if later else None
        try:
            code = self.process.wait(max(0.0, limit - (time.monotonic() - begin)))
            reason = self._reason(stage, code)
        except subprocess.TimeoutExpired:
            reason = f"stopped at its limit of {limit:.0f} s"
        _kill(self.process)  # its group: what it started ends with it
        self._shorten_log()
        seconds = round(time.monotonic() - begin, 2)
        compiled = self._compiled() - known
        return {"status": "failed" if reason else "passed", "reason": reason, "seconds": seconds, "compiled": compiled}

    def _compiled(self) -> int:
        """Entries of Triton's cache: a stage that adds none found all its kernels there."""
        folder = Path(self.environment.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
        return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0

    def _reason(self, stage: Stage, code: int) -> str:
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        if code == 0:
            return ""
        said = [row["reason"] for row in self.rows.read() if row["stage"] == stage.name and row["kind"] == "error"]
        failed = [
            row["name"] for row in self.rows.read() if row["stage"] == stage.name and row.get("status") == "failed"
        ]
        return "; ".join(said) or (f"failed checks: {', '.join(failed)}" if failed else f"ended with exit code {code}")

    def _start(self) -> subprocess.Popen[str]:
        with self.log.open("a", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "experiments.tools.gpu.stage", "--out", str(self.out), "--load", *self.loaded],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                env=self.environment,
            )

    def _fact(self, key: str) -> Any:
        """What the first stage found of the machine; None where it ended before."""
        found = [row for row in self.rows.read() if row["kind"] == "fact" and row["name"] == "machine"]
        return found[-1].get(key) if found else None

    def _write_summary(self) -> None:
        (self.out / "summary.md").write_text(
            summary(self.rows.read(), time.monotonic() - self.begin) + "\n", encoding="utf-8"
        )

    def _shorten_log(self) -> None:
        size = self.log.stat().st_size
        if size <= 2 * LOG_BYTES:
            return
        with self.log.open("rb") as log:
            first = log.read(LOG_BYTES)
            log.seek(size - LOG_BYTES)
            last = log.read()
        # Written in place: the next stage's process already holds this file open.
        with self.log.open("r+b") as log:
            log.write(first + b"\n[...]\n" + last)
            log.truncate()


def _kill(process: subprocess.Popen[str] | None) -> None:
    if process is None:
        return
    with contextlib.suppress(ProcessLookupError):  # nothing may be left of the group
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:  # a hung driver can hold a process: the next stage may still run
        say(f"process {process.pid} did not end")


def chosen(only: Sequence[str]) -> list[Stage]:
    """The stages to run: all, or those asked for with the checks that their timings need."""
    wanted = {MACHINE.name, *only}
    for stage in STAGES:
        wanted |= set(stage.after) if stage.name in only else set()
    return [stage for stage in STAGES if not only or stage.name in wanted]


def unpacked(pack: Path) -> dict[str, str]:
    """The environment in which stages find a pack's kernels and packages."""
    cache = (pack / CACHE).absolute()
    relocate(cache)
    path = [str((pack / SITE).absolute()), os.environ.get("PYTHONPATH", "")]
    return {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, path))}


def say(what: str) -> None:
    """Print a line to standard error at once."""
    print(what, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the stages, or list them; return 0, 2 where torch or a GPU is missing, else the exit code of the run."""
    parser = argparse.ArgumentParser(
        prog="python3 -m experiments.tools.gpu", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder for the files (default: {OUT})")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all stages (default: {MINUTES})")
    parser.add_argument("--only", choices=names, nargs="+", default=[], metavar="STAGE", help="these, and their checks")
    parser.add_argument("--pack", type=Path, help="a folder of experiments.tools.gpu.pack: kernels and packages")
    parser.add_argument("--list", action="store_true", help="print the stages and end")
    given = parser.parse_args(arguments)
    if given.minutes <= 0:
        parser.error(f"--minutes: {given.minutes}; it must be above 0")
    stages = chosen(given.only)
    if given.list:
        for stage in stages:
            print(f"{stage.name:13} {stage.seconds:3} s  priority {stage.priority}  {', '.join(stage.needs)}")
        return 0
    if find_spec("torch") is None:  # found, not imported
        say(f"make gpu: {sys.executable} has no torch; name a Python that has it: make gpu GPU_PYTHON=.venv/bin/python")
        return 2
    if given.pack is not None and not (given.pack / CACHE).is_dir():
        parser.error(f"--pack: {given.pack} has no {CACHE}; make a pack with python3 -m experiments.tools.gpu.pack")
    environment = unpacked(given.pack) if given.pack is not None else {}
    code = Parent(given.out, stages, given.minutes, environment=environment).run()
    if code == 2:
        say("make gpu: torch sees no CUDA device; a GPU is needed. `make test` needs none.")
        return code
    print((given.out / "summary.md").read_text(encoding="utf-8"))
    return code


if __name__ == "__main__":
    sys.exit(main())
