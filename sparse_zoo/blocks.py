"""Steps that block-sparse methods share: text beside video, blocks on a grid, choosing key blocks by score."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_zoo.layout import Layout
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Part, Plan
from sparse_zoo.remember import remembered

SLICE = 1 << 22
"""Scores held at once while blocks are chosen."""

Rule = Callable[[Tensor, Tensor], Tensor]


def joint(layout: Layout, *video: Part) -> Plan:
    """Parts that join video to video, and text as the methods for video have it: read by all, and reading all.

    The papers speak of streams without text, or leave it dense; so do all methods here that do not say otherwise.
    """
    text = _text(layout)
    return Plan(*video, *text) if video or text else Plan.within(layout.partition())


@remembered(32)
def _text(layout: Layout) -> tuple[Part, ...]:
    everyone, text = layout.partition(), layout.partition(where=layout.is_text)
    video = layout.partition(where=~layout.is_text)
    if not text.count:
        return ()
    return tuple(
        Plan.blocks(queries, keys, same_film(queries, keys)).parts[0]
        for queries, keys in ((everyone, text), (text, video))
        if keys.count
    )


def same_film(queries: Partition, keys: Partition) -> Tensor:
    """Whether two pieces are of one sample: bool (Q, K)."""
    return queries.sample[:, None] == keys.sample


@remembered(64)
def stretches(layout: Layout, tokens: int) -> Partition:
    """The video of each film, cut every `tokens` tokens, blind to shots and frames; the last may be shorter."""
    video = ~layout.is_text
    first = torch.nn.functional.pad(torch.bincount(layout.sample[video], minlength=len(layout.films)).cumsum(0), (1, 0))
    return layout.partition((video.cumsum(0) - 1 - first[layout.sample]) // tokens, where=video)


def grid(layout: Layout, tile: tuple[int, ...], *, stop_at_shots: bool) -> list[tuple[Tensor, Tensor]]:
    """For each axis (frames, rows, cols) the place of each token's tile, int64 (L,), and how many places it has there.

    Tiles are those of `layout.tiles`. Places in time count them through the film; rows and columns are numbered in each
    frame. Values at text tokens have no meaning.
    """
    video = ~layout.is_text
    within = layout.shot_frame if stop_at_shots else layout.frame
    keys = ("shot", within // tile[0]) if stop_at_shots else (within // tile[0],)
    steps = layout.partition(*keys, where=video)
    number = torch.bincount(steps.sample, minlength=len(layout.films))
    time = steps.piece_of[0, 0] - (number.cumsum(0) - number)[layout.sample]
    rows, cols = (-(-size // step) for size, step in ((layout.rows, tile[1]), (layout.cols, tile[2])))
    return [(time, number[layout.sample]), (layout.row // tile[1], rows), (layout.col // tile[2], cols)]


@torch.no_grad()
def chosen(queries: Tensor, keys: Tensor, legal: Tensor, rule: Rule) -> Tensor:
    """What `rule` keeps of the products of pooled queries and keys: bool (B, H, Q, K), never illegal ones.

    queries (B, H, Q, D), keys (B, Hk, K, D), products in float32; legal, bool, broadcasts to (B, H, Q, K). `rule` maps
    some rows of scores, with -inf where not legal, and of legal to what it keeps of them. No whole table of scores is
    held.
    """
    keys = keys.float().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1).transpose(-1, -2)
    shape = (*queries.shape[:3], keys.shape[-1])
    legal = legal.expand(shape)
    kept = torch.empty(shape, dtype=torch.bool, device=queries.device)
    rows = max(1, SLICE // max(1, shape[0] * shape[1] * shape[3]))
    for start in range(0, shape[2], rows):
        some = slice(start, start + rows)
        scores = (queries[:, :, some].float() @ keys).masked_fill(~legal[:, :, some], -torch.inf)
        kept[:, :, some] = rule(scores, legal[:, :, some]) & legal[:, :, some]
    return kept


def largest(scores: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, ties to the earlier, none at -inf: bool, shaped as scores (..., K)."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
    return kept & (scores > -torch.inf)


def heaviest(weights: Tensor, share: float) -> Tensor:
    """The fewest of each row, largest first and ties to the earlier, that hold `share` of its sum: bool (..., K).

    weights (..., K) of at least 0. Of a row that sums to 0 nothing is kept; with a share of 1 everything is.
    """
    if share >= 1:
        return torch.ones_like(weights, dtype=torch.bool)
    ordered, order = weights.double().sort(dim=-1, descending=True, stable=True)
    enough = ordered.cumsum(-1) - ordered < share * ordered.sum(-1, keepdim=True)
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order, enough)
