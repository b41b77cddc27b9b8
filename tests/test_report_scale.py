"""A report of a long sweep takes seconds and fits a page that a browser opens at once."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up import write_sweep_of

from experiments.tracking.store import read, read_sweep

GROUPS, SEEDS, STEPS, FILMS = 500, 3, 500, 256


@pytest.mark.slow
def test_a_report_of_500_groups_takes_10_seconds_of_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,500 runs with curves of 500 points and outcomes of 256 films: the whole command, imports included."""
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    rng = np.random.default_rng(0)
    recalls = {f"m{i:03d}": np.clip(rng.normal(i / GROUPS, 0.02, SEEDS), 0, 1).tolist() for i in range(GROUPS)}
    methods = {name: {"name": "moc", "top_k": i + 1, "chunk": "frame"} for i, name in enumerate(recalls)}
    write_sweep_of("big", recalls, methods)
    for cell in read_sweep("big").cells:
        result = read(cell, "big")
        loss = [(step, float(value)) for step, value in enumerate(rng.random(STEPS))]
        outcomes = (rng.random(FILMS) < 0.5).astype(float).tolist()
        replace(result, curves=result.curves | {"train/flow": loss}, films={"identity_recall": outcomes}).write(
            Path(result.folder)
        )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "experiments", "report", "big"], check=True, env=environment, capture_output=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    page = (tmp_path / "big" / "report.html").stat().st_size
    print(f"{seconds:.1f} s of CPU, page of {page / 1e6:.1f} MB")
    assert page < 3e6
    assert seconds < 10
