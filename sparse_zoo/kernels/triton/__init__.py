"""The `triton` kernel: gathers inside the kernel, with the vendor's dense kernel for large rectangles.

Tiles of queries that chose one chunk are gathered by index where they are multiplied, so that no k-fold copy of q is
made; large dense rectangles go to cuDNN or flash attention on slices; partial rows are merged by log-sum-exp in a fixed
order. Every row has one writer, so that results are the same from run to run wherever the vendor's backward is; with
`torch.use_deterministic_algorithms(True)` that is flash attention's.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from sparse_zoo.errors import refuse
from sparse_zoo.kernels.base import Kernel
from sparse_zoo.kernels.triton import dense
from sparse_zoo.kernels.triton.configs import CONFIGS, HEAD_DIMS, INTERPRETED, Config, Tile, choose
from sparse_zoo.kernels.triton.work import Work, work_of
from sparse_zoo.light import broadcast_shapes
from sparse_zoo.plan import Plan

OLDEST = (8, 0)


class Triton(Kernel):
    """Any plan, forward and backward: bfloat16 and float16 on CUDA, float32 and float16 in Triton's interpreter."""

    name = "triton"
    weighs_keys = True
    by_cudnn = False
    """Whether parts that route tokens to slices of the stream go to cuDNN's variable-length attention."""

    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:
        """Name each unmet need: Triton, a device, and tensors on it with a dtype and head dim that it computes."""
        reasons = []
        if find_spec("triton") is None:
            reasons.append("needs the package triton, which is not installed")
        if not interpreted() and not torch.cuda.is_available():
            reasons.append("needs a CUDA device, torch sees none (or Triton's interpreter: TRITON_INTERPRET=1)")
        elif not interpreted() and torch.cuda.get_device_capability() < OLDEST:
            reasons.append(
                f"needs compute capability 8.0 or newer, this device has {torch.cuda.get_device_capability()}"
            )
        if q is not None and v is not None:
            reasons += _unfit_tensors(q, v)
        return reasons

    def run(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
        """Run large dense rectangles and the gather kernels in one autograd node; `scale` must be above 0."""
        refuse("kernel 'triton'", [f"scale must be above 0, got {scale}" if scale <= 0 else ""])
        from sparse_zoo.kernels.triton.union import Union  # imports Triton

        out, lse = Union.apply(q, k, v, plan, scale, _config(q)._replace(cudnn=self.by_cudnn))
        return out, lse

    def executed(self, plan: Plan, batch: int, heads: int) -> int:
        """Of the tiles for the newest device and head dim 128, or of the interpreter's."""
        config = INTERPRETED if interpreted() else CONFIGS[max(CONFIGS)]
        total = 0
        for part in plan.parts:
            rectangles = dense.rectangles(part)
            if rectangles:
                total += batch * heads * dense.executed(rectangles)
            elif work := work_of(part, config):
                total += _multiplied(work.by_query, work.tiles(config).attend, batch, heads)
        return total


class Cudnn(Triton):
    """`triton`, with token-level routing on cuDNN's variable-length attention instead of our gather kernels."""

    name = "cudnn"
    by_cudnn = True

    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:
        """Name the package nvidia-cudnn-frontend if it is missing, and all unmet needs of `triton`."""
        missing = find_spec("cudnn") is None
        reasons = ["needs the package nvidia-cudnn-frontend, which is not installed"] if missing else []
        return reasons + super().why_not(q, v)


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _config(q: Tensor) -> Config:
    return INTERPRETED if interpreted() else choose(torch.cuda.get_device_capability(q.device), q.shape[-1])


def _unfit_tensors(q: Tensor, v: Tensor) -> list[str]:
    dim = q.shape[-1]
    # The interpreter computes in numpy, which has no bfloat16.
    where, widest = ("cpu", torch.float32) if interpreted() else ("cuda", torch.bfloat16)
    fits = dim > 0 and dim & (dim - 1) == 0 if interpreted() else dim in HEAD_DIMS
    allowed = "a power of two" if interpreted() else " or ".join(map(str, HEAD_DIMS))
    return [
        reason
        for reason in (
            f"tensors are on {q.device}, not {where}" if q.device.type != where else "",
            f"dtype {q.dtype} is not {widest} or {torch.float16}" if q.dtype not in (widest, torch.float16) else "",
            f"head dim {dim} is not {allowed}" if not fits else "",
            f"head dim of v ({v.shape[-1]}) differs from that of q ({dim})" if v.shape[-1] != dim else "",
        )
        if reason
    ]


def _multiplied(work: Work, tile: Tile, batch: int, heads: int) -> int:
    """Pairs that the tiles of a part multiply, padding included."""
    lengths = work.segments[..., 1] - work.segments[..., 0]
    steps = (lengths + tile.step - 1).div(tile.step, rounding_mode="floor").cumsum(-1)
    before = torch.nn.functional.pad(steps, (1, 0))
    lead = broadcast_shapes(before.shape[:2], work.tiles.shape[:2])
    before, tiles = before.expand(*lead, -1), work.tiles.expand(*lead, -1, -1).long()
    met = before.gather(-1, tiles[..., 3]) - before.gather(-1, tiles[..., 2])
    met = met.masked_fill(tiles[..., 1] == 0, 0).sum(-1)
    return int(met.expand(batch, heads).sum()) * tile.step * tile.rows
