"""The host's share of attention: the time of Python and torch's dispatch, without a device.

Tensors are on torch's `meta` device, which has shapes and no values, in place of a GPU: kernel launches are recorded
instead of made. An operation that would make the host wait for a value fails there, and GPU work takes no time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from sparse_zoo.attention import Attention
from sparse_zoo.errors import refuse
from sparse_zoo.layout import Layout

META = torch.device("meta")
CAPABILITY = (9, 0)


class Launch(NamedTuple):
    """One launch of a Triton kernel: `kernel[grid](*args, **constants)`."""

    name: str
    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    grid: tuple[int, ...]


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """In this context `kernel="triton"` accepts meta tensors as an H100 accepts CUDA's, and records its launches.

    Dense rectangles go to cuDNN's operators, whose shapes torch knows.

    Yields:
        The launches, in order.

    Raises:
        ZooError: Without Triton.
    """
    refuse("recording launches", ["needs the package triton"] if find_spec("triton") is None else [])
    from triton.runtime.jit import JITFunction

    from sparse_zoo.kernels import automatic, triton
    from sparse_zoo.kernels.triton import configs, dense, device, routing

    launches: list[Launch] = []
    aten = torch.ops.aten
    with ExitStack() as stack:

        def replace(owner: Any, name: str, new: Any) -> None:
            stack.enter_context(patch.object(owner, name, new))

        for name, kernel in list(vars(device).items()):
            if isinstance(kernel, JITFunction):
                replace(device, name, _Recorder(name, kernel, launches))
        replace(automatic, "place", lambda x: ("cuda", CAPABILITY))  # noqa: ARG005
        replace(triton.Triton, "why_not", lambda self, q=None, v=None: [])  # noqa: ARG005
        replace(triton, "_config", lambda q: configs.choose(CAPABILITY, q.shape[-1]))
        replace(routing, "_tile", lambda q: configs.choose_tile(CAPABILITY))  # noqa: ARG005
        replace(
            routing,
            "fits",
            lambda q, chunks, k: chunks.count <= configs.MOST_CHUNKS and k <= routing.MOST_K,  # noqa: ARG005
        )
        engine = aten._scaled_dot_product_cudnn_attention, aten._scaled_dot_product_cudnn_attention_backward
        replace(dense, "_engine", lambda q: engine)  # noqa: ARG005
        replace(torch, "autocast", _autocast)
        yield launches


class _Recorder:
    """Stands in for a Triton kernel and records its launches."""

    def __init__(self, name: str, kernel: Any, launches: list[Launch]) -> None:
        self.name, self.kernel, self.launches = name, kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            self.launches.append(Launch(self.name, self.kernel, args, constants, grid))

        return launch


_real_autocast = torch.autocast


def _autocast(device_type: str, *args: Any, **named: Any) -> Any:
    """torch.autocast for the meta device, which it does not know."""
    return nullcontext() if device_type == "meta" else _real_autocast(device_type, *args, **named)


def host_seconds(
    attention: Attention,
    layout: Layout,
    heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 5,
) -> Mapping[str, float]:
    """Seconds of the host's work for one call of `attention`, built for kernel "triton".

    Args:
        attention: The method; its `dim` is the width of the hidden state that it receives.
        layout: The stream.
        heads: Query heads.
        head_dim: Channels of a head.
        dtype: Of q, k and v.
        repeats: Calls; medians are returned.

    Returns:
        "forward" without gradients, "forward+backward" with them, both with the layout's tables already built, and
        "first", the first call, which builds them.
    """
    found: dict[str, float] = {}
    attention = attention.to(META)
    with record_launches():
        start = time.perf_counter()
        _step(attention, layout, heads, head_dim, dtype, learns=False)
        found["first"] = time.perf_counter() - start
        for name, learns in (("forward", False), ("forward+backward", True)):
            seconds = []
            for _ in range(repeats + 1):
                start = time.perf_counter()
                _step(attention, layout, heads, head_dim, dtype, learns=learns)
                seconds.append(time.perf_counter() - start)
            found[name] = median(seconds[1:])
    return found


def _step(attention: Attention, layout: Layout, heads: int, head_dim: int, dtype: torch.dtype, *, learns: bool) -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META, requires_grad=learns)

    q, k, v = (empty(1, heads, len(layout), head_dim) for _ in range(3))
    hidden = torch.empty(1, len(layout), attention.dim or 1, device=META)
    with torch.set_grad_enabled(learns):
        result = attention(q, k, v, layout, hidden=hidden, step=0)
    if learns:
        loss = sum(result.losses.values(), result.out.float().sum())
        loss.backward()
