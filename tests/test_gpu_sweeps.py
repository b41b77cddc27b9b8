"""Sweeps on a machine with a GPU, a few minutes and no network, as far as a machine without a GPU can tell."""

import subprocess
import sys
import tarfile
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from tiny import BASE, write_sweep

from experiments.reporting.report import build_report
from experiments.tools.gpu_sweeps import pack, run

ROOT = Path(__file__).parent.parent


def test_packages_are_those_of_the_extra_that_are_not_there() -> None:
    found = pack.missing("sparse-attention-zoo", "train", {"numpy", "jinja2"})
    names = {line.split("==")[0] for line in found}
    assert {"pydantic", "pydantic-core", "mlflow", "sqlalchemy", "lightning"} <= names  # and what they need themselves
    assert not names & {"torch", "numpy", "jinja2", "pytest", "diffusers"}
    assert f"omegaconf=={version('omegaconf')}" in found


def test_names_are_read_from_what_pip_freeze_prints(tmp_path: Path) -> None:
    (tmp_path / "freeze.txt").write_text("Jinja2==3.1\nzope.interface==1\ntorch @ file:///wheels/torch.whl\n")
    assert pack._names(tmp_path / "freeze.txt") == {"jinja2", "zope-interface", "torch"}


def test_launches_of_cells_that_are_alike_are_recorded_once(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs the package triton")
    found = []
    for depth, cells in (
        (1, {"moc": 1e-3}),
        (2, {"moc": 1e-3, "other rate": 1e-4}),
    ):  # neither of each seed, nor of each layer or cell
        path = write_sweep(
            tmp_path / f"{depth}.yaml",
            # The run to begin with will be made there.
            base=BASE | {"model": {"dim": 128, "depth": depth, "heads": 2}, "init_from": "before-gpu/dense-s${seed}"},
            cells={name: {"attention": "moc", "optim.lr": rate} for name, rate in cells.items()},
            seeds=depth,
            sizes={"gpu": {"trainer.max_steps": 1}},
        )
        found.append([launch.name for launch in pack._launches([str(path)], "gpu")])
    assert {"attend", "grad_queries", "grad_keys", "choose"} <= set(found[0])
    assert found[0] == found[1]


@pytest.mark.slow
def test_runs_come_back_and_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By two drivers of two sweeps, from either end."""
    for name in ("one", "two"):
        write_sweep(tmp_path / f"{name}.yaml", base=BASE, cells={"a": {}, "b": {"seed": 1}}, sizes={"small": {}})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    command = ["one.yaml", "two.yaml", "--size", "small", "--out", "out", "--jobs", "2", "--minutes", "5"]
    assert run.main(command) == 0
    with tarfile.open(tmp_path / "out" / "runs.tar.gz") as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "home", filter="data")
    assert sum(name.endswith("/result.json") for name in names) == 4
    assert not [name for name in names if name.endswith((".ckpt", ".png", ".npz"))]
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "home"))
    for name in ("one-small", "two-small"):
        assert not build_report(name).sweep.unfinished


@pytest.mark.parametrize("deaf", [False, True])
def test_drivers_end_when_the_time_is_up(deaf: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there by then is kept; a driver that does not listen is killed."""
    script = """
import os, pathlib, signal, sys, time
home = pathlib.Path(os.environ["ZOO_HOME"], sys.argv[1], "cell")
home.mkdir(parents=True)
(home / "result.json").write_text("{}")
(home / "resume.ckpt").write_text("weights")
if DEAF:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
time.sleep(60)
"""
    monkeypatch.setattr(run, "ZOO", (sys.executable, "-c", script.replace("DEAF", str(deaf))))
    monkeypatch.setattr(run, "ENDING", 0.5)
    begin = time.monotonic()
    run.run(["one", "two"], "gpu", None, tmp_path, jobs=2, minutes=0.1)
    assert time.monotonic() - begin < 40
    with tarfile.open(tmp_path / "runs.tar.gz") as archive:
        assert archive.getnames() == ["one/cell/result.json", "two/cell/result.json"]


def test_a_driver_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "ZOO", (sys.executable, "-c", "import sys; sys.exit('no such sweep')"))
    assert run.main(["one", "--out", str(tmp_path / "out"), "--jobs", "1"]) == 1
    assert capsys.readouterr().out == "one: exit code 1. no such sweep\n"


def test_a_folder_that_is_no_pack_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["one", "--out", str(tmp_path / "out"), "--pack", str(tmp_path)]) == 1
    assert "has no site.tar.xz" in capsys.readouterr().err
    assert pack.main(["benchmark", "--out", str(tmp_path)]) == 1
    assert "exists; give a new folder" in capsys.readouterr().err


def test_running_needs_no_package() -> None:
    """There, packages are unpacked only once it runs."""
    code = "import sys, experiments.tools.gpu_sweeps.run; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"torch", "omegaconf", "pydantic", "lightning", "mlflow"} & set(done.stdout.split())
