"""A report of a long sweep takes seconds and fits a page that a browser opens at once."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_up import write_sweep_of

GROUPS, SEEDS = 500, 3


@pytest.mark.slow
@pytest.mark.long
def test_a_report_of_500_groups_takes_10_seconds_of_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,500 runs, a command with its imports; measured on a machine that does nothing else."""
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    rng = np.random.default_rng(0)
    recalls = {f"m{i:03d}": np.clip(rng.normal(i / GROUPS, 0.02, SEEDS), 0, 1).tolist() for i in range(GROUPS)}
    methods = {name: {"name": "moc", "top_k": i + 1, "chunk": "frame"} for i, name in enumerate(recalls)}
    write_sweep_of("big", recalls, methods)
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
