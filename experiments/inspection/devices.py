"""What a run on several devices takes of each of them: memory, bytes exchanged, and the share of time that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table

import sparse_zoo as zoo
from experiments.analysis.formatting import si
from lit_modules.dit import Block, VideoDiT
from lit_modules.flops import ModelShape, linear_flops
from lit_modules.settings import Parallel
from lit_modules.stream import stream
from sparse_zoo.errors import refuse, unknown
from sparse_zoo.parallel import exchanged_elements, why_not

WAN = {
    "Wan 1.3B": ModelShape(dim=1536, depth=30, heads=12, mlp_ratio=8960 / 1536),
    "Wan 14B": ModelShape(dim=5120, depth=40, heads=40, mlp_ratio=13824 / 5120),
}
TOKENS = {"180k": (60, 50, 60), "580k": (80, 75, 97)}
"""Frames, rows and columns, in tokens, of one shot of 180,000 and of 582,000 tokens."""
BANDWIDTH = 50.0
"""GB/s that a device sends and receives at once, where not given: a 400 Gbit/s link each."""
SPEED = 400.0
"""TFLOP/s that a device attains, where not given: about 40 % of an H100's peak in bfloat16."""
WIDE, NARROW = 4, 2  # bytes of weights, gradients and optimizer states; of what is exchanged for attention (bfloat16)
STATES = 4  # tensors as large as the weights beside them: gradient, two of AdamW, average

NOTES = (
    "Weights, gradients, AdamW's two states and the average take 4 bytes a parameter each, on every device with "
    "sequence=1, else shared out over all devices; the blocks that run and that are fetched next are whole besides.",
    "Activations: the input of each block (float32), kept, and what one block keeps while it is recomputed, with "
    "activation checkpointing; the latter is measured in a small block and scaled by tokens and width.",
    "Exchange of attention, a layer: q, k, v and output forward, their gradients backward, in bfloat16, and features; "
    "the forward runs twice. Exchange of weights, a layer: two gathers and one reduction in float32.",
    "Attention has the density that was simulated at the size asked for, in each row.",
    "Time: FLOPs ÷ attained speed, and bytes ÷ bandwidth, one after the other; real runs hide a part of the exchange.",
)


@dataclass(frozen=True)
class Device:
    """One device's share of one training step. Bytes, FLOPs and seconds; `exchange` is of a layer.

    weights: Weights, as held between passes.
    optimizer: Gradients, optimizer states and the average.
    whole: Blocks that are gathered while they run.
    activations: What the forward pass keeps, and one block's recomputation.
    attention_exchange: Bytes sent for a layer's attention, forward twice and backward.
    weights_exchange: Bytes sent for a layer's weights and their gradients.
    compute_seconds: Of a step.
    exchange_seconds: Of a step.
    """

    name: str
    tokens: int
    weights: float
    optimizer: float
    whole: float
    activations: float
    attention_exchange: float
    weights_exchange: float
    compute_seconds: float
    exchange_seconds: float

    @property
    def memory(self) -> float:
        """Bytes in all."""
        return self.weights + self.optimizer + self.whole + self.activations

    @property
    def share(self) -> float:
        """The share of a step's time that exchange takes, if nothing of it is hidden."""
        return self.exchange_seconds / (self.exchange_seconds + self.compute_seconds)


def read_parallel(text: str) -> Parallel:
    """The devices of a text like "data=8,sequence=4"; raises `ZooError` with every reason where it is none."""
    pairs = dict(part.strip().partition("=")[::2] for part in text.split(","))
    refuse(
        "zoo cost --parallel",
        [unknown("part", key, ("data", "sequence")) for key in pairs if key not in ("data", "sequence")]
        + [f"{key} must be a whole number, got {value!r}" for key, value in pairs.items() if not value.isdecimal()],
    )
    return Parallel(**{key: int(value) for key, value in pairs.items()})


def device_share(
    name: str,
    method: str,
    settings: Mapping[str, Any],
    layout: zoo.Layout,
    shape: ModelShape,
    parallel: Parallel,
    density: float,
    *,
    bandwidth: float = BANDWIDTH,
    speed: float = SPEED,
) -> Device:
    """Count what one device holds, sends and computes in a training step.

    Args:
        name: Of the row.
        method: The attention.
        settings: Its settings.
        layout: The film that the devices of a group share, in tokens, captions included.
        shape: The model's.
        parallel: The devices.
        density: Of the attention.
        bandwidth: GB/s.
        speed: TFLOP/s.

    Returns:
        The share of the device that holds most tokens.

    Raises:
        ZooError: If the attention cannot be split so.
    """
    ranks, devices = parallel.sequence, parallel.devices
    built = zoo.build(method, heads=shape.heads, head_dim=shape.head_dim, dim=shape.dim, **settings)
    reasons = [f"{name}: {reason}" for reason in why_not(built, shape.heads, ranks) if reason]
    rates = {"bandwidth": bandwidth, "speed": speed}
    reasons += [f"--{rate} must be above 0, got {value}" for rate, value in rates.items() if not value > 0]
    refuse("zoo cost --parallel", reasons)
    block, rest = _parameters(shape, {"name": method, **settings})
    tokens = len(layout)
    own = -(-tokens // ranks)
    features = built.features(torch.zeros(1, 1, shape.dim))
    held = (shape.depth * block + rest) * WIDE / (devices if ranks > 1 else 1)
    sent = exchanged_elements(tokens, ranks, heads=shape.heads, head_dim=shape.head_dim)
    of_features = sum(x.numel() * x.element_size() for x in features.values())
    attention = NARROW * (2 * sent[0] + sent[1]) + of_features * (2 * (ranks - 1) * own + tokens - own)
    # A gather sends every device's part to all; so does a reduction. DDP's all-reduce is one of each.
    weights = block * WIDE * (devices - 1) / devices * (3 if ranks > 1 else 2)
    linear = linear_flops(shape, layout, 1)
    flops = (linear.both + linear.forward + density * 18 * layout.dense_pairs * shape.dim * shape.depth) / ranks
    return Device(
        name=name,
        tokens=tokens,
        weights=held,
        optimizer=STATES * held,
        whole=(2 * block + rest) * WIDE if ranks > 1 else 0,
        activations=own * shape.dim * (shape.depth * WIDE + kept_bytes()),
        attention_exchange=attention if ranks > 1 else 0,
        weights_exchange=weights,
        compute_seconds=flops / (speed * 1e12),
        exchange_seconds=shape.depth * ((attention if ranks > 1 else 0) + weights) / (bandwidth * 1e9),
    )


def at_scale(
    method: str,
    settings: Mapping[str, Any],
    layout: zoo.Layout,
    shape: ModelShape,
    parallel: Parallel,
    density: float,
    *,
    bandwidth: float = BANDWIDTH,
    speed: float = SPEED,
) -> list[Device]:
    """The model and film asked for, then Wan's shapes at 180,000 and 582,000 tokens. Arguments as `device_share`."""
    asked = {"as asked": (layout, shape)}
    for name, wan in WAN.items():
        for tokens, grid in TOKENS.items():
            asked[f"{name}, {tokens}"] = (zoo.Layout.film([zoo.Shot(*grid)]), wan)
    return [
        device_share(name, method, settings, film, own, parallel, density, bandwidth=bandwidth, speed=speed)
        for name, (film, own) in asked.items()
    ]


def to_json(shares: list[Device]) -> list[dict[str, Any]]:
    """The rows with their sums."""
    return [{**asdict(one), "memory": one.memory, "exchange_share": one.share} for one in shares]


def table(shares: list[Device], parallel: Parallel, bandwidth: float, speed: float) -> Table:
    """For a terminal: a row for each model and film."""
    title = (
        f"each of {parallel.devices} devices, data={parallel.data}, sequence={parallel.sequence}, "
        f"at {bandwidth:g} GB/s and {speed:g} TFLOP/s"
    )
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in ("", "tokens", "weights", "optimizer", "activations", "memory", "exchange/layer", "exchange's time"):
        made.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for one in shares:
        exchange = one.attention_exchange + one.weights_exchange
        sizes = (one.weights + one.whole, one.optimizer, one.activations, one.memory, exchange)
        made.add_row(one.name, f"{one.tokens:,}", *(si(size, "B") for size in sizes), f"{one.share:.1%}")
    return made


def _parameters(shape: ModelShape, attention: Mapping[str, Any]) -> tuple[int, int]:
    """How many parameters a block has, and the rest of the model but its words; nothing is allocated."""
    with torch.device("meta"):
        model = VideoDiT(
            dim=shape.dim,
            depth=1,
            heads=shape.heads,
            channels=shape.patch_size,
            patch=(1, 1, 1),
            vocabulary=0,
            attention=attention,
            text=shape.text,
            mlp_ratio=shape.mlp_ratio,
        )
    block = sum(p.numel() for p in model.blocks.parameters())
    return block, sum(p.numel() for p in model.parameters()) - block


def kept_bytes() -> float:
    """Bytes that a block keeps for its backward pass, for each token and channel: measured, under bfloat16 autocast."""
    dim, layout = 64, zoo.Layout.film([zoo.Shot(4, 8, 8)])
    model = VideoDiT(dim=dim, depth=1, heads=4, channels=1, patch=(1, 1, 1), vocabulary=0, attention={"name": "dense"})
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    found: list[float] = []

    def measure(block: torch.nn.Module, given: tuple[Any, ...], result: Any) -> None:  # noqa: ARG001
        found.append(sum(kept.values()) / (len(layout) * dim))

    hooks = [
        model.blocks[0].register_forward_pre_hook(lambda *_: kept.clear()),
        model.blocks[0].register_forward_hook(measure),
    ]
    assert isinstance(model.blocks[0], Block)
    video = torch.randn(1, len(stream(layout).video), 1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        model(video, torch.zeros(1, 0, dtype=torch.long), torch.full((1, 1), 0.5), layout)
    for hook in hooks:
        hook.remove()
    return found[0]
