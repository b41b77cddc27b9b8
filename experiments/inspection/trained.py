"""A run that was trained before, opened again: its model, and validation films that fit it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch.utils._pytree import tree_map_only

from experiments.config.datamodule import build
from experiments.config.resolve import load, resolve
from experiments.execution.checkpointing import load_plain
from experiments.inspection.checkpoint import find
from lit_modules import LitVideoDiT
from lit_modules.precision import default_precision
from sparse_zoo.errors import ZooError, refuse

Batch = dict[str, Any]


class Trained:
    """A model with its averaged weights, its step of training, and batches of validation films on the CPU.

    `trainer` says on which device, and how precisely, the run computed; `notes` are lines for the user.

    Args:
        command: Who asks, for refusals.
        run: A run's folder, or one of its checkpoints.
        overrides: "data.key=value" over the run's config.
        films: How many films; where several are packed in a stream, all of a stream are there.
        plugins: Files of the user. A run folder may be somebody else's, so a class that its config names is imported
            only from one of these, or where an override names it.

    Raises:
        ZooError: if there is no checkpoint or no config beside it, or the data does not fit the model.
    """

    def __init__(
        self, command: str, run: Path, overrides: Sequence[str], films: int, plugins: Sequence[Path] = ()
    ) -> None:
        self.checkpoint, before = find(command, run, overrides, plugins)
        # The run that it began with is not needed any more.
        self.config = load([{key: value for key, value in before.items() if key != "init_from"}, *overrides])
        self.module, self.step = _load(self.checkpoint)
        data = build(resolve(self.config)["data"])
        assert isinstance(data, pl.LightningDataModule)
        model = self.module.model
        refuse(
            command,
            [
                f"films have {data.channels} channels, the model {model.channels}"
                if data.channels != model.channels
                else "",
                f"films have patches of {tuple(data.patch)}, the model of {model.patch}"
                if tuple(data.patch) != model.patch
                else "",
                f"captions have {data.vocabulary} token ids, the model {model.vocabulary}"
                if data.vocabulary > model.vocabulary
                else "",
            ],
        )
        data.prepare_data()
        data.setup("validate")
        width = getattr(data, "text_dim", None)  # known once the films are
        refuse(
            command,
            [f"captions are {width or 'ids'} wide, the model's {model.text_dim or 'ids'}"]
            if width != model.text_dim
            else [],
        )
        self.data = data
        self.batches = _first(data.val_dataloader(), films)
        found = sum(len(batch["layout"].films) * len(batch["text"]) for batch in self.batches)
        fewer = f"{films} films were asked for, and the validation has {found}; data.val_films={films} may give more"
        self.notes = [fewer] if found < films else []
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # it would tell of GPUs and products
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The `srun` command")  # a trained model is looked at where one is
            given: Any = self.config["trainer"]
            precision: Any = given.get("precision") or default_precision(given.get("accelerator", "auto"))
            self.trainer = pl.Trainer(
                plugins=[LightningEnvironment()],  # in a SLURM allocation too
                accelerator=given.get("accelerator", "auto"),
                devices=1,
                precision=precision,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )

    @property
    def folder(self) -> Path:
        """The run's."""
        return self.checkpoint.parent.parent

    def ready(self) -> tuple[LitVideoDiT, torch.device]:
        """The module on its device and in its precision, and that device."""
        device = self.trainer.strategy.root_device
        module = self.module.to(device)
        self.trainer.precision_plugin.convert_module(module)  # in place
        return module, device


def _load(checkpoint: Path) -> tuple[LitVideoDiT, int]:
    """The module with its averaged weights, and its step of training."""
    try:
        state = load_plain(checkpoint)
    except ValueError as error:
        raise ZooError(f"{checkpoint} {error}") from error
    try:
        step = int(state["global_step"])
        # Not load_from_checkpoint: it imports the "_instantiator" that a checkpoint names.
        module = LitVideoDiT(**resolve(state["hyper_parameters"]))
        module.on_load_checkpoint(state)
        module.load_state_dict(state["state_dict"])
        return module, step
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ZooError(f"{checkpoint} is no checkpoint of a run: {type(error).__name__}: {error}") from error


def _first(loader: Any, films: int) -> list[Batch]:
    """The first batches that hold so many films, of the last one only the items that are needed."""
    batches = []
    for batch in loader:
        in_stream = len(batch["layout"].films)
        items = min(len(batch["text"]), -(-films // in_stream))
        batches.append(tree_map_only(torch.Tensor, itemgetter(slice(items)), batch))  # batch items come first in all
        films -= items * in_stream
        if films <= 0:
            break
    return batches
