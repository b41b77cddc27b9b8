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


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query (D,) over keys (n, D) and values (n, D)."""
    weights: Tensor = (k @ q / math.sqrt(len(q))).softmax(0)
    return weights @ v


def ranked(query: Tensor, keys: Tensor) -> list[int]:
    """Numbers of keys (n, D) by falling product with a query (D,), ties to the earlier."""
    scores = (keys.float() @ query.float()).tolist()
    return sorted(range(len(scores)), key=lambda number: (-scores[number], number))


def cubes(call: Call, film: list[int], tile: tuple[int, ...], restart: bool) -> Pieces:
    found: Pieces = {}
    named = tokens(call.layout)
    for i in film:
        t = named[i]
        time = (t.shot, t.in_shot // tile[0]) if restart else t.frame // tile[0]
        found.setdefault((time, t.row // tile[1], t.col // tile[2]), []).append(i)
    return found


def runs(film: list[int], size: int) -> Pieces:
    return {start: film[start : start + size] for start in range(0, len(film), size)}


def means(x: Tensor, pieces: Pieces) -> Tensor:
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
    out = torch.zeros_like(call.q, dtype=torch.float64)
    gates = {}
    for name, gate in attention.gates.items():
        assert call.hidden is not None
        assert isinstance(gate, nn.Linear)
        gates[name] = call.hidden @ gate.weight.T + gate.bias

    def one(item: int, head: int, q: Tensor, k: Tensor, v: Tensor, video: list[int], text: list[int]) -> None:
        dim, place = len(q[0]), call.head_offset + head
        for i in text:
            out[item, head, i] = attend(q[i], k[video + text], v[video + text])
        if not video:
            return
        pieces = cubes(call, video, attention.tile, attention.stop_at_shots)
        of_q, of_k, of_v = (means(x, pieces) for x in (q, k, v))
        for number, held in enumerate(pieces.values()):
            best = ranked(of_q[number], of_k)[: attention.top_k]
            read = text + [j for other in best for j in list(pieces.values())[other]]
            coarse = attend(of_q[number], of_k, of_v)
            for i in held:
                mine = {name: gate[item, i, place * dim : (place + 1) * dim] for name, gate in gates.items()}
                out[item, head, i] = attend(q[i], k[read], v[read]) * mine.get("fine", 1.0)
                out[item, head, i] += coarse * mine.get("coarse", 0.0)

    per_film(call, one)
    return out


@slow_routing(NSA)
def nsa(attention: NSA, call: Call) -> Tensor:
    assert call.hidden is not None
    out = torch.zeros_like(call.q, dtype=torch.float64)
    gates = (call.hidden @ attention.gate.weight.T + attention.gate.bias).sigmoid()

    def one(item: int, head: int, q: Tensor, k: Tensor, v: Tensor, video: list[int], text: list[int]) -> None:
        pieces = list(runs(video, attention.block).values())
        of_k, of_v = (means(x, dict(enumerate(pieces))) if pieces else x[:0] for x in (k, v))
        for i in video + text:
            first = 3 * (call.head_offset + head)
            compress, select, near = gates[item, i, first : first + 3]
            if i in text:
                chosen = window = list(range(len(pieces)))
            else:
                own = next(number for number, held in enumerate(pieces) if i in held)
                fixed = {0, own, max(own - 1, 0)}
                free = [number for number in ranked(q[i], of_k) if number not in fixed]
                chosen = [*fixed, *free[: attention.top_k]]
                window = [number for number in range(len(pieces)) if abs(number - own) <= attention.window // 2]
            for which, gate in ((chosen, select), (window, near)):
                read = text + [j for number in which for j in pieces[number]]
                out[item, head, i] += gate * attend(q[i], k[read], v[read])
            if pieces:
                out[item, head, i] += compress * attend(q[i], of_k, of_v)

    per_film(call, one)
    return out


@slow_routing(SLA)
def sla(attention: SLA, call: Call) -> Tensor:
    out = torch.zeros_like(call.q, dtype=torch.float64)

    def one(item: int, head: int, q: Tensor, k: Tensor, v: Tensor, video: list[int], text: list[int]) -> None:
        for i in text:
            out[item, head, i] = attend(q[i], k[video + text], v[video + text])
        if not video:
            return
        pieces = runs(video, attention.block)
        of_q, of_k = means(q, pieces), means(k, pieces)
        critical = max(1, int(len(pieces) * attention.top_k))
        negligible = min(int(len(pieces) * attention.negligible), len(pieces) - critical)
        for number, held in enumerate(pieces.values()):
            order = ranked(of_q[number], of_k)
            exact, linear = (
                [j for other in which for j in list(pieces.values())[other]]
                for which in (order[:critical], order[critical : len(order) - negligible])
            )
            for i in held:
                weights = k[linear].softmax(-1) @ q[i].softmax(-1)
                rest = (weights @ v[linear]) / (weights.sum() + 1e-5)
                out[item, head, i] = attend(q[i], k[text + exact], v[text + exact]) + attention.proj.weight @ rest

    per_film(call, one)
    return out
