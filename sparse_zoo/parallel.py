"""Sequence parallelism: one attention over tokens that lie on several ranks (DeepSpeed-Ulysses, arXiv 2309.14509).

Each rank holds contiguous tokens of the stream. For attention the ranks exchange tokens for heads, so that each has all
tokens of some heads; the method attends as on one device, and the output goes back to where its tokens are. A method
decides for each head by the whole stream, so what it chooses, draws and caches is what one device chooses.

**Gradients.** One convention holds everywhere. Each of the P ranks computes the same loss, from what was gathered. The
backward of an exchange is the exchange back; the backward of a gather sums over the ranks. What one rank's backward
gives is then P times the part of the gradient that flows through its own tokens, and the mean over the ranks is the
gradient. FSDP and DDP average gradients over all ranks, so nothing else has to be scaled: no loss is divided by P.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sparse_zoo.attention import Attention, Result
from sparse_zoo.errors import refuse
from sparse_zoo.layout import Layout
from sparse_zoo.light import opaque

BACKENDS = ("gloo", "mpi", "nccl", "ucc", "xccl")
"""Backends of torch.distributed that exchange parts of unequal sizes (`all_to_all_single`)."""


class Peers(Protocol):
    """The ranks that share a stream: their number, which of them this is, and how they exchange tensors."""

    rank: int
    size: int

    def all_to_all(self, sent: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send `sent[i]` to rank i, and return what each rank sent to this one, of these shapes. Has no gradient."""
        ...


class Group:
    """The ranks of a DeviceMesh of one dimension, which exchange through torch.distributed.

    Args:
        mesh: A mesh of one dimension, such as `mesh["sequence"]` of a larger one.

    Raises:
        ZooError: If the mesh has several dimensions, or its backend has no all-to-all.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        several = mesh.ndim != 1
        backends = set() if several else _backends(mesh)
        refuse(
            "sequence parallelism",
            [
                f"the mesh has {mesh.ndim} dimensions {mesh.mesh_dim_names}; give one of them, as mesh['sequence']"
                if several
                else "",
                *(
                    f"the backend {backend!r} cannot exchange parts of unequal sizes; allowed are {', '.join(BACKENDS)}"
                    for backend in sorted(backends - set(BACKENDS))
                ),
            ],
        )
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()

    def all_to_all(self, sent: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send `sent[i]` to rank i, and return what each rank sent to this one."""
        counts = [math.prod(shape) for shape in shapes]
        flat = torch.cat([part.reshape(-1) for part in sent])
        got = flat.new_empty(sum(counts))
        dist.all_to_all_single(got, flat, counts, [part.numel() for part in sent], group=self.group)
        return [part.view(*shape) for part, shape in zip(got.split(counts), shapes, strict=True)]


class Ulysses:
    """Runs an attention whose tokens lie on several ranks.

        mesh = init_device_mesh("cuda", (4,), mesh_dim_names=("sequence",))
        result = Ulysses(mesh).run(attention, q, k, v, layout, hidden=hidden, layer=3, layers=30, step=step)

    Rank r of P holds part r of the stream as `split_sizes` cuts it: contiguous tokens, the first ranks one more where P
    does not divide their number. The gradients' convention is told at the top of this module.

    Args:
        mesh: The ranks that share a stream: a DeviceMesh of one dimension, or `Peers` of one's own.

    Raises:
        ZooError: If the mesh has several dimensions, or its backend has no all-to-all.
    """

    def __init__(self, mesh: DeviceMesh | Peers) -> None:
        self.peers: Peers = Group(mesh) if isinstance(mesh, DeviceMesh) else mesh

    @property
    def rank(self) -> int:
        """The number of this rank among those that share the stream."""
        return self.peers.rank

    @property
    def size(self) -> int:
        """How many ranks share the stream."""
        return self.peers.size

    def own(self, count: int) -> slice:
        """Which of `count` tokens of the stream lie on this rank."""
        sizes = split_sizes(count, self.size)
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def gather(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        """The parts of all ranks, in their order, on every rank.

        Args:
            x: This rank's part.
            dim: The dimension along which the parts are joined.
            sizes: The size of each rank's part along `dim`.

        Returns:
            The whole, the same on all ranks; its backward sums over them.
        """
        return x if self.size == 1 else cast(Tensor, _Gather.apply(x, self.peers, dim, tuple(sizes)))

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the ranks of a tensor that has one shape on all of them; its backward sums over them."""
        return self.gather(x[None], 0, [1] * self.size).mean(0)

    @opaque  # as the attention itself: one opaque step
    def run(
        self,
        attention: Attention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        *,
        q_rows: Tensor | None = None,
        hidden: Tensor | None = None,
        features: dict[str, Tensor] | None = None,
        head_offset: int = 0,
        **context: Any,
    ) -> Result:
        """Attend, called as the attention itself is.

        Where there are fewer key heads than ranks, or their number is not a multiple of P, each key head is sent as
        often as it takes for every rank to have those that its query heads read: lcm(Hk, P) / Hk times.

        Args:
            attention: The method.
            q: This rank's queries, (B, H, lq, D).
            k: This rank's keys, (B, Hk, l, D).
            v: This rank's values, (B, Hk, l, D).
            layout: All L tokens of the stream.
            q_rows: int64 (Lq,): which tokens of the stream are queries, all ranks' together; this rank's `q` holds
                its part of them. None: all of them.
            hidden: This rank's (B, l, dim), what q, k, v were projected from. Features are computed from it here and
                gathered; the whole of it is on no rank.
            features: This rank's features, (B, l, …) each, where they are computed already.
            head_offset: The place of q's first head among the model's.
            context: Further fields of `Call`, the same on all ranks. `memory` stays with the rank.

        Returns:
            The attention's result. `out` (B, H, lq, D) is of this rank's tokens; plans and costs are of its H / P
            heads; losses are means over the ranks, the same on all of them.

        Raises:
            ZooError: If the heads do not divide, the method cannot be split, or a tensor does not match the layout.
        """
        layout = layout.to(q.device)
        if self.size == 1:
            given = {"q_rows": q_rows, "hidden": hidden, "features": features, "head_offset": head_offset}
            return cast(Result, attention(q, k, v, layout, **given, **context))
        refuse(
            f"sequence parallelism over {self.size} ranks",
            why_not(attention, q.shape[1], self.size) + self._mismatches(q, k, v, hidden, layout, q_rows),
        )
        tokens = split_sizes(len(layout), self.size)
        rows = tokens if q_rows is None else split_sizes(len(q_rows), self.size)
        if features is None:
            features = {} if hidden is None else attention.features(hidden)
        gathered = {name: self.gather(x, 1, tokens) for name, x in features.items()}
        copies = key_copies(k.shape[1], self.size)
        if copies > 1:
            k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
        q, k, v = self._to_heads(q, rows), self._to_heads(k, tokens), self._to_heads(v, tokens)
        # Called as a module, not by `run`, so that hooks on the attention see what it is given.
        result: Result = attention(
            q,
            k,
            v,
            layout,
            q_rows=q_rows,
            features=None if hidden is None and not features else gathered,
            head_offset=head_offset + self.rank * q.shape[1],
            **context,
        )
        made: Result = replace(
            result,
            out=self._to_tokens(result.out, rows),
            losses={name: self.mean(loss) for name, loss in result.losses.items()},
            heads=q.shape[1],
        )
        return made

    def _mismatches(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, layout: Layout, q_rows: Tensor | None
    ) -> list[str]:
        queries = len(layout) if q_rows is None else len(q_rows)
        own, own_queries = (split_sizes(count, self.size)[self.rank] for count in (len(layout), queries))
        given = {"q": (q.shape[2], own_queries), "k": (k.shape[2], own), "v": (v.shape[2], own)}
        if hidden is not None:
            given["hidden"] = (hidden.shape[1], own)
        return [
            f"{name} has {count} tokens; rank {self.rank} holds {wanted} of the stream's {len(layout)}"
            for name, (count, wanted) in given.items()
            if count != wanted
        ]

    def _to_heads(self, x: Tensor, tokens: Sequence[int]) -> Tensor:
        """(B, H, l, D) of this rank's tokens -> (B, H / P, L, D) of its heads."""
        heads = [x.shape[1] // self.size] * self.size
        return cast(Tensor, _Exchange.apply(x, self.peers, (1, heads), (2, tokens)))

    def _to_tokens(self, x: Tensor, tokens: Sequence[int]) -> Tensor:
        """(B, H / P, L, D) of this rank's heads -> (B, H, l, D) of its tokens."""
        heads = [x.shape[1]] * self.size
        return cast(Tensor, _Exchange.apply(x, self.peers, (2, tokens), (1, heads)))


def split_sizes(count: int, ranks: int) -> list[int]:
    """How many of `count` contiguous tokens (or rows) each of `ranks` ranks holds: the first ones one more."""
    return [count // ranks + (rank < count % ranks) for rank in range(ranks)]


def key_copies(key_heads: int, ranks: int) -> int:
    """How often each key head is sent, so that every rank has the key heads that its query heads read."""
    return math.lcm(key_heads, ranks) // key_heads


def why_not(attention: Attention, heads: int, ranks: int) -> list[str]:
    """Every reason why an attention of `heads` query heads cannot be split over `ranks` ranks; none where it can.

    Args:
        attention: The method, built.
        heads: Query heads.
        ranks: Ranks that share a stream.

    Returns:
        The reasons, one sentence each.
    """
    if ranks == 1:
        return []
    return [
        f"{heads} heads cannot be shared by {ranks} ranks; the number of ranks must divide the number of heads"
        if heads % ranks
        else "",
        f"{type(attention).__name__} needs all heads on one device: {attention.needs_all_heads}"
        if attention.needs_all_heads is not None
        else "",
    ]


def exchanged_elements(
    tokens: int,
    ranks: int,
    rank: int = 0,
    *,
    heads: int,
    head_dim: int,
    key_heads: int | None = None,
    features: int = 0,
    batch: int = 1,
) -> tuple[int, int]:
    """How many numbers one rank sends to others for one attention, in its forward and its backward pass.

    With l tokens of L on this rank, H query heads of D channels, n copies of Hk key heads and F numbers of features a
    token, all times the batch size: the forward sends l (P - 1) / P · D (H + 2 n Hk) of q, k and v, (L - l) D H / P of
    the output and (P - 1) l F of features. The backward sends (L - l) / P · D (H + 2 n Hk) of the gradients of q, k
    and v, l (P - 1) / P · D H of that of the output, and (L - l) F of those of features.

    Args:
        tokens: L, tokens of the stream.
        ranks: P, ranks that share it.
        rank: Which of them.
        heads: H.
        head_dim: D.
        key_heads: Hk; as many as query heads, when None.
        features: F, numbers of features a token that carry gradient.
        batch: Batch items.

    Returns:
        The elements sent in the forward and in the backward pass; auxiliary losses, a few scalars, are not counted.
    """
    own = split_sizes(tokens, ranks)[rank]
    keys = key_heads or heads
    each = (heads + 2 * keys * key_copies(keys, ranks)) // ranks * head_dim  # of q, k, v, of a token, to one rank
    out = heads // ranks * head_dim
    forward = own * (ranks - 1) * each + (tokens - own) * out + (ranks - 1) * own * features
    backward = (tokens - own) * each + own * (ranks - 1) * out + (tokens - own) * features
    return batch * forward, batch * backward


Cut = tuple[int, Sequence[int]]
"""A dimension, and the sizes of the parts along it that belong to each rank."""


class _Exchange(torch.autograd.Function):
    """Cut along one dimension and send the parts; join what comes along another. Backward: the exchange back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers, cut: Cut, join: Cut) -> Tensor:
        ctx.peers, ctx.cut, ctx.join = peers, cut, join
        return _exchange(x, peers, cut, join)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _exchange(grads[0], ctx.peers, ctx.join, ctx.cut), None, None, None


class _Gather(torch.autograd.Function):
    """The parts of all ranks along one dimension. Backward: the sum over ranks of the own part's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers, dim: int, sizes: Sequence[int]) -> Tensor:
        ctx.peers, ctx.dim, ctx.sizes = peers, dim, sizes
        shapes = [[*x.shape[:dim], size, *x.shape[dim + 1 :]] for size in sizes]
        return torch.cat(peers.all_to_all([x.contiguous()] * peers.size, shapes), dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _sum_own(grads[0], ctx.peers, ctx.dim, ctx.sizes), None, None, None


def _sum_own(x: Tensor, peers: Peers, dim: int, sizes: Sequence[int]) -> Tensor:
    """The sum over ranks of the part of x that belongs to this one."""
    parts = [part.contiguous() for part in x.split(list(sizes), dim)]
    return torch.stack(peers.all_to_all(parts, [parts[peers.rank].shape] * peers.size)).sum(0)


def _exchange(x: Tensor, peers: Peers, cut: Cut, join: Cut) -> Tensor:
    (cut_dim, cut_sizes), (join_dim, join_sizes) = cut, join
    shapes = []
    for size in join_sizes:
        shape = list(x.shape)
        shape[cut_dim], shape[join_dim] = cut_sizes[peers.rank], size
        shapes.append(shape)
    return torch.cat(peers.all_to_all(x.split(list(cut_sizes), cut_dim), shapes), join_dim)


def _backends(mesh: DeviceMesh) -> set[str]:
    """The backend that serves the mesh's device."""
    config = dist.get_backend_config(mesh.get_group())  # "cpu:gloo,cuda:nccl", or one for all
    served = dict(pair.split(":", 1) for pair in config.split(",") if ":" in pair)
    return {served.get(mesh.device_type, config)}
