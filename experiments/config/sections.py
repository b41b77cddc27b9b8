"""What a config and a sweep file may hold, as tables: each setting's name, type, default and documented line.

Read from source text like `names`, so that `zoo settings` answers without torch. A dataclass documents a field by the
text below it; any other class documents its arguments in its docstring's `Args:`.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from experiments.config.names import DATA, GIVEN, PRETRAINED, SECTIONS, class_at

SWEEP = "experiments.sweep.schema:SweepFile"
TABLES = {
    **SECTIONS,
    "model=DIR": PRETRAINED,
    **{f"data={name}": place for name, place in DATA.items()},
    "sweep": SWEEP,
}


@dataclass(frozen=True)
class Field:
    """One setting; `default` is its source text, empty where the setting must be given."""

    name: str
    type: str
    default: str
    doc: str


def fields(table: str) -> list[Field]:
    """The settings of one of `TABLES`, in the order of their class, without those that the run itself gives."""
    section = table.partition("=")[0]
    return [field for field in _fields(TABLES[table]) if field.name not in GIVEN.get(section, ())]


def _fields(place: str) -> list[Field]:
    module, node = class_at(place)
    made = [x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "__init__"]
    if made:
        return _arguments(made[0], ast.get_docstring(node) or "")
    inherited = [field for base in node.bases for field in _fields(f"{module}:{ast.unparse(base)}")]
    return inherited + [
        Field(ast.unparse(own.target), ast.unparse(own.annotation), _default(own.value), _text(below))
        for own, below in zip(node.body, [*node.body[1:], None], strict=True)
        if isinstance(own, ast.AnnAssign)
    ]


def _text(node: ast.stmt | None) -> str:
    """The text of a statement that is nothing else."""
    value = node.value if isinstance(node, ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""


def _default(node: ast.expr | None) -> str:
    """A default as its source has it; what a factory makes as that factory's empty value."""
    text = "" if node is None else ast.unparse(node)
    return {"field(default_factory=list)": "[]", "field(default_factory=dict)": "{}"}.get(text, text)


def _arguments(made: ast.FunctionDef, above: str) -> list[Field]:
    """The arguments of an `__init__`, documented in its own docstring or in that of its class."""
    docs = _argument_docs(ast.get_docstring(made) or above)
    plain = made.args.args[1:]
    defaults = [*[None] * (len(plain) - len(made.args.defaults)), *made.args.defaults, *made.args.kw_defaults]
    return [
        Field(x.arg, "" if x.annotation is None else ast.unparse(x.annotation), _default(value), docs.get(x.arg, ""))
        for x, value in zip([*plain, *made.args.kwonlyargs], defaults, strict=True)
    ]


def _argument_docs(text: str) -> dict[str, str]:
    """The first sentence of each entry under `Args:`; one entry may name several arguments."""
    inside = re.search(r"^Args:\n(.*?)(?:\n\S|\Z)", text, re.S | re.M)
    entries = re.findall(r"^    (\w[\w, ]*): (.*?)(?=^    \w|\Z)", inside[1] if inside else "", re.S | re.M)
    sentences = ((names, re.split(r"(?<=\.)\s", " ".join(body.split()))[0]) for names, body in entries)
    return {name: sentence for names, sentence in sentences for name in names.split(", ")}
