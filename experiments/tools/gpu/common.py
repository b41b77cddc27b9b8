"""What stages share: the device, the fixed inputs, time by events, and a triton kernel with other tiles."""

from __future__ import annotations

import gzip
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

import sparse_zoo as zoo
from experiments.tools.gpu.stage import Run
from sparse_zoo import bench
from sparse_zoo.kernels.triton import configs, interpreted
from sparse_zoo.testing import large

TINY = zoo.Layout.film([zoo.Shot(2, 4, 4, text=3)] * 3, caption=2)


class Size(NamedTuple):
    """A film, what runs on it, and how often it is timed."""

    film: zoo.Layout
    heads: int
    head_dim: int
    repeats: int
    settings: dict[str, Any]


def device_of(run: Run) -> torch.device:  # noqa: ARG001
    """Return the GPU if torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kernel_of(run: Run) -> str:
    """The kernel under test; a run without a GPU goes through the stages with the CPU's."""
    return "cpu" if run.tiny and not torch.cuda.is_available() and not interpreted() else "triton"


def dtype_of(run: Run) -> torch.dtype:
    """Return the dtype of the inputs: bfloat16, or float32 in a tiny run without a GPU."""
    return torch.float32 if run.tiny and not torch.cuda.is_available() else torch.bfloat16


def long_size(run: Run) -> Size:
    """180k tokens, 24 heads of 128: the shape that all marks are for."""
    if run.tiny:
        return Size(TINY, 2, 16, 1, {**bench.PAPER_MOC, "top_k": 2})
    return Size(bench.PAPER_FILM, 24, 128, 3, bench.PAPER_MOC)


def film_size(run: Run) -> Size:
    """Some 6k tokens, which float64 can check whole."""
    if run.tiny:
        return Size(TINY, 2, 16, 1, {**bench.PAPER_MOC, "top_k": 2})
    return Size(large.FILM, 2, 128, 1, bench.PAPER_MOC)


class Problem(NamedTuple):
    """A method's plan on fixed inputs."""

    attention: zoo.Attention
    film: zoo.Layout
    plan: zoo.Plan
    given: large.Inputs


def problem(run: Run, size: Size, *, dtype: torch.dtype | None = None, seed: int = 0) -> Problem:
    """moc on a size's film, its chunks chosen as the kernel chooses them; the same inputs in every stage."""
    device, dtype = device_of(run), dtype or dtype_of(run)
    film = size.film.to(device)
    given = large.Inputs.random(len(film), size.heads, size.heads, size.head_dim, dtype, device, seed)
    attention = zoo.build("moc", heads=size.heads, head_dim=size.head_dim, kernel=kernel_of(run), **size.settings)
    with torch.no_grad():
        plan = attention.plan(given.q, given.k, film)
    return Problem(attention, film, plan, given)


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, after one to warm up; by events on a GPU."""
    call()
    taken = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return float(statistics.median(taken))


class Trace(NamedTuple):
    """Seconds and calls of each kernel by name, and all events."""

    seconds: dict[str, float]
    calls: dict[str, int]
    events: list[dict[str, Any]]

    def of(self, *names: str) -> float:
        """Seconds of the kernels whose name begins with one of these."""
        return sum(seconds for name, seconds in self.seconds.items() if name.startswith(names))


def traced(call: Callable[[], object], device: torch.device) -> Trace:
    """What runs on the device during one call, by the profiler; on a CPU its operators."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profiled:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    wanted = ("kernel", "gpu_memcpy", "gpu_memset") if device.type == "cuda" else ("cpu_op",)
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in wanted:
            seconds[event["name"]] += event["dur"] / 1e6
            calls[event["name"]] += 1
    return Trace(dict(seconds), dict(calls), events)


def save_trace(trace: Trace, path: Path, most_bytes: int = 12 << 20) -> None:
    """A trace for chrome://tracing, compressed; if it is larger than `most_bytes` only what ran on the device."""
    for cats in (None, ("kernel", "gpu_memcpy", "gpu_memset", "cpu_op")):
        events = [event for event in trace.events if cats is None or event.get("cat") in cats]
        data = gzip.compress(json.dumps({"traceEvents": events}).encode())
        if len(data) <= most_bytes:
            break
    path.write_bytes(data)


@contextmanager
def tiles(head_dim: int, kernel: str, tile: configs.Tile, *, attend_rows: bool = False) -> Iterator[None]:
    """The triton kernel with another tile of routed parts for `kernel`: attend, grad_queries or grad_keys.

    dq runs over the forward's tiles: `attend_rows` changes the rows of both.
    """
    changed = {}
    for key, config in configs.CONFIGS.items():
        if key[1] == head_dim:
            routed = config.routed._replace(**{kernel: tile})
            other = {"attend": "grad_queries", "grad_queries": "attend"}.get(kernel)
            if attend_rows and other:
                routed = routed._replace(**{other: getattr(routed, other)._replace(rows=tile.rows)})
            changed[key] = config._replace(routed=routed)
    before = {key: configs.CONFIGS[key] for key in changed}
    configs.CONFIGS.update(changed)
    try:
        yield
    finally:
        configs.CONFIGS.update(before)
