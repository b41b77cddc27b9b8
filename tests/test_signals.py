"""A signal ends a command with 128 + its number, after a checkpoint; a run that was ended so resumes bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import zoo
from tiny import BASE, write_sweep
from torch.utils._pytree import tree_leaves

from experiments.config.resolve import load
from experiments.execution import signals
from experiments.execution.checkpointing import saved_step
from experiments.execution.run import run
from experiments.execution.signals import Ended
from experiments.execution.train import RESUME
from experiments.tracking.mlflow_logger import Tracker
from experiments.tracking.store import Cell, Result

pytestmark = pytest.mark.filterwarnings("ignore")

SIGNALS = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130}
START = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts in the background of a shell ignores it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and under nohup this
from experiments.cli import main
main()
"""


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////dev/null/mlflow.db")  # it is told of once, and not missed
    monkeypatch.delenv("ZOO_SAVE_SECONDS", raising=False)
    return tmp_path


@pytest.fixture(autouse=True)
def _nothing_is_ignored() -> Iterator[None]:
    """What starts in the background of a shell, or under nohup, ignores SIGINT or SIGHUP, which commands respect."""
    usual = dict.fromkeys(SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Observer:
    """Calls `act` when step `at` begins to be told of."""

    def __init__(self, at: int = 0, act: Callable[[], object] = lambda: None) -> None:
        self.at, self.act = at, act

    def started(self, *_: object) -> None: ...

    def step(self, _name: str, step: int, _total: int | None, note: str) -> None:
        if step == self.at and note != "judging":
            self.act()

    def ended(self, *_: object) -> None: ...
    def note(self, *_: object) -> None: ...


def cell(**trainer: Any) -> Cell:
    given = {"max_steps": 5, "val_check_interval": 2} | trainer
    method = {"attention": {"name": "moc", "top_k": 1, "drop_off": 0.5}, "data.films_per_epoch": 3}
    return Cell("moc", load([BASE, method, {f"trainer.{key}": value for key, value in given.items()}]))


def go(asked: Cell, sweep: str, observer: Observer) -> Result:
    return run(asked, sweep, Tracker(sweep, lambda _: None), observer)


def read(asked: Cell, sweep: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((asked.folder(sweep) / "result.json").read_text())
    return found


@pytest.mark.parametrize(
    ("number", "at", "accumulate"),
    [
        (signal.SIGTERM, 1, 2),
        *(pytest.param(number, 1, 1, marks=pytest.mark.slow) for number in SIGNALS),
        pytest.param(signal.SIGTERM, 3, 1, marks=pytest.mark.slow),
    ],
)
def test_signal_ends_training_after_a_checkpoint(number: int, at: int, accumulate: int) -> None:
    asked = cell(accumulate_grad_batches=accumulate)
    whole = go(asked, "whole", Observer())
    with pytest.raises(Ended) as ended:
        go(asked, "ended", Observer(at, lambda: signal.raise_signal(number)))
    assert ended.value.code == SIGNALS[number]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    left = read(asked, "ended")
    assert left["status"] == "missing"
    assert left["reason"] == f"was interrupted by {signal.Signals(number).name} after {left['steps']} steps"
    assert saved_step(asked.folder("ended") / RESUME) == left["steps"] >= at
    resumed = go(asked, "ended", Observer())
    assert [part["step"] for part in resumed.resumed] == [left["steps"]]
    assert resumed.curves == whole.curves
    one, other = (torch.load(str(result.checkpoint), weights_only=True) for result in (whole, resumed))
    for key in ("state_dict", "optimizer_states"):
        pairs = zip(tree_leaves(one[key]), tree_leaves(other[key]), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_second_signal_ends_training_at_once() -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    asked = cell()
    with pytest.raises(Ended):
        go(asked, "twice", Observer(1, twice))
    assert read(asked, "twice")["reason"] == "was interrupted by SIGTERM after 1 steps"
    assert not (asked.folder("twice") / RESUME).exists()


def test_step_that_takes_too_long_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "GRACE", 0.2)

    def hang() -> None:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(30)

    asked, start = cell(), time.monotonic()
    with pytest.raises(Ended):
        go(asked, "slow", Observer(1, hang))
    assert time.monotonic() - start < 15
    assert read(asked, "slow")["status"] == "missing"


def test_forked_loader_does_not_answer_for_its_parent() -> None:
    with signals.caught():
        child = os.fork()
        if not child:
            code = 1
            try:
                signal.raise_signal(signal.SIGTERM)
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.caught():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def started(*arguments: object, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, of which nothing is left behind, whatever the test finds."""
    command = [sys.executable, "-c", START, *map(str, arguments)]
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=cwd, start_new_session=True, **output) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_until(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "group"), [(signal.SIGTERM, False), (signal.SIGHUP, True)])
def test_driver_of_jobs_ends_its_processes_and_waits_for_them(runs: Path, number: int, group: bool) -> None:
    """Alone, or with its processes, as a terminal that is closed signals them all."""
    file = write_sweep(runs / "jobs.yaml", axes={"attention": ["dense", "window"]})
    home = runs / "runs" / "jobs"
    command = ["sweep", file, "--jobs", 2, "--max-steps", 100000]
    with started(*command, cwd=runs) as process:
        wait_until(lambda: len(list(home.glob("*/diagnostics.jsonl"))) == 2, process)
        (os.killpg if group else os.kill)(process.pid, number)
        output, _ = process.communicate(timeout=100)
    assert process.returncode == SIGNALS[signal.Signals(number)], output
    assert "Traceback" not in output
    for path in home.glob("*/result.json"):
        left = json.loads(path.read_text())
        assert left["status"] == "missing"
        assert left["reason"].startswith("was interrupted by SIGTERM after ")
        assert saved_step(path.parent / RESUME) == left["steps"]
        with pytest.raises(ProcessLookupError):
            os.kill(left["provenance"]["pid"], 0)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("command", "inside"),
    [
        ("sweep none --dry-run", "experiments.cli.runs.find_sized"),
        ("report none", "experiments.cli.runs.read_sweep"),
        ("sample run", "experiments.cli.trained.find"),
        ("capture run", "experiments.cli.trained.find"),
        ("check dense", "experiments.inspection.conformance.run_checks"),
        ("bench", "sparse_zoo.bench.chosen"),
        ("map dense", "experiments.reporting.pictures.sample_map"),
        ("cost dense", "experiments.inspection.cost.compare"),
        ("power none", "experiments.cli.runs.read_sweep"),
        ("ladder run", "experiments.cli.trained.find"),
        ("compare --model m --prompts p --methods moc", "experiments.inspection.pretrained.read_prompts"),
        ("encode m --vae v --text-encoder t --size 1x16x16 --out o", "experiments.cli.data.sizes"),
        ("ui", "experiments.tracking.mlflow_logger.serve"),
    ],
)
def test_commands_that_do_not_train_end_with_the_code_of_the_signal(
    monkeypatch: pytest.MonkeyPatch, command: str, inside: str, number: int
) -> None:
    monkeypatch.setattr(inside, lambda *_, **__: signal.raise_signal(number))
    assert zoo(*command.split()).exit_code == 128 + number
