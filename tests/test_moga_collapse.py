"""MoGA's router collapses by itself without the balance loss, and does not with it.

A layer of MoGA, routed groups alone, learns to tell each film's hidden cause from noisy tokens. Nothing in the task
speaks for one group: what collapses the router is the gate. The output p(g|x) · attention starts too small, so every
token raises the probability of its own group and lowers the others. In what tokens have in common (the router's bias,
and the mean of hidden) these pulls add up to (share - 1/M) / M for a group of that share: larger groups grow.

So collapse needs hidden that is mostly common to all tokens, as a layer's input is; without a common part tokens keep
groups of their own, which the last test holds. `python tests/test_moga_collapse.py` prints the figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from tiers import cases
from torch import Tensor, nn
from torch.nn.functional import mse_loss, one_hot

from sparse_zoo import Layout, Shot
from sparse_zoo.methods.moga import MoGA

FILM = Layout.film([Shot(2, 4, 4), Shot(1, 4, 4)])
DIM, HEADS, GROUPS, CAUSES, BATCH = 16, 2, 4, 4, 8
STEPS, RATE = 150, 4e-3

Balance = Literal["printed", "switch"]


class Layer(nn.Module):
    def __init__(self, alpha: float, balance: Balance) -> None:
        super().__init__()
        self.attention = MoGA(
            heads=HEADS,
            head_dim=DIM // HEADS,
            dim=DIM,
            groups=GROUPS,
            mix=("group",),
            alpha=alpha,
            balance=balance,
            kernel="reference",  # the faster one for 48 tokens
        )
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self.qkv(hidden).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        result = self.attention(q, k, v, FILM, hidden=hidden)
        return self.out(result.out.transpose(1, 2).flatten(2)), result.losses


@dataclass(frozen=True)
class Films:
    """hidden = common + cause · directions + noise, wanted is a linear function of the cause; all of unit scale but
    the cause's part of hidden, 0.3 of it."""

    draws: torch.Generator
    common: Tensor
    directions: Tensor
    wanted: Tensor

    @staticmethod
    def of(seed: int, common: float) -> Films:
        draws = torch.Generator().manual_seed(seed)
        directions, wanted = (torch.randn(CAUSES, DIM, generator=draws) for _ in range(2))
        return Films(draws, common * torch.randn(DIM, generator=draws), 0.3 * directions, wanted / CAUSES**0.5)

    def batch(self, size: int = BATCH) -> tuple[Tensor, Tensor]:
        cause = torch.randn(size, 1, CAUSES, generator=self.draws)
        noise = torch.randn(size, len(FILM), DIM, generator=self.draws)
        return self.common + cause @ self.directions + noise, (cause @ self.wanted).expand(-1, len(FILM), -1)


def trained(alpha: float, balance: Balance = "printed", *, seed: int, common: float = 1.0) -> tuple[float, float]:
    """The largest group's share of the tokens of fresh films, and the entropy of the shares, 1 for equal ones."""
    torch.manual_seed(seed)
    layer, films = Layer(alpha, balance), Films.of(100 + seed, common)
    optimizer = torch.optim.Adam(layer.parameters(), lr=RATE)
    for _ in range(STEPS):
        hidden, wanted = films.batch()
        out, losses = layer(hidden)
        loss = mse_loss(out, wanted) + sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        group = layer.attention.features(films.batch(64)[0])["group"]
    share = one_hot(group, GROUPS).double().mean((0, 1))
    return float(share.max()), float(torch.special.entr(share).sum()) / math.log(GROUPS)


@pytest.mark.parametrize("seed", cases([0, 1, 2], [0]))
def test_without_the_balance_loss_nearly_all_tokens_end_in_one_group(seed: int) -> None:
    share, entropy = trained(0.0, seed=seed)
    assert share > 0.95
    assert entropy < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("seed", cases([0, 1], [0]))
@pytest.mark.parametrize("balance", ["printed", "switch"])
def test_with_the_balance_loss_groups_stay_in_use(balance: Balance, seed: int) -> None:
    share, entropy = trained(0.5, balance, seed=seed)
    assert share < 0.6
    assert entropy > 0.7


@pytest.mark.parametrize("seed", [0, 1])
def test_tokens_with_nothing_in_common_do_not_gather_in_one_group(seed: int) -> None:
    share, entropy = trained(0.0, seed=seed, common=0.0)
    assert share < 0.6
    assert entropy > 0.6


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases: list[tuple[float, Balance, float]] = [(0.0, "printed", 1.0), (0.0, "printed", 0.0)]
    cases += [(alpha, balance, 1.0) for alpha in (0.1, 0.5) for balance in ("printed", "switch")]
    for alpha, balance, common in cases:
        found = [trained(alpha, balance, seed=seed, common=common) for seed in range(6)]
        said = ", ".join(f"{share:.2f} ({entropy:.2f})" for share, entropy in found)
        print(f"alpha {alpha} {balance}, common {common}: largest share (entropy) {said}", flush=True)
