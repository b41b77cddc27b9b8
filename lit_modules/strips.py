"""Films as rows of frames, for the eye: a row for each version of a film, and rows stacked into one picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_zoo.layout import Layout

FRAMES = 4  # of a shot that a row shows at most
MOST = 64  # frames of a row: of a long film it shows fewer of each shot, and in the end not every shot
ROW_GAP = 2  # pixels between the rows of a picture, before they are zoomed
MIN_HEIGHT = 64  # pixels that a row of a picture is zoomed to at least


def film_rows(layout: Layout, versions: Sequence[Sequence[Tensor]], item: int = 0) -> list[list[Tensor]]:
    """Return a row of frames for every version of every film of a stream.

    Args:
        layout: The stream's layout.
        versions: The clips of each version, (B, F, C, H, W) in [-1, 1], one clip a shot in the order of the stream.
        item: The batch item to show.

    Returns:
        For each film the rows of its versions, uint8 (H, W, 3) each.
    """
    films, shot = [], 0
    for film in layout.films:
        shots = slice(shot, shot + len(film.shots))
        shot = shots.stop
        films.append([film_strip([clip[item] for clip in clips[shots]], FRAMES) for clips in versions])
    return films


def shown(shots: int, frames: int = FRAMES) -> tuple[list[int], int]:
    """Return the numbers of the shots that a row of so many shots shows, and the most frames of each."""
    numbers = torch.linspace(0, shots - 1, min(shots, MOST)).round().long().tolist()
    return numbers, max(1, min(frames, MOST // len(numbers)))


def some_frames(clip: Tensor, frames: int = FRAMES) -> Tensor:
    """Return frames of a clip (F, C, H, W) in [-1, 1], evenly spaced, the first and last among them; uint8, on the CPU.

    Of what this returned before, in uint8, it chooses again.
    """
    chosen = clip.detach()[torch.linspace(0, len(clip) - 1, min(frames, len(clip))).round().long()].cpu()
    return (
        chosen if chosen.dtype == torch.uint8 else ((chosen.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    )


def film_strip(clips: Sequence[Tensor], frames: int = FRAMES) -> Tensor:
    """Return one row of frames of a film, with a wide gap at each cut; see `shown` and `some_frames` for which.

    Args:
        clips: One clip a shot, (F, C, H, W) in [-1, 1], or its `some_frames`.
        frames: How many frames of a shot to show at most.

    Returns:
        uint8 (H, W, 3).
    """
    height = max(clip.shape[2] for clip in clips)
    row: list[Tensor] = []
    numbers, frames = shown(len(clips), frames)
    for i, number in enumerate(numbers):
        for j, frame in enumerate(some_frames(clips[number], frames)):
            if i or j:
                row.append(_gap(height, 1 if j else max(3, height // 16)))
            pixels = frame.expand(3, -1, -1).permute(1, 2, 0)
            row.append(torch.cat([pixels, _gap(height - len(pixels), pixels.shape[1])]))
    return torch.cat(row, dim=1)


def stack_rows(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows of one size, uint8 (H, W, 3), into one picture; small ones are zoomed, so that they can be seen."""
    gap = _gap(ROW_GAP, rows[0].shape[1])
    stacked = torch.cat([part for row in rows for part in (row, gap)][:-1])
    zoom = max(1, MIN_HEIGHT // len(rows[0]))
    return stacked if zoom == 1 else stacked.repeat_interleave(zoom, dim=0).repeat_interleave(zoom, dim=1)


def _gap(height: int, width: int) -> Tensor:
    return torch.full((height, width, 3), 255, dtype=torch.uint8)
