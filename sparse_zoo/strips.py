"""Films as pictures: a row of frames for each version of a film, rows under each other, and back to rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_zoo.errors import refuse
from sparse_zoo.layout import Layout

FRAMES = 4  # of a shot that a strip shows at most
ROW_GAP = 2  # pixels between the rows of a film, before they are zoomed


def film_pictures(layout: Layout, rows: Sequence[Sequence[Tensor]], item: int = 0) -> list[Tensor]:
    """For each film of a stream its strips, one under the other, uint8 (H, W, 3).

    `rows`: clips (B, F, C, H, W), one per shot in stream order, in versions of equal sizes; `item` of each is shown.
    """
    pictures, shot = [], 0
    for film in layout.films:
        shots = slice(shot, shot + len(film.shots))
        shot = shots.stop
        pictures.append(_stack([film_strip([clip[item] for clip in clips[shots]], FRAMES) for clips in rows]))
    return pictures


def film_strip(clips: Sequence[Tensor], frames: int) -> Tensor:
    """Clips (F, C, H, W) in [-1, 1], one per shot -> one row of frames, uint8 (H, W, 3), with a wide gap at each cut.

    At most `frames` frames of a shot, evenly spaced, its first and last among them.
    """
    height = max(clip.shape[2] for clip in clips)
    row: list[Tensor] = []
    for i, clip in enumerate(clips):
        chosen = torch.linspace(0, len(clip) - 1, min(frames, len(clip))).round().long()
        for j, frame in enumerate(clip.detach().float().cpu()[chosen]):
            if i or j:
                row.append(_gap(height, 1 if j else max(3, height // 16)))
            pixels = ((frame.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0)
            row.append(torch.cat([pixels, _gap(height - len(pixels), pixels.shape[1])]))
    return torch.cat(row, dim=1)


def _stack(rows: Sequence[Tensor]) -> Tensor:
    gap = _gap(ROW_GAP, rows[0].shape[1])
    stacked = torch.cat([part for row in rows for part in (row, gap)][:-1])
    zoom = _zoom(len(rows[0]))
    return stacked.repeat_interleave(zoom, dim=0).repeat_interleave(zoom, dim=1)


def _zoom(height: int) -> int:
    return max(1, 64 // height)  # films of a few pixels would be drawn too small to see


def picture_rows(picture: Tensor, rows: int = 3) -> list[Tensor]:
    """The rows that `film_pictures` stacked into one uint8 (H, W, 3): (h, W, 3) each, still zoomed."""
    for height in range(1, len(picture) + 1):
        zoom = _zoom(height)
        # Where two heights give one H, the larger zoom is right if the picture is made of blocks of its size.
        if zoom * (rows * height + (rows - 1) * ROW_GAP) == len(picture):
            blocks = picture[::zoom, ::zoom].repeat_interleave(zoom, dim=0).repeat_interleave(zoom, dim=1)
            if torch.equal(blocks, picture):
                step = zoom * (height + ROW_GAP)
                return [picture[i * step : i * step + zoom * height] for i in range(rows)]
    refuse("picture_rows", [f"a picture {len(picture)} pixels high is no stack of {rows} rows"])
    return []


def _gap(height: int, width: int) -> Tensor:
    return torch.full((height, width, 3), 255, dtype=torch.uint8)
