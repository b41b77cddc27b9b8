"""Error messages: every reason at once, and the nearest allowed name where a name is wrong."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches

RENAMED = {
    "block": "block_tokens",  # nsa, radial, sla
    "top_k": "top_fraction",  # sla: a share of the blocks; `top_k` is a count in every method
}
"""Old name of a method's setting -> its new name. The old one is refused."""


class ZooError(ValueError):
    """A request that cannot be served; the message lists every reason."""


def refuse(what: str, reasons: Iterable[str]) -> None:
    """Raise `ZooError` if there is any reason; empty reasons do not count.

    Args:
        what: What failed, the head of the message.
        reasons: One sentence each.

    Raises:
        ZooError: With all reasons.
    """
    found = [reason for reason in reasons if reason]
    if len(found) == 1:
        raise ZooError(f"{what}: {found[0]}")
    if found:
        raise ZooError(f"{what}:" + "".join(f"\n  - {reason}" for reason in found))


def unknown(kind: str, name: object, allowed: Iterable[str]) -> str:
    """The reason for a name that is not in `allowed`: the nearest name, then the whole list."""
    names = sorted(allowed)
    near = get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {name!r}; {hint}known: {', '.join(names) or 'none'}"


def unknown_setting(key: str, allowed: Collection[str], kind: str = "setting") -> str:
    """Return why a method refuses the setting `key`, which is not in `allowed`: the new name if it was renamed.

    `key` and `allowed` may be dotted ("attention.block"): the last part is the setting's name.
    """
    *above, old = key.split(".")
    new = ".".join([*above, RENAMED.get(old, "")])
    return f"{key} is called {new} now" if new in allowed else unknown(kind, key, allowed)
