"""A misspelt name is refused before torch is imported, by the names that the classes themselves have."""

from __future__ import annotations

import inspect
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sparse_zoo as zoo
from experiments.config import _sections, load
from experiments.data import OURS
from experiments.match import KINDS
from experiments.names import DATA, MATCH, SECTIONS, SHAPE, methods, misspelt, settings
from sparse_zoo.errors import ZooError
from sparse_zoo.registry import SCHEDULE

WRONG: list[list[Any]] = [
    ["attenton=moc"],
    ["trainer.max_step=3"],
    ["optim.lrr=1"],
    ["model.dimm=1", "flow.shft=1", "sampling.step=1"],
    ["model.channels=3"],
    ["attention=mocc"],
    ["attention=moc", "attention.topk=2"],
    ["attention={name: moc_fixed, chunk: shot}"],
    ["model.depth=2", "attention=[dense, {name: moc, topk: 2}]"],
    ["data=shotworld"],
    ["data.fsp=3"],
    ["data=shot_world", "data.fps=3"],
    ["match.densty=0.5"],
    [{"trainer": {"max_step": 3}}],
]
RIGHT: list[list[Any]] = [
    [],
    ["attention=moc", "attention.top_k=2", "data=shot_world", "data.subjects=2", "seed=3"],
    ["attention.schedule.name.9=moc", "attention.top_k=2"],
    ["model.depth=4", "attention=[{cycle: [dense, moc], layers: rest}]"],
    [{"attention": {"name": "window", "edge": "cut"}}, "attention=moc"],
    ["match.density=0.5", "match.within=0.1"],
]


def test_the_names_are_those_of_the_classes() -> None:
    for section, build in _sections().items():
        parameters = inspect.signature(build).parameters.values()
        assert settings(SECTIONS[section]) == {x.name for x in parameters if x.kind is not x.VAR_KEYWORD}, section
    assert {name: settings(place) for name, place in DATA.items()} == {
        name: {*inspect.signature(films).parameters} for name, films in OURS.items()
    }
    own = {name for name in zoo.names() if zoo.get(name).__module__.startswith("sparse_zoo.methods.")}
    assert {*methods()} == own
    for name, place in methods().items():
        assert (settings(place) or set()) - SHAPE == {*zoo.settings(name)} - {SCHEDULE.name}, name
    assert {*KINDS} < {*MATCH}


@pytest.mark.parametrize("overrides", WRONG)
def test_misspelt_names_are_refused_as_the_config_refuses_them(overrides: list[Any]) -> None:
    quick = misspelt(overrides, plugins=False)
    assert quick is not None
    with pytest.raises(ZooError) as caught:
        load(overrides)
    for line in quick.splitlines():
        assert line.removeprefix("config: ").removeprefix("  - ") in str(caught.value)


@pytest.mark.parametrize("overrides", RIGHT)
def test_right_names_pass(overrides: list[Any]) -> None:
    assert misspelt(overrides, plugins=False) is None


def test_methods_of_ones_own_are_left_to_their_plugin() -> None:
    assert misspelt(["attention=mine", "attention.reach=2", "data=a.py:Films", "data.any=1"], plugins=True) is None
    assert misspelt(["attention=mine"], plugins=False) is not None


@pytest.mark.parametrize("arguments", [["train", "attenton=moc"], ["train", "trainer.max_step=3"]])
def test_a_typing_error_is_refused_within_two_seconds(arguments: list[str], tmp_path: Path) -> None:
    """Of computing, whatever else the machine does."""
    code = "import sys; from experiments.cli import main; sys.argv = ['zoo', *sys.argv[1:]]; main()"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, encoding="utf-8", check=False, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(zoo.__file__).parent.parent)},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert "did you mean" in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
