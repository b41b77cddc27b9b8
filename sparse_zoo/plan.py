"""A plan: who attends to whom, as a set of full rectangles (query tokens × key tokens), each pair at most once.

A plan is stored as parts. A part is pieces of the queries × pieces of the keys × the edges between them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_zoo.cost import Cost
from sparse_zoo.errors import refuse
from sparse_zoo.layout import Layout
from sparse_zoo.light import broadcast_shapes
from sparse_zoo.partition import Partition, refine
from sparse_zoo.remember import Cached, lazy, on_device, origin, remembered


@dataclass(frozen=True, eq=False)
class Part(Cached):
    """Pieces of queries, pieces of keys, and which attends to which.

    `edges` is a bool table (B|1, H|1, Q, K) over pieces, or the indices (B|1, H|1, Q, k) of the key pieces that each
    query piece attends to, -1 for none, without repeats. `routed` says that the edges, or who is in which piece, were
    chosen by values (q, k, hidden), not by the layout: nothing is computed differently for it, diagnostics look there.
    `log_weight` (B|1, H|1, Lk), without gradient, is added to the scaled scores of each key; None: 0.
    """

    queries: Partition
    keys: Partition
    edges: Tensor
    routed: bool = False
    log_weight: Tensor | None = None

    def __post_init__(self) -> None:
        want = (self.queries.count, self.keys.count)
        given = tuple(self.edges.shape)
        is_table = self.edges.dtype == torch.bool
        refuse(
            "Part",
            [
                f"edges must have 4 dimensions, got {given}" if self.edges.dim() != 4 else "",
                f"edges are for {given[2]} query pieces, there are {want[0]}"
                if len(given) == 4 and given[2] != want[0]
                else "",
                f"the table of edges is for {given[3]} key pieces, there are {want[1]}"
                if len(given) == 4 and is_table and given[3] != want[1]
                else "",
                f"edges must be bool or int, got {self.edges.dtype}"
                if self.edges.is_floating_point() or self.edges.is_complex()
                else "",
                *self._wrong_weights(),
            ],
        )

    def _wrong_weights(self) -> list[str]:
        weight = self.log_weight
        if weight is None:
            return []
        shape = tuple(weight.shape)
        return [
            f"log_weight must be (B|1, H|1, {self.keys.length}), got {shape}"
            if weight.dim() != 3 or shape[2] != self.keys.length
            else "",
            f"log_weight must be a floating-point tensor, got {weight.dtype}" if not weight.is_floating_point() else "",
            "log_weight passes no gradient on: detach it" if weight.requires_grad else "",
        ]

    @property
    def device(self) -> torch.device:
        """The device of the edges."""
        return self.edges.device

    @property
    def by_table(self) -> bool:
        """Whether the edges are a bool table, not indices."""
        return self.edges.dtype == torch.bool

    @lazy
    def batch_heads(self) -> tuple[int, int]:
        """The (B|1, H|1) in which this part differs."""
        held = [self.edges, self.queries.offsets, self.keys.offsets]
        held += [order for order in (self.queries.order, self.keys.order) if order is not None]
        batch, heads = broadcast_shapes(*(x.shape[:2] for x in held))
        return batch, heads

    @lazy
    def table(self) -> Tensor:
        """The edges as a bool table (B|1, H|1, Q, K)."""
        if self.by_table:
            return self.edges
        table = torch.zeros(*self.edges.shape[:3], self.keys.count + 1, dtype=torch.bool, device=self.edges.device)
        return table.scatter_(-1, self.edges.long() + 1, True)[..., 1:]

    @lazy
    def grouping(self) -> bool:
        """Whether each piece of several queries attends to the key piece of the same number, as in groups."""
        if self.by_table or self.queries.is_singles or self.edges.shape[2:] != (self.keys.count, 1):
            return False
        order = torch.arange(self.keys.count, device=self.edges.device)
        return bool((self.edges[..., 0] == order).all())

    def pairs(self) -> Tensor:
        """Number of query-key pairs: int64 (B|1, H|1), without an L × L mask."""
        queries, keys = self.queries.sizes, self.keys.sizes
        if self.by_table:
            # float64 counts exactly up to 2^53, which no film reaches; a whole table would take eight times its bytes.
            column = keys.double()[..., None]
            reached = torch.cat([rows.double() @ column for rows in self.edges.split(1024, dim=2)], dim=2)[..., 0]
        else:
            batch, heads = broadcast_shapes(keys.shape[:2], self.edges.shape[:2])
            padded = torch.nn.functional.pad(keys, (1, 0)).expand(batch, heads, -1)
            edges = (self.edges.long() + 1).expand(batch, heads, -1, -1)
            reached = padded.gather(-1, edges.flatten(2)).view(edges.shape).sum(-1).double()
        return (queries.double() * reached).sum(-1).long()

    def mask(self) -> Tensor:
        """The dense mask, bool (B|1, H|1, Lq, Lk): for small streams."""
        batch, heads = self.batch_heads
        table = torch.nn.functional.pad(self.table, (1, 0, 1, 0)).expand(batch, heads, -1, -1)
        rows = (self.queries.piece_of + 1).expand(batch, heads, -1)
        cols = (self.keys.piece_of + 1).expand(batch, heads, -1)
        table = table.gather(2, rows[..., None].expand(-1, -1, -1, table.shape[-1]))
        return table.gather(3, cols[:, :, None].expand(-1, -1, table.shape[2], -1))

    def at(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether there is an edge between pieces: ints (B|1, H|1, n, 1) and (B|1, H|1, n|1, m) -> bool (B, H, n, m).

        -1 on either side has no edge.
        """
        batch, heads = broadcast_shapes(queries.shape[:2], keys.shape[:2], self.edges.shape[:2])
        flat = (queries.clamp(min=0) * self.keys.count + keys.clamp(min=0)).expand(batch, heads, -1, -1)
        found = self.table.flatten(2).expand(batch, heads, -1).gather(2, flat.flatten(2)).view(flat.shape)
        return found & (queries >= 0) & (keys >= 0)

    def minus(self, other: Part) -> Part:
        """The pairs of this part that `other` does not hold, exactly: overlapping pieces are cut at other's bounds."""
        queries, keys = refine(self.queries, other.queries), refine(self.keys, other.keys)
        if not (queries.meets and keys.meets):
            return self
        edges = _take(self.edges, queries.of_a, 2, -1)
        rows, children = queries.of_b[..., None], keys.children
        if self.by_table or children is None:
            table = _take(_take(self.table, queries.of_a, 2, False), keys.of_a, 3, False)
            left = table & ~other.at(rows, keys.of_b[:, :, None])
            return Part(queries.pieces, keys.pieces, left, self.routed, self.log_weight)
        children = torch.nn.functional.pad(children, (0, 0, 1, 0), value=-1)  # row 0: the children of "none"
        cut = children[edges.long() + 1].flatten(3)
        taken = other.at(rows, torch.nn.functional.pad(keys.of_b[0, 0], (1, 0), value=-1)[cut + 1])
        return Part(queries.pieces, keys.pieces, cut.masked_fill(taken, -1), self.routed, self.log_weight)

    def narrow(self, rows: Tensor) -> Part:
        """The queries at `rows` only, int64 (n,), in that order."""
        edges = self.edges[:, :, rows] if self.queries.is_singles else self.edges
        return replace(self, queries=self.queries.narrow(rows), edges=edges)

    def keep(self, where: Tensor) -> Part:
        """The queries where `where`, bool (Lq,) or (B|1, H|1, Lq), holds; the others have no edge."""
        if self.queries.is_singles:
            edges = self.edges & where[..., None] if self.by_table else self.edges.masked_fill(~where[..., None], -1)
            return replace(self, edges=edges)
        labels = self.queries.piece_of.masked_fill(~where, -1)
        queries = Partition.from_labels(labels, self.queries.count, self.queries.layout)
        return replace(self, queries=queries)

    def placed(self, before: int, length: int) -> Part:
        """The same pairs over `length` keys, `before` of which come before the first of this part's.

        Cached with the part, which a layout's plan brings each time.
        """
        known: dict[tuple[int, int], Part] = self.__dict__.setdefault("_placed", {})
        if (before, length) not in known:
            found = origin(self)
            with torch.inference_mode(False):
                if found is not None:
                    known[before, length] = on_device(found.host.placed(before, length), found.device)
                else:
                    weight, after = self.log_weight, length - before - self.keys.length
                    weight = None if weight is None else torch.nn.functional.pad(weight, (before, after))
                    known[before, length] = replace(self, keys=self.keys.placed(before, length), log_weight=weight)
        return known[before, length]


@dataclass(frozen=True, eq=False, init=False)
class Plan(Cached):
    """Parts that share no pair. Queries attend, in one softmax, to all keys that any part gives them.

    `segments` are the plans that `beside` joined, none for a plan over one key set.
    """

    parts: tuple[Part, ...]
    segments: tuple[Plan, ...] = ()

    def __init__(self, *parts: Part, segments: tuple[Plan, ...] = ()) -> None:
        refuse("Plan", _mismatches(parts))
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "segments", segments)

    # -- makers ------------------------------------------------------------------------------------------------------

    @staticmethod
    def dense(layout: Layout) -> Plan:
        """Every token attends to every token of its sample."""
        return _dense(layout)

    @staticmethod
    def within(pieces: Partition) -> Plan:
        """Every token attends to the tokens of its piece."""
        return Plan(Part(pieces, pieces, torch.arange(pieces.count, device=pieces.device)[None, None, :, None]))

    @staticmethod
    def groups(
        q_labels: Tensor, k_labels: Tensor | None = None, count: int | None = None, *, routed: bool = False
    ) -> Plan:
        """Queries attend to the keys of the same label.

        Args:
            q_labels: int (L,) or (B|1, H|1, L), 0 … count - 1, -1 for none. A label that two films share joins them.
            k_labels: The same for keys; None for `q_labels`.
            count: Number of labels; None to derive it.
            routed: See `Part`.
        """
        k_labels = q_labels if k_labels is None else k_labels
        if count is None:
            count = max(int(labels.max()) + 1 if labels.numel() else 0 for labels in (q_labels, k_labels))
        queries = Partition.from_labels(q_labels, count)
        keys = queries if k_labels is q_labels else Partition.from_labels(k_labels, count)
        return Plan(Part(queries, keys, torch.arange(count, device=queries.device)[None, None, :, None], routed))

    @staticmethod
    def routed(chunks: Partition, chosen: Tensor) -> Plan:
        """Each query token attends to the chunks that it chose.

        Args:
            chunks: Pieces of the keys.
            chosen: int (B|1, H|1, Lq, k), -1 for none, without repeats; or bool (B|1, H|1, Lq, chunks).
        """
        return Plan(Part(Partition.singles(chosen.shape[2], chosen.device), chunks, chosen, routed=True))

    @staticmethod
    def blocks(query_pieces: Partition, key_pieces: Partition, wanted: Tensor, *, routed: bool = False) -> Plan:
        """Query pieces attend to key pieces where `wanted` is True.

        Args:
            query_pieces: Pieces of the queries.
            key_pieces: Pieces of the keys.
            wanted: bool (Q, K) or (B|1, H|1, Q, K), or the indices of `Part.edges`.
            routed: See `Part`.
        """
        return Plan(Part(query_pieces, key_pieces, wanted[None, None] if wanted.dim() == 2 else wanted, routed))

    def __or__(self, other: Plan) -> Plan:
        """The exact union: all pairs of this plan, then those that `other` adds."""
        added = []
        for part in other.parts:
            for held in self.parts:
                part = part.minus(held)
            added.append(part)
        return Plan(*self.parts, *added)

    @staticmethod
    def beside(*plans: Plan) -> Plan:
        """One softmax over several key sets, that of each plan after that of the one before: (Lq, Σ Lk)."""
        length = sum(plan.shape[1] for plan in plans)
        parts, before = [], 0
        for plan in plans:
            parts += [part.placed(before, length) for part in plan.parts]
            before += plan.shape[1]
        return Plan(*parts, segments=plans)

    def weighted(self, log_weight: Tensor) -> Plan:
        """The same pairs, with `log_weight` (B|1, H|1, Lk) added to the scaled scores of each key."""
        return Plan(*(replace(part, log_weight=log_weight) for part in self.parts))

    # -- what it says ------------------------------------------------------------------------------------------------

    @property
    def first_segment(self) -> Plan:
        """The plan over the first key set, which is the plan itself where there is one."""
        return self.segments[0] if self.segments else self

    @property
    def weighs_keys(self) -> bool:
        """Whether any part has log-weights."""
        return any(part.log_weight is not None for part in self.parts)

    @property
    def device(self) -> torch.device:
        """The device of the parts."""
        return self.parts[0].device

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of queries and keys, (Lq, Lk)."""
        return self.parts[0].queries.length, self.parts[0].keys.length

    @lazy
    def batch_heads(self) -> tuple[int, int]:
        """The (B|1, H|1) in which this plan differs."""
        batch, heads = broadcast_shapes(*(part.batch_heads for part in self.parts))
        return batch, heads

    def dense_mask(self) -> Tensor:
        """The dense mask, bool (B|1, H|1, Lq, Lk): for small streams, the oracle and pictures."""
        batch, heads = self.batch_heads
        mask = torch.zeros(batch, heads, *self.shape, dtype=torch.bool, device=self.parts[0].edges.device)
        for part in self.parts:
            mask |= part.mask()
        return mask

    @lazy
    def pairs(self) -> Tensor:
        """Number of pairs, int64 (B|1, H|1)."""
        batch, heads = self.batch_heads
        return torch.stack([part.pairs().expand(batch, heads) for part in self.parts]).sum(0)

    def cost(
        self, head_dim: int, *, layout: Layout | None = None, batch: int | None = None, heads: int | None = None
    ) -> Cost:
        """Exact counts for `batch` items and `heads` heads, by default those in which the plan differs.

        Without a layout (given, or known to the pieces) dense attention is counted as all queries × all keys.
        """
        known = [p.layout for part in self.parts for p in (part.queries, part.keys) if p.layout is not None]
        layout = layout or (known[0] if known else None)
        batch, heads = batch or self.batch_heads[0], heads or self.batch_heads[1]
        dense = layout.dense_pairs if layout else self.shape[0] * self.shape[1]
        return Cost.of(int(self.pairs.expand(batch, heads).sum()), batch * heads * dense, head_dim)

    def executed(self, kernel: str, *, batch: int | None = None, heads: int | None = None) -> int:
        """Pairs that a kernel's tiles multiply for this plan, padding included."""
        from sparse_zoo.kernels import get

        return get(kernel).executed(self, batch or self.batch_heads[0], heads or self.batch_heads[1])

    def narrow(self, rows: Tensor) -> Plan:
        """The plan of the queries at `rows`, int64 (n,), in that order."""
        return Plan(*(part.narrow(rows) for part in self.parts))

    def keep(self, where: Tensor) -> Plan:
        """The plan of the queries where `where`, bool (Lq,) or (B|1, H|1, Lq), holds; others attend to nothing."""
        return Plan(*(part.keep(where) for part in self.parts))

    def validate(self) -> Plan:
        """Check that every index is in range and no pair is held twice, without an L × L mask.

        Returns:
            This plan.

        Raises:
            ZooError: If a check fails.
        """
        reasons = []
        for i, part in enumerate(self.parts):
            if not part.by_table:
                ordered = part.edges.long().sort(dim=-1).values
                low, high = (int(ordered.min()), int(ordered.max())) if ordered.numel() else (-1, -1)
                if low < -1 or high >= part.keys.count:
                    reasons.append(f"part {i} has edges {low} … {high}; allowed are -1 … {part.keys.count - 1}")
                    continue
                if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
                    reasons.append(f"part {i} names a key piece twice for one query piece")
                    continue
            for j, held in enumerate(self.parts[:i]):
                twice = int((part.pairs() - part.minus(held).pairs()).sum())
                if twice:
                    reasons.append(f"parts {j} and {i} hold {twice} pairs both; join them with `|`")
        refuse("plan", reasons)
        return self


@remembered(32)
def _dense(layout: Layout) -> Plan:
    return Plan.within(layout.partition())


def _mismatches(parts: tuple[Part, ...]) -> list[str]:
    if not parts:
        return ["needs at least one part"]
    shapes = {(part.queries.length, part.keys.length) for part in parts}
    return [f"parts are for streams of different lengths (queries, keys): {sorted(shapes)}"] if len(shapes) > 1 else []


def named(table: Tensor, most: int) -> Tensor:
    """Which entries of each row of a bool table (..., K) are True: int64 (..., most), ascending, then -1.

    Nothing waits for a GPU, so that only on the CPU a row with more entries is noticed: there it raises `ZooError`.

    Args:
        table: bool (..., K).
        most: The largest number of True entries of a row, at most K.
    """
    if table.device.type == "cpu" and most < table.shape[-1] and table.numel():
        count = int(table.sum(-1).max())
        refuse("edges", [f"a row keeps {count} entries; at most {most} were promised"] if count > most else [])
    found = table.byte().sort(dim=-1, descending=True, stable=True).indices[..., :most]
    return found.masked_fill(torch.arange(most, device=table.device) >= table.sum(-1, keepdim=True), -1)


def _take(edges: Tensor, pieces: Tensor, dim: int, none: int) -> Tensor:
    """Edges (B|1, H|1, Q, K) at `pieces`, int64 (B|1, H|1, P), of dimension 2 or 3; `none` where a piece is -1."""
    batch, heads = broadcast_shapes(edges.shape[:2], pieces.shape[:2])
    index = pieces.expand(batch, heads, -1).unsqueeze(5 - dim)
    shape = list(edges.shape)
    shape[:2], shape[dim] = [batch, heads], pieces.shape[-1]
    taken = edges.expand(batch, heads, -1, -1).gather(dim, index.clamp(min=0).expand(shape))
    return taken.masked_fill(index < 0, none)
