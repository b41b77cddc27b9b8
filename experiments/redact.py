"""Secrets in addresses, hidden wherever text is shown or kept."""

from __future__ import annotations

import re

_USER = re.compile(r"(?<=://)[^/\s]*@")
_QUERY = re.compile(
    r"([?&][\w.-]*(?:token|key|secret|passw|pwd|sig|credential|auth)[\w.-]*=)[^&#\s'\")]+", re.IGNORECASE
)


def redact(text: str) -> str:
    """The text with the user and password of each URL, and tokens in its query, as ***."""
    return _QUERY.sub(r"\1***", _USER.sub("***@", text))
