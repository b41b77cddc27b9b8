"""The generated shots that metrics judge, with the truth about them and about the shots before them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from datamodules.identities import Shown


@dataclass(frozen=True, eq=False)
class Judged:
    """A generated shot of B films of one shape, and the shots before it.

    The true subjects, numbers within a film, and identities of these shots and of this one, the last, are int64 (B, N).
    `known` tells which of them are given, bool (N,).
    """

    shot: Shown
    earlier: list[Shown]
    subjects: Tensor
    identities: Tensor
    known: Tensor

    @property
    def introduction(self) -> Tensor:
        """The number of the first shot that shows this shot's subject: int64 (B,)."""
        return (self.subjects == self.subjects[:, -1:]).int().argmax(-1)

    @property
    def source(self) -> Tensor:
        """The number of the nearest earlier shot that shows this shot's subject: int64 (B,)."""
        return _last(self.subjects[:, :-1] == self.subjects[:, -1:])

    @property
    def known_source(self) -> Tensor:
        """The same of the shots that are given."""
        return _last((self.subjects[:, :-1] == self.subjects[:, -1:]) & self.known[:-1])


def _last(true: Tensor) -> Tensor:
    """The last column of (B, N) that is true: int64 (B,)."""
    return true.shape[1] - 1 - true.int().flip(-1).argmax(-1)


def judged_shots(clips: list[Tensor], batch: dict[str, Any]) -> Iterator[list[Judged]]:
    """The judged shots of `clips`, shaped as those of the `ShotWorld` batch: a list for each film of its layout.

    Those are the shots that the batch does not list as "known".
    """
    truth = batch["truth"]
    known = torch.tensor(batch["known"], device=truth["subject"].device)
    places = truth["position"].split([clip.shape[1] for clip in clips], dim=1)
    seen = zip(clips, places, truth["background"].unbind(1), truth["view"].unbind(1), strict=True)
    shown = [Shown(*shot) for shot in seen]
    start = 0
    for film in batch["layout"].films:
        stop = start + len(film.shots)
        subjects, identities = (truth[name][:, start:stop] for name in ("subject", "identity"))
        yield [
            Judged(
                shown[at],
                shown[start:at],
                subjects[:, : at - start + 1],
                identities[:, : at - start + 1],
                known[start : at + 1],
            )
            for at in range(start, stop)
            if not batch["known"][at]
        ]
        start = stop
