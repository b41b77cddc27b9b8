"""Is the router wrong or the budget small? What a plan keeps of dense attention, beside other choices of its size.

    found = ladder(attention, call)
    print({name: float(rung.mass.mean()) for name, rung in found.rungs.items()}, found.verdict())

Everything follows from q, k, v and the plans; the papers print no such figures, and the definitions are ours.

- The rungs: "method", as it chose; "best", the pieces of most softmax mass; "pooled", those of largest product of mean
  query and mean key, the rule of Mixture of Contexts (arXiv 2508.21058); "random". Of a method whose layout decides all
  there are the first two.
- The same budget: each piece of queries takes as many non-empty pieces of keys as the method gave it. Pieces are cut as
  the plan cuts them, those that straddle an anchor at its bounds. They may differ in size, so each rung tells its own
  pairs.
- Parts that nobody chose (anchors) stay. Of a method that chooses nothing every part is exchanged. Several parts are
  exchanged one after the other, each beside all others as they then stand: so the best keeps at least what the method
  does.
- Candidates are the pieces of the query's film with a key that the other parts of their plan leave; under causality
  those that end before the query's own piece begins (before the query itself, where it is in none). A plan does not
  know all that a method forbids: what it took is a candidate in any case, what it may not take can be one too.
- Groups cut queries and keys at once, so there are no other groups to choose: the queries stay in theirs, and each
  group takes as many single keys as it has. Another grouping of the queries may keep more than this best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_zoo.attention import Attention, Branch, Call, Term
from sparse_zoo.diagnostics import per_piece, scores_of
from sparse_zoo.errors import refuse, unknown
from sparse_zoo.gather import take_rows
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Part
from sparse_zoo.schedule import Scheduled

RUNGS = ("method", "best", "pooled", "random")
DRAWS = 3
BLOCK = 1 << 21  # numbers in one table of some queries × all keys: 8 MB in float32, and a few such tables
FAINT = 1e-30
ENOUGH, BROUGHT_BACK = 0.95, 1 / 3

Parts = Sequence[Part]
Score = Callable[[Tensor, Tensor], Tensor]
"""(query tokens, int64 (n,); keys that no other part holds for them, bool (B|1, H|1, n, L)) -> their scores of the key
pieces, (B, H, n, C). A piece of queries chooses by the sum over its tokens."""
Rule = Callable[[Call, Partition], Score]


@dataclass(frozen=True, eq=False)
class Rung:
    """One choice, float64 (B, H) each.

    mass: share of the softmax over the film that lies on the keys, of all branches together, mean over queries.
    error: ‖out − dense‖ ÷ ‖dense‖ of the attention's outputs, over all queries.
    pairs: (query, key) pairs of all branches, those of pooled queries or keys left out; density: ÷ those of dense.
    """

    mass: Tensor
    error: Tensor
    pairs: Tensor
    density: Tensor


@dataclass(frozen=True, eq=False)
class Ladder:
    """The rungs by name, in the order of `RUNGS`."""

    rungs: dict[str, Rung]

    def means(self) -> dict[str, dict[str, float]]:
        """{rung: {"mass", "error", "density"}}, means over batch items and heads."""
        return {
            name: {key: float(getattr(rung, key).mean()) for key in ("mass", "error", "density")}
            for name, rung in self.rungs.items()
        }

    def verdict(self) -> Verdict:
        """`verdict` of the mean masses."""
        return verdict({name: float(rung.mass.mean()) for name, rung in self.rungs.items()})


Verdict = Literal["enough", "router", "budget"]


def verdict(mass: Mapping[str, float]) -> Verdict:
    """What to mend first, from the masses by rung.

    "enough": the method keeps at least 95 % of the softmax. Else "router": a better choice of the same size would bring
    back a third or more of what is missing; "budget": it would not, only more keys would. Both bounds are ours.
    """
    if mass["method"] >= ENOUGH:
        return "enough"
    return "router" if mass["best"] - mass["method"] >= BROUGHT_BACK * (1 - mass["method"]) else "budget"


def chance(mass: Mapping[str, float]) -> bool:
    """Whether a router is as good as none: under a tenth of the way from random to best choice."""
    return "random" in mass and mass["method"] - mass["random"] < 0.1 * (mass["best"] - mass["random"])


@torch.no_grad()
def ladder(attention: Attention, call: Call, *, draws: int = DRAWS, rungs: Sequence[str] = RUNGS) -> Ladder:
    """What a method's plans of a call keep of dense attention, beside the other choices of their size.

    Of the `rungs` those beside "method" and "best" may be left out; they take more than half of the time. "random" is a
    mean over `draws`, which are functions of the call's seed and layer. Computed in float32 at least, in slices of
    queries. Put the method into eval mode first, unless what it drops in training is meant. Raises ZooError where the
    method cannot plan the call.
    """
    refuse(
        "ladder",
        [f"draws must be at least 1, got {draws}"] * (draws < 1)
        + [unknown("rung", rung, RUNGS) for rung in rungs if rung not in RUNGS],
    )
    if isinstance(attention, Scheduled):  # its features are named by phase; the phase makes its own again
        attention, call = attention.at(call.step), replace(call, features=None)
    call = attention.ready(call)
    branches = [x if isinstance(x, Term) else _as_run(attention, x, call) for x in attention.branches(call)]
    with torch.autocast(call.q.device.type, enabled=False):  # would narrow what is widened here
        return _climbed(attention, call, branches, draws, rungs)


def _as_run(attention: Attention, branch: Branch, call: Call) -> Branch:
    """A branch with the plan that runs, over all its segments at once."""
    _, k, v = branch.tensors(call) if branch.segments else (None, branch.k, branch.v)
    return replace(branch, plan=attention.attended(branch, call), k=k, v=v, log_weight=None, segments=())


def _climbed(
    attention: Attention, call: Call, branches: Sequence[Branch | Term], draws: int, rungs: Sequence[str]
) -> Ladder:
    own = [x for x in branches if isinstance(x, Branch) and x.q is x.k is x.rows is None and not x.plan.weighs_keys]
    rest = _rest(attention, call, [x for x in branches if not any(x is y for y in own)])
    plans: list[Parts] = [branch.plan.parts for branch in own]
    chosen = any(part.routed for parts in plans for part in parts)

    def by(rule: Rule) -> list[Parts]:
        return _exchanged(call, plans, rule, routed=chosen, causal=attention.causality is not None)

    choices: dict[str, list[list[Parts]]] = {"method": [plans], "best": [by(_mass)]}
    if chosen and "pooled" in rungs:
        choices["pooled"] = [by(_means)]
    if chosen and "random" in rungs:
        choices["random"] = [by(_random(draw)) for draw in range(draws)]
    return Ladder(_measured(call, own, rest, choices))


# -- choosing -------------------------------------------------------------------------------------------------------


def _exchanged(call: Call, plans: Sequence[Parts], rule: Rule, *, routed: bool, causal: bool) -> list[Parts]:
    """The plans, one a branch, with what was routed (or, unless `routed`, with every part) chosen by a rule instead."""
    found = [list(parts) for parts in plans]
    for parts in found:
        elsewhere = [part for others in found if others is not parts for part in others]
        for i, part in enumerate(parts):
            if part.edges.numel() and (part.routed or not routed):
                parts[i] = _chosen(call, part, parts[:i] + parts[i + 1 :], elsewhere, rule, causal)
    return list(found)


def _chosen(call: Call, part: Part, beside: Parts, elsewhere: Parts, rule: Rule, causal: bool) -> Part:
    """A part of the same budget, chosen by a rule among what the parts `beside` it in its plan leave."""
    by_token = part.routed and part.grouping
    keys = Partition.singles(part.keys.length, call.q.device) if by_token else part.keys
    score, bars = rule(call, keys), _bars(call, keys) if causal else None
    tables = []
    for pieces, stretches in _slabs(call, part.queries):
        some = Part(Partition.singles(len(pieces), call.q.device), part.keys, part.edges[:, :, pieces])
        taken = some.mask() if by_token else some.table & (keys.sizes > 0)[:, :, None]
        total = torch.zeros((), device=call.q.device).expand(*call.q.shape[:2], len(pieces), keys.count)
        left = barred = torch.zeros_like(total, dtype=torch.int32)
        for at in stretches:
            place = part.queries.piece_of[:, :, at] - pieces[0]
            free = _same_film(call, at) & ~_mask(beside, at, call)
            total = total + _gathered(score(at, free & ~_mask(elsewhere, at, call)), place, len(pieces))
            left = left + _gathered(per_piece(free.int(), keys.piece_of, keys.count), place, len(pieces))
            if bars is not None:
                barred = barred + _gathered(bars(at).int(), place, len(pieces))
        tables.append(_largest(total, (left > 0) & (barred == 0) | taken, taken.sum(-1)))
    width = max(table.shape[-1] for table in tables)
    edges = torch.cat([pad(table, (0, width - table.shape[-1]), value=-1) for table in tables], dim=2)
    return Part(part.queries, keys, edges)


def _slabs(call: Call, queries: Partition) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Pieces of queries that choose together, with the tokens that are in them, in slices."""
    if queries.is_singles:
        yield from ((at, [at]) for at in _slices(call))
    else:
        yield torch.arange(queries.count, device=call.q.device), _slices(call)


def _largest(scores: Tensor, candidates: Tensor, number: Tensor) -> Tensor:
    """Indices of the candidates of largest score (B, H, Q, C), ties to the earlier: `number` (B|1, H|1, Q), then -1."""
    order = scores.masked_fill(~candidates, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    most = int(number.max()) if number.numel() else 0
    late = torch.arange(most, device=order.device) >= number[..., None]
    return order[..., :most].masked_fill(late, -1).int()


def _mass(call: Call, keys: Partition) -> Score:
    """By what softmax mass they add."""

    def score(at: Tensor, new: Tensor) -> Tensor:
        return per_piece(scores_of(call, at)[0].softmax(-1) * new, keys.piece_of, keys.count)

    return score


def _means(call: Call, keys: Partition) -> Score:
    """By query · mean key; summed over a piece of queries it ranks as their mean does."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    means = keys.mean(_by_query_head(call.k, call).to(wide)).transpose(-1, -2)
    return lambda at, new: call.q[:, :, at].to(wide) @ means  # noqa: ARG005


def _random(draw: int) -> Rule:
    """By random numbers; summed over a piece of queries they rank at random too."""

    def rule(call: Call, keys: Partition) -> Score:
        # A tuple of whole numbers has one hash in all processes.
        draws = torch.Generator(call.q.device).manual_seed(hash((call.seed, call.layer, draw)) % (1 << 63))

        def score(at: Tensor, new: Tensor) -> Tensor:  # noqa: ARG001
            return torch.rand(*call.q.shape[:2], len(at), keys.count, generator=draws, device=call.q.device)

        return score

    return rule


def _bars(call: Call, keys: Partition) -> Callable[[Tensor], Tensor]:
    """Which pieces causality forbids to the queries `at`: those that end no earlier than their own piece begins."""
    token = torch.arange(keys.length, device=call.q.device)
    pieces = keys.piece_of
    place = (pieces + 1, token.expand(pieces.shape))
    none = token.new_zeros(*pieces.shape[:2], keys.count + 1)
    begin = (none + keys.length).scatter_reduce(2, *place, "amin")
    end = (none - 1).scatter_reduce(2, *place, "amax")
    own = torch.where(pieces < 0, token, begin.gather(2, pieces + 1))
    own = own if call.q_rows is None else own[:, :, call.q_rows]
    return lambda at: end[:, :, None, 1:] >= own[:, :, at, None]


# -- measuring ------------------------------------------------------------------------------------------------------


def _measured(
    call: Call, branches: Sequence[Branch], rest: Tensor, choices: Mapping[str, Sequence[Sequence[Parts]]]
) -> dict[str, Rung]:
    """Each rung over the mean of its choices, which hold the parts of each branch."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    values = [_by_query_head(call.v if x.v is None else x.v, call).to(wide) for x in branches]
    v = _by_query_head(call.v, call).to(wide)
    batch, heads, length, _ = call.q.shape
    zero = torch.zeros(batch, heads, dtype=torch.float64, device=call.q.device)
    sums = {name: [(zero.clone(), zero.clone(), zero.clone()) for _ in found] for name, found in choices.items()}
    norm, dense_pairs = zero.clone(), 0
    for at in _slices(call):
        scores, same_film = scores_of(call, at)
        softmax = scores.softmax(-1)
        dense = softmax @ v
        norm += dense.double().square().sum((2, 3))
        dense_pairs += int(same_film.sum())
        held: dict[Part, Tensor] = {}  # anchors are the same parts in every choice
        for name, found in choices.items():
            for plans, (mass, error, pairs) in zip(found, sums[name], strict=True):
                out, union = rest[:, :, at], softmax.new_zeros(())
                for branch, parts, own in zip(branches, plans, values, strict=True):
                    mask = _mask(parts, at, call, held).to(wide)
                    out = out + _at(branch.weight, at) * _attended(scores, softmax, mask, own)
                    union = torch.maximum(union, mask)
                    pairs += mask.sum(-1).double().sum(-1)
                mass += (softmax * union).sum(-1).double().sum(-1)
                error += (out - dense).double().square().sum((2, 3))
    rungs = {}
    for name, each in sums.items():
        figures = [(mass / length, (error / norm).sqrt(), pairs) for mass, error, pairs in each]
        mass, error, pairs = (torch.stack(x).mean(0) for x in zip(*figures, strict=True))
        rungs[name] = Rung(mass, error, pairs, pairs / dense_pairs)
    return rungs


def _rest(attention: Attention, call: Call, branches: Sequence[Branch | Term]) -> Tensor:
    """What the same is in every rung: terms, and branches on queries or keys of their own. (B, H, Lq, D)"""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    total = torch.zeros(*call.q.shape[:3], call.v.shape[-1], dtype=wide, device=call.q.device)
    is_text = call.layout.is_text if call.q_rows is None else call.layout.is_text[call.q_rows]
    silent = is_text & (attention.text_reads == "text")  # as in Attention.run
    for branch in branches:
        if isinstance(branch, Term):
            total = total + branch.value.to(wide).masked_fill(silent[:, None], 0)
            continue
        q, k, v = branch.tensors(call)
        k, v = (_by_query_head(x, call).to(wide) for x in (k, v))
        outs = []
        for at in _slices(call, q.shape[2]):
            scores = q[:, :, at].to(wide) @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            plan = branch.plan.narrow(at)
            for part in plan.parts:
                if part.log_weight is not None:
                    scores = scores + part.log_weight[:, :, None] * part.mask()
            outs.append(_attended(scores, scores.softmax(-1), plan.dense_mask().to(wide), v))
        out = torch.cat(outs, dim=2)
        if branch.rows is not None:
            out = take_rows(out, branch.rows.masked_fill(silent, -1) if branch.pools_queries else branch.rows)
        total = total + branch.weight * out
    return total


def _attended(scores: Tensor, softmax: Tensor, mask: Tensor, v: Tensor) -> Tensor:
    """What queries get of v where the mask (1 or 0) holds, from their scores and softmax over all keys (B, H, n, L).

    0 for a query without keys.
    """
    kept = softmax * mask
    total = kept.sum(-1, keepdim=True)
    if bool((total < FAINT).any()):  # beside the largest of all keys nothing is left of these: they get their own scale
        kept = scores.masked_fill(mask == 0, -torch.inf)
        top = kept.amax(-1, keepdim=True)
        kept = (kept - top.masked_fill(top == -torch.inf, 0)).exp()
        total = kept.sum(-1, keepdim=True)
    return (kept @ v) / total.clamp(min=FAINT)


# -- slices of queries ----------------------------------------------------------------------------------------------


def _slices(call: Call, length: int | None = None) -> list[Tensor]:
    """The numbers of all queries, in slices whose table of scores is bounded."""
    batch, heads, own, _ = call.q.shape
    rows = max(1, BLOCK // (batch * heads * call.k.shape[2]))
    return list(torch.arange(own if length is None else length, device=call.q.device).split(rows))


def _same_film(call: Call, at: Tensor) -> Tensor:
    """bool (n, L)"""
    token = at if call.q_rows is None else call.q_rows[at]
    return call.layout.sample[token][:, None] == call.layout.sample


def _mask(parts: Parts, at: Tensor, call: Call, known: dict[Part, Tensor] | None = None) -> Tensor:
    """What the parts hold of the queries `at`, bool (B|1, H|1, n, L); a part's mask is looked up in `known` first."""
    known = {} if known is None else known
    mask = torch.zeros(1, 1, len(at), call.k.shape[2], dtype=torch.bool, device=at.device)
    for part in parts:
        if part not in known:
            known[part] = part.narrow(at).mask()
        mask = mask | known[part]
    return mask


def _gathered(x: Tensor, place: Tensor, count: int) -> Tensor:
    """Sums of x (B|1, H|1, n, C) over queries of one place (B|1, H|1, n), -1 for none: (B|1, H|1, count, C)."""
    lead = torch.broadcast_shapes(x.shape[:2], place.shape[:2])
    total = x.new_zeros(*lead, count + 1, x.shape[-1])
    index = (place + 1)[..., None].expand(*lead, -1, x.shape[-1])
    return total.scatter_add_(2, index, x.expand(*lead, -1, -1))[:, :, 1:]


def _by_query_head(x: Tensor, call: Call) -> Tensor:
    """Keys or values (B, Hk, L, D) of each query head: (B, H, L, D)."""
    return x.repeat_interleave(call.q.shape[1] // x.shape[1], dim=1)


def _at(weight: Tensor | float, at: Tensor) -> Tensor | float:
    """A branch's weight at some queries."""
    whole = not isinstance(weight, Tensor) or weight.dim() < 2 or weight.shape[-2] == 1
    return weight if whole else weight[..., at, :]  # type: ignore[index]
