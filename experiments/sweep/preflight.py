"""A cell tried before it runs: its model freshly built, its plans on the data's own layouts; nothing is learnt."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sparse_zoo as zoo
from experiments.config import datamodule
from experiments.config.names import is_pretrained
from experiments.config.resolve import Config, attention_shape, resolve
from experiments.config.sections import LIMITS
from experiments.tracking.store import Cell
from lit_modules import FlowLoss, RectifiedFlow, VideoDiT
from lit_modules.callbacks import synchronize
from lit_modules.dit import Block
from lit_modules.flops import ModelShape, caption_flops, linear_flops
from lit_modules.flow import generator
from lit_modules.precision import default_precision
from lit_modules.pretrained import ONE_TIME, LitPretrained, attach_layers, load_transformer, noised, predict
from sparse_zoo.errors import ZooError, refuse

BATCHES, ITEMS = 4, 2  # training batches tried, and items of each; packed films are one item
TIMED = 3  # steps timed, after one to warm up
KEPT = 8192  # models whose figures are kept: a sweep asks for those of each model several times

Batch = dict[str, Any]


@dataclass(frozen=True)
class LayerCost:
    """Attention of one layer: density over the tried batches, and FLOPs of one training step.

    Forward, backward and routing, of a whole batch.
    """

    density: float
    flops: float


@dataclass(frozen=True)
class Preflight:
    """What a freshly built cell does on its first training batches.

    tokens: of the stream that attention sees, mean over batches; items: streams in a batch.
    layers: attention, layer by layer.
    varies: whether layers, heads or films of one layout differ in how much they attend to: where this comes from q and
        k it may move as training goes.
    flops: of one training step of the whole model, forward and backward.
    parameters: numbers that are trained.
    """

    tokens: float
    items: int
    layers: tuple[LayerCost, ...]
    varies: bool
    flops: float
    parameters: int

    @property
    def density(self) -> float:
        """Mean over layers."""
        return statistics.fmean(layer.density for layer in self.layers)

    @property
    def attention_flops(self) -> float:
        """Sum over layers."""
        return sum(layer.flops for layer in self.layers)


class Planning(nn.Module):
    """An attention that plans and does not attend.

    A fresh block multiplies what attention gives by 0, so that every layer gets the q and k that it will get at the
    first step of training. The first plans are checked.
    """

    def __init__(self, attention: zoo.Attention) -> None:
        """Stand in for a method, which makes the plans."""
        super().__init__()
        self.attention = attention
        self.checked = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: zoo.Layout, **context: Any) -> zoo.Result:
        """Return the method's plans with an output of zeros, (B, H, L, D)."""
        call = zoo.Call(q, k, v, layout.to(q.device), **context)
        method = self.attention.at(call.step) if isinstance(self.attention, zoo.Scheduled) else self.attention
        if call.hidden is not None:
            call = replace(call, features=method.features(call.hidden))
        branches = method.branches(call)
        plans = [method.attended(branch, call) for branch in branches if isinstance(branch, zoo.Branch)]
        for plan in () if self.checked else plans:
            plan.validate()
        self.checked = True
        return zoo.Result(
            out=torch.zeros_like(q),
            plans=plans,
            losses={},
            kernel="none",
            layout=layout,
            routing_flops=method.routing_flops(call),
            term_flops=sum(branch.flops for branch in branches if isinstance(branch, zoo.Term)),
        )


def run_preflight(config: Config) -> Preflight:
    """Build a config's data and model and let it plan; made once for configs alike in what matters here.

    A pretrained model runs forward as it is in its folder, without adapters. Of a model of our own, weights, films and
    noise times are drawn as in the first steps of the run; of each of `BATCHES` batches, `ITEMS` items. Raises
    `ZooError` with whatever the parts refuse; what else they raise comes through.
    """
    if is_pretrained(config["model"]):
        return _run_pretrained(*_model_key(config))
    return _run_preflight(*_model_key(config))


def _model_key(config: Config) -> tuple[str, str, tuple[type, ...]]:
    """What decides how a freshly built model computes: settings as JSON, device, and the classes of the methods."""
    config = resolve(config)
    parts = {key: config[key] for key in ("seed", "data", "model", "flow", "attention")}
    classes = tuple(zoo.get(layer["name"]) for layer in layer_settings(config))
    return json.dumps(parts, sort_keys=True), _device(config["trainer"]), classes


def layer_settings(config: Config) -> list[dict[str, Any]]:
    """The attention of each layer, as settings with a name."""
    given = config["attention"]
    return given if isinstance(given, list) else [given] * attention_shape(config["model"]).depth


@lru_cache(maxsize=KEPT)
def _run_preflight(settings: str, device: str, _classes: tuple[type, ...]) -> Preflight:
    config = json.loads(settings)
    made, batches = _data(json.dumps(config["data"]))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = _model(config, made).to(device)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        blocks = cast("list[Block]", list(model.blocks))
        for block in blocks:
            block.attention = Planning(block.attention)  # type: ignore[assignment]
        costs = [zoo.Cost(0, 0, 0, 0)] * len(blocks)
        flops, rest, tokens = [0.0] * len(blocks), 0.0, 0
        told: dict[tuple[str, int, zoo.Layout], set[int]] = {}
        entries = [json.dumps(layer) for layer in layer_settings(config)]
        for number, batch in enumerate(batches):
            items, share = len(batch["text"]), 1 / len(batches)
            results = _loss(config, model, _narrowed(batch), number, device).output.results
            for i, result in enumerate(results):
                cost = result.cost()
                costs[i] += cost
                taken = cost.flops + cost.flops_backward + cost.routing_flops
                flops[i] += share * taken * items / min(items, ITEMS)
                for branch, plan in enumerate(result.plans):
                    told.setdefault((entries[i], branch, result.layout), set()).update(plan.pairs.flatten().tolist())
            tokens += len(results[0].layout)
            shape = _shape(model, config["model"].get("mlp_ratio", 4.0))
            rest += share * linear_flops(shape, batch["layout"], items).both
            rest += share * caption_flops(shape, batch["layout"], items).both
    return Preflight(
        tokens / len(batches),
        max(len(batch["text"]) for batch in batches),
        tuple(LayerCost(cost.density, each) for cost, each in zip(costs, flops, strict=True)),
        any(len(pairs) > 1 for pairs in told.values()),
        rest + sum(flops),
        parameters,
    )


@lru_cache(maxsize=KEPT)
def _run_pretrained(settings: str, device: str, _classes: tuple[type, ...]) -> Preflight:
    """The same for a pretrained model: FLOPs outside attention are those of its linear layers and convolutions."""
    config = json.loads(settings)
    _, batches = _data(json.dumps(config["data"]), pretrained=True)
    model, linear = _transformer(config["model"]["folder"], device), 0.0
    entries = [json.dumps(layer) for layer in layer_settings(config)]
    costs, told = [zoo.Cost(0, 0, 0, 0)] * len(entries), dict[tuple[str, int, zoo.Layout], set[int]]()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(config["seed"])
        bridge = attach_layers(model, config["attention"])
        try:
            for number, batch in enumerate(batches):
                moved = move_data_to_device(batch, torch.device(device))
                purpose = (config["seed"], 0, number)
                draws = generator("train", *purpose)
                time = RectifiedFlow(**config["flow"]).draw_times(len(batch["latents"]), ONE_TIME, draws)[:, 0]
                bridge.film(batch.get("shots"), step=0, seed=generator("attention", *purpose).initial_seed())
                noisy = noised(moved["latents"], time.to(device), draws)[0]
                model.train()
                predict(model, noisy, time.to(device), moved["arguments"])
                for i, result in bridge.results.items():
                    costs[i] += result.cost()
                    for branch, plan in enumerate(result.plans):
                        plan.validate()
                        told.setdefault((entries[i], branch, result.layout), set()).update(
                            plan.pairs.flatten().tolist()
                        )
                with bridge.original(), FlopCounterMode(display=False) as counter:
                    predict(model, noisy, time.to(device), moved["arguments"])
                counts = counter.get_flop_counts()["Global"]
                linear += sum(count for op, count in counts.items() if "attention" not in str(op))
            tokens, items = len(bridge.results[0].layout), max(len(batch["latents"]) for batch in batches)
            parameters = sum(p.numel() for p in (bridge if config["model"].get("lora_rank") else model).parameters())
        finally:
            bridge.detach()
    share = 1 / len(batches)
    attention = [LayerCost(c.density, share * (c.flops + c.flops_backward + c.routing_flops)) for c in costs]
    backward = 1 if config["model"].get("lora_rank") else 2  # frozen weights have no gradient, what they read has
    return Preflight(
        tokens,
        items,
        tuple(attention),
        any(len(pairs) > 1 for pairs in told.values()),
        share * (1 + backward) * linear + sum(layer.flops for layer in attention),
        parameters,
    )


@lru_cache(maxsize=1)
def _transformer(folder: str, device: str) -> nn.Module:
    """A pretrained transformer; methods are attached to it and detached, which leaves it as it was."""
    return load_transformer(Path(folder)).to(device)


def step_seconds(config: Config) -> float | None:
    """Median seconds of `TIMED` training steps (forward and backward) after one; None where its device is not here.

    Timed once for configs alike in their model, data and precision.
    """
    settings, device, classes = _model_key(config)
    accelerator = config["trainer"].get("accelerator", "auto")
    if device == "cpu" and accelerator in ("gpu", "cuda"):
        return None
    precision = str(config["trainer"].get("precision") or default_precision(accelerator))
    return _step_seconds(settings, device, precision, classes)


@lru_cache(maxsize=KEPT)
def _step_seconds(settings: str, device: str, precision: str, _classes: tuple[type, ...]) -> float:
    config = json.loads(settings)
    pretrained = is_pretrained(config["model"])
    made, batches = _data(json.dumps(config["data"]), pretrained=pretrained)
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16
    half = torch.autocast(device, dtype, enabled="16" in precision and (device != "cpu" or "bf16" in precision))
    seconds = []
    with torch.random.fork_rng(devices=[]):
        if pretrained:
            parts = {key: config[key] for key in ("model", "attention", "flow", "seed")}
            model: nn.Module = LitPretrained(**parts).to(device)
        else:
            model = _model(config, made).to(device)
        for number in range(TIMED + 1):
            synchronize(torch.device(device))
            start = time.perf_counter()
            with half:
                losses = _losses(config, model, batches[number % len(batches)], number, device)
            torch.stack(losses).sum().backward()
            synchronize(torch.device(device))
            seconds.append(time.perf_counter() - start)
            model.zero_grad()
    return statistics.median(seconds[1:])


def check(cells: Iterable[Cell]) -> None:
    """Try every cell, of those that differ by their seed alone the first.

    Raises `ZooError` with the name and reason of each that cannot be built, whose plan holds a pair twice or an index
    out of range, or whose limits leave no batch.
    """
    reasons = []
    for name, cell in first_of_groups(cells).items():
        try:
            run_preflight(cell.config)
            reasons += [f"cell {name}: {reason}" for reason in unfit_limits(cell.config)]
        except (
            Exception,
            SystemExit,
        ) as error:  # as a method of one's own would in its first step
            reasons.append(f"cell {name}: {error_reason(error)}")
    refuse("sweep", reasons)


def unfit_limits(config: Config) -> list[str]:
    """Return which settings of the trainer leave no batch, or ask for a validation after the end of every epoch.

    Lightning refuses them too, but only once it trains, and those of the test only once it has trained.
    """
    trainer = config["trainer"]
    shares = {key: trainer[key] for key in LIMITS if isinstance(trainer.get(key), float)}
    every = trainer.get("val_check_interval")
    by_epoch = isinstance(every, int) and trainer.get("check_val_every_n_epoch", 1) is not None
    if not shares and not by_epoch:
        return []
    try:
        counts = _batches(resolve(config))
    except (Exception, SystemExit) as error:  # what a datamodule of one's own raises here it would raise in the run
        return [f"data: {error_reason(error)}"]
    reasons = [
        f"trainer.{key}={share} of {counts[LIMITS[key]]} batches is none; give a count, or a larger share"
        for key, share in shares.items()
        if LIMITS[key] in counts and int(share * counts[LIMITS[key]]) == 0
    ]
    if by_epoch and "train" in counts:
        limit = trainer.get("limit_train_batches") or 1.0
        epoch = int(limit * counts["train"]) if isinstance(limit, float) else min(limit, counts["train"])
        if every > epoch > 0:
            reasons.append(
                f"trainer.val_check_interval={every} is more than the {epoch} batches of an epoch; set "
                "trainer.check_val_every_n_epoch=null to count batches across epochs"
            )
    return reasons


def _batches(config: Config) -> dict[str, int]:
    """The batches of an epoch, by what `LIMITS` call the films; none where the loader has no length."""
    made: Any = _data(json.dumps(config["data"]), pretrained=is_pretrained(config["model"]))[0]
    loaders = {"train": made.train_dataloader(), "val": made.val_dataloader()}
    if getattr(made, "test_films", 0):
        loaders["test"] = made.test_dataloader()
    counts = {}
    for split, loader in loaders.items():
        with suppress(TypeError):
            counts[split] = len(loader)
    if "train" in counts:  # data ranks share them
        counts["train"] = math.ceil(counts["train"] / config.get("parallel", {}).get("data", 1))
    return counts


def error_reason(error: BaseException) -> str:
    """An error as a reason; where it is no refusal, with its type."""
    return str(error) if isinstance(error, ZooError) else f"{type(error).__name__}: {error}"


def first_of_groups(cells: Iterable[Cell]) -> dict[str, Cell]:
    """Of cells that differ by their seed alone the first, by the name that they share."""
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(cell.group or cell.name, cell)
    return first


def _device(trainer: Mapping[str, Any]) -> str:
    wanted = trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    return "cuda" if wanted and torch.cuda.is_available() else "cpu"


@lru_cache(maxsize=2)
def _data(settings: str, *, pretrained: bool = False) -> tuple[datamodule.FilmData, Sequence[Batch]]:
    """A datamodule, set up as a run does it, and its first training batches."""
    made: Any = datamodule.build(json.loads(settings), pretrained=pretrained)
    made.prepare_data()
    made.setup("fit")
    return made, list(islice(made.train_dataloader(), BATCHES))


def _model(config: Config, made: datamodule.FilmData) -> VideoDiT:
    torch.manual_seed(config["seed"])
    return VideoDiT(**config["model"], **datamodule.shape(made), attention=config["attention"])


def _losses(config: Config, model: nn.Module, batch: Batch, number: int, device: str) -> list[Tensor]:
    """The parts of the training loss of batch `number`."""
    if not isinstance(model, LitPretrained):
        found = _loss(config, cast("VideoDiT", model), batch, number, device)
        return [found.loss, *found.output.losses.values()]
    draws = generator("train", config["seed"], 0, number)
    at = model.flow.draw_times(len(batch["latents"]), ONE_TIME, draws)[:, 0].to(device)
    return list(model.losses(move_data_to_device(batch, torch.device(device)), at, draws, seed=number).values())


def _loss(config: Config, model: VideoDiT, batch: Batch, number: int, device: str) -> FlowLoss:
    """Of training batch `number`, with the draws of the run."""
    purpose = (config["seed"], 0, number)
    draws, attention = generator("train", *purpose), generator("attention", *purpose).initial_seed()
    moved = move_data_to_device({key: batch[key] for key in ("clips", "text")}, torch.device(device))
    moved["layout"] = batch["layout"]
    return RectifiedFlow(**config["flow"]).training_loss(model, moved, draws, step=0, seed=attention)


def _narrowed(batch: Batch) -> Batch:
    return batch | {"clips": [clip[:ITEMS] for clip in batch["clips"]], "text": batch["text"][:ITEMS]}


def _shape(model: VideoDiT, mlp_ratio: float) -> ModelShape:
    return ModelShape(model.dim, len(model.blocks), model.heads, mlp_ratio, model.text, model.patch_size)
