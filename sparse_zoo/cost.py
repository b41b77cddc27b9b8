"""The ledger: what an attention costs, counted from the plan that ran."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Exact counts of one or more attentions; they add.

    pairs: (query, key) pairs, summed over batch, heads and branches.
    dense_pairs: what one dense branch would take, batch · heads · Σ (sample length)².
    flops, flops_backward: 4 and 10 · pairs · head dim (two and five products), and once and twice what terms outside
    any softmax took; routing apart.
    routing_flops: what it took to decide who attends to whom.
    """

    pairs: int
    dense_pairs: int
    flops: int
    flops_backward: int
    routing_flops: int = 0

    @staticmethod
    def of(pairs: int, dense_pairs: int, head_dim: int, routing_flops: int = 0, term_flops: int = 0) -> Cost:
        forward, backward = 4 * pairs * head_dim + term_flops, 10 * pairs * head_dim + 2 * term_flops
        return Cost(pairs, dense_pairs, forward, backward, routing_flops)

    @property
    def density(self) -> float:
        """pairs ÷ dense pairs; with several branches it may pass 1."""
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
