"""The LightningModule of a pretrained video transformer: fine-tuned with any method as its attention."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from typing_extensions import override

import sparse_zoo as zoo
from lit_modules.callbacks import EMA
from lit_modules.flow import RectifiedFlow, generator
from lit_modules.module import VALIDATION_TIMES, NonFiniteLoss, _plain, log_gradient_norm, scheduled_settings
from lit_modules.parallel import mean_over_ranks
from lit_modules.settings import Flow, Optim, Outline, Pretrained, Sampling
from sparse_zoo.bridge import Bridge
from sparse_zoo.bridge.family import find_family
from sparse_zoo.errors import ZooError, refuse, unknown


@dataclass(frozen=True)
class Takes:
    """What a transformer takes: the dimension of channels among `dims`, and where its config has both widths."""

    dims: int = 5
    dim: int = 1
    channels: str = "in_channels"
    text: str = "text_dim"


FLOW_FAMILIES = {
    "wan": Takes(),
    "skyreels_v2": Takes(),
    "hunyuan_video": Takes(text="text_embed_dim"),
    "hunyuan_video_15": Takes(text="text_embed_dim"),
    "ltx": Takes(dims=3, dim=2, text="caption_channels"),
    "kandinsky5": Takes(dim=4, channels="in_visual_dim", text="in_text_dim"),
}
"""Families that predict noise - clean at timesteps of 1000 · time."""

ONE_TIME = zoo.Layout.film([zoo.Shot(1, 1, 1)])


class Teacher:
    """A frozen model outside the module tree: not trained, not in checkpoints, not copied with averages."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False).eval()

    def __deepcopy__(self, memo: object) -> Teacher:
        return self


class LitPretrained(LightningModule):
    """Fine-tunes a pretrained transformer, read from a folder, by the flow loss of its scheduler.

    A batch is a dict: "latents", what the transformer gets as `hidden_states`, clean; "arguments", the other arguments
    of its forward but the timestep, text embeddings among them; and, for films of several shots, "shots", frames of
    tokens of each.

    With adapters (LoRA) the teacher of a distillation is the model without them and takes no memory; else it is a
    frozen copy of the model.

    Logs `train/loss`, which is the sum of `train/flow`, `train/distill_output`, `train/distill_layers` and
    `train/aux/<name>`, `train/grad_norm` and the scheduled settings in force; in validation `val/loss`, the flow loss
    at `VALIDATION_TIMES`, and `val/sample_error`: how far the first batch's latents, sampled from noise, are from those
    of the same weights with dense attention, ‖sparse - dense‖ / ‖dense‖.

    Args:
        model: Fields of `Pretrained`, or its folder alone.
        attention: {"name": method, **settings}, a schedule among them, or a list for the layers, as `zoo.attach` has.
        flow: Fields of `RectifiedFlow`; `shift` is the scheduler's where it is not given. Films are noised as a whole
            and keep their text: `per_shot`, `history` and `drop_text` are refused.
        optim: Fields of `Optim`; the optimizer is AdamW.
        seed: Of noise, times and the attention's draws; with the number of the batch it fixes them all.
        sampling: Fields of `Sampling`; only `steps`, Euler steps, and `every`, how often films are sampled, apply.

    Raises:
        ZooError: for a folder that does not load, a family or scheduler without a flow, and settings that do not apply.
        NonFiniteLoss: in training, before a bad loss or gradient reaches the weights.
    """

    def __init__(
        self,
        model: Mapping[str, Any] | str | Path,
        attention: Mapping[str, Any] | Sequence[Any],
        flow: Mapping[str, Any] | None = None,
        optim: Mapping[str, Any] | None = None,
        seed: int = 0,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        model = {"folder": str(model)} if isinstance(model, str | Path) else model
        model, flow, optim, sampling = (_plain(part) for part in (model, flow, optim, sampling))
        attention = dict(attention) if isinstance(attention, Mapping) else list(attention)
        self.save_hyperparameters()
        parts = {"model": (Pretrained, model), "flow": (Flow, flow), "optim": (Optim, optim)}
        parts |= {"sampling": (Sampling, sampling)}
        refuse(
            "LitPretrained",
            [
                unknown(f"{name} setting", key, known)
                for name, (kind, given) in parts.items()
                if (known := [f.name for f in fields(kind)])
                for key in given
                if key not in known
            ]
            + inapplicable(flow, optim, sampling),
        )
        self.seed = seed
        self.settings, self.sampling, self.optim = Pretrained(**model), Sampling(**sampling), Optim(**optim)
        self.film_outcomes: dict[str, list[float]] = {}
        self._validations = 0
        folder = Path(self.settings.folder)
        self.flow = RectifiedFlow(**{"drop_text": 0.0, "shift": flow_shift(folder), **flow})
        self.model = load_transformer(folder)
        self.model.train()
        adapted = self.settings.lora_rank > 0
        copied = self.settings.distills and not adapted
        self.teacher = Teacher(copy.deepcopy(self.model)) if copied else None
        if adapted:
            self._adapt()
        self.bridge = attach_layers(self.model, attention)
        _need_flow(self.bridge)

    def _adapt(self) -> None:
        peft = importlib.import_module("peft")
        self.model.requires_grad_(False)
        own = self.settings
        config = peft.LoraConfig(r=own.lora_rank, lora_alpha=own.lora_alpha, target_modules=list(own.lora_targets))
        adapt: Any = self.model.add_adapter
        try:
            adapt(config)
        except ValueError as error:  # no layer has such a name
            family = find_family(self.model)
            sites = [part for name, part in self.model.named_modules() if re.fullmatch(family.sites, name)]
            linear = dict.fromkeys(
                name for part in sites for name, x in part.named_modules() if isinstance(x, nn.Linear)
            )
            raise ZooError(
                f"model.lora_targets: {error}. The linear layers of its self-attentions are {', '.join(linear)}"
            ) from error

    @override
    def configure_callbacks(self) -> list[Callback]:
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        return [EMA(self.optim.ema_decay)] if self.optim.ema_decay and fitting else []

    @override
    def configure_optimizers(self) -> Any:
        optim = self.optim
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() == 2], "weight_decay": optim.weight_decay},
            {"params": [p for p in trained if p.dim() != 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2))
        total = float(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: optim.rate(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def losses(self, batch: Mapping[str, Any], time: Tensor, draws: torch.Generator, *, seed: int) -> dict[str, Tensor]:
        """Every part of the loss at times (B,), weighted."""
        absent = [name for name in ("latents", "arguments") if name not in batch]
        refuse("batch", [f"it has no {name!r}; see LitPretrained for what it holds" for name in absent])
        clean, arguments = batch["latents"], batch["arguments"]
        noisy, noise = noised(clean, time, draws)
        wanted: Tensor | None = None
        targets: list[Tensor] = []
        if self.settings.distills:
            with torch.no_grad(), self._dense_teacher() as (teacher, modules), attended(modules) as targets:
                wanted = predict(teacher, noisy, time, arguments)
        self.bridge.film(batch.get("shots"), step=self.global_step, seed=seed)
        with attended([site.module for site in self.bridge.sites]) as found:
            predicted = predict(self.model, noisy, time, arguments).float()
        losses = {"flow": (predicted - (noise - clean).float()).square().mean()}
        if self.settings.distill_output and wanted is not None:
            losses["distill_output"] = self.settings.distill_output * (predicted - wanted.float()).square().mean()
        if self.settings.distill_layers:
            losses["distill_layers"] = (
                self.settings.distill_layers
                * torch.stack(
                    [
                        (own.float() - dense.float()).square().sum() / dense.float().square().sum().clamp(min=1e-12)
                        for own, dense in zip(found, targets, strict=True)
                    ]
                ).mean()
            )
        return losses | {f"aux/{name}": loss for name, loss in self.bridge.losses().items()}

    @contextmanager
    def _dense_teacher(self) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
        """The dense model as it came, and its self-attentions."""
        if self.teacher is not None:
            names = {id(site.module) for site in self.bridge.sites}
            own = [name for name, module in self.model.named_modules() if id(module) in names]
            teacher = self.teacher.model.to(self.device)
            yield teacher, [teacher.get_submodule(name) for name in own]
            return
        adapted: Any = self.model
        was_training = self.model.training
        self.model.eval()
        adapted.disable_adapters()
        try:
            with self.bridge.original():
                yield self.model, [site.module for site in self.bridge.sites]
        finally:
            adapted.enable_adapters()
            self.model.train(was_training)

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        purpose = (self.seed, self.global_rank, self.trainer.fit_loop.total_batch_idx)
        draws, attention = generator("train", *purpose), generator("attention", *purpose).initial_seed()
        time = self.flow.draw_times(len(batch["latents"]), ONE_TIME, draws)[:, 0].to(self.device)
        losses = self.losses(batch, time, draws, seed=attention)
        loss = torch.stack(list(losses.values())).sum()
        # The same on all devices: where one has met NaN, all stop here.
        mean, *parts = mean_over_ranks(torch.stack([loss, *losses.values()]).detach())
        if not torch.isfinite(mean):
            bad = {name: float(part) for name, part in zip(losses, parts, strict=True) if not part.isfinite()}
            raise NonFiniteLoss(self.global_step, bad or {"loss": float(mean)})
        size = len(batch["latents"])
        self.log("train/loss", mean, prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": part for name, part in zip(losses, parts, strict=True)}, batch_size=size)
        self.log_dict(scheduled_settings(self.bridge.methods(), self.global_step), batch_size=size)
        return {"loss": loss, "flow": parts[0], "results": list(self.bridge.results.values())}

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        log_gradient_norm(self)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["validations"] = self._validations

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._validations = checkpoint["validations"]

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        parts = []
        for which, at in enumerate(VALIDATION_TIMES):
            draws = generator("validation", 0, batch_idx, which)  # every device validates all films
            time = torch.full((len(batch["latents"]),), at, device=self.device)
            parts.append(self.losses(batch, time, draws, seed=self.seed)["flow"])
        size = len(batch["latents"])
        loss = torch.stack(parts).mean()
        if not torch.isfinite(loss):
            raise NonFiniteLoss(self.global_step, {"val/loss": float(loss)})
        self.log("val/loss", loss, prog_bar=True, batch_size=size)
        if batch_idx or self.trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations % self.sampling.every == 0:
            sparse = self.sample(batch, seed=self.seed)
            with self.bridge.original():
                dense = self.sample(batch, seed=self.seed)
            self.log("val/sample_error", (sparse - dense).norm() / dense.norm(), batch_size=size)

    def export(self, folder: str | Path) -> list[Path]:
        """Write what was trained beside the checkpoint, for use without Lightning.

        `methods.pt`, which `Bridge.load` reads, where methods have parameters; `lora`, a folder with the file that
        diffusers' `load_lora_adapter` reads, where there are adapters. Returns what was written.
        """
        folder, written = Path(folder), []
        if any(True for _ in self.bridge.parameters()):
            written.append(self.bridge.save(folder / "methods.pt"))
        if self.settings.lora_rank:
            save: Any = self.model.save_lora_adapter
            logger = logging.getLogger("diffusers.models.modeling_utils")
            level = logger.level
            logger.setLevel(logging.ERROR)  # it warns of a cast that saving does not make
            try:
                save(folder / "lora")
            finally:
                logger.setLevel(level)
            written.append(folder / "lora")
        return written

    @torch.no_grad()
    def sample(self, batch: Mapping[str, Any], *, seed: int) -> Tensor:
        """Latents like the batch's from noise of a seed, by Euler steps at the scheduler's shift, without guidance."""
        like: Tensor = batch["latents"]
        x = torch.randn(like.shape, generator=generator("sample", seed)).to(like)
        times = self.flow.warp(torch.linspace(1, 0, self.sampling.steps + 1, device=like.device))
        self.bridge.film(batch.get("shots"), step=self.global_step, seed=seed)
        was_training = self.model.training
        self.model.eval()
        for now, then in pairwise(times):
            x = x + (then - now) * predict(self.model, x, now.expand(len(x)), batch["arguments"])
        self.model.train(was_training)
        return x


def inapplicable(flow: Mapping[str, Any], optim: Mapping[str, Any], sampling: Mapping[str, Any]) -> list[str]:
    """Why settings that a model of our own has do not apply to a pretrained one."""
    return [
        "flow.per_shot: a pretrained model takes one noise time for a film" if flow.get("per_shot") else "",
        "flow.history: a pretrained model takes one noise time for a film" if flow.get("history") else "",
        f"flow.drop_text must be 0, got {flow['drop_text']}; leave captions out when text is encoded"
        if flow.get("drop_text")
        else "",
        f"optim.optimizer must be adamw for a pretrained model, got {optim['optimizer']}"
        if optim.get("optimizer", "adamw") != "adamw"
        else "",
        f"sampling.guidance must be 1 in training, got {sampling['guidance']}; zoo sample --model has --guidance"
        if sampling.get("guidance", 1) != 1
        else "",
        "sampling.order must be film for a pretrained model" if sampling.get("order", "film") != "film" else "",
    ]


def attach_layers(model: nn.Module, attention: Mapping[str, Any] | Sequence[Any]) -> Bridge:
    """Attach a config's `attention`: a method with its settings, or a list for the layers."""
    if isinstance(attention, Mapping):
        own = dict(attention)
        return zoo.attach(model, own.pop("name"), **own)
    return zoo.attach(model, attention)


def noised(clean: Tensor, time: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents with noise of times (B,), and the noise; both of the shape of `clean`."""
    noise = torch.randn(clean.shape, generator=draws).to(clean)
    t = time.to(clean).reshape(-1, *[1] * (clean.dim() - 1))
    return (1 - t) * clean + t * noise, noise


def predict(model: nn.Module, noisy: Tensor, time: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """The velocity, noise - clean, that a transformer predicts for latents with noise of times (B,).

    Raises:
        ZooError: For latents, text or other arguments that the transformer does not take.
    """
    family = find_family(model).name
    takes = FLOW_FAMILIES[family]
    _check_batch(model, noisy, arguments, takes)
    if _picture_channels(model, family):
        # Models of text and pictures take a picture's latents and mask too; of text alone, both are zero.
        none = [*noisy.shape]
        none[takes.dim] += 1
        noisy = torch.cat([noisy, noisy.new_zeros(none)], takes.dim)
    out: Any = model(hidden_states=noisy, timestep=1000 * time, **{**arguments, "return_dict": False})
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _picture_channels(model: nn.Module, family: str) -> int:
    """Channels of latents, where a transformer takes as many of a picture's too, and one of its mask; else 0."""
    config: Any = model.config
    if family == "kandinsky5" and config.visual_cond:
        return int(config.in_visual_dim)
    return (int(config.in_channels) - 1) // 2 if family == "hunyuan_video_15" else 0


def _check_batch(model: nn.Module, latents: Tensor, arguments: Mapping[str, Any], takes: Takes) -> None:
    config: Any = model.config
    channels = _picture_channels(model, find_family(model).name) or int(config[takes.channels])
    shape = tuple(latents.shape)
    text, width = arguments.get("encoder_hidden_states"), int(config[takes.text])
    known = inspect.signature(type(model).forward).parameters
    needed = [name for name, one in known.items() if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    absent = [name for name in needed if name not in ("self", "hidden_states", "timestep", *arguments)]
    refuse(
        f"batch of {type(model).__name__}",
        [
            f"latents have shape {shape}; it takes {takes.dims} dimensions with {channels} channels in dimension "
            f"{takes.dim}. Encode the videos with its own VAE"
            if len(shape) != takes.dims or shape[takes.dim] != channels
            else "",
            f"text embeddings are {text.shape[-1]} wide, it takes {width}. Encode captions with its own text encoder"
            + ("; these films have no captions" if text.shape[-1] == 1 else "")
            if isinstance(text, Tensor) and text.shape[-1] != width
            else "",
            f"arguments lack {', '.join(absent)}; give them beside the latents" if absent else "",
        ]
        + [unknown("argument", name, known) for name in arguments if name not in known],
    )


@contextmanager
def attended(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what self-attentions give within, of video where they give video and text, in the order of the calls."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
        found.append(output[0] if isinstance(output, tuple) else output)

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _need_flow(bridge: Bridge) -> None:
    family, name = bridge.family.name, type(bridge.model).__name__
    refuse(
        f"train {name}",
        [
            f"its family {family} has no flow loss here; families that train: {', '.join(FLOW_FAMILIES)}. "
            "Sampling, capturing and comparing work with it"
        ]
        if family not in FLOW_FAMILIES
        else [],
    )


@lru_cache(maxsize=8)
def outline(folder: str) -> Outline:
    """The self-attentions of the transformer in a folder, of which no weights are read."""
    kind, inner = _transformer_class(Path(folder))
    accelerate = importlib.import_module("accelerate")
    with accelerate.init_empty_weights():
        model = kind.from_config(kind.load_config(inner))
    bridge = zoo.attach(model, "dense")
    _need_flow(bridge)
    return Outline(len(bridge.sites), *bridge.family.shape(bridge.sites[0].module))


def load_transformer(folder: Path) -> nn.Module:
    """The transformer of a folder that diffusers wrote."""
    kind, inner = _transformer_class(folder)
    try:
        model: nn.Module = kind.from_pretrained(inner, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise ZooError(f"model {folder}: it does not load: {str(error).splitlines()[0]}") from error
    return model


def _transformer_class(folder: Path) -> tuple[Any, Path]:
    """The class of diffusers that a folder names, and where its config is."""
    inner = folder / "transformer" if (folder / "transformer").is_dir() else folder
    refuse(
        f"model {folder}",
        ["config.json is missing; give the folder of a diffusers pipeline or transformer on disk"]
        if not (inner / "config.json").is_file()
        else [],
    )
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        raise ZooError(f"model {folder}: {error}. pip install 'sparse-attention-zoo[pretrained]'") from error
    name = _json(inner / "config.json").get("_class_name")
    kind = getattr(diffusers, str(name), None)
    refuse(f"model {folder}", [f"diffusers {diffusers.__version__} has no class {name!r}"] if kind is None else [])
    return kind, inner


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ZooError(f"{path} is not a JSON object: {error}") from error


def flow_shift(folder: Path) -> float:
    """The shift towards noise of a folder's scheduler, 1 where it has none; refuses one that predicts no flow."""
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = _json(path) if path.is_file() else {}
    kind = str(scheduler.get("_class_name", "FlowMatchEulerDiscreteScheduler"))
    flows = kind.startswith("FlowMatch") or scheduler.get("use_flow_sigmas") is True
    refuse(
        f"model {folder}",
        [f"scheduler {kind} is not one of a flow; known: FlowMatch…, and others with use_flow_sigmas"]
        if not flows
        else [],
    )
    return float(scheduler.get("shift", scheduler.get("flow_shift", 1.0)))
