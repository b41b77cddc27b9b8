"""Rectified flow: the training objective. `sampling` generates films from the model.

x_t = (1 - t)·x + t·noise, velocity = noise - x; t = 0 is the clean film, t = 1 is noise. Every random number comes from
a generator seeded by its purpose, so that a resumed run repeats it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sparse_zoo as zoo
from lit_modules.dit import DiTOutput, VideoDiT
from lit_modules.settings import Flow
from lit_modules.stream import Stream, stream
from sparse_zoo.remember import copy_to


def generator(*purpose: object) -> torch.Generator:
    """A CPU generator, whatever the device, that is a function of `purpose` (printed, then hashed) alone."""
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def known_shots(batch: Mapping[str, Any]) -> Tensor:
    """The shots that are given where films are judged, bool (S,): all but the last if the batch does not say."""
    if "known" in batch:
        return torch.tensor(batch["known"], device=batch["text"].device)
    return ~stream(batch["layout"]).last_shots


@dataclass(frozen=True)
class FlowLoss:
    """Squared error of the velocity: its mean, a scalar, and per token (B, Nv), detached; and the model's output."""

    loss: Tensor
    per_token: Tensor
    output: DiTOutput


@dataclass(frozen=True)
class RectifiedFlow(Flow):
    """The loss of a rectified flow, at the training times that the fields of `Flow` choose."""

    def warp(self, time: Tensor) -> Tensor:
        """Times in [0, 1], shifted towards noise by `shift`."""
        return self.shift * time / (1 + (self.shift - 1) * time)

    def draw_times(self, batch: int, layout: zoo.Layout, draws: torch.Generator, known: Tensor | None = None) -> Tensor:
        """Training times (B, S), one per shot of the stream; 0 where a shot is given.

        `known`, bool (S,), are the shots that are given where films are judged.
        """
        table = stream(layout)
        films = len(table.shots_of_film)
        count = len(table.film_of_shot) if self.per_shot else films
        if self.times == "uniform":
            time = torch.rand(batch, count, generator=draws)
        else:
            time = torch.sigmoid(self.mean + self.std * torch.randn(batch, count, generator=draws))
        time = copy_to(self.warp(time), layout.device)
        time = noisy = time if self.per_shot else time[:, table.film_of_shot]
        if self.history:
            time = self._with_history(time, table, draws)
        if self.known and known is not None:
            chosen = copy_to(torch.rand(batch, films, generator=draws), layout.device) < self.known
            time = torch.where(chosen[:, table.film_of_shot], noisy.masked_fill(known.to(noisy.device), 0.0), time)
        return time

    def _with_history(self, time: Tensor, table: Stream, draws: torch.Generator) -> Tensor:
        """Times (B, S), 0 for the first shots of some films."""
        batch, films = len(time), len(table.shots_of_film)
        chosen, how_many = copy_to(torch.rand(2, batch, films, generator=draws), time.device)
        # From 1 to S - 1 shots of S; of a film of one shot, none.
        given = (1 + how_many * (table.shots_of_film - 1)).long().clamp(max=table.shots_of_film - 1)
        given = torch.where(chosen < self.history, given, 0)
        return time.masked_fill(table.shot_in_film < given[:, table.film_of_shot], 0.0)

    def training_loss(
        self, model: VideoDiT, batch: Mapping[str, Any], draws: torch.Generator, *, step: int | None, seed: int
    ) -> FlowLoss:
        """The loss of a batch at random times, noise and dropped captions."""
        text: Tensor = batch["text"]
        layout = batch["layout"].to(text.device)
        time = self.draw_times(text.shape[0], layout, draws, known_shots(batch))
        films = len(layout.films)
        dropped = copy_to(torch.rand(text.shape[0], films, generator=draws), text.device) < self.drop_text
        text = model.drop_text(text, dropped[:, stream(layout).film_of_text])
        return self.loss(model, batch["clips"], text, time, layout, draws, step=step, seed=seed)

    def loss(
        self,
        model: VideoDiT,
        clips: list[Tensor],
        text: Tensor,
        time: Tensor,
        layout: zoo.Layout,
        draws: torch.Generator,
        *,
        step: int | None = None,
        seed: int = 0,
    ) -> FlowLoss:
        """The loss of clips at given times (B, S).

        Every token has the same weight, except those at time 0: nothing determines the velocity of a clean token, so
        they are left out of the mean.
        """
        clean = model.patchify(clips)
        noise = copy_to(torch.randn(clean.shape, generator=draws), clean.device).to(clean.dtype)
        t = time[:, stream(layout).shot_of_video, None].to(clean)  # (B, Nv, 1)
        output = model((1 - t) * clean + t * noise, text, time, layout, step=step, seed=seed)
        per_token = (output.velocity.float() - (noise - clean).float()).square().mean(-1)
        learnt = (t[..., 0] > 0).to(per_token)
        return FlowLoss((per_token * learnt).sum() / learnt.sum(), per_token.detach(), output)

    @torch.no_grad()
    def denoise(
        self, model: VideoDiT, batch: Mapping[str, Any], at: float, *, step: int | None = None, seed: int = 0
    ) -> list[Tensor]:
        """The model's one-step prediction of the batch's clips from themselves with noise of time `at` in (0, 1]."""
        text: Tensor = batch["text"]
        layout = batch["layout"].to(text.device)
        clean = model.patchify(batch["clips"])
        noise = torch.randn(clean.shape, generator=generator("denoise", seed)).to(clean)
        noisy = (1 - at) * clean + at * noise
        time = torch.full((len(text), len(stream(layout).film_of_shot)), at, device=text.device)
        was_training = model.training
        model.eval()
        guess = noisy - at * model(noisy, text, time, layout, step=step, seed=seed).velocity.float()
        model.train(was_training)
        return model.unpatchify(guess, layout)
