"""What a machine with a GPU and no network is given: python3 -m experiments.tools.gpu.pack --out gpu-pack.

triton-cache: the device kernels that `make gpu` launches, compiled here for the GPU by Triton's own JIT compiler, from
launches recorded without a GPU. site: packages that may be missing there. `make gpu` is then called with --pack.

Triton looks a kernel up by a hash of its own package (libtriton.so, which differs by Python version, included), the
kernel's source, dtypes and constants, options and the environment; torch is no part of it. So kernels are compiled in a
virtual environment with exactly the target's Python and Triton, and without torch. A package of the same version from
another build hashes differently: then everything is compiled there as without a pack. Whether the cache was found shows
in the stages' rows, as the number of kernels compiled.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import sparse_zoo as zoo
from experiments.tools.gpu.common import tiles
from experiments.tools.gpu.pack_compile import LAUNCHES, SITE
from experiments.tools.gpu.times import SWEEP
from sparse_zoo import bench
from sparse_zoo.errors import ZooError, refuse
from sparse_zoo.host_time import META, Launch, record_launches
from sparse_zoo.kernels.triton import device
from sparse_zoo.testing import large

PACKAGES = ("nvidia-cudnn-frontend==1.18.0",)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MOST_BYTES = 60 << 20
TRITON, HOPPER = "triton==3.6.0", 90


# -- launches ---------------------------------------------------------------------------------------------------------


def record(launches: Iterable[Launch]) -> list[dict[str, Any]]:
    """The launches as plain data, one for each kernel that Triton would compile."""
    found: dict[str, dict[str, Any]] = {}
    for launch in launches:
        entry = described(launch)
        found.setdefault(json.dumps(entry, sort_keys=True), entry)
    return list(found.values())


def of_stages() -> Iterator[Launch]:
    """The launches of the checks and timings of `make gpu`."""
    moc = ("moc", bench.PAPER_MOC)
    for film, methods in ((large.FILM, (moc,)), *bench.GPU_LAYOUTS):
        for method, settings in methods:
            yield from _step(method, settings, film, 24, 128, torch.bfloat16)
    yield from _step(*moc, bench.PAPER_FILM, 24, 64, torch.bfloat16)
    yield from _step(*moc, large.FILM, 2, 64, torch.bfloat16)
    yield from _step(*moc, large.FILM, 2, 128, torch.float16)
    for kernel, options in SWEEP:
        for tile in options:
            with tiles(128, kernel, tile, attend_rows=True):
                yield from _step(*moc, large.FILM, 2, 128, torch.bfloat16)


def _step(
    method: str, settings: dict[str, Any], film: zoo.Layout, heads: int, head_dim: int, dtype: torch.dtype
) -> list[Launch]:
    """Launches of a forward and backward, on tensors without values."""
    own = {"heads": heads, "head_dim": head_dim, "dim": bench.ROUTING_DIM, **settings}
    attention = zoo.build(method, kernel="triton", **own).to(META)
    with record_launches() as launches:
        shape = (1, heads, len(film), head_dim)
        q, k, v = (torch.empty(shape, dtype=dtype, device=META, requires_grad=True) for _ in range(3))
        result = attention(q, k, v, film, hidden=torch.empty(1, len(film), bench.ROUTING_DIM, device=META))
        result.out.float().sum().backward()
    return launches


def described(launch: Launch) -> dict[str, Any]:
    """A launch as plain data: what Triton may tell apart of numbers, tensors, and descriptors for the copy engine."""
    return {
        "name": launch.name,
        "args": [_argument(x) for x in launch.args],
        "constants": {name: int(x) if isinstance(x, bool | int) else x for name, x in launch.constants.items()},
        "flags": [name for name, x in launch.constants.items() if isinstance(x, bool)],
    }


def _argument(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return {"dtype": str(x.dtype), "at": x.storage_offset() * x.element_size() % 16}
    if x is None or isinstance(x, float):
        return None if x is None else 0.5
    if isinstance(x, int):
        return 1 if x == 1 else 16 if x % 16 == 0 else 17 if x < 2**31 else 2**40 + 1
    if hasattr(x, "block_shape"):
        return {**_argument(x.base), "block": list(x.block_shape)}
    raise TypeError(f"an argument of a kernel is {x!r}; known are tensors, their descriptors, ints, floats and None")


# -- the folder -------------------------------------------------------------------------------------------------------


def compile_kernels(out: Path, launches: Iterable[Launch], python: str, triton: str, capability: int) -> str:
    """Fill the cache in a virtual environment with Triton alone; what it printed."""
    environment = out / "environment"
    _call([python, "-m", "venv", str(environment)])
    own = str(environment / "bin" / "python")
    _call([own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", triton])
    (out / LAUNCHES).write_text(json.dumps(record(launches)), encoding="utf-8")
    script = Path(__file__).with_name("pack_compile.py")
    said = _call([own, str(script), str(out), str(Path(device.__file__)), str(capability)])
    shutil.rmtree(environment)
    return said


def install(out: Path, packages: list[str], python_version: str) -> None:
    """Packages for the target's Python, unpacked."""
    asked = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    asked += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python_version]
    asked += [part for platform in PLATFORMS for part in ("--platform", platform)]
    _call([*asked, "--target", str(out / SITE), *packages])


def version_of(python: str) -> str:
    """The version of an interpreter, such as 3.12."""
    return _call([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).strip()


def _call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
    refuse(" ".join(command[:4]), [last] if done.returncode else [])
    return done.stdout


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main(arguments: list[str] | None = None) -> int:
    """Make a pack from the command line; return 0, or 1 if it fails or the pack is too large."""
    parser = argparse.ArgumentParser(
        prog="python3 -m experiments.tools.gpu.pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-pack"), help="folder to fill (default: gpu-pack)")
    parser.add_argument("--python", default="python3.12", help="an interpreter of the target's version")
    parser.add_argument("--triton", default=TRITON, help="the target's Triton, or a wheel of it")
    parser.add_argument("--capability", type=int, default=HOPPER, help="of the target's GPU (default: 90, Hopper)")
    parser.add_argument("--package", nargs="*", default=list(PACKAGES), help="packages that may be missing there")
    given = parser.parse_args(arguments)
    try:
        refuse("--out", [f"{given.out} exists; give a new folder, or remove it"] if given.out.exists() else [])
        version = version_of(given.python)
        given.out.mkdir(parents=True)
        print(compile_kernels(given.out, of_stages(), given.python, given.triton, given.capability).strip())
        if given.package:
            install(given.out, given.package, version)
    except (ZooError, OSError) as error:
        print(f"pack: {error}", file=sys.stderr)
        return 1
    total = size_of(given.out)
    print(f"{given.out}: {total / 2**20:.1f} MiB")
    if total > MOST_BYTES:
        print(f"pack: larger than {MOST_BYTES >> 20} MiB; leave packages out with --package", file=sys.stderr)
        return 1
    print("Copy this folder and the project to the machine with the GPU; there, in the project's folder:")
    print(f"python3 -m experiments.tools.gpu --pack {given.out} --out results --minutes 9.5")
    return 0


if __name__ == "__main__":
    sys.exit(main())
