"""Checks of what a class declares: its dense limit, its knob, its settings."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from sparse_zoo.attention import Attention, Knob, Limit
from sparse_zoo.layout import Layout, Shot
from sparse_zoo.testing import oracle
from sparse_zoo.testing.plans import plans
from sparse_zoo.testing.subject import CASES, FILMS, Subject, make
from sparse_zoo.testing.suite import Checks, Skip, expect, fail, same

checks: Checks[Subject] = Checks()


@checks
def limit_is_dense(subject: Subject) -> None:
    """At the settings that `limits` declares, the output is torch's scaled_dot_product_attention within each film."""
    limit = subject.cls.limits
    if isinstance(limit, str):
        raise Skip(f"limits: {limit}")
    expect(isinstance(limit, Limit), "limits a Limit, or a sentence saying why there is none", f"{limit!r}", "limits")
    settings = {"text_reads": "method"} | dict(limit.settings)
    calls = [(film, subject.build(settings), make(layout)) for film, layout in FILMS.items()]
    calls += [(name, subject.build_for(case, settings), case.call()) for name, case in CASES.items()]
    for film, attention, call in calls:
        layout = call.layout
        if bool(layout.is_text.any()) and not limit.text:
            continue
        together = layout.sample[:, None] == layout.sample
        want = torch.nn.functional.scaled_dot_product_attention(
            call.q, call.k, call.v, attn_mask=together, enable_gqa=True
        )
        change = "the method or the declaration: a wrong gate, scale or missing pair shows here"
        same(attention.run(call).out, want, 1e-9, f"outputs at the limit {dict(limit.settings)} on {film}", change)


@checks
def knob_buys_density(subject: Subject) -> None:
    """Measured density never falls as the knob, if any, goes from low to high, and is larger at high than at low."""
    knob = subject.cls.knob
    if knob is None:
        if not inspect.signature(subject.cls.__init__).parameters.keys() - SHARED:
            return  # nothing to turn
        raise Skip("knob: None")
    layout = Layout.film([Shot(6, 4, 4, 2), Shot(5, 4, 4, 2), Shot(1, 4, 4)], caption=2)
    steps = between(knob)
    # Routers are random here: several draws stand for what is to be expected.
    masks = [[oracle.mask_of(plan) for plan in plans(subject.build(start=draw), make(layout))] for draw in (0, 1)]
    learned = any(not torch.equal(mine, other) for mine, other in zip(*masks, strict=True))
    draws = range(KNOB_DRAWS if learned else 2)
    densities = []
    for value in steps:
        with torch.no_grad():
            costs = [
                subject.build({knob.setting: value}, start=draw).run(make(layout, seed=draw)).cost() for draw in draws
            ]
        densities.append(sum(cost.density for cost in costs) / len(costs))
    measured = ", ".join(f"{value}: {density:.4f}" for value, density in zip(steps, densities, strict=True))
    change = f"the order of low and high, or what {knob.setting!r} does"
    expect(all(a <= b for a, b in pairwise(densities)), "density never to fall", measured, change)
    expect(densities[0] < densities[-1], "more density at high than at low", measured, change)


KNOB_DRAWS = 8
SHARED = {"self", *inspect.signature(Attention.__init__).parameters}


def between(knob: Knob) -> list[Any]:
    """low, a few values between, growing by a factor, and high; whole numbers stay so, odd ones stay odd."""
    return list(dict.fromkeys(_step(knob.low, knob.high, part) for part in (0.0, 0.25, 0.5, 0.75, 1.0)))


def _step(low: Any, high: Any, part: float) -> Any:
    if isinstance(low, list | tuple):
        return tuple(_step(a, b, part) for a, b in zip(low, high, strict=True))
    value = low * (high / low) ** part if low > 0 and high > 0 else low + (high - low) * part
    if isinstance(low, float) or isinstance(high, float):
        return float(value)
    whole = round(value)
    return whole + 1 if low % 2 and high % 2 and not whole % 2 else whole


@checks
def settings_survive_yaml(subject: Subject) -> None:
    """Settings written to YAML and read back make the same method: tuples come back as lists, names as strings."""
    given = dict(subject.cls.small) | dict(subject.settings)
    limits = subject.cls.limits.settings if isinstance(subject.cls.limits, Limit) else {}
    for settings in (given, given | dict(limits)):
        try:
            # JSON is YAML, and loses what YAML loses.
            back: Mapping[str, Any] = json.loads(json.dumps(settings, allow_nan=False))
        except (TypeError, ValueError) as error:
            fail("settings of numbers, strings, null, lists and mappings", str(error), "small, limits or the settings")
        before, after = subject.build(settings), subject.build(back)
        layout = FILMS["silent"]
        call = make(layout)
        for mine, other in zip(plans(before, call), plans(after, call), strict=True):
            expect(
                torch.equal(oracle.mask_of(mine), oracle.mask_of(other)),
                "the same plans from settings read back",
                f"others, from {back}",
                "turn lists into tuples in __init__",
            )
        same(after.run(call).out, before.run(call).out, 0.0, "outputs from settings read back", "__init__")
