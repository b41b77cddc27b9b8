"""Choosing by means: chunks for a query, without the (L × C) table of scores in memory, and shots for a shot."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_zoo.attention import Attention, Call
from sparse_zoo.blocks import products
from sparse_zoo.draws import BITS, uniform
from sparse_zoo.errors import refuse
from sparse_zoo.gather import add_at
from sparse_zoo.kernels.triton import routing as fused
from sparse_zoo.layout import Layout
from sparse_zoo.partition import Partition
from sparse_zoo.remember import remembered
from sparse_zoo.selectors import first_largest

BLOCK_SCORES = 1 << 20
"""Scores held at once on a CPU, whose cache they fit; elsewhere as many as `slice_of` says."""


@dataclass(frozen=True)
class Drops:
    """MoC's random changes of a choice in training, by draws that all batch items share.

    Of a query's n chosen chunks floor(p·n) are taken off, p uniform in [0, `off`): never all, since p < 1. Then m more
    come in from the legal chunks that were not chosen, m Poisson of mean `into`: all of these, where they are fewer.
    The paper's: both rules. Ours: what was taken off does not come back.
    """

    call: Call
    off: float
    into: float

    def most(self, count: int) -> int:
        """The most chunks that come in, of `count`: fixed by `into` alone, so that shapes do not depend on draws."""
        return min(len(_poisson_table(self.into, torch.device("cpu"))), count) if self.into else 0

    def __call__(self, chosen: Tensor, legal: Tensor, rows: slice) -> Tensor:
        """Take chunks off a choice, and bring others in.

        Args:
            chosen: What was chosen, int64 (B, H, rows, k), -1 last.
            legal: What could be chosen, bool (rows, C).
            rows: Which queries these are.

        Returns:
            `chosen` with -1 where a chunk was taken off, then `most(C)` columns of what came in, -1 for none.
        """
        changed = chosen
        if self.off:
            number = (chosen >= 0).sum(-1, keepdim=True)
            fewer = (number * (self.off * uniform(self.call, "drop-off: share", 1, rows).double())).floor()
            order = uniform(self.call, "drop-off: which", chosen.shape[-1], rows).expand(chosen.shape)
            place = order.masked_fill(chosen < 0, 1.0).argsort(dim=-1, stable=True).argsort(dim=-1)
            changed = chosen.masked_fill(place < fewer, -1)
        if self.into:
            rest = torch.nn.functional.pad(legal, (1, 0)).repeat(*chosen.shape[:2], 1, 1)
            rest = rest.scatter_(-1, chosen + 1, False)[..., 1:]
            order = uniform(self.call, "drop-in: which", rest.shape[-1], rows)
            came = first_largest((-order).expand(rest.shape).masked_fill(~rest, -torch.inf), self.most(rest.shape[-1]))
            table = _poisson_table(self.into, chosen.device)
            more = torch.searchsorted(table, uniform(self.call, "drop-in: number", 1, rows).double(), right=True)
            late = torch.arange(came.shape[-1], device=came.device) >= more
            changed = torch.cat([changed, came.masked_fill(late, -1)], dim=-1)
        return changed


@remembered(16)
def _poisson_table(mean: float, device: torch.device) -> Tensor:
    """P(m <= 0), P(m <= 1), … of a Poisson number m, float64, up to the last that a draw of `BITS` bits can pass.

    The number for a draw u is how many of these are at most u.
    """
    chances: list[float] = []
    while len(chances) <= mean or chances[-1] >= 2.0**-BITS:
        m = len(chances)
        chances.append(math.exp(m * math.log(mean) - mean - math.lgamma(m + 1)))
    below = torch.tensor(chances, dtype=torch.float64).cumsum(0)
    return below[below <= 1 - 2.0**-BITS].to(device)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Chunks of keys, and which of them each token may choose.

    Attributes:
        chunks: The cut.
        kind: int64 (L,), of which kind each token is.
        legal: bool (kinds, C), which chunks a token of each kind may choose.
    """

    chunks: Partition
    kind: Tensor
    legal: Tensor

    def best(self, method: Attention, call: Call, top_k: int, drops: Drops | None = None) -> Tensor:
        """The `top_k` best chunks of each query, int32 (B, H, Lq, k), -1 for none: see `top_chunks`."""
        given = (call.q, call.k, self.chunks, self.legal, call.at(self.kind), top_k, drops)
        return top_chunks(*given, on_device=method.on_device(call))

    def flops(self, call: Call) -> int:
        """Pooling of k, and one product for each query, head and chunk."""
        batch, heads, length, dim = call.q.shape
        return batch * dim * (2 * heads * length * self.chunks.count + call.k.shape[1] * call.k.shape[2])


def from_blocks(blocks: Partition, legal: Tensor) -> Candidates:
    """Candidates of tokens that choose by their own block: legal, bool (blocks, blocks); text chooses nothing."""
    own = blocks.piece_of[0, 0]
    return Candidates(blocks, own.where(own >= 0, blocks.count), torch.nn.functional.pad(legal, (0, 0, 0, 1)))


@torch.no_grad()
def top_chunks(
    q: Tensor,
    k: Tensor,
    chunks: Partition,
    legal: Tensor,
    kind: Tensor,
    top_k: int,
    drops: Drops | None = None,
    on_device: bool = False,
) -> Tensor:
    """The `top_k` legal chunks c of largest q · mean(K_c), ties to the earlier chunk, changed by `drops` if given.

    q (B, H, Lq, D), k (B, Hk, Lk, D); scores are float32 and unscaled. `legal`, bool (kinds, C), says which chunks a
    kind of query may choose, `kind`, int64 (Lq,), of which kind each query is. Returns int32 (B, H, Lq, min(top_k, C)),
    best first, -1 where there are fewer; with `drops` -1 also where one was taken off, and what came in after them.

    With `on_device`, where Triton can (`kernels.triton.routing.fits`) and without `drops`, in two kernels and without a
    slice of scores in memory: sums are rounded in another order there, as those of any two devices are.
    """
    if on_device and drops is None and fused.fits(q, chunks, top_k):
        return fused.top_chunks(q, k, chunks, legal, kind, top_k)
    top_k = min(top_k, chunks.count)
    width = top_k + (drops.most(chunks.count) if drops else 0)
    chosen = torch.empty(*q.shape[:3], width, dtype=torch.int32, device=q.device)
    if not width:
        return chosen
    most = BLOCK_SCORES if q.device.type == "cpu" else None
    for rows, scores in products(q, chunks.mean(k.float()), most):
        legal_here = legal[kind[rows]]
        best = first_largest(scores.masked_fill_(~legal_here, -torch.inf), top_k)
        chosen[:, :, rows] = (drops(best, legal_here, rows) if drops else best).int()
    return chosen


def balance(p: Tensor, group: Tensor, layout: Layout, *, assigned_alone: bool) -> Tensor:
    """Σ_i F_i P_i over the groups i of a router, averaged over films and batch items: small if groups are used alike.

    Args:
        p: The router's softmax (B, L, groups), through which the gradient passes.
        group: What each token is assigned to, int64 (B, L).
        layout: The stream; text does not count.
        assigned_alone: P_i sums p over the tokens assigned to i, instead of over all tokens.

    Returns:
        A scalar. F_i is the share of a film's video tokens that are assigned to i, P_i a sum over its number of tokens.
    """
    video = _videos(layout)
    p, group = p[:, video.tokens], group[:, video.tokens]
    taken = (group[..., None] == torch.arange(p.shape[-1], device=group.device)).to(p.dtype)

    def per_film(x: Tensor) -> Tensor:
        total = add_at(x.new_zeros(len(x), len(video.number), x.shape[-1]), 1, video.film, x)
        return total / video.number.to(p.dtype)[:, None]

    share, mass = per_film(taken), per_film(p * taken if assigned_alone else p)
    return (share * mass).sum(-1).mean()


class _Videos(NamedTuple):
    """Video tokens, int64 (n,), the film of each, and the number of tokens of each film that has any."""

    tokens: Tensor
    film: Tensor
    number: Tensor


@remembered(32)
def _videos(layout: Layout) -> _Videos:
    tokens = (~layout.is_text).nonzero()[:, 0]
    _, film, number = torch.unique(layout.sample[tokens], return_inverse=True, return_counts=True)
    return _Videos(tokens, film, number)


@torch.no_grad()
def top_shots(x: Tensor, layout: Layout, shot: int, count: int) -> Tensor:
    """The `count` shots before `shot` whose mean has the largest product with its own: MoC's outer loop.

    The paper's appendix: what of a long film enters the context at all is chosen before any attention, by
    mean(X of the shot) · mean(X of an earlier shot). Ours: X is whatever enters the first block, captions of the shots
    included; products are float32; ties go to the earlier shot.

    x (B, L, dim), `layout` of one film and L tokens. Returns int64 (B, min(count, shot)), for each batch item in the
    film's order. Warns where fewer shots precede than were asked for; raises `ZooError` for what does not fit.
    """
    shots = len(layout.films[0].shots)
    refuse(
        "top_shots",
        [
            f"the layout must hold one film, got {len(layout.films)}" if len(layout.films) != 1 else "",
            f"x must be (B, {len(layout)}, dim), got {tuple(x.shape)}"
            if x.dim() != 3 or x.shape[1] != len(layout)
            else "",
            f"shot must be 0 … {shots - 1}, got {shot}" if not 0 <= shot < shots else "",
            f"count must be at least 0, got {count}" if count < 0 else "",
        ],
    )
    if count > shot:
        warnings.warn(f"top_shots: {count} shots before shot {shot} were asked for, there are {shot}", stacklevel=2)
    pieces = layout.to(x.device).chunks("shot", captions="inside")
    means = pieces.mean(x.float()[:, None])[:, 0, pieces.count - shots :]  # the global caption comes first
    scores = (means[:, :shot] @ means[:, shot, :, None])[..., 0]
    best = scores.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return best.sort(dim=-1).values
