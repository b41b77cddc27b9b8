"""One way to refuse: every reason at once, with the nearest allowed name where a name is wrong."""

from collections.abc import Iterable
from difflib import get_close_matches


class ZooError(ValueError):
    """A request that cannot be served; the message lists every reason."""


def refuse(what: str, reasons: Iterable[str]) -> None:
    """Raise `ZooError` if there is any reason to; return otherwise."""
    found = [reason for reason in reasons if reason]
    if len(found) == 1:
        raise ZooError(f"{what}: {found[0]}")
    if found:
        raise ZooError(f"{what}:" + "".join(f"\n  - {reason}" for reason in found))


def unknown(kind: str, name: object, allowed: Iterable[str]) -> str:
    """The reason to give for a name that is not in `allowed`: the nearest one, then the whole list."""
    names = sorted(allowed)
    near = get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {name!r}; {hint}known: {', '.join(names) or 'none'}"
