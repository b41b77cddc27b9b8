"""An old name of a method's setting is refused, and the message gives the new one."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import sparse_zoo as zoo
from experiments.config.budget import Budget
from experiments.config.names import misspelt, misspelt_methods
from experiments.config.resolve import load
from experiments.sweep.expand import read
from sparse_zoo.errors import RENAMED
from sparse_zoo.testing.methods import check_method

OLD = [
    ("nsa", "block", 3, "block_tokens"),
    ("radial", "block", 3, "block_tokens"),
    ("sla", "block", 3, "block_tokens"),
    ("moba", "block", 3, "block_tokens"),  # never had it, but it is what one types
    ("sla", "top_k", 0.2, "top_fraction"),
]
each_old_name = pytest.mark.parametrize(("method", "old", "value", "new"), OLD)


def test_no_method_has_a_setting_under_its_old_name() -> None:
    for name in zoo.names():
        hints = get_type_hints(inspect.getattr_static(zoo.get(name), "__init__"))
        assert "block" not in zoo.settings(name), name
        assert hints.get("top_k", int) in (int, int | None), name


def test_old_and_new_names_are_different_settings() -> None:
    known = {setting for name in zoo.names() for setting in zoo.settings(name)}
    assert {*RENAMED.values()} <= known


@each_old_name
def test_build_refuses_the_old_name(method: str, old: str, value: Any, new: str) -> None:
    with pytest.raises(zoo.ZooError, match=f"^{method}: {old} is called {new} now$"):
        zoo.build(method, heads=1, head_dim=8, dim=8, **{old: value})


@each_old_name
def test_build_refuses_the_old_name_in_a_schedule(method: str, old: str, value: Any, new: str) -> None:
    with pytest.raises(zoo.ZooError, match=f"^schedule: {old} is called {new} now$"):
        zoo.build(method, heads=1, head_dim=8, dim=8, schedule={old: {5: value}})


@each_old_name
def test_overrides_are_refused_with_and_without_torch(method: str, old: str, value: Any, new: str) -> None:
    message = f"{method}: {old} is called {new} now"
    for overrides in (
        [f"attention={method}", f"attention.{old}={value}"],
        [{"attention": {"name": method, old: value}}],
    ):
        assert misspelt(overrides, plugins=False) == [message]
        with pytest.raises(zoo.ZooError, match=message):
            load(overrides)
    assert misspelt_methods([(method, [old])], plugins=False) == [message]
    with pytest.raises(zoo.ZooError, match=message):
        check_method(method, **{old: value})


@pytest.mark.parametrize(
    "text",
    [
        "cells: {a: {attention: {name: sla, block: 3}}, b: {attention: moc}}",
        "cells: {a: {attention: sla, attention.block: 3}, b: {attention: moc}}",
        "base: {attention: sla}\naxes: {attention.block: [3, 5]}",
        "axes: {attention: [sla, radial], attention.block: [3, 5]}",
        "base: {attention: sla, attention.block: 3}\naxes: {seed: [1, 2]}",
    ],
)
def test_a_sweep_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(text)
    with pytest.raises(zoo.ZooError, match=r"block is called (attention\.)?block_tokens now"):
        read(file)


def test_match_also_refuses_the_old_name() -> None:
    with pytest.raises(zoo.ZooError, match=r"^match: match.also.sla: block is called block_tokens now$"):
        Budget.of({"density": 0.5, "also": {"sla": {"block": [3, 5]}}})
