"""Mean keys, scores and top-k on the device, without a table of scores in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_zoo.kernels.triton import Triton, interpreted
from sparse_zoo.kernels.triton.configs import CHOOSE, MOST_CHUNKS, POOL, Tile, choose_tile
from sparse_zoo.kernels.triton.work import tokens_of
from sparse_zoo.partition import Partition

MOST_K = 16


def fits(q: Tensor, chunks: Partition, top_k: int) -> bool:
    """Whether `top_chunks` here can choose for these queries: on CUDA, what the kernels take, few chunks, a small k."""
    return q.device.type == "cuda" and chunks.count <= MOST_CHUNKS and top_k <= MOST_K and not Triton().why_not(q, q)


def top_chunks(q: Tensor, k: Tensor, chunks: Partition, legal: Tensor, kind: Tensor, top_k: int) -> Tensor:
    """What `sparse_zoo.routing.top_chunks` returns: int32 (B, H, Lq, min(top_k, C)), best first, -1 for none.

    The mean of a chunk is summed in one order, so that a choice is the same from run to run.
    """
    from sparse_zoo.kernels.triton import device, union  # import Triton

    batch, heads, length, dim = q.shape
    kv_heads, count = k.shape[1], chunks.count
    top_k = min(top_k, count)
    q, k = (union.dense_rows(x.detach()) for x in (q, k))
    chosen = torch.empty(batch, heads, length, top_k, dtype=torch.int32, device=q.device)
    means = torch.empty(batch, kv_heads, 3, count, dim, dtype=q.dtype, device=q.device)
    if not chosen.numel():
        return chosen
    tokens, offsets = (x.expand(batch, kv_heads, -1) for x in (tokens_of(chunks), chunks.offsets))
    tile, columns = _tile(q), _power_of_two(count)
    number = -(-length // tile.rows)
    with union.on(q):
        device.pool[(batch * kv_heads * count,)](
            k, means, tokens, offsets, kv_heads, count,
            *k.stride()[:3], *tokens.stride()[:2], *offsets.stride()[:2],
            STEP=POOL.step, DIM=dim, num_warps=POOL.warps, num_stages=POOL.stages,
        )  # fmt: skip
        device.choose[(batch * heads * number,)](
            q, means, _words(legal, columns), kind.int(), chosen,
            heads, number, length, heads // kv_heads, count, *q.stride()[:3],
            ROWS=tile.rows, STEP=min(dim, tile.step), DIM=dim, COLUMNS=columns, TOP_K=top_k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return chosen


def _tile(q: Tensor) -> Tile:
    return CHOOSE[min(CHOOSE)] if interpreted() else choose_tile(torch.cuda.get_device_capability(q.device))


def _power_of_two(count: int) -> int:
    """The next one, from 32 on: the bits of a word."""
    return max(32, 1 << (count - 1).bit_length())


def _words(legal: Tensor, columns: int) -> Tensor:
    """A table bool (kinds, C) as bits, the first column in the lowest: int32 (kinds, columns // 32)."""
    padded = torch.nn.functional.pad(legal, (0, columns - legal.shape[1])).view(len(legal), -1, 32)
    bits = padded.long() << torch.arange(32, device=legal.device)
    return bits.sum(-1).view(torch.int32)[:, ::2].contiguous()  # the lower halves
