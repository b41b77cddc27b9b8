"""What is timed, each only after its checks passed in this run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import sparse_zoo as zoo
from experiments.tools.gpu import rows
from experiments.tools.gpu.checks import CHOICE, LONG, judged, name_of
from experiments.tools.gpu.common import (
    TINY,
    Problem,
    Trace,
    device_of,
    dtype_of,
    kernel_of,
    long_size,
    problem,
    save_trace,
    seconds_of,
    tiles,
    traced,
)
from experiments.tools.gpu.rows import Row
from experiments.tools.gpu.stage import Run, in_one_line
from sparse_zoo import bench
from sparse_zoo.bench.competitors import dense_engines
from sparse_zoo.kernels import get
from sparse_zoo.kernels.triton import dense
from sparse_zoo.kernels.triton.configs import Tile
from sparse_zoo.testing import large

OTHERS = {name: settings for name, settings in bench.GPU_LAYOUTS[0][1] if name != "moc"}
"""Sparse methods, as the bench has them in the paper's film."""
TINY_OTHERS = {"moga": {"groups": 2}}

# -- dense attention, the rival ---------------------------------------------------------------------------------------


SLOWER = 1.2
"""Times the fastest forward: engines that take longer are no rivals, and their minutes are spared."""


def rivals(run: Run) -> Iterator[Row]:
    """Every dense attention here, checked at sampled tokens: the forward of all, the backward of the fastest ones."""
    size, device = long_size(run), device_of(run)
    asked = problem(run, size)
    plan = zoo.Plan.dense(asked.film)
    sampled = large.Sampled(plan, asked.given, tokens=8 if run.tiny else 64, heads=1)
    pairs = size.heads * len(asked.film) ** 2
    engines = dense_engines(asked.given.q)
    q, k, v = (x.detach().requires_grad_() for x in asked.given[:3])
    forward = {name: seconds_of(_forward_only(engine, q, k, v), device, 2) for name, engine in engines.items()}
    for name, engine in engines.items():
        rate = 4 * size.head_dim * pairs / forward[name] / 1e12
        out = engine(q, k, v)
        item, head = sampled.rows[0][0]
        wanted = sampled.rows[0][1]
        fast = forward[name] <= SLOWER * min(forward.values())
        grads = torch.autograd.grad(out, (q, k, v), asked.given.grad) if fast else ()
        findings = [
            large.compare(what, got[item, head, sampled.queries], *wanted[what])
            for what, got in zip(("out", "dq"), (out.detach(), *grads[:1]), strict=False)
        ]
        check = judged(name_of(name, dtype_of(run), size.head_dim), findings)
        yield check
        del out, grads
        both = f"{name}, forward+backward"
        if reason := run.rows.untimed([check["name"]]):
            yield rows.not_timed(f"{name}, forward", reason)
            yield rows.not_timed(both, reason)
            continue
        yield rows.time(f"{name}, forward", forward[name], teraflops=rate)
        if not fast:
            yield rows.not_timed(both, f"not timed: its forward takes over {SLOWER} times the fastest")
            continue
        seconds = seconds_of(_both(engine, q, k, v, asked.given.grad), device, 1)
        yield rows.time(both, seconds, teraflops=14 * size.head_dim * pairs / seconds / 1e12)


def _forward_only(engine: Callable[..., torch.Tensor], *qkv: torch.Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> object:
        return engine(*qkv)

    return call


def _both(
    engine: Callable[..., torch.Tensor], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor
) -> Callable[[], object]:
    return lambda: torch.autograd.grad(engine(q, k, v), (q, k, v), grad)


# -- one step, kernel by kernel ---------------------------------------------------------------------------------------

GROUPS = (
    ("pooling", ("pool",)),
    ("top-k", ("choose",)),
    ("attend", ("attend",)),
    ("merge", ("merge", "fold")),
    ("row sums", ("row_dots",)),
    ("dq", ("grad_queries",)),
    ("dk/dv", ("grad_keys",)),
    ("sums", ("add_up", "add_rows")),
    ("gather", ("gather",)),
    ("dense forward", ("fprop", "fmha_fwd", "flash_fwd", "_scaled_dot_product_flash_attention_for_cpu")),
    ("dense backward", ("bprop", "fmha_bwd", "flash_bwd", "dot_do_o", "flash_attention_for_cpu_backward")),
    ("index", ("sort", "scatter", "gather", "searchsorted", "scan", "cumsum", "histogram", "index")),
    ("copies", ("memcpy", "copy")),
    ("zeros", ("memset", "fill", "zero")),
    ("sums and casts", ("reduce", "elementwise", "sum", "add", "cat")),
)
"""What a kernel is for, by what its name begins with, or, for the vendors' and torch's, holds; the first that fits."""


def group_of(kernel: str) -> str:
    """The group of a device kernel; "other" for one that is in none."""
    own = {name for group, names in GROUPS[:9] for name in names}
    name = kernel.lower()
    for group, signs in GROUPS:
        if any(name.startswith(sign) if sign in own else sign in name for sign in signs):
            return group
    return "other"


def breakdown(run: Run) -> Iterator[Row]:
    """moc at 180k tokens by device kernel, from a profiler's trace: forward, then forward + backward.

    Then, while there is time, the bench's other sparse methods in the same way, on the same q, k and v.
    The stage `end-to-end` checks them.
    """
    size = long_size(run)
    needs = [
        name_of(LONG, dtype_of(run), size.head_dim),
        name_of(f"{CHOICE}, 180k tokens", dtype_of(run), size.head_dim),
    ]
    reason = run.rows.untimed(needs)
    if reason:
        yield rows.not_timed("moc by kernel", reason)
        return
    asked = problem(run, size)
    for which, call in _passes(asked).items():
        call()
        trace = traced(call, device_of(run))
        yield from by_group(which, trace)
        save_trace(trace, run.out / "trace.json.gz")
    for which, call in _passes(asked).items():
        yield rows.time(f"{which}: whole", seconds_of(call, device_of(run), size.repeats))
        yield rows.time(f"{which}: until the host is done", _host_seconds(call, device_of(run)))
    for name, settings in (TINY_OTHERS if run.tiny else OTHERS).items():
        if run.left() < (0.0 if run.tiny else 10.0):
            yield rows.not_timed(f"{name} by kernel", "no time was left for it")
            continue
        dim = size.heads * size.head_dim
        attention = zoo.build(
            name, heads=size.heads, head_dim=size.head_dim, dim=dim, kernel=kernel_of(run), **settings
        ).to(device_of(run))
        hidden = torch.randn(1, len(asked.film), dim, device=device_of(run))
        for which, call in _passes(asked._replace(attention=attention), hidden).items():
            call()
            yield from by_group(f"{name}, {which}", traced(call, device_of(run)))


def by_group(title: str, trace: Trace) -> Iterator[Row]:
    """Rows of a trace: each group, the sum, and the largest kernels that are in no group."""
    total = sum(trace.seconds.values())
    for row in grouped(trace):
        yield rows.time(f"{title}: {row['group']}", row["seconds"], share=row["seconds"] / total, calls=row["calls"])
    yield rows.time(f"{title}: all kernels", total)
    others = sorted(((s, n) for n, s in trace.seconds.items() if group_of(n) == "other"), reverse=True)[:5]
    if others:
        yield rows.fact(f"{title}: largest of other", kernels=[f"{name[:80]} {s * 1e3:.2f} ms" for s, name in others])


def grouped(trace: Trace) -> list[dict[str, Any]]:
    """Seconds and calls by group, largest first."""
    found: dict[str, dict[str, Any]] = {}
    for name, seconds in trace.seconds.items():
        entry = found.setdefault(group_of(name), {"group": group_of(name), "seconds": 0.0, "calls": 0})
        entry["seconds"] += seconds
        entry["calls"] += trace.calls[name]
    return sorted(found.values(), key=lambda entry: -entry["seconds"])


def _passes(asked: Problem, hidden: torch.Tensor | None = None) -> dict[str, Callable[[], object]]:
    """Forward, and forward + backward, planning included."""
    q, k, v = (x.detach().requires_grad_() for x in asked.given[:3])

    def attend() -> torch.Tensor:
        out: torch.Tensor = asked.attention(q, k, v, asked.film, hidden=hidden).out
        return out

    @torch.no_grad()
    def forward() -> object:
        return attend()

    def both() -> object:
        return torch.autograd.grad(attend(), (q, k, v), asked.given.grad)

    return {"forward": forward, "forward+backward": both}


def _host_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds until a call returns, with an idle device: planning and launching, unless something waits."""
    taken = []
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        kept = call()
        taken.append(time.perf_counter() - start)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        del kept
    return statistics.median(taken)


# -- anchors ----------------------------------------------------------------------------------------------------------


def anchors(run: Run) -> Iterator[Row]:
    """The vendor's kernel on one shot: three heads a call, all heads, and shots of equal length as batch items."""
    size = long_size(run)
    device, dtype = device_of(run), dtype_of(run)
    needs = [name_of("dense", dtype, size.head_dim)]
    shots, length = (2, 32) if run.tiny else (5, 18 * 32 * 40)
    for title, items, heads in (("3 heads", 1, 3), ("all heads", 1, size.heads), (f"{shots} shots", shots, size.heads)):
        reason = run.rows.untimed(needs)
        if reason:
            yield rows.not_timed(f"anchors, {title}", reason)
            continue
        one = large.Inputs.random(items * length, heads, heads, size.head_dim, dtype, device, seed=0)
        q, k, v, grad = (x.view(heads, items, length, -1).transpose(0, 1) for x in one)
        out, lse = dense.forward(q, k, v, one.scale)
        pairs = items * heads * length**2
        for which, call, per_pair in (
            ("forward", lambda q=q, k=k, v=v, s=one.scale: dense.forward(q, k, v, s), 4),
            (
                "backward",
                lambda g=grad, q=q, k=k, v=v, o=out, e=lse, s=one.scale: dense.backward(g, q, k, v, o, e, s),
                10,
            ),
        ):
            seconds = seconds_of(call, device, size.repeats)
            yield rows.time(
                f"anchors, {title}, {which}",
                seconds,
                teraflops=per_pair * size.head_dim * pairs / seconds / 1e12,
                milliseconds_of_24_heads_8_shots=seconds * 1e3 * 24 * 8 / (items * heads),
            )


# -- tiles ------------------------------------------------------------------------------------------------------------

SWEEP: tuple[tuple[str, tuple[Tile, ...]], ...] = (
    (
        "grad_keys",
        (
            Tile(128, 64, 8, 2, tma=True),
            Tile(64, 64, 4, 2, tma=True),
            Tile(128, 64, 8, 3, tma=True),
            Tile(128, 32, 8, 3, tma=True),
            Tile(64, 64, 8, 3, tma=True),
            Tile(64, 64, 8, 3),
        ),
    ),
    (
        "grad_queries",
        (
            Tile(64, 64, 4, 2, tma=True),
            Tile(128, 64, 8, 4, tma=True),
            Tile(128, 128, 8, 2, tma=True),
            Tile(128, 64, 8, 3, tma=True),
            Tile(64, 64, 4, 3, tma=True),
        ),
    ),
    (
        "attend",
        (
            Tile(64, 64, 4, 3, tma=True),
            Tile(128, 64, 8, 4, tma=True),
            Tile(128, 128, 8, 3, tma=True),
            Tile(64, 128, 4, 2, tma=True),
            Tile(64, 64, 4, 2, tma=True),
            Tile(128, 128, 8, 2, tma=True),
        ),
    ),
)
"""For head dim 128, by expected gain."""
TINY_SWEEP = (("attend", (Tile(16, 16, 1, 1),)), ("grad_keys", (Tile(8, 16, 1, 1),)))


def tiles_of(run: Run) -> tuple[tuple[str, tuple[Tile, ...]], ...]:
    """Return, for each kernel, the tiles to time: `SWEEP`, or `TINY_SWEEP` in a tiny run."""
    return TINY_SWEEP if run.tiny else SWEEP


def sweep_name(kernel: str, tile: Tile) -> str:
    """Return the name of a kernel with a tile: rows × step, warps, stages, and `tma` where it loads by TMA."""
    return f"{kernel} {tile.rows}×{tile.step} w{tile.warps} s{tile.stages}{' tma' if tile.tma else ''}"


def sweep(run: Run) -> Iterator[Row]:
    """Tiles of the routed part at 180k tokens: each is checked at sampled tokens, then its kernel is timed."""
    size = long_size(run)
    asked = problem(run, size)
    sampled = large.Sampled(asked.plan, asked.given, tokens=8 if run.tiny else 64, heads=1)
    kernel_name = kernel_of(run)
    for kernel, options in tiles_of(run):
        for tile in options:
            name = sweep_name(kernel, tile)
            if run.left() < (0 if run.tiny else 6):
                yield rows.not_timed(name, "no time was left for it")
                continue
            with tiles(size.head_dim, kernel, tile, attend_rows=True):
                try:
                    found = judged(name, sampled.judge(large.run(kernel_name, asked.plan, asked.given)))
                except Exception as error:  # a tile that does not compile or fit: the next one may
                    if "illegal" in in_one_line(error):
                        raise  # nothing else can run in this process
                    found = rows.check(name, in_one_line(error))
                yield found
                if found["status"] == "failed":
                    yield rows.not_timed(name, f"not timed: {name} failed")
                    continue
                trace = traced(lambda: large.run(kernel_name, asked.plan, asked.given), device_of(run))
                yield rows.time(name, trace.of(kernel), all_kernels=sum(trace.seconds.values()))


# -- the variable-length engine ---------------------------------------------------------------------------------------


def varlen(run: Run) -> Iterator[Row]:
    """The kernel "cudnn", whose routed parts go to cuDNN's variable-length attention: checked, then timed."""
    size = long_size(run)
    asked = problem(run, size)
    reasons = get("cudnn").why_not(asked.given.q, asked.given.v)
    if reasons:
        yield rows.skipped("varlen", "; ".join(reasons))
        return
    sampled = large.Sampled(asked.plan, asked.given, tokens=8 if run.tiny else 256)
    found = judged(
        name_of("varlen", dtype_of(run), size.head_dim), sampled.judge(large.run("cudnn", asked.plan, asked.given))
    )
    yield found
    for kernel, check in (("cudnn", found["name"]), ("triton", name_of(LONG, dtype_of(run), size.head_dim))):
        title = f"forward+backward of one plan on {kernel}"
        reason = run.rows.untimed([check])
        if reason:
            yield rows.not_timed(title, reason)
        else:
            call = partial(large.run, kernel, asked.plan, asked.given)
            yield rows.time(title, seconds_of(call, device_of(run), size.repeats))
            yield from by_group(f"one plan on {kernel}", traced(call, device_of(run)))


# -- end to end -------------------------------------------------------------------------------------------------------


def rounds(run: Run) -> list[bench.Round]:
    """What the marks are for, on the kernel under test: the bench's films with their methods, then head dim 64."""
    kernel = kernel_of(run)
    if run.tiny:
        return [bench.Round(TINY, (bench.Entry("moc", {"top_k": 2}, kernel),), 2, 16)]
    kernels = [kernel, *(["cudnn"] if not get("cudnn").why_not() else [])]
    moc = tuple(bench.Entry("moc", bench.PAPER_MOC, name) for name in kernels)
    found = []
    for film, methods in bench.GPU_LAYOUTS:
        others = (bench.Entry(method, settings, kernel) for method, settings in methods if method != "moc")
        own = moc if "moc" in dict(methods) else ()
        found.append(bench.Round(film, (*own, *others), heads=24, head_dim=128, dtype="bfloat16"))
    return [*found, bench.Round(bench.PAPER_FILM, moc, 24, 64, "bfloat16")]


def fastest_rival(run: Run) -> list[str]:
    """The dense attention of the shortest forward + backward in this run's `rivals`; none where that did not run."""
    end = ", forward+backward"
    taken = [row for row in run.rows.read() if row["stage"] == "rivals" and "seconds" in row]
    both = {row["name"].removesuffix(end): row["seconds"] for row in taken if row["name"].endswith(end)}
    return [min(both, key=lambda name: both[name])] if both else []


def end_to_end(run: Run) -> Iterator[Row]:
    """The bench's rounds: each entry passes its gate on its own film, then takes turns with dense attention."""
    device, rivals = device_of(run), fastest_rival(run)
    for round_ in rounds(run):
        shots = sum(len(film.shots) for film in round_.film.films)
        title = f"{len(round_.film)} tokens, {shots} shots, d {round_.head_dim}"
        if run.left() < (0.0 if run.tiny else 20.0):
            yield rows.not_timed(title, "no time was left for it")
            continue
        for row in bench.measure(round_, 1 if run.tiny else 2, device, lambda what: print(what), rivals=rivals):
            name = f"{row['method']} on {row['kernel']}, {title}"
            if "failed" in row:
                yield rows.check(f"{name}: gate", row["failed"])
                yield rows.not_timed(name, row["failed"])
                continue
            kept = {key: value for key, value in row.items() if key != "settings"}
            yield rows.time(f"{name}, {row['pass']}", kept.pop("seconds"), **kept)
