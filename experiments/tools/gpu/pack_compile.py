"""Compiles recorded launches into a Triton cache, without a GPU and without torch; run by `pack.py`.

python pack_compile.py PACK DEVICE_FILE CAPABILITY
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

CACHE, SITE, LAUNCHES = "triton-cache", "site", "launches.json"
MODULE = "sparse_zoo.kernels.triton.device"
"""The name under which `make gpu` imports the kernels: part of what Triton hashes."""


class Driver:
    """Stands for a GPU's driver: tells the target, and launches nothing."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        """Return 0, the number of the only device."""
        return 0

    def get_current_stream(self, _: int) -> int:
        """Return 0, the default stream."""
        return 0

    def get_current_target(self) -> Any:
        """Return the target to compile for: CUDA, the capability, warps of 32 threads."""
        return self.target


class Dtype:
    """A tensor's dtype by its name, which is all that Triton reads of it."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def itemsize(self) -> int:
        """Bytes of an element, from the number of bits in the dtype's name."""
        return 8 if "64" in self.name else 4 if "32" in self.name else 2 if "16" in self.name else 1

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dtype) and other.name == self.name


class Address:
    """A tensor as Triton specialises it: a dtype and an address."""

    def __init__(self, dtype: str, at: int) -> None:
        self.dtype, self.at = Dtype(dtype), at

    def data_ptr(self) -> int:
        """Return the recorded address, which Triton tests for its alignment."""
        return self.at


def argument(described: Any) -> Any:
    """What stands for an argument that `pack.py` described."""
    if not isinstance(described, dict):
        return described
    address = Address(described["dtype"], described["at"])
    block = described.get("block")
    if block is None:
        return address
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = [128 ** (len(block) - 1 - i) for i in range(len(block))]
    return TensorDescriptor(address, [128] * len(block), strides, block)


def relocate(cache: Path) -> None:
    """Let a cache name its files where they lie now: Triton notes absolute paths, and skips what is not there."""
    for file in cache.glob("*/__grp__*.json"):
        group = json.loads(file.read_text(encoding="utf-8"))
        group["child_paths"] = {
            name: str((file.parent / Path(path).name).absolute()) for name, path in group["child_paths"].items()
        }
        file.write_text(json.dumps(group), encoding="utf-8")


def shorten(cache: Path) -> None:
    """Keep what is loaded to run a kernel: its binary and what Triton notes of it, a tenth of all."""
    for file in cache.glob("*/*"):
        if file.suffix not in (".cubin", ".json"):
            file.unlink()


def main(pack: Path, device_file: Path, capability: int) -> None:
    """Compile every launch of a pack into its cache and print how many compiled and failed."""
    os.environ["TRITON_CACHE_DIR"] = str((pack / CACHE).absolute())
    from triton.runtime import driver

    driver.set_active(Driver(capability))
    spec = spec_from_file_location(MODULE, device_file)
    assert spec is not None
    assert spec.loader is not None
    device = module_from_spec(spec)
    sys.modules[MODULE] = device
    spec.loader.exec_module(device)
    start, failed = time.monotonic(), 0
    launches = json.loads((pack / LAUNCHES).read_text(encoding="utf-8"))
    for launch in launches:
        args = [argument(x) for x in launch["args"]]
        constants = {k: bool(x) if k in launch["flags"] else x for k, x in launch["constants"].items()}
        try:
            getattr(device, launch["name"]).warmup(*args, grid=(1,), **constants)
        except Exception as error:  # of a tile that does not compile: the stage that times it says so
            failed += 1
            line = (str(error).strip() or "no message").splitlines()[0]
            print(f"{launch['name']} {launch['constants']}: {type(error).__name__}: {line}")
    entries = len([entry for entry in (pack / CACHE).iterdir() if list(entry.glob("*.cubin"))])
    shorten(pack / CACHE)
    seconds = time.monotonic() - start
    print(f"{len(launches)} launches, {entries} kernels compiled in {seconds:.0f} s, {failed} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
