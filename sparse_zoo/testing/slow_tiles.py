"""Slow rules for the methods of tiles, bands and clusters: token by token, from the papers' words."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from sparse_zoo.attention import Call
from sparse_zoo.layout import Layout
from sparse_zoo.methods.radial import Radial
from sparse_zoo.methods.sta import STA
from sparse_zoo.methods.svg import SVG
from sparse_zoo.methods.svg2 import SVG2
from sparse_zoo.testing import slow
from sparse_zoo.testing.routing import slow_routing
from sparse_zoo.testing.slow import Token, tokens

Masks = list[tuple[Tensor, Tensor | float]]


@slow_routing(STA)
def sta(attention: STA, call: Call) -> Masks:
    def mask(head: int) -> Tensor:
        size = attention.windows[(call.head_offset + head) % len(attention.windows)]
        return slow.as_mask(slow.window(call.layout, tile=attention.tile, size=size, edge="shift", restart=True))

    return [(torch.stack([mask(head) for head in range(call.q.shape[1])])[None], 1.0)]


@slow_routing(Radial)
def radial(attention: Radial, call: Call) -> Masks:
    return [(slow.as_mask(radial_keys(call.layout, attention.block, attention.decay)), 1.0)]


def radial_keys(layout: Layout, block: int, decay: float) -> list[set[int]]:
    every = tokens(layout)
    video: dict[int, list[int]] = {}
    for i, t in enumerate(every):
        if not t.text:
            video.setdefault(t.sample, []).append(i)
    blocks = [ids[n : n + block] for ids in video.values() for n in range(0, len(ids), block)]
    block_of = {i: members for members in blocks for i in members}
    seen = {
        (i, j) for ids in video.values() for i in ids for j in ids if sees(layout, every[i], every[j], block, decay)
    }

    def attends(queries: list[int], keys: list[int]) -> bool:
        counts = [sum((i, j) in seen for i in queries) for j in keys]
        some = [n for n in counts if n]
        many = [n for n in some if Fraction(n, len(queries)) > Fraction(1, 3)]
        return bool(some) and Fraction(len(many), len(some)) > Fraction(6, 10)

    kept = {(id(a), id(b)) for a in blocks for b in blocks if a is b or attends(a, b)}
    return [
        {
            j
            for j, b in enumerate(every)
            if a.sample == b.sample and (a.text or b.text or (id(block_of[i]), id(block_of[j])) in kept)
        }
        for i, a in enumerate(every)
    ]


def sees(layout: Layout, a: Token, b: Token, block: int, decay: float) -> bool:
    """The mask of tokens, before it is made one of blocks."""
    shots = layout.films[a.sample].shots
    distance = abs(a.frame - b.frame)
    if distance <= 1 or b.frame == 0:
        return True
    mine, theirs = (shots[t.shot].rows * shots[t.shot].cols for t in (a, b))
    width = Fraction(2 ** mine.bit_length(), 2 ** distance.bit_length())
    if distance % max(1, int(block / width)):
        return False
    own = a.row * shots[a.shot].cols + a.col
    other = b.row * shots[b.shot].cols + b.col
    return abs(own - (2 * other + 1) * mine // (2 * theirs)) <= max(width * Fraction(decay), Fraction(block))


def by_head(call: Call, rule: Callable[[Tensor, Tensor, Tensor], list[set[int]]]) -> Tensor:
    """The mask, bool (B, H, L, L), of what a rule makes of q, k, v (L, D) of each batch item and head, as decisions see
    them: rounded to float32, then reckoned with in float64."""
    (batch, heads), share = call.q.shape[:2], call.q.shape[1] // call.k.shape[1]
    q, k, v = (x.detach().float().double() for x in (call.q, call.k, call.v))
    masks = [
        slow.as_mask(rule(q[b, h], k[b, h // share], v[b, h // share])) for b in range(batch) for h in range(heads)
    ]
    found: Tensor = torch.stack(masks).unflatten(0, (batch, heads))
    return found


@slow_routing(SVG)
def svg(attention: SVG, call: Call) -> Masks:
    return [(by_head(call, lambda q, k, v: svg_keys(q, k, v, call.layout, attention.width, attention.rows)), 1.0)]


def svg_keys(q: Tensor, k: Tensor, v: Tensor, layout: Layout, width: int, rows: int) -> list[set[int]]:
    """q, k, v (L, D) of one batch item and head."""
    every = tokens(layout)

    def group(t: Token) -> int:
        film = layout.films[t.sample]
        shot = film.shots[t.shot]
        return (t.row * shot.cols + t.col) * sum(one.frames for one in film.shots) // (shot.rows * shot.cols)

    def reads(i: int, j: int, kind: str) -> bool:
        a, b = every[i], every[j]
        if a.sample != b.sample:
            return False
        if a.text or b.text or b.frame == 0:
            return True
        apart = a.frame - b.frame if kind == "spatial" else group(a) - group(b)
        return abs(apart) <= width

    def output(i: int, keys: list[int]) -> Tensor:
        weights: Tensor = (k[keys] @ q[i] / float(q.shape[-1] ** 0.5)).softmax(0)
        return weights @ v[keys]

    kind = {}
    for film in range(len(layout.films)):
        own = [j for j, t in enumerate(every) if t.sample == film]
        video = [j for j in own if not every[j].text]
        picked = [video[int((n + 0.5) * len(video) / min(rows, len(video)))] for n in range(min(rows, len(video)))]
        errors = {
            name: sum(
                float((output(i, [j for j in own if reads(i, j, name)]) - output(i, own)).square().mean())
                for i in picked
            )
            for name in ("spatial", "temporal")
        }
        kind[film] = "temporal" if errors["temporal"] < errors["spatial"] else "spatial"
    return [{j for j in range(len(every)) if reads(i, j, kind[a.sample])} for i, a in enumerate(every)]


@slow_routing(SVG2)
def svg2(attention: SVG2, call: Call) -> Masks:
    def rule(q: Tensor, k: Tensor, _: Tensor) -> list[set[int]]:
        (queries, keys), rounds = attention.clusters, attention.first_rounds
        return svg2_keys(q, k, call.layout, attention.top_p, queries, keys, attention.least, rounds)

    return [(by_head(call, rule), 1.0)]


def svg2_keys(
    q: Tensor,
    k: Tensor,
    layout: Layout,
    top_p: float,
    query_clusters: int,
    key_clusters: int,
    least: float,
    rounds: int,
) -> list[set[int]]:
    """q, k (L, D) of one batch item and head, without memory."""
    every = tokens(layout)
    reads: dict[int, set[int]] = {}
    for film in range(len(layout.films)):
        video = [j for j, t in enumerate(every) if t.sample == film and not t.text]
        queries = lloyd(q, video, min(query_clusters, len(video)), rounds)
        keys = lloyd(k, video, min(key_clusters, len(video)), rounds)
        for centre, members in queries:
            shares: list[float] = [
                len(theirs) * float(torch.exp(centre @ other / q.shape[-1] ** 0.5)) if theirs else 0.0
                for other, theirs in keys
            ]
            best = sorted(range(len(keys)), key=lambda b: -shares[b])
            held = 0.0
            chosen: set[int] = set()
            for rank, b in enumerate(best):
                if rank < int(least * len(keys)) or held < top_p * sum(shares):
                    chosen |= set(keys[b][1])
                held += shares[b]
            reads |= dict.fromkeys(members, chosen)
    kept = []
    for i, a in enumerate(every):
        own = {j for j, b in enumerate(every) if b.sample == a.sample}
        kept.append(own if a.text else reads[i] | {j for j in own if every[j].text})
    return kept


def lloyd(x: Tensor, video: list[int], count: int, rounds: int) -> list[tuple[Tensor, list[int]]]:
    """K-means of some rows of x (L, D), from rows spread evenly: each centroid, and its members in the last round."""
    centres = [x[video[int((n + 0.5) * len(video) / count)]] for n in range(count)]
    members: list[list[int]] = []
    for _ in range(rounds):
        members = [[] for _ in centres]
        for i in video:
            distances = (torch.stack(centres) - x[i]).square().sum(-1).tolist()
            members[distances.index(min(distances))].append(i)
        centres = [x[own].mean(0) if own else centre for own, centre in zip(members, centres, strict=True)]
    return list(zip(centres, members, strict=True))
