"""MoBA, VMoBA and XAttention token by token, from the words of their papers: what their plans are held against."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from sparse_zoo.attention import Call
from sparse_zoo.layout import Layout
from sparse_zoo.methods.moba import MoBA
from sparse_zoo.methods.vmoba import VMoBA
from sparse_zoo.methods.xattention import XAttention
from sparse_zoo.testing.routing import slow_routing
from sparse_zoo.testing.slow import Token, as_mask, tokens

Blocks = dict[Hashable, list[int]]


@slow_routing(MoBA)
def moba(attention: MoBA, call: Call) -> list[tuple[Tensor, Tensor | float]]:
    """The own block and the best others, up to `top_k` blocks; text beside them."""

    def choose(q: Tensor, k: Tensor) -> list[set[int]]:
        kept = beside_text(call.layout)
        for film in video(call.layout):
            blocks = cut(film, attention.block_tokens)
            scores = (q @ torch.stack([k[block].mean(0) for block in blocks]).T).tolist()
            for own, block in enumerate(blocks):
                for i in block:
                    others = [c for c in range(len(blocks)) if c != own]
                    others.sort(key=lambda c: -scores[i][c])
                    for c in [own, *others][: attention.top_k]:
                        kept[i] |= set(blocks[c])
        return kept

    return [(per_head(call, choose), 1.0)]


@slow_routing(VMoBA)
def vmoba(attention: VMoBA, call: Call) -> list[tuple[Tensor, Tensor | float]]:
    """Blocks in one, two or three dimensions by layer, best pairs first until the budget is spent."""
    batch, heads = call.q.shape[:2]
    kept = [[beside_text(call.layout) for _ in range(heads)] for _ in range(batch)]
    for film in video(call.layout):
        blocks = tiles(call.layout, film, attention, call.layer % 3)
        own = {i: name for name, block in blocks.items() for i in block}
        for b in range(batch):
            q, k = call.q[b].detach().float(), call.k[b].detach().float()
            keys = [k[h * len(k) // heads] for h in range(heads)]
            means = [torch.stack([x[block].mean(0) for block in blocks.values()]) for x in keys]
            products = [(q[h] @ means[h].T).tolist() for h in range(heads)]
            similarity = {  # in the order of ties
                (i, h, name): products[h][i][c] for i in film for h in range(heads) for c, name in enumerate(blocks)
            }
            scopes: dict[Hashable, list[tuple[int, int, Hashable]]] = {}
            for i, h, name in similarity:
                scope = {"query": (i, h), "head": h, "global": None}[attention.scope]
                scopes.setdefault(scope, []).append((i, h, name))
            for pairs in scopes.values():
                low, high = (extreme(similarity[pair] for pair in pairs) for extreme in (min, max))
                weight = {p: (similarity[p] - low) / (high - low) if high > low else 1.0 for p in pairs}
                price = weight if attention.threshold else dict.fromkeys(pairs, 1.0)
                asking = len({(i, h) for i, h, _ in pairs})
                share, places = attention.threshold, attention.top_k * asking
                budget = share * math.fsum(weight.values()) if share else places
                spent = 0.0
                for pair in sorted(pairs, key=lambda p: (own[p[0]] != p[2], -weight[p])):
                    i, h, name = pair
                    if spent < budget or own[i] == name or attention.threshold == 1:
                        kept[b][h][i] |= set(blocks[name])
                    spent += price[pair]
    return [(torch.stack([torch.stack([as_mask(rows) for rows in item]) for item in kept]), 1.0)]


@slow_routing(XAttention)
def xattention(attention: XAttention, call: Call) -> list[tuple[Tensor, Tensor | float]]:
    """Blocks of keys by their share of antidiagonal scores, best first up to the threshold."""
    stride = attention.stride

    def choose(q: Tensor, k: Tensor) -> list[set[int]]:
        kept = beside_text(call.layout)
        for film in video(call.layout):
            blocks = cut(film, attention.block_tokens)
            dots = (q.double() @ k.double().T / (stride * math.sqrt(q.shape[-1]))).tolist()
            for asking in blocks:
                held = [0.0] * len(blocks)
                for group in cut(asking, stride):
                    exps = [
                        [math.exp(antidiagonal(dots, group, keys, stride)) for keys in cut(block, stride)]
                        for block in blocks
                    ]
                    total = sum(map(sum, exps))
                    held = [h + sum(block) / total for h, block in zip(held, exps, strict=True)]
                spent = 0.0
                for c in sorted(range(len(blocks)), key=lambda c: -held[c]):
                    if spent < attention.threshold * sum(held) or attention.threshold == 1:
                        for i in asking:
                            kept[i] |= set(blocks[c])
                    spent += held[c]
        return kept

    return [(per_head(call, choose), 1.0)]


def antidiagonal(dots: list[list[float]], group: list[int], keys: list[int], stride: int) -> float:
    """Group and keys hold up to `stride` tokens each; from the last query and the first key inwards."""
    pairs = [(stride - 1 - n, n) for n in range(stride)]
    return sum(dots[group[a]][keys[b]] for a, b in pairs if a < len(group) and b < len(keys))


def per_head(call: Call, choose: Callable[[Tensor, Tensor], list[set[int]]]) -> Tensor:
    """bool (B, H, L, L), of a rule for the queries and keys, float32 (L, D), of one batch item and head."""
    share = call.q.shape[1] // call.k.shape[1]
    q, k = call.q.detach().float(), call.k.detach().float()
    return torch.stack(
        [
            torch.stack([as_mask(choose(q[b, h], k[b, h // share])) for h in range(q.shape[1])])
            for b in range(q.shape[0])
        ]
    )


def video(layout: Layout) -> list[list[int]]:
    """The video tokens of each film that has any."""
    films: list[list[int]] = [[] for _ in layout.films]
    for i, t in enumerate(tokens(layout)):
        if not t.text:
            films[t.sample].append(i)
    return [film for film in films if film]


def beside_text(layout: Layout) -> list[set[int]]:
    """For each token, the keys of all pairs in a film of which one side or both are text."""
    stream = tokens(layout)
    return [{j for j, b in enumerate(stream) if b.sample == a.sample and (a.text or b.text)} for a in stream]


def cut(some: Sequence[int], size: int) -> list[list[int]]:
    """Runs of at most `size` items, in order."""
    return [list(some[start : start + size]) for start in range(0, len(some), size)]


def tiles(layout: Layout, film: list[int], attention: VMoBA, kind: int) -> Blocks:
    """The blocks of a film's video, by name, in the order in which they begin."""
    stream = tokens(layout)
    frames, rows, cols = attention.tiles[kind]

    def name(t: Token) -> Hashable:
        shot, frame = (t.shot, t.in_shot) if attention.stop_at_shots else (0, t.frame)
        if kind == 0:
            return shot, frame // frames
        place = shot, t.row // rows, t.col // cols
        return place if kind == 1 else (*place, frame // frames)

    blocks: Blocks = {}
    for i in film:
        blocks.setdefault(name(stream[i]), []).append(i)
    return blocks
