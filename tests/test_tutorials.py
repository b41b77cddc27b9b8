"""The tutorials' files and commands run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sparse_zoo as zoo
from experiments.cli import app

DOCS = Path(__file__).parent.parent / "docs"
LANGUAGES = re.compile(r"```(\w*)\n(.*?)```", flags=re.S)


def blocks(page: str, language: str) -> list[str]:
    return [text for kind, text in LANGUAGES.findall((DOCS / page).read_text()) if kind == language]


def write_files(page: str) -> None:
    for text in blocks(page, "python") + blocks(page, "yaml"):
        if name := re.match(r"# (\S+\.(?:py|yaml))\n", text):
            Path(name.group(1)).write_text(text)


def run_commands(page: str) -> list[str]:
    """The output of each command of a page, in order."""
    outputs = []
    for block in blocks(page, ""):
        for line in block.splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "zoo", line
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"
            outputs.append(done.output)
    return outputs


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_a_method_is_added_as_the_tutorial_says() -> None:
    write_files("tutorials/add-a-method.md")
    checked, *_ = run_commands("tutorials/add-a-method.md")
    assert "own_and_previous_shots" in checked


@pytest.mark.slow
def test_an_ablation_is_run_and_read_as_the_tutorial_says() -> None:
    write_files("tutorials/run-an-ablation.md")
    listed, _, report, markdown = run_commands("tutorials/run-an-ablation.md")
    assert "causal" in listed
    assert "No significant winner" in report
    assert markdown.startswith("# causal")


def test_layout_of_the_concepts_page_is_built(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("concepts.md", "python")
    exec(code, {})
    film = zoo.Layout.film([zoo.Shot(frames=4, rows=8, cols=8, text=6) for _ in range(3)], caption=4)
    assert capsys.readouterr().out.startswith(f"{len(film)} ")
    assert torch.equal(film.shot[:4], torch.full((4,), -1, dtype=film.shot.dtype))


def test_every_method_has_a_goal() -> None:
    page = (DOCS / "which-method.md").read_text()
    own = [name for name in zoo.names() if zoo.get(name).__module__.startswith("sparse_zoo.methods.")]
    assert [name for name in own if f"`{name}" not in page] == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (DOCS.parent / "mkdocs.yml").read_text()
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert [page for page in pages if f": {page}\n" not in navigation] == []
