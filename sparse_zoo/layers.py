"""The assignment of methods to layers: a short list, expanded to one entry per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparse_zoo.requirements import is_count

REST = "rest"
Layer = dict[str, Any]


def per_layer(entries: Sequence[Any], depth: object) -> tuple[list[Layer], list[str]]:
    """Expand a list of `attention` to `depth` layers, and collect the reasons why it cannot be.

    An entry is a method (its name, or a mapping with a name) or {cycle: [methods]}, whose methods alternate. `layers`,
    beside a name or a cycle, is the number of layers that the entry fills: a whole number, or "rest", in at most one
    entry, for all that the others leave. Without it a method fills one layer, and a cycle one layer per method.

    Returns:
        One mapping with a name per layer, and the reasons. If there are reasons, each method that could be read is
        listed once, so that it can be checked further.
    """
    reasons: list[str] = []
    read = [_read(entry, f"attention[{i}]", reasons) for i, entry in enumerate(entries)]
    if not reasons:
        fixed = sum(count for _, count in read if count != REST)
        open_ended = [count for _, count in read].count(REST)
        if not is_count(depth, fixed + open_ended) or open_ended > 1 or (not open_ended and fixed != depth):
            rest = f" and {open_ended} × '{REST}'" if open_ended else ""
            reasons.append(f"attention is a list for {fixed} layers{rest}, the model has {depth!r}")
    if reasons:
        return [method for methods, _ in read for method in methods], reasons
    filled = [(methods, depth - fixed if count == REST else count) for methods, count in read]
    return [dict(methods[k % len(methods)]) for methods, count in filled for k in range(count)], []


def _read(entry: Any, where: str, reasons: list[str]) -> tuple[list[Layer], Any]:
    """The methods of an entry and the number of layers that they fill; adds errors to `reasons`."""
    beside = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
    layers = beside.pop("layers", None)
    if "cycle" not in beside:
        cycle = [beside]
    elif isinstance(beside["cycle"], list) and beside["cycle"] and len(beside) == 1:
        cycle = [{"name": x} if isinstance(x, str) else x for x in beside["cycle"]]
    else:
        reasons.append(f"{where} must be {{cycle: [methods], layers: how many}}, got {entry!r}")
        return [], layers
    bad = [x for x in cycle if not isinstance(x, Mapping) or not isinstance(x.get("name"), str)]
    reasons += [f"{where}: a method is its name or a mapping with a name, got {x!r}" for x in bad]
    if layers not in (None, REST) and not is_count(layers):
        reasons.append(f"{where}: layers must be a whole number of at least 1 or '{REST}', got {layers!r}")
    return [dict(x) for x in cycle if x not in bad], len(cycle) if layers is None else layers
