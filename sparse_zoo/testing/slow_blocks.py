"""Methods made from parts, token by token, from the words of their docstrings: slow and plain.

Nothing here uses pieces, plans, scorers or selectors. What a choice is made by is float32, as the methods say; all else
is float64. Rules answer with the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_zoo.attention import Call
from sparse_zoo.methods.bsa import BSA
from sparse_zoo.methods.holocine import HoloCine
from sparse_zoo.methods.llsa import LLSA
from sparse_zoo.methods.nabla import NABLA
from sparse_zoo.methods.psa import PSA
from sparse_zoo.methods.rolling import Rolling
from sparse_zoo.methods.sla2 import SLA2
from sparse_zoo.methods.sol import SolAttn
from sparse_zoo.methods.sparge2 import SpargeAttention2
from sparse_zoo.methods.subblock import SubBlock
from sparse_zoo.testing.routing import slow_routing
from sparse_zoo.testing.slow import as_mask, tokens
from sparse_zoo.testing.slow_coarse import cubes, per_film, runs

Masks = list[tuple[Tensor, Tensor | float]]
Blocks = list[list[int]]
Key = tuple[Tensor, Tensor, float]
"""A key, a value and what is added to its score."""


def softmax(q: Tensor, keys: list[Key]) -> Tensor:
    """What queries (n, D) get of a list of keys."""
    k, v = torch.stack([key[0] for key in keys]), torch.stack([key[1] for key in keys])
    more = torch.tensor([key[2] for key in keys], dtype=torch.float64)
    return (q @ k.T / math.sqrt(q.shape[-1]) + more).softmax(-1) @ v


def of_tokens(k: Tensor, v: Tensor, some: list[int]) -> list[Key]:
    return [(k[j], v[j], 0.0) for j in some]


def pooled_keys(k: Tensor, v: Tensor, pieces: Blocks) -> list[Key]:
    """One key for each piece, which weighs the logarithm of its tokens."""
    return [(k[piece].mean(0), v[piece].mean(0), math.log(len(piece))) for piece in pieces]


def logits(queries: Tensor, keys: Tensor) -> list[list[float]]:
    """Products of means in float32, scaled on the side of the queries."""
    found: list[list[float]] = ((queries * queries.shape[-1] ** -0.5).float() @ keys.float().T).tolist()
    return found


def means(x: Tensor, blocks: Blocks) -> Tensor:
    return torch.stack([x[block].mean(0) for block in blocks])


def best(row: list[float], count: int) -> list[int]:
    """The places of the largest, ties to the earlier."""
    return sorted(range(len(row)), key=lambda j: (-row[j], j))[:count]


def fewest(row: list[float], share: float) -> list[int]:
    """The fewest places, largest first, whose softmax weights hold a share; all for a share of 1."""
    if share >= 1:
        return list(range(len(row)))
    weights = torch.tensor(row, dtype=torch.float32).softmax(0).double().tolist()
    kept, held = [], 0.0
    for j in best(weights, len(weights)):
        if held < share * sum(weights):
            kept.append(j)
        held += weights[j]
    return kept


def blockwise(
    call: Call,
    queries: Callable[[list[int]], Blocks],
    keys: Callable[[list[int]], Blocks],
    choose: Callable[..., Blocks],
) -> Tensor:
    """The output where blocks of a film's video choose blocks, `choose(q, k, queries, keys)`, beside text."""
    out = torch.zeros_like(call.q, dtype=torch.float64)

    def one(item: int, head: int, q: Tensor, k: Tensor, v: Tensor, video: list[int], text: list[int]) -> None:
        if text:
            out[item, head, text] = softmax(q[text], of_tokens(k, v, text + video))
        if video:
            asking, asked = queries(video), keys(video)
            for block, some in zip(asking, choose(q, k, asking, asked), strict=True):
                read = of_tokens(k, v, text + [j for c in some for j in asked[c]])
                out[item, head, block] = softmax(q[block], read)

    per_film(call, one)
    return out


def stretches(size: int) -> Callable[[list[int]], Blocks]:
    return lambda video: list(runs(video, size).values())


@slow_routing(HoloCine)
def holocine(attention: HoloCine, call: Call) -> Masks:
    stream = tokens(call.layout)

    def reads(i: int, j: int) -> bool:
        a, b = stream[i], stream[j]
        return a.sample == b.sample and (a.text or b.text or a.shot == b.shot or b.in_shot < attention.frames)

    every = range(len(stream))
    return [(as_mask([{j for j in every if reads(i, j)} for i in every]), 1.0)]


@slow_routing(Rolling)
def rolling(attention: Rolling, call: Call) -> Masks:
    stream, size = tokens(call.layout), attention.chunk_frames

    def reads(i: int, j: int) -> bool:
        a, b = stream[i], stream[j]
        if a.sample != b.sample or b.shot > a.shot:
            return False
        if b.text or a.text:
            return b.text or a.shot == b.shot
        if a.shot == b.shot and a.in_shot // size == b.in_shot // size:
            return True
        first = a.frame - a.in_shot % size
        return b.frame < first and (b.frame >= first - attention.window or b.frame < attention.sinks)

    every = range(len(stream))
    return [(as_mask([{j for j in every if reads(i, j)} for i in every]), 1.0)]


@slow_routing(SubBlock)
def subblock(attention: SubBlock, call: Call) -> Tensor:
    def choose(q: Tensor, k: Tensor, asking: Blocks, asked: Blocks) -> Blocks:
        def parts(block: list[int], number: int) -> Blocks:
            return list(runs(block, attention.block_tokens // number).values())

        of_q = [means(q, parts(block, attention.parts[0])) for block in asking]
        of_k = [means(k, parts(block, attention.parts[1])) for block in asked]
        count = max(1, math.ceil(len(asked) * attention.top_fraction))
        return [best([float(torch.tensor(logits(a, b)).logsumexp((0, 1))) for b in of_k], count) for a in of_q]

    cut = stretches(attention.block_tokens)
    return blockwise(call, cut, cut, choose)


@slow_routing(SpargeAttention2)
def sparge2(attention: SpargeAttention2, call: Call) -> Tensor:
    def choose(q: Tensor, k: Tensor, asking: Blocks, asked: Blocks) -> Blocks:
        count = max(1, math.ceil(len(asked) * attention.top_fraction))
        rows = logits(means(q, asking), means(k, asked))
        return [sorted({*best(row, count), *fewest(row, attention.top_p)}) for row in rows]

    return blockwise(call, stretches(attention.query_tokens), stretches(attention.block_tokens), choose)


@slow_routing(NABLA)
def nabla(attention: NABLA, call: Call) -> Tensor:
    stream = tokens(call.layout)

    def cut(video: list[int]) -> Blocks:
        return list(cubes(call, video, attention.tile, attention.stop_at_shots).values())

    def choose(q: Tensor, k: Tensor, asking: Blocks, asked: Blocks) -> Blocks:
        times: list[tuple[int, int]] = []
        places = []
        for block in asking:
            t = stream[block[0]]
            time = (
                (t.shot, t.in_shot // attention.tile[0])
                if attention.stop_at_shots
                else (0, t.frame // attention.tile[0])
            )
            if time not in times:
                times.append(time)
            places.append((times.index(time), t.row // attention.tile[1], t.col // attention.tile[2]))
        rows = logits(means(q, asking), means(k, asked))
        near = [
            {
                c
                for c, there in enumerate(places)
                if all(abs(a - b) <= size // 2 for a, b, size in zip(here, there, attention.window, strict=True))
            }
            for here in places
        ]
        return [sorted({*fewest(row, attention.threshold)} | close) for row, close in zip(rows, near, strict=True)]

    return blockwise(call, cut, cut, choose)


@slow_routing(BSA)
def bsa(attention: BSA, call: Call) -> Tensor:
    out = torch.zeros_like(call.q, dtype=torch.float64)

    def one(item: int, head: int, q: Tensor, k: Tensor, v: Tensor, video: list[int], text: list[int]) -> None:
        if text:
            out[item, head, text] = softmax(q[text], of_tokens(k, v, text + video))
        tiles = list(cubes(call, video, attention.tile, attention.stop_at_shots).values()) if video else []
        kept = []
        for tile in tiles:
            own = q[tile].float()
            own = own / own.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            like = (own * own[len(tile) // 2]).sum(-1).tolist()
            number = max(1, int(len(tile) * attention.keep_queries))
            kept.append(sorted(sorted(range(len(tile)), key=lambda n: (like[n], n))[:number]))
        if not tiles:
            return
        asking = [[tile[n] for n in places] for tile, places in zip(tiles, kept, strict=True)]
        rows = logits(torch.stack([q[some].float().mean(0) for some in asking]), means(k, tiles))
        for tile, places, row in zip(tiles, kept, rows, strict=True):
            read = of_tokens(k, v, text + [j for c in fewest(row, attention.threshold) for j in tiles[c]])
            nearest = [min(places, key=lambda m: (abs(m - n), m)) for n in range(len(tile))]
            out[item, head, tile] = softmax(q[[tile[n] for n in nearest]], read)

    per_film(call, one)
    return out


@slow_routing(SolAttn)
def sol(attention: SolAttn, call: Call) -> Tensor:
    out = torch.zeros_like(call.q, dtype=torch.float64)

    def one(item: int, head: int, q: Tensor, k: Tensor, v: Tensor, video: list[int], text: list[int]) -> None:
        if text:
            out[item, head, text] = softmax(q[text], of_tokens(k, v, text + video))
        if not video:
            return
        blocks = list(runs(video, attention.block_tokens).values())
        queries, keys = means(q, blocks).float() * q.shape[-1] ** -0.5, means(k, blocks).float()
        scores, centre = queries @ keys.T, keys.mean(0)
        spread = queries.square() @ (keys - centre).square().mean(0)
        if attention.spread == "exact":
            spread = (scores - (queries @ centre)[:, None]).square().mean(1)
        bounds = queries @ centre + attention.tau * (spread + 1e-6).sqrt()
        summaries = pooled_keys(k, v, blocks)
        for a, block in enumerate(blocks):
            exact = [b for b in range(len(blocks)) if abs(a - b) <= 1 or bool(scores[a, b] > bounds[a])]
            read = of_tokens(k, v, text + [j for b in exact for j in blocks[b]])
            read += [summaries[b] for b in range(len(blocks)) if b not in exact]
            out[item, head, block] = softmax(q[block], read)

    per_film(call, one)
    return out


@slow_routing(PSA)
def psa(attention: PSA, call: Call) -> Tensor:
    out = torch.zeros_like(call.q, dtype=torch.float64)

    def one(item: int, head: int, q: Tensor, k: Tensor, v: Tensor, video: list[int], text: list[int]) -> None:
        if text:
            out[item, head, text] = softmax(q[text], of_tokens(k, v, text + video))
        if not video:
            return
        asking, asked = (list(runs(video, x).values()) for x in (attention.query_tokens, attention.block_tokens))
        sampled = [block[::4] for block in asked]
        ends = [math.floor(len(asked) * min(1.0, sum(attention.shares[: n + 1])) + 1e-9) for n in range(4)]
        ends[0] = max(1, ends[0])
        summaries = {level: [pooled_keys(k, v, list(runs(x, 2**level).values())) for x in asked] for level in (1, 2, 3)}
        for block in asking:
            per_query = []
            for i in block[::4]:
                scores = (q[i] * q.shape[-1] ** -0.5).float() @ k.float().T
                own = [float(scores[some].max()) for some in sampled]
                per_query.append([x - max(own) for x in own])
            order = best([max(column) for column in zip(*per_query, strict=True)], len(asked))
            read = of_tokens(k, v, text)
            for rank, b in enumerate(order):
                level = sum(rank >= max(ends[: n + 1]) for n in range(4))
                if level == 0:
                    read += of_tokens(k, v, asked[b])
                elif level < 4:
                    read += summaries[level][b]
            out[item, head, block] = softmax(q[block], read)

    per_film(call, one)
    return out


@slow_routing(LLSA)
def llsa(attention: LLSA, call: Call) -> Tensor:
    out = torch.zeros_like(call.q, dtype=torch.float64)
    size, levels = attention.block_tokens, attention.levels

    def one(item: int, head: int, q: Tensor, k: Tensor, v: Tensor, video: list[int], text: list[int]) -> None:
        if text:
            out[item, head, text] = softmax(q[text], of_tokens(k, v, text + video))
        if not video:
            return
        pyramid = {level: list(runs(video, size**level).values()) for level in range(1, levels + 1)}
        chosen: dict[int, list[list[int]]] = {}
        for level in range(levels, 0, -1):
            blocks = pyramid[level]
            scores = (means(q, blocks).float() @ means(k, blocks).float().T).tolist()
            chosen[level] = []
            for a, row in enumerate(scores):
                may = range(len(blocks))
                if level < levels:
                    above = chosen[level + 1][a // size]
                    may = [b for b in may if b // size in above]  # type: ignore[assignment]
                chosen[level].append(sorted(may, key=lambda b: (-row[b], b))[: attention.top_k])
        summaries = {level: pooled_keys(k, v, pieces) for level, pieces in pyramid.items()}
        for a, block in enumerate(pyramid[1]):
            read = of_tokens(k, v, text + [j for b in chosen[1][a] for j in pyramid[1][b]])
            for level in range(1, levels + 1) if attention.enrich else ():
                if level == levels:
                    read += summaries[level]
                else:
                    above = chosen[level + 1][a // size**level]
                    read += [key for b, key in enumerate(summaries[level]) if b // size in above]
            out[item, head, block] = softmax(q[block], read)

    per_film(call, one)
    return out


@slow_routing(SLA2)
def sla2(attention: SLA2, call: Call) -> Tensor:
    out = torch.zeros_like(call.q, dtype=torch.float64)
    by_query, by_key = (x.weight.detach().double() for x in (attention.query_map, attention.key_map))

    def one(item: int, head: int, q: Tensor, k: Tensor, v: Tensor, video: list[int], text: list[int]) -> None:
        if text:
            out[item, head, text] = softmax(q[text], of_tokens(k, v, text + video))
        if not video:
            return
        blocks = list(runs(video, attention.block_tokens).values())
        queries, keys = means(q, blocks) @ by_query.T, means(k, blocks) @ by_key.T
        count = max(1, math.ceil(len(blocks) * attention.top_fraction))
        shares = (queries @ keys.T / math.sqrt(q.shape[-1])).softmax(-1)
        odds = float(attention.ratio[call.head_offset + head].detach().exp())
        for a, (block, row) in enumerate(zip(blocks, logits(queries, keys), strict=True)):
            exact = best(row, count)
            rest = [j for b in range(len(blocks)) if b not in exact for j in blocks[b]]
            held = float(shares[a, exact].sum())
            alpha = odds * held / (odds * held + max(0.0, 1 - held))
            read = of_tokens(k, v, text + [j for b in exact for j in blocks[b]])
            weights = q[block].softmax(-1) @ k[rest].softmax(-1).T
            linear = (weights @ v[rest]) / (weights.sum(-1, keepdim=True) + 1e-5)
            out[item, head, block] = alpha * softmax(q[block], read) + (1 - alpha) * linear

    per_film(call, one)
    return out
