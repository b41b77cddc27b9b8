"""docs/zoo.md shows what the method classes declare, and its pictures show their plans."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sparse_zoo as zoo
from experiments.tools import method_catalogue
from sparse_zoo.methods.moga import MoGA

DOCS = Path(__file__).parent.parent / "docs"
SECTIONS = ["Rule", "Paper", "Our choices", "Not to be confused with"]


def test_page_equals_what_the_classes_declare() -> None:
    assert (DOCS / "zoo.md").read_text() == method_catalogue.page(), "run python -m experiments.tools.method_catalogue"


def test_page_changes_with_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_card_and_summary_are_complete_and_fit_a_line(name: str) -> None:
    card = zoo.get(name).card
    assert card is not None
    assert re.search(r"arXiv \d{4}\.\d{5}", card.paper)
    assert card.granularity
    assert card.trained
    assert card.claim
    assert len(zoo.summary(name)) <= 66  # a line of zoo list, 80 wide
    assert zoo.summary(name).endswith(".")


@pytest.mark.parametrize("name", method_catalogue.methods())
def test_docstring_has_the_four_sections_and_documents_every_setting(name: str) -> None:
    doc = inspect.getdoc(zoo.get(name)) or ""
    assert re.findall(r"(?m)^\*\*(.+)\*\*$", doc) == SECTIONS
    assert not [x for x in re.split(r"(?m)^\*\*.+\*\*$", doc.partition("Args:")[0])[1:] if not x.strip()]
    assert [key for key, setting in zoo.settings(name).items() if not setting.doc] == []


def test_table_counts_parameters() -> None:
    row = next(line for line in method_catalogue.page().splitlines() if line.startswith("| [`moga`]"))
    assert f"| {512 * 5 + 5:,} |" in row  # the router's weight and bias
    assert "| – |" in next(line for line in method_catalogue.page().splitlines() if line.startswith("| [`dense`]"))


@pytest.mark.parametrize("name", method_catalogue.methods())
def test_picture_shows_the_plans_and_is_small(name: str) -> None:
    path = DOCS / "zoo" / f"{name}.png"
    assert path.stat().st_size < 15_000
    with Image.open(path) as image:
        stored, drawn = (np.asarray(x.convert("RGB")).astype(int) for x in (image, method_catalogue.drawing(name)))
    assert stored.shape == drawn.shape
    # Near ties may fall otherwise on another machine, and shift its few colours a little.
    assert (abs(stored - drawn) > 48).any(-1).mean() < 0.01
