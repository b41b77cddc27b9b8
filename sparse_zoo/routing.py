"""Choosing chunks by the mean of their keys, without the (L × C) table of scores in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_zoo.kernels.triton import routing as fused
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
    if q.device.type == "cuda" and fused.fits(q, chunks, top_k):
        return fused.top_chunks(q, k, chunks, legal, kind, top_k)
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
