"""How much memory decoding a long video takes: `python tests/decoding_memory.py --minutes 60`.

Makes a video of 480×640 pixels at 10 frames a second (or `--size`, `--rate`), decodes it into a cache and reads windows
of it, all in a fresh process, and prints by how much that raised the process's peak memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from datamodules.decoding import Decoding, load

Size = tuple[int, int]  # height and width, multiples of 32


def make(path: Path, minutes: float, size: Size, rate: int) -> None:
    """A moving picture with a cut every 8 seconds."""
    draw = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate), options={"preset": "ultrafast"})
        (stream.height, stream.width), stream.pix_fmt = size, "yuv420p"
        for number in range(round(minutes * 60 * rate)):
            if number % (8 * rate) == 0:
                coarse = draw.integers(0, 255, (size[0] // 32, size[1] // 32, 3))
                picture = np.kron(coarse, np.ones((32, 32, 1))).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 4 * number, 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def peak() -> int:
    """The most memory that this program has held, in kB; `ru_maxrss` also counts what the process held before it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def measure(path: Path, cache: Path, fps: float, size: Size) -> None:
    """Print what decoding and then reading it took, as JSON."""
    before = peak()
    started = time.perf_counter()
    video = load(path, Decoding(fps, size), cache)
    decoded, seconds = peak(), time.perf_counter() - started
    for start in np.random.default_rng(0).integers(0, len(video.frames) - 8, 20):
        np.asarray(video.frames[start : start + 8]).mean()
    read = peak()
    figures = {
        "frames": len(video.frames),
        "shots": len(video.cuts),
        "seconds": round(seconds, 1),
        "megabytes_of_frames": round(np.prod(video.frames.shape, dtype=np.int64) / 1e6),
        "imports_megabytes": round(before * 1024 / 1e6),
        "decoding_adds_megabytes": round((decoded - before) * 1024 / 1e6),
        "decoding_and_reading_add_megabytes": round((read - before) * 1024 / 1e6),
    }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument(
        "--fps", type=float, default=2, help="frames a second to keep; 2 of an hour take 6.6 GB of disk"
    )
    parser.add_argument("--size", nargs=2, type=int, default=(480, 640), help="height and width, multiples of 32")
    parser.add_argument("--rate", type=int, default=10, help="frames a second of the video")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    size = given.size[0], given.size[1]
    if given.measure:
        measure(*given.measure, given.fps, size)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.mp4"
        make(path, given.minutes, size, given.rate)
        same = ["--fps", given.fps, "--size", *size, "--measure", path, Path(folder) / "cache"]
        again = [sys.executable, __file__, *same]
        subprocess.run([str(part) for part in again], check=True)


if __name__ == "__main__":
    main()
