"""Runs sweeps until the time is up, several cells at a time on one GPU; see the package. Imports no other package."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.tools.gpu.pack_compile import CACHE, SITE, relocate
from experiments.tools.gpu_sweeps import __doc__ as about

ARCHIVE = f"{SITE}.tar.xz"
LEFT = (".ckpt", ".npz", ".png", ".mp4", ".vtt")
"""Suffixes of files that stay there."""
ENDING = 20.0
"""Seconds that a driver has to end its cells and write its report once the time is up."""
ZOO = (sys.executable, "-m", "experiments", "sweep")


def run(sweeps: Sequence[str], size: str, pack: Path | None, out: Path, jobs: int, minutes: float) -> bool:
    """Run the sweeps until all have ended or the time is up, and keep what there is; whether no driver failed.

    Two drivers begin at either end of the list, each with half of the jobs. Where they meet they share the cells, so
    that few processes wait while the last cells of a sweep run.
    """
    end = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        environment = _environment(home, pack)
        mps = shutil.which("nvidia-cuda-mps-control")  # with it kernels of several processes run side by side
        if mps:
            subprocess.run([mps, "-d"], check=False)
        halves = [(sweeps, jobs - jobs // 2), (sweeps[::-1], jobs // 2)]
        lanes = [Lane(order, size, count, jobs, environment, out) for order, count in halves if count]
        while time.monotonic() < end and sum(lane.goes_on() for lane in lanes):
            time.sleep(0.2)
        for lane in lanes:
            lane.interrupt()
        for lane in lanes:
            lane.end()
        if mps:
            subprocess.run([mps], input=b"quit\n", check=False)
        keep(home, out / "runs.tar.gz")
    return not any(lane.failed for lane in lanes)


def _environment(home: Path, pack: Path | None) -> dict[str, str]:
    found = {**os.environ, "ZOO_HOME": str(home), "OMP_NUM_THREADS": "1"}
    if pack is None:
        return found
    with tarfile.open(pack / ARCHIVE) as archive:
        archive.extractall(home, filter="data")
    relocate(pack / CACHE)
    path = os.pathsep.join(filter(None, (str(home / SITE), os.environ.get("PYTHONPATH"))))
    return found | {"TRITON_CACHE_DIR": str((pack / CACHE).absolute()), "PYTHONPATH": path}


class Lane:
    """One driver after the other, for one sweep after the other; what they print goes into files in `out`."""

    def __init__(
        self, sweeps: Sequence[str], size: str, jobs: int, per_gpu: int, environment: dict[str, str], out: Path
    ) -> None:
        self.waiting, self.environment, self.out = list(sweeps), environment, out
        self.options = ("--size", size, "--jobs", str(jobs), "--jobs-per-gpu", str(per_gpu))
        self.sweep, self.log, self.failed = "", out, False
        self.process: subprocess.Popen[bytes] | None = None

    def goes_on(self) -> bool:
        """Start the next driver if none runs; False once the last has ended."""
        if self.process is not None and self.process.poll() is not None:
            said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            print(f"{self.sweep}: exit code {self.process.returncode}. {''.join(said)}", flush=True)
            self.failed |= self.process.returncode != 0
            self.process = None
        if self.process is None and self.waiting:
            self.sweep = self.waiting.pop(0)
            name = Path(self.sweep).stem
            self.log = self.out / f"{name}-{len(list(self.out.glob(f'{name}-*.txt')))}.txt"
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    [*ZOO, self.sweep, *self.options],
                    stdout=log,
                    stderr=log,
                    env=self.environment,
                    start_new_session=True,
                )
        return self.process is not None

    def interrupt(self) -> None:
        """Let the driver end as Ctrl-C does."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """Wait for it, and kill it with its cells if it takes long."""
        if self.process is None:
            return
        try:
            self.process.wait(ENDING)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def keep(home: Path, archive: Path) -> None:
    """Archive the runs in a ZOO_HOME: results and requests, without weights, pictures and MLflow's files."""
    sweeps = [folder for folder in sorted(home.iterdir()) if folder.name not in (SITE, "artifacts")]
    files = [file for folder in sweeps for pattern in ("*", "*/*") for file in sorted(folder.glob(pattern))]
    with tarfile.open(archive, "w:gz") as kept:
        for file in files:
            if file.is_file() and file.suffix not in LEFT:
                kept.add(file, str(file.relative_to(home)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run sweeps from the command line; return 0, or 1 where a driver failed or a pack is none."""
    parser = argparse.ArgumentParser(
        prog="python3 -m experiments.tools.gpu_sweeps.run",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sweeps", nargs="+", metavar="SWEEP", help="sweeps, the most important first")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and what the drivers print")
    parser.add_argument("--size", default="gpu", help="of the sweeps (default: gpu)")
    parser.add_argument("--pack", type=Path, help="a folder that experiments.tools.gpu_sweeps.pack has made")
    parser.add_argument("--jobs", type=int, default=16, help="cells at a time (default: 16)")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of them (default: 8)")
    given = parser.parse_args(arguments)
    if given.pack is not None and not (given.pack / ARCHIVE).is_file():
        print(f"run: {given.pack} has no {ARCHIVE}; make it with experiments.tools.gpu_sweeps.pack", file=sys.stderr)
        return 1
    fine = run(given.sweeps, given.size, given.pack, given.out, given.jobs, given.minutes)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
