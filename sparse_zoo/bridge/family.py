"""What the bridge must know of a family of transformers, and the registry of families."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sparse_zoo.errors import ZooError, refuse, unknown

Arguments = Mapping[str, Any]
"""What the model's or an attention's `forward` was called with, by parameter name."""

Sizes = tuple[int, int, int]
Text = Literal["none", "before", "after"]


def latent_sizes(model: nn.Module, arguments: Arguments) -> Sizes:  # noqa: ARG001
    """Frames, rows and columns of latents (B, C, F, H, W)."""
    f, h, w = arguments["hidden_states"].shape[2:]
    return f, h, w


def model_time(model: nn.Module, arguments: Arguments) -> Tensor:  # noqa: ARG001
    """Noise times (B,) of timesteps that run to 1000; of several a sample (one a token or frame), the largest."""
    time = torch.as_tensor(arguments["timestep"])
    return (
        time.reshape(1) / 1000 if time.dim() == 0 else time.flatten(1).amax(1) / 1000 if time.dim() > 1 else time / 1000
    )


def largest(time: Tensor) -> Tensor:
    """One time a sample, (B,) or (1,), of one for all or several a sample."""
    return time.flatten(1).amax(1) if time.dim() > 1 else time.reshape(-1)


def projected_shape(attention: nn.Module) -> Sizes:
    """Heads, head dim and width of `hidden`, from the query projection."""
    heads = int(attention.heads)  # type: ignore[arg-type]
    return heads, attention.to_q.out_features // heads, attention.to_q.in_features  # type: ignore[union-attr, operator, return-value]


@dataclass(frozen=True)
class Family:
    """How transformers of one kind lay out their stream. Functions get modules and their arguments by name.

    Args:
        name: What messages call it.
        classes: Names of the model's class, or of a base class of it.
        sites: Regular expression that matches the whole module name of each self-attention.
        text: Where the stream of a self-attention has its text: "before" or "after" the video, or "none".
        patch: Frames, rows and columns of latents in one token.
        latent: Frames, rows and columns of the latents that the model was given.
        noise: Noise time of each sample, 0 clean … 1, or None where the model is not told.
        shape: Heads, head dim and width of `hidden` of a self-attention.
        hidden: What a self-attention projects its video tokens from, (B, video, dim).
        hidden_text: What it projects its text tokens from, (B, text, dim), or None where `hidden` holds both.
    """

    name: str
    classes: tuple[str, ...]
    sites: str
    text: Text
    patch: Callable[[nn.Module], Sizes]
    latent: Callable[[nn.Module, Arguments], Sizes] = latent_sizes
    noise: Callable[[nn.Module, Arguments], Tensor | None] = model_time
    shape: Callable[[nn.Module], Sizes] = projected_shape
    hidden: Callable[[Arguments], Tensor] = lambda arguments: arguments["hidden_states"]
    hidden_text: Callable[[Arguments], Tensor | None] = lambda arguments: arguments.get("encoder_hidden_states")

    def __post_init__(self) -> None:
        refuse(
            f"family {self.name!r}",
            [
                unknown("place of text", self.text, get_args(Text)) if self.text not in get_args(Text) else "",
                "classes must name at least one class" if not self.classes else "",
                "" if _compiles(self.sites) else f"sites must be a regular expression, got {self.sites!r}",
            ],
        )

    def stream_hidden(self, arguments: Arguments) -> Tensor:
        """What the whole stream of a self-attention was projected from, (B, L, dim), in its order."""
        video = self.hidden(arguments)
        text = None if self.text == "none" else self.hidden_text(arguments)
        if text is None:
            return video
        return torch.cat([text, video] if self.text == "before" else [video, text], dim=1)


_families: dict[str, Family] = {}
UNSERVED: dict[str, str] = {}
"""Classes of video transformers whose self-attention is not one over a grid of tokens, and what it is instead."""


def register_family(family: Family) -> Family:
    """Make a family known by the names of its classes; raises `ZooError` where a name or a class is taken."""
    taken = {cls: one.name for one in _families.values() for cls in one.classes}
    refuse(
        f"register_family({family.name!r})",
        [f"the name is taken; known: {', '.join(_families)}" if family.name in _families else ""]
        + [f"class {cls} is of family {taken[cls]!r}" for cls in family.classes if cls in taken],
    )
    _families[family.name] = family
    return family


def family_names() -> list[str]:
    """All registered families."""
    return sorted(_families)


def find_family(model: nn.Module) -> Family:
    """The family of a model by the name of its class, or of the nearest base class that is known."""
    known = {cls: family for family in _families.values() for cls in family.classes}
    for base in type(model).__mro__:
        if base.__name__ in known:
            return known[base.__name__]
        if base.__name__ in UNSERVED:
            raise ZooError(f"attach: {base.__name__} cannot be served: {UNSERVED[base.__name__]}")
    raise ZooError(
        f"attach: {unknown('model class', type(model).__name__, known)}. "
        "Declare another one with sparse_zoo.bridge.register_family"
    )


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, TypeError):
        return False
    return True
