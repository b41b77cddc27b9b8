"""Cost of attention, counted from the plan that ran."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Exact counts of one or more attention calls; they can be added.

    Attributes:
        pairs: Query-key pairs, summed over batch items, heads and branches.
        dense_pairs: Pairs of one dense branch, batch · heads · Σ (sample length)².
        flops: Forward FLOPs without routing: 4 · pairs · head dim (two products), plus terms outside any softmax.
        flops_backward: Backward FLOPs: 10 · pairs · head dim (five products), plus twice the terms.
        routing_flops: FLOPs of deciding who attends to whom.
    """

    pairs: int
    dense_pairs: int
    flops: int
    flops_backward: int
    routing_flops: int = 0

    @staticmethod
    def of(pairs: int, dense_pairs: int, head_dim: int, routing_flops: int = 0, term_flops: int = 0) -> Cost:
        """The cost of a number of pairs."""
        forward, backward = 4 * pairs * head_dim + term_flops, 10 * pairs * head_dim + 2 * term_flops
        return Cost(pairs, dense_pairs, forward, backward, routing_flops)

    @property
    def density(self) -> float:
        """`pairs` ÷ `dense_pairs`; with several branches it may exceed 1."""
        return self.pairs / self.dense_pairs

    @property
    def bound(self) -> float:
        """The largest speedup over dense attention that the pair count allows."""
        return self.dense_pairs / self.pairs if self.pairs else float("inf")

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.pairs + other.pairs,
            self.dense_pairs + other.dense_pairs,
            self.flops + other.flops,
            self.flops_backward + other.flops_backward,
            self.routing_flops + other.routing_flops,
        )
