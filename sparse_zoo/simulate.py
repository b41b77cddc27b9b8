"""The cost of a method at a real size, from its plan on random values: no weights, no attention, no L × L."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_zoo.attention import Attention, Call, Term
from sparse_zoo.cost import Cost
from sparse_zoo.errors import ZooError
from sparse_zoo.layout import Layout
from sparse_zoo.plan import Plan
from sparse_zoo.registry import build

SLAB = 1 << 14
"""Tokens whose features are made at once."""


@dataclass(frozen=True)
class Simulated:
    """One layer's counts, for the whole batch and all heads.

    Attributes:
        cost: As `Result.cost()` would return it, routing included.
        branch_pairs: The pairs of each softmax.
        term_flops: Forward FLOPs of outputs outside any softmax.
        plan_bytes: Bytes of the plans' index tables.
        executed: Pairs that the kernel's tiles multiply; None without a kernel.
        simulated: (batch items, heads) whose plans were built; the others are counted as equal to them.
    """

    cost: Cost
    branch_pairs: tuple[int, ...]
    term_flops: int
    plan_bytes: int
    executed: int | None
    simulated: tuple[int, int]


def simulate(
    method: str,
    layout: Layout,
    *,
    heads: int,
    head_dim: int,
    dim: int | None = None,
    batch: int = 1,
    settings: Mapping[str, Any] | None = None,
    every_head: bool = False,
    kernel: str | None = None,
    seed: int = 0,
) -> Simulated:
    """Build a method as initialised and its plans for random q, k and hidden.

    Which chunks or groups a token gets is therefore random; how many pairs that makes is exact where chunks are of one
    length and groups are balanced. At most two batch items and two heads are simulated (two tell what they share from
    what each has of its own), `every_head` all heads. Raises `ZooError` where the method refuses its settings, or needs
    more than q, k and hidden to plan.
    """
    some = min(batch, 2), heads if every_head else min(heads, 2)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        attention = build(method, heads=some[1], head_dim=head_dim, dim=dim, **(settings or {})).eval()
        call = random_call(attention, layout, some, seed)
        try:
            branches = attention.branches(call)
            plans = [attention.attended(branch, call) for branch in branches if not isinstance(branch, Term)]
        except (ZooError, TypeError, AttributeError, KeyError) as error:
            raise ZooError(
                f"{method} cannot be planned from random q, k and hidden alone, which is all there is without a "
                f"model: {error}"
            ) from error
        terms = sum(branch.flops for branch in branches if isinstance(branch, Term))
        pairs = tuple(_scaled(int(plan.pairs.sum()), plan, batch, heads) for plan in plans)
        executed = None
        if kernel is not None:
            executed = sum(_scaled(plan.executed(kernel), plan, batch, heads) for plan in plans)
        cost = Cost.of(
            sum(pairs),
            batch * heads * layout.dense_pairs,
            head_dim,
            attention.routing_flops(shape_only(layout, batch, heads, head_dim, dim or some[1] * head_dim)),
        )
    terms = terms * batch * heads // (some[0] * some[1])
    return Simulated(cost, pairs, terms, plan_bytes(plans, some, batch, heads), executed, some)


def random_call(attention: Attention, layout: Layout, some: tuple[int, int], seed: int) -> Call:
    """A call with random q, k and hidden for `some` (batch items, heads), v equal to k, and the method's features."""
    draws = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(*some, len(layout), attention.head_dim, generator=draws) for _ in range(2))
    hidden = _windows(some[0], len(layout), attention.dim or some[1] * attention.head_dim, draws)
    slabs = [attention.features(part) for part in hidden.split(SLAB, dim=1)]
    features = {name: torch.cat([slab[name] for slab in slabs], dim=1) for name in slabs[0]}
    return Call(q, k, k, layout, hidden=hidden, features=features, step=0, seed=seed)


def shape_only(layout: Layout, batch: int, heads: int, head_dim: int, dim: int) -> Call:
    """A call of this shape without values, for `routing_flops`, which reads shapes alone."""
    q = torch.zeros(1).expand(batch, heads, len(layout), head_dim)
    return Call(q, q, q, layout, hidden=torch.zeros(1).expand(batch, len(layout), dim), step=0)


def plan_bytes(plans: list[Plan], some: tuple[int, int], batch: int, heads: int) -> int:
    """Bytes of the index tables of plans of `some` (batch items, heads), scaled to `batch` and `heads`.

    A table that plans or parts share counts once; one that batch items or heads share counts once for them.
    """
    held: dict[int, int] = {}
    for part in (part for plan in plans for part in plan.parts):
        for table in (
            part.edges,
            *(x for p in (part.queries, part.keys) for x in (p.offsets, p.order) if x is not None),
        ):
            own = batch if table.shape[0] == some[0] else 1, heads if table.shape[1] == some[1] else 1
            each = table.nbytes // (table.shape[0] * table.shape[1])
            held[table.data_ptr()] = each * own[0] * own[1]
    return sum(held.values())


def _windows(batch: int, length: int, dim: int, draws: torch.Generator) -> Tensor:
    """(B, L, dim), each token a standard normal vector: overlapping windows of one stream of noise, held once."""
    noise = torch.randn(batch, length + dim, generator=draws)
    return noise.as_strided((batch, length, dim), (length + dim, 1, 1))


def _scaled(count: int, plan: Plan, batch: int, heads: int) -> int:
    """A sum over the batch items and heads in which a plan differs, scaled to all of them."""
    counted = plan.batch_heads[0] * plan.batch_heads[1]
    return count * batch * heads // counted
