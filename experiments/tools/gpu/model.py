"""A whole training step of a video DiT at 180k tokens, moc against dense."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import sparse_zoo as zoo
from experiments.tools.gpu import rows
from experiments.tools.gpu.checks import FILM, LONG, name_of
from experiments.tools.gpu.common import TINY, device_of, dtype_of, kernel_of, long_size, seconds_of
from experiments.tools.gpu.rows import Row
from experiments.tools.gpu.stage import Run, in_one_line
from sparse_zoo import bench
from sparse_zoo.errors import refuse
from sparse_zoo.kernels.base import Kernel

MODEL: dict[str, Any] = {"dim": 1536, "depth": 2, "heads": 12, "channels": 16, "patch": (1, 2, 2), "vocabulary": 512}
TINY_MODEL: dict[str, Any] = {"dim": 32, "depth": 1, "heads": 2, "channels": 2, "patch": (1, 2, 2), "vocabulary": 8}


class Sdpa(Kernel):
    """The dense rival: torch's own attention on whole films, cuDNN's kernel first. It gives no lse."""

    name = "sdpa"

    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:  # noqa: ARG002
        """Return no reason: torch's attention runs everywhere. `run` itself refuses plans that are not dense."""
        return []

    def run(self, q: Tensor, k: Tensor, v: Tensor, plan: zoo.Plan, scale: float) -> tuple[Tensor, Tensor]:
        """Return the dense attention of one film, and NaN for every lse; raise `ZooError` for any other plan."""
        full = int(plan.pairs.sum()) == plan.shape[0] * plan.shape[1] * plan.batch_heads[0] * plan.batch_heads[1]
        refuse("kernel 'sdpa'", [] if full else ["computes dense attention on one film alone"])
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(order, set_priority=True):
            out = scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out, q.new_full(q.shape[:3], torch.nan, dtype=torch.float32)

    def executed(self, plan: zoo.Plan, batch: int, heads: int) -> int:
        """Return the pairs of dense attention, which are all computed whatever the plan says."""
        return batch * heads * plan.shape[0] * plan.shape[1]


def step(run: Run) -> Iterator[Row]:
    """Noise, forward, backward with recomputed blocks, AdamW. moc first: the dense step takes four times as long."""
    if "sdpa" not in zoo.kernels():
        zoo.register_kernel(Sdpa())
    head_dim = long_size(run).head_dim
    needs = [name_of(what, dtype_of(run), head_dim) for what in (FILM, LONG)]
    settings = {"top_k": 2} if run.tiny else bench.PAPER_MOC
    seconds: dict[str, float] = {}
    for method, attention in (
        ("moc", {"name": "moc", "kernel": kernel_of(run), **settings}),
        ("dense", {"name": "dense", "kernel": "sdpa"}),
    ):
        name = f"training step, {method} on {attention['kernel']}"
        reason = run.rows.untimed(needs) if method == "moc" else ""
        if reason or run.left() < 2 * seconds.get("moc", 0.0):
            yield rows.not_timed(name, reason or "no time was left for it")
            continue
        try:
            found = _steps(attention, run)
        except (zoo.ZooError, torch.OutOfMemoryError) as error:  # the other method may still fit
            yield rows.check(name, in_one_line(error))
            continue
        seconds[method] = found["seconds"]
        yield rows.time(name, **found)
    if len(seconds) == 2:
        yield rows.fact("training step, dense ÷ moc", speedup=seconds["dense"] / seconds["moc"])


def _steps(attention: dict[str, Any], run: Run) -> dict[str, Any]:
    from lit_modules.dit import VideoDiT
    from lit_modules.flow import RectifiedFlow, generator

    device, model = device_of(run), TINY_MODEL if run.tiny else MODEL
    film = (TINY if run.tiny else bench.PAPER_FILM).to(device)
    torch.manual_seed(0)
    dit = VideoDiT(**model, attention=attention, checkpoint=True).to(device)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-4)
    frames, height, width = model["patch"]
    sizes = [(shot.frames * frames, shot.rows * height, shot.cols * width) for f in film.films for shot in f.shots]
    batch = {
        "layout": film,
        "clips": [torch.randn(1, f, model["channels"], h, w, device=device) for f, h, w in sizes],
        "text": torch.randint(model["vocabulary"], (1, int(film.is_text.sum())), device=device),
    }
    densities: list[float] = []

    def once(number: int) -> Callable[[], None]:
        def call() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                draws = generator("gpu step", number)
                found = RectifiedFlow().training_loss(dit, batch, draws, step=number, seed=0)
            found.loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            densities[:] = [result.cost().density for result in found.output.results]

        return call

    peak = bench.peak_bytes(once(0), device)
    seconds = seconds_of(once(1), device, 1 if run.tiny else 2)
    return {
        "seconds": seconds,
        "peak_memory_gib": peak / 2**30,
        "density": statistics.mean(densities),
        "parameters": sum(parameter.numel() for parameter in dit.parameters()),
    }
