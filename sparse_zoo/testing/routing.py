"""Routing against the papers' words: an independent, slow rule for each method, and the check that compares.

A method of one's own gets its rule by `slow_routing`, next to the class or in its tests:

    @sparse_zoo.testing.slow_routing(OwnAndPreviousShots)
    def rule(attention, call):
        shot = call.layout.shot
        gap = shot[:, None] - shot
        same = call.layout.sample[:, None] == call.layout.sample
        return [(same & (gap >= 0) & (gap <= attention.reach), 1.0)]

It answers for the mode that the attention is in, one (mask, weight) a branch: mask bool, broadcasting to
(B, H, Lq, Lk), and weight a number or a tensor that broadcasts to (B, H, Lq, D). Subclasses are judged by the rule of
their nearest base that has one. Branches with pooled q, k, v, and terms, have no such masks: for a method that has them
the rule answers with the output itself, (B, H, Lq, D) in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from sparse_zoo.attention import Attention, Call
from sparse_zoo.draws import uniform
from sparse_zoo.methods.dense import Dense
from sparse_zoo.methods.moc import MoC
from sparse_zoo.methods.moga import MoGA
from sparse_zoo.methods.window import Window
from sparse_zoo.schedule import Scheduled
from sparse_zoo.testing import oracle, slow
from sparse_zoo.testing.invariances import of_items
from sparse_zoo.testing.subject import CASES, FILMS, Subject, make
from sparse_zoo.testing.suite import Checks, Skip, expect, same, some

checks: Checks[Subject] = Checks()

Rule = Callable[..., list[tuple[Tensor, Tensor | float]] | Tensor]
R = TypeVar("R", bound=Rule)

_rules: dict[type[Attention], Rule] = {}


def slow_routing(cls: type[Attention]) -> Callable[[R], R]:
    """Decorator: judge a method by an independent rule.

    Args:
        cls: The method; its subclasses are judged by the rule too, unless they have one of their own.

    Returns:
        A decorator of a function (attention, call) -> [(mask, weight), ...], one a branch, or the output.
    """

    def add(rule: R) -> R:
        _rules[cls] = rule
        return rule

    return add


@slow_routing(Dense)
def dense(attention: Dense, call: Call) -> list[tuple[Tensor, Tensor | float]]:  # noqa: ARG001
    """Every token attends to its film."""
    return [(slow.as_mask(slow.dense(call.layout)), 1.0)]


@slow_routing(MoC)
def moc(attention: MoC, call: Call) -> list[tuple[Tensor, Tensor | float]]:
    """Anchors, and the chunks of the best means: `slow.moc` for each batch item and head."""
    (batch, heads), share = call.q.shape[:2], call.q.shape[1] // call.k.shape[1]
    cut, drops = attention.cut, _drops(attention, call)
    masks = [
        slow.as_mask(
            slow.moc(
                call.q[b, h],
                call.k[b, h // share],
                call.layout,
                top_k=attention.top_k,
                chunk=cut.chunk,
                frames=cut.frames,
                size=cut.tokens,
                anchors=attention.anchors,
                causal=attention.causality,
                drops=drops[h],
            )
        )
        for b in range(batch)
        for h in range(heads)
    ]
    return [(torch.stack(masks).unflatten(0, (batch, heads)), 1.0)]


def _drops(attention: MoC, call: Call) -> list[slow.Drops | None]:
    """One a head. The numbers are the method's; what is made of them is slow's."""
    heads, length = call.q.shape[1:3]
    if not attention.training:
        return [None] * heads

    def drawn(purpose: str, n: int) -> list[list[list[float]]]:
        found: list[list[list[float]]] = uniform(call, purpose, n).tolist()
        return found

    share, number = drawn("drop-off: share", 1), drawn("drop-in: number", 1)
    which_off, which_in = drawn("drop-off: which", attention.top_k), drawn("drop-in: which", length)
    return [
        slow.Drops(
            attention.drop_off,
            attention.drop_in,
            [u for (u,) in share[h]],
            which_off[h],
            [u for (u,) in number[h]],
            which_in[h],
        )
        for h in range(heads)
    ]


@slow_routing(MoGA)
def moga(attention: MoGA, call: Call) -> list[tuple[Tensor, Tensor | float]]:
    """The branches of `mix`, each with an equal share; the routed one is weighted by its gate."""
    assert call.hidden is not None
    router = attention.router
    p = (call.hidden @ router.weight.T + router.bias).float().softmax(-1)
    top, group = p.max(-1)
    gate = torch.where(call.layout.is_text, 1.0, top)[:, None, :, None]
    found: list[tuple[Tensor, Tensor | float]] = []
    for name in attention.mix:
        chosen = group.tolist() if name == "group" else [()]  # the other branches choose nothing
        settings = {"windows": attention.windows, "frames": attention.frames_per_group}
        items = [slow.moga_branch(name, tuple(one), call.layout, **settings) for one in chosen]
        mask = torch.stack([slow.as_mask(item) for item in items])[:, None]
        found.append((mask, (gate if name == "group" else 1.0) / len(attention.mix)))
    return found


@slow_routing(Window)
def window(attention: Window, call: Call) -> list[tuple[Tensor, Tensor | float]]:
    """Tiles near the own one, and text: `slow.window` for all heads alike."""
    tiles = slow.window(
        call.layout,
        tile=attention.tile,
        size=attention.window,
        edge=attention.edge,
        restart=attention.stop_at_shots,
    )
    return [(slow.as_mask(tiles), 1.0)]


@checks
def routing_is_the_papers(subject: Subject) -> None:
    """Plans and outputs are those of an independent, slow rule written from the paper's words."""
    rule = next((_rules[base] for base in subject.cls.__mro__ if base in _rules), None)
    if rule is None:
        raise Skip(f"no rule is given for {subject.name}: see sparse_zoo.testing.slow_routing")
    usual = {"text_reads": "method"}
    small = subject.build(usual)
    cases = [(film, how, False) for film in FILMS for how in ("", ", scores tied,")]
    cases += [("story", ", scores close,", False), ("story", " in training", True), ("packed", " in training", True)]
    # What draws nothing in training is held to its evaluation by `training_is_evaluation`.
    modes = ("",) if subject.cls.same_in_training == {} else ("", " in training")
    cases += [(name, how, bool(how)) for name in CASES for how in modes]
    for film, how, training in cases:
        # Heads with parameters of their own are as many as the call holds: there is no place for an offset.
        first = 0 if subject.cls.own_heads is not None else 2
        if film in CASES:
            attention, call = subject.build_for(CASES[film], usual), CASES[film].call(head_offset=first)
        else:
            attention, call = small, make(FILMS[film], step=5, layer=1, layers=3, head_offset=first)
        attention.train(training)
        if "tied" in how:
            call.q.zero_()
        if "close" in how:  # half precision cannot tell these means apart
            call.k.mul_(0.1).add_(1.0)
        # The rule is slow: of a large batch it answers for the first and the last item.
        items = torch.tensor(sorted({0, len(call.q) - 1}))
        judged = of_items(call, items)
        expected = rule(attention.at(call.step) if isinstance(attention, Scheduled) else attention, judged)
        result = attention.run(call)
        out = result.out[items]
        if isinstance(expected, Tensor):
            same(
                out,
                expected,
                1e-6,
                f"outputs and the rule's on {film}{how}",
                "branches, or the rule",
            )
            continue
        plans = result.plans
        expect(len(plans) == len(expected), f"{len(expected)} branches", f"{len(plans)}", "branches(call)")
        want = torch.zeros_like(judged.q)
        for number, (plan, (mask, weight)) in enumerate(zip(plans, expected, strict=True)):
            got = oracle.mask_of(plan)
            got = got[items] if len(got) > 1 else got
            for wrong, came in ((got & ~mask, "pairs too many"), (mask & ~got, "pairs missing")):
                expect(
                    ~wrong.any(),
                    f"branch {number} on {film}{how} to attend as the rule says",
                    f"{came} {some(wrong)} (batch item, head, query, key)",
                    "the routing, or the rule",
                )
            want = want + weight * oracle.masked_softmax(judged.q, judged.k, judged.v, mask)[0]
        change = "weights of the branches: a gate, or the share of each in a mean"
        same(out, want, 1e-6, f"outputs and the rule's on {film}", change)
