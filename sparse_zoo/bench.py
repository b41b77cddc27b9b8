"""How much of the speedup that its pair count allows does a method attain? `python -m sparse_zoo.bench --help`.

attained = seconds of dense attention ÷ seconds of the method, routing included, both measured in this process, turn by
turn. bound = 1 / density. No time is reported for a kernel that does not first agree with the oracle.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sparse_zoo as zoo

HEAD_DIM = 64
SHOTS = 8
FRAME = (16, 32)
GATE_ERROR = 1e-4
CPU_SUITE: dict[str, dict[str, Any]] = {
    "moc": {"top_k": 4, "anchors": ("shot",), "causal": None},
    "moc_fixed": {"top_k": 4, "chunk_tokens": 512, "anchors": ("shot",), "causal": None},
    "moga": {"groups": 5},
    "window": {"tile": (2, 8, 8), "window": (3, 3, 3)},
}


def film_of(tokens: int) -> zoo.Layout:
    """`SHOTS` equal shots of 16 × 32 frames, as many whole frames as fit `tokens`."""
    frames = max(1, tokens // (SHOTS * FRAME[0] * FRAME[1]))
    return zoo.Layout.film([zoo.Shot(frames, *FRAME)] * SHOTS)


def tensors(film: zoo.Layout, heads: int) -> tuple[list[Tensor], Tensor, Tensor]:
    shape = (1, heads, len(film), HEAD_DIM)
    return (
        [torch.randn(shape, requires_grad=True) for _ in range(3)],
        torch.randn(shape),
        torch.randn(1, len(film), HEAD_DIM),
    )


def gate(attention: zoo.Attention) -> float:
    """Largest error of output and gradients against the oracle in float64, on a small film of the same make."""
    film = zoo.Layout.film([zoo.Shot(2, 6, 9)] * SHOTS)
    inputs, weight, hidden = tensors(film, 1)
    q, k, v = inputs
    worst = 0.0
    for plan in attention(q, k, v, film, hidden=hidden).plans:
        ours = zoo.attend(q, k, v, plan, kernel=attention.kernel)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        oracle = zoo.attend(wide[0], wide[1], wide[2], plan, kernel="reference")
        pairs = [(ours.out, oracle.out)]
        pairs += zip(
            torch.autograd.grad(ours.out, inputs, weight),
            torch.autograd.grad(oracle.out, wide, weight.double()),
            strict=True,
        )
        worst = max(worst, *(float((a - b).detach().abs().max()) for a, b in pairs))
    return worst


def timed(run: Callable[[], Tensor], weight: Tensor, inputs: list[Tensor]) -> tuple[float, float]:
    """Seconds of one forward, and of one forward + backward."""
    for x in inputs:
        x.grad = None
    start = time.perf_counter()
    out = run()
    middle = time.perf_counter()
    out.backward(weight)
    return middle - start, time.perf_counter() - start


def measure(methods: dict[str, dict[str, Any]], tokens: int, heads: int, repeats: int) -> list[dict[str, Any]]:
    """Rows for each method, forward and forward + backward: medians of `repeats` rounds of all in turn."""
    film = film_of(tokens)
    inputs, weight, hidden = tensors(film, heads)
    q, k, v = inputs
    built = {name: zoo.build(name, heads=heads, head_dim=HEAD_DIM, dim=HEAD_DIM, **s) for name, s in methods.items()}
    errors = {name: gate(attention) for name, attention in built.items()}
    runs: dict[str, Callable[[], Tensor]] = {"sdpa": lambda: scaled_dot_product_attention(q, k, v)}
    for name, attention in built.items():
        if errors[name] <= GATE_ERROR:
            runs[name] = lambda attention=attention: attention(q, k, v, film, hidden=hidden).out  # type: ignore[misc]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():  # the first round warms up and is not counted
            once = timed(run, weight, inputs)
            if turn:
                seconds[name].append(once)
    rows: list[dict[str, Any]] = []
    for name, attention in built.items():
        row = {"method": name, "settings": methods[name], "tokens": len(film), "heads": heads, "head_dim": HEAD_DIM}
        if name not in runs:
            rows.append({**row, "failed": f"differs from the oracle by {errors[name]:.1e}, allowed {GATE_ERROR:.0e}"})
            continue
        result = attention(q, k, v, film, hidden=hidden)
        cost = result.cost()
        executed = sum(plan.executed(result.kernel, batch=1, heads=heads) for plan in result.plans)
        for number, which in enumerate(("forward", "forward+backward")):
            ours, dense = ([once[number] for once in seconds[key]] for key in (name, "sdpa"))
            attained = statistics.median(dense) / statistics.median(ours)
            rows.append(
                {
                    **row,
                    "kernel": result.kernel,
                    "dtype": "float32",
                    "pass": which,
                    "density": cost.density,
                    "bound": cost.bound,
                    "seconds": statistics.median(ours),
                    "dense_seconds": statistics.median(dense),
                    "dense_kernel": "torch.nn.functional.scaled_dot_product_attention",
                    "attained": attained,
                    "attained_over_bound": attained / cost.bound,
                    "padded_share": executed / cost.pairs - 1,
                    "spread": (max(ours) - min(ours)) / statistics.median(ours),
                }
            )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sparse_zoo.bench", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384], help="stream lengths (default: 16384)")
    parser.add_argument("--methods", nargs="+", default=list(CPU_SUITE), choices=list(CPU_SUITE), metavar="METHOD")
    parser.add_argument("--heads", type=int, default=2, help="heads (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds, medians are given (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for tokens in given.tokens:
        print(f"measuring {tokens} tokens", file=sys.stderr)
        rows += measure({name: CPU_SUITE[name] for name in given.methods}, tokens, given.heads, given.repeats)
    if given.json:
        about = {"device": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        versions = {"torch": str(torch.__version__), "python": platform.python_version()}
        print(json.dumps({**about, "versions": versions, "rows": rows}, indent=1))
    else:
        print(
            f"{'method':10} {'tokens':>7} {'pass':17} {'ms':>8} {'dense ms':>9} {'bound':>6} {'attained':>9}  ÷ bound"
        )
        for row in rows:
            name = f"{row['method']:10} {row['tokens']:7}"
            if "failed" in row:
                print(name, row["failed"])
            else:
                print(
                    name,
                    f"{row['pass']:17} {row['seconds'] * 1e3:8.1f} {row['dense_seconds'] * 1e3:9.1f}",
                    f"{row['bound']:6.2f} {row['attained']:9.2f} {row['attained_over_bound']:8.2f}",
                )
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
