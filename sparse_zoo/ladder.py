"""Compare a plan's softmax mass with other choices of its size: is the router wrong, or the budget too small?

    found = ladder(attention, call)
    print({name: float(rung.mass.mean()) for name, rung in found.rungs.items()}, found.verdict())

Everything is computed from q, k, v and the plans. The papers print no such figures; the definitions are ours.

- The rungs: "method", its own choice; "best", the pieces of most softmax mass; "pooled", those of largest product of
  mean query and mean key, the rule of Mixture of Contexts (arXiv 2508.21058); "random". A method whose layout decides
  everything has the first two alone.
- The same budget: each piece of queries takes as many non-empty pieces of keys as the method gave it. Pieces are cut as
  the plan cuts them; those that overlap an anchor are cut at its bounds. They may differ in size, so each rung has its
  own number of pairs.
- Parts that nobody chose (anchors) stay. In a method that chooses nothing every part is exchanged. Several parts are
  exchanged one after the other, each beside all others as they then are, so that the best keeps at least as much as the
  method.
- Candidates are the pieces of the query's film with a key that the other parts of their plan leave. Under causality
  they are those that end before the query's own piece begins (before the query itself, where it is in none). A plan
  does not know all that a method forbids: what it chose is always a candidate, and what it may not choose can be one.
- In a branch of several key sets the rungs exchange the keys of the call alone. Pooled keys stay as the method gave
  them, also where a rung attends to their tokens; they count in `error`, not in `mass` and `pairs`.
- A token that reads the output of another query (a pruned one, by `Branch.rows`) has the keys of that query: they
  count in the token's mass, and queries choose for all tokens that read them. `pairs` are those that are computed.
- Groups cut queries and keys together, so there are no other groups to choose: queries stay in their group, and each
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

from sparse_zoo.attention import Attention, Branch, Call, Term, read_rows
from sparse_zoo.diagnostics import per_piece, scores_of
from sparse_zoo.errors import refuse, unknown
from sparse_zoo.gather import take_rows
from sparse_zoo.light import broadcast_shapes
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Part, Plan
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

    Attributes:
        mass: Share of the softmax over the film that falls on the keys, of all branches together, mean over queries.
        error: ‖out − dense‖ ÷ ‖dense‖ of the attention's outputs, over all queries.
        pairs: Query-key pairs of all branches, without those of pooled queries or keys.
        density: `pairs` ÷ the pairs of dense attention.
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
        """The `verdict` of the mean masses."""
        return verdict({name: float(rung.mass.mean()) for name, rung in self.rungs.items()})


Verdict = Literal["enough", "router", "budget"]


def verdict(mass: Mapping[str, float]) -> Verdict:
    """What to improve first, from the masses by rung.

    "enough": the method keeps at least 95 % of the softmax. Otherwise "router": a better choice of the same size would
    recover a third or more of what is missing; or "budget": only more keys would. Both bounds are ours.
    """
    if mass["method"] >= ENOUGH:
        return "enough"
    return "router" if mass["best"] - mass["method"] >= BROUGHT_BACK * (1 - mass["method"]) else "budget"


def chance(mass: Mapping[str, float]) -> bool:
    """Whether a router is no better than random: less than a tenth of the way from the random to the best choice."""
    return "random" in mass and mass["method"] - mass["random"] < 0.1 * (mass["best"] - mass["random"])


@torch.no_grad()
def ladder(attention: Attention, call: Call, *, draws: int = DRAWS, rungs: Sequence[str] = RUNGS) -> Ladder:
    """Compare a method's plans of a call with the other choices of their size.

    Computed in float32 or wider, in slices of queries. Put the method into eval mode first, unless what it drops in
    training is meant.

    Args:
        attention: The method.
        call: Its call.
        draws: Number of random choices of which "random" is the mean; they are functions of the call's seed and layer.
        rungs: The rungs to compute. All but "method" and "best" may be left out; they take more than half of the time.

    Raises:
        ZooError: If the method cannot plan the call.
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
    """A branch with the plan that runs, over all its segments at once, and the rows that tokens read."""
    rows = read_rows(branch, None if attention.text_reads == "method" else call.is_text)
    return replace(branch, plan=attention.attended(branch, call), rows=rows)


def _as_read(branch: Branch) -> Parts:
    """The parts over the call's keys, whose queries are the tokens that read the output of a query."""
    parts, rows = branch.plan.first_segment.parts, branch.rows
    return parts if rows is None else [_exchange_queries(part, _read_by(part.queries, rows)) for part in parts]


def _as_computed(branch: Branch, parts: Parts) -> Parts:
    """The same edges between the queries that are computed and the keys."""
    own = branch.plan.first_segment.parts
    return [_exchange_queries(part, was.queries) for part, was in zip(parts, own, strict=True)]


def _exchange_queries(part: Part, queries: Partition) -> Part:
    return Part(queries, part.keys, part.edges, part.routed)


def _read_by(queries: Partition, rows: Tensor) -> Partition:
    """The tokens that read a query of each piece."""
    lead = broadcast_shapes(queries.piece_of.shape[:2], rows.shape[:-1] if rows.dim() == 3 else (1, 1))
    read = rows.expand(*lead, -1)
    pieces = queries.piece_of.expand(*lead, -1).gather(2, read.clamp(min=0))
    return Partition.from_labels(pieces.masked_fill(read < 0, -1), queries.count)


def _climbed(
    attention: Attention, call: Call, branches: Sequence[Branch | Term], draws: int, rungs: Sequence[str]
) -> Ladder:
    own = [x for x in branches if isinstance(x, Branch) and x.q is x.k is x.log_weight is None]
    rest = _rest(attention, call, [x for x in branches if not any(x is y for y in own)])
    plans = [_as_read(branch) for branch in own]
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
    """The plans, one per branch, with what was routed (or, unless `routed`, every part) chosen by a rule instead."""
    found = [list(parts) for parts in plans]
    for parts in found:
        elsewhere = [part for others in found if others is not parts for part in others]
        for i, part in enumerate(parts):
            if part.edges.numel() and (part.routed or not routed):
                parts[i] = _chosen(call, part, parts[:i] + parts[i + 1 :], elsewhere, rule, causal)
    return list(found)


def _chosen(call: Call, part: Part, beside: Parts, elsewhere: Parts, rule: Rule, causal: bool) -> Part:
    """A part of the same budget, chosen by a rule among the keys that the parts `beside` it in its plan leave."""
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
    """Pieces of queries that choose together, with the tokens in them, in slices."""
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
    """Score pieces by the softmax mass that they add."""

    def score(at: Tensor, new: Tensor) -> Tensor:
        return per_piece(scores_of(call, at)[0].softmax(-1) * new, keys.piece_of, keys.count)

    return score


def _means(call: Call, keys: Partition) -> Score:
    """Score pieces by query · mean key; summed over a piece of queries it ranks as their mean does."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    means = keys.mean(_by_query_head(call.k, call).to(wide)).transpose(-1, -2)
    return lambda at, new: call.q[:, :, at].to(wide) @ means  # noqa: ARG005


def _random(draw: int) -> Rule:
    """Score pieces by random numbers; summed over a piece of queries they rank at random too."""

    def rule(call: Call, keys: Partition) -> Score:
        # A tuple of whole numbers has one hash in all processes.
        draws = torch.Generator(call.q.device).manual_seed(hash((call.seed, call.layer, draw)) % (1 << 63))

        def score(at: Tensor, new: Tensor) -> Tensor:  # noqa: ARG001
            return torch.rand(*call.q.shape[:2], len(at), keys.count, generator=draws, device=call.q.device)

        return score

    return rule


def _bars(call: Call, keys: Partition) -> Callable[[Tensor], Tensor]:
    """The pieces that causality forbids to the queries `at`: those that end no earlier than their own piece begins."""
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
    """Each rung as the mean over its choices, which hold the parts of each branch."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    values = [_by_query_head(x.tensors(call)[2], call).to(wide) for x in branches]
    v = _by_query_head(call.v, call).to(wide)
    batch, heads, length, _ = call.q.shape
    zero = torch.zeros(batch, heads, dtype=torch.float64, device=call.q.device)
    sums = {name: [(zero.clone(), zero.clone(), zero.clone()) for _ in found] for name, found in choices.items()}
    norm, dense_pairs = zero.clone(), 0
    read: dict[str, list[list[Tensor | None]]] = {name: [] for name in choices}
    for name, found in choices.items():
        for plans, (_, _, pairs) in zip(found, sums[name], strict=True):
            outs: list[Tensor | None] = []
            for branch, parts in zip(branches, plans, strict=True):
                out, computed = (None, 0) if branch.rows is None else _read(call, branch, parts)
                outs.append(out)
                pairs += computed
            read[name].append(outs)
    for at in _slices(call):
        scores, same_film = scores_of(call, at)
        softmax = scores.softmax(-1)
        dense = softmax @ v
        norm += dense.double().square().sum((2, 3))
        dense_pairs += int(same_film.sum())
        held: dict[Part, Tensor] = {}  # anchors are the same parts in every choice
        unions = [_with_pooled(call, branch, at, scores, softmax) for branch in branches]
        for name, found in choices.items():
            for plans, outs, (mass, error, pairs) in zip(found, read[name], sums[name], strict=True):
                out, union = rest[:, :, at], softmax.new_zeros(())
                for branch, parts, own, keys, known in zip(branches, plans, values, unions, outs, strict=True):
                    mask = _mask(parts, at, call, held).to(wide)
                    value = keys.attended(mask, own) if known is None else known[:, :, at]
                    out = out + _at(branch.weight, at) * value
                    union = torch.maximum(union, mask)
                    if known is None:
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
    """The output that all rungs share: terms, and branches with queries or keys of their own; (B, H, Lq, D)."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    total = torch.zeros(*call.q.shape[:3], call.v.shape[-1], dtype=wide, device=call.q.device)
    silent = call.is_text & (attention.text_reads == "text")  # as in Attention.run
    for branch in branches:
        if isinstance(branch, Term):
            total = total + branch.value.to(wide).masked_fill(silent[:, None], 0)
            continue
        q, k, v = branch.tensors(call)
        k, v = (_by_query_head(x, call).to(wide) for x in (k, v))
        outs = []
        for at in _slices(call, q.shape[2]):
            plan = branch.plan.narrow(at)
            scores = _scores(q[:, :, at].to(wide), k, plan)
            outs.append(_attended(scores, scores.softmax(-1), plan.dense_mask().to(wide), v))
        out = torch.cat(outs, dim=2)
        total = total + branch.weight * (out if branch.rows is None else take_rows(out, branch.rows))
    return total


def _read(call: Call, branch: Branch, parts: Parts) -> tuple[Tensor, Tensor]:
    """What tokens read of the outputs of a branch's queries, (B, H, Lq, D), and the pairs that took, (B, H)."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    v = _by_query_head(branch.tensors(call)[2], call).to(wide)
    computed, outs = _as_computed(branch, parts), []
    pairs = torch.zeros(call.q.shape[:2], dtype=torch.float64, device=call.q.device)
    for at in _slices(call):
        scores, _ = scores_of(call, at)
        mask = _mask(computed, at, call).to(wide)
        outs.append(_with_pooled(call, branch, at, scores, scores.softmax(-1)).attended(mask, v))
        pairs += mask.sum(-1).double().sum(-1)
    assert branch.rows is not None
    return take_rows(torch.cat(outs, dim=2), branch.rows), pairs


@dataclass(frozen=True, eq=False)
class _Keys:
    """Scores and softmax of some queries over all keys of a branch; mask of the pooled ones, which come last."""

    scores: Tensor
    softmax: Tensor
    pooled: Tensor | None

    def attended(self, mask: Tensor, v: Tensor) -> Tensor:
        """Outputs, given the mask of the call's keys and the values of all."""
        if self.pooled is not None:
            mask = torch.cat([x.expand(*self.scores.shape[:3], -1) for x in (mask, self.pooled)], dim=-1)
        return _attended(self.scores, self.softmax, mask, v)


def _with_pooled(call: Call, branch: Branch, at: Tensor, scores: Tensor, softmax: Tensor) -> _Keys:
    """Scores over the keys of all segments, given those over the call's keys."""
    if not branch.segments:
        return _Keys(scores, softmax, None)
    pooled = torch.cat([call.k if x.k is None else x.k for x in branch.segments], dim=2)
    plan = Plan.beside(*(segment.narrow(at) for segment in branch.plan.segments[1:]))
    keys, q = _by_query_head(pooled, call).to(scores.dtype), call.q[:, :, at].to(scores.dtype)
    scores = torch.cat([scores, _scores(q, keys, plan)], dim=-1)
    return _Keys(scores, scores.softmax(-1), plan.dense_mask().to(scores.dtype))


def _scores(q: Tensor, k: Tensor, plan: Plan) -> Tensor:
    """q · k / √D and the log-weights of a plan of these queries: (B, H, n, Lk)."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    for part in plan.parts:
        if part.log_weight is not None:
            scores = scores + part.log_weight[:, :, None] * part.mask()
    return scores


def _attended(scores: Tensor, softmax: Tensor, mask: Tensor, v: Tensor) -> Tensor:
    """The outputs of queries where the mask (1 or 0) holds, from their scores and softmax over all keys (B, H, n, L).

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
    """Whether keys are of the film of the queries `at`: bool (n, L)."""
    token = at if call.q_rows is None else call.q_rows[at]
    return call.layout.sample[token][:, None] == call.layout.sample


def _mask(parts: Parts, at: Tensor, call: Call, known: dict[Part, Tensor] | None = None) -> Tensor:
    """The pairs that the parts hold of the queries `at`, bool (B|1, H|1, n, L); masks in `known` are reused."""
    known = {} if known is None else known
    mask = torch.zeros(1, 1, len(at), call.k.shape[2], dtype=torch.bool, device=at.device)
    for part in parts:
        if part not in known:
            known[part] = part.narrow(at).mask()
        mask = mask | known[part]
    return mask


def _gathered(x: Tensor, place: Tensor, count: int) -> Tensor:
    """Sums of x (B|1, H|1, n, C) over queries of one place (B|1, H|1, n), -1 for none: (B|1, H|1, count, C)."""
    lead = broadcast_shapes(x.shape[:2], place.shape[:2])
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
