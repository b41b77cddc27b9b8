"""Diagnostics of routing during training, on one fixed probe."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from typing_extensions import override

import sparse_zoo as zoo
from lit_modules.callbacks import synchronize, takes_part
from lit_modules.flow import generator
from lit_modules.stream import stream
from sparse_zoo.diagnostics import Diagnosis, Routing, churn, diagnose
from sparse_zoo.errors import refuse
from sparse_zoo.layout import Film
from sparse_zoo.partition import Partition, Refinement
from sparse_zoo.plan import Part
from sparse_zoo.remember import Origin

if TYPE_CHECKING:
    from lit_modules.module import LitVideoDiT

T = TypeVar("T")

TIMES = (0.5, 0.9)  # the first is diagnosed; the second, close to noise, is there for churn: each costs a forward pass

PLAIN: list[Any] = [Diagnosis, Routing, zoo.Layout, zoo.Plan, zoo.Shot, Film, Origin, Part, Partition, Refinement]
KEPT = ("layers", "_figures", "_plans", "_batch", "_step", "_own", "_training")  # by a checkpoint


class RoutingWatch(Callback):
    """Diagnoses every layer's routing after the first optimizer step and then every `every` steps.

    The probe is the first item of the batch of the first step that this callback sees, with fixed noise at the noise
    times 0.5 and 0.9. The model is in eval mode, with the weights in training, not their average. Neither weights nor
    random state are changed. Of several processes only the first one probes; where they share films, the figures are of
    its heads. A resumed run keeps the probe, and removes what was written for steps that it repeats.

    It logs the figures of `sparse_zoo.diagnostics` at time 0.5, averaged over heads: `diagnostics/<figure>`, the mean
    over layers, and `diagnostics/<figure>/layer_<i>`; of the routed branches if a layer has any, else of all. Also
    `churn_steps`, the share of picks that changed since the last probe; `churn_times`, the share that changed from time
    0.5 to 0.9; and `share_of_time`, the time of all probes ÷ the time of the training batches.
    `<folder>/diagnostics.jsonl` gets one line per probe, with every figure by head, loads, picks by shot, and loops.
    """

    def __init__(self, folder: str | Path, *, every: int = 40) -> None:
        refuse("RoutingWatch", [f"every must be at least 1, got {every}"] if every < 1 else [])
        self.path, self.every = Path(folder) / "diagnostics.jsonl", every
        self.layers: list[list[Diagnosis]] = []  # of the last probe
        self._figures: dict[str, float] = {}
        self._plans: list[list[zoo.Plan]] = []
        self._batch: dict[str, Any] = {}
        self._step = 0
        self._start = self._own = self._training = 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = takes_part(trainer) and step != self._step and (not self._batch or step % self.every == 0)
        if due:
            synchronize(pl_module.device)  # the step's time holds what it left running
        ended = time.perf_counter()
        self._training += ended - self._start
        if not due:
            return
        self._step = step
        self._batch = self._batch or {
            "clips": [clip[:1].clone() for clip in batch["clips"]],
            "text": batch["text"][:1].clone(),
            "layout": batch["layout"],
        }
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            by_layer = self._probe(cast("LitVideoDiT", pl_module), trainer.fit_loop.total_batch_idx)
        self._figures = _means(by_layer)
        self._write(by_layer)
        logged = {f"diagnostics/{name}": value for name, value in self._figures.items()}
        for i, figures in enumerate(by_layer):
            logged |= {f"diagnostics/{name}/layer_{i}": value for name, value in figures.items()}
        logged["diagnostics/share_of_time"] = (self._own + time.perf_counter() - ended) / self._training
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=step)
        self._own += time.perf_counter() - ended

    @override
    def state_dict(self) -> dict[str, Any]:
        kept = io.BytesIO()
        torch.save({name: getattr(self, name) for name in KEPT}, kept)
        # As bytes in a tensor: a checkpoint is read as plain values alone, which plans and layouts are not.
        return {"kept": torch.frombuffer(kept.getbuffer(), dtype=torch.uint8)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with torch.serialization.safe_globals(PLAIN):  # a checkpoint may be somebody else's: nothing else is made
            kept = torch.load(io.BytesIO(state_dict["kept"].numpy().tobytes()), weights_only=True)
        for name in KEPT:
            setattr(self, name, kept[name])
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self._step]
            self.path.write_text("".join(whole), encoding="utf-8")

    def summary(self) -> dict[str, Any]:
        """The last probe, ready for JSON; empty before the first one.

        Its step, figures by name as logged, `share_of_time` up to its end, and `loops` by layer, routed branch and
        head.
        """
        if not self._figures:
            return {}
        loops = [[found.routing.loops()[0] for found in layer if found.routing] for layer in self.layers]
        return {"step": self._step, **self._figures, "share_of_time": self._own / self._training, "loops": loops}

    def _probe(self, trained: LitVideoDiT, step: int) -> list[dict[str, float]]:
        """The figures of each layer, by name."""
        layers = each_attention(
            trained, self._batch, TIMES[0], step, lambda _, call, result: (result.plans, diagnose(call, result.plans))
        )
        noisy = each_attention(trained, self._batch, TIMES[1], step, lambda _, __, result: result.plans)
        plans, self.layers = [plans for plans, _ in layers], [found for _, found in layers]
        by_layer = []
        for i, layer in enumerate(self.layers):
            routed = [found for found in layer if found.routing]
            figures = _means([found.scalars() for found in routed or layer])
            figures["churn_times"] = _churn(plans[i], noisy[i])
            if self._plans:
                figures["churn_steps"] = _churn(self._plans[i], plans[i])
            by_layer.append(_means([figures]))
        self._plans = plans
        return by_layer

    def _write(self, by_layer: Sequence[Mapping[str, float]]) -> None:
        layers = [
            {"means": figures, "branches": [found.to_json() for found in layer]}
            for figures, layer in zip(by_layer, self.layers, strict=True)
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self._step, "layers": layers}) + "\n")


def each_attention(
    trained: LitVideoDiT,
    batch: Mapping[str, Any],
    at: float,
    step: int,
    look: Callable[[zoo.Attention, zoo.Call, zoo.Result], T],
) -> list[T]:
    """The values of `look` for each layer's attention, on a batch with fixed noise of time `at`.

    The model runs in eval mode; its mode and all random state are restored. The caller turns gradients off.
    """
    seen: list[T] = []

    # At once, layer by layer: the calls of all layers need not fit into memory together.
    def see(module: nn.Module, given: tuple[Any, ...], context: dict[str, Any], result: zoo.Result) -> None:
        seen.append(look(cast(zoo.Attention, module), zoo.Call(*given, **context), result))

    model, text = trained.model, batch["text"]
    layout = batch["layout"].to(text.device)
    noise = torch.full((len(text), len(stream(layout).film_of_shot)), at, device=text.device)
    attentions = [module for module in model.modules() if isinstance(module, zoo.Attention)]
    hooks = [attention.register_forward_hook(see, with_kwargs=True) for attention in attentions]
    draws = generator("routing", trained.seed)
    was_training = model.training
    model.eval()
    try:
        trained.flow.loss(model, batch["clips"], text, noise, layout, draws, step=step, seed=trained.seed)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return seen


def _churn(before: Sequence[zoo.Plan], after: Sequence[zoo.Plan]) -> float:
    """Mean over branches and heads; NaN where nothing is routed, or the method or the pieces have changed."""
    if len(before) != len(after):  # a schedule has changed the method
        return math.nan

    def pieces(plan: zoo.Plan) -> list[int]:
        return [part.keys.count for part in plan.parts if part.routed]

    pairs = [(a, b) for a, b in zip(before, after, strict=True) if pieces(a) and pieces(a) == pieces(b)]
    return _mean([float(churn(a, b).nanmean()) for a, b in pairs])


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means by name, without names that have no value anywhere."""
    names = dict.fromkeys(name for figures in found for name in figures)
    means = {name: _mean([figures[name] for figures in found if name in figures]) for name in names}
    return {name: value for name, value in means.items() if not math.isnan(value)}
