"""How films are drawn from a flow: all shots at once, or one after the other as they follow in the film."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import sparse_zoo as zoo
from lit_modules.dit import Past, VideoDiT
from lit_modules.flow import RectifiedFlow, generator
from lit_modules.settings import Sampler
from lit_modules.stream import stream
from sparse_zoo.errors import refuse
from sparse_zoo.routing import top_shots


@dataclass(frozen=True)
class Drawn:
    """Clips (B, F, C, H, W), one per shot in stream order.

    taken: with order "shots", for each film of the stream and each batch item: {drawn shot: earlier shots it was drawn
        beside}, numbers within the film; empty otherwise.
    """

    clips: list[Tensor]
    taken: list[list[dict[int, list[int]]]]


@dataclass(frozen=True)
class Euler(Sampler):
    """Sampler: `steps` Euler steps from noise to film, evenly spaced before the flow's shift.

    With order "shots" a film may have more shots than those trained on. Where the model is strictly causal, what the
    earlier shots pass on is computed once for each shot; elsewhere they are recomputed in every step. Both are exact.

    `context` is MoC's outer loop: the earlier shots that enter are those whose mean input to the first block has the
    largest product with the new shot's, still noise. They, the global caption and the new shot are a film of their own
    for the model, so that positions stay within what was trained. The paper's: scores by means, before any attention.
    Ours: they are chosen once for each shot, at the start of its drawing.
    """

    def sample(
        self,
        model: VideoDiT,
        flow: RectifiedFlow,
        batch: Mapping[str, Any],
        *,
        seed: int = 0,
        known: Tensor | None = None,
        step: int | None = None,
    ) -> list[Tensor]:
        """The clips that `draw` gives."""
        return self.draw(model, flow, batch, seed=seed, known=known, step=step).clips

    @torch.no_grad()
    def draw(
        self,
        model: VideoDiT,
        flow: RectifiedFlow,
        batch: Mapping[str, Any],
        *,
        seed: int = 0,
        known: Tensor | None = None,
        step: int | None = None,
        told: Callable[[], object] = lambda: None,
    ) -> Drawn:
        """Draw films for the batch's layout and captions.

        `known`: bool (S,), shots that are given: they keep the batch's clips, clean and at time 0, throughout. `step`
        is the model's step of training, by which schedules go. `told` is called `count` times in all, once for each
        Euler step. The noise of a token is the same in either order. Raises ZooError for a `known` of wrong size;
        warns where `context` is no smaller than what there is.
        """
        text: Tensor = batch["text"]
        layout = batch["layout"].to(text.device)
        table = stream(layout)
        # Between passes films are kept at least in float32, whatever the model computes in.
        wide = torch.promote_types(model.patches.weight.dtype, torch.float32)
        shape = (text.shape[0], len(table.video), model.patch_size)
        x = torch.randn(shape, generator=generator("sample", seed), dtype=torch.float32).to(layout.device, wide)
        given = torch.zeros_like(table.film_of_shot, dtype=torch.bool) if known is None else known.to(layout.device)
        refuse(
            "sample",
            [f"known is for {len(given)} shots, the layout has {len(table.film_of_shot)}"]
            if given.shape != table.film_of_shot.shape
            else [],
        )
        if known is not None:
            x = torch.where(given[table.shot_of_video][:, None], model.patchify(batch["clips"]).to(x), x)
        taken: list[list[dict[int, list[int]]]] = []
        run = _Run(self, model, flow, step, seed, told)
        was_training = model.training
        model.eval()
        if self.order == "film":
            x = run.at_once(x, text, layout, given)
        else:
            self._warn_of_short_films(layout)
            for film in _films(layout):
                # Where there is a choice, each batch item has its own.
                rows = [slice(None)] if self.context is None else [slice(i, i + 1) for i in range(len(text))]
                chosen = [run.shot_by_shot(x[row], text[row], film, given.tolist()) for row in rows]
                taken.append(chosen * len(text) if self.context is None else chosen)
        model.train(was_training)
        return Drawn(model.unpatchify(x, layout), taken)

    def count(self, batch: Mapping[str, Any], known: Tensor | None = None) -> int:
        """How many Euler steps drawing this batch takes."""
        if self.order == "film":
            return self.steps
        shots = len(batch["clips"]) - (0 if known is None else int(known.sum()))
        return self.steps * shots * (1 if self.context is None else len(batch["text"]))

    def _warn_of_short_films(self, layout: zoo.Layout) -> None:
        longest = max(len(film.shots) for film in layout.films)
        if self.context is not None and self.context >= longest - 1:
            warnings.warn(
                f"sampling: context {self.context} takes every earlier shot; the longest film has {longest} shots",
                stacklevel=4,
            )


@dataclass(frozen=True)
class _Part:
    """Some shots of a film as a film of their own, and which tokens of the stream's video and text they are."""

    layout: zoo.Layout
    video: Tensor
    text: Tensor


@dataclass(frozen=True)
class _Film:
    """Where a film's shots lie in the stream's video and in its text, its global caption in the latter."""

    film: zoo.Film
    first: int  # the number of its first shot in the stream
    video: list[Tensor]
    text: list[Tensor]
    caption: Tensor

    def part(self, shots: Sequence[int]) -> _Part:
        film = zoo.Film(self.film.caption, tuple(self.film.shots[i] for i in shots))
        text = torch.cat([self.caption, *(self.text[i] for i in shots)])
        return _Part(zoo.Layout((film,), text.device), torch.cat([self.video[i] for i in shots]), text)


def _films(layout: zoo.Layout) -> list[_Film]:
    films = []
    shot = video = text = 0

    def tokens(start: int, count: int) -> Tensor:
        return torch.arange(start, start + count, device=layout.device)

    for film in layout.films:
        caption = tokens(text, film.caption)
        text += film.caption
        of_video, of_text = [], []
        for x in film.shots:
            of_video.append(tokens(video, len(x) - x.text))
            of_text.append(tokens(text, x.text))
            video, text = video + len(x) - x.text, text + x.text
        films.append(_Film(film, shot, of_video, of_text, caption))
        shot += len(film.shots)
    return films


@dataclass(frozen=True)
class _Run:
    """One drawing: the sampler, and what all its passes have in common."""

    euler: Euler
    model: VideoDiT
    flow: RectifiedFlow
    step: int | None
    seed: int
    told: Callable[[], object]

    def at_once(self, x: Tensor, text: Tensor, layout: zoo.Layout, given: Tensor) -> Tensor:
        """Patches (B, Nv, P) of all shots, drawn together; those that are given stay."""
        held = given[stream(layout).shot_of_video][:, None]  # (Nv, 1)
        texts = self.texts(text)
        memories: list[dict[Any, Any]] = [{} for _ in texts]

        def velocity(x: Tensor, now: float) -> Tensor:
            time = x.new_full((len(x), len(given)), now).masked_fill(given, 0.0)
            return self.velocity(x, texts, time, layout, memories, [None] * len(texts)).masked_fill(held, 0.0)

        return self.solve(x, velocity)

    def shot_by_shot(self, x: Tensor, text: Tensor, film: _Film, given: Sequence[bool]) -> dict[int, list[int]]:
        """Draw a film's shots into x (B, Nv, P), in place; which earlier shots each was drawn beside."""
        texts, taken = self.texts(text), {}
        pasts: list[Past | None] = []
        held: list[int] = []  # the shots whose keys the pasts hold
        for shot in range(len(film.film.shots)):
            if given[film.first + shot]:
                continue
            before = taken[shot] = self.choose(x, text, film, shot)
            if not self.model.strict or not before:
                pasts, held = [None] * len(texts), []
            elif held != before:
                if not held or held != before[: len(held)]:
                    pasts = [Past()] * len(texts)
                pasts, held = self.remember(x, texts, film.part(before), pasts), before
            x[:, film.video[shot]] = self.one_shot(x, texts, film.part([*before, shot]), film.video[shot], pasts)
        return taken

    def choose(self, x: Tensor, text: Tensor, film: _Film, shot: int) -> list[int]:
        """The earlier shots that enter, in film order; where there is a choice, x is of one batch item."""
        if self.euler.context is None or self.euler.context >= shot:
            return list(range(shot))
        part = film.part(range(shot + 1))
        words = self.model.words(text[:, part.text])
        seen, layout = self.model.embed(self.cast(x[:, part.video]), words, part.layout)
        chosen: list[int] = top_shots(seen, layout, shot, self.euler.context)[0].tolist()
        return chosen

    def remember(self, x: Tensor, texts: list[Tensor], clean: _Part, pasts: list[Past | None]) -> list[Past | None]:
        """The pasts, grown by the clean shots that they do not yet hold."""
        time = x.new_zeros(len(x), len(clean.layout.films[0].shots))
        context = {"step": self.step, "seed": self.seed}
        return [
            self.model(self.cast(x[:, clean.video]), text[:, clean.text], time, clean.layout, past=past, **context).past
            for text, past in zip(texts, pasts, strict=True)
        ]

    def one_shot(
        self, x: Tensor, texts: list[Tensor], part: _Part, own: Tensor, pasts: Sequence[Past | None]
    ) -> Tensor:
        """Patches (B, n, P) of a part's last shot, the video tokens `own` of the stream, after the shots before it."""
        before, own_texts = x[:, part.video[: -len(own)]], [text[:, part.text] for text in texts]
        memories: list[dict[Any, Any]] = [{} for _ in texts]
        time = x.new_zeros(len(x), len(part.layout.films[0].shots))

        def velocity(noisy: Tensor, now: float) -> Tensor:
            time[:, -1] = now
            made = self.velocity(torch.cat([before, noisy], dim=1), own_texts, time, part.layout, memories, pasts)
            return made[:, -len(own) :]

        return self.solve(x[:, own], velocity)

    def solve(self, x: Tensor, velocity: Callable[[Tensor, float], Tensor]) -> Tensor:
        grid = self.flow.warp(torch.linspace(1, 0, self.euler.steps + 1, dtype=torch.float32)).tolist()
        for now, then in pairwise(grid):
            x = x + (then - now) * velocity(x, now)
            self.told()
        return x

    def texts(self, text: Tensor) -> list[Tensor]:
        """The captions, and for guidance the null tokens in their place."""
        guided = self.euler.guidance != 1 and text.shape[1]
        every = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        return [text, self.model.drop_text(text, every)] if guided else [text]

    def velocity(
        self,
        x: Tensor,
        texts: list[Tensor],
        time: Tensor,
        layout: zoo.Layout,
        memories: list[dict[Any, Any]],
        pasts: Sequence[Past | None],
    ) -> Tensor:
        made: list[Tensor] = []
        for text, memory, past in zip(texts, memories, pasts, strict=True):
            out = self.model(self.cast(x), text, time, layout, step=self.step, seed=self.seed, memory=memory, past=past)
            made.append(out.velocity.to(x))
        return made[0] if len(made) == 1 else made[1] + self.euler.guidance * (made[0] - made[1])

    def cast(self, x: Tensor) -> Tensor:
        return x.to(self.model.patches.weight.dtype)
