"""YAML as people read it: scalars by the core schema of YAML 1.2, keys as text. The one reader of YAML in this tree.

PyYAML follows YAML 1.1, where `no` is false, `010` is 8 and `1:30` is 90. Here `true` and `false` are the only
booleans, a number is a number in ten (or 0x, 0o), and whatever else is text. A key is the text that was written, so
that cells named `no`, `off` and `010` keep their names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from sparse_zoo.errors import ZooError, refuse

TAG = "tag:yaml.org,2002:"
# https://yaml.org/spec/1.2.2/#1032-tag-resolution; the first letters are PyYAML's index.
CORE = {
    "null": (r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
}


class Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.2's core schema, and YAML 1.1's merge key `<<`; a key that stands twice in a mapping is an error."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    yaml_constructors: dict[str | None, Any] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
        """Return a mapping whose keys are the texts that were written; raises `yaml.YAMLError` for a repeated key."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {line}: a key must be text")
            if key.value in lines:
                both = f"line {line}" if lines[key.value] == line else f"lines {lines[key.value]} and {line}"
                raise yaml.YAMLError(f"key {key.value!r} is given twice, in {both}")
            lines[key.value] = line
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


def _int(_: Loader, node: Any) -> int:
    return int(node.value, 0 if node.value[:2] in ("0x", "0o") else 10)


def _float(_: Loader, node: Any) -> float:
    text = node.value.lower()
    return math.nan if text == ".nan" else float(text.replace(".inf", "inf"))


for _name, (_pattern, _first) in CORE.items():
    Loader.add_implicit_resolver(TAG + _name, re.compile(f"(?:{_pattern})\\Z"), _first)
Loader.add_implicit_resolver(TAG + "merge", re.compile(r"<<\Z"), ["<"])
Loader.add_constructor(TAG + "null", lambda *_: None)
Loader.add_constructor(TAG + "bool", lambda _, node: node.value.lower() == "true")
Loader.add_constructor(TAG + "int", _int)
Loader.add_constructor(TAG + "float", _float)
Loader.add_constructor(TAG + "str", Loader.construct_yaml_str)
Loader.add_constructor(TAG + "merge", Loader.construct_yaml_str)  # where it is no key
Loader.add_constructor(TAG + "seq", Loader.construct_yaml_seq)
Loader.add_constructor(TAG + "map", Loader.construct_yaml_map)
Loader.add_constructor(None, Loader.construct_undefined)


@contextmanager
def _one_line() -> Iterator[None]:
    """What is wrong as a `yaml.YAMLError` of one line."""
    try:
        yield
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an int of more than 4300 digits
        raise yaml.YAMLError(" ".join(str(error).split())) from error


def load(text: str | bytes) -> Any:
    """A YAML document as plain values; raises `yaml.YAMLError`, in one line."""
    with _one_line():
        found = yaml.load(text, Loader)
        json.dumps(found)  # an alias may stand inside what it names: "Circular reference"
        return found


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, raises `ZooError` with the path otherwise."""
    refuse(str(path), ["no such file"] if not path.is_file() else [])
    try:
        loaded = load(path.read_bytes())
    except yaml.YAMLError as error:
        raise ZooError(f"{path} is no YAML: {error}") from error
    loaded = {} if loaded is None else loaded
    refuse(str(path), ["must hold a mapping"] if not isinstance(loaded, dict) else [])
    assert isinstance(loaded, dict)
    return loaded


def load_value(text: str) -> Any:
    """The value of a `key=value`: flow YAML where it begins with a bracket or a quote, else one plain scalar.

    A plain scalar is taken whole, so that `/clips #2` and `a: b` stay text; empty text is null. Raises
    `yaml.YAMLError`, in one line.
    """
    text = text.strip()
    if not text.startswith(("[", "{", '"', "'")):
        with _one_line():
            loader = Loader("")
            return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))
    found = load(text)
    rest = text[yaml.compose(text, Loader).end_mark.index :].strip()
    if rest:
        raise yaml.YAMLError(f"{rest!r} follows the value; quote the whole value to keep it as text")
    return found
