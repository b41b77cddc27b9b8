"""Numbers and settings as text for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it brings scipy, which not all who write numbers need
    from experiments.analysis.significance import Estimate


def mean(estimate: Estimate | None) -> float | None:
    """Return the mean, None without an estimate."""
    return None if estimate is None else estimate.mean


def interval(estimate: Estimate | None) -> str:
    """Return the interval as `[0.863, 1.000]`; empty for one run."""
    return "" if estimate is None or estimate.low is None else f"[{number(estimate.low)}, {number(estimate.high)}]"


def plus_minus(estimate: Estimate | None) -> str:
    """Return `0.941`, or for several runs `.941±.012`: half of the interval before it is cut at the bounds."""
    if estimate is None or estimate.sd is None:
        return number(mean(estimate))
    return "±".join(number(value).removeprefix("0") for value in (estimate.mean, estimate.half))


def number(value: float | None, digits: int = 3) -> str:
    """Return the value with so many digits after the point, a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """Return a difference as `+0.035`; one that three digits would hide has one significant digit."""
    if value is None:
        return "–"
    return f"{value:+.1g}" if 0 < abs(value) < 0.001 else f"{value:+.3f}"


def percent(value: float | None) -> str:
    """Return a share as `25.0 %`."""
    return "–" if value is None else f"{100 * value:.1f} %"


def giga(value: float | None) -> str:
    """Return the value in units of 1e9."""
    return "–" if value is None else f"{value / 1e9:.3g}"


def mib(value: float | None) -> str:
    """Return bytes as `12 MiB`."""
    return "–" if value is None else f"{value / 2**20:.0f} MiB"


def p_value(value: float | None) -> str:
    """Return a p value as `.063`, `< .001` for smaller ones."""
    return "–" if value is None else "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def settings(attention: dict[str, Any] | list[dict[str, Any]], without: Iterable[str] = ()) -> str:
    """Return a method's settings as `moc · top_k 2 · anchors text`, `without` some keys.

    Settings by layer are joined: `dense ×2 / moc · top_k 2 ×10`.
    """
    if isinstance(attention, list):
        named = groupby(settings(layer, without) for layer in attention)
        alike = [(name, len(list(layers))) for name, layers in named]
        return " / ".join(name if count == 1 else f"{name} ×{count}" for name, count in alike)
    kept = {key: value for key, value in attention.items() if key not in without}
    return " · ".join(str(value) if key == "name" else f"{key} {plain(value)}" for key, value in kept.items())


def tried(overrides: Mapping[str, Any]) -> str:
    """Return the settings of a trial as `top_k 2 · lr 0.001`, without their sections."""
    named = (f"{key.rpartition('.')[2]} {plain(value)}" for key, value in overrides.items())
    return " · ".join(named) or "as written"


def plain(value: Any) -> str:
    """Return the value of a setting."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key}: {plain(inner)}" for key, inner in value.items()) + ")"
    if isinstance(value, list | tuple):
        return ("×" if value and isinstance(value[0], int) else "+").join(map(plain, value)) or "none"
    return "off" if value is None else value if isinstance(value, str) else json.dumps(value)


def plain_values(values: Sequence[Any]) -> str:
    """Return the value of a setting, or the values of several that change together."""
    return ", ".join(plain(value) for value in values)


def si(value: float, unit: str = "") -> str:
    """Return three digits and a prefix: 1.66e13 is "16.6 T"."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size * 0.9995:
            return f"{value / size:#.3g} {prefix}{unit}".replace(". ", " ")
    return f"{value:.0f} {unit}".strip()
