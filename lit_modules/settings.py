"""The settings of the model, its flow, its optimizer and its sampler: one documented line a field, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sparse_zoo.errors import refuse, unknown

TIMES = ("logistic", "uniform")
OPTIMIZERS = ("adamw", "muon")
ORDERS = ("film", "shots")


@dataclass(frozen=True)
class Model:
    """The shape of the video diffusion transformer."""

    dim: int
    """Width of the tokens."""
    depth: int
    """Number of layers."""
    heads: int
    """Attention heads; they divide `dim`."""
    text: Literal["joint", "cross"] = "joint"
    """"joint" puts captions into the stream, in layout order; "cross" lets video read its own captions beside it."""
    pooled_text: Literal["none", "adaln", "tokens"] = "adaln"
    """Where the sum of a shot's word embeddings is added: its condition ("adaln"), its video tokens too, or nowhere."""
    predicts: Literal["velocity", "clean"] = "velocity"
    """What the last layer predicts; "clean", the film, suits patches of more numbers than `dim`."""
    mlp_ratio: float = 4.0
    """Width of the MLP's hidden layer, as a multiple of `dim`."""
    checkpoint: bool = False
    """Recomputes each block in the backward pass instead of keeping its activations."""


@dataclass(frozen=True)
class Outline:
    """The self-attentions of a model: how many, their heads, and the width that they read."""

    depth: int
    heads: int
    head_dim: int
    dim: int


@dataclass(frozen=True)
class Pretrained:
    """A pretrained video transformer: where it is, what of it trains, and towards what beside the data."""

    folder: str
    """Folder of a diffusers pipeline, or of its transformer, on disk; nothing is downloaded."""
    lora_rank: int = 0
    """Rank of the low-rank adapters (LoRA) that train with the methods' own parameters; 0 trains all weights."""
    lora_alpha: int = 16
    """What the adapters add is multiplied by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the linear layers that get adapters."""
    distill_output: float = 0.0
    """Weight of the mean square distance to the velocity that the dense model predicts."""
    distill_layers: float = 0.0
    """Weight of the mean over layers of ‖attention - dense attention‖² / ‖dense attention‖², projected out."""

    def __post_init__(self) -> None:
        weights = {"distill_output": self.distill_output, "distill_layers": self.distill_layers}
        refuse(
            "model",
            [f"{name} must be at least 0, got {weight}" for name, weight in weights.items() if weight < 0]
            + [
                f"lora_rank must be at least 0, got {self.lora_rank}" if self.lora_rank < 0 else "",
                f"lora_alpha must be at least 1, got {self.lora_alpha}" if self.lora_alpha < 1 else "",
                "lora_targets must name at least one layer" if not self.lora_targets else "",
            ],
        )

    @property
    def distills(self) -> bool:
        """Whether the dense model is a teacher."""
        return bool(self.distill_output or self.distill_layers)


@dataclass(frozen=True)
class Flow:
    """How training times are chosen; they are then moved: t -> shift·t / (1 + (shift - 1)·t)."""

    times: Literal["logistic", "uniform"] = "logistic"
    """Distribution of training times: logistic(mean + std·z) with z normal, or uniform between 0 and 1."""
    mean: float = 0.0
    """Mean of the logistic distribution."""
    std: float = 1.0
    """Standard deviation of the logistic distribution."""
    shift: float = 1.0
    """Moves times towards noise where above 1; 1 leaves them."""
    per_shot: bool = False
    """Gives each shot a time of its own; otherwise all shots of a film share one."""
    history: float = 0.0
    """Share of the films whose first shots, from one to all but the last, are given clean, at time 0."""
    known: float = 0.0
    """Share of the films whose known shots, those that are given where films are judged, are the clean ones instead."""
    drop_text: float = 0.1
    """How often a film's captions are all replaced by the null token, for guidance."""

    def __post_init__(self) -> None:
        """Refuse settings out of range, all at once; raises `ZooError`."""
        refuse(
            "flow",
            [
                unknown("times", self.times, TIMES) if self.times not in TIMES else "",
                f"std must be at least 0, got {self.std}" if self.std < 0 else "",
                f"shift must be above 0, got {self.shift}" if self.shift <= 0 else "",
                *(
                    f"{name} must be in [0, 1], got {share}"
                    for name, share in (("history", self.history), ("known", self.known), ("drop_text", self.drop_text))
                    if not 0 <= share <= 1
                ),
            ],
        )


@dataclass(frozen=True)
class Optim:
    """Optimizer, linear warm-up, then a cosine down to `floor`·lr at the last step; average of the weights."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """"muon" is Muon, with torch's momentum .95, for the matrices of the blocks and AdamW for all other weights."""
    lr: float = 1e-3
    """Learning rate of AdamW."""
    muon_lr: float = 0.02
    """Learning rate of Muon."""
    muon_float32: bool = False
    """Muon's iterations run in float32, faster on a CPU without bfloat16; false: in bfloat16, as torch has it."""
    weight_decay: float = 0.01
    """Weight decay, for the matrices of linear layers alone."""
    beta1: float = 0.9
    """First beta of AdamW."""
    beta2: float = 0.99
    """Second beta of AdamW."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly."""
    floor: float = 0.1
    """Learning rate at the last step, as a share of the highest."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, approached from below over the first steps; 0: none."""

    def __post_init__(self) -> None:
        """Refuse settings out of range, all at once; raises `ZooError`."""
        unit = {"beta1": self.beta1, "beta2": self.beta2, "ema_decay": self.ema_decay}
        refuse(
            "optim",
            [f"{name} must be in [0, 1), got {value}" for name, value in unit.items() if not 0 <= value < 1]
            + [
                unknown("optimizer", self.optimizer, OPTIMIZERS) if self.optimizer not in OPTIMIZERS else "",
                f"lr must be above 0, got {self.lr}" if self.lr <= 0 else "",
                f"muon_lr must be above 0, got {self.muon_lr}" if self.muon_lr <= 0 else "",
                f"weight_decay must be at least 0, got {self.weight_decay}" if self.weight_decay < 0 else "",
                f"warmup_steps must be at least 0, got {self.warmup_steps}" if self.warmup_steps < 0 else "",
                f"floor must be in [0, 1], got {self.floor}" if not 0 <= self.floor <= 1 else "",
            ],
        )

    def rate(self, step: int, total: float) -> float:
        """The factor on lr at optimizer step `step`, 0-based, of `total` (infinite: no decay)."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / max(1.0, total - self.warmup_steps))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Sampler:
    """How films are generated: Euler steps from noise to film, evenly spaced before the flow's shift."""

    steps: int = 12
    """Euler steps."""
    guidance: float = 1.0
    """1 follows the captions; g > 1 goes g times as far from the velocity without captions, by a second pass."""
    order: Literal["film", "shots"] = "film"
    """"film" generates all shots at once; "shots" one after the other, the earlier ones clean at time 0."""
    context: int | None = None
    """With order "shots": how many earlier shots enter, chosen by their mean input to the first block; null: all."""

    def __post_init__(self) -> None:
        """Refuse settings out of range, all at once; raises `ZooError`."""
        refuse(
            "sampling",
            [
                f"steps must be at least 1, got {self.steps}" if self.steps < 1 else "",
                unknown("order", self.order, ORDERS) if self.order not in ORDERS else "",
                f"context must be at least 0, got {self.context}"
                if self.context is not None and self.context < 0
                else "",
                "context is for order 'shots'" if self.context is not None and self.order == "film" else "",
            ],
        )


@dataclass(frozen=True)
class Sampling(Sampler):
    """How films are generated during training, and how often."""

    every: int = 1
    """Films are generated at every so many validations."""

    def __post_init__(self) -> None:
        """Refuse settings out of range, all at once; raises `ZooError`."""
        super().__post_init__()
        refuse("sampling", [f"every must be at least 1, got {self.every}"] if self.every < 1 else [])


@dataclass(frozen=True)
class Parallel:
    """How many devices a run has: data · sequence."""

    data: int = 1
    """Groups of devices that each train on films of their own; gradients are averaged over them."""
    sequence: int = 1
    """Devices that share the tokens of each film. Above 1 the weights are shared out over all devices, too."""

    def __post_init__(self) -> None:
        refuse(
            "parallel",
            [
                f"{name} must be at least 1, got {value}"
                for name, value in (("data", self.data), ("sequence", self.sequence))
                if value < 1
            ],
        )

    @property
    def devices(self) -> int:
        """How many devices the run has in all."""
        return self.data * self.sequence
