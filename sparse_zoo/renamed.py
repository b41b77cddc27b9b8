"""Settings that were renamed: the old name is refused, and the message gives the new one. Needs no torch."""

from __future__ import annotations

from collections.abc import Collection

from sparse_zoo.errors import unknown

RENAMED = {
    "block": "block_tokens",  # nsa, radial, sla
    "top_k": "top_fraction",  # sla: a share of the blocks; `top_k` is a count in every method
}
"""Old name of a method's setting -> its new name."""


def unknown_setting(key: str, allowed: Collection[str], kind: str = "setting") -> str:
    """Return why a method refuses the setting `key`, which is not in `allowed`.

    `key` and `allowed` may be dotted ("attention.block"): the last part is the setting's name.
    """
    *above, old = key.split(".")
    new = ".".join([*above, RENAMED.get(old, "")])
    return f"{key} is called {new} now" if new in allowed else unknown(kind, key, allowed)
