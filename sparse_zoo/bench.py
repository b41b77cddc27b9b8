"""How much of the speedup that its pair count allows does a method attain? `python -m sparse_zoo.bench --help`.

attained = seconds of the fastest dense attention ÷ seconds of the method, routing included, both measured in this
process, turn by turn. bound = 1 / density. No time is reported for a kernel that does not first agree with the oracle.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import sparse_zoo as zoo
from sparse_zoo.errors import ZooError, refuse, unknown

PASSES = ("forward", "forward+backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUTING_DIM = 64
"""Width of what moga's router reads here: its product is no attention's cost."""

Row = dict[str, Any]
Told = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A method, its settings and the kernel it is asked to run on."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    kernel: str = "auto"


@dataclass(frozen=True)
class Round:
    """What is timed turn by turn: entries, and every dense engine, on one film."""

    film: zoo.Layout
    entries: tuple[Entry, ...]
    heads: int = 2
    head_dim: int = 64
    dtype: str = "float32"


# -- suites ---------------------------------------------------------------------------------------------------------


def film_of(tokens: int, shots: int = 8) -> zoo.Layout:
    """Equal shots of whole frames of 16 × 32, or of 16 × 16 where less fits into `tokens`; at least one frame each."""
    cols = 32 if tokens >= shots * 16 * 32 else 16
    return zoo.Layout.film([zoo.Shot(max(1, tokens // (shots * 16 * cols)), 16, cols)] * shots)


MOC = Entry("moc", {"top_k": 4, "anchors": ["shot"], "causal": None})
CPU_ENTRIES = (
    MOC,
    Entry("moc_fixed", {"top_k": 4, "chunk_tokens": 512, "anchors": ["shot"], "causal": None}),
    Entry("moga", {"groups": 5}),
    Entry("window", {"tile": [2, 8, 8], "window": [3, 3, 3]}),
)
QUICK_FILM = zoo.Layout.film([zoo.Shot(2, 8, 16, text=8)] * 6, caption=8)
# Blocks of 32 to 64 tokens where the papers have 64 to 512: so that there is something to choose in 1,592 tokens.
QUICK: dict[str, dict[str, Any]] = {
    "moba": {"block_tokens": 64, "top_k": 4},
    "moc_fixed": {"chunk_tokens": 64},
    "nsa": {"block": 32, "top_k": 4, "window": 3},
    "radial": {"block": 16, "decay": 0.1},
    "sla": {"block": 32, "top_k": 0.2},
    "sta": {"tile": [2, 4, 4]},
    "svg": {"width": 1},
    "svg2": {"top_p": 0.3, "query_clusters": 24, "key_clusters": 48, "first_rounds": 10},
    "vmoba": {"temporal": 1, "spatial": [4, 4], "spatiotemporal": [2, 4, 4]},
    "vsa": {"tile": [2, 4, 4], "top_k": 8},
    "window": {"tile": [2, 4, 4]},
    "xattention": {"block_tokens": 32, "stride": 4, "threshold": 0.2},
}
PAPER_MOC = {"top_k": 5, "chunk": "frame", "anchors": ["text", "shot"], "causal": None}
# 141 chunks of 1280 tokens in 8 shots of about 22.5k, as in the paper's final setting, and 200 words to each caption.
PAPER_FILM = zoo.Layout.film([zoo.Shot(17 if i < 3 else 18, 32, 40, text=200) for i in range(8)])
GPU_LAYOUTS: tuple[tuple[zoo.Layout, tuple[tuple[str, dict[str, Any]], ...]], ...] = (
    (
        PAPER_FILM,
        (
            ("moc", PAPER_MOC),
            ("moc", {**PAPER_MOC, "anchors": []}),
            ("window", {"tile": [4, 8, 8], "window": [3, 3, 3]}),
        ),
    ),
    (zoo.Layout.film([zoo.Shot(2, 32, 44, text=25)] * 64), (("moc", PAPER_MOC),)),
    (zoo.Layout.film([zoo.Shot(30, 30, 52)] * 4), (("moga", {"groups": 5}),)),
)


def suite(name: str) -> Iterator[Round]:
    """The rounds of a suite of `SUITES`; raises `ZooError` for others."""
    refuse("bench", [unknown("suite", name, SUITES)] if name not in SUITES else [])
    if name == "quick":
        yield Round(QUICK_FILM, tuple(Entry(name, QUICK.get(name, {})) for name in zoo.names() if name != "dense"))
    elif name == "cpu":
        for tokens in (2048, 4096, 16384, 32768):
            yield Round(film_of(tokens), CPU_ENTRIES)
        yield Round(film_of(65536), (MOC,))
    elif name == "shots":
        for shots in (1, 2, 4, 8, 16, 32):
            yield Round(film_of(1024 * shots, shots), (MOC,))
    else:
        kernels = [kernel for kernel, reasons in zoo.kernels().items() if not reasons and kernel not in NOT_FOR_SPEED]
        for dtype in ("bfloat16", "float16"):
            for film, methods in GPU_LAYOUTS:
                entries = (Entry(method, settings, kernel) for method, settings in methods for kernel in kernels)
                yield Round(film, tuple(entries), heads=24, head_dim=128, dtype=dtype)
        yield Round(PAPER_FILM, tuple(Entry("moc", PAPER_MOC, kernel) for kernel in kernels), 24, 64, "bfloat16")


NOT_FOR_SPEED = ("reference", "cpu")
SUITES = {
    "quick": "every registered method on 1,592 tokens, plug-ins with their defaults: under a minute",
    "cpu": "the CPU's marks, 2k to 64k tokens, float32: about 15 minutes on two cores",
    "shots": "moc on 1 to 32 shots of 1,024 tokens: time against length",
    "gpu": "180k tokens, 24 heads, half precision, every kernel that runs: minutes on a GPU",
}


# -- what is measured -----------------------------------------------------------------------------------------------


def dense_engines(q: Tensor) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Every dense attention that runs on tensors like q (B, H, L, D) without an L × L: SDPA's backends, flash-attn."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    few = [torch.zeros_like(q[:, :, :64]).requires_grad_() for _ in range(3)]
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        engine = partial(_sdpa, backend)
        try:
            engine(*few).sum().backward()
        except RuntimeError:  # torch says so where a backend cannot run on these tensors
            continue
        found["sdpa " + backend.name.removesuffix("_ATTENTION").lower()] = engine
    if find_spec("flash_attn") and q.is_cuda:
        flash_attn_func = getattr(import_module("flash_attn"), "flash_attn_func", None)  # generation 4 has it elsewhere
        if flash_attn_func:
            found["flash_attn"] = lambda q, k, v: flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(
                1, 2
            )
    return found


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v)


def gate(attention: zoo.Attention, head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why a method on its kernel may not be timed: it errs more than three times as much as plain attention would in
    this dtype, in output or gradients, on a small film of the same make; empty when it may."""
    film = zoo.Layout.film([zoo.Shot(2, 6, 9, text=3)] * 8, caption=2)
    tokens, weights, hidden = _tensors(film, 1, head_dim, dtype, device)
    for plan in attention(*tokens, film, hidden=hidden).plans:
        # A coarse branch has fewer queries and keys: for them, the first of these do as well.
        sizes = (plan.shape[0], plan.shape[1], plan.shape[1])
        inputs = [x.detach()[:, :, :size].requires_grad_() for x, size in zip(tokens, sizes, strict=True)]
        weight = weights[:, :, : plan.shape[0]]
        ours = _results(inputs, weight, plan, attention.kernel)
        oracle = _results([x.detach().double().requires_grad_() for x in inputs], weight.double(), plan, "reference")
        mask = plan.dense_mask()
        q, k, v = inputs
        scores = (q @ k.transpose(-1, -2) * head_dim**-0.5).masked_fill(~mask, -torch.inf)
        plain = scores.softmax(-1).nan_to_num(0) @ v
        eager = [plain.detach(), *torch.autograd.grad(plain, inputs, weight)]
        for name, got, want, usual in zip(("output", "dq", "dk", "dv"), ours, oracle, eager, strict=True):
            error, allowed = float((got - want).abs().max()), 3 * float((usual - want).abs().max()) + 1e-6
            if not error <= allowed:
                return f"{name} differs from the oracle by {error:.1e}, allowed is {allowed:.1e}"
    return ""


def _results(inputs: Sequence[Tensor], weight: Tensor, plan: zoo.Plan, kernel: str) -> list[Tensor]:
    q, k, v = inputs
    out = zoo.attend(q, k, v, plan, kernel=kernel).out
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


def _tensors(
    film: zoo.Layout, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], Tensor, Tensor]:
    shape = (1, heads, len(film), head_dim)
    inputs = [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for _ in range(3)]
    return inputs, torch.randn(shape, dtype=dtype, device=device), torch.randn(1, len(film), ROUTING_DIM, device=device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class _Timed:
    """One competitor: `attend` () -> out; times of its passes, of its routing where it has one, and its peak memory."""

    def __init__(
        self,
        attend: Callable[[], Tensor],
        inputs: list[Tensor],
        weight: Tensor,
        route: Callable[[], object] | None = None,
    ) -> None:
        self.attend, self.inputs, self.weight, self.route = attend, inputs, weight, route
        self.seconds: dict[str, list[float]] = {which: [] for which in (*PASSES, "routing")}
        self.memory: dict[str, int] = {}
        self.failed = ""

    def once(self, count: bool) -> None:
        if self.failed:
            return
        device = self.weight.device
        try:
            for x in self.inputs:
                x.grad = None
            out: list[Tensor] = []
            forward = _seconds(lambda: out.append(self.attend()), device)
            backward = _seconds(lambda: out.pop().backward(self.weight), device)
            routing = _seconds(self._route, device) if self.route else 0.0
            if not self.memory:
                self.memory["forward"] = self._peak(self._forward)
                self.memory["forward+backward"] = self._peak(lambda: self.attend().backward(self.weight))
        except ZooError as error:  # a kernel may refuse a plan of this size
            self.failed = str(error)
            return
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            self.failed = f"out of memory: {str(error).splitlines()[0]}"
            gc.collect()
            return
        if count:
            for which, seconds in zip((*PASSES, "routing"), (forward, forward + backward, routing), strict=True):
                self.seconds[which].append(seconds)

    def median(self, which: str) -> float:
        return statistics.median(self.seconds[which])

    @torch.no_grad()
    def _route(self) -> None:
        if self.route:
            self.route()

    @torch.no_grad()
    def _forward(self) -> None:
        self.attend()

    def _peak(self, run: Callable[[], object]) -> int:
        for x in self.inputs:
            x.grad = None
        return sum(x.nbytes for x in self.inputs) + peak_bytes(run, self.weight.device)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors held at once during `run`, above what was held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return int(most)


def _out_of_memory(error: BaseException) -> bool:
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in said


def measure(round_: Round, repeats: int, device: torch.device, told: Told = lambda _: None) -> list[Row]:
    """Rows for each entry and pass: medians of `repeats` turns of all entries and dense engines, after one to warm up.

    Every turn has an order of its own: who comes after dense attention finds less memory that is already mapped.
    An entry that fails the gate, cannot run or runs out of memory gets one row that says so under "failed".
    """
    film, dtype = round_.film, DTYPES[round_.dtype]
    inputs, weight, hidden = _tensors(film, round_.heads, round_.head_dim, dtype, device)
    q, k, v = inputs
    film = film.to(device)
    dense = {
        name: _Timed(partial(engine, q, k, v), inputs, weight) for name, engine in dense_engines(q.detach()).items()
    }
    ours: list[tuple[Entry, zoo.Attention | None, _Timed]] = []
    for entry in round_.entries:
        attention, failed = None, ""
        try:
            own = dict(entry.settings)
            attention = zoo.build(
                entry.method, heads=round_.heads, head_dim=round_.head_dim, dim=ROUTING_DIM, kernel=entry.kernel, **own
            ).to(device)
            told(f"{entry.method} against the oracle")
            failed = gate(attention, round_.head_dim, dtype, device)
        except ZooError as error:
            failed = str(error)
        run = partial(_attend, attention, q, k, v, film, hidden)
        timed = _Timed(run, inputs, weight, partial(_branches, attention, q, k, v, film, hidden))
        timed.failed = failed
        ours.append((entry, attention, timed))
    rivals = [*dense.items(), *((entry.method, timed) for entry, _, timed in ours)]
    for turn in range(repeats + 1):
        for name, timed in random.Random(turn).sample(rivals, len(rivals)):
            told(f"{name}, {len(film)} tokens, turn {turn + 1} of {repeats + 1}")
            timed.once(count=turn > 0)
    return [row for entry, attention, timed in ours for row in _rows(round_, entry, attention, timed, dense)]


def events(rounds: Sequence[Round], repeats: int, device: torch.device) -> int:
    """How often `run` tells what it does."""
    total = 0
    for round_ in rounds:
        shape = (1, 1, 64, round_.head_dim)
        engines = len(dense_engines(torch.zeros(shape, dtype=DTYPES[round_.dtype], device=device)))
        total += len(round_.entries) + (repeats + 1) * (len(round_.entries) + engines)
    return total


def _attend(attention: Any, q: Tensor, k: Tensor, v: Tensor, film: zoo.Layout, hidden: Tensor) -> Tensor:
    out: Tensor = attention(q, k, v, film, hidden=hidden).out
    return out


def _branches(attention: Any, q: Tensor, k: Tensor, v: Tensor, film: zoo.Layout, hidden: Tensor) -> object:
    return attention.branches(zoo.Call(q, k, v, film, hidden=hidden))


def _rows(
    round_: Round, entry: Entry, attention: zoo.Attention | None, timed: _Timed, dense: dict[str, _Timed]
) -> Iterator[Row]:
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
    rivals = {name: rival for name, rival in dense.items() if not rival.failed}
    failed = timed.failed or ("" if rivals else "no dense attention runs here to compare with")
    if failed or attention is None:
        yield row | {"failed": failed}
        return
    with torch.no_grad():
        result = attention(*timed.inputs, round_.film, hidden=timed.attend.args[-1])  # type: ignore[attr-defined]
    cost = result.cost()
    executed = sum(plan.executed(result.kernel, batch=1, heads=round_.heads) for plan in result.plans)
    for which in PASSES:
        fastest = min(rivals, key=lambda name: rivals[name].median(which))
        seconds, dense_seconds = timed.median(which), rivals[fastest].median(which)
        yield row | {
            "kernel": result.kernel,
            "pass": which,
            "density": cost.density,
            "bound": cost.bound,
            "seconds": seconds,
            "dense_seconds": dense_seconds,
            "dense_kernel": fastest,
            "dense_all": {name: rival.median(which) for name, rival in rivals.items()},
            "attained": dense_seconds / seconds,
            "attained_over_bound": dense_seconds / seconds / cost.bound,
            "routing_share": timed.median("routing") / seconds,
            "padded_share": executed / cost.pairs - 1,
            "peak_memory_ratio": timed.memory[which] / rivals[fastest].memory[which],
            "spread": (max(timed.seconds[which]) - min(timed.seconds[which])) / seconds,
        }


def about(device: torch.device) -> dict[str, Any]:
    """Where it was measured: device, threads, versions, commit (null outside of a checkout), date."""
    try:
        asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or None
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
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def run(rounds: Sequence[Round], repeats: int, device: torch.device, told: Told = lambda _: None) -> dict[str, Any]:
    """All rounds: {"device", "threads", "versions", "commit", "date", "repeats", "rows"}, ready for JSON."""
    rows = [row for round_ in rounds for row in measure(round_, repeats, device, told)]
    return {**about(device), "repeats": repeats, "rows": rows}


def chosen(
    suite_name: str, methods: Sequence[str], tokens: Sequence[int], kernel: str | None, dtype: str | None
) -> list[Round]:
    """A suite's rounds, narrowed to some methods, film lengths (the CPU's entries on films of these lengths) and so on.

    Raises `ZooError` with every reason, also when nothing is left.
    """
    refuse(
        "bench",
        [unknown("method", method, zoo.names()) for method in methods if method not in zoo.names()]
        + [f"tokens must be at least 1, got {length}" for length in tokens if length < 1]
        + ([unknown("dtype", dtype, DTYPES)] if dtype is not None and dtype not in DTYPES else [])
        + ([unknown("kernel", kernel, zoo.kernels())] if kernel not in (None, "auto", *zoo.kernels()) else []),
    )
    rounds = [Round(film_of(length), CPU_ENTRIES) for length in tokens] if tokens else list(suite(suite_name))
    narrowed = [
        Round(
            round_.film,
            tuple(
                Entry(entry.method, entry.settings, kernel or entry.kernel)
                for entry in round_.entries
                if not methods or entry.method in methods
            ),
            round_.heads,
            round_.head_dim,
            dtype or round_.dtype,
        )
        for round_ in rounds
    ]
    narrowed = [round_ for round_ in narrowed if round_.entries]
    refuse("bench", ["nothing is left to measure: see --suite, --methods"] if not narrowed else [])
    return narrowed


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines for a terminal."""
    yield (
        f"{'method':10} {'kernel':9} {'tokens':>7} {'dtype':8} {'pass':16} {'ms':>9} {'dense ms':>9} {'bound':>6} "
        f"{'attained':>8} {'÷ bound':>7} {'routing':>7} {'memory':>6} {'spread':>6}"
    )
    for row in rows:
        name = f"{row['method']:10} {row['kernel']:9} {row['tokens']:7} {row['dtype']:8}"
        if "failed" in row:
            yield f"{name} {row['failed']}"
            continue
        yield (
            f"{name} {row['pass']:16} {row['seconds'] * 1e3:9.1f} {row['dense_seconds'] * 1e3:9.1f} "
            f"{row['bound']:6.2f} {row['attained']:8.2f} {row['attained_over_bound']:7.2f} "
            f"{row['routing_share']:7.1%} {row['peak_memory_ratio']:6.2f} {row['spread']:6.1%}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sparse_zoo.bench", description=__doc__)
    suites = "; ".join(f"{name}: {what}" for name, what in SUITES.items())
    parser.add_argument("--suite", default="quick", help=f"{suites} (default: quick)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[], help="lengths of the CPU's films instead")
    parser.add_argument("--methods", nargs="+", default=[], metavar="METHOD", help="only these")
    parser.add_argument("--kernel", help="this kernel for every method")
    parser.add_argument("--dtype", help=f"one of {', '.join(DTYPES)}")
    parser.add_argument("--repeats", type=int, default=5, help="measured turns, medians are given (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() and given.suite == "gpu" else "cpu")
    try:
        rounds = chosen(given.suite, given.methods, given.tokens, given.kernel, given.dtype)
    except ZooError as error:
        parser.error(str(error))
    found = run(rounds, given.repeats, device, lambda what: print(what, file=sys.stderr))
    if given.json:
        print(json.dumps(found, indent=1))
    else:
        print(*table(found["rows"]), sep="\n")
    return 1 if any("failed" in row for row in found["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
