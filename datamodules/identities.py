"""The appearance of ShotWorld subjects, and which subject a clip shows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparse_zoo.errors import refuse

SHAPES = ("square", "disc", "diamond", "triangle", "cross", "ring")
COLOURS = {
    "red": (0.9, -0.7, -0.7),
    "green": (-0.6, 0.8, -0.6),
    "blue": (-0.6, -0.3, 1.0),
    "yellow": (1.0, 0.9, -0.8),
    "magenta": (0.9, -0.6, 0.9),
    "cyan": (-0.7, 0.8, 0.9),
    "orange": (1.0, 0.2, -0.9),
    "white": (1.0, 1.0, 1.0),
}
TEXTURES = ("plain", "rows", "columns", "checks")
BACKGROUNDS = {
    "night": (-0.9, -0.9, -0.7),
    "slate": (-0.35, -0.35, -0.3),
    "forest": (-0.8, -0.45, -0.8),
    "wine": (-0.4, -0.85, -0.7),
}


@dataclass(frozen=True)
class Identities:
    """The first `shapes`, `colours` and `textures`, on the first `backgrounds`, `pixels` wide and high.

    Identity number = (shape · colours + colour) · textures + texture.
    """

    shapes: int
    colours: int
    textures: int
    backgrounds: int
    pixels: int

    def __post_init__(self) -> None:
        most = {"shapes": SHAPES, "colours": COLOURS, "textures": TEXTURES, "backgrounds": BACKGROUNDS}
        refuse(
            "ShotWorld",
            [
                f"{name} must be from 1 to {len(known)}, got {getattr(self, name)}"
                for name, known in most.items()
                if not 1 <= getattr(self, name) <= len(known)
            ]
            + ([f"a subject must be at least 6 pixels wide, got {self.pixels}"] if self.pixels < 6 else []),
        )

    def __len__(self) -> int:
        return self.shapes * self.colours * self.textures

    def attributes(self, identity: Tensor) -> dict[str, Tensor]:
        """Shape, colour and texture numbers, each of `identity`'s shape."""
        return {
            "shape": identity // (self.colours * self.textures),
            "colour": identity // self.textures % self.colours,
            "texture": identity % self.textures,
        }

    @cached_property
    def grounds(self) -> Tensor:
        """Colours of the backgrounds, float32 (backgrounds, 3) in [-1, 1]."""
        return torch.tensor(list(BACKGROUNDS.values())[: self.backgrounds])

    @cached_property
    def outlines(self) -> Tensor:
        """The pixels of its background that each identity covers, bool (identities, 1, pixels, pixels)."""
        place = (torch.arange(self.pixels) + 0.5) / self.pixels * 2 - 1
        y, x = torch.meshgrid(place, place, indexing="ij")
        radius = (x**2 + y**2).sqrt()
        masks = {
            "square": torch.ones_like(x, dtype=torch.bool),
            "disc": radius <= 1,
            "diamond": x.abs() + y.abs() <= 1,
            "triangle": 2 * x.abs() <= y + 1,
            "cross": (x.abs() <= 0.4) | (y.abs() <= 0.4),
            "ring": (radius <= 1) & (radius > 0.55),
        }
        mask = torch.stack([masks[shape] for shape in SHAPES[: self.shapes]])
        return mask.repeat_interleave(self.colours * self.textures, dim=0)[:, None]

    @cached_property
    def sprites(self) -> Tensor:
        """Every identity on every background, float32 (backgrounds, identities, 3, pixels, pixels) in [-1, 1]."""
        bar = torch.arange(self.pixels) * 4 // self.pixels % 2 == 1
        rows, columns = bar[:, None].expand(-1, len(bar)), bar.expand(len(bar), -1)
        dark = {
            "plain": torch.zeros_like(columns),
            "rows": rows,
            "columns": columns,
            "checks": rows ^ columns,
        }
        dim = torch.stack([dark[texture] for texture in TEXTURES[: self.textures]])[:, None]
        colour = torch.tensor(list(COLOURS.values())[: self.colours])[:, None, :, None, None]
        # The dark half of a texture is half as bright as its colour.
        subject = torch.where(dim, (colour + 1) / 2 - 1, colour).flatten(0, 1).repeat(self.shapes, 1, 1, 1)
        return torch.where(self.outlines, subject, self.grounds[:, None, :, None, None])

    def render(self, identity: Tensor, position: Tensor, background: Tensor, size: tuple[int, int]) -> Tensor:
        """Frames (N, 3, *size), each with one subject: its identity (N,), top left pixel (N, 2), background (N,)."""
        frames = self.grounds[background][:, :, None, None].expand(-1, -1, *size).clone()
        row, col = self._window(position)
        frames[torch.arange(len(frames))[:, None, None], :, row, col] = self.sprites[background, identity].permute(
            0, 2, 3, 1
        )  # the frames' index gives (N, pixels, pixels, 3)
        return frames

    def decode(self, clip: Tensor, position: Tensor, background: Tensor) -> Tensor:
        """The identity that each clip (B, F, 3, H, W) shows, int64 (B,): the nearest in squared error over all frames.

        `position` (B, F, 2), the subject's top left pixel (row, col) in each frame, and `background` (B,) are known.
        """
        seen = self.crop(clip, position).mean(1).flatten(1)
        known = self.sprites.to(clip.device).flatten(2)[background]
        # Over the frames the sum of squared errors and that of the mean differ by what no identity can change.
        return (seen[:, None] - known).square().sum(-1).argmin(-1)

    def crop(self, clip: Tensor, position: Tensor) -> Tensor:
        """The window of the subject, float32 (B, F, 3, pixels, pixels), of a clip (B, F, 3, H, W) at (B, F, 2)."""
        frames = clip.flatten(0, 1)
        row, col = self._window(position.flatten(0, 1))
        seen: Tensor = frames[torch.arange(len(frames), device=clip.device)[:, None, None], :, row, col].float()
        return seen.permute(0, 3, 1, 2).reshape(*clip.shape[:2], 3, self.pixels, self.pixels)

    def locate(self, clip: Tensor, background: Tensor, places: Tensor) -> Tensor:
        """The position of a subject in a clip (B, F, 3, H, W) on known backgrounds (B,), one of `places` (P, 2).

        It is the position of the nearest rendering of any identity in squared error, int64 (B, F, 2).
        """
        batch, frames = clip.shape[:2]
        places = places.to(clip.device)
        known = self.sprites.to(clip.device)[background].flatten(2)  # (B, identities, 3·pixels²)
        ground = self.grounds.to(clip)[background][:, None, :, None, None]
        gains = []
        for place in places:
            window = self.crop(clip, place.expand(batch, frames, 2))
            # Outside the window all identities leave the ground, so two renderings differ within their windows.
            bare = (window - ground).square().sum((-3, -2, -1))
            gains.append(bare - torch.cdist(window.flatten(2), known).square().amin(-1))
        return places[torch.stack(gains).argmax(0)]

    def _window(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (N, pixels, 1) and columns (N, 1, pixels) that a subject covers."""
        reach = torch.arange(self.pixels, device=position.device)
        row, col = position[:, 0, None] + reach, position[:, 1, None] + reach
        return row[:, :, None], col[:, None, :]
