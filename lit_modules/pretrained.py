"""The LightningModule of a pretrained video transformer: fine-tuned with any method as its attention."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
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
from lit_modules.module import VALIDATION_TIMES, NonFiniteLoss, _plain
from lit_modules.settings import Optim
from sparse_zoo.errors import ZooError, refuse, unknown

FLOW_FAMILIES = ("wan", "skyreels_v2", "hunyuan_video", "hunyuan_video_15", "ltx", "kandinsky5")
"""Families that predict noise - clean at timesteps of 1000 · time."""

ONE_TIME = zoo.Layout.film([zoo.Shot(1, 1, 1)])
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Distill:
    """Weights of the losses that pull towards the model with its own dense attention and weights.

    output: of the mean square difference of the velocities.
    layers: of the mean over layers of ‖attention - dense attention‖² ÷ ‖dense attention‖², projected out.
    """

    output: float = 0.0
    layers: float = 0.0

    def __post_init__(self) -> None:
        given = {"output": self.output, "layers": self.layers}
        refuse("distill", [f"{name} must be at least 0, got {x}" for name, x in given.items() if x < 0])

    def __bool__(self) -> bool:
        return bool(self.output or self.layers)


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters of rank `r`, scaled by alpha / r, on the linear layers whose names end so."""

    r: int = 16
    alpha: int = 16
    targets: tuple[str, ...] = ADAPTED


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

    Args:
        folder: A pipeline of diffusers, or its transformer, on disk. Nothing is loaded from a hub.
        attention: {"name": method, **settings}, a schedule among them, or a list for the layers, as `zoo.attach` has.
        lora: Fields of `LoRA`; None: all weights are trained.
        flow: Fields of `RectifiedFlow`; `shift` is the scheduler's where it is not given.
        optim: Fields of `Optim`; the optimizer is AdamW.
        distill: Fields of `Distill`. With adapters the teacher is the model without them and takes no memory; else it
            is a copy of the model.
        seed: Of noise, times and the attention's draws; with the number of the batch it fixes them all.
        sampling_steps: Euler steps of the films that validation samples.

    Logs `train/loss`, which is the sum of `train/flow`, `train/distill_output`, `train/distill_layers` and
    `train/aux/<name>`; in validation `val/loss`, the flow loss at `VALIDATION_TIMES`, and `val/sample_error`: how far
    the first batch's latents, sampled from noise, are from those of the same weights with dense attention,
    ‖sparse - dense‖ ÷ ‖dense‖. Raises `NonFiniteLoss` before a bad loss reaches the weights.
    """

    def __init__(
        self,
        folder: str | Path,
        attention: Mapping[str, Any] | Sequence[Any],
        lora: Mapping[str, Any] | None = None,
        flow: Mapping[str, Any] | None = None,
        optim: Mapping[str, Any] | None = None,
        distill: Mapping[str, Any] | None = None,
        seed: int = 0,
        sampling_steps: int = 8,
    ) -> None:
        super().__init__()
        flow, optim, distill = (_plain(part) for part in (flow, optim, distill))
        folder = str(folder)
        self.save_hyperparameters()
        parts = {"flow": (RectifiedFlow, flow), "optim": (Optim, optim), "distill": (Distill, distill)}
        parts |= {"lora": (LoRA, dict(lora))} if lora is not None else {}
        refuse(
            "LitPretrained",
            [
                unknown(f"{name} setting", key, known)
                for name, (kind, given) in parts.items()
                if (known := [f.name for f in fields(kind)])
                for key in given
                if key not in known
            ]
            + [f"sampling_steps must be at least 1, got {sampling_steps}" if sampling_steps < 1 else ""],
        )
        self.seed, self.sampling_steps = seed, sampling_steps
        self.model, scheduler = load_transformer(Path(folder))
        self.model.train()
        self.flow = RectifiedFlow(**{"shift": flow_shift(scheduler), **flow})
        self.optim, self.distill = Optim(**optim), Distill(**distill)
        refuse("LitPretrained", ["its optimizer is 'adamw', got 'muon'"] if self.optim.optimizer != "adamw" else [])
        self.lora = None if lora is None else LoRA(**lora)
        self.teacher = Teacher(copy.deepcopy(self.model)) if self.distill and self.lora is None else None
        if self.lora is not None:
            self._adapt(self.lora)
        layers = dict(attention) if isinstance(attention, Mapping) else list(attention)
        self.bridge = (
            zoo.attach(self.model, layers.pop("name"), **layers)
            if isinstance(layers, dict)
            else zoo.attach(self.model, layers)
        )
        family = self.bridge.family.name
        refuse(
            "LitPretrained",
            [unknown("family with a flow loss", family, FLOW_FAMILIES)] if family not in FLOW_FAMILIES else [],
        )

    def _adapt(self, lora: LoRA) -> None:
        peft = importlib.import_module("peft")
        self.model.requires_grad_(False)
        config = peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=list(lora.targets))
        adapt: Any = self.model.add_adapter
        adapt(config)

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

    def velocity(self, model: nn.Module, noisy: Tensor, time: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """What a transformer predicts for latents with noise of times (B,)."""
        out: Any = model(hidden_states=noisy, timestep=1000 * time, **{**arguments, "return_dict": False})
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found

    def losses(self, batch: Mapping[str, Any], time: Tensor, draws: torch.Generator, *, seed: int) -> dict[str, Tensor]:
        """Every part of the loss at times (B,), weighted."""
        clean, arguments = batch["latents"], batch["arguments"]
        noise = torch.randn(clean.shape, generator=draws).to(clean)
        t = time.to(clean).reshape(-1, *[1] * (clean.dim() - 1))
        noisy = (1 - t) * clean + t * noise
        wanted: Tensor | None = None
        targets: list[Tensor] = []
        if self.distill:
            with torch.no_grad(), self._dense_teacher() as (teacher, modules), attended(modules) as targets:
                wanted = self.velocity(teacher, noisy, time, arguments)
        self.bridge.film(batch.get("shots"), step=self.global_step, seed=seed)
        with attended([site.module for site in self.bridge.sites]) as found:
            predicted = self.velocity(self.model, noisy, time, arguments).float()
        losses = {"flow": (predicted - (noise - clean).float()).square().mean()}
        if self.distill.output and wanted is not None:
            losses["distill_output"] = self.distill.output * (predicted - wanted.float()).square().mean()
        if self.distill.layers:
            losses["distill_layers"] = (
                self.distill.layers
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
        if not torch.isfinite(loss):
            bad = {name: float(part) for name, part in losses.items() if not part.isfinite()}
            raise NonFiniteLoss(self.global_step, bad or {"loss": float(loss)})
        size = len(batch["latents"])
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": part for name, part in losses.items()}, batch_size=size)
        return {"loss": loss, "flow": losses["flow"].detach(), "results": list(self.bridge.results.values())}

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        parts = []
        for which, at in enumerate(VALIDATION_TIMES):
            draws = generator("validation", self.global_rank, batch_idx, which)
            time = torch.full((len(batch["latents"]),), at, device=self.device)
            parts.append(self.losses(batch, time, draws, seed=self.seed)["flow"])
        size = len(batch["latents"])
        self.log("val/loss", torch.stack(parts).mean(), prog_bar=True, batch_size=size)
        if batch_idx == 0 and not self.trainer.sanity_checking:
            sparse = self.sample(batch, seed=self.seed)
            with self.bridge.original():
                dense = self.sample(batch, seed=self.seed)
            self.log("val/sample_error", (sparse - dense).norm() / dense.norm(), batch_size=size)

    @torch.no_grad()
    def sample(self, batch: Mapping[str, Any], *, seed: int) -> Tensor:
        """Latents like the batch's from noise of a seed, by Euler steps at the scheduler's shift, without guidance."""
        like: Tensor = batch["latents"]
        x = torch.randn(like.shape, generator=generator("sample", seed)).to(like)
        times = self.flow.warp(torch.linspace(1, 0, self.sampling_steps + 1, device=like.device))
        self.bridge.film(batch.get("shots"), step=self.global_step, seed=seed)
        was_training = self.model.training
        self.model.eval()
        for now, then in pairwise(times):
            x = x + (then - now) * self.velocity(self.model, x, now.expand(len(x)), batch["arguments"])
        self.model.train(was_training)
        return x


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


def load_transformer(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The transformer of a folder that diffusers wrote, and its scheduler's config ({} where there is none)."""
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
    name = json.loads((inner / "config.json").read_text(encoding="utf-8")).get("_class_name")
    kind = getattr(diffusers, str(name), None)
    refuse(f"model {folder}", [f"diffusers {diffusers.__version__} has no class {name!r}"] if kind is None else [])
    try:
        model: nn.Module = kind.from_pretrained(inner, local_files_only=True)  # type: ignore[union-attr]
    except (OSError, ValueError, RuntimeError) as error:
        raise ZooError(f"model {folder}: it does not load: {str(error).splitlines()[0]}") from error
    scheduler = folder / "scheduler" / "scheduler_config.json"
    return model, json.loads(scheduler.read_text(encoding="utf-8")) if scheduler.is_file() else {}


def flow_shift(scheduler: Mapping[str, Any]) -> float:
    """The shift towards noise of a scheduler's times; refuses one that does not predict a flow."""
    kind = str(scheduler.get("_class_name", "FlowMatchEulerDiscreteScheduler"))
    flows = kind.startswith("FlowMatch") or scheduler.get("use_flow_sigmas") is True
    refuse(
        "LitPretrained",
        [f"scheduler {kind} is not one of a flow; known: FlowMatch…, and others with use_flow_sigmas"]
        if not flows
        else [],
    )
    return float(scheduler.get("shift", scheduler.get("flow_shift", 1.0)))
