"""Index tables of a layout for the model: text and video in the stream, and the shot that conditions each token."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_zoo import Film, Layout
from sparse_zoo.remember import remembered

SHOT_GAP = 2  # empty frames between shots on the time axis of positions


@dataclass(frozen=True, eq=False)
class Stream:
    """Index tables of a layout of L tokens (Nv video, Nt text), S shots in all and F films, all on its device.

    Shots are numbered through the stream, film after film. `row_of` is the row of a table of S + F conditions for each
    token: that of its shot, or for a global caption that of its film (rows S …).
    """

    video: Tensor  # (Nv,) int64: tokens of the stream that are video
    text: Tensor  # (Nt,) int64: tokens of the stream that are text
    merge: Tensor  # (L,) int64: where each token lies in [text, video]
    row_of: Tensor  # (L,) int64
    film_of_shot: Tensor  # (S,) int64
    shot_in_film: Tensor  # (S,) int64: its number within its film
    film_of_text: Tensor  # (Nt,) int64
    shots_of_film: Tensor  # (F,) int64: how many
    positions: Tensor  # (L, 3) float32: time, row, column

    @property
    def shot_of_video(self) -> Tensor:
        """The shot of each video token, 0 … S - 1: int64 (Nv,)."""
        return self.row_of[self.video]

    @property
    def last_shots(self) -> Tensor:
        """Whether a shot is the last of its film: bool (S,)."""
        ends = self.shots_of_film.cumsum(0)[self.shots_of_film > 0] - 1
        return torch.zeros_like(self.film_of_shot, dtype=torch.bool).index_fill(0, ends, True)


@remembered(32)
def stream(layout: Layout) -> Stream:
    """The tables of a layout, built once.

    Positions: a video token's time is its frame in the film plus `SHOT_GAP` per cut before it, so that tokens across a
    cut are further apart than neighbouring frames and no two shots share a time. A caption is one step before its
    shot's first frame, the global caption one step before the position of a shot -1; word i of a caption has row i and
    column i.
    """
    device = layout.device
    counts = torch.tensor([len(film.shots) for film in layout.films], device=device)
    firsts = counts.cumsum(0) - counts
    shots, films = int(counts.sum()), len(layout.films)
    starts = [start + SHOT_GAP * i for film in layout.films for i, start in enumerate(_shot_starts(film))]
    caption_time = torch.tensor([*starts, *[-SHOT_GAP] * films], device=device) - 1

    token = torch.arange(len(layout), device=device)
    row_of = torch.where(layout.shot < 0, shots + layout.sample, firsts[layout.sample] + layout.shot)
    kind = row_of * 2 + layout.is_text
    opens = torch.cat([torch.ones_like(kind[:1], dtype=torch.bool), kind.diff() != 0])
    word = token - torch.where(opens, token, 0).cummax(0).values
    time = torch.where(layout.is_text, caption_time[row_of], layout.frame + SHOT_GAP * layout.shot)
    row, col = (torch.where(layout.is_text, word, axis) for axis in (layout.row, layout.col))

    video, text = (~layout.is_text).nonzero()[:, 0], layout.is_text.nonzero()[:, 0]
    return Stream(
        video=video,
        text=text,
        merge=torch.cat([text, video]).argsort(),
        row_of=row_of,
        film_of_shot=torch.arange(films, device=device).repeat_interleave(counts),
        shot_in_film=torch.arange(shots, device=device) - firsts.repeat_interleave(counts),
        film_of_text=layout.sample[text],
        shots_of_film=counts,
        positions=torch.stack([time, row, col], dim=-1).float(),
    )


def video_only(layout: Layout) -> Layout:
    """The same films without their captions."""
    films = (Film(0, tuple(replace(shot, text=0) for shot in film.shots)) for film in layout.films)
    return Layout(tuple(films), layout.device)


def _shot_starts(film: Film) -> list[int]:
    starts, frame = [], 0
    for shot in film.shots:
        starts.append(frame)
        frame += shot.frames
    return starts
