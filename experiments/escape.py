"""Escape text for each output: names, settings and messages come from users, plug-ins and files of others.

| output | function | where it is applied |
|---|---|---|
| terminal (rich markup) | `for_terminal` | where a string with markup is put together |
| HTML | `visible`, then Jinja's autoescape | `finalize` of the page's environment |
| Markdown | `for_markdown` | `finalize` of the template's environment |
| LaTeX | `for_latex` | `finalize` of the template's environment |
| JSON | `for_json` | where readable JSON is written; plain `json.dumps` is safe, because it writes ASCII |
| keys of MLflow | `for_mlflow` | where metrics, parameters and tags are logged |
| plots, plain text | `visible` | where a label is set |
"""

from __future__ import annotations

import json
import re
from posixpath import normpath
from typing import Any

from rich import markup

# Control characters but for the line break, invisible and bidirectional formatting, lone surrogates, non-characters.
UNSAFE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\ufff9-\uffff]"
)
MARKDOWN = re.compile(
    r"[\\`*_\[\]<>|~$]|&(?=#?\w+;)"  # spans, links, HTML, cells, entities
    r"|^(?:[-+](?=\s|$|[-\s]+$)|=+$|#+(?=\s|$)|\d+(?=[.)](?:\s|$)))"  # what begins a list, a heading, a rule
)
TEX = {
    "\\": r"\textbackslash{}",
    "\u00a0": "~",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\symbol{34}",  # some languages of babel give it a meaning
    "[": "{[}",  # not the option of a \\ before it
    "–": "--",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "\x00": "{}",
} | {special: f"\\{special}" for special in "&%$#_{}"}


def visible(text: str, *, lines: bool = False) -> str:
    r"""The text with each unsafe character written as its escape (`\x1b`, `\u202e`); line breaks stay if `lines`."""
    text = UNSAFE.sub(_escaped, text)
    return text if lines else text.replace("\n", r"\n")


def for_terminal(text: str) -> str:
    """Text inside rich markup. Line breaks stay, because messages have them."""
    return markup.escape(visible(text, lines=True))


def for_markdown(text: str) -> str:
    """Text in a paragraph, a heading or a table cell, on one line."""
    return MARKDOWN.sub(lambda found: _backslashed(found[0]), _one_line(text))


def for_markdown_code(text: str) -> str:
    """Text as code, fenced by more backticks than it has in a row."""
    plain = _one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    return f"{fence}{plain}{fence}" if fence == "`" else f"{fence} {plain} {fence}"


def for_latex(text: str) -> str:
    """Text in a paragraph, a table cell or a comment, on one line; what pdfTeX has no letter for is a question mark."""
    apart = re.sub("-(?=-)", "-\x00", _one_line(text))  # else two hyphens become a dash
    return "".join(TEX.get(letter, letter) for letter in apart).encode("latin-1", "replace").decode("latin-1")


def for_mlflow(key: str) -> str:
    """The key of a metric, parameter or tag: what MLflow takes in none becomes `_`, and what is too long is cut."""
    plain = re.sub(r"[^A-Za-z0-9_\-. /]", "_", key)[:250]
    # It takes a key for a path, and none that could be written shorter or that leads out of its folder.
    is_path = plain == normpath(plain) and plain != "." and not plain.startswith(("/", ".."))
    return plain if is_path else re.sub(r"[./]", "_", plain) or "_"


def for_json(plain: Any, indent: int | None = None) -> str:
    r"""Readable JSON: letters of all scripts as they are, unsafe characters as `\uXXXX`."""
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, indent=indent)
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    known = {"\t": r"\t", "\r": r"\r"}
    return known.get(found[0]) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def _backslashed(found: str) -> str:
    return f"{found}\\" if found.isdigit() else f"\\{found}"


def _one_line(text: str) -> str:
    """Without line breaks. No-break spaces stay: str.split would take them for plain ones."""
    return visible(re.sub(r"[ \t\r\n]+", " ", text).strip(" "))
