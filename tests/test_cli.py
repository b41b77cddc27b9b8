"""The `zoo` command as a user types it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from tiny import BASE, DIVERGES, OWN_AND_PREVIOUS, write_sweep
from typer.testing import CliRunner, Result

import sparse_zoo as library
from experiments.cli import app
from experiments.inspection import conformance
from sparse_zoo import testing
from sparse_zoo.testing import checks


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "own_and_previous.py"
    path.write_text(OWN_AND_PREVIOUS)
    return path


@pytest.fixture(scope="module")
def bad_plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "diverges_too.py"
    path.write_text(DIVERGES.replace('"diverges"', '"diverges_too"'))
    return path


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: str) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZOO_HOME", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(BASE))
    return tmp_path


def zoo(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_list_json() -> None:
    listed = json.loads(zoo("list", "--json").stdout)
    methods = {method["name"]: method for method in listed["methods"]}
    assert list(methods) == library.names()
    assert methods["moc"]["summary"]
    for setting in methods["moc"]["settings"].values():
        assert set(setting) == {"default", "type", "doc"}
        assert setting["doc"]
    kernels = {kernel["name"]: kernel for kernel in listed["kernels"]}
    assert kernels["reference"] == {"name": "reference", "usable": True, "reasons": []}
    assert all(kernel["usable"] == (not kernel["reasons"]) for kernel in kernels.values())


def test_list_for_people(plugin: Path) -> None:
    text = zoo("list", "--plugin", plugin).stdout
    listed = text.partition("kernels")[0].splitlines()
    assert [line.split()[0] for line in listed[1:] if line] == library.names()  # a line each
    assert max(map(len, text.splitlines())) <= 100
    assert "runs here" in text
    text = zoo("list", "own_and_previous_shots", "moc", "--plugin", plugin).stdout
    assert "reach" in text
    assert "frames_per_chunk" in text
    assert "groups" not in text
    assert text.count("dense_above") == 1  # what all have is told once
    assert zoo("list", "mocc").exit_code == 2
    (only,) = json.loads(zoo("list", "moga", "--json").stdout)["methods"]
    assert only["name"] == "moga"


def test_list_is_quick_to_import() -> None:
    code = "import sys, experiments.cli; print([m for m in ('torch', 'lightning', 'mlflow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [[], ["train"], ["sweep"], ["report"], ["ui"], ["list"], ["map"], ["cost"]])
def test_help_teaches(command: list[str]) -> None:
    text = zoo(*command, "--help").stdout
    assert "Usage" in text
    if command:
        assert "Example: zoo" in text


def test_map_draws(here: Path) -> None:
    result = zoo("map", "moc", "top_k=1", "anchors=[shot]")
    assert result.exit_code == 0
    assert "%" in result.stdout
    assert (here / "map-moc.png").read_bytes().startswith(b"\x89PNG")
    assert zoo("map", "moga", "--out", here / "a" / "b.png").exit_code == 0
    assert (here / "a" / "b.png").exists()


@pytest.mark.slow
def test_map_counts_loops(here: Path) -> None:
    assert "9 <-> 11" in zoo("map", "moc", "causal=null").stdout
    assert "<->" not in zoo("map", "moc").stdout
    found = json.loads(zoo("map", "moc", "causal=null", "--json", "--out", "page.png").stdout)
    assert found["loops"] == [[9, 11]]
    assert found["settings"] == {"causal": None}
    assert found["picture"] == str(here / "page.png")
    assert len(found["branches"][0]["shots"]) == 12
    assert "nothing routed" in zoo("map", "dense").stdout
    assert "simulated" in zoo("map", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "attention=mocc"], "did you mean 'moc'?"),
        (["train", "--plugin", "none.py"], "no such file"),
        (["sweep", "quikstart"], "did you mean 'quickstart'?"),
        (["report", "nothing"], "no sweep 'nothing'"),
        (["map", "moc", "topk=2"], "did you mean 'top_k'?"),
        (["map", "mocc"], "did you mean 'moc'?"),
    ],
)
def test_refusals_are_one_message(arguments: list[str], message: str) -> None:
    result = zoo(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_runs_that_cannot_be_written_are_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", "/dev/null/runs")
    result = zoo("sweep", str(write_sweep(tmp_path / "nowhere.yaml")))
    assert result.exit_code == 2
    assert "runs are kept in /dev/null/runs" in result.stderr
    assert "Traceback" not in result.output


def test_train_with_a_plugin(here: Path, plugin: Path) -> None:
    """The example of the design, in a file of its own, trained at once."""
    asked = ["attention=own_and_previous_shots", "attention.reach=2", "trainer.max_steps=1", "trainer.profiler=simple"]
    result = zoo("train", "--plugin", plugin, "--config", "tiny.yaml", *asked)
    assert result.exit_code == 0, result.output
    for shown in ("first loss", "val loss", "density", "kernel", "s/step"):
        assert shown in result.stdout
    folders = list((here / "runs" / "train").iterdir())
    assert [folder.name.rpartition("-")[0] for folder in folders] == ["own_and_previous_shots"]
    assert str(folders[0]) in result.stdout
    assert "run_training_batch" in (folders[0] / "fit-profile.txt").read_text()

    plain = json.loads(zoo("train", "--config", "tiny.yaml", "trainer.max_steps=1", "--json").stdout)
    assert (plain["status"], plain["attention"], plain["steps"]) == ("finished", {"name": "dense"}, 1)
    assert plain["provenance"]["torch"]


def test_a_failed_run_says_why(bad_plugin: Path) -> None:
    result = zoo("train", "--plugin", bad_plugin, "--config", "tiny.yaml", "attention=diverges_too")
    assert result.exit_code == 1
    assert "NonFiniteLoss" in result.stderr


def test_sweep_then_report(here: Path, bad_plugin: Path) -> None:
    path = write_sweep(here / "both.yaml", axes={"attention": ["dense", "diverges_too"]})
    result = zoo("sweep", path, "--plugin", bad_plugin)
    assert result.exit_code == 1  # one cell failed; the report is written all the same
    page = here / "runs" / "both" / "report.html"
    assert str(page) in result.stdout
    assert "diverges_too, failed: NonFiniteLoss" in result.stdout
    found = json.loads(zoo("report", "both", "--json").stdout)
    assert [(cell["name"], cell["status"]) for cell in found["cells"]] == [
        ("dense", "finished"),
        ("diverges_too", "failed"),
    ]
    assert found == json.loads((page.parent / "report.json").read_text())
    assert "Leaderboard" in page.read_text()

    shorter = zoo("sweep", path, "--plugin", bad_plugin, "--max-steps", "1")  # it fails from the second step on
    assert shorter.exit_code == 0
    assert "2 of 2 cells finished" in shorter.stdout
    stamps = {p: p.stat().st_mtime_ns for p in here.glob("runs/both/*/result.json")}
    assert zoo("sweep", path, "trainer.max_steps=1", "--plugin", bad_plugin).exit_code == 0
    assert stamps == {p: p.stat().st_mtime_ns for p in here.glob("runs/both/*/result.json")}
    assert zoo("sweep", path, "--plugin", bad_plugin, "--max-steps", "1", "--fresh").exit_code == 0
    assert stamps != {p: p.stat().st_mtime_ns for p in here.glob("runs/both/*/result.json")}


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_politely(here: Path) -> None:
    """A real SIGINT to a real process, while it trains."""
    path = write_sweep(here / "long.yaml", axes={"attention": ["dense", "moc"]})
    plain = yaml.safe_load(path.read_text())
    plain["base"]["trainer"] |= {"max_steps": 100000, "val_check_interval": 100000}
    path.write_text(yaml.safe_dump(plain))
    code = """
import signal, sys
from experiments import cli
from experiments.execution import progress

def step(self, name, number, total, note):
    if number == 3:
        signal.raise_signal(signal.SIGINT)

progress.Bar.step = step
signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts in the background of a shell ignores it
sys.argv = ["zoo", "sweep", "long.yaml"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 130, done.stderr
    assert "resume with: zoo sweep long.yaml" in done.stdout
    assert "was interrupted by SIGINT after 3 steps" in done.stdout
    assert "Traceback" not in done.stderr + done.stdout


def test_check_says_what_each_check_found() -> None:
    done = zoo("check", "dense", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["checks"]
    assert [row["check"] for row in found] == list(checks())
    assert {row["method"] for row in found} == {"dense"}
    assert set(found[0]) == {"method", "check", "status", "reason", "seconds"}
    assert {row["status"] for row in found} == {"passed"}


def test_check_of_a_broken_plugin_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = ["films_packed", "inputs_untouched"]
    monkeypatch.setattr(conformance, "run_checks", partial(testing.run_checks, only=only))
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)  # one process: others would not have what is patched here
    file = tmp_path / "looks_across_films.py"
    file.write_text(
        "import torch, sparse_zoo as zoo\n"
        "@zoo.register('looks_across_films')\n"
        "class Looks(zoo.Attention):\n"
        "    '''Everyone attends to everyone, whatever the film.'''\n"
        "    def plan(self, q, k, layout):\n"
        "        return zoo.Plan.groups(torch.zeros(len(layout), dtype=torch.int64))\n"
    )
    done = zoo("check", "looks_across_films", "window", "--plugin", file)
    assert done.exit_code == 1
    counts = re.findall(r"(looks_across_films|window)\W+(\d+)\W+(\d+)\W+(\d+)\W", done.output)
    assert counts == [("looks_across_films", "1", "1", "0"), ("window", "2", "0", "0")]  # passed, failed, skipped
    assert "looks_across_films: films_packed" in done.output
    assert " failed: expected " in done.output
    assert zoo("check", "windows").exit_code == 2


@pytest.mark.slow
def test_check_of_several_methods_in_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    file = tmp_path / "ends.py"
    file.write_text(
        "import os, signal, torch, sparse_zoo as zoo\n"
        "@zoo.register('ends')\n"
        "class Ends(zoo.Attention):\n"
        "    '''Ends its process.'''\n"
        "    def plan(self, q, k, layout):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = zoo("check", "dense", "ends", "rolling", "--plugin", file, "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)["checks"]
    ended = {
        "method": "ends",
        "check": "process",
        "status": "failed",
        "reason": "its process was killed by SIGKILL while checking",
        "seconds": 0.0,
    }
    assert [row for row in found if row["method"] == "ends"] == [ended]
    assert [row["check"] for row in found if row["method"] == "dense"] == list(checks())
    assert [row["method"] for row in found] == ["dense"] * len(checks()) + ["ends"] + ["rolling"] * len(checks())
