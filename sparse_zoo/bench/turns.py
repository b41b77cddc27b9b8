"""Turns of all competitors on one film, and the rows that result."""

from __future__ import annotations

import math
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparse_zoo as zoo
from sparse_zoo.bench.agreement import gate
from sparse_zoo.bench.competitors import PASSES, Timed, dense_engines
from sparse_zoo.bench.host import host_row
from sparse_zoo.bench.intervals import NARROW, Interval, median_interval
from sparse_zoo.bench.suites import DTYPES, ROUTING_DIM, Entry, Round
from sparse_zoo.errors import ZooError

Row = dict[str, Any]
Progress = Callable[[str], None]


def _silent(_: str) -> None:
    """Report no progress."""


@dataclass
class _Competitor:
    """An entry, its attention if it could be built, and its turns."""

    entry: Entry
    attention: zoo.Attention | None
    timed: Timed
    bound: float = 0.0


def measure(
    round_: Round,
    repeats: int,
    device: torch.device,
    progress: Progress = _silent,
    *,
    most: int | None = None,
    seconds: float = math.inf,
    rivals: Collection[str] = (),
) -> list[Row]:
    """Rows for each entry and pass: medians of turns of all entries and dense engines, after one warm-up turn.

    Every turn has a random order of its own, because a competitor that follows dense attention finds less memory
    already mapped. There are at least `repeats` turns. Up to `most` (default: no more) are added within `seconds`, as
    long as the interval of a row is too wide and would, at the rate of 1 / sqrt(turns), become narrow enough by then.
    An entry that fails the gate, cannot run or runs out of memory gets one row with the reason under "failed".
    `rivals` names the dense engines that take turns: all that run here, if none.
    """
    begin = time.perf_counter()
    film, dtype = round_.film, DTYPES[round_.dtype]
    inputs, weight, hidden = _tensors(film, round_.heads, round_.head_dim, dtype, device)
    q, k, v = inputs
    film = film.to(device)
    dense = {
        name: Timed(partial(engine, q, k, v), inputs, weight)
        for name, engine in dense_engines(q.detach()).items()
        if not rivals or name in rivals
    }
    ours = [_competitor(entry, round_, inputs, weight, film, hidden, progress) for entry in round_.entries]
    takers = [*dense.items(), *((own.entry.method, own.timed) for own in ours)]
    most, turn = max(repeats, most or 0), 0
    while turn <= repeats or (
        turn <= most and time.perf_counter() - begin < seconds and _more_help(ours, dense, round_, turn - 1, most)
    ):
        for name, timed in random.Random(turn).sample(takers, len(takers)):
            progress(f"{name}, {len(film)} tokens, turn {turn + 1} of {repeats + 1}, at most {most + 1}")
            timed.once(count=turn > 0)
        turn += 1
    return [row for own in ours for row in _rows(round_, own, hidden, dense)]


def _competitor(
    entry: Entry,
    round_: Round,
    inputs: list[Tensor],
    weight: Tensor,
    film: zoo.Layout,
    hidden: Tensor,
    progress: Progress,
) -> _Competitor:
    """An entry, built and checked: only one that passes the gate takes turns."""
    attention, failed = None, ""
    q, k, v = inputs
    progress(f"{entry.method} against float64")
    try:
        own = {"heads": round_.heads, "head_dim": round_.head_dim, "dim": ROUTING_DIM, **entry.settings}
        attention = zoo.build(entry.method, kernel=entry.kernel, **own).to(weight.device)
    except ZooError as error:
        failed = str(error)
    timed = Timed(
        partial(_attend, attention, q, k, v, film, hidden),
        inputs,
        weight,
        partial(_branches, attention, q, k, v, film, hidden),
    )
    if attention is not None:
        failed = timed.guarded(partial(gate, attention, q, k, v, film, hidden)) or timed.failed
    timed.failed = failed
    return _Competitor(entry, attention, timed)


def _tensors(
    film: zoo.Layout, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], Tensor, Tensor]:
    shape = (1, heads, len(film), head_dim)
    inputs = [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for _ in range(3)]
    return inputs, torch.randn(shape, dtype=dtype, device=device), torch.randn(1, len(film), ROUTING_DIM, device=device)


def _attend(attention: Any, q: Tensor, k: Tensor, v: Tensor, film: zoo.Layout, hidden: Tensor) -> Tensor:
    out: Tensor = attention(q, k, v, film, hidden=hidden).out
    return out


def _branches(attention: Any, q: Tensor, k: Tensor, v: Tensor, film: zoo.Layout, hidden: Tensor) -> object:
    return attention.branches(zoo.Call(q, k, v, film, hidden=hidden))


# -- noise ------------------------------------------------------------------------------------------------------------


def _fastest(dense: dict[str, Timed], which: str) -> str:
    """The dense engine of smallest median, of those that ran; empty if none did."""
    ran = {name: rival for name, rival in dense.items() if not rival.failed and rival.seconds[which]}
    return min(ran, key=lambda name: ran[name].median(which)) if ran else ""


def _ratios(timed: Timed, rival: Timed, which: str) -> list[float]:
    """Dense seconds ÷ own seconds, turn by turn: a disturbance of the machine affects both."""
    return [dense / own for own, dense in zip(timed.seconds[which], rival.seconds[which], strict=True)]


def _interval(timed: Timed, rival: Timed, which: str, bound: float) -> Interval | None:
    return median_interval([ratio / bound for ratio in _ratios(timed, rival, which)])


def _more_help(ours: list[_Competitor], dense: dict[str, Timed], round_: Round, turns: int, most: int) -> bool:
    """Whether further turns may bring a row's interval below `NARROW`."""
    for own in ours:
        for which in PASSES:
            fastest = _fastest(dense, which)
            if own.timed.failed or not fastest:
                continue
            own.bound = own.bound or _bound(own, round_)
            interval = _interval(own.timed, dense[fastest], which, own.bound)
            if interval is None or NARROW < interval.width <= NARROW * math.sqrt(most / turns):
                return True
    return False


def _bound(own: _Competitor, round_: Round) -> float:
    assert own.attention is not None
    hidden = own.timed.attend.args[-1]  # type: ignore[attr-defined]
    with torch.no_grad():
        bound = own.attention(*own.timed.inputs, round_.film, hidden=hidden).cost().bound
    return float(bound)


# -- rows -------------------------------------------------------------------------------------------------------------


def _rows(round_: Round, own: _Competitor, hidden: Tensor, dense: dict[str, Timed]) -> Iterator[Row]:
    entry, attention, timed = own.entry, own.attention, own.timed
    row: Row = {
        "method": entry.method,
        "settings": entry.settings,
        "kernel": entry.kernel,
        "tokens": len(round_.film),
        "shots": sum(len(film.shots) for film in round_.film.films),
        "heads": round_.heads,
        "head_dim": round_.head_dim,
        "dtype": round_.dtype,
    }
    failed = timed.failed or ("" if _fastest(dense, "forward") else "no dense attention runs here to compare with")
    if failed or attention is None:
        yield row | {"failed": failed}
        return
    with torch.no_grad():
        result = attention(*timed.inputs, round_.film, hidden=hidden)
    cost = result.cost()
    executed = sum(plan.executed(result.kernel, batch=1, heads=round_.heads) for plan in result.plans)
    for which in PASSES:
        fastest = _fastest(dense, which)
        rival = dense[fastest]
        seconds, dense_seconds = timed.median(which), rival.median(which)
        interval = _interval(timed, rival, which, cost.bound)
        ratios = _ratios(timed, rival, which)
        yield row | {
            "kernel": result.kernel,
            "pass": which,
            "density": cost.density,
            "bound": cost.bound,
            "seconds": seconds,
            "dense_seconds": dense_seconds,
            "dense_kernel": fastest,
            "dense_all": {name: other.median(which) for name, other in dense.items() if not other.failed},
            "attained": dense_seconds / seconds,
            "attained_over_bound": dense_seconds / seconds / cost.bound,
            "routing_share": timed.median("routing") / seconds,
            "padded_share": executed / cost.pairs - 1,
            "host_seconds": statistics.median(timed.host[which]) if timed.host[which] else None,
            "peak_memory_ratio": timed.memory[which] / rival.memory[which],
            "spread": (max(timed.seconds[which]) - min(timed.seconds[which])) / seconds,
            "turns": len(ratios),
            "ratio_over_bound": statistics.median(ratios) / cost.bound,
            "interval": [interval.low, interval.high] if interval else None,
            "confidence": interval.confidence if interval else None,
            "fastest_over_bound": min(rival.seconds[which]) / min(timed.seconds[which]) / cost.bound,
            "noisy": interval is None or interval.width > NARROW,
        }


def about(device: torch.device) -> dict[str, Any]:
    """Where it was measured: device, threads, versions, commit (null outside a checkout), date."""
    try:
        asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = (
            subprocess.run(asked, capture_output=True, encoding="utf-8", errors="replace", check=False).stdout.strip()
            or None
        )
    except FileNotFoundError:
        commit = None
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": commit,
        "date": datetime.now(UTC).date().isoformat(),
    }


def processor() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def events(rounds: Sequence[Round], repeats: int, device: torch.device) -> int:
    """The number of progress reports of `run`, with at most `repeats` turns."""
    total = 0
    for round_ in rounds:
        shape = (1, 1, 64, round_.head_dim)
        engines = len(dense_engines(torch.zeros(shape, dtype=DTYPES[round_.dtype], device=device)))
        total += 2 * len(round_.entries) + (repeats + 1) * (len(round_.entries) + engines)
    return total


def run(
    rounds: Sequence[Round],
    repeats: int,
    device: torch.device,
    progress: Progress = _silent,
    *,
    most: int | None = None,
    minutes: float = math.inf,
) -> dict[str, Any]:
    """All rounds, and the host's share of each entry, ready for JSON.

    `minutes` are for all rounds together: time that one round leaves may be used by the next.

    Returns:
        {"device", "threads", "versions", "commit", "date", "repeats", "rows"}.
    """
    end = time.perf_counter() + 60 * minutes
    rows: list[Row] = []
    for i, round_ in enumerate(rounds):
        share = (end - time.perf_counter()) / (len(rounds) - i)
        rows += measure(round_, repeats, device, progress, most=most, seconds=share)
        for entry in round_.entries:
            progress(f"{entry.method}, {len(round_.film)} tokens, the host alone")
            rows.append(host_row(round_, entry))
    return {**about(device), "repeats": repeats, "rows": rows}
