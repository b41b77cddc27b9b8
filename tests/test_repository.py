"""The files that a repository is expected to have say what is so."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import sparse_zoo

pytest_plugins = ["pytester"]

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
    commands = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"make ([a-z-]+)", commands.partition("set -e")[2]) == ["test", "conformance"]
    targets = {line.partition(":")[0] for line in (ROOT / "Makefile").read_text().splitlines()}
    assert {"test", "fast", "conformance", "extras", "test-slow", "test-all"} <= targets


def test_packages_that_cannot_be_installed_are_named(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run(
        [bash, ROOT / ".ci" / "packages"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 1
    assert re.fullmatch(r"make extras: chromium.* cannot be installed: there is no apt-get\. .+\n", done.stderr)


def test_skipped_test_fails_with_fail_skipped(pytester: pytest.Pytester) -> None:
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makepyfile(
        test_one="import pytest\ndef test_one(): pytest.skip('no luck')\n",
        test_all="import pytest\npytest.importorskip('no_such_package')\n",
        test_odd="import pytest\n@pytest.mark.xfail(reason='known')\ndef test_odd(): raise ValueError\n",
    )
    pytester.runpytest_inprocess().assert_outcomes(skipped=2, xfailed=1)
    pytester.runpytest_inprocess("--fail-skipped", "test_all.py").assert_outcomes(errors=1)
    strict = pytester.runpytest_inprocess("--fail-skipped", "test_one.py", "test_odd.py")
    strict.assert_outcomes(failed=1, xfailed=1)
    strict.stdout.fnmatch_lines(["*was skipped, and --fail-skipped was given. Skipped: no luck"])


def test_hooks_and_forms_are_well_formed() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = (ROOT / "Makefile").read_text().partition("lint: install")[2]
    assert all(tool in lint for tool in ("ruff check", "ruff format", "mypy"))
    assert [hook["name"] for hook in hooks] == ["ruff check", "ruff format", "mypy"]
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        content = yaml.safe_load(form.read_text())
        assert form.name == "config.yml" or {"name", "description", "body"} <= set(content)
