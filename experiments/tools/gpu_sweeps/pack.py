"""What a machine with a GPU and no network lacks for sweeps; see the package."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch

import sparse_zoo as zoo
from experiments.config.datamodule import build
from experiments.config.resolve import Config, attention_shape
from experiments.sweep.expand import read
from experiments.sweep.preflight import layer_settings
from experiments.sweep.schema import find_sized
from experiments.tools.gpu.pack import HOPPER, TRITON, compile_kernels, install, size_of, version_of
from experiments.tools.gpu.pack_compile import SITE
from experiments.tools.gpu_sweeps import __doc__ as about
from experiments.tools.gpu_sweeps.run import ARCHIVE
from lit_modules.settings import Outline
from lit_modules.stream import video_only
from sparse_zoo.errors import ZooError, refuse
from sparse_zoo.host_time import META, Launch, record_launches

UNUSED = ("mlflow/server/js/build",)
"""Of the packages, what only a browser reads: half of all bytes."""


def pack(out: Path, sweeps: Sequence[str], size: str, have: Path | None, python: str) -> None:
    """Fill `out`, a new folder, for the sweeps' cells of a size; `have` lists what is installed there."""
    out.mkdir(parents=True)
    print(compile_kernels(out, _launches(sweeps, size), python, TRITON, HOPPER).strip())
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder), missing("sparse-attention-zoo", "train", _names(have)), version_of(python))
        for unused in UNUSED:
            shutil.rmtree(Path(folder, SITE, unused), ignore_errors=True)
        with tarfile.open(out / ARCHIVE, "w:xz", preset=3) as archive:
            archive.add(Path(folder, SITE), SITE)
    print(f"{out}: {size_of(out) / 2**20:.1f} MiB")


def missing(name: str, extra: str, have: set[str]) -> list[str]:
    """`name==version`, as installed here, of all that an extra of a package needs and that `have` lacks."""
    found: dict[str, str] = {}
    waiting = [each for each in distribution(name).requires or [] if f'extra == "{extra}"' in each]
    while waiting:
        own = _plain(waiting.pop())
        if own in found or own in have or own == "torch":
            continue
        try:
            installed = distribution(own)
        except PackageNotFoundError:  # for another platform or Python
            continue
        found[own] = installed.version
        waiting += [each for each in installed.requires or [] if "extra ==" not in each]
    return [f"{own}=={version}" for own, version in sorted(found.items())]


def _names(freeze: Path | None) -> set[str]:
    return {_plain(line) for line in freeze.read_text(encoding="utf-8").splitlines()} if freeze else set()


def _plain(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]*", requirement)
    return re.sub(r"[-_.]+", "-", found[0] if found else "").lower()


def _launches(sweeps: Sequence[str], size: str) -> Iterator[Launch]:
    """Launches of attention in a training step of the cells, by phase of a schedule; of cells that are alike, once."""
    seen = set[str]()
    for name in sweeps:
        path, sized = find_sized(name, size)
        # Kernels do not depend on weights, and the runs that a sweep begins with may only be made there.
        loaded = read(path, [{"init_from": None}], sized)
        for cell in (*(loaded.trials.sweep.cells if loaded.trials else ()), *loaded.cells):
            own, config = (
                attention_shape(cell.config["model"]),
                {**cell.config, "data": {**cell.config["data"], "seed": 0}},
            )
            for settings in layer_settings(config):
                alike = json.dumps([config["data"], config["model"], settings], sort_keys=True)
                if alike not in seen:
                    seen.add(alike)
                    yield from _step(own, settings, config)


def _step(own: Outline, settings: dict[str, Any], config: Config) -> Iterator[Launch]:
    data: Any = build(config["data"])
    batch = next(iter(data.train_dataloader()))
    film = video_only(batch["layout"]) if config["model"].get("text") == "cross" else batch["layout"]
    shape = (len(batch["text"]), own.heads, len(film), own.head_dim)
    sizes = {"heads": own.heads, "head_dim": own.head_dim, "dim": own.dim}
    attention = zoo.build(**{**settings, **sizes, "kernel": "triton"}).to(META)
    for step in attention.starts if isinstance(attention, zoo.Scheduled) else (0,):
        q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device=META, requires_grad=True) for _ in range(3))
        hidden = torch.empty(shape[0], shape[2], own.dim, device=META)
        with record_launches() as launches:
            attention(q, k, v, film, hidden=hidden, step=step).out.float().sum().backward()
        yield from launches
        with torch.no_grad(), record_launches() as launches:
            attention(q, k, v, film, hidden=hidden, step=step)
        yield from launches


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a pack from the command line; return 0, or 1 with a line that says why not."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tools.gpu_sweeps.pack",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sweeps", nargs="+", metavar="SWEEP", help="sweeps whose cells will run there")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--size", default="gpu", help="of the sweeps (default: gpu)")
    parser.add_argument("--python", default="python3.12", help="an interpreter of the target's version")
    parser.add_argument("--have", type=Path, help="what `pip freeze` prints there (default: torch alone is there)")
    given = parser.parse_args(arguments)
    try:
        refuse("--out", [f"{given.out} exists; give a new folder, or remove it"] if given.out.exists() else [])
        pack(given.out, given.sweeps, given.size, given.have, given.python)
    except (ZooError, OSError) as error:
        print(f"pack: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
