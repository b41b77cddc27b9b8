"""The generated shots that metrics judge: the last shot of each film, with the truth about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Shown:
    """One shot of B films: clip (B, F, 3, H, W); the subject's true top left pixel (B, F, 2); the background (B,)."""

    clip: Tensor
    position: Tensor
    background: Tensor


@dataclass(frozen=True, eq=False)
class LastShot:
    """The last shot of B films of one shape, and the shots before it.

    The true subjects, numbers within a film, and identities of all N shots are int64 (B, N).
    """

    shot: Shown
    earlier: list[Shown]
    subjects: Tensor
    identities: Tensor

    @property
    def introduction(self) -> Tensor:
        """The number of the first shot that shows the last shot's subject: int64 (B,)."""
        return (self.subjects == self.subjects[:, -1:]).int().argmax(-1)

    @property
    def source(self) -> Tensor:
        """The number of the nearest earlier shot that shows the last shot's subject: int64 (B,)."""
        same = (self.subjects[:, :-1] == self.subjects[:, -1:]).int()
        return same.shape[1] - 1 - same.flip(-1).argmax(-1)


def last_shots(clips: list[Tensor], batch: dict[str, Any]) -> Iterator[LastShot]:
    """The last shots of `clips`, shaped as those of the `ShotWorld` batch, film after film of its layout."""
    truth = batch["truth"]
    places = truth["position"].split([clip.shape[1] for clip in clips], dim=1)
    shown = [Shown(*shot) for shot in zip(clips, places, truth["background"].unbind(1), strict=True)]
    start = 0
    for film in batch["layout"].films:
        stop = start + len(film.shots)
        true = (truth[name][:, start:stop] for name in ("subject", "identity"))
        yield LastShot(shown[stop - 1], shown[start : stop - 1], *true)
        start = stop
