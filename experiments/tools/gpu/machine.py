"""The first stage: what the machine has and lacks, its two ceilings, and whether Triton's cache was found."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch

from experiments.tools.gpu import rows
from experiments.tools.gpu.common import device_of, seconds_of
from experiments.tools.gpu.rows import Row
from experiments.tools.gpu.stage import Run
from sparse_zoo import bench

OLDEST = (8, 0)
TOOLS = ("ncu", "compute-sanitizer")
PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute", "/usr/local/bin")


def machine(run: Run) -> Iterator[Row]:
    """Facts first: what follows may fail. Without a GPU that fact alone."""
    device = device_of(run)
    if device.type == "cpu" and not run.tiny:
        yield rows.fact("machine", gpu=False, device="", versions=versions(), lacks={})
        return
    yield rows.fact("machine", gpu=device.type == "cuda", device=bench.about(device)["device"], **found(device))
    size = 1 << (12 if run.tiny else 31)
    seconds = _copy(size, device)
    yield rows.time("copy", seconds, terabytes_per_second=2 * size / seconds / 1e12)
    size = 64 if run.tiny else 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    seconds = seconds_of(lambda: a @ b, device, 10)
    yield rows.time("matrix product", seconds, teraflops=2 * size**3 / seconds / 1e12, size=size)


def _copy(size: int, device: torch.device) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return seconds_of(lambda: target.copy_(source), device, 5)


def found(device: torch.device) -> dict[str, Any]:
    """Versions, compute capability, memory, and what is missing: {need: why a stage that needs it cannot run}."""
    lacks = {tool: f"{tool} is not on the path" for tool in TOOLS if not tool_path(tool)}
    for package in ("triton", "lightning"):
        if find_spec(package) is None:
            lacks[package] = f"the package {package} is not installed"
    facts: dict[str, Any] = {"versions": versions(), "lacks": lacks, **bench.about(device)}
    facts["versions"] |= versions()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = torch.cuda.get_device_capability(device)
        facts |= {
            "capability": ".".join(map(str, capability)),
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
        if capability < OLDEST:
            lacks["sm80"] = f"compute capability {facts['capability']} is older than 8.0"
    facts.pop("device")
    return facts


def versions() -> dict[str, str]:
    """Of what results depend on."""
    known = {"torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
    if torch.backends.cudnn.is_available():
        known["cudnn"] = str(torch.backends.cudnn.version())
    if find_spec("triton"):
        import triton

        known["triton"] = triton.__version__
    return known


def tool_path(name: str) -> str | None:
    """Where a profiler lies: on the path, or where CUDA is installed."""
    return shutil.which(name) or next((found for place in PLACES if (found := shutil.which(name, path=place))), None)
