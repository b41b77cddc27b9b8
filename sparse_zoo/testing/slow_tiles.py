"""Slow rules for the methods of tiles, bands and clusters: token by token, from the papers' words."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

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
    """A window of tiles, one for each head in turn."""

    def mask(head: int) -> Tensor:
        size = attention.windows[(call.head_offset + head) % len(attention.windows)]
        return slow.as_mask(slow.window(call.layout, tile=attention.tile, size=size, edge="shift", restart=True))

    return [(torch.stack([mask(head) for head in range(call.q.shape[1])])[None], 1.0)]


@slow_routing(Radial)
def radial(attention: Radial, call: Call) -> Masks:
    """Blocks that the mask of tokens fills enough; the same for all heads."""
    return [(slow.as_mask(radial_keys(call.layout, attention.block_tokens, attention.decay)), 1.0)]


@lru_cache(16)
def radial_keys(layout: Layout, block_tokens: int, decay: float) -> list[set[int]]:
    """The keys of each token, from the mask of tokens and the blocks made of it."""
    every = tokens(layout)
    video: dict[int, list[int]] = {}
    for i, t in enumerate(every):
        if not t.text:
            video.setdefault(t.sample, []).append(i)
    blocks = [ids[n : n + block_tokens] for ids in video.values() for n in range(0, len(ids), block_tokens)]
    block_of = {i: members for members in blocks for i in members}
    seen = torch.zeros(len(every), len(every), dtype=torch.int64)
    for ids in video.values():
        table = [[sees(layout, every[i], every[j], block_tokens, decay) for j in ids] for i in ids]
        seen[torch.tensor(ids)[:, None], torch.tensor(ids)] = torch.tensor(table).long()

    def attends(queries: list[int], keys: list[int]) -> bool:
        counts = seen[queries][:, keys].sum(0).tolist()
        some = [n for n in counts if n]
        many = [n for n in some if Fraction(n, len(queries)) > Fraction(1, 3)]
        return bool(some) and Fraction(len(many), len(some)) > Fraction(6, 10)

    kept = {id(a): {j for b in blocks if a is b or attends(a, b) for j in b} for a in blocks}
    text = {j for j, t in enumerate(every) if t.text}
    films = slow.dense(layout)
    return [films[i] if a.text else kept[id(block_of[i])] | (films[i] & text) for i, a in enumerate(every)]


def sees(layout: Layout, a: Token, b: Token, block_tokens: int, decay: float) -> bool:
    """The mask of tokens, before it is made one of blocks."""
    shots = layout.films[a.sample].shots
    distance = abs(a.frame - b.frame)
    if distance <= 1 or b.frame == 0:
        return True
    mine, theirs = (shots[t.shot].rows * shots[t.shot].cols for t in (a, b))
    step, reach = band(mine, distance, block_tokens, decay)
    if distance % step:
        return False
    own = a.row * shots[a.shot].cols + a.col
    other = b.row * shots[b.shot].cols + b.col
    return abs(own - (2 * other + 1) * mine // (2 * theirs)) <= reach


@lru_cache(1024)
def band(size: int, distance: int, block_tokens: int, decay: float) -> tuple[int, Fraction]:
    """Of frames of `size` tokens so far apart: every how many are seen, and how far from the own place."""
    width = Fraction(2 ** size.bit_length(), 2 ** distance.bit_length())
    return max(1, int(block_tokens / width)), max(width * Fraction(decay), Fraction(block_tokens))


def by_head(call: Call, rule: Callable[[Tensor, Tensor, Tensor], list[set[int]]]) -> Tensor:
    """The mask, bool (B, H, L, L), that a rule makes of q, k, v (L, D) of each batch item and head.

    The rule sees them as decisions do: rounded to float32. It computes in float64.
    """
    (batch, heads), share = call.q.shape[:2], call.q.shape[1] // call.k.shape[1]
    q, k, v = (x.detach().float().double() for x in (call.q, call.k, call.v))
    masks = [
        slow.as_mask(rule(q[b, h], k[b, h // share], v[b, h // share])) for b in range(batch) for h in range(heads)
    ]
    found: Tensor = torch.stack(masks).unflatten(0, (batch, heads))
    return found


@slow_routing(SVG)
def svg(attention: SVG, call: Call) -> Masks:
    """Near frames or near places, whichever loses less for sampled queries of a head and film."""
    return [(by_head(call, lambda q, k, v: svg_keys(q, k, v, call.layout, attention.width, attention.rows)), 1.0)]


def svg_keys(q: Tensor, k: Tensor, v: Tensor, layout: Layout, width: int, rows: int) -> list[set[int]]:
    """q, k, v (L, D) of one batch item and head."""
    every, masks = tokens(layout), svg_masks(layout, width)

    def output(i: int, keys: list[int]) -> Tensor:
        weights: Tensor = (k[keys] @ q[i] / float(q.shape[-1] ** 0.5)).softmax(0)
        return weights @ v[keys]

    kind = {}
    for film in range(len(layout.films)):
        own = [j for j, t in enumerate(every) if t.sample == film]
        video = [j for j in own if not every[j].text]
        picked = [video[int((n + 0.5) * len(video) / min(rows, len(video)))] for n in range(min(rows, len(video)))]
        errors = {
            name: sum(float((output(i, sorted(masks[name][i])) - output(i, own)).square().mean()) for i in picked)
            for name in ("spatial", "temporal")
        }
        kind[film] = "temporal" if errors["temporal"] < errors["spatial"] else "spatial"
    return [masks[kind[a.sample]][i] for i, a in enumerate(every)]


@lru_cache(16)
def svg_masks(layout: Layout, width: int) -> dict[str, list[set[int]]]:
    """What each token reads in a head of either kind."""
    every = tokens(layout)

    def group(t: Token) -> int:
        film = layout.films[t.sample]
        shot = film.shots[t.shot]
        return (t.row * shot.cols + t.col) * sum(one.frames for one in film.shots) // (shot.rows * shot.cols)

    place = {"spatial": [t.frame for t in every], "temporal": [-1 if t.text else group(t) for t in every]}

    def reads(i: int, j: int, kind: str) -> bool:
        a, b = every[i], every[j]
        return a.text or b.text or b.frame == 0 or abs(place[kind][i] - place[kind][j]) <= width

    films = slow.dense(layout)
    return {kind: [{j for j in films[i] if reads(i, j, kind)} for i in range(len(every))] for kind in place}


@slow_routing(SVG2)
def svg2(attention: SVG2, call: Call) -> Masks:
    """Clusters of queries read the clusters of keys that hold a share `top_p` of their weight."""

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
        if not video:
            continue
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
        distances = (torch.stack(centres) - x[video][:, None]).square().sum(-1).tolist()
        for i, row in zip(video, distances, strict=True):
            members[row.index(min(row))].append(i)
        centres = [x[own].mean(0) if own else centre for own, centre in zip(members, centres, strict=True)]
    return list(zip(centres, members, strict=True))
