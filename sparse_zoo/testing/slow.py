"""Who attends to whom, token by token, from the words of the papers and of the design: slow and plain.

Nothing here uses pieces, plans or tables; each function answers for all queries i of one batch item and head with a
set of keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from sparse_zoo import Layout


@dataclass(frozen=True)
class Token:
    """What a token of the stream is; `in_shot` counts frames from the start of its shot."""

    sample: int
    shot: int
    frame: int
    row: int
    col: int
    text: bool
    in_shot: int


@lru_cache(16)
def tokens(layout: Layout) -> list[Token]:
    """The tokens of the stream, in order."""
    names = ("sample", "shot", "frame", "row", "col", "is_text", "shot_frame")
    return [Token(*row) for row in zip(*(getattr(layout, name).tolist() for name in names), strict=True)]


def dense(layout: Layout) -> list[set[int]]:
    """The film of each token."""
    films: dict[int, set[int]] = {}
    for i, t in enumerate(tokens(layout)):
        films.setdefault(t.sample, set()).add(i)
    return [films[t.sample] for t in tokens(layout)]


def even_chunks(frames: int, per_frame: int, size: int) -> list[int]:
    """The frames in each chunk of a shot: the fewest chunks of at most `size` tokens, of one frame at least."""
    fewest = next(n for n in range(1, frames + 1) if n == frames or -(-frames // n) * per_frame <= size)
    starts = [math.ceil(Fraction(frames * i, fewest)) for i in range(fewest + 1)]
    return [after - start for start, after in pairwise(starts)]


def chunk_names(layout: Layout, chunk: str, frames: int, size: int) -> list[tuple[Any, ...]]:
    """The name of the chunk of each token; equal names are one chunk."""
    position: dict[int, int] = {}
    found: list[tuple[Any, ...]] = []
    for t in tokens(layout):
        n = position.setdefault(t.sample, 0)
        position[t.sample] += 1
        if chunk == "fixed":
            found.append((t.sample, n // size))
        elif t.text:
            found.append((t.sample, t.shot, "caption"))
        elif chunk == "tokens":
            shot = layout.films[t.sample].shots[t.shot]
            bounds = list(accumulate(even_chunks(shot.frames, shot.rows * shot.cols, size)))
            found.append((t.sample, t.shot, "video", sum(t.in_shot >= bound for bound in bounds)))
        else:
            found.append((t.sample, t.shot, "video", t.in_shot // frames if chunk == "frame" else 0))
    return found


@dataclass(frozen=True)
class Drops:
    """Drop-off and drop-in for one head in training: p_max, λ, and the draws of each token."""

    off: float
    into: float
    share: list[float]
    which_off: list[list[float]]  # by rank among the chosen
    number: list[float]
    which_in: list[list[float]]  # by chunk

    def change(self, token: int, chosen: list[int], rest: list[int]) -> list[int]:
        """The chunks that are left of `chosen`, best first, and those that come in from `rest`."""
        fewer = math.floor(len(chosen) * (self.off * self.share[token]))
        ranks = sorted(range(len(chosen)), key=lambda rank: self.which_off[token][rank])
        more = poisson(self.into, self.number[token])
        came = sorted(sorted(rest), key=lambda chunk: self.which_in[token][chunk])[:more]
        return [chosen[rank] for rank in ranks[fewer:]] + came


def poisson(mean: float, u: float) -> int:
    """The least m with P(at most m) > u."""
    m, chance = 0, math.exp(-mean)
    below = chance
    while below <= u:
        m += 1
        chance *= mean / m
        below += chance
    return m


def moc(
    q: Tensor,
    k: Tensor,
    layout: Layout,
    *,
    top_k: int,
    chunk: str,
    frames: int,
    size: int,
    anchors: tuple[str, ...],
    causal: str | None,
    drops: Drops | None = None,
) -> list[set[int]]:
    """q, k (L, D) of one batch item and head."""
    all_tokens = tokens(layout)
    names = chunk_names(layout, chunk, frames, size)
    order = list(dict.fromkeys(names))
    members = {name: {j for j, other in enumerate(names) if other == name} for name in order}
    place = {name: number for number, name in enumerate(order)}
    means = torch.stack([k[sorted(members[name])].detach().float().mean(0) for name in order])
    scores = (q.detach().float() @ means.T).tolist()
    # What is anchored, and which chunks are left, is the same for tokens of one shot, chunk and kind.
    anchored: dict[Any, tuple[set[int], list[int]]] = {}
    result = []
    for i, a in enumerate(all_tokens):
        alike = names[i], a.sample, a.shot, a.text
        if alike not in anchored:
            always: set[int] = set()
            for j, b in enumerate(all_tokens):
                if b.sample != a.sample:
                    continue
                seen = causal != "strict" or b.shot <= a.shot
                text = "text" in anchors and b.text and seen
                shot = "shot" in anchors and b.shot == a.shot and a.shot >= 0
                own = "chunk" in anchors and names[i] == names[j] and seen
                if text or shot or own:
                    always.add(j)
            free = [n for n, name in enumerate(order) if name[0] == a.sample and not members[name] <= always]
            anchored[alike] = always, [n for n in free if causal is None or n < place[names[i]]]
        kept, candidates = set(anchored[alike][0]), anchored[alike][1]
        ranked = sorted(candidates, key=lambda number: (-scores[i][number], number))
        chosen, rest = ranked[:top_k], ranked[top_k:]
        for number in drops.change(i, chosen, rest) if drops else chosen:
            kept |= members[order[number]]
        result.append(kept)
    return result


@lru_cache(16)
def moga_branch(
    name: str, group: tuple[int, ...], layout: Layout, *, windows: tuple[int, ...], frames: int | None
) -> list[set[int]]:
    """`group`: the router's choice of each token of one batch item; empty for branches that do not ask."""
    all_tokens = tokens(layout)
    shots = {(s, n): shot for s, film in enumerate(layout.films) for n, shot in enumerate(film.shots)}

    def window(t: Token) -> tuple[int, int]:
        shot = shots[t.sample, t.shot]
        return t.row * windows[0] // shot.rows, t.col * windows[1] // shot.cols

    place = [None if t.text else window(t) for t in all_tokens]

    def reads(i: int, j: int) -> bool:
        a, b = all_tokens[i], all_tokens[j]
        if b.text:
            return True
        if a.text:
            return a.shot == b.shot and a.shot >= 0
        if name == "group":
            return group[i] == group[j]
        if name == "frame":
            return a.frame == b.frame
        if place[i] != place[j]:
            return False
        if a.shot == b.shot:
            return frames is None or a.in_shot // frames == b.in_shot // frames
        if b.shot == a.shot - 1:
            return shots[b.sample, b.shot].frames - b.in_shot <= 2
        return b.shot == a.shot + 1 and b.in_shot < 2

    return [{j for j in film if reads(i, j)} for i, film in enumerate(dense(layout))]


@lru_cache(64)
def window(layout: Layout, *, tile: tuple[int, ...], size: tuple[int, ...], edge: str, restart: bool) -> list[set[int]]:
    """Keys of each token in a 3D window of tiles: `tile` and `size`, in tiles, are of frames, rows and columns."""
    all_tokens = tokens(layout)
    shots = {(s, n): shot for s, film in enumerate(layout.films) for n, shot in enumerate(film.shots)}
    steps: dict[int, list[Any]] = {}
    for t in all_tokens:
        step = (t.shot, t.in_shot // tile[0]) if restart else t.frame // tile[0]
        if not t.text and step not in steps.setdefault(t.sample, []):
            steps[t.sample].append(step)

    def place(t: Token) -> tuple[int, int, int]:
        step = (t.shot, t.in_shot // tile[0]) if restart else t.frame // tile[0]
        return steps[t.sample].index(step), t.row // tile[1], t.col // tile[2]

    def counts(t: Token) -> tuple[int, int, int]:
        shot = shots[t.sample, t.shot]
        return len(steps[t.sample]), -(-shot.rows // tile[1]), -(-shot.cols // tile[2])

    films = dense(layout)
    text = {j for j, t in enumerate(all_tokens) if t.text}
    tiles: dict[Any, set[int]] = {}
    for j, t in enumerate(all_tokens):
        if not t.text:
            tiles.setdefault((t.sample, place(t)), set()).add(j)

    def near(at: int, there: int, count: int, extent: int) -> bool:
        if edge == "cut":
            return abs(at - there) <= extent // 2
        low = max(0, min(at - extent // 2, count - extent))
        return low <= there < low + extent

    @cache
    def window_of(sample: int, mine: tuple[int, ...], room: tuple[int, ...]) -> set[int]:
        found: set[int] = set()
        for (film, theirs), held in tiles.items():
            if film == sample and all(map(near, mine, theirs, room, size)):
                found |= held
        return found

    return [
        films[i] if t.text else window_of(t.sample, place(t), counts(t)) | (films[i] & text)
        for i, t in enumerate(all_tokens)
    ]


def as_mask(kept: list[set[int]]) -> Tensor:
    """Sets of keys, one for each query, as bool (L, L)."""
    mask = torch.zeros(len(kept), len(kept), dtype=torch.bool)
    rows = torch.tensor([i for i, keys in enumerate(kept) for _ in keys], dtype=torch.int64)
    mask[rows, torch.tensor([j for keys in kept for j in keys], dtype=torch.int64)] = True
    return mask
