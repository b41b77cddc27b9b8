"""A plan as an image: who attends to whom, averaged over bins of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_zoo.errors import refuse
from sparse_zoo.layout import Layout
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Part, Plan

PAPER, INK = (250, 250, 247), (28, 62, 112)
TEXT, VIDEO = (222, 146, 48), ((186, 194, 204), (214, 219, 226))
SHOT_LINE, FILM_LINE = (205, 100, 60), (150, 20, 40)
RULER = 8


def coverage(plan: Plan, bins: int, *, batch: int = 0, head: int = 0) -> Tensor:
    """The share of pairs that are attended, per bin of queries × bin of keys: float32 (bins, bins) in [0, 1].

    The bin of token i of L is i · bins // L. Computed from the plan's pieces and edges, without an L × L mask.
    """
    lq, lk = plan.shape
    refuse("coverage", [f"bins must be 1 … {min(lq, lk)} for this plan, got {bins}"] * (not 1 <= bins <= min(lq, lk)))
    pairs = sum((_pairs(part, bins, batch, head) for part in plan.parts), torch.zeros(bins, bins, dtype=torch.float64))
    rows, cols = (torch.bincount(_bin_of(length, bins), minlength=bins) for length in (lq, lk))
    return (pairs / (rows[:, None] * cols)).float()


@dataclass(frozen=True)
class PlanMap:
    """What a picture of a plan shows, at its pixels: data to store and to draw later.

    `share` is the share of pairs that are attended, float32 (pixels, pixels), queries down and keys across. `kind` says
    what the tokens of a row or column are, uint8 (pixels,): 0 text, else video, 1 or 2 by shot. `shot_starts` and
    `film_starts`, bool (pixels,), mark where shots and films begin.
    """

    share: Tensor
    kind: Tensor
    shot_starts: Tensor
    film_starts: Tensor


def picture(plan: Plan, layout: Layout, *, batch: int = 0, head: int = 0, pixels: int = 256) -> Tensor:
    """Draw a plan, queries from top to bottom, keys from left to right.

    Darker means a larger share of attended pairs. Lines mark where shots (orange) and films (red) begin. The rulers
    above and on the left are orange over text and grey over video, and change shade from shot to shot.

    Args:
        plan: The plan.
        layout: Its stream.
        batch: The batch item, where the plan differs between them.
        head: The head, where the plan differs between them.
        pixels: Width and height of the picture without rulers.

    Returns:
        uint8 (pixels + 8, pixels + 8, 3) RGB on the CPU.
    """
    return draw_map(plan_map(plan, layout, batch=batch, head=head, pixels=pixels))


def plan_map(plan: Plan, layout: Layout, *, batch: int = 0, head: int = 0, pixels: int = 256) -> PlanMap:
    """Return what `picture` draws, on the CPU."""
    length = len(layout)
    refuse(
        "picture",
        [
            f"the plan is for {plan.shape} tokens, the layout has {length}" if plan.shape != (length, length) else "",
            f"pixels must be at least 1, got {pixels}" if pixels < 1 else "",
        ],
    )
    bins = min(pixels, length)
    token = torch.arange(pixels) * length // pixels  # the first token that a pixel shows
    share = coverage(plan, bins, batch=batch, head=head)[token * bins // length][:, token * bins // length]
    kind = torch.where(layout.is_text.cpu(), 0, 1 + layout.shot.cpu() % len(VIDEO))[token].to(torch.uint8)
    return PlanMap(share, kind, _first_pixels(layout.shot.cpu(), pixels), _first_pixels(layout.sample.cpu(), pixels))


def draw_map(found: PlanMap) -> Tensor:
    """Draw a `PlanMap` as `picture` does: uint8 (pixels + 8, pixels + 8, 3)."""
    pixels = len(found.share)
    paper, ink = (torch.tensor(colour).float() for colour in (PAPER, INK))
    # The root keeps thin structure visible: a bin that attends to 1% shows as 10% ink.
    image = torch.lerp(paper, ink, found.share[..., None].sqrt())
    ruler = torch.tensor((TEXT, *VIDEO)).float()[found.kind.long()]
    for starts, colour in ((found.shot_starts, SHOT_LINE), (found.film_starts, FILM_LINE)):
        lines = starts.nonzero()[:, 0]
        line = torch.tensor(colour).float()
        image[lines] = torch.lerp(image[lines], line, 0.6)
        image[:, lines] = torch.lerp(image[:, lines], line, 0.6)
    whole = paper.expand(pixels + RULER, pixels + RULER, 3).clone()
    whole[RULER:, RULER:] = image
    whole[RULER:, : RULER - 2] = ruler[:, None]
    whole[: RULER - 2, RULER:] = ruler[None]
    return whole.round().to(torch.uint8)


def _bin_of(length: int, bins: int) -> Tensor:
    return torch.arange(length) * bins // length


def _first_pixels(labels: Tensor, pixels: int) -> Tensor:
    """Whether a new label begins at a pixel, the first pixel excepted: bool (pixels,)."""
    token = torch.arange(pixels + 1) * len(labels) // pixels
    changes = torch.cat([torch.zeros(1), (labels.diff() != 0).float()]).cumsum(0)  # how many changes up to each token
    last = changes[torch.maximum(token[:-1], token[1:] - 1)]
    return last.diff(prepend=torch.zeros(1)) > 0


def _pairs(part: Part, bins: int, batch: int, head: int) -> Tensor:
    """Attended pairs per (bin of queries, bin of keys): float64 (bins, bins)."""
    edges = _one(part.edges, batch, head)
    queries, keys = (_counts(pieces, bins, batch, head) for pieces in (part.queries, part.keys))
    if part.by_table:
        return (queries.to_dense() @ edges.double()) @ keys.to_dense().T
    entry, count = queries.indices(), queries.values()  # (bin, piece) pairs that meet: at most one per token
    chosen = edges[entry[1]].long() + 1  # 0 stands for none
    met = torch.zeros(bins * (part.keys.count + 1), dtype=torch.float64)
    met.index_add_(
        0,
        (entry[0][:, None] * (part.keys.count + 1) + chosen).flatten(),
        count[:, None].expand_as(chosen).flatten(),
    )
    return met.view(bins, -1)[:, 1:] @ keys.to_dense().T


def _counts(pieces: Partition, bins: int, batch: int, head: int) -> Tensor:
    """The number of tokens of each piece in each bin: sparse float64 (bins, pieces), coalesced."""
    piece = _one(pieces.piece_of, batch, head)
    held = piece >= 0
    index = torch.stack([_bin_of(pieces.length, bins)[held], piece[held]])
    ones = torch.ones(index.shape[1], dtype=torch.float64)
    return torch.sparse_coo_tensor(index, ones, (bins, pieces.count), check_invariants=True).coalesce()


def _one(x: Tensor, batch: int, head: int) -> Tensor:
    """The part of a tensor (B|1, H|1, ...) that belongs to one batch item and head, on the CPU."""
    return x[batch if x.shape[0] > 1 else 0, head if x.shape[1] > 1 else 0].cpu()
