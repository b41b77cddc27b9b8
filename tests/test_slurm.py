"""A sweep on a SLURM of one node, started here: an array job finishes, and requeued cells resume."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from tiny import BASE, write_sweep
from toy_encoding import assert_jobs_encode_once, run

from experiments.execution import slurm
from experiments.execution.progress import Bar
from experiments.execution.scheduler import execute
from experiments.execution.train import RESUME
from experiments.sweep.expand import read
from sparse_zoo.errors import ZooError

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
PATIENCE = 240.0  # seconds, on a machine that has other things to do

CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=3
NodeName={host} CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def until(what: Callable[[], object], why: str) -> None:
    start = time.monotonic()
    while not what():
        assert time.monotonic() - start < PATIENCE, why
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid():
        pytest.skip(f"needs root and {', '.join(missing) or 'nothing else'}: apt-get install slurm-wlm munge")
    with tempfile.TemporaryDirectory(prefix="slurm") as place, pytest.MonkeyPatch.context() as patched:
        folder, host = Path(place), socket.gethostname().partition(".")[0]
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        ports = []
        for _ in range(2):
            with socket.socket() as free:
                free.bind(("", 0))
                ports.append(free.getsockname()[1])
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, ports=ports))
        patched.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        places = [f"--{name}-file={folder / f'munge.{name}'}" for name in ("key", "pid", "log", "seed")]
        commands = [
            ["munged", "--foreground", "--force", f"--socket={folder / 'munge.sock'}", *places],
            ["slurmctld", "-D"],
            ["slurmd", "-D"],
        ]
        with (folder / "output").open("w") as output:
            daemons = []
            for command in commands:
                daemons.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))
                time.sleep(1)
            try:
                idle = ["sinfo", "--noheader", "--format=%t"]
                until(
                    lambda: subprocess.run(idle, capture_output=True, text=True, check=False).stdout.strip() == "idle",
                    (folder / "output").read_text(),
                )
                yield folder
            finally:
                for daemon in reversed(daemons):
                    daemon.terminate()
                for daemon in daemons:
                    daemon.wait(20)


def bar() -> Bar:
    return Bar(Console(quiet=True), 1)


def state(job: str) -> str:
    asked = ["squeue", "--noheader", "--array", f"--jobs={job}", "--format=%t"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_array_job_finishes_and_its_cells_resume_when_requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ZOO_HOME": str(tmp_path / "runs"), "ZOO_SAVE_SECONDS": "0", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    steps = {"trainer.max_steps": 300, "trainer.val_check_interval": 100}
    sweep = read(
        write_sweep(tmp_path / "array.yaml", base=BASE | steps, axes={"attention": ["dense", "moc", "window"]})
    )
    asked = slurm.parameters(["time=0:20:00", "mem=500", "comment=a sweep"])

    assert {result.status for result in execute(sweep, bar(), slurm=asked, wait=False)} == {"missing"}
    jobs = sorted(slurm.queued())
    assert len(jobs) == 3
    assert len({job.partition("_")[0] for job in jobs}) == 1
    dense, moc, _ = sweep.cells
    interrupts = {dense.name: ["scontrol", "requeue"], moc.name: ["scancel", "--signal=USR2"]}
    for cell, job in zip((dense, moc), jobs, strict=False):
        until((cell.folder("array") / RESUME).exists, "no checkpoint was written")
        subprocess.run([*interrupts[cell.name], job], check=True)
        until(lambda job=job: state(job) == "PD", f"{job} was not requeued")
        # SLURM would leave a requeued job alone for two minutes.
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)
    # The same command again looks after the jobs that there are.
    results = execute(sweep, bar(), slurm=asked)
    assert [result.status for result in results] == ["finished"] * 3, [result.reason for result in results]
    assert [len(result.resumed) > 0 for result in results] == [True, True, False]
    assert all(len(dict(result.curves["train/flow"])) == 300 for result in results)
    assert len(list((tmp_path / "runs" / "array" / "slurm").glob("*submission.sh"))) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_error_of_slurm_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    sweep = read(write_sweep(tmp_path / "refused.yaml"))
    with pytest.raises(ZooError, match=r"--executor slurm: .*invalid partition") as caught:
        execute(sweep, bar(), slurm={"partition": "none"})
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_cell_of_two_devices_trains_in_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ZOO_HOME": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sweep = read(write_sweep(tmp_path / "two.yaml", base=BASE | {"parallel": {"sequence": 2}}))
    (result,) = execute(sweep, bar(), slurm=slurm.parameters(["time=0:20:00", "mem=1000"]))
    assert (result.status, result.steps) == ("finished", 2), result.reason


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_jobs_encode_a_manifest_once(tmp_path: Path, wan: Path, films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert_jobs_encode_once(tmp_path, wan, films, "slurm", "--slurm", "time=0:20:00", "--slurm", "mem=500")
    jobs = list((tmp_path / "slurm" / "slurm").glob("*_log.out"))
    assert len(jobs) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_encoding_that_fails_in_every_job_is_one_line(tmp_path: Path, films: Path) -> None:
    parameters = ("--slurm", "time=0:20:00", "--slurm", "mem=500")
    done = run(films, tmp_path, tmp_path / "out", "--executor", "slurm", *parameters)
    assert done.exit_code == 2
    assert "encode: every job failed: job " in done.stderr
    assert "config.json is missing" in done.stderr


@pytest.mark.slow
def test_without_slurm_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ZooError, match="there is no sbatch on this machine"):
        execute(read(write_sweep(tmp_path / "nowhere.yaml")), bar(), slurm={})


def test_parameters_are_text_or_whole_numbers() -> None:
    found = slurm.parameters(["time=1:30:00", "gpus_per_node=1", "partition=gpu"])
    assert found == {"time": 90, "gpus_per_node": 1, "partition": "gpu"}
    with pytest.raises(ZooError, match="a parameter is key=value, got 'long'"):
        slurm.parameters(["long"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5", 5), ("5:01", 6), ("1:30:00", 90), ("0:20:00", 20), ("2-12", 3600), ("1-0:30", 1470), ("1-00:00:10", 1441)],
)
def test_times_are_minutes(text: str, expected: int) -> None:
    assert slurm.minutes(text) == expected


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-5", "x-5"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ZooError, match="time must be like 90, 1:30:00 or 2-12"):
        slurm.minutes(text)
