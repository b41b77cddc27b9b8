"""Every cell is tried with equally many settings, and its runs have the best of them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up import finished
from tiny import write_sweep
from typer.testing import CliRunner

from experiments.cli import app
from experiments.sweep.expand import Sweep, Trials, read
from experiments.sweep.schema import Written
from experiments.tracking.store import read as read_result
from experiments.tracking.store import read_sweep
from sparse_zoo.errors import ZooError

CELLS: dict[str, Any] = {"moc": {"attention": {"name": "moc", "top_k": 3}}, "dense": {"attention": "dense"}}
TUNE: dict[str, Any] = {"trials": 4, "seeds": [100]}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path / "runs"


def tuned(folder: Path, **parts: Any) -> Sweep:
    return read(write_sweep(folder / "s.yaml", **{"seeds": 2, "cells": CELLS, "tune": TUNE, **parts}))


def trials_of(sweep: Sweep) -> Trials:
    assert sweep.trials is not None
    return sweep.trials


def tried(sweep: Sweep) -> dict[str, list[dict[str, Any]]]:
    """The settings that are tried, by cell."""
    return {name: [dict(one["settings"]) for one in own] for name, own in trials_of(sweep).plan["cells"].items()}


def make_up(sweep: Sweep, scores: dict[str, float | None]) -> None:
    """Finish every trial with a recall by its name, or fail it where that is None; the others have none."""
    trials = trials_of(sweep).sweep
    for cell in trials.cells:
        score = scores.get(str(cell.group), 0.0)
        result = finished(cell, trials.name, 1.0, metrics={"identity_recall": score or 0.0})
        if score is None:
            result = replace(result, status="failed", reason="ValueError: it diverged")
        result.write(cell.folder(trials.name))


def test_every_cell_has_the_same_number_of_trials_and_begins_as_written(tmp_path: Path) -> None:
    sweep = tuned(tmp_path, tune=TUNE | {"seeds": [100, 101], "cells": {"moc": {"attention.top_k": [1, 2]}}})
    found = tried(sweep)
    assert [len(own) for own in found.values()] == [4, 4]
    assert [own[0] for own in found.values()] == [{}, {}]
    trials = trials_of(sweep)
    assert (trials.sweep.name, trials.waiting, sweep.ready.cells) == ("s-trials", ("moc", "dense"), ())
    assert [cell.config["seed"] for cell in trials.sweep.cells] == [100, 101] * 8
    assert [cell.config["data"]["seed"] for cell in trials.sweep.cells] == [100, 101] * 8  # other films too
    assert {cell.group for cell in trials.sweep.cells} >= {"moc-as_written", "dense-as_written", "moc-top_k=1"}


def test_the_method_default_is_tried_second(tmp_path: Path) -> None:
    lists = {"moc": {"attention.top_k": [1, 2], "attention.chunk": ["frame"]}}
    cells = {"moc": {"attention": {"name": "moc", "top_k": 3, "chunk": "shot"}}}
    own = tried(tuned(tmp_path, cells=cells, tune=TUNE | {"cells": lists, "shared": {}}))["moc"]
    assert own[:2] == [{}, {"attention.top_k": 5, "attention.chunk": "frame"}]  # frame is the default: no second time
    assert own[2:] == [{"attention.top_k": 5}, {"attention.chunk": "frame"}]


def test_the_same_setting_is_tried_once(tmp_path: Path) -> None:
    values = {"attention.top_k": [3, 3.0, 5, 1], "optim.lr": [1e-3, 0.001, 2e-3]}  # top_k 3 and lr 0.001 are as written
    with pytest.raises(ZooError, match="top_k"):
        tuned(tmp_path, tune=TUNE | {"cells": {"moc": values}})  # 3.0 is no count
    values["attention.top_k"] = [3, 5, 1]
    sweep = tuned(tmp_path, tune={"trials": 6, "seeds": [9], "cells": {"moc": values}})
    ids = [cell.id for cell in trials_of(sweep).sweep.cells if cell.config["attention"]["name"] == "moc"]
    assert len(set(ids)) == len(ids) == 6
    with pytest.raises(ZooError, match=r"moc has 6 different settings, and tune.trials is 7.*tune.cells.moc"):
        tuned(tmp_path, tune={"trials": 7, "seeds": [9], "cells": {"moc": values}, "shared": {}})


def test_without_lists_the_knob_and_the_learning_rate_are_tried(tmp_path: Path) -> None:
    cells = {**CELLS, "muon": {"attention": "dense", "optim.optimizer": "muon", "optim.muon_lr": 0.02}}
    found = tried(tuned(tmp_path, cells=cells))
    assert found["moc"] == [{}, {"attention.top_k": 5}, {"optim.lr": 0.0005}, {"attention.top_k": 1}]
    assert found["dense"] == [{}, {"optim.lr": 0.0005}, {"optim.lr": 0.002}, {"optim.lr": 0.00025}]
    assert found["muon"][1:] == [{"optim.muon_lr": 0.01}, {"optim.muon_lr": 0.04}, {"optim.muon_lr": 0.005}]


def test_a_solved_knob_is_not_tried(tmp_path: Path) -> None:
    cells = {"moc": {"attention": "moc"}}
    sweep = tuned(tmp_path, cells=cells, match={"density": 0.875})
    assert [[*own] for own in tried(sweep)["moc"]] == [[], ["optim.lr"], ["optim.lr"], ["optim.lr"]]
    assert {cell.config["match"]["density"] for cell in trials_of(sweep).sweep.cells} == {0.875}
    with pytest.raises(ZooError, match="top_k of moc is to be solved: leave it out"):
        tuned(tmp_path, cells=cells, match={"density": 0.875}, tune=TUNE | {"cells": {"moc": {"attention.top_k": [1]}}})


def test_more_trials_keep_the_first(tmp_path: Path) -> None:
    few, many = (
        [cell.id for cell in trials_of(tuned(tmp_path, tune=TUNE | {"trials": n})).sweep.cells] for n in (3, 6)
    )
    assert few[:3] == many[:3]
    assert few[3:] == many[6:9]


def test_the_best_setting_runs_as_an_ordinary_cell(tmp_path: Path) -> None:
    make_up(tuned(tmp_path), {"moc-top_k=1": 0.6, "moc-lr=0.0005": 0.4, "dense-lr=0.002": 0.9})
    sweep = tuned(tmp_path)
    assert trials_of(sweep).plan["chosen"] == {"moc": "moc-top_k=1", "dense": "dense-lr=0.002"}
    ordinary = {"moc": {"attention": {"name": "moc", "top_k": 1}}, "dense": {"attention": "dense", "optim.lr": 0.002}}
    plain = read(write_sweep(tmp_path / "s.yaml", seeds=2, cells=ordinary))
    assert [(cell.name, cell.id) for cell in sweep.cells] == [(cell.name, cell.id) for cell in plain.cells]
    assert sweep.ready.cells == sweep.cells


def test_a_tie_goes_to_the_cell_as_written(tmp_path: Path) -> None:
    make_up(tuned(tmp_path), {"moc-as_written": 0.5, "moc-top_k=1": 0.5})
    assert trials_of(tuned(tmp_path)).plan["chosen"] == {"moc": "moc-as_written", "dense": "dense-as_written"}


def test_a_failed_trial_is_not_chosen_and_nothing_runs_where_all_failed(tmp_path: Path) -> None:
    failing: dict[str, float | None] = {"moc-as_written": None, "moc-top_k=5": 0.2}
    make_up(tuned(tmp_path), failing)
    assert trials_of(tuned(tmp_path)).plan["chosen"]["moc"] == "moc-top_k=5"
    make_up(tuned(tmp_path), {str(cell.group): None for cell in trials_of(tuned(tmp_path)).sweep.cells[:4]})
    sweep = tuned(tmp_path)
    assert trials_of(sweep).failed == ("moc",)
    assert {cell.group for cell in sweep.ready.cells} == {"dense"}


def test_one_seed_that_failed_fails_its_setting(tmp_path: Path) -> None:
    parts: dict[str, Any] = {"tune": TUNE | {"seeds": [100, 101]}}
    sweep = tuned(tmp_path, **parts)
    make_up(sweep, {"moc-top_k=1": 0.9, "moc-top_k=5": 0.3})
    trials = trials_of(sweep).sweep
    cell = next(cell for cell in trials.cells if cell.name == "moc-top_k=1-s101")
    replace(read_result(cell, trials.name), status="failed").write(cell.folder(trials.name))
    assert trials_of(tuned(tmp_path, **parts)).plan["chosen"]["moc"] == "moc-top_k=5"


def test_nothing_is_chosen_before_all_trials_of_a_cell_ended(tmp_path: Path) -> None:
    sweep = tuned(tmp_path)
    make_up(sweep, {})
    trials = trials_of(sweep).sweep
    (trials.cells[0].folder(trials.name) / "result.json").unlink()
    sweep = tuned(tmp_path)
    assert trials_of(sweep).waiting == ("moc",)
    assert {cell.group for cell in sweep.ready.cells} == {"dense"}


def test_another_measure_chooses(tmp_path: Path) -> None:
    sweep = tuned(tmp_path)
    make_up(sweep, {"moc-top_k=1": 0.9})
    trials = trials_of(sweep).sweep
    for number, cell in enumerate(trials.cells):
        replace(read_result(cell, trials.name), val_loss=abs(number - 2.0)).write(cell.folder(trials.name))
    chosen = trials_of(tuned(tmp_path, tune=TUNE | {"by": "val_loss"})).plan["chosen"]
    assert chosen["moc"] == trials.cells[2].group  # the lowest loss
    with pytest.raises(ZooError, match="unknown measure 'identity_recalls'; did you mean 'identity_recall'"):
        tuned(tmp_path, tune=TUNE | {"by": "identity_recalls"})


def test_trials_may_be_shorter(tmp_path: Path) -> None:
    sweep = tuned(tmp_path, tune=TUNE | {"max_steps": 1})
    assert {cell.config["trainer"]["max_steps"] for cell in trials_of(sweep).sweep.cells} == {1}
    assert {cell.config["trainer"]["max_steps"] for cell in sweep.cells} == {2}
    make_up(sweep, {"moc-top_k=1": 0.9})
    assert tuned(tmp_path, tune=TUNE | {"max_steps": 1}).cells[0].config["trainer"]["max_steps"] == 2


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"trials": 4}, "tune.seeds is missing"),
        ({"trails": 4, "seeds": [1]}, "unknown key of tune 'trails'; did you mean 'trials'"),
        (TUNE | {"trials": 1}, "tune.trials must be at least 2, got 1"),
        (TUNE | {"trials": "six"}, "tune.trials must be a whole number, got 'six'"),
        (TUNE | {"seeds": 100}, "tune.seeds must be a list of whole numbers, got 100"),
        (TUNE | {"seeds": []}, "tune.seeds must be distinct whole numbers from 0, at least one"),
        (TUNE | {"seeds": [7, 7]}, "tune.seeds must be distinct whole numbers"),
        (TUNE | {"seeds": [1, 100]}, "tune.seeds: 1 are seeds of the cells' own runs too"),
        (TUNE | {"by": "motion"}, "tune.by 'motion' cannot choose: it is not known whether more or less"),
        (TUNE | {"max_steps": 0}, "tune.max_steps must be at least 1, got 0"),
        (TUNE | {"cells": {"mocc": {}}}, "unknown cell under tune.cells 'mocc'; did you mean 'moc'"),
        (TUNE | {"cells": {"moc": [1]}}, "tune.cells.moc must be {dotted key: values}"),
        (TUNE | {"cells": {"moc": {"attention.top_k": 2}}}, "'attention.top_k' must be a list or a mapping of values"),
        (TUNE | {"cells": {"moc": {"attention.top_k": [0]}}}, "cell moc-top_k=0: .*got 0"),
        (TUNE | {"shared": {"seed": [1, 2]}}, "tune.shared: seed is not tuned"),
        ([TUNE], "tune must be a mapping or null"),
    ],
)
def test_a_bad_section_is_refused(tmp_path: Path, tune: Any, message: str) -> None:
    with pytest.raises(ZooError, match=message):
        tuned(tmp_path, tune=tune)


def test_misspelt_settings_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    listed = {"cells": {"moc": {"attention.top_q": [1]}}, "shared": {"optim.lrr": [0.1]}}
    path = write_sweep(tmp_path / "s.yaml", cells=CELLS, tune=TUNE | listed)
    with pytest.raises(ZooError) as caught:
        Written.of(path).check_names()
    assert "'top_q'; did you mean 'top_k'" in str(caught.value)
    assert "'lrr'; did you mean 'lr'" in str(caught.value)


def test_an_excluded_cell_has_no_trials(tmp_path: Path) -> None:
    sweep = tuned(tmp_path, exclude={"attention": "dense"})
    assert [*tried(sweep)] == ["moc"]
    with pytest.raises(ZooError, match=r"tune.cells: exclude leaves out 'dense'"):
        tuned(tmp_path, exclude={"attention": "dense"}, tune=TUNE | {"cells": {"dense": {"optim.lr": [0.1, 0.2, 0.3]}}})


def test_files_that_extend_one_with_trials_have_none(tmp_path: Path) -> None:
    write_sweep(tmp_path / "below.yaml", cells=CELLS, tune=TUNE)
    (tmp_path / "above.yaml").write_text("extends: below.yaml\ncells: {dense: {attention: dense}}\n")
    assert read(tmp_path / "above.yaml").trials is None


ONCE_KILLED = '''
import os, pathlib, signal

import sparse_zoo as zoo


@zoo.register("killed_once")
class KilledOnce(zoo.Attention):
    """Dense attention whose process ends in the second step of its second trial, once."""

    def plan(self, q, k, layout):
        return zoo.Plan.dense(layout)

    def losses(self, call):
        home = pathlib.Path(os.environ["ZOO_HOME"])
        mark, first = home / "killed", home.glob("s-trials/killed_once-as_written*/result.json")
        done = any('"status": "finished"' in result.read_text() for result in first)
        done = done and list(home.glob("s-trials/killed_once-lr*/resume.ckpt"))
        if done and call.step == 1 and not mark.exists():
            mark.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return {}
'''


FAILS = '''
import sparse_zoo as zoo


@zoo.register("fails")
class Fails(zoo.Attention):
    """Dense attention that fails in the second step."""

    def plan(self, q, k, layout):
        return zoo.Plan.dense(layout)

    def losses(self, call):
        if call.step:
            raise RuntimeError("no losses")
        return {}
'''


def zoo_(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_tuned_sweep_that_was_killed_goes_on_and_runs_the_best(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_SAVE_SECONDS", "0")
    (tmp_path / "mine.py").write_text(ONCE_KILLED)
    cells = {"killed_once": {"attention": "killed_once"}, "dense": {"attention": "dense"}}
    parts: dict[str, Any] = {"plugins": ["mine.py"], "seeds": 2, "cells": cells}
    path = write_sweep(tmp_path / "s.yaml", tune={"trials": 2, "seeds": [100]}, **parts)
    shown = json.loads(zoo_("sweep", path, "--dry-run", "--json").stdout)
    assert [row["name"] for row in shown["trials"]["rows"]][1:3] == ["killed_once-lr=0.0005", "dense-as_written"]
    assert (shown["waiting"], len(shown["rows"])) == (["killed_once", "dense"], 2)
    killed = subprocess.run([sys.executable, "-m", "experiments", "sweep", str(path)], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert not (home / "s" / "sweep.json").exists()

    result = zoo_("sweep", path)
    assert result.exit_code == 0, result.output
    request, trials = read_sweep("s"), read_sweep("s-trials")
    assert request.tuning is not None
    runs = [read_result(cell, "s-trials") for cell in trials.cells]
    assert [run.status for run in runs] == ["finished"] * 4
    assert [bool(run.resumed) for run in runs] == [False, True, False, False]
    assert [read_result(cell, "s").status for cell in request.cells] == ["finished"] * 4
    for name, own in request.tuning["cells"].items():
        scores = {cell.group: run.metrics["identity_recall"] for cell, run in zip(trials.cells, runs, strict=True)}
        names = [one["name"] for one in own]
        assert request.tuning["chosen"][name] == max(names, key=lambda one: scores[one])  # of equal ones the first
    shown = json.loads(zoo_("sweep", path, "--dry-run", "--json").stdout)
    assert (shown["waiting"], shown["seconds"]) == ([], 0)


def test_a_cell_whose_trials_all_fail_is_named_and_the_others_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FAILS)
    cells = {"fails": {"attention": "fails"}, "dense": {"attention": "dense"}}
    path = write_sweep(tmp_path / "s.yaml", plugins=["mine.py"], cells=cells, tune={"trials": 2, "seeds": [100]})
    result = zoo_("sweep", path)
    assert result.exit_code == 1
    assert "fails: no trial ended with a score, so no setting was chosen" in result.stdout
    assert [cell.name for cell in read_sweep("s").cells] == ["dense"]
