"""Which kernel "auto" takes: one table of rules on device, dtype and head dim, which needs no device to be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_zoo.kernels.triton.configs import HEAD_DIMS

HALF = (torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)
H100 = (9, 0)
SHOWN = (64, 80, 128, 256)
"""Head dims for which `zoo list` shows what an H100 would take."""


class Rule(NamedTuple):
    """A kernel that "auto" takes on a device type, for some dtypes and head dims, from a compute capability on.

    Head dims are those in `head_dims`; where it is empty, the multiples of 8 up to `largest`; where that is 0, any.
    """

    kernel: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    oldest: tuple[int, int] = (0, 0)
    head_dims: Sequence[int] = ()
    largest: int = 0

    def takes(self, device: str, capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> bool:
        """Whether the rule applies to a device type, compute capability, dtype and head dim."""
        fits = head_dim in self.head_dims if self.head_dims else not self.largest or self._within(head_dim)
        return device == self.device and dtype in self.dtypes and capability >= self.oldest and fits

    def _within(self, head_dim: int) -> bool:
        return head_dim % 8 == 0 and head_dim <= self.largest

    def described(self) -> str:
        """The head dims, for people."""
        if self.head_dims:
            return " or ".join(map(str, self.head_dims))
        return f"multiples of 8 up to {self.largest}" if self.largest else "any"


RULES = (
    Rule("triton", "cuda", HALF, (8, 0), HEAD_DIMS),
    Rule("torch", "cuda", HALF, (8, 0), largest=256),
    Rule("exact", "cuda", (*HALF, *WIDE)),
    Rule("cpu", "cpu", (*HALF, *WIDE)),
)
"""In the order in which they are tried. The oracle is never among them: it has to be asked for."""


def place(x: Tensor) -> tuple[str, tuple[int, int]]:
    """The device type and compute capability by which a tensor's kernel is chosen; (0, 0) off CUDA."""
    return x.device.type, torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else (0, 0)


def automatic(device: str, capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str:
    """The kernel that "auto" takes where all packages are there; "" for none."""
    return next((rule.kernel for rule in RULES if rule.takes(device, capability, dtype, head_dim)), "")
