"""What the pages show runs."""

import re
from pathlib import Path

import pytest
import torch

import sparse_zoo as zoo
from sparse_zoo.testing import checks
from sparse_zoo.testing.mutants import MUTANTS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_the_method_of_the_readme_is_a_plugin(tmp_path: Path) -> None:
    (code,) = [block for block in blocks("python") if "@zoo.register" in block]
    file = tmp_path / "own_shots.py"
    file.write_text(code)
    assert zoo.load_plugin(file) == ["own_and_previous_shots"]
    film = zoo.Layout.film([zoo.Shot(1, 2, 2, 1) for _ in range(3)])
    q = torch.randn(1, 1, len(film), 4)
    attention = zoo.build("own_and_previous_shots", heads=1, head_dim=4, reach=1)
    gap = film.shot[:, None] - film.shot
    assert torch.equal(attention.plan(q, q, film).dense_mask()[0, 0], (gap >= 0) & (gap <= 1))


def test_the_library_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [block for block in blocks("python") if "zoo.build" in block]
    exec(code, {})
    assert capsys.readouterr().out.startswith("torch.Size([1, 4, 790, 32]) cpu 0.")


def test_the_readme_counts_right() -> None:
    assert f"a conformance suite of {len(checks())} checks" in README
    assert f"{len(MUTANTS)} broken methods and kernels" in README


def test_what_the_readme_links_to_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).is_file(), link
