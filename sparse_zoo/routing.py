"""Choosing by means: chunks for a query, without the (L × C) table of scores in memory, and shots for a shot."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from sparse_zoo.errors import refuse
from sparse_zoo.layout import Layout
from sparse_zoo.partition import Partition

BLOCK_SCORES = 1 << 20
FEW = 16


@torch.no_grad()
def top_chunks(q: Tensor, k: Tensor, chunks: Partition, legal: Tensor, kind: Tensor, top_k: int) -> Tensor:
    """The `top_k` legal chunks c of largest q · mean(K_c), ties to the earlier chunk.

    q (B, H, Lq, D), k (B, Hk, Lk, D); scores are float32 and unscaled. `legal`, bool (kinds, C), says which chunks a
    kind of query may choose, `kind`, int64 (Lq,), of which kind each query is. Returns int32 (B, H, Lq, min(top_k, C)),
    best first, -1 where there are fewer.
    """
    batch, heads, length, _ = q.shape
    share = heads // k.shape[1]
    means = chunks.mean(k.float()).repeat_interleave(share, dim=1).transpose(-1, -2)
    top_k = min(top_k, chunks.count)
    chosen = torch.empty(batch, heads, length, top_k, dtype=torch.int32, device=q.device)
    rows = max(1, BLOCK_SCORES // max(1, batch * heads * chunks.count))
    for start in range(0, length, rows):
        block = slice(start, start + rows)
        scores = q[:, :, block].float() @ means
        scores.masked_fill_(~legal[kind[block]], -torch.inf)
        chosen[:, :, block] = _top(scores, top_k).int()
    return chosen


def _top(scores: Tensor, top_k: int) -> Tensor:
    """Indices of the largest, best first, ties to the earlier, -1 for those at -inf. Overwrites scores."""
    if top_k > FEW:
        best, index = scores.sort(dim=-1, descending=True, stable=True)
        return index[..., :top_k].masked_fill(best[..., :top_k] == -torch.inf, -1)
    found = []
    for _ in range(top_k):
        # max gives the first of equals, which topk does not promise; for few it is also faster than a sort.
        best, index = scores.max(dim=-1, keepdim=True)
        found.append(index.masked_fill(best == -torch.inf, -1))
        scores.scatter_(-1, index, -torch.inf)
    return torch.cat(found, dim=-1)


@torch.no_grad()
def top_shots(x: Tensor, layout: Layout, shot: int, count: int) -> Tensor:
    """The `count` shots before `shot` whose mean has the largest product with its own: MoC's outer loop.

    The paper's appendix: what of a long film enters the context at all is chosen before any attention, by
    mean(X of the shot) · mean(X of an earlier shot). Ours: X is whatever enters the first block, captions of the shots
    included; products are float32; ties go to the earlier shot.

    x (B, L, dim), `layout` of one film and L tokens. Returns int64 (B, min(count, shot)), for each batch item in the
    film's order. Warns where fewer shots precede than were asked for; raises `ZooError` for what does not fit.
    """
    shots = len(layout.films[0].shots)
    refuse(
        "top_shots",
        [
            f"the layout must hold one film, got {len(layout.films)}" if len(layout.films) != 1 else "",
            f"x must be (B, {len(layout)}, dim), got {tuple(x.shape)}"
            if x.dim() != 3 or x.shape[1] != len(layout)
            else "",
            f"shot must be 0 … {shots - 1}, got {shot}" if not 0 <= shot < shots else "",
            f"count must be at least 0, got {count}" if count < 0 else "",
        ],
    )
    if count > shot:
        warnings.warn(f"top_shots: {count} shots before shot {shot} were asked for, there are {shot}", stacklevel=2)
    pieces = layout.to(x.device).chunks("shot", captions="inside")
    means = pieces.mean(x.float()[:, None])[:, 0, pieces.count - shots :]  # the global caption comes first
    scores = (means[:, :shot] @ means[:, shot, :, None])[..., 0]
    best = scores.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return best.sort(dim=-1).values
