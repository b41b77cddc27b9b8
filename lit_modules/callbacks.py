"""Callbacks: averaged weights, cost of attention, step time, films generated in validation."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

import sparse_zoo as zoo
from lit_modules.parallel import Shards, mean_over_ranks
from lit_modules.sampling import Euler
from lit_modules.settings import Sampling
from lit_modules.strips import film_rows, some_frames
from sparse_zoo.errors import refuse

if TYPE_CHECKING:
    from lit_modules.module import LitVideoDiT


class _Average(AveragedModel):
    """A copy of a model that follows its weights.

    It counts its updates on the CPU, where reading the number does not make the host wait for the GPU, as torch's own
    counter does in every step.
    """

    def __init__(self, model: nn.Module, decay: float, device: torch.device) -> None:
        super().__init__(model)
        self.module.to(device)
        self.decay = decay

    @override
    def update_parameters(self, model: nn.Module) -> None:
        """Move the averaged weights towards those of `model`."""
        with torch.no_grad():
            _follow(list(self.module.parameters()), list(model.parameters()), self.decay, int(self.n_averaged))
            for own, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
                own.copy_(buffer)
        self.n_averaged += 1


class _ShardAverage(nn.Module):
    """Averages a model whose parameters are shards; each rank averages its own shards.

    Such a model cannot be copied as a module, so `_Average` does not serve. The state has the names of `_Average`'s.
    """

    n_averaged: Tensor

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.names = [f"module.{name}" for name, _ in model.named_parameters()]
        self.module = nn.ParameterList(nn.Parameter(p.detach().clone(), False) for p in model.parameters())
        self.register_buffer("n_averaged", torch.tensor(0))
        self.decay = decay

    def update_parameters(self, model: nn.Module) -> None:
        with torch.no_grad():
            means, weights = ([p.to_local() for p in x.parameters()] for x in (self.module, model))  # type: ignore[attr-defined]
            _follow(means, weights, self.decay, int(self.n_averaged))
        self.n_averaged += 1

    @override
    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        means = (p.detach() for p in self.module.parameters())
        return dict(zip(self.names, means, strict=True)) | {"n_averaged": self.n_averaged}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], *_: Any, **__: Any) -> Any:
        with torch.no_grad():
            for name, mean in self.state_dict().items():
                mean.copy_(state_dict[name])


def _follow(means: list[Tensor], weights: list[Tensor], decay: float, n: int) -> None:
    """Update n + 1 of averages, in place."""
    # With weights in half precision the average stays in float32, or it would not move.
    wide = [weight.to(mean.dtype) for weight, mean in zip(weights, means, strict=True)]
    torch._foreach_lerp_(means, wide, 1 - min(decay, (1 + n) / (10 + n)) if n else 1.0)


class EMA(WeightAveraging):
    """Exponential moving average of the weights, used by validation, test and the `state_dict` of checkpoints.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that a short run is not judged by its first weights.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False)
        self.decay = decay

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not isinstance(trainer.strategy, Shards):
            # The model is moved to its device after this: where it is now, each update would copy it back to the CPU.
            self._average_model = _Average(pl_module, self.decay, trainer.strategy.root_device)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, Shards):  # the model is sharded by now, and not yet restored
            self._average_model = _ShardAverage(pl_module, self.decay)  # type: ignore[assignment]

    # Training that was over before it was resumed does not end again, and so leaves the last weights in their place.
    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_epoch_start(trainer, pl_module)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_epoch_end(trainer, pl_module)


class AttentionCost(Callback):
    """Counts the cost of attention from the plans that ran, at the first training batch and every `every` batches.

    Logs `attention/density`, `attention/flops` (forward, without routing, of one batch over all layers) and
    `attention/density/layer_<i>`. Counts anew where a schedule changes a setting: the cost is that of the method which
    is judged. `results` are those of the last counted batch, for pictures; after a resume they are those of the first
    batch, until one is counted.
    """

    def __init__(self, every: int = 50) -> None:
        refuse("AttentionCost", [f"every must be at least 1, got {every}"] if every < 1 else [])
        self.every = every
        self.results: list[zoo.Result] = []
        self._layers: list[zoo.Cost] = []
        self._counted = 0
        self._phases: list[int] = []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        layers = (module for module in pl_module.modules() if isinstance(module, zoo.Scheduled))
        phases = [layer.phase(trainer.global_step) for layer in layers]
        if phases != self._phases:
            self._phases, self._layers, self._counted = phases, [], 0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = trainer.fit_loop.total_batch_idx % self.every == 0 or not self._counted
        if due or not self.results:
            self.results = outputs["results"]
        if not due:
            return
        costs = _of_all_ranks([result.cost() for result in self.results], trainer)
        self._layers = [a + b for a, b in zip(self._layers, costs, strict=True)] if self._layers else costs
        self._counted += 1
        total = _sum(costs)
        logged = {"attention/density": total.density, "attention/flops": float(total.flops)}
        logged |= {f"attention/density/layer_{i}": cost.density for i, cost in enumerate(costs)}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=trainer.global_step)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "layers": [asdict(cost) for cost in self._layers],
            "counted": self._counted,
            "phases": self._phases,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._layers = [zoo.Cost(**cost) for cost in state_dict["layers"]]
        self._counted = state_dict["counted"]
        self._phases = state_dict["phases"]

    def summary(self) -> dict[str, Any]:
        """Means over the counted batches, ready for JSON: per batch over all layers, and `layers`, the density of each.

        Where settings are scheduled, those of the last phase.

        Empty before the first training batch.
        """
        if not self._counted:
            return {}
        total = _sum(self._layers)
        return {
            "kernel": ",".join(dict.fromkeys(result.kernel for result in self.results)),
            "density": total.density,
            "pairs": total.pairs / self._counted,
            "flops": total.flops / self._counted,
            "flops_backward": total.flops_backward / self._counted,
            "routing_flops": total.routing_flops / self._counted,
            "layers": [cost.density for cost in self._layers],
            "batches_counted": self._counted,
        }


def _of_all_ranks(costs: list[zoo.Cost], trainer: Trainer) -> list[zoo.Cost]:
    """The costs of a film's whole stream, of which ranks have some heads each; a mean over films."""
    if trainer.world_size == 1:
        return costs
    mine = torch.tensor([list(asdict(cost).values()) for cost in costs], dtype=torch.float64)
    sequence = trainer.strategy.sequence if isinstance(trainer.strategy, Shards) else 1
    total = mean_over_ranks(mine) * sequence
    return [zoo.Cost(*map(round, row)) for row in total.tolist()]


def _sum(costs: Sequence[zoo.Cost]) -> zoo.Cost:
    total = costs[0]
    for cost in costs[1:]:
        total = total + cost
    return total


def takes_part(trainer: Trainer) -> bool:
    """Whether this rank runs the model for what only the first writes: the first, or all where they share its work."""
    return trainer.is_global_zero or isinstance(trainer.strategy, Shards)


class StepTimer(Callback):
    """Measures seconds per training batch, from its start to its end, without loading of data and validation.

    On a GPU these are the GPU's seconds: the host does not wait for the end of a batch. The first `skip` batches, which
    compile and allocate, are not counted, also after each resume.
    """

    def __init__(self, skip: int = 2) -> None:
        self.skip = skip
        self.seconds: list[float] = []
        self._before: list[float] = []  # timed before a resumption
        self._peak_before = 0
        self._running: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # batches that a GPU may not have ended
        self._start: Any = 0.0
        self._memory = _PeakMemory(torch.device("cpu"))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds, self._running = [], []
        self._memory = _PeakMemory(pl_module.device)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = _now(pl_module.device)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        end = _now(pl_module.device)
        if isinstance(end, float):
            self.seconds.append(end - self._start)
            return
        self._running.append((self._start, end))
        self._read(wait=False)

    def _read(self, *, wait: bool) -> None:
        """Record the batches that the GPU has finished; with `wait`, wait for all of them."""
        while self._running and (wait or self._running[0][1].query()):
            start, end = self._running.pop(0)
            end.synchronize()
            self.seconds.append(start.elapsed_time(end) / 1000)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"timed": self._timed(), "peak": self._peak()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before, self._peak_before = state_dict["timed"], state_dict["peak"]

    def _timed(self) -> list[float]:
        self._read(wait=True)
        return self._before + self.seconds[self.skip :]

    def _peak(self) -> int:
        return max(self._peak_before, self._memory.read())

    def summary(self) -> dict[str, Any]:
        """Median seconds (None with at most `skip` batches), number of timed batches, peak memory and its meaning."""
        timed = self._timed()
        return {
            "seconds_per_step": statistics.median(timed) if timed else None,
            "steps_timed": len(timed),
            "peak_memory_bytes": self._peak(),
            "peak_memory_of": self._memory.meaning,
        }


def _now(device: torch.device) -> float | torch.cuda.Event:
    """The current time; on a GPU an event, which completes when earlier work has finished and never blocks the host."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished; does nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _PeakMemory:
    """Peak memory since construction, or since the process began where the system cannot reset its peak."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.meaning = "CUDA tensors, this run"
            return
        try:
            # Linux: sets the peak resident size back to the present one.
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            self.meaning = "resident memory of the process, this run"
        except OSError:
            self.meaning = "resident memory of the process since it began"

    def read(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.meaning.endswith("this run"):
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


class SampleFilms(Callback):
    """Samples the films of the first validation batch, every `every` validations, and stores them in `folder`.

    A film is a `.npz` file of three rows of frames, uint8 (H, W, 3) each, with gaps at the cuts and at most four frames
    of a shot: `real`, the film of the data; `guess`, the model's guess of it in one step from noise of time
    `GUESS_FROM`, which shows early in training what was learnt; `generated`, the film that `Euler` makes of its
    captions alone. Weights are the averaged ones. `on_film` is called with each path. `decode` makes pixels of the
    clips of a model of latents. `sampling`: fields of `Sampling`.
    """

    GUESS_FROM = 0.5
    VERSIONS = ("real", "guess", "generated")

    def __init__(
        self,
        folder: str | Path,
        *,
        seed: int = 0,
        on_film: Callable[[Path], object] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        **sampling: Any,
    ) -> None:
        settings = Sampling(**sampling)
        self.decode = decode
        self.folder = Path(folder)
        self.euler = Euler(settings.steps, settings.guidance, settings.order, settings.context)
        self.every, self.seed, self.on_film = settings.every, seed, on_film
        self.paths: list[Path] = []
        self._validations = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        channels = cast("LitVideoDiT", pl_module).model.channels
        pixels = channels in (1, 3) or self.decode is not None
        refuse("SampleFilms", [] if pixels else [f"films of 1 or 3 channels can be shown, got {channels}"])

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations, "names": [path.name for path in self.paths]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]
        # Earlier versions stored PNG files, which nothing reads now.
        self.paths = [self.folder / name for name in state_dict["names"] if name.endswith(".npz")]

    # Within the validation epoch, not at its end: by then the averaged weights are put back.
    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx or dataloader_idx or trainer.sanity_checking or not takes_part(trainer):
            return
        trained = cast("LitVideoDiT", pl_module)
        self._validations += 1
        if self._validations % self.every:
            return
        step = trainer.global_step
        with trainer.precision_plugin.forward_context():
            guessed = trained.flow.denoise(trained.model, batch, self.GUESS_FROM, step=step, seed=self.seed)
            drawn = self.euler.sample(trained.model, trained.flow, batch, step=step, seed=self.seed)
        if not trainer.is_global_zero:
            return
        rows = [batch["clips"], guessed, drawn]
        if self.decode is not None:  # shot by shot, and what is not shown is not kept
            rows = [[some_frames(self.decode(clip[0]))[None] for clip in clips] for clips in rows]
        for number, film in enumerate(film_rows(batch["layout"], rows)):
            path = self.folder / f"step_{step:06d}_film_{number}.npz"
            path.parent.mkdir(parents=True, exist_ok=True)
            arrays = {name: row.numpy() for name, row in zip(self.VERSIONS, film, strict=True)}
            np.savez_compressed(path, allow_pickle=False, **arrays)
            self.paths.append(path)
            if self.on_film is not None:
                self.on_film(path)


def write_picture(path: Path, picture: Tensor) -> Path:
    """Write uint8 (H, W, 3) as PNG, create its folder, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    from matplotlib import image  # here: only pictures need it

    image.imsave(path, picture.numpy())
    return path
