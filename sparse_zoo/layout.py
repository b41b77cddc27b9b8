"""What each token of the stream is: its film, shot, frame, row, column, and whether it is text.

A film's stream is: the global caption, then for each shot its caption and its video tokens, frame by frame, row by
row. A layout is described by its films alone, so layouts compare, hash and print by content, and whatever follows
from a layout (its tensors, a method's static plan) is computed once and remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from sparse_zoo.errors import refuse, unknown
from sparse_zoo.partition import Partition
from sparse_zoo.remember import remembered

FIELDS = ("sample", "shot", "frame", "row", "col", "is_text", "shot_frame", "frames", "rows", "cols")

CHUNKS = ("shot", "frame", "tokens", "fixed")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shot:
    """One shot, sizes in tokens (not pixels): `frames` × `rows` × `cols` of video after `text` tokens of caption."""

    frames: int
    rows: int
    cols: int
    text: int = 0

    def __post_init__(self) -> None:
        refuse(
            f"{self}",
            [f"{name} must be at least 1" for name in ("frames", "rows", "cols") if getattr(self, name) < 1]
            + (["text must be at least 0"] if self.text < 0 else []),
        )

    def __len__(self) -> int:
        return self.text + self.frames * self.rows * self.cols


@dataclass(frozen=True)
class Film:
    """`caption` tokens of global caption, then the shots."""

    caption: int
    shots: tuple[Shot, ...]

    def __len__(self) -> int:
        return self.caption + sum(map(len, self.shots))


class Layout:
    """The tokens of one stream of one or more films, which never attend to each other.

    `sample`, `shot`, `frame`, `row`, `col`, `shot_frame`, `frames`, `rows`, `cols` are int64 and `is_text` is bool,
    all of shape (L,), on `device`. `frame` counts through the film, `shot_frame` from the start of its shot; `frames`,
    `rows` and `cols` are the size of the token's shot. The global caption has shot -1; text has -1 for all that is
    not its own.
    """

    # No dataclass: training frameworks take those in a batch apart to move and cast what is inside.
    __slots__ = ("device", "films")
    films: Final[tuple[Film, ...]]
    device: Final[torch.device]

    def __init__(self, films: tuple[Film, ...], device: torch.device = CPU) -> None:
        self.films, self.device = films, device

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and (self.films, self.device) == (other.films, other.device)

    def __hash__(self) -> int:
        return hash((self.films, self.device))

    def __repr__(self) -> str:
        return f"Layout(films={self.films!r}, device={self.device!r})"

    @staticmethod
    def film(shots: Iterable[Shot], caption: int = 0) -> Layout:
        """One film; a film without any token is refused."""
        film = Film(caption, tuple(shots))
        refuse(
            "Layout.film",
            [
                f"caption must be at least 0, got {caption}" if caption < 0 else "",
                "a film needs at least one token" if caption >= 0 and len(film) == 0 else "",
            ],
        )
        return Layout((film,))

    @staticmethod
    def pack(layouts: Sequence[Layout]) -> Layout:
        """Several films in one stream: sample numbers follow the order given."""
        refuse("Layout.pack", ["needs at least one layout"] if not layouts else [])
        return Layout(tuple(film for layout in layouts for film in layout.films), layouts[0].device)

    def to(self, device: torch.device | str) -> Layout:
        return Layout(self.films, torch.device(device))

    def __len__(self) -> int:
        return sum(map(len, self.films))

    @property
    def sample(self) -> Tensor:
        return _tokens(self.films, self.device)["sample"]

    @property
    def shot(self) -> Tensor:
        return _tokens(self.films, self.device)["shot"]

    @property
    def frame(self) -> Tensor:
        return _tokens(self.films, self.device)["frame"]

    @property
    def row(self) -> Tensor:
        return _tokens(self.films, self.device)["row"]

    @property
    def col(self) -> Tensor:
        return _tokens(self.films, self.device)["col"]

    @property
    def shot_frame(self) -> Tensor:
        return _tokens(self.films, self.device)["shot_frame"]

    @property
    def frames(self) -> Tensor:
        return _tokens(self.films, self.device)["frames"]

    @property
    def rows(self) -> Tensor:
        return _tokens(self.films, self.device)["rows"]

    @property
    def cols(self) -> Tensor:
        return _tokens(self.films, self.device)["cols"]

    @property
    def is_text(self) -> Tensor:
        return _tokens(self.films, self.device)["is_text"]

    @property
    def video_tokens(self) -> int:
        """Number of tokens that are not text; counted without the device."""
        return sum(len(shot) - shot.text for film in self.films for shot in film.shots)

    @property
    def dense_pairs(self) -> int:
        """Σ (sample length)²: what dense attention multiplies per batch item and head."""
        return sum(len(film) ** 2 for film in self.films)

    def partition(self, *keys: str | Tensor, where: Tensor | None = None) -> Partition:
        """Pieces of equal keys (and equal sample, always), in the order of their first tokens.

        Keys are names of token fields or int tensors (L,); `where`, bool (L,), keeps some tokens only.
        """
        refuse(
            "Layout.partition", [unknown("field", k, FIELDS) for k in keys if isinstance(k, str) and k not in FIELDS]
        )
        names = [key for key in keys if isinstance(key, str)]
        if where is None and len(names) == len(keys):
            return _fields_partition(self, *names)
        return self._partition(keys, where)

    def _partition(self, keys: Sequence[str | Tensor], where: Tensor | None) -> Partition:

        columns = [self.sample] + [getattr(self, key) if isinstance(key, str) else key.to(self.device) for key in keys]
        kept = torch.arange(len(self), device=self.device) if where is None else where.to(self.device).nonzero()[:, 0]
        labels = torch.full((len(self),), -1, device=self.device)
        count = 0
        if len(kept):
            pieces, inverse = torch.unique(_folded([column[kept].long() for column in columns]), return_inverse=True)
            count = len(pieces)
            first = torch.full((count,), len(self), device=self.device).scatter_reduce(0, inverse, kept, "amin")
            labels[kept] = first.argsort().argsort()[inverse]
        return Partition.from_labels(labels, count, layout=self)

    def chunks(
        self,
        by: Literal["shot", "frame", "tokens", "fixed"],
        *,
        frames: int = 1,
        tokens: int | None = None,
        captions: Literal["apart", "inside"] = "apart",
    ) -> Partition:
        """Cut the whole stream into chunks, in stream order.

        "shot": one chunk per shot. "frame": `frames` frames each, restarting at each shot. "tokens": each shot in the
        fewest chunks of whole frames that hold at most `tokens` tokens each (but at least one frame), as even as whole
        frames allow: frame f of F is in chunk f·n // F, so 24 frames, of which 11 would fit, make 8 + 8 + 8. All three
        keep captions as chunks of their own, or, with `captions="inside"` (shots only), join each caption to its shot.
        "fixed": every `tokens` tokens, blind to shots, frames and text, restarting at each sample. More frames or
        tokens than there are make one chunk.
        """
        refuse(
            "Layout.chunks",
            [
                unknown("kind of chunk", by, CHUNKS) if by not in CHUNKS else "",
                unknown("captions", captions, ("apart", "inside")) if captions not in ("apart", "inside") else "",
                "captions='inside' is for chunks by shot" if captions == "inside" and by != "shot" else "",
                f"frames must be at least 1, got {frames}" if frames < 1 else "",
                f"tokens must be at least 1, got {tokens}"
                if by in ("tokens", "fixed") and (tokens is None or tokens < 1)
                else "",
            ],
        )
        return _chunks(self, by, frames, tokens, captions)

    def tiles(self, tile: Sequence[int], *, stop_at_shots: bool = True) -> Partition:
        """Video tokens in tiles of (frames, rows, cols); edges may be ragged; text is in no tile.

        Tiles of frames restart at each shot, or with `stop_at_shots=False` run through the film.
        """
        refuse("Layout.tiles", [f"tile must be three sizes of at least 1, got {tile}"] if not _three(tile) else [])
        return _tiles(self, tuple(tile), stop_at_shots)


def _folded(columns: list[Tensor]) -> Tensor:
    """int64 columns (n,) -> one (n,) that tells the same rows apart: sorting numbers is faster than sorting rows."""
    key, size = torch.zeros_like(columns[0]), 1
    for column in columns:
        low, high = (int(x) for x in column.aminmax())
        if size * (high - low + 1) >= 1 << 62:
            key = torch.unique(key, return_inverse=True)[1]
            size = len(key)
        key, size = key * (high - low + 1) + (column - low), size * (high - low + 1)
    return key


def _three(sizes: Sequence[int]) -> bool:
    return len(sizes) == 3 and all(isinstance(size, int) and size >= 1 for size in sizes)


@remembered(32)
def _tokens(films: tuple[Film, ...], device: torch.device) -> dict[str, Tensor]:
    blocks = []
    for sample, film in enumerate(films):
        blocks.append(_text(film.caption, sample, -1))
        start = 0
        for number, shot in enumerate(film.shots):
            blocks.append(_text(shot.text, sample, number))
            axes = [torch.arange(size) for size in (shot.frames, shot.rows, shot.cols)]
            frame, row, col = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
            size = [torch.full_like(frame, x) for x in (sample, number, 0, shot.frames, shot.rows, shot.cols)]
            blocks.append(torch.stack([*size[:2], start + frame, row, col, size[2], frame, *size[3:]]))
            start += shot.frames
    table = torch.cat(blocks, dim=1).to(device)
    fields: dict[str, Tensor] = dict(zip(FIELDS, table, strict=True))
    fields["is_text"] = fields["is_text"].bool()
    return fields


def _text(count: int, sample: int, shot: int) -> Tensor:
    return torch.tensor([sample, shot, -1, -1, -1, 1, -1, -1, -1, -1])[:, None].expand(-1, count)


@remembered(64)
def _fields_partition(layout: Layout, *names: str) -> Partition:
    return layout._partition(names, None)


@remembered(64)
def _chunks(layout: Layout, by: str, frames: int, tokens: int | None, captions: str) -> Partition:
    if by == "fixed":
        lengths = torch.tensor([len(film) for film in layout.films], device=layout.device)
        starts = lengths.cumsum(0) - lengths
        position = torch.arange(len(layout), device=layout.device) - starts[layout.sample]
        return layout.partition(position // (tokens or 1))
    if by == "frame":
        return layout.partition("shot", "is_text", torch.div(layout.shot_frame, frames, rounding_mode="floor"))
    if by == "tokens":
        most = ((tokens or 1) // (layout.rows * layout.cols)).clamp(min=1)  # frames in a chunk
        count = (layout.frames + most - 1) // most
        return layout.partition("shot", "is_text", layout.shot_frame * count // layout.frames)
    return layout.partition("shot") if captions == "inside" else layout.partition("shot", "is_text")


@remembered(64)
def _tiles(layout: Layout, tile: tuple[int, ...], stop_at_shots: bool) -> Partition:
    time = ("shot", layout.shot_frame // tile[0]) if stop_at_shots else (layout.frame // tile[0],)
    return layout.partition(*time, layout.row // tile[1], layout.col // tile[2], where=~layout.is_text)
