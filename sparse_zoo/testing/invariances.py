"""Checks of what must not matter, and of what must not be seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_zoo.attention import ANCHORS, Attention, Call
from sparse_zoo.errors import unknown
from sparse_zoo.layout import Layout, Shot
from sparse_zoo.testing import oracle
from sparse_zoo.testing.plans import branches
from sparse_zoo.testing.subject import CASES, PACKED, SILENT, STORY, Subject, make
from sparse_zoo.testing.suite import Checks, Skip, expect, same, some

checks: Checks[Subject] = Checks()

EXACT = 1e-9
SHOTS = [Shot(2, 3, 3, 2), Shot(1, 4, 2, 1), Shot(3, 2, 3, 2), Shot(2, 3, 3), *[Shot(1, 3, 3, 1), Shot(2, 2, 3)] * 2]
MANY = CASES["many films, items and heads"]
LONGEST = CASES["a long film"]


def at(call: Call, layout: Layout, rows: Tensor) -> Call:
    """The call on some tokens of its stream, which make a layout of their own."""
    q, k, v = (x[:, :, rows] for x in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v, hidden=None if call.hidden is None else call.hidden[:, rows], layout=layout)


def of_items(call: Call, items: Tensor) -> Call:
    """The call on some batch items, int64 (n,), in that order."""
    q, k, v = (x[items] for x in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v, hidden=None if call.hidden is None else call.hidden[items])


def disturbed(call: Call, where: Tensor) -> Call:
    """The call with other q, k, v and hidden at some tokens."""

    def other(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(11), dtype=x.dtype)
        return torch.where(where[:, None], x + 3 * noise, x)

    q, k, v = (other(x) for x in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v, hidden=None if call.hidden is None else other(call.hidden))


@checks
def films_packed(subject: Subject) -> None:
    """Films packed in one stream give what they give alone, and no pair joins two of them."""
    for attention, call in ((subject.build(), make(PACKED)), (subject.build_for(MANY), MANY.call(batch=1))):
        sample = call.layout.sample
        for branch in branches(attention, call):
            for segment in branch.key_sets if branch.rows is None else ():
                if segment.k is not None:
                    continue  # pooled keys are no tokens: the outputs below tell
                across = oracle.mask_of(segment.plan) & (sample[:, None] != sample)
                expect(~across.any(), "no pair of two films", f"pairs {some(across)}", "cut pieces by sample too")
        together = attention.run(call).out
        for number, film in enumerate(call.layout.films):
            mine = (sample == number).nonzero()[:, 0]
            alone = attention.run(at(call, Layout((film,)), mine)).out
            change = "routing, counting and pooling must restart at each sample"
            same(together[:, :, mine], alone, EXACT, f"film {number} packed and alone", change)


@checks
def batch_items_apart(subject: Subject) -> None:
    """Batch items do not touch: each gives what it gives alone."""
    for attention, call in ((subject.build(), make(STORY)), (subject.build_for(MANY), MANY.call())):
        together = attention.run(call).out
        for item in range(call.q.shape[0]):
            alone = attention.run(of_items(call, torch.tensor([item]))).out
            change = "decide for each batch item by its own tokens"
            same(together[item, None], alone, EXACT, f"batch item {item} with the others and alone", change)


@checks
def heads_permute(subject: Subject) -> None:
    """Permuting the heads of q, k, v permutes those of the output; with `own_heads` it does not."""
    for attention, call in ((subject.build(), make(STORY)), (subject.build_for(MANY), MANY.call(batch=1))):
        # The halves of the query heads read a key head each: both sides are permuted alike.
        half = torch.arange(call.q.shape[1]).view(2, -1)
        order, kv_order = torch.cat([half[1].flip(0), half[0]]), torch.tensor([1, 0])
        permuted = replace(call, q=call.q[:, order], k=call.k[:, kv_order], v=call.v[:, kv_order])
        change = "decide for each head by its own q and k"
        if attention.own_heads is not None:
            differ = not torch.equal(attention.run(permuted).out, attention.run(call).out[:, order])
            expect(differ, f"heads that differ: {attention.own_heads}", "outputs of heads alike", "own_heads = None")
            return
        same(
            attention.run(permuted).out,
            attention.run(call).out[:, order],
            EXACT,
            "outputs of permuted heads and permuted outputs",
            change,
        )


@checks
def head_slices(subject: Subject) -> None:
    """Some heads, told by `head_offset` where they lie, give what they give among all, in training too."""
    if (reason := subject.build().needs_all_heads) is not None:
        raise Skip(f"needs_all_heads: {reason}")
    small, many = make(STORY, step=3, seed=7), MANY.call(batch=1)
    for attention, call in ((subject.build().train(), small), (subject.build_for(MANY).train(), many)):
        whole = attention.run(call).out
        share = call.q.shape[1] // 2
        for number, first in enumerate((0, share)):
            heads, shared = slice(first, first + share), slice(number, number + 1)
            part = replace(call, q=call.q[:, heads], k=call.k[:, shared], v=call.v[:, shared], head_offset=first)
            same(
                attention.run(part).out,
                whole[:, heads],
                EXACT,
                f"heads {first} … {first + share - 1} alone and among all",
                "take the number of heads from call.q, and draws by call.head_offset + head",
            )


@checks
def prefix_invariance(subject: Subject) -> None:
    """Under strict causality, attention on a prefix of shots is that prefix of attention on the film."""
    attention = subject.build()
    if attention.causality != "strict":
        strict = subject.cls.strict
        if isinstance(strict, str):
            if _sees_ahead(attention):
                return  # as the sentence says, there is no prefix to keep
            raise Skip(f"strict: {strict}")
        attention = subject.build(strict)
        expect(
            attention.causality == "strict",
            "causality 'strict' at the settings that `strict` declares",
            f"{attention.causality!r}",
            "the declaration, or set self.causality in __init__",
        )
    film = Layout.film(SHOTS, caption=2)
    for context in ({}, LONGEST.context):
        call = make(film, **context)
        whole = attention.run(call).out
        for shots in (1, 2, 3, 6):
            prefix = Layout.film(SHOTS[:shots], caption=2)
            rows = torch.arange(len(prefix))
            same(
                attention.run(at(call, prefix, rows)).out,
                whole[:, :, rows],
                EXACT,
                f"the first {shots} shots alone and within the film",
                "no query may look at, route by, or count anything of a later shot, text included",
            )


@checks
def causality_holds(subject: Subject) -> None:
    """Plans and outputs of a causal method see no video of later shots; those of one that declares None do."""
    strict: list[Mapping[str, Any]] = [subject.cls.strict] if isinstance(subject.cls.strict, Mapping) else []
    causal = [settings for settings in [{}, *strict] if subject.build(settings).causality is not None]
    if not causal:
        if _sees_ahead(subject.build()):
            return
        raise Skip("causality: None, though nothing of a later shot was seen")
    for settings in causal:
        attention = subject.build(settings)
        expect(
            attention.causality in ("routing", "strict"),
            "causality None, 'routing' or 'strict'",
            f"{attention.causality!r}",
            "the declaration",
        )
        for layout in (STORY, PACKED, SILENT):
            _nothing_ahead(attention, make(layout))
        for case in CASES.values():
            _nothing_ahead(subject.build_for(case, settings), case.call())


def _sees_ahead(attention: Attention) -> bool:
    """Whether outputs of earlier shots change with the video of the last one."""
    call = make(STORY)
    before = STORY.shot < int(STORY.shot.max())
    changed = attention.run(disturbed(call, ~before & ~STORY.is_text)).out[:, :, before]
    return not torch.equal(changed, attention.run(call).out[:, :, before])


def _nothing_ahead(attention: Attention, call: Call) -> None:
    layout = call.layout
    later = (layout.shot > layout.shot[:, None]) & (layout.sample == layout.sample[:, None])
    ahead = later & ~layout.is_text
    for branch in branches(attention, call):
        if branch.k is not None:
            continue  # pooled keys are no tokens: the outputs below tell
        mask = oracle.masks(attention, call, branch)[..., : len(layout)]
        # The own chunk is attended both ways, and may reach over a cut where chunks are blind to shots.
        mutual = mask & mask.transpose(-1, -2) if "chunk" in attention.anchors else torch.zeros_like(mask)
        leak = mask & ahead & ~mutual
        expect(
            ~leak.any(),
            "no video of later shots among the keys",
            f"pairs {some(leak)} (batch item, head, query, key)",
            "candidates are the chunks before the query's own",
        )
    if "chunk" not in attention.anchors:
        before = layout.shot < int(layout.shot.max())
        same(
            attention.run(disturbed(call, ~before & ~layout.is_text)).out[:, :, before],
            attention.run(call).out[:, :, before],
            EXACT,
            "outputs of earlier shots when video of the last shot changes",
            "pool, score and count by what the query may see",
        )


@checks
def anchors_attended(subject: Subject) -> None:
    """Every query attends, in each branch, to what `anchors` declares."""
    attention = subject.build()
    if not attention.anchors:
        raise Skip("anchors: none declared")
    for name in attention.anchors:
        expect(name in ANCHORS, f"anchors among {ANCHORS}", unknown("anchor", name, ANCHORS), "the declaration")
    calls = [(attention, make(layout)) for layout in (STORY, PACKED, SILENT)]
    calls += [(subject.build_for(case), case.call()) for case in CASES.values()]
    for attention, call in calls:
        wanted = _anchors(attention, call.layout)
        for branch in branches(attention, call):
            if not branch.pools_queries and branch.k is None:
                mask = oracle.masks(attention, call, branch)[..., : len(call.layout)]
                mask = mask if branch.rows is None else oracle.at_rows(mask, branch.rows)
                missing = wanted & ~mask
                expect(
                    ~missing.any(),
                    f"every query to attend to its {', '.join(attention.anchors)}",
                    f"pairs missing {some(missing)} (batch item, head, query, key)",
                    "join the anchors to the plan with `|`, whatever is routed; or declare fewer anchors",
                )


def _anchors(attention: Attention, layout: Layout) -> Tensor:
    """bool (L, L), from the words of the declaration alone."""
    shot, is_text = layout.shot, layout.is_text
    wanted = torch.zeros(len(layout), len(layout), dtype=torch.bool)
    if "text" in attention.anchors:
        wanted |= oracle.readable_text(attention, layout)
    if "shot" in attention.anchors:
        wanted |= (shot == shot[:, None]) & (shot >= 0)
    if "chunk" in attention.anchors:
        wanted |= torch.eye(len(layout), dtype=torch.bool)
    wanted &= layout.sample == layout.sample[:, None]
    if attention.text_reads == "text":
        wanted &= ~is_text[:, None] | is_text
    return wanted
