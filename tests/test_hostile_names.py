"""Whatever a name, a setting, a path or a reason holds is text in every output of every command."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import yaml  # type: ignore[import-untyped]
from tiny import BASE
from typer.testing import CliRunner

from experiments import escape
from experiments.cli import app
from experiments.inspection import conformance
from experiments.reporting import tables
from experiments.reporting.report import build_report
from sparse_zoo import testing

HOSTILE = "[red]x[/red]<script>alert(1)</script>|`_\\input{a}\x1b[31m\r\u202e\udc80'\"&amp;$#% :bomb:"
IN_A_PATH = HOSTILE.replace("/", "-")
NAME = re.sub(r"[/\\'\"\x00-\x1f\udc80]", "-", HOSTILE)  # as a cell may be named

PLUGIN = f"""
import sparse_zoo as zoo
from datamodules import ShotWorld
from torchmetrics import MeanMetric

HOSTILE = {HOSTILE!r}


@zoo.register("odd")
class Odd(zoo.Attention):
    __doc__ = (HOSTILE + "\\n\\nnote: " + HOSTILE).replace("\\udc80", "")  # Python takes no other

    def __init__(self, *, note: str = HOSTILE, **base):
        super().__init__(**base)

    def plan(self, q, k, layout):
        return zoo.Plan.dense(layout)


class One(MeanMetric):
    def update(self, clips, batch):
        super().update(1.0)


class Films(ShotWorld):
    def sample_metrics(self):
        return {{**super().sample_metrics(), HOSTILE: One()}}

    def summary(self):
        return {{HOSTILE: HOSTILE, "skipped": [{{"path": HOSTILE, "reason": HOSTILE}}]}}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / re.sub("['\udc80]", "", IN_A_PATH)  # MLflow's own SQL takes no quote in a path
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ZOO_HOME", str(folder / "runs"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("COLUMNS", "2000")
    (folder / "plugin.py").write_text(PLUGIN)
    base = {**BASE, "data": {**BASE["data"], "name": "plugin.py:Films"}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(base))
    cells = {NAME: {"attention": {"name": "odd", "note": NAME}}}
    sweep = {"about": NAME, "plugins": ["plugin.py"], "base": base, "cells": cells}
    (folder / f"{NAME}.yaml").write_text(yaml.safe_dump(sweep, allow_unicode=True))
    yield folder
    from sparse_zoo.registry import _methods

    _methods.pop("odd", None)


def zoo(*arguments: str, exit_code: int = 0, shows: str = "") -> str:
    """What a command prints, which holds nothing that a terminal would obey, and the text as it was given."""
    done = CliRunner().invoke(app, [*arguments])
    assert done.exit_code == exit_code, (arguments, done.output, done.exception)
    assert not escape.UNSAFE.search(done.output), arguments
    assert shows in done.output, arguments
    return done.output


@pytest.mark.slow
def test_names_are_text_in_what_bench_shows(here: Path) -> None:  # noqa: ARG001
    given = ["--method", "odd", "--repeats", "1", "--max-repeats", "1", "--plot", f"{IN_A_PATH}.png"]
    zoo("bench", *given, "--plugin", "plugin.py", shows="[red]x")


@pytest.mark.slow
def test_names_are_text_in_every_output_of_every_command(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = ["--plugin", "plugin.py"]
    shown = escape.visible(HOSTILE)
    picture = f"{IN_A_PATH}.png"

    zoo("list", *plugin, shows=shown[:20])
    zoo("list", "odd", *plugin, shows=shown[:20])
    assert json.loads(zoo("list", "odd", "--json", *plugin))["methods"][0]["settings"]["note"]["default"] == HOSTILE
    failed = testing.Outcome("odd", "made_up", "failed", HOSTILE, 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(conformance, "run_checks", lambda _: [failed])
        zoo("check", "odd", *plugin, exit_code=1, shows=shown)
    zoo("map", "odd", f"note=a{HOSTILE}", "--out", picture, *plugin, shows=escape.visible(picture))
    zoo("cost", "odd", f"note=a{HOSTILE}", *plugin)

    zoo("train", "--config", "tiny.yaml", "attention=odd", f"attention.note=a{HOSTILE}", *plugin, shows="[red]x")
    zoo("sweep", f"{NAME}.yaml", "--dry-run", shows="[red]x")
    zoo("sweep", f"{NAME}.yaml", shows="[red]x")
    zoo("report", NAME, "--runs", shows="[red]x")
    zoo("report", NAME, "--markdown")
    zoo("report", NAME, "--latex")
    json.loads(zoo("report", NAME, "--json"))
    page = (here / "runs" / NAME / "report.html").read_text(encoding="utf-8")
    assert not escape.UNSAFE.search(page)
    assert "<script>alert" not in page
    assert not re.search(r"(?<!\\)<script", tables.markdown(build_report(NAME)))
    assert r"\input{" not in tables.latex(build_report(NAME))

    (checkpoints,) = (here / "runs" / NAME).glob("*/checkpoints")
    given = [str(checkpoints.parent), *plugin]
    zoo("sample", *given, "--films", "1", "--steps", "1", shows="[red]x")
    zoo("ladder", *given, "--films", "1", "--times", "0.5", "--method", f"odd:note=a{NAME}", shows="[red]x")
    calls = f"{IN_A_PATH}.safetensors".replace("\udc80", "")  # safetensors opens no other
    zoo("capture", *given, "--out", calls, "--times", "0.5", shows=escape.visible(calls))
    zoo("replay", calls, f"odd:note=a{NAME}", "--plot", picture, *plugin, shows="[red]x")

    store = mlflow.MlflowClient()
    runs = store.search_runs([one.experiment_id for one in store.search_experiments()])
    logged = {key for one in runs for key in one.data.metrics}
    assert any("_red_x_" in key for key in logged), ", ".join(sorted(logged))


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", f"{HOSTILE}=1"],
        ["train", f"attention={HOSTILE}"],
        ["train", f"data={HOSTILE}"],
        ["train", "--config", HOSTILE],
        ["train", "--plugin", HOSTILE],
        ["sweep", HOSTILE],
        ["sweep", "quickstart", "--size", HOSTILE],
        ["sweep", "quickstart", "--executor", HOSTILE],
        ["report", HOSTILE],
        ["list", HOSTILE],
        ["check", HOSTILE],
        ["map", "moc", f"{HOSTILE}=1"],
        ["cost", HOSTILE],
        ["cost", "--paper", HOSTILE],
        ["bench", "--suite", HOSTILE],
        ["sample", HOSTILE],
        ["ladder", HOSTILE],
        ["capture", HOSTILE],
        ["replay", HOSTILE],
    ],
    ids=lambda given: "-".join(one for one in given if HOSTILE not in one),
)
def test_refusals_show_what_was_given_as_text(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = zoo(*arguments, exit_code=2)
    assert "red]x[" in told
    assert "Traceback" not in told
