"""From a self-attention's own token order to the stream of a `Layout`, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparse_zoo.bridge.family import Sizes, Text
from sparse_zoo.errors import ZooError, refuse
from sparse_zoo.layout import Layout, Shot


class Intercept(TorchFunctionMode):
    """Serves calls of torch's SDPA by a function of the same arguments while it is active, and counts them."""

    def __init__(self, serve: Any) -> None:
        super().__init__()
        self.serve, self.calls = serve, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self.serve(*args, **(kwargs or {}))


@dataclass(frozen=True, eq=False)
class Stream:
    """A layout and, for each of its tokens, where the self-attention has it; tokens of padding are in none.

    `order` is int64 (L,), or None where both orders are one.
    """

    layout: Layout
    tokens: int
    order: Tensor | None

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The model's tokens in stream order."""
        return x if self.order is None else x.index_select(dim, self.order)

    def scatter(self, x: Tensor, dim: int) -> Tensor:
        """The stream's tokens in the model's order; padding, which nobody reads, gets 0."""
        if self.order is None:
            return x
        shape = [*x.shape]
        shape[dim] = self.tokens
        return x.new_zeros(shape).index_copy(dim, self.order, x)


def film_layout(grid: Sizes, shots: tuple[int, ...] | None, text: int, captions: tuple[int, ...] | None) -> Layout:
    """The layout of one film on a grid of tokens; the last `sum(captions)` text tokens are the shots' captions.

    Raises `ZooError` for shots or captions that do not add up.
    """
    frames, rows, cols = grid
    shots = (frames,) if shots is None else shots
    own = (0,) * len(shots) if captions is None else captions
    refuse(
        "film",
        [
            f"shots {list(shots)} make {sum(shots)} frames, the video has {frames} frames of tokens; "
            "give each shot's frames after the temporal patch"
            if sum(shots) != frames
            else "",
            f"captions {list(own)} are for {len(own)} shots, there are {len(shots)}" if len(own) != len(shots) else "",
            f"captions {list(own)} take {sum(own)} text tokens, the stream has {text}"
            + ("; this family reads text by cross-attention, outside the stream" if not text else "")
            if sum(own) > text
            else "",
        ],
    )
    parts = [Shot(count, rows, cols, words) for count, words in zip(shots, own, strict=True)]
    return Layout.film(parts, caption=text - sum(own))


def make_stream(
    place: Text,
    grid: Sizes,
    tokens: int,
    kept: Tensor | None,
    shots: tuple[int, ...] | None,
    captions: tuple[int, ...] | None,
    device: torch.device,
) -> Stream:
    """The stream of `tokens` tokens of which `kept`, int64 and rising, are no padding (all, when None)."""
    video = math.prod(grid)
    text = tokens - video
    refuse(
        "attached attention",
        [
            f"it has {tokens} tokens, a video of {' × '.join(map(str, grid))} tokens has {video}"
            + (" and there is no text in its stream" if place == "none" else "")
            if text < 0 or (place == "none" and text)
            else ""
        ],
    )
    first = text if place == "before" else 0
    own = torch.arange(first, first + video, device=device)
    words = torch.arange(text, device=device) + (0 if place == "before" else video)
    if kept is not None:
        words = kept[(kept < first) | (kept >= first + video)]
        refuse(
            "attached attention",
            ["its mask hides video tokens; only padding of text can be left out"]
            if len(kept) - len(words) != video
            else [],
        )
    layout = film_layout(grid, shots, len(words), captions).to(device)
    order = torch.empty(len(layout), dtype=torch.long, device=device)
    order[layout.is_text] = words
    order[~layout.is_text] = own
    same = len(order) == tokens and bool((order == torch.arange(tokens, device=device)).all())
    return Stream(layout, tokens, None if same else order)


def kept_tokens(mask: Tensor | None) -> Tensor | None:
    """The keys that a mask of padding leaves, int64 and rising; None: all.

    Raises `ZooError` for a mask that is not one of padding, or differs from sample to sample.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.dim() != 4:
        raise ZooError(
            f"attached attention: its mask is {mask.dtype} of shape {tuple(mask.shape)}; "
            "only a boolean mask of padding, (B, 1 or H, 1 or L, L), can be served"
        )
    keys = mask.any(2).any(1)  # (B, L)
    ragged = keys.sum(1).tolist()
    reads = mask.any(3, keepdim=True)
    refuse(
        "attached attention",
        [
            f"the samples of a batch have {ragged} tokens that are no padding; "
            "they need text of one length. Call the model for one film at a time, or pad all prompts alike"
            if not bool((keys == keys[:1]).all())
            else "",
            "its mask is not one of padding alone: queries read different keys; causal and windowed models cannot be "
            "attached"
            if not bool(((mask == keys[:, None, None]) | ~reads).all())
            else "",
        ],
    )
    return None if bool(keys[0].all()) else keys[0].nonzero()[:, 0]
