"""Figures of routing: kept softmax mass, balance, distance, and loops between shots.

    result = attention.run(call)
    for found in diagnose(call, result.plans):
        print(found.branch, found.scalars())

Everything is computed from plans, and from q and k at a few sampled queries: no L × L table. The papers print no such
figures, and the definitions are ours, except for the loop between two shots, which MoC's causal routing prevents (arXiv
2508.21058, figure 2: shots 9 and 11 choose each other and lose the earlier shots).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_zoo.attention import Call
from sparse_zoo.errors import refuse
from sparse_zoo.layout import Layout
from sparse_zoo.light import broadcast_shapes
from sparse_zoo.plan import Part, Plan

ROWS = 64
SHARE = 0.5
BLOCK = 1 << 24  # numbers in one table of sampled queries × keys: 64 MB in float32


@dataclass(frozen=True, eq=False)
class Routing:
    """Figures of one routed part of a plan, per batch item and head.

    A pick is one query token that chose one piece of keys. A piece is counted if some pick took it, if a sampled query
    could have taken it (it holds a key of the query's film that the rest of the plan does not give), or if it is empty,
    as a group without tokens is. A plan does not know what a method allows: under causal routing the last shot's chunks
    starve, and are reported so.

    Attributes:
        mass_best_pieces: As `Diagnosis.mass`, if each query had taken equally many pieces besides the rest of the plan,
            but the best ones, also those that the method forbids: it shows what causality costs. (B, H)
        mass_random_pieces: The same for random pieces, in the mean. (B, H)
        load: Picks of each piece, int64 (B, H, C); for MoGA's groups, their sizes.
        counted: Pieces that are counted, bool (B, H, C).
        shots: Picks by shot of the query × shot of the piece, float64 (B, H, S, S). A piece in several shots is shared
            out by its tokens. Shots are numbered through the stream, film after film; the global caption is in none.
        distance_frames: Mean over picks of |frame of the query − frame of the piece's tokens|, video only. (B, H)
    """

    mass_best_pieces: Tensor
    mass_random_pieces: Tensor
    load: Tensor
    counted: Tensor
    shots: Tensor
    distance_frames: Tensor

    @property
    def load_entropy(self) -> Tensor:
        """Entropy of the load over the counted pieces ÷ log of their number, (B, H): 1 even, 0 all on one piece.

        NaN where nothing was picked or there was only one piece.
        """
        share = self.load.double() / self.load.sum(-1, keepdim=True)
        entropy: Tensor = torch.special.entr(share).sum(-1)
        return entropy / self.counted.sum(-1).double().log()

    @property
    def starved(self) -> Tensor:
        """The share of counted pieces that no query picked, (B, H)."""
        return (self.counted & (self.load == 0)).sum(-1) / self.counted.sum(-1)

    @property
    def distance_shots(self) -> Tensor:
        """Mean over picks of |shot of the query − shot of the piece|, (B, H)."""
        return _distance(self.shots)

    def loops(self, share: float = SHARE) -> list[list[list[list[int]]]]:
        """The `loops` of each batch item and head."""
        return [[loops(head, share) for head in item] for item in self.shots]


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """The softmax mass that one branch kept, and the figures of its routing.

    Attributes:
        mass: Share of the softmax over the whole film that falls on the plan's keys, mean over sampled queries. (B, H)
        mass_best: The same for the best choice of equally many keys: no plan of this budget keeps more. (B, H)
        routing: Figures of the routed part, or None if no part was chosen from values.
    """

    branch: int
    mass: Tensor
    mass_best: Tensor
    routing: Routing | None

    def by_head(self) -> dict[str, Tensor]:
        """Every figure by name, (B, H) each; NaN where there was nothing to measure."""
        found = {"mass": self.mass, "mass_best": self.mass_best}
        if self.routing is not None:
            names = ("mass_best_pieces", "mass_random_pieces", "load_entropy", "starved")
            found |= {name: getattr(self.routing, name) for name in (*names, "distance_shots", "distance_frames")}
            each = [[(head, loops(head)) for head in item] for item in self.routing.shots]
            found["loops"] = torch.tensor([[float(len(of)) for _, of in item] for item in each])
            found["trapped"] = torch.tensor([[float(len(trapped(head, of))) for head, of in item] for item in each])
        return found

    def scalars(self) -> dict[str, float]:
        """Means over batch items and heads by name; figures that could not be measured are left out."""
        means = {name: float(values.double().nanmean()) for name, values in self.by_head().items()}
        return {name: value for name, value in means.items() if not math.isnan(value)}

    def to_json(self) -> dict[str, Any]:
        """Every figure by batch item and head, with loads, shots and loops, as plain lists with null for NaN."""
        plain: dict[str, Any] = {name: _plain(values.tolist()) for name, values in self.by_head().items()}
        if self.routing is not None:
            plain |= {"load": self.routing.load.tolist(), "shots": self.routing.shots.tolist()}
            plain["loops_of_shots"] = self.routing.loops()
        return {"branch": self.branch, **plain}


@torch.no_grad()
def diagnose(call: Call, plans: Sequence[Plan], *, rows: int = ROWS) -> list[Diagnosis]:
    """Compute one diagnosis per plan, or one per routed part where a plan has several, in order.

    `plans` are those of a `Result` of this call. A plan over pooled queries or keys is left out, pooled segments of a
    plan too: the call's q and k are not theirs. The masses are means over `rows` queries, the middles of as many equal
    stretches of q (all, where it holds fewer). Raises ZooError for rows < 1.
    """
    refuse("diagnose", [f"rows must be at least 1, got {rows}"] if rows < 1 else [])
    length = call.q.shape[2]
    rows = min(rows, length)
    at = (2 * torch.arange(rows, device=call.q.device) + 1) * length // (2 * rows)
    found: list[Diagnosis] = []
    for branch, plan in enumerate(plan.first_segment for plan in plans):
        if plan.shape == (length, call.k.shape[2]):
            parts: list[Part | None] = [part for part in plan.parts if part.routed]
            found += [_diagnose(call, plan, part, branch, at) for part in parts or [None]]
    return found


def churn(before: Plan, after: Plan) -> Tensor:
    """The share of the picks of `after` that `before` had not made, (B|1, H|1); NaN where `after` made none.

    Args:
        before: A plan of the same method and layout, at another step or noise time.
        after: The later plan.

    Raises:
        ZooError: If the routed parts differ in number, queries or pieces.
    """
    pairs = [[part for part in plan.parts if part.routed] for plan in (before, after)]
    sizes = [[(part.queries.length, part.keys.count) for part in parts] for parts in pairs]
    refuse(
        "churn",
        [
            f"the plans' routed parts must have the same (queries, pieces), got {sizes[0]} and {sizes[1]}"
            if sizes[0] != sizes[1]
            else "",
            "neither plan has a routed part" if not sizes[0] and not sizes[1] else "",
        ],
    )
    batch, heads = broadcast_shapes(before.batch_heads, after.batch_heads)
    made = torch.zeros(batch, heads, dtype=torch.int64, device=after.parts[0].edges.device)
    kept = made.clone()
    for old, new in zip(*pairs, strict=True):
        a, b = (_token_edges(part).expand(batch, heads, -1, -1) for part in (old, new))
        if old.by_table or new.by_table:
            a, b = (_as_table(edges, part.keys.count) for edges, part in ((a, old), (b, new)))
            made += b.sum((2, 3))
            kept += (a & b).sum((2, 3))
        else:
            made += (b >= 0).sum((2, 3))
            for column in b.unbind(-1):
                kept += ((a == column[..., None]).any(-1) & (column >= 0)).sum(-1)
    return 1 - kept / made


def loops(shots: Tensor, share: float = SHARE) -> list[list[int]]:
    """Cycles of shots that choose each other, from the picks (S, S) of one head: [[9, 11]], each from its first shot.

    Shot a leads to b if b gets at least `share` of a's picks of other shots. The loops are the elementary cycles of two
    shots or more. Causal routing has none.

    Args:
        shots: Picks by shot of the query × shot of the piece.
        share: In [0.5, 1]. Below one half a shot leads to many others, and cycles say little.

    Raises:
        ZooError: If `share` is out of range.
    """
    refuse("loops", [f"share must be in [0.5, 1], got {share}"] if not 0.5 <= share <= 1 else [])
    others = _others(shots)
    leads = (others > 0) & (others >= share * others.sum(-1, keepdim=True))
    follows = [row.nonzero()[:, 0].tolist() for row in leads]
    found = []
    for start in range(len(follows)):
        paths = [[start]]
        while paths:
            path = paths.pop()
            for shot in follows[path[-1]]:
                if shot == start:
                    found.append(path)
                elif shot > start and shot not in path:
                    paths.append([*path, shot])
    return found


def trapped(shots: Tensor, found: Sequence[Sequence[int]], share: float = SHARE) -> list[int]:
    """Shots of the loops `found` that lose what came before.

    Fewer than 1 − `share` of their picks of other shots are of earlier shots outside the loop, although there are such
    shots.
    """
    others = _others(shots)
    lost = set()
    for loop in found:
        for shot in loop:
            earlier = [other for other in range(shot) if other not in loop]
            if earlier and others[shot, earlier].sum() < (1 - share) * others[shot].sum():
                lost.add(shot)
    return sorted(lost)


def _others(shots: Tensor) -> Tensor:
    """The picks of other shots than the own one, float64 (S, S) on the CPU."""
    return shots.double().cpu() * ~torch.eye(len(shots), dtype=torch.bool)


def _diagnose(call: Call, plan: Plan, part: Part | None, branch: int, at: Tensor) -> Diagnosis:
    batch, heads, _, _ = call.q.shape
    block = max(1, BLOCK // (batch * heads * call.k.shape[2]))
    masses, open_ = zip(*(_masses(call, plan, part, some) for some in at.split(block)), strict=True)
    means = torch.cat(masses, dim=-1).mean(-1)
    if part is None:
        return Diagnosis(branch, means[0], means[1], None)
    load = _picks(part, torch.zeros(plan.shape[0], dtype=torch.int64, device=at.device), 1)[:, :, 0]
    load = load.expand(batch, heads, -1)
    counted = torch.stack(open_).any(0) | (load > 0) | (part.keys.sizes == 0)
    shots, frames = (
        _flow(part, call, labels, count).expand(batch, heads, -1, -1) for labels, count in _numbers(call.layout)
    )
    return Diagnosis(branch, means[0], means[1], Routing(means[2], means[3], load, counted, shots, _distance(frames)))


def _masses(call: Call, plan: Plan, part: Part | None, at: Tensor) -> tuple[Tensor, Tensor]:
    """The masses of plan, best keys, best pieces and random pieces at the queries `at`, (n,): (2 or 4, B, H, n).

    Also returns which pieces of the part some of these queries could have picked, bool (B, H, C).
    """
    scores, same_film = scores_of(call, at)
    softmax = scores.softmax(-1)
    mask = plan.narrow(at).dense_mask().expand_as(softmax)
    best = softmax.sort(dim=-1, descending=True).values
    found = [(softmax * mask).sum(-1), _of_first(best, mask.sum(-1))]
    if part is None:
        return torch.stack(found), mask.new_zeros(0)
    taken = part.narrow(at).mask().expand_as(softmax)
    beside = mask & ~taken
    pieces = part.keys.piece_of
    mass = per_piece(softmax * ~beside, pieces, part.keys.count)  # (B, H, n, C)
    open_ = per_piece((same_film & ~beside).int(), pieces, part.keys.count) > 0
    picked = (per_piece(taken.int(), pieces, part.keys.count) > 0).sum(-1)
    given = (softmax * beside).sum(-1)
    found.append(given + _of_first(mass.sort(dim=-1, descending=True).values, picked))
    found.append(given + mass.sum(-1) * picked / open_.sum(-1).clamp(min=1))
    return torch.stack(found), open_.any(2)


def scores_of(call: Call, at: Tensor) -> tuple[Tensor, Tensor]:
    """The scores q · k / √D of the queries `at`, (n,): (B, H, n, L), -inf outside their film, in float32 or wider.

    Also returns the keys of their film, bool (n, L).
    """
    q, k = call.q[:, :, at], call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], dim=1)
    wide = torch.promote_types(q.dtype, torch.float32)
    token = at if call.q_rows is None else call.q_rows[at]
    same_film = call.layout.sample[token][:, None] == call.layout.sample
    with torch.autocast(q.device.type, enabled=False):  # would narrow what is widened here
        scores = q.to(wide) @ k.to(wide).transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~same_film, -torch.inf), same_film


def _of_first(values: Tensor, count: Tensor) -> Tensor:
    """The sum of the first `count`, int (...), of values (..., n)."""
    return torch.nn.functional.pad(values.cumsum(-1), (1, 0)).gather(-1, count[..., None])[..., 0]


def per_piece(x: Tensor, pieces: Tensor, count: int) -> Tensor:
    """Sums of x (B|1, H|1, n, L) over pieces (B|1, H|1, L), -1 for none: (B|1, H|1, n, count)."""
    lead = broadcast_shapes(x.shape[:2], pieces.shape[:2])
    total = x.new_zeros(*lead, x.shape[2], count + 1)
    index = (pieces + 1)[:, :, None].expand(*lead, *x.shape[2:])
    return total.scatter_add_(-1, index, x.expand(*lead, -1, -1))[..., 1:]


def _numbers(layout: Layout) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
    """Shot and frame of each token, numbered through the stream, -1 for none, (L,) each; and how many there are."""
    found = []
    for values, sizes in (
        (layout.shot, [len(film.shots) for film in layout.films]),
        (layout.frame, [sum(shot.frames for shot in film.shots) for film in layout.films]),
    ):
        before = torch.tensor([0, *sizes], device=layout.device).cumsum(0)[layout.sample]
        found.append((torch.where(values < 0, -1, before + values), sum(sizes)))
    return found[0], found[1]


def _flow(part: Part, call: Call, labels: Tensor, count: int) -> Tensor:
    """Picks by label of the query × label of the piece's tokens, labels (L,): float64 (B|1, H|1, count, count)."""
    of_queries = labels if call.q_rows is None else labels[call.q_rows]
    tokens = _tally(part.keys.piece_of, part.keys.count, labels, count).transpose(-1, -2)
    share = tokens.double() / part.keys.sizes.clamp(min=1)[..., None]
    return _picks(part, of_queries, count).double() @ share


def _picks(part: Part, labels: Tensor, count: int) -> Tensor:
    """Query tokens of each label (Lq,), -1 for none, that picked each piece: int64 (B|1, H|1, count, C)."""
    if part.by_table:
        queries = _tally(part.queries.piece_of, part.queries.count, labels, count)
        return (queries.double() @ part.table.double()).long()
    edges = _token_edges(part).long()
    batch, heads = edges.shape[:2]
    place = ((labels + 1)[:, None] * (part.keys.count + 1) + edges + 1).flatten(2)
    table = edges.new_zeros(batch, heads, (count + 1) * (part.keys.count + 1))
    table.scatter_add_(-1, place, torch.ones_like(place))
    return table.view(batch, heads, count + 1, -1)[:, :, 1:, 1:]


def _tally(pieces: Tensor, count: int, labels: Tensor, most: int) -> Tensor:
    """Tokens of each label (L,) in each of `count` pieces (B|1, H|1, L): int64 (B|1, H|1, most, count)."""
    place = (labels + 1) * (count + 1) + pieces + 1
    table = place.new_zeros(*pieces.shape[:2], (most + 1) * (count + 1))
    table.scatter_add_(-1, place, torch.ones_like(place))
    return table.view(*pieces.shape[:2], most + 1, -1)[:, :, 1:, 1:]


def _token_edges(part: Part) -> Tensor:
    """The edges of each query token: bool (B|1, H|1, Lq, C) or indices (B|1, H|1, Lq, k)."""
    if part.queries.is_singles:
        return part.edges
    batch, heads = broadcast_shapes(part.edges.shape[:2], part.queries.piece_of.shape[:2])
    none = torch.nn.functional.pad(part.edges, (0, 0, 1, 0), value=False if part.by_table else -1)
    index = (part.queries.piece_of + 1)[..., None].expand(batch, heads, -1, none.shape[-1])
    return none.expand(batch, heads, -1, -1).gather(2, index)


def _as_table(edges: Tensor, count: int) -> Tensor:
    if edges.dtype == torch.bool:
        return edges
    table = torch.zeros(*edges.shape[:3], count + 1, dtype=torch.bool, device=edges.device)
    return table.scatter_(-1, edges.long() + 1, True)[..., 1:]


def _distance(flow: Tensor) -> Tensor:
    """Mean distance of a flow (B, H, n, n) between things in order, (B, H); NaN where there is none."""
    number = torch.arange(flow.shape[-1], device=flow.device)
    return (flow * (number[:, None] - number).abs()).sum((2, 3)) / flow.sum((2, 3))


def _plain(values: Any) -> Any:
    if isinstance(values, list):
        return [_plain(value) for value in values]
    return None if math.isnan(values) else values
