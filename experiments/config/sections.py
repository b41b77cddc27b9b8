"""The sections of a config as dataclasses: every setting with its type, its default and one documented line.

Everything that reads a config goes by these classes: overrides and sweep files, the refusal of unknown names and wrong
types, `zoo settings`. The settings of a plug-in's own method or datamodule come from its signature instead.

pydantic checks the values, see `declared`. Four libraries were candidates, and one was taken:

- pydantic checks any type hint strictly and casts it, on plain dataclasses; MLflow needs it anyway. Taken.
- tyro and jsonargparse build a command line of their own (`--optim.lr`). Ours is `key=value` over YAML, and the same
  text stands in sweep files.
- hydra-zen brings Hydra, whose release excludes current versions of OmegaConf and which does not resume sweeps.
- OmegaConf's structured configs know neither `Literal` nor most unions.

This module needs no torch, so that a wrong setting is refused at once.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from dataclasses import fields as dataclass_fields
from itertools import pairwise
from textwrap import dedent
from typing import Any, Literal

from datamodules.settings import LatentFilmsSettings, ShotWorldSettings, VideoFilmsSettings
from experiments.analysis.metrics import TOLERANCE
from lit_modules.settings import Flow, Model, Optim, Parallel, Pretrained, Sampling

Precision = Literal[
    "32-true",
    "16-mixed",
    "bf16-mixed",
    "16-true",
    "bf16-true",
    "64-true",
    "transformer-engine",
    "transformer-engine-float16",
    "32",
    "16",
    "bf16",
    "64",
    32,
    16,
    64,
]
PRECISIONS = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Short name of a precision -> its full name, as Lightning has them."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """The settings of Lightning's Trainer that a config may hold; a run sets loggers, callbacks and folders itself."""

    accelerator: str = "auto"
    """Device to train on: "auto", "cpu", "gpu", or another of Lightning's names."""
    strategy: str = "auto"
    """Lightning's strategy for several devices."""
    devices: list[int] | str | int = "auto"
    """Number of devices, or a list of their indices; a run has one."""
    num_nodes: int = 1
    """Number of machines; a run has one."""
    precision: Precision | None = None
    """Precision; null: "bf16-mixed" on a GPU, "16-mixed" on one without bfloat16, "32-true" elsewhere."""
    fast_dev_run: bool | int = False
    """Always false, because such a run has no result; use max_steps, or zoo sweep --dry-run."""
    max_epochs: int | None = None
    """Largest number of epochs; null: no limit while max_steps is given."""
    min_epochs: int | None = None
    """Least number of epochs, before max_time may end the run; null: none."""
    max_steps: int = -1
    """Number of optimizer steps; -1: no limit."""
    min_steps: int | None = None
    """Least number of steps, before max_time may end the run; null: none."""
    max_time: str | dict[str, int] | None = None
    """Longest time of training, as DD:HH:MM:SS or {hours: 2}; null: no limit."""
    limit_train_batches: int | float | None = None
    """Batches of a training epoch: a count, or a share such as 0.5; null: all."""
    limit_val_batches: int | float | None = None
    """Batches of a validation: a count, or a share; null: all."""
    limit_test_batches: int | float | None = None
    """Batches of the test after training: a count, or a share; null: all."""
    limit_predict_batches: int | float | None = None
    """Batches of a prediction, which a run never makes."""
    overfit_batches: int | float = 0.0
    """Trains and validates on the first batches alone: a count, or a share; 0: off."""
    val_check_interval: int | float | str | dict[str, int] | None = None
    """Time between validations: batches, a share of an epoch, or DD:HH:MM:SS; null: one epoch."""
    check_val_every_n_epoch: int | None = 1
    """Epochs between validations; null: val_check_interval counts batches across epochs."""
    num_sanity_val_steps: int | None = None
    """Validation batches before training starts; -1: all; null: 2."""
    log_every_n_steps: int | None = None
    """Steps between logged values; null: 50."""
    accumulate_grad_batches: int = 1
    """Batches whose gradients are added up before a step of the optimizer."""
    gradient_clip_val: float | None = None
    """Largest norm, or value, of the gradients; null: no clipping."""
    gradient_clip_algorithm: str | None = None
    """"norm" clips the gradients by their norm, "value" each by its value; null: "norm"."""
    deterministic: bool | Literal["warn"] | None = None
    """Whether torch uses deterministic algorithms alone; "warn" where it has them; null: false."""
    benchmark: bool | None = None
    """Whether cuDNN times its algorithms and takes the fastest; null: as torch is set."""
    inference_mode: bool = True
    """Whether validation runs in torch.inference_mode; with false, in torch.no_grad."""
    use_distributed_sampler: bool = True
    """Whether Lightning adds a sampler for several devices."""
    profiler: str | None = None
    """Lightning's profiler: "simple", "advanced" or "pytorch"; null: none."""
    detect_anomaly: bool = False
    """Whether autograd checks every operation for NaN, which is slow."""
    sync_batchnorm: bool = False
    """Whether batch norm is synchronized between devices."""
    reload_dataloaders_every_n_epochs: int = 0
    """Epochs after which the data loaders are made again; 0: never."""
    enable_autolog_hparams: bool = True
    """Whether Lightning logs hyperparameters itself."""
    model_registry: str | None = None
    """Name of the model in Lightning's registry; null: none."""


def without_result(trainer: Mapping[str, Any]) -> list[str]:
    """Return why settings of the trainer give no result that a sweep could count as finished."""
    given = trainer.get("fast_dev_run")
    return [
        f"trainer.fast_dev_run must be false, got {given!r}: such a run trains a few batches, keeps nothing, and would "
        "count as finished. Use trainer.max_steps=1, or zoo sweep FILE --dry-run"
    ] * bool(given)


@dataclass(frozen=True, kw_only=True)
class Match:
    """The cost that every method is solved for, by its knob; exactly one of density, flops and seconds."""

    density: float | None = None
    """Attended share of the pairs, mean over layers."""
    flops: float | None = None
    """FLOPs of attention in one training step, forward and backward, routing included."""
    seconds: float | None = None
    """Seconds of one training step, forward and backward."""
    within: float = TOLERANCE
    """Largest deviation from the budget, relative to it."""
    also: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    """Further settings to try for methods with a coarse knob: {method: {setting: [candidates]}}."""
    set: dict[str, Any] | None = None
    """The solved settings; `zoo sweep` and `zoo train` write them, a file need not."""


SECTIONS: dict[str, type] = {
    "model": Model,
    "flow": Flow,
    "optim": Optim,
    "trainer": Trainer,
    "sampling": Sampling,
    "parallel": Parallel,
}
"""Section of a config -> the dataclass of its settings."""


def sections_of(*, pretrained: bool) -> dict[str, type]:
    """Return `SECTIONS`, with the settings of a pretrained model in the place of `model` where `pretrained` is set."""
    return SECTIONS | ({"model": Pretrained} if pretrained else {})


DATA: dict[str, type] = {
    "shot_world": ShotWorldSettings,
    "video_films": VideoFilmsSettings,
    "latent_films": LatentFilmsSettings,
}
"""Name of a datamodule of ours -> the dataclass of its settings."""


@dataclass(frozen=True)
class Field:
    """One setting; `default` is as JSON and YAML write it, empty where the setting must be given."""

    name: str
    type: str
    default: str
    doc: str


def fields(section: type) -> list[Field]:
    """Return the settings of a dataclass, in its order, those of its bases first."""
    lines = {name: line for cls in reversed(section.__mro__) for name, line in _lines(cls).items()}
    return [Field(own.name, str(own.type), _default(own), lines[own.name]) for own in dataclass_fields(section)]


def _default(own: Any) -> str:
    if own.default_factory is not MISSING:
        return json.dumps(own.default_factory())
    return "" if own.default is MISSING else json.dumps(own.default)


def _lines(cls: type) -> Mapping[str, str]:
    """The text below each field of a class, which Python keeps nowhere but in the source."""
    if cls is object:
        return {}
    body = getattr(ast.parse(dedent(inspect.getsource(cls))).body[0], "body", [])
    return {
        own.target.id: str(below.value.value)
        for own, below in pairwise(body)
        if isinstance(own, ast.AnnAssign) and isinstance(own.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }
