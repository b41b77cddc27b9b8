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
POSES, SCALES, SCREENS = 8, (4, 3), 5  # sizes are in quarters of the window
SCREEN = (0.1, 0.1, 0.1)
STRIPE = 4  # pixels
BACKGROUNDS = {
    "night": (-0.9, -0.9, -0.7),
    "slate": (-0.35, -0.35, -0.3),
    "forest": (-0.8, -0.45, -0.8),
    "wine": (-0.4, -0.85, -0.7),
}


@dataclass(frozen=True, eq=False)
class Shown:
    """One shot of B films.

    Attributes:
        clip: (B, F, 3, H, W).
        position: The subject's true top left pixel in each frame (B, F, 2).
        background: (B,).
        view: (B,).
    """

    clip: Tensor
    position: Tensor
    background: Tensor
    view: Tensor


@dataclass(frozen=True)
class Identities:
    """The first `shapes`, `colours` and `textures`, on the first `backgrounds`, in a window `pixels` wide and high.

    Identity number = (shape · colours + colour) · textures + texture.

    A view is how a subject is seen: pose, scale, and the screen that hides a part. View number = (pose · scales +
    scale) · screens + screen. Poses 4 to 7 are 0 to 3 mirrored; screen 0 hides nothing, 1 to 4 hide a quarter of it.

    With `scenery` backgrounds have stripes, each background in its own direction, that move by a pixel a frame.
    """

    shapes: int
    colours: int
    textures: int
    backgrounds: int
    pixels: int
    poses: int = 1
    scales: int = 1
    screens: int = 1
    scenery: bool = False

    def __post_init__(self) -> None:
        most = {
            "shapes": len(SHAPES),
            "colours": len(COLOURS),
            "textures": len(TEXTURES),
            "backgrounds": len(BACKGROUNDS),
            "poses": POSES,
            "scales": len(SCALES),
            "screens": SCREENS,
        }
        refuse(
            "ShotWorld",
            [
                f"{name} must be from 1 to {known}, got {getattr(self, name)}"
                for name, known in most.items()
                if not 1 <= getattr(self, name) <= known
            ]
            + (
                [f"a subject must be at least 6 pixels wide, got {min(self.widths)}"]
                if 1 <= self.scales <= len(SCALES) and min(self.widths) < 6
                else []
            ),
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

    @property
    def widths(self) -> list[int]:
        """The width of a subject at each scale, in pixels."""
        return [self.pixels * quarters // 4 for quarters in SCALES[: self.scales]]

    @cached_property
    def grounds(self) -> Tensor:
        """Colours of the backgrounds, float32 (backgrounds, 3) in [-1, 1]."""
        return torch.tensor(list(BACKGROUNDS.values())[: self.backgrounds])

    def scene(self, background: Tensor, frame: Tensor, size: tuple[int, int]) -> Tensor:
        """Backgrounds without a subject, float32 (N, 3, *size): their numbers (N,), and frames within a shot (N,)."""
        ground = self.grounds.to(background.device)[background][:, :, None, None].expand(-1, -1, *size)
        if not self.scenery:
            return ground
        row, col = (torch.arange(length, device=background.device) for length in size)
        row, col = row[:, None], col[None, :]
        ways = torch.stack([(row + 0 * col), (col + 0 * row), row + col, row - col])[background % 4]
        dark = (ways + frame[:, None, None]) // STRIPE % 2 == 1
        return torch.where(dark[:, None], (ground + 1) / 2 - 1, ground)

    @cached_property
    def _drawings(self) -> tuple[Tensor, Tensor]:
        """Every identity upright at every scale, pixels in a row, scale after scale.

        Colours float32 (identities, 3, pixels in all), and which pixels it covers, bool (identities, 1, pixels in all).
        """
        colours, masks = zip(*map(self._upright, self.widths), strict=True)
        return torch.cat([x.flatten(-2) for x in colours], -1), torch.cat([x.flatten(-2) for x in masks], -1)

    def _upright(self, width: int) -> tuple[Tensor, Tensor]:
        """Every identity `width` pixels wide: (identities, 3, width, width), and the pixels that it covers."""
        place = (torch.arange(width) + 0.5) / width * 2 - 1
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
        bar = torch.arange(width) * 4 // width % 2 == 1
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
        return subject, mask.repeat_interleave(self.colours * self.textures, dim=0)[:, None]

    @cached_property
    def _views(self) -> Tensor:
        """Which pixel of `_drawings` each pixel of the window shows in each view, int64 (views, pixels²).

        -1 where it shows the background, -2 where the screen.
        """
        half, views = self.pixels // 2, []
        for pose in range(self.poses):
            first = 0
            for width in self.widths:
                drawn = torch.arange(first, first + width * width).view(width, width)
                first += width * width
                drawn = torch.rot90(drawn.flip(-1) if pose >= 4 else drawn, pose % 4)
                window = torch.full((self.pixels, self.pixels), -1)
                edge = (self.pixels - width) // 2
                window[edge : edge + width, edge : edge + width] = drawn
                for screen in range(self.screens):
                    seen = window.clone()
                    if screen:
                        row, col = (screen - 1) // 2 * half, (screen - 1) % 2 * half
                        seen[row : row + half, col : col + half] = -2
                    views.append(seen.flatten())
        return torch.stack(views)

    @property
    def views(self) -> int:
        """The number of views."""
        return self.poses * self.scales * self.screens

    @cached_property
    def _seen(self) -> tuple[Tensor, Tensor]:
        """Every identity in every view: its colours where it covers the window, and 0 elsewhere; and where it does.

        float32 (views, identities, 3, pixels²) and (views, identities, 1, pixels²).
        """
        place = self._views.clamp(min=0)
        colours, covered = (x[:, :, place].permute(2, 0, 1, 3) for x in self._drawings)
        mask = (covered & (self._views >= 0)[:, None, None]).float()
        return colours * mask, mask

    def outlines(self, view: Tensor) -> Tensor:
        """The pixels of the window that each identity covers in views (N,), bool (N, identities, 1, pixels, pixels)."""
        covered: Tensor = (self._seen[1].to(view.device)[view] > 0).unflatten(-1, (self.pixels, self.pixels))
        return covered

    def templates(self, view: Tensor, ground: Tensor) -> Tensor:
        """Every identity in views (N,) before the windows `ground` (N, 3, pixels, pixels).

        Returns:
            float32 (N, identities, 3, pixels, pixels).
        """
        subject = self._seen[0].to(view.device)[view].unflatten(-1, (self.pixels, self.pixels))
        return torch.where(self.outlines(view), subject, self._behind(view, ground)[:, None])

    def _behind(self, view: Tensor, ground: Tensor) -> Tensor:
        """The windows `ground` (N, 3, pixels, pixels) with the screens of views (N,), and no subject."""
        hidden = (self._views.to(view.device)[view] == -2).unflatten(-1, (self.pixels, self.pixels))
        return torch.where(hidden[:, None], ground.new_tensor(SCREEN)[:, None, None], ground)

    def render(
        self,
        identity: Tensor,
        position: Tensor,
        background: Tensor,
        size: tuple[int, int],
        *,
        view: Tensor | None = None,
        frame: Tensor | None = None,
        canvas: Tensor | None = None,
    ) -> Tensor:
        """Frames (N, 3, *size), each with one subject.

        Args:
            identity: (N,).
            position: Top left pixel of its window (N, 2).
            background: (N,).
            size: Rows and columns of pixels.
            view: (N,); None: view 0.
            frame: The frame within its shot (N,), for scenery; None: 0.
            canvas: What is around the window (N, 3, *size); None: the background.
        """
        view = torch.zeros_like(identity) if view is None else view
        scene = self.scene(background, torch.zeros_like(identity) if frame is None else frame, size)
        frames = (scene if canvas is None else canvas).clone()
        ground = self._behind(view, self.crop(scene[:, None], position[:, None])[:, 0])
        place = self._views[view]
        colours, covered = (x[identity] for x in self._drawings)
        shown = place.clamp(min=0)[:, None].expand(-1, 3, -1)
        subject = colours.gather(-1, shown).unflatten(-1, (self.pixels, self.pixels))
        outline = (covered.gather(-1, shown[:, :1]) & (place >= 0)[:, None]).unflatten(-1, (self.pixels, self.pixels))
        row, col = self._window(position)
        which = torch.arange(len(frames))[:, None, None]
        frames[which, :, row, col] = torch.where(outline, subject, ground).permute(0, 2, 3, 1)
        return frames  # the frames' index gives (N, pixels, pixels, 3)

    def errors(self, shot: Shown) -> tuple[Tensor, Tensor]:
        """Squared errors of a shot's windows over all frames, against each identity and against no subject.

        Returns:
            float32 (B, identities) and (B,).
        """
        each, bare = self._errors(shot, shot.position)
        return each.sum(1), bare.sum(1)

    def _errors(self, shot: Shown, position: Tensor) -> tuple[Tensor, Tensor]:
        """The same at any `position` (B, F, 2), frame by frame: (B, F, identities) and (B, F)."""
        batch, frames = shot.clip.shape[:2]
        number = torch.arange(frames, device=shot.clip.device).repeat(batch)
        scene = self.scene(
            shot.background.repeat_interleave(frames), number, (shot.clip.shape[-2], shot.clip.shape[-1])
        )
        ground = self.crop(scene.unflatten(0, (batch, frames)), position).flatten(0, 1)
        behind = self._behind(shot.view.repeat_interleave(frames), ground).unflatten(0, (batch, frames)).flatten(3)
        seen = self.crop(shot.clip, position).flatten(3)  # (B, F, 3, pixels²)
        colours, mask = (x.to(seen.device)[shot.view] for x in self._seen)
        # An identity changes the error where it covers the window alone: there by (seen - own)² - (seen - behind)².
        without = (seen - behind).square()
        hidden = torch.einsum("bfp,bip->bfi", without.sum(2), mask[:, :, 0])
        squares = torch.einsum("bfp,bip->bfi", seen.square().sum(2), mask[:, :, 0])
        products = torch.einsum("bfcp,bicp->bfi", seen, colours)
        bare = without.sum((-2, -1))
        own = colours.square().sum((-2, -1))[:, None]
        return bare[..., None] - hidden + squares - 2 * products + own, bare

    def decode(self, shot: Shown) -> Tensor:
        """The identity that each clip shows, int64 (B,): the nearest in squared error over all frames.

        The subject's position, view and background are known.
        """
        return self.errors(shot)[0].argmin(-1)

    def crop(self, clip: Tensor, position: Tensor) -> Tensor:
        """The window of the subject, float32 (B, F, 3, pixels, pixels), of a clip (B, F, 3, H, W) at (B, F, 2)."""
        frames = clip.flatten(0, 1)
        row, col = self._window(position.flatten(0, 1))
        seen: Tensor = frames[torch.arange(len(frames), device=clip.device)[:, None, None], :, row, col].float()
        return seen.permute(0, 3, 1, 2).reshape(*clip.shape[:2], 3, self.pixels, self.pixels)

    def locate(self, shot: Shown, places: Tensor) -> Tensor:
        """The position of a subject in each frame, one of `places` (P, 2), with known view and background.

        It is the position of the nearest rendering of any identity in squared error, int64 (B, F, 2).
        """
        batch, frames = shot.clip.shape[:2]
        places, gains = places.to(shot.clip.device), []
        for place in places:
            each, bare = self._errors(shot, place.expand(batch, frames, 2))
            # Outside the window all identities leave the ground, so two renderings differ within their windows.
            gains.append(bare - each.amin(-1))
        return places[torch.stack(gains).argmax(0)]

    def _window(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (N, pixels, 1) and columns (N, 1, pixels) that a subject covers."""
        reach = torch.arange(self.pixels, device=position.device)
        row, col = position[:, 0, None] + reach, position[:, 1, None] + reach
        return row[:, :, None], col[:, None, :]
