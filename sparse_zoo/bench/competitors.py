"""The competitors: every dense attention that runs on this machine; and a competitor's times and peak memory."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sparse_zoo.errors import ZooError

PASSES = ("forward", "forward+backward")


def dense_engines(q: Tensor) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Every dense attention that runs on tensors like q (B, H, L, D) without an L × L table.

    These are SDPA's backends and flash-attn.
    """
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    few = [torch.zeros_like(q[:, :, :64]).requires_grad_() for _ in range(3)]
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        if found and backend is SDPBackend.EFFICIENT_ATTENTION:
            continue  # slower than the others wherever they run: at 180k tokens a turn of it takes a minute
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


def seconds_of(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Wall-clock seconds of a call: until the device has finished, and until it returned, which is the host's share."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    returned = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, returned


class Timed:
    """One competitor: `attend` () -> out; the times of its passes and of its routing, and its peak memory."""

    def __init__(
        self,
        attend: Callable[[], Tensor],
        inputs: list[Tensor],
        weight: Tensor,
        route: Callable[[], object] | None = None,
    ) -> None:
        self.attend, self.inputs, self.weight, self.route = attend, inputs, weight, route
        self.seconds: dict[str, list[float]] = {which: [] for which in (*PASSES, "routing")}
        self.host: dict[str, list[float]] = {which: [] for which in PASSES}
        self.memory: dict[str, int] = {}
        self.failed = ""

    def once(self, count: bool) -> None:
        """Run one turn: forward, backward, routing; the first turn also measures the peak memory."""
        if not self.failed:
            self.guarded(partial(self._turn, count))

    def guarded(self, call: Callable[[], str]) -> str:
        """The value that a call returns.

        A kernel's refusal, a full memory and Triton's errors are recorded as `failed`; other errors are raised.
        """
        try:
            return call()
        except ZooError as error:  # a kernel may refuse a plan of this size
            self.failed = str(error)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self.failed = f"out of memory: {str(error).splitlines()[0]}"
            gc.collect()
        except _triton_errors() as error:  # a kernel that does not compile or fit at this size
            self.failed = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        return ""

    def _turn(self, count: bool) -> str:
        device = self.weight.device
        for x in self.inputs:
            x.grad = None
        out: list[Tensor] = []
        forward, asked = seconds_of(lambda: out.append(self.attend()), device)
        backward, asked_back = seconds_of(lambda: out.pop().backward(self.weight), device)
        routing, _ = seconds_of(self._route, device) if self.route else (0.0, 0.0)
        if not self.memory:
            self.memory["forward"] = self._peak(self._forward)
            self.memory["forward+backward"] = self._peak(lambda: self.attend().backward(self.weight))
        if count:
            for which, seconds in zip((*PASSES, "routing"), (forward, forward + backward, routing), strict=True):
                self.seconds[which].append(seconds)
            for which, seconds in zip(PASSES, (asked, asked + asked_back), strict=True):
                self.host[which].append(seconds)
        return ""

    def median(self, which: str) -> float:
        """The median seconds of a pass."""
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
        events = [
            event
            for event in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
            if event.get("name") == "[memory]"
        ]
    held = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return int(most)


def _triton_errors() -> tuple[type[Exception], ...]:
    """The base class of Triton's errors, if Triton was imported."""
    module = sys.modules.get("triton.errors")
    return (module.TritonError,) if module else ()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory was full."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in said
