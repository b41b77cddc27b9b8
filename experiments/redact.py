"""Secrets of addresses and of the environment, hidden wherever text is shown or kept."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import quote

# A user, and a password that may hold slashes, as those of databases do; host:port/path@ is neither.
_USER = re.compile(r"(?<=://)(?:[^/\s]*|[^/\s@:]+:(?!\d+/)\S*)@")
_QUERY = re.compile(
    r"([?&][\w.-]*(?:token|key|secret|passw|pwd|sig|credential|auth)[\w.-]*=)[^&#\s'\")]+", re.IGNORECASE
)
SHORTEST = 6  # characters of a text that is hidden: a shorter one, such as "cpu", stands in others by chance
_hidden: dict[str, str] = {}


def hide(text: str, shown: str) -> None:
    """Let `redact` show something else in place of a text, unless that is shorter than `SHORTEST`.

    Also where it is quoted, as in Python's messages, in JSON and in addresses.
    """
    if len(text) >= SHORTEST:
        forms = (text, repr(text)[1:-1], json.dumps(text)[1:-1], quote(text, errors="replace"))
        _hidden.update(dict.fromkeys((*forms, quote(text, safe="", errors="replace")), shown))


def redact(text: str) -> str:
    """The text with the user and password of each URL, and tokens in its query, as ***.

    What is hidden, say a text that a config has read from the environment, is shown as `hide` was told.
    """
    for value in sorted(_hidden, key=len, reverse=True):
        text = text.replace(value, _hidden[value])
    return _QUERY.sub(r"\1***", _USER.sub("***@", text))


def redact_all(part: Any) -> Any:
    """A copy of plain values with every text redacted."""
    if isinstance(part, Mapping):
        return {key: redact_all(value) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [redact_all(value) for value in part]
    return redact(part) if isinstance(part, str) else part


@contextmanager
def redacted_messages() -> Iterator[None]:
    """Redact the warnings and the log records of all code that runs inside, plug-ins too, wherever they are shown."""
    shown, record_of = warnings.formatwarning, logging.getLogRecordFactory()

    def format_warning(*given: Any, **more: Any) -> str:
        return redact(shown(*given, **more))

    def make_record(*given: Any, **more: Any) -> logging.LogRecord:
        record = record_of(*given, **more)
        with suppress(TypeError, ValueError):  # of arguments that do not fit the message, which logging tells itself
            record.msg, record.args = redact(record.getMessage()), None
        return record

    warnings.formatwarning = format_warning
    logging.setLogRecordFactory(make_record)
    try:
        yield
    finally:
        warnings.formatwarning = shown
        logging.setLogRecordFactory(record_of)
