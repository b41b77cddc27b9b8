"""Anchors: what every query attends to, whatever it chooses."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from sparse_zoo.blocks import text_for_all
from sparse_zoo.layout import Layout
from sparse_zoo.partition import Partition, refine
from sparse_zoo.plan import Plan


def anchored(layout: Layout, chunks: Partition, anchors: Collection[str], *, past: bool = False) -> Plan | None:
    """The plan of some anchors, each pair once.

    Args:
        layout: The stream.
        chunks: How it is cut.
        anchors: Any of "text" (of the film), "shot" (the own one and its caption), "chunk" (the own one).
        past: Whether nothing of later shots is attended.

    Returns:
        The plan, None if there is nothing to attend to.
    """
    plans = []
    if "text" in anchors and (text := text_for_all(layout, past=past)):
        plans.append(Plan(*text))
    if "shot" in anchors and bool((layout.shot >= 0).any()):
        plans.append(Plan.within(layout.partition("shot", where=layout.shot >= 0)))
    if "chunk" in anchors:
        if past:
            pieces = layout.partition(chunks.piece_of[0, 0], "shot")
            chunk = pieces.of(chunks.piece_of[0, 0])
            plans.append(Plan.blocks(pieces, pieces, (chunk[:, None] == chunk) & (pieces.shot <= pieces.shot[:, None])))
        else:
            plans.append(Plan.within(chunks))
    joined = None
    for plan in plans:
        joined = plan if joined is None else joined | plan
    return joined


def keys_given(plan: Plan, kinds: Partition, chunks: Partition) -> Tensor:
    """The number of tokens of each chunk that a plan gives to each kind of query: int64 (kinds, C).

    Args:
        plan: The same for all batch items and heads; queries of one kind attend to the same keys.
        kinds: Pieces of the queries.
        chunks: Pieces of the keys.
    """
    total = torch.zeros(kinds.count, chunks.count, dtype=torch.int64, device=kinds.device)
    for part in plan.parts:
        atoms = refine(part.keys, chunks)
        sizes, parent, chunk = atoms.pieces.sizes[0, 0], atoms.of_a[0, 0], atoms.of_b[0, 0]
        given = torch.zeros(part.queries.count, chunks.count, dtype=torch.int64, device=kinds.device)
        given.index_add_(1, chunk, part.table[0, 0][:, parent] * sizes)
        piece = kinds.of(part.queries.piece_of[0, 0])
        total += given[piece.clamp(min=0)] * (piece >= 0)[:, None]
    return total
