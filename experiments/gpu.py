"""What only a GPU can tell, in one command of ten minutes: `make gpu`, or python3 -m experiments.gpu --help.

check: every kernel that runs on the GPU through the kernel suite, and every method on all of these -> gpu_check.json.
bench: the suite `gpu` of sparse_zoo.bench -> gpu_attention.json.
step: a training step of a video DiT at 180k tokens, moc against dense, on every such kernel -> gpu_step.json.

Needs torch and Triton, for the step Lightning too. A part that runs out of time names what it left out; files are
written as results come. Exit code 1 if a check or a step failed, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import sparse_zoo as zoo
from sparse_zoo import bench
from sparse_zoo.errors import ZooError, refuse
from sparse_zoo.kernels import get
from sparse_zoo.kernels.base import Kernel
from sparse_zoo.kernels.flash_attn import FlashAttn
from sparse_zoo.testing import run_checks, run_kernel_checks
from sparse_zoo.testing.subject import place

RESULTS = Path(__file__).parent / "results"
SHARE = {"check": 0.3, "bench": 0.45, "step": 0.25}
"""Of the time given, for each part."""
METHOD_CHECKS = ("output_equals_oracle", "gradients_equal_oracle", "pairs_counted")
"""Those that go through every usable kernel on its own device; the others judge methods alone, on the CPU."""
MODEL = {"dim": 1536, "depth": 2, "heads": 12, "channels": 16, "patch": (1, 2, 2), "vocabulary": 512}


class Report:
    """A JSON file {"device", …, "left_out", rows}, written anew whenever something is added, and a deadline."""

    def __init__(self, path: Path, rows: str, device: torch.device, seconds: float) -> None:
        self.path, self.rows, self.end = path, rows, time.monotonic() + seconds
        self.held: dict[str, Any] = {**bench.about(device), "left_out": [], rows: []}
        self.write()

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        self.held[self.rows] += rows
        self.write()

    def late(self, what: str, needed: float = 0.0) -> bool:
        """Whether `needed` seconds are no longer there for it; then it is named as left out."""
        if time.monotonic() + needed < self.end:
            return False
        self.held["left_out"].append(what)
        self.write()
        return True

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.held, indent=1) + "\n")


def told(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def check(report: Report, kernels: Iterable[str], methods: Iterable[str]) -> bool:
    """The shipped suites, one outcome after the other; whether none failed."""
    report.held |= {"kernels": zoo.kernels(), "flash_attn": FlashAttn().package()}
    for kernel in kernels:
        if report.late(kernel):
            continue
        for outcome in run_kernel_checks(kernel):
            told(f"{kernel} {outcome.check}: {outcome.status} {outcome.reason}")
            report.add([asdict(outcome)])
            if report.late(f"{kernel} after {outcome.check}"):
                break
    for method in methods:
        if not report.late(method):
            for outcome in run_checks(method, only=METHOD_CHECKS):
                told(f"{method} {outcome.check}: {outcome.status}")
                report.add([asdict(outcome)])
    return all(outcome["status"] != "failed" for outcome in report.held["outcomes"])


def speed(report: Report, rounds: Iterable[bench.Round], repeats: int, device: torch.device) -> None:
    """Rows of the bench, round by round; a round that would take as long as the longest so far must still fit."""
    report.held["repeats"] = repeats
    longest = 0.0
    for round_ in rounds:
        names = sorted({f"{entry.method} on {entry.kernel}" for entry in round_.entries})
        what = f"{len(round_.film)} tokens, head dim {round_.head_dim}, {round_.dtype}: {', '.join(names)}"
        if report.late(what, longest):
            continue
        start = time.monotonic()
        report.add(bench.measure(round_, repeats, device, told))
        longest = max(longest, time.monotonic() - start)


class Sdpa(Kernel):
    """The dense rival: torch's own attention on whole films, cuDNN's kernel first. Its lse is not told."""

    name = "sdpa"

    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:  # noqa: ARG002
        return []

    def run(self, q: Tensor, k: Tensor, v: Tensor, plan: zoo.Plan, scale: float) -> tuple[Tensor, Tensor]:
        full = int(plan.pairs.sum()) == plan.shape[0] * plan.shape[1] * plan.batch_heads[0] * plan.batch_heads[1]
        refuse("kernel 'sdpa'", [] if full else ["computes dense attention on one film alone"])
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(order, set_priority=True):
            out = scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out, q.new_full(q.shape[:3], torch.nan, dtype=torch.float32)

    def executed(self, plan: zoo.Plan, batch: int, heads: int) -> int:
        return batch * heads * plan.shape[0] * plan.shape[1]


def step(
    report: Report,
    kernels: Iterable[str],
    film: zoo.Layout,
    model: dict[str, Any],
    repeats: int,
    device: torch.device,
) -> bool:
    """Whole training steps (noise, forward, backward with recomputed blocks, AdamW); whether none failed."""
    report.held |= {"model": model, "tokens": len(film), "repeats": repeats}
    named: list[tuple[str, dict[str, Any]]] = [("dense", {"name": "dense", "kernel": "sdpa"})]
    for kernel in kernels:
        named += [
            ("moc", {"name": "moc", "kernel": kernel, **bench.PAPER_MOC}),
            ("dense", {"name": "dense", "kernel": kernel}),
        ]
    for method, attention in named:
        what = f"{method} on {attention['kernel']}"
        if report.late(what):
            continue
        told(f"step: {what}")
        row: dict[str, Any] = {"method": method, "kernel": attention["kernel"]}
        try:
            row |= _steps(attention, film, model, repeats, device)
        except (ZooError, RuntimeError) as error:  # another kernel may still do it
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        report.add([row])
    return all("failed" not in row for row in report.held["steps"])


def _steps(
    attention: dict[str, Any], film: zoo.Layout, model: dict[str, Any], repeats: int, device: torch.device
) -> dict[str, Any]:
    from lit_modules.dit import VideoDiT
    from lit_modules.flow import RectifiedFlow, generator

    torch.manual_seed(0)
    dit = VideoDiT(**model, attention=attention, checkpoint=True).to(device)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-4)
    film = film.to(device)
    shots = [shot for whole in film.films for shot in whole.shots]
    size = [
        (shot.frames * model["patch"][0], shot.rows * model["patch"][1], shot.cols * model["patch"][2])
        for shot in shots
    ]
    batch = {
        "layout": film,
        "clips": [torch.randn(1, f, model["channels"], h, w, device=device) for f, h, w in size],
        "text": torch.randint(model["vocabulary"], (1, int(film.is_text.sum())), device=device),
    }
    densities: list[float] = []

    def once(number: int) -> Callable[[], None]:
        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                draws = generator("gpu step", number)
                found = RectifiedFlow().training_loss(dit, batch, draws, step=number, seed=0)
            found.loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            densities[:] = [result.cost().density for result in found.output.results]

        return run

    bench._seconds(once(0), device)
    seconds = [bench._seconds(once(number), device) for number in range(1, repeats + 1)]
    peak = bench.peak_bytes(once(repeats + 1), device)
    return {
        "seconds": statistics.median(seconds),
        "spread": (max(seconds) - min(seconds)) / statistics.median(seconds),
        "peak_memory": peak,
        "density": statistics.mean(densities),
        "parameters": sum(parameter.numel() for parameter in dit.parameters()),
    }


def on_gpu() -> list[str]:
    """The kernels that run on the GPU, the oracle aside, those that compile for minutes last."""
    usable = [name for name, reasons in zoo.kernels().items() if not reasons]
    names = [name for name in usable if (found := place(get(name))) and found[0] == "cuda"]
    return sorted(names, key=lambda name: get(name).compiles_each_shape)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m experiments.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=SHARE, nargs="+", default=list(SHARE), help="these alone (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the files (default: experiments/results)")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together (default: 9.5)")
    parser.add_argument("--repeats", type=int, default=3, help="turns that are timed, medians are given (default: 3)")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        told("No GPU: torch sees no CUDA device, so there is nothing to run. `make test` needs none.")
        return 2
    device = torch.device("cuda")
    kernels, fine = on_gpu(), True
    told(f"{torch.cuda.get_device_name()}: {', '.join(kernels)}")
    total = sum(SHARE[part] for part in given.part)
    for part in given.part:
        seconds = given.minutes * 60 * SHARE[part] / total
        if part == "check":
            fine &= check(Report(given.out / "gpu_check.json", "outcomes", device, seconds), kernels, zoo.names())
        elif part == "bench":
            report = Report(given.out / "gpu_attention.json", "rows", device, seconds)
            speed(report, bench.suite("gpu"), given.repeats, device)
            print(*bench.table(report.held["rows"]), sep="\n")
        else:
            zoo.register_kernel(Sdpa())
            report = Report(given.out / "gpu_step.json", "steps", device, seconds)
            fine &= step(report, kernels, bench.PAPER_FILM, MODEL, given.repeats, device)
            print(json.dumps(report.held["steps"], indent=1))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
