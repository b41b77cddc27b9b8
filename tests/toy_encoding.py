"""Small videos and models that several tests of `zoo encode` share."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from test_decoding import film
from typer.testing import CliRunner

from experiments.cli import app

SIZE = (32, 48)


def scene(seed: int, frames: int) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    picture = np.kron(draw.integers(0, 255, (4, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    return [np.roll(picture, number, 1) for number in range(frames)]


def video(path: Path, seeds: Sequence[int], frames: int = 12) -> Path:
    """One scene after the other, a second each, at 12 frames a second."""
    return film(path, [one for seed in seeds for one in scene(seed, frames)], rate=12, gop=1)


def two_films(tmp_path: Path) -> Path:
    """A manifest of two videos of two shots, with and without times."""
    video(tmp_path / "a.mp4", (1, 2))
    video(tmp_path / "b.mp4", (3, 4))
    shots = [{"start": 0, "end": 1, "caption": "first"}, {"start": 1, "end": 2, "caption": "second"}]
    rows = [{"video": "a.mp4", "caption": "whole", "shots": shots}, {"video": "b.mp4", "caption": "other"}]
    return manifest(tmp_path / "films.jsonl", rows)


def manifest(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def keys(out: Path, kind: str) -> list[str]:
    """As they were written, one line an entry: what is encoded twice is here twice."""
    lines = [line for path in sorted(out.glob(f"{kind}-*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line)["key"] for line in lines]


def run(path: Path, wan: Path, out: Path, *more: str) -> Any:
    arguments = ["--vae", str(wan), "--text-encoder", str(wan), "--out", str(out), "--size", "32x48"]
    return CliRunner().invoke(app, ["encode", str(path), *arguments, "--max-frames", "9", *more])


def assert_jobs_encode_once(tmp_path: Path, wan: Path, films: Path, executor: str, *more: str) -> None:
    """Two jobs of an executor write what this process does, each entry once, and say which row has no film."""
    films.write_text(films.read_text() + json.dumps({"video": "missing.mp4"}) + "\n")
    found = []
    for folder, given in (("local", ()), (executor, ("--executor", executor, "--jobs", "2", *more))):
        done = run(films, wan, tmp_path / folder, "--json", *given)
        assert done.exit_code == 1, done.output
        assert isinstance(done.exception, SystemExit), repr(done.exception)
        told = json.loads(done.stdout)
        assert [one["line"] for one in told["failed"]] == [3]
        assert "No such file" in told["failed"][0]["reason"]
        kinds = {kind: sorted(keys(tmp_path / folder, kind)) for kind in ("latents", "text")}
        found.append((kinds, (tmp_path / folder / "films.jsonl").read_text()))
        assert not list((tmp_path / folder).glob("*.part"))
    assert found[0] == found[1]
