"""Checks of what is learned from: gradients against difference quotients, and auxiliary losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sparse_zoo.attention import Attention, Branch, Call
from sparse_zoo.layout import Layout
from sparse_zoo.testing import oracle
from sparse_zoo.testing.invariances import at, of_items
from sparse_zoo.testing.results import EXACT, GRADIENT
from sparse_zoo.testing.subject import AUTO, CASES, STORY, Subject, make
from sparse_zoo.testing.suite import Checks, expect, same

checks: Checks[Subject] = Checks()

STEPS = (1e-3, 1e-4, 1e-5, 1e-6)
"""Widths of a difference quotient. Steps in float32 drown the small ones, choices that change drown the large ones:
a gradient that is right agrees at some, one that is wrong at none."""
AGREES = 5e-3
"""How far a derivative may be from its quotient, in parts of the gradient's length."""
DROWNED = 0.1
DIRECTIONS = 3  # along which a gradient must be wrong to be wrong
"""Where rounding is a larger part of the gradient's length, a quotient tells nothing, unless no step is wider."""
MANY = CASES["many films, items and heads"]


def calls(
    subject: Subject, changes: Mapping[str, Any] = MappingProxyType({}), batch: int = MANY.batch
) -> Iterator[tuple[Attention, Call]]:
    """The method in training, and a call whose inputs all need a gradient: a small one, and one of a later layer."""
    yield subject.build(changes).train(), make(STORY, seed=3, step=5, grad=True)
    yield subject.build_for(MANY, changes).train(), MANY.call(batch=batch, grad=True)


def inputs(attention: Attention, call: Call) -> dict[str, Tensor]:
    """All that a gradient may be taken of, by name."""
    given = {"q": call.q, "k": call.k, "v": call.v, "hidden": call.hidden, **dict(attention.named_parameters())}
    return {name: x for name, x in given.items() if x is not None and x.requires_grad}


def differentiate(value: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by name; 0 where the value does not depend on an input."""
    if not value.requires_grad:
        return {name: torch.zeros_like(x) for name, x in given.items()}
    grads = torch.autograd.grad(value, list(given.values()), allow_unused=True)
    pairs = zip(given.items(), grads, strict=True)
    return {name: torch.zeros_like(x) if grad is None else grad for (name, x), grad in pairs}


def agree(what: str, given: Mapping[str, Tensor], grads: Mapping[str, Tensor], value: Callable[[], Tensor]) -> None:
    """Fail unless the derivative along a random direction of each input is the quotient of differences of `value`.

    Along one direction no step may tell: on the widest a choice changes, and the others drown in rounding. So it is
    the gradient that is wrong only if it is along each of `DIRECTIONS` directions.
    """
    draw, dtype = torch.Generator().manual_seed(13), value().dtype
    for name, x in given.items():
        tries = []
        for _ in range(DIRECTIONS):
            along = torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x)
            tried = _compare(x, along, grads[name], value, dtype)
            if tried is None:
                break
            tries.append(tried)
        else:
            derivative, quotients = tries[0]
            expect(
                False,
                f"the derivative of {what} by {name}, along a random direction, to be its difference quotient",
                f"{derivative:.6g} for {', '.join(f'{q:.6g}' for q in quotients)} at steps {STEPS}",
                "branches(call), features and losses: what is detached, made under no_grad, or counted twice",
            )


def _compare(
    x: Tensor, along: Tensor, grad: Tensor, value: Callable[[], Tensor], dtype: torch.dtype
) -> tuple[float, list[float]] | None:
    """The derivative along a direction and the quotients that it is none of; None where it is one."""
    derivative, length = float((grad * along).sum()), float(grad.norm())
    quotients = []
    for step in STEPS:
        with moved(x, along, step):
            after = float(value())
        with moved(x, along, -step):
            before = float(value())
        quotients.append((after - before) / (2 * step))
        rounding, size = torch.finfo(dtype).eps * abs(after) / step, max(length, abs(quotients[-1]))
        told = rounding <= DROWNED * size or step == STEPS[0]
        if told and abs(derivative - quotients[-1]) <= AGREES * size + rounding:
            return None
    return derivative, quotients


@contextmanager
def moved(x: Tensor, along: Tensor, step: float) -> Iterator[None]:
    """Inside, `x` is `step * along` further on; afterwards it is as it was."""
    before = x.detach().clone()
    with torch.no_grad():
        x.add_(along, alpha=step)
    try:
        yield
    finally:
        with torch.no_grad():
            x.copy_(before)


def _as_planned(branch: Branch, old: Branch) -> Branch:
    """A branch with the plans and log-weights of another."""
    segments = [
        replace(new, plan=was.plan, log_weight=was.log_weight)
        for new, was in zip(branch.segments, old.segments, strict=True)
    ]
    return replace(branch, plan=old.plan, log_weight=old.log_weight, segments=tuple(segments))


@checks
def gradients_by_differences(subject: Subject) -> None:
    """In training, gradients of q, k, v, hidden and parameters are difference quotients, the plans held fixed."""
    for attention, call in calls(subject):
        given = inputs(attention, call)
        out = attention.run(call).out
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        grads = differentiate((out * weight).sum(), given)
        _, fixed = oracle.routed(attention, call)

        @torch.no_grad()
        def value() -> Tensor:
            routed, made = oracle.routed(attention, call)  # noqa: B023
            held = [
                _as_planned(branch, old) if isinstance(branch, Branch) and isinstance(old, Branch) else branch
                for branch, old in zip(made, fixed, strict=True)  # noqa: B023
            ]
            return (oracle.plain(attention, routed, branches=held) * weight).sum()  # noqa: B023

        agree("the output", given, grads, value)


@checks
def gradients_alone(subject: Subject) -> None:
    """Gradients of q, k, v, hidden and the parameters are the same where the others need none."""
    for attention, call in calls(subject, AUTO, batch=2):
        given = inputs(attention, call)
        weight = torch.randn(call.q.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        want = differentiate((attention.run(call).out * weight).sum(), given)
        own = [name for name, _ in attention.named_parameters() if name in given]
        for names in [["q"], ["k"], ["v"], ["hidden"], ["q", "k"], *([own] if own else [])]:
            for name, x in given.items():
                x.requires_grad_(name in names)
            some = {name: given[name] for name in names}
            got = differentiate((attention.run(call).out * weight).sum(), some)
            for name in names:
                change = "what is saved for the backward pass: it may not depend on which other input needs a gradient"
                atol = GRADIENT * max(1.0, float(want[name].abs().max()))
                same(got[name], want[name], atol, f"gradients of {name}, {', '.join(names)} alone needing one", change)


@checks
def losses_by_differences(subject: Subject) -> None:
    """In training no auxiliary loss is lost, and gradients of each are difference quotients."""
    for attention, call in calls(subject):
        given = inputs(attention, call)
        judged = attention.eval().run(call).losses
        losses = attention.train().run(call).losses
        for name, loss in judged.items():
            expect(
                name in losses and (not loss.detach().any() or losses[name].detach().any()),
                f"losses[{name!r}] in training as in evaluation, {loss.detach().tolist()}",
                f"{losses[name].detach().tolist()}" if name in losses else "none",
                "losses(call): it is for training",
            )
        for name, loss in losses.items():
            grads = differentiate(loss, given)

            @torch.no_grad()
            def value() -> Tensor:
                return attention.run(call).losses[name]  # noqa: B023

            agree(f"losses[{name!r}]", given, grads, value)


@checks
def losses_are_means(subject: Subject) -> None:
    """Auxiliary losses, in training and not, are the means over batch items in any order, and over packed films."""
    attention, call = subject.build_for(MANY), MANY.call()
    items, sample = torch.arange(call.q.shape[0]), call.layout.sample
    for training in (False, True):
        attention.train(training)
        with torch.no_grad():
            together = attention.run(call).losses
            if not together:
                continue
            turned = attention.run(of_items(call, items.flip(0))).losses
            alone = [attention.run(of_items(call, items[i, None])).losses for i in items]
            films = [
                attention.run(at(call, Layout((film,)), (sample == number).nonzero()[:, 0])).losses
                for number, film in enumerate(call.layout.films)
            ]
        for name, loss in together.items():
            atol = max(EXACT, GRADIENT * float(loss.abs()))
            same(turned[name], loss, atol, f"losses[{name!r}] of batch items in another order", "losses(call)")
            mean = torch.stack([each[name] for each in alone]).mean()
            change = "count every batch item, and divide by their number"
            same(loss, mean, atol, f"losses[{name!r}] of {len(items)} batch items and the mean of each alone", change)
            mean = torch.stack([each[name] for each in films]).mean()
            change = "count every film of a stream alike, and divide by their number"
            same(loss, mean, atol, f"losses[{name!r}] of {len(films)} packed films and the mean of each alone", change)
