"""Pieces of a stream: each token is in one piece or in none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_zoo.errors import ZooError
from sparse_zoo.gather import add_at
from sparse_zoo.light import broadcast_shapes
from sparse_zoo.remember import Cached, lazy, origin, remembered

if TYPE_CHECKING:
    from sparse_zoo.layout import Layout


@dataclass(frozen=True, eq=False)
class Partition(Cached):
    """Ragged pieces of a stream of `length` tokens, possibly different for each batch item and head.

    Piece p of batch item b and head h holds the tokens `order[b, h, offsets[b, h, p] : offsets[b, h, p + 1]]`, in
    stream order. `order` is int32 (B|1, H|1, n), or None where pieces are consecutive tokens of the stream; `offsets`
    is int32 (B|1, H|1, P + 1). A piece may be empty.
    """

    order: Tensor | None
    offsets: Tensor
    length: int
    layout: Layout | None = field(default=None, repr=False)

    @staticmethod
    def from_labels(labels: Tensor, count: int, layout: Layout | None = None) -> Partition:
        """Pieces by label 0 … count - 1; -1 is in no piece. `labels`: int (B|1, H|1, L), or (L,) shared by all."""
        labels = labels.expand(1, 1, -1) if labels.dim() == 1 else labels
        rest = torch.where(labels < 0, count, labels).long()
        sizes = torch.zeros(*labels.shape[:2], count + 1, dtype=torch.int64, device=labels.device)
        sizes = sizes.scatter_add_(2, rest, torch.ones_like(rest))[..., :count]
        offsets = torch.nn.functional.pad(sizes.cumsum(-1), (1, 0)).int()
        order: Tensor | None = rest.argsort(dim=-1, stable=True).int()
        # Pieces that lie in the stream one after the other need no order. A GPU would make the host wait for that.
        if labels.device.type == "cpu" and labels.shape[:2] == (1, 1) and bool((rest[0, 0].diff() >= 0).all()):
            order = None
        return Partition(order, offsets, labels.shape[-1], layout)

    @staticmethod
    def singles(length: int, device: torch.device | str = "cpu") -> Partition:
        """A partition in which every token is a piece."""
        return _singles(length, torch.device(device))

    @property
    def count(self) -> int:
        """Number of pieces P, empty ones included."""
        return self.offsets.shape[-1] - 1

    def __len__(self) -> int:
        return self.count

    @property
    def device(self) -> torch.device:
        """The device of the pieces."""
        return self.offsets.device

    @property
    def shared(self) -> bool:
        """Whether every batch item and head has the same pieces."""
        return self.offsets.shape[:2] == (1, 1) and (self.order is None or self.order.shape[:2] == (1, 1))

    @lazy
    def is_singles(self) -> bool:
        """Whether piece p is token p, for every token."""
        return self.order is None and self.count == self.length and bool((self.sizes == 1).all())

    @lazy
    def sizes(self) -> Tensor:
        """Tokens in each piece, int64 (B|1, H|1, P)."""
        return self.offsets.long().diff(dim=-1)

    @lazy
    def longest(self) -> int:
        """Tokens in the largest piece."""
        return int(self.sizes.max()) if self.count else 0

    @lazy
    def piece_of(self) -> Tensor:
        """The piece of each token, -1 for none: int64 (B|1, H|1, L)."""
        batch, heads = self.offsets.shape[:2]
        held = self.length if self.order is None else self.order.shape[-1]
        place = torch.arange(held, device=self.device).expand(batch, heads, held).contiguous()
        # Empty pieces share their bound with the next one: the last piece that starts at or before a place holds it.
        piece = torch.searchsorted(self.offsets.long().contiguous(), place, right=True) - 1
        piece = piece.masked_fill((piece >= self.count) | (piece < 0), -1)
        if self.order is None:
            return piece
        order = self.order.long()
        shape = broadcast_shapes(order.shape[:2], piece.shape[:2])
        labels = torch.full((*shape, self.length), -1, device=self.device)
        return labels.scatter_(2, order.expand(*shape, -1), piece.expand(*shape, -1))

    def of(self, values: Tensor) -> Tensor:
        """The value that the tokens of each piece share: int64 (P,), -1 where they differ or the piece is empty.

        `values` is int or bool (L,). The pieces must be shared by batch items and heads.
        """
        self._require_shared("of")
        piece, values = self.piece_of[0, 0], values.long()
        held = piece >= 0
        low, high = (
            torch.full((self.count,), -1, device=self.device).scatter_reduce(
                0, piece[held], values[held], reduce, include_self=False
            )
            for reduce in ("amin", "amax")
        )
        return torch.where(low == high, low, -1)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of x over each piece: (B, H, L, D) -> (B, H, P, D), 0 for an empty piece. Differentiable."""
        batch, heads, _, dim = x.shape
        piece = self.piece_of.expand(batch, heads, -1).flatten(0, 1)
        first = torch.arange(batch * heads, device=x.device)[:, None] * (self.count + 1)
        place = first + torch.where(piece < 0, self.count, piece)
        total = x.new_zeros(batch * heads * (self.count + 1), dim)
        total = add_at(total, 0, place.flatten(), x.reshape(-1, dim))
        total = total.view(batch, heads, self.count + 1, dim)[:, :, :-1]
        return total / self.sizes.clamp(min=1)[..., None].to(x.dtype)

    def narrow(self, tokens: Tensor) -> Partition:
        """The same pieces of some tokens of the stream: token i of the result is `tokens[i]`, int64 (n,)."""
        if self.is_singles:
            return Partition.singles(len(tokens), self.device)
        return Partition.from_labels(self.piece_of[:, :, tokens], self.count)

    def placed(self, before: int, length: int) -> Partition:
        """The same pieces in a stream of `length` tokens, `before` of which come before the first of this one."""
        order = None if self.order is None else self.order + before
        return Partition(order, self.offsets + (before if order is None else 0), length)

    def labels(self, name: str) -> Tensor:
        """A token field of the layout, per piece (P,), -1 where mixed."""
        if self.layout is None:
            raise ZooError(f"these pieces were not cut by a layout, so their {name!r} is not known")
        return self.of(getattr(self.layout, name))

    @lazy
    def sample(self) -> Tensor:
        """The film of each piece, int64 (P,); -1 where mixed."""
        return self.labels("sample")

    @lazy
    def shot(self) -> Tensor:
        """The shot of each piece, int64 (P,); -1 where mixed."""
        return self.labels("shot")

    @lazy
    def frame(self) -> Tensor:
        """The frame of each piece, int64 (P,); -1 where mixed."""
        return self.labels("frame")

    @lazy
    def is_text(self) -> Tensor:
        """1 text, 0 video, -1 mixed: int64 (P,)."""
        return self.labels("is_text")

    def _require_shared(self, what: str) -> None:
        if not self.shared:
            raise ZooError(f"Partition.{what} needs pieces shared by all batch items and heads")


@remembered(32)
def _singles(length: int, device: torch.device) -> Partition:
    return Partition(None, torch.arange(length + 1, dtype=torch.int32, device=device)[None, None], length)


@dataclass(frozen=True, eq=False)
class Refinement(Cached):
    """The pieces of a, cut at the bounds of b's pieces; tokens in no piece of a stay in none.

    Attributes:
        pieces: The cut pieces.
        of_a: The piece of a that each piece is in, int64 (B|1, H|1, P).
        of_b: The piece of b that each piece is in, or -1.
        parents: The number of a's pieces; empty ones have no children.
        meets: False only if a and b are known to share no token.
    """

    pieces: Partition
    of_a: Tensor
    of_b: Tensor
    parents: int
    meets: bool

    @lazy
    def children(self) -> Tensor | None:
        """The pieces that each piece of a was cut into: int64 (parents, most), -1 where there are fewer.

        None where the parents differ by batch item or head, or where only a GPU knows how many there are.
        """
        if not self.of_a.shape[:2] == self.of_b.shape[:2] == (1, 1) or self.of_a.device.type != "cpu":
            return None
        parent = self.of_a[0, 0]
        order = parent.argsort(stable=True)[int((parent < 0).sum()) :]
        number = torch.bincount(parent[order], minlength=self.parents)
        place = torch.arange(len(order), device=order.device) - (number.cumsum(0) - number)[parent[order]]
        table = torch.full((len(number), int(number.max()) if len(number) else 0), -1, device=order.device)
        table[parent[order], place] = order
        return table


def refine(a: Partition, b: Partition) -> Refinement:
    """Cut a's pieces at b's bounds. Cached for pieces that batch items and heads share and the host knows."""
    counted = all(x.shared and (x.device.type == "cpu" or origin(x) is not None) for x in (a, b))
    return _refine_shared(a, b) if counted else _refine_each(a, b)


@remembered(256)
def _refine_shared(a: Partition, b: Partition) -> Refinement:
    joint = torch.where(a.piece_of < 0, -1, a.piece_of * (b.count + 1) + b.piece_of + 1)[0, 0]
    found, labels = torch.unique(joint, return_inverse=True)
    labels = labels - int((found < 0).any())
    found = found[found >= 0]
    of_a, of_b = torch.div(found, b.count + 1, rounding_mode="floor"), found % (b.count + 1) - 1
    # As many pieces as before may be others: one empty, one cut in two.
    uncut = len(of_a) == a.count and bool((of_a == torch.arange(a.count, device=of_a.device)).all())
    pieces = a if uncut else Partition.from_labels(labels, len(found), a.layout)
    return Refinement(pieces, of_a[None, None], of_b[None, None], a.count, bool((of_b >= 0).any()))


def _refine_each(a: Partition, b: Partition) -> Refinement:
    # A GPU is not asked: the host would wait for the answer.
    meets = a.device.type != "cpu" or bool(((a.piece_of >= 0) & (b.piece_of >= 0)).any())
    count = a.count * (b.count + 1)
    if a.is_singles or count >= a.length:
        return Refinement(Partition.singles(a.length, a.device), a.piece_of, b.piece_of, a.count, meets)
    # How many pieces there are depends on values: every combination gets a place, and most stay empty.
    joint = torch.where(a.piece_of < 0, -1, a.piece_of * (b.count + 1) + b.piece_of + 1)
    found = torch.arange(count, device=a.device)[None, None]
    of_a, of_b = torch.div(found, b.count + 1, rounding_mode="floor"), found % (b.count + 1) - 1
    return Refinement(Partition.from_labels(joint, count, a.layout), of_a, of_b, a.count, meets)
