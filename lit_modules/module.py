"""The LightningModule: a VideoDiT trained by rectified flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

import sparse_zoo as zoo
from lit_modules.callbacks import EMA
from lit_modules.dit import Block, VideoDiT
from lit_modules.flow import RectifiedFlow, generator, known_shots
from lit_modules.metrics import LossByTime
from lit_modules.muon import MuonAdamW
from lit_modules.parallel import mean_over_ranks, shard
from lit_modules.sampling import Euler
from lit_modules.settings import Optim
from lit_modules.stream import stream
from sparse_zoo.errors import refuse, unknown
from sparse_zoo.parallel import Ulysses

VALIDATION_TIMES = (0.125, 0.375, 0.625, 0.875)  # the middles of four equal strata


class NonFiniteLoss(RuntimeError):
    """Raised when `what` (losses or gradients by name) is NaN or infinite at `step`, before its update."""

    def __init__(self, step: int, what: Mapping[str, float]) -> None:
        super().__init__(f"step {step}: " + ", ".join(f"{name} is {value}" for name, value in what.items()))
        self.step, self.what = step, dict(what)


@runtime_checkable
class KeepsFilms(Protocol):
    """A metric that keeps its outcome for every film: by measure, in the order of the films."""

    def film_outcomes(self) -> dict[str, list[float]]:
        """The outcomes of all films since the last reset, by measure."""
        ...


class LitVideoDiT(LightningModule):
    """Trains a `VideoDiT` by rectified flow.

    A batch is a dict: "layout", the joint `Layout` of the stream, sizes in tokens; "clips", float32 in [-1, 1], one
    per shot in stream order, each (B, F, C, H, W), of pixels or of a VAE's latents; "text", int64 (B, Nt) token ids
    in stream order, or embeddings (B, Nt, text_dim); "known", a bool for each shot, whether it is given where films are
    judged (by default all but the last of a film); and whatever the sample metrics need.

    Args:
        model: Arguments of `VideoDiT`.
        flow: Fields of `RectifiedFlow`.
        optim: Fields of `Optim`.
        sampling: Fields of `Euler`, for `sample_metrics`.
        seed: Seed of noise, times and the attention's random numbers; with the number of the batch it fixes them all.
        sample_metrics: Metrics by name, whose `update(clips, batch)` judges films that are generated in validation and
            test, beside the known shots. Not kept in checkpoints.
        whole_metrics: The same for films of which every shot is generated, in test alone. If the model is strictly
            causal and films are generated at once, they are also generated shot by shot, with cached keys: then
            "whole_streamed_" begins the names that otherwise begin with "whole_".

    Raises:
        NonFiniteLoss: Before a non-finite loss or gradient reaches the weights.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        flow: Mapping[str, Any] | None = None,
        optim: Mapping[str, Any] | None = None,
        seed: int = 0,
        sample_metrics: Mapping[str, Metric] | None = None,
        sampling: Mapping[str, Any] | None = None,
        whole_metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        # Plain containers, so that a checkpoint loads without whatever made the configuration.
        model, flow, optim, sampling = (_plain(part) for part in (model, flow, optim, sampling))
        self.save_hyperparameters(ignore=["sample_metrics", "whole_metrics"])
        parts = {"flow": (RectifiedFlow, flow), "optim": (Optim, optim), "sampling": (Euler, sampling)}
        refuse(
            "LitVideoDiT",
            [
                unknown(f"{name} setting", key, known)
                for name, (kind, given) in parts.items()
                if (known := [f.name for f in fields(kind)])
                for key in given
                if key not in known
            ],
        )
        self.seed = seed
        self.model = VideoDiT(**model)
        self.flow = RectifiedFlow(**flow)
        self.optim = Optim(**optim)
        self.sampling = Euler(**sampling)
        self.val_loss = LossByTime(VALIDATION_TIMES)
        self.sample_metrics = MetricCollection(dict(sample_metrics or {}), prefix="val/", compute_groups=False)
        self.test_metrics = self.sample_metrics.clone(prefix="test/")
        self.whole_metrics = MetricCollection(dict(whole_metrics or {}), prefix="test/", compute_groups=False)
        self.streamed_metrics = self.whole_metrics.clone()
        # Every device validates all films, so there is nothing to reduce.
        for metric in (
            self.val_loss,
            *self.sample_metrics.values(),
            *self.test_metrics.values(),
            *self.whole_metrics.values(),
            *self.streamed_metrics.values(),
        ):
            metric.sync_on_compute = False
        self._sharded = False
        self.film_outcomes: dict[str, list[float]] = {}  # of the last validation or test, per film, in order

    @override
    def configure_model(self) -> None:
        """Share films and weights among the devices, where the strategy has a mesh of them."""
        mesh = self._device_mesh
        if mesh is None or self._sharded:
            return
        self._sharded = True
        self.model.sequence = Ulysses(mesh["tensor_parallel"])
        shard(self.model, list(self.model.blocks), mesh)

    @property
    def data_rank(self) -> int:
        """Which of the groups of devices that have films of their own this one belongs to."""
        mesh = self._device_mesh
        return self.global_rank if mesh is None else mesh["data_parallel"].get_local_rank()

    @override
    def configure_callbacks(self) -> list[Callback]:
        # One for each fit: a validation or test after it uses the one that holds the averages.
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        return [EMA(self.optim.ema_decay)] if self.optim.ema_decay and fitting else []

    @override
    def configure_optimizers(self) -> Any:
        optim = self.optim
        muon = optim.optimizer == "muon"
        inner = [p for block in self.model.blocks for p in cast("Block", block).matrices()] if muon else []
        # Phases of a schedule share their parameters: each once.
        linear = dict.fromkeys(m.weight for m in self.model.modules() if isinstance(m, nn.Linear))
        matrices = [p for p in linear if id(p) not in {id(q) for q in inner}]
        taken = {id(p) for p in (*inner, *matrices)}
        groups = [
            {"params": matrices, "weight_decay": optim.weight_decay},
            {"params": [p for p in self.model.parameters() if id(p) not in taken], "weight_decay": 0.0},
        ]
        rates: dict[str, Any] = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2)}
        optimizer: torch.optim.Optimizer = (
            MuonAdamW(
                inner,
                groups,
                muon_lr=optim.muon_lr,
                weight_decay=optim.weight_decay,
                wide=optim.muon_float32,
                **rates,
            )
            if muon
            else torch.optim.AdamW(groups, **rates)
        )
        total = float(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.optim.rate(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        # Batches seen, not optimizer steps: accumulated batches must not share their draws. Resuming restores it.
        purpose = (self.seed, self.data_rank, self.trainer.fit_loop.total_batch_idx)
        draws, attention = generator("train", *purpose), generator("attention", *purpose).initial_seed()
        found = self.flow.training_loss(self.model, batch, draws, step=self.global_step, seed=attention)
        losses = {"flow": found.loss} | {f"aux/{name}": loss for name, loss in found.output.losses.items()}
        loss = torch.stack(list(losses.values())).sum()
        # The same on all devices: where one has met NaN, all stop here.
        mean, *parts = mean_over_ranks(torch.stack([loss, *losses.values()]).detach())
        if not torch.isfinite(mean):
            bad = {name: float(part) for name, part in zip(losses, parts, strict=True) if not part.isfinite()}
            raise NonFiniteLoss(self.global_step, bad or {"loss": float(mean)})
        size = len(batch["layout"].films) * len(batch["text"])
        self.log("train/loss", mean, prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": part for name, part in zip(losses, parts, strict=True)}, batch_size=size)
        self.log_dict(schedules(self.model, self.global_step), batch_size=size)
        return {"loss": loss, "flow": parts[0], "results": found.output.results}

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        log_gradient_norm(self)

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        text, layout = batch["text"], batch["layout"]
        shots = len(stream(layout).film_of_shot)
        for which, at in enumerate(VALIDATION_TIMES):
            time = torch.full((text.shape[0], shots), at, device=text.device)
            draws = generator("validation", 0, batch_idx, which)
            found = self.flow.loss(self.model, batch["clips"], text, time, layout, draws, step=self.global_step)
            self.val_loss.update(found.per_token, which)
        if not self.trainer.sanity_checking:
            self._judge(self.sample_metrics, batch, batch_idx, known_shots(batch))

    @override
    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._judge(self.test_metrics, batch, batch_idx, known_shots(batch))
        self._judge(self.whole_metrics, batch, batch_idx, None)
        if self._streams:
            self._judge(self.streamed_metrics, batch, batch_idx, None, replace(self.sampling, order="shots"))

    @property
    def _streams(self) -> bool:
        """Whether whole films are also generated shot by shot in a test."""
        return self.model.strict and self.sampling.order == "film"

    def _judge(
        self,
        metrics: MetricCollection,
        batch: dict[str, Any],
        seed: int,
        known: Tensor | None,
        sampling: Euler | None = None,
    ) -> None:
        """Update metrics with the batch's films, generated except for the `known` shots."""
        if len(metrics):
            clips = (sampling or self.sampling).sample(
                self.model, self.flow, batch, seed=seed, known=known, step=self.global_step
            )
            metrics.update(clips, batch)

    @override
    def on_validation_epoch_end(self) -> None:
        by_time = self.val_loss.compute()
        self.val_loss.reset()
        loss = by_time.mean().float()
        if not torch.isfinite(loss):
            raise NonFiniteLoss(self.global_step, {"val/loss": float(loss)})
        self.log("val/loss", loss, prog_bar=True)
        self.log_dict({f"val/loss_t{at}": part.float() for at, part in zip(VALIDATION_TIMES, by_time, strict=True)})
        if not self.trainer.sanity_checking:
            self._tell(self.sample_metrics)

    @override
    def on_test_epoch_end(self) -> None:
        self._tell(self.test_metrics, self.whole_metrics)
        if self._streams and len(self.streamed_metrics):
            found = self.streamed_metrics.compute()
            self.log_dict({name.replace("whole_", "whole_streamed_", 1): value for name, value in found.items()})
            self.streamed_metrics.reset()

    def _tell(self, *judges: MetricCollection) -> None:
        """Log the values of metrics, keep their outcomes for each film, and reset them."""
        self.film_outcomes = {}
        for metrics in judges:
            if len(metrics):
                self.log_dict(metrics.compute())
            for metric in metrics.values():
                if isinstance(metric, KeepsFilms):
                    self.film_outcomes |= metric.film_outcomes()
            metrics.reset()


def log_gradient_norm(trained: LightningModule) -> None:
    """Log `train/grad_norm`; raises `NonFiniteLoss` where it is not finite, before the gradients reach the weights."""
    model, trainer = cast("nn.Module", trained.model), trained.trainer
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = _value(nn.utils.get_total_norm(list(named.values())))
    if not torch.isfinite(norm):
        # With float16 an overflow of scaled gradients is expected: the scaler skips the step and halves its scale.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() > 1:
            return
        bad = {
            f"gradient of {name}": float(_value(g.norm()))
            for name, g in named.items()
            if not bool(_value(g.isfinite().all()))
        }
        raise NonFiniteLoss(trained.global_step, bad or {"gradient norm": float(norm)})
    trained.log("train/grad_norm", norm)


def _value(x: Tensor) -> Tensor:
    """A number that is a sum over shards, as a plain tensor."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def schedules(model: VideoDiT, step: int) -> dict[str, float]:
    """The schedules of the attention of every block; see `scheduled_settings`."""
    return scheduled_settings([cast("Block", block).attention for block in model.blocks], step)


def scheduled_settings(attentions: Sequence[nn.Module], step: int) -> dict[str, float]:
    """The scheduled settings at a step: `schedule/phase`, from 0, and `schedule/<setting>` for numbers.

    `schedule/layer_<i>/...` if layers have schedules of their own.
    """
    planned = {i: layer for i, layer in enumerate(attentions) if isinstance(layer, zoo.Scheduled)}
    alike = len(planned) == len(attentions) and len({repr((x.starts, x.settings)) for x in planned.values()}) == 1
    found: dict[str, float] = {}
    for i, layer in planned.items():
        phase = layer.phase(step)
        for name, value in {"phase": phase, **layer.settings[phase]}.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[f"schedule/{name}" if alike else f"schedule/layer_{i}/{name}"] = float(value)
    return found


def _plain(part: Mapping[str, Any] | None) -> dict[str, Any]:
    from omegaconf import OmegaConf  # here: the model and its flow are used where it is not installed

    plain: Any = OmegaConf.to_container(OmegaConf.create(dict(part or {})), resolve=True)
    return dict(plain)
