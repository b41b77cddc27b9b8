"""What docs/sweeps.md shows runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import app
from experiments.sweep import preflight
from experiments.sweep.expand import read

PAGE = (Path(__file__).parent.parent / "docs" / "sweeps.md").read_text()
PARTS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.S | re.M))


def blocks(part: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PARTS[part], flags=re.S | re.M)
    return [text for name, text in found if name == language]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "runs"))
    monkeypatch.setattr(preflight, "TIMED", 1)
    files = {"chunks": "The file", "equal": "Equal budgets", "tuned": "Tune each method fairly"}
    for file, part in files.items():
        (text,) = blocks(part, "yaml")
        (tmp_path / f"{file}.yaml").write_text(text)
    return tmp_path


def test_the_file_makes_the_cells_that_the_page_counts(here: Path) -> None:
    cells = read(here / "chunks.yaml").cells
    assert len(cells) == 14
    assert cells[0].name == "anchored-muon_lr=0.03-chunk_tokens=9-top_k=4-s0"
    assert f"{len(cells)} runs, named like `{cells[0].name}`" in PARTS["The file"]


def test_the_page_says_which_settings_are_tried(here: Path) -> None:
    trials = read(here / "tuned.yaml").trials
    assert trials is not None
    moc, dense = ([one["settings"] for one in own] for own in trials.plan["cells"].values())
    assert moc == [
        {},
        {"attention.top_k": 5, "attention.chunk": "frame"},
        {"attention.top_k": 5},
        {"attention.chunk": "frame"},
    ]
    assert dense == [{}, *({"optim.muon_lr": rate} for rate in (0.02, 0.04, 0.01))]


PARTS_WITH_COMMANDS = ("The file", "Dry run", "Equal budgets", "Tune each method fairly")
COMMANDS = [line for part in PARTS_WITH_COMMANDS for block in blocks(part, "") for line in block.splitlines()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command: str) -> None:
    name, *arguments = shlex.split(command)
    assert name == "zoo"
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
