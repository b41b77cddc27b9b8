"""Text stays text: YAML 1.2's scalars, in files and in overrides, and no key or comment that vanishes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from tiny import BASE

from experiments.config.names import parse
from experiments.config.resolve import load
from experiments.config.yaml12 import load as load_document
from experiments.config.yaml12 import load_value, read_yaml
from experiments.sweep.expand import read
from sparse_zoo.errors import ZooError

# What YAML 1.1, and a shell's eye, would take for something else.
TEXT = ["no", "off", "yes", "on", "y", "1:30", "1_000", "2024-01-01", "=", "<<", "a: b", "- x", "x # y", "/clips #2",
        "*a", "&a", "!t", "@x", "%x", "`x`", "| x", "> x", "1.2.3", "1e", "0b1", "08:15:00", "NO", "tRUE", "NaN",
        ".", "-", "+", "0x", "~/clips", "it's", "é"]  # fmt: skip
VALUES: dict[str, Any] = {
    "010": 10, "-3": -3, "+4": 4, "0o17": 15, "0x1f": 31, "1e-3": 0.001, "1E3": 1000.0, ".5": 0.5, "5.": 5.0,
    "-.5e1": -5.0, "true": True, "False": False, "null": None, "~": None, "": None, ".inf": float("inf"),
    "'no'": "no", '"010"': "010", '"a\\tb"': "a\tb", "[no, 010, 'x #1']": ["no", 10, "x #1"], "{no: off, 1: [2]}":
    {"no": "off", "1": [2]}, "''": "", " x ": "x",
}  # fmt: skip


@pytest.mark.parametrize("text", TEXT)
def test_text_stays_text(text: str) -> None:
    assert parse(f"key={text}") == ("key", text)


@pytest.mark.parametrize("text", VALUES)
def test_values_are_read_by_yaml_1_2(text: str) -> None:
    found = load_value(text)
    assert (found, type(found)) == (VALUES[text], type(VALUES[text]))
    if text.strip():
        found = load_document(f"key: {text}\n")["key"]
        assert (found, type(found)) == (VALUES[text], type(VALUES[text]))


@pytest.mark.parametrize(
    "text", ["[a] # b", "[a, b", "{a: 1, a: 2}", "'a' b", '"a', "9" * 5000, "{[a]: b}", "[" * 2000]
)
def test_what_cannot_be_read_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ZooError, match="is no YAML") as caught:
        parse(f"key={text}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 2\n  d: 3\n  c: 4\n", "key 'c' is given twice, in lines 3 and 5"),
        ("a: 1\n\n'a': 2\n", "key 'a' is given twice, in lines 1 and 3"),
        ("{a: 1, a: 2}\n", "key 'a' is given twice, in line 1"),
        ("a: &x [*x]\n", "ircular reference"),
        ("a: !!python/name:os.system\n", "could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
    ],
)
def test_files_that_say_two_things_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ZooError, match=message) as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


def test_merge_keys_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfx: &x {a: 1, b: 2}\ny:\n  <<: *x\n  b: 3\n")
    assert read_yaml(path)["y"] == {"a": 1, "b": 3}


def test_cells_keep_the_names_that_were_written(tmp_path: Path) -> None:
    names = ["no", "off", "yes", "on", "010", "1e3", "1.0", "~", "true"]
    path = tmp_path / "s.yaml"
    path.write_text(
        yaml.safe_dump({"base": BASE})
        + "cells:\n"
        + "".join(f"  {name}: {{seed: {n}}}\n" for n, name in enumerate(names))
    )
    assert [cell.name for cell in read(path).cells] == names


def test_a_folder_with_a_comment_sign_is_that_folder(tmp_path: Path) -> None:
    assert load([f"data.folder={tmp_path}/clips #2"])["data"]["folder"] == str(tmp_path / "clips #2")


@pytest.mark.parametrize("text", ["off", "no", "on", "yes", "0", "1", "'true'"])
def test_a_boolean_is_true_or_false(text: str) -> None:
    with pytest.raises(ZooError, match=r"flow.per_shot must be true or false, got"):
        load([f"flow.per_shot={text}"])
