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
from experiments.config.declared import declared_types, fits
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
    """Always null: a run ends after max_steps."""
    min_epochs: int | None = None
    """Always null: a run ends after max_steps."""
    max_steps: int = -1
    """Number of optimizer steps, at least 1; a run has no other end. base.yaml sets it."""
    min_steps: int | None = None
    """Always null: a run ends after max_steps."""
    max_time: str | dict[str, int] | None = None
    """Always null: a run ends after max_steps, and one that is interrupted resumes."""
    limit_train_batches: int | float | None = None
    """Batches of a training epoch: a count, or a share such as 0.5; null: all."""
    limit_val_batches: int | float | None = None
    """Batches of a validation: a count, or a share; null: all."""
    limit_test_batches: int | float | None = None
    """Batches of the test after training: a count, or a share; null: all."""
    limit_predict_batches: int | float | None = None
    """Batches of a prediction, which a run never makes."""
    overfit_batches: int | float = 0.0
    """Always 0, because such a run cannot resume; use limit_train_batches."""
    val_check_interval: int | float | None = None
    """Batches between validations: a count, or a share of an epoch; null: one epoch. The last step is validated too."""
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
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    """"norm" clips the gradients by their norm, "value" each by its value; null: "norm"."""
    deterministic: bool | Literal["warn"] | None = None
    """Whether torch uses deterministic algorithms alone; "warn" where it has them; null: false."""
    benchmark: bool | None = None
    """Whether cuDNN times its algorithms and takes the fastest; null: as torch is set."""
    inference_mode: bool = True
    """Whether validation runs in torch.inference_mode; with false, in torch.no_grad."""
    use_distributed_sampler: bool = True
    """Whether Lightning adds a sampler for several devices."""
    profiler: Literal["simple", "advanced", "pytorch"] | None = None
    """Lightning's profiler, which writes fit-profile.txt into the run's folder; null: none."""
    detect_anomaly: bool = False
    """Whether autograd checks every operation for NaN, which is slow."""
    sync_batchnorm: bool = False
    """Whether batch norm is synchronized between devices."""
    reload_dataloaders_every_n_epochs: int = 0
    """Epochs after which the data loaders are made again; 0: never."""
    enable_autolog_hparams: bool = True
    """Whether Lightning logs hyperparameters itself."""
    model_registry: str | None = None
    """Always null: checkpoints stay in the run's folder."""


BY_STEPS = "null", "a run ends after trainer.max_steps, so that equal settings train equally long. Set max_steps alone"
# Settings of Lightning's Trainer that a run leaves at their defaults: how the default is written, and why.
FIXED = {
    "fast_dev_run": (
        "false",
        "such a run trains a few batches, keeps nothing, and would count as finished. Use trainer.max_steps=1, or zoo "
        "sweep FILE --dry-run",
    ),
    **dict.fromkeys(("max_epochs", "min_epochs", "min_steps", "max_time"), BY_STEPS),
    "overfit_batches": (
        "0",
        "Lightning replaces the loader by one that cannot resume. Use trainer.limit_train_batches",
    ),
    "model_registry": ("null", "checkpoints stay in the run's folder, and nothing is uploaded. Leave it out"),
}
AT_LEAST = {
    "max_steps": 1,
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": -1,
    "reload_dataloaders_every_n_epochs": 0,
}
LIMITS = {f"limit_{split}_batches": split for split in ("train", "val", "test")}
"""Setting -> the films that it limits."""


def refused_settings(trainer: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of the trainer that a run cannot have, each with its reason.

    With them a run would end before its steps or never, train, judge or log nothing, or have several processes. Values
    of a wrong type are left to `declared.misfits`, and what needs Lightning to `experiments.config.resolve`.
    """
    hints, defaults = declared_types(Trainer), {own.name: own.default for own in dataclass_fields(Trainer)}
    given = {key: value for key, value in trainer.items() if key in hints and fits(value, hints[key])}
    found = {
        key: f"trainer.{key} must be {fixed}, got {given[key]!r}: {why}"
        for key, (fixed, why) in FIXED.items()
        if key in given and given[key] != defaults[key]
    }
    found |= {
        key: f"trainer.{key} must be at least {least}, got {given[key]!r}"
        for key, least in AT_LEAST.items()
        if given.get(key) is not None and given[key] < least
    }
    found |= {
        key: f"trainer.{key} must be a count of at least 1, or a share above 0 and at most 1, got {given[key]!r}"
        for key in (*LIMITS, "val_check_interval")
        if given.get(key) is not None and not (given[key] >= 1 if isinstance(given[key], int) else 0 < given[key] <= 1)
    }
    every = given.get("check_val_every_n_epoch", 1)
    if every is None and isinstance(given.get("val_check_interval"), float):
        found["val_check_interval"] = (
            "trainer.val_check_interval must be a count of batches where trainer.check_val_every_n_epoch is null, got "
            f"{given['val_check_interval']!r}. For a share of an epoch set trainer.check_val_every_n_epoch=1"
        )
    return found | _several(given)


def _several(trainer: Mapping[str, Any]) -> dict[str, str]:
    """Why a run may not have more than one process; Lightning would start this very command again in each."""
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    listed = isinstance(devices, list) and len(devices) == 1 and devices[0] >= 0
    found = {
        key: f"trainer.{key} must be {allowed}, got {given!r}: a run has one process and one device; for many runs at "
        "once there is zoo sweep FILE --jobs, for several devices there is parallel"
        for key, given, allowed, fine in (
            ("devices", devices, "1, or a list of one index", devices in (1, "1") or listed),
            ("num_nodes", nodes, "1", nodes == 1),
        )
        if not fine
    }
    strategy = str(trainer.get("strategy", "auto"))
    if any(start in strategy for start in ("_spawn", "_fork", "_notebook")):
        found["strategy"] = (
            f"trainer.strategy must be one that starts no processes, got {strategy!r}; leave it out. For several "
            "devices there is parallel"
        )
    if listed and trainer.get("accelerator") == "cpu":
        found["devices"] = f"trainer.devices must be 1 where trainer.accelerator is 'cpu', got {devices!r}"
    return found


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
