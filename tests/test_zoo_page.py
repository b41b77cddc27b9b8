"""docs/zoo.md says what the classes say, and its pictures show what they plan."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sparse_zoo as zoo
from experiments.tools import method_catalogue
from sparse_zoo.methods.moga import MoGA

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_is_what_the_classes_say() -> None:
    assert (DOCS / "zoo.md").read_text() == method_catalogue.page(), "run python -m experiments.tools.method_catalogue"


def test_the_page_follows_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    before = method_catalogue.page()
    monkeypatch.setattr(MoGA, "knob", zoo.Knob("groups", 32, 2))
    monkeypatch.setattr(MoGA, "small", {"mix": "group"})
    changed = [(a, b) for a, b in zip(before.splitlines(), method_catalogue.page().splitlines(), strict=True) if a != b]
    ((old, new),) = changed
    assert "| 3 × softmax |" in old
    assert "`groups` 64 … 1" in old
    assert "| softmax |" in new
    assert "`groups` 32 … 2" in new


@pytest.mark.parametrize("name", method_catalogue.methods())
def test_what_a_method_says_of_itself_fits(name: str) -> None:
    card = zoo.get(name).card
    assert card is not None
    assert re.search(r"arXiv \d{4}\.\d{5}", card.paper)
    assert card.granularity
    assert card.trained
    assert card.claim
    assert len(zoo.summary(name)) <= 66  # a line of zoo list, 80 wide
    assert zoo.summary(name).endswith(".")


def test_parameters_are_counted() -> None:
    row = next(line for line in method_catalogue.page().splitlines() if line.startswith("| [`moga`]"))
    assert f"| {512 * 5 + 5:,} |" in row  # the router's weight and bias
    assert "| – |" in next(line for line in method_catalogue.page().splitlines() if line.startswith("| [`dense`]"))


@pytest.mark.parametrize("name", method_catalogue.methods())
def test_every_picture_is_that_of_the_plans_and_small(name: str) -> None:
    path = DOCS / "zoo" / f"{name}.png"
    assert path.stat().st_size < 15_000
    with Image.open(path) as image:
        stored, drawn = (np.asarray(x.convert("RGB")).astype(int) for x in (image, method_catalogue.drawing(name)))
    assert stored.shape == drawn.shape
    # Near ties may fall otherwise on another machine, and shift its few colours a little.
    assert (abs(stored - drawn) > 48).any(-1).mean() < 0.01
