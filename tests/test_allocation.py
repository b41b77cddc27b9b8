"""Inside a SLURM allocation of several tasks a cell is still one run of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_launch import Silent
from tiny import write_sweep

from experiments.execution.scheduler import execute
from experiments.sweep.expand import read

ALLOCATION = {
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NAME": "sweep",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "1",
    "SLURM_NODELIST": "node",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "0",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", ["sweep", "bash"])
def test_cells_run_inside_an_allocation_of_several_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """By srun, or in a shell that it started, which Lightning takes for interactive."""
    for name, value in (ALLOCATION | {"SLURM_JOB_NAME": step}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////dev/null/mlflow.db")
    (result,) = execute(read(write_sweep(tmp_path / "inside.yaml")), Silent())
    assert result.status == "finished", result.traceback
