"""The files that a repository is expected to have say what is so."""

from pathlib import Path

import yaml

import sparse_zoo

ROOT = Path(__file__).parent.parent


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == sparse_zoo.__version__
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)


def test_the_changelog_has_the_version_and_what_is_not_released() -> None:
    headings = [line[3:] for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0] == "Unreleased"
    assert any(heading.split()[0] == sparse_zoo.__version__ for heading in headings)


def test_ci_runs_what_developers_run() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_hooks_and_forms_are_well_formed() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = (ROOT / "Makefile").read_text().partition("lint: install")[2]
    assert all(tool in lint for tool in ("ruff check", "ruff format", "mypy"))
    assert [hook["name"] for hook in hooks] == ["ruff check", "ruff format", "mypy"]
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        content = yaml.safe_load(form.read_text())
        assert form.name == "config.yml" or {"name", "description", "body"} <= set(content)
