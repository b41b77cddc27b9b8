"""Methods with pooled branches, token by token, from the words of the papers: slow and plain.

Nothing here uses pieces, plans or tables. What a choice is made by is rounded to float32, as the methods say; all else
is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from sparse_zoo.attention import Call
from sparse_zoo.methods.nsa import NSA
from sparse_zoo.methods.sla import SLA
from sparse_zoo.methods.vsa import VSA
from sparse_zoo.testing.routing import slow_routing
from sparse_zoo.testing.slow import Token, tokens

Pieces = dict[Hashable, list[int]]


def attend(q: Tensor, k: Tensor, v: Tensor, reads: dict[int, list[int]] | None = None) -> Tensor:
    """Queries (m, D) over keys and values (n, D): all of them, or those that `reads` lists for a query (others: 0)."""
    scores = q @ k.T / math.sqrt(q.shape[-1])
    if reads is None:
        return scores.softmax(-1) @ v
    unseen = torch.ones_like(scores, dtype=torch.bool)
    for i, keys in reads.items():
        unseen[i, keys] = False
    return scores.masked_fill(unseen, -torch.inf).softmax(-1).nan_to_num(0.0) @ v


def ranked(queries: Tensor, keys: Tensor) -> list[list[int]]:
    """For each query (m, D) the numbers of keys (n, D) by falling product, ties to the earlier."""
    scores = (queries.float() @ keys.float().T).tolist()
    return [sorted(range(len(row)), key=lambda number: (-row[number], number)) for row in scores]


def cubes(call: Call, film: list[int], tile: tuple[int, ...], restart: bool) -> Pieces:
    """Tokens of a film's video by the cube of `tile` that holds them; `restart`: cubes end at shots."""
    found: Pieces = {}
    named = tokens(call.layout)
    for i in film:
        t = named[i]
        time = (t.shot, t.in_shot // tile[0]) if restart else t.frame // tile[0]
        found.setdefault((time, t.row // tile[1], t.col // tile[2]), []).append(i)
    return found


def runs(film: list[int], size: int) -> Pieces:
    """A film's tokens in stretches of at most `size`."""
    return {start: film[start : start + size] for start in range(0, len(film), size)}


def means(x: Tensor, pieces: Pieces) -> Tensor:
    """The mean of each piece of x (L, D): (pieces, D)."""
    return torch.stack([x[held].mean(0) for held in pieces.values()])


def per_film(call: Call, one: Callable[..., None]) -> None:
    """Calls one(item, head, q, k, v, video, text) for each film: q, k, v (L, D), and its tokens of either kind."""
    named: list[Token] = tokens(call.layout)
    share = call.q.shape[1] // call.k.shape[1]
    for item in range(call.q.shape[0]):
        for head in range(call.q.shape[1]):
            q, k, v = call.q[item, head], call.k[item, head // share], call.v[item, head // share]
            for film in sorted({t.sample for t in named}):
                video = [i for i, t in enumerate(named) if t.sample == film and not t.text]
                text = [i for i, t in enumerate(named) if t.sample == film and t.text]
                one(item, head, q.double(), k.double(), v.double(), video, text)


@slow_routing(VSA)
def vsa(attention: VSA, call: Call) -> Tensor:
    """Cubes attend to cubes by their means, and to the tokens of the best cubes; gates weigh the two."""
    out = torch.zeros_like(call.q, dtype=torch.float64)
    gates = {}
    for name, gate in attention.gates.items():
        assert call.hidden is not None
        assert isinstance(gate, nn.Linear)
        gates[name] = call.hidden @ gate.weight.T + gate.bias

    def one(item: int, head: int, q: Tensor, k: Tensor, v: Tensor, video: list[int], text: list[int]) -> None:
        dim, place = len(q[0]), call.head_offset + head
        reads = dict.fromkeys(text, video + text)
        coarse = torch.zeros_like(v)
        if video:
            pieces = cubes(call, video, attention.tile, attention.stop_at_shots)
            of_q, of_k, of_v = (means(x, pieces) for x in (q, k, v))
            blocks, order, found = list(pieces.values()), ranked(of_q, of_k), attend(of_q, of_k, of_v)
            for number, held in enumerate(blocks):
                read = text + [j for other in order[number][: attention.top_k] for j in blocks[other]]
                reads |= dict.fromkeys(held, read)
                coarse[held] = found[number]
        fine = attend(q, k, v, reads)
        mine = {name: gate[item, :, place * dim : (place + 1) * dim] for name, gate in gates.items()}
        out[item, head, text] = fine[text]
        out[item, head, video] = fine[video] * (mine["fine"][video] if "fine" in mine else 1.0)
        if "coarse" in mine:
            out[item, head, video] += coarse[video] * mine["coarse"][video]

    per_film(call, one)
    return out


@slow_routing(NSA)
def nsa(attention: NSA, call: Call) -> Tensor:
    """Means of blocks, chosen blocks and a window of blocks, each weighted by its gate."""
    assert call.hidden is not None
    out = torch.zeros_like(call.q, dtype=torch.float64)
    gates = (call.hidden @ attention.gate.weight.T + attention.gate.bias).sigmoid()

    def one(item: int, head: int, q: Tensor, k: Tensor, v: Tensor, video: list[int], text: list[int]) -> None:
        pieces = list(runs(video, attention.block_tokens).values())
        of_k, of_v = (means(x, dict(enumerate(pieces))) if pieces else x[:0] for x in (k, v))
        first = 3 * (call.head_offset + head)
        compress, select, near = (gates[item, :, first + n, None] for n in range(3))
        owner = {i: number for number, held in enumerate(pieces) for i in held}
        order = ranked(q, of_k)
        selected, window = dict.fromkeys(text, text + video), dict.fromkeys(text, text + video)
        for i, own in owner.items():
            fixed = {0, own, max(own - 1, 0)}
            free = [number for number in order[i] if number not in fixed]
            beside = [number for number in range(len(pieces)) if abs(number - own) <= attention.window // 2]
            for reads, which in ((selected, [*fixed, *free[: attention.top_k]]), (window, beside)):
                reads[i] = text + [j for number in which for j in pieces[number]]
        out[item, head] += select * attend(q, k, v, selected) + near * attend(q, k, v, window)
        film = text + video
        if pieces:
            out[item, head, film] += compress[film] * attend(q[film], of_k, of_v)

    per_film(call, one)
    return out


@slow_routing(SLA)
def sla(attention: SLA, call: Call) -> Tensor:
    """Softmax over text and critical blocks, plus linear attention over marginal ones."""
    out = torch.zeros_like(call.q, dtype=torch.float64)

    def one(item: int, head: int, q: Tensor, k: Tensor, v: Tensor, video: list[int], text: list[int]) -> None:
        reads = dict.fromkeys(text, video + text)
        pieces = runs(video, attention.block_tokens)
        blocks = list(pieces.values())
        order = ranked(means(q, pieces), means(k, pieces)) if video else []
        critical = max(1, int(len(pieces) * attention.top_fraction))
        negligible = min(int(len(pieces) * attention.negligible), len(pieces) - critical)
        for number, held in enumerate(blocks):
            exact, linear = (
                [j for other in which for j in blocks[other]]
                for which in (order[number][:critical], order[number][critical : len(pieces) - negligible])
            )
            reads |= dict.fromkeys(held, text + exact)
            weights = q[held].softmax(-1) @ k[linear].softmax(-1).T
            rest = (weights @ v[linear]) / (weights.sum(-1, keepdim=True) + 1e-5)
            out[item, head, held] = rest @ attention.proj.weight.T
        out[item, head] += attend(q, k, v, reads)

    per_film(call, one)
    return out
