"""Axes multiplied, lists walked in step, combinations left out: the arithmetic of a sweep file, on plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, product
from typing import Any

from experiments.tracking.identity import flatten

Choice = tuple[str, dict[str, Any]]  # a name and overrides


def grid(axes: Mapping[str, Any], zips: Sequence[Mapping[str, Sequence[Any]]] = ()) -> list[Choice]:
    """The product of all axes and zips, the first moving slowest; none where there are neither.

    An axis is key -> list of values, or key -> {label: value}; a zip is {key: values}, whose lists of one length are
    walked in step.
    """
    steps = [axis(key, values) for key, values in axes.items()] + [_zip(lists) for lists in zips]
    return [joined(choice) for choice in product(*steps)] if steps else []


def axis(key: str, values: Any) -> list[Choice]:
    """Return a choice for each value of an axis, named by its label or by key and value."""
    labelled = values.items() if isinstance(values, dict) else ((label(key, value), value) for value in values)
    return [(str(name), {key: value}) for name, value in labelled]


def _zip(lists: Mapping[str, Sequence[Any]]) -> list[Choice]:
    return [
        joined([(label(key, value), {key: value}) for key, value in zip(lists, values, strict=True)])
        for values in zip(*lists.values(), strict=True)
    ]


def joined(choices: Sequence[Choice]) -> Choice:
    """Return one choice with the settings of all, their names joined; later ones win."""
    return "-".join(name for name, _ in choices), dict(chain.from_iterable(own.items() for _, own in choices))


def label(key: str, value: Any) -> str:
    """Short and fit for a file name: moc, moc_top_k=2_anchors=text+shot, seed=1."""
    if isinstance(value, dict):
        named = str(value.get("name", key.rpartition(".")[2]))
        text = "_".join([named, *(f"{k}={_short(v)}" for k, v in value.items() if k != "name")])
    else:
        text = value if isinstance(value, str) else f"{key.rpartition('.')[2]}={_short(value)}"
    return "".join(letter if letter.isalnum() or letter in "._+=" else "_" for letter in text)


def _short(value: Any) -> str:
    return ("+".join(map(_short, value)) or "none") if isinstance(value, list) else str(value)


def matches(config: Mapping[str, Any], rule: Mapping[str, Any]) -> bool:
    """Whether every dotted key of a rule has its value in a config, or, where the rule has a list, one of it.

    Text matches a part of that name too, as `attention: moc` does.
    """
    return all(_is(_lookup(config, key), wanted) for key, wanted in rule.items())


_NOTHING = object()


def _is(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, list) and any(_is(found, one) for one in wanted):
        return True
    if isinstance(wanted, str) and isinstance(found, Mapping):
        found = found.get("name")
    return bool(found == wanted)


def _lookup(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, `_NOTHING` where there is none: a setting left out is not one that is null."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part, _NOTHING) if isinstance(node, Mapping) else _NOTHING
    return node


def varying_settings(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the settings of each config that not all have in common, by dotted key; empty mappings do not count."""
    plain = [{key: value for key, value in flatten(config).items() if value != {}} for config in configs]
    known = dict.fromkeys(chain.from_iterable(plain))
    keys = [key for key in known if any(x.get(key, _NOTHING) != plain[0].get(key, _NOTHING) for x in plain)]
    return [{key: config[key] for key in keys if key in config} for config in plain]
