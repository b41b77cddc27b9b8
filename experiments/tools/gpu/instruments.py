"""Programs that run a stage's work under a tool: hardware counters by ncu, memory errors by compute-sanitizer."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from experiments.tools.gpu import rows
from experiments.tools.gpu.common import kernel_of, long_size, problem
from experiments.tools.gpu.machine import tool_path
from experiments.tools.gpu.rows import Row
from experiments.tools.gpu.stage import Run
from sparse_zoo.testing import large

COUNTERS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
    "launch__occupancy_limit_shared_mem",
)
KEPT = 2 << 20
"""Characters of a tool's output that are kept."""


def once(run: Run) -> None:
    """One forward and backward at 180k tokens: what the counters are read from."""
    asked = problem(run, long_size(run))
    large.run(kernel_of(run), asked.plan, asked.given)


def counters(run: Run) -> Iterator[Row]:
    """Hardware counters of the first launch of attend and of grad_keys."""
    for kernel in ("attend", "grad_keys"):
        tool = [tool_path("ncu") or "ncu", "--kernel-name", f"regex:^{kernel}", "--launch-count", "1"]
        tool += ["--clock-control", "none", "--csv", "--metrics", ",".join(COUNTERS)]
        text, reason = _under(tool, "instruments:once", run, run.out / "counters.csv", run.left() / 2)
        values = dict(re.findall(r'"(\w+__[\w.]+)","[^"]*","([\d.,]+)"', text))
        yield (
            rows.fact(f"counters of {kernel}", **values)
            if values
            else rows.skipped(f"counters of {kernel}", reason or "ncu gave no values: see counters.csv")
        )


def memory(run: Run) -> Iterator[Row]:
    """The small plans again under the memory checker: no access out of bounds, none misaligned."""
    tool = [tool_path("compute-sanitizer") or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "3"]
    text, reason = _under(tool, "checks:plans", run, run.out / "memory.txt", run.left() - 2)
    found = re.search(r"ERROR SUMMARY: (\d+) error", text)
    if found is None:
        yield rows.skipped("memory checker", reason or "it gave no summary: see memory.txt")
    else:
        count = int(found.group(1))
        yield rows.check("memory checker", f"{count} errors: see memory.txt" if count else "")


def _under(tool: list[str], function: str, run: Run, file: Path, seconds: float) -> tuple[str, str]:
    """What a tool says of a function of this package, also appended to a file, and why it ended early."""
    module, _, name = function.partition(":")
    call = (
        "from pathlib import Path\n"
        "from experiments.tools.gpu.stage import Run\n"
        f"from experiments.tools.gpu.{module} import {name}\n"
        f"for row in {name}(Run(Path({str(run.out)!r}), {seconds!r}, tiny={run.tiny!r})) or ():\n"
        "    print(row)\n"
    )
    try:
        done = subprocess.run(
            [*tool, sys.executable, "-c", call],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=max(1.0, seconds),
            check=False,
        )
        text, reason = done.stdout, "" if done.returncode == 0 else f"{tool[0]} ended with exit code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        reason = f"{tool[0]} took longer than {seconds:.0f} s"
    except OSError as error:
        return "", f"{tool[0]}: {error}"
    with file.open("a", encoding="utf-8") as kept:
        kept.write(text[-KEPT:])
    return text, reason
