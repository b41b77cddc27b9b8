"""Films drawn from a run that was trained before, over data that may be longer than what it has seen."""

from __future__ import annotations

import json
import logging
import math
import pickle
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils._pytree import tree_map_only
from torchmetrics import MetricCollection

from experiments.config import Config, load
from experiments.data import build
from experiments.store import write_json
from lit_modules import Euler, LitVideoDiT, SampleFilms
from lit_modules.callbacks import film_pictures, write_picture
from sparse_zoo.errors import ZooError, refuse

Batch = dict[str, Any]


@dataclass(frozen=True)
class Sampled:
    """What was drawn, ready for JSON.

    `films`: {"name", "shots", "given", "strip" (a path), "taken"} each; "taken" maps each shot that was drawn to the
    earlier ones it was drawn beside, and is None where all were drawn at once. `metrics` are those of the datamodule,
    `notes` what was warned of.
    """

    checkpoint: str
    step: int
    folder: str
    sampling: dict[str, Any]
    data: dict[str, Any]
    films: list[dict[str, Any]]
    metrics: dict[str, float | None]
    notes: list[str]
    seconds: float


class Drawing:
    """A trained model and the validation films that it is to draw.

    Args:
        run: A run's folder, or one of its checkpoints.
        overrides: "data.key=value" over the run's config.
        films: How many films; where several are packed in a stream, all of a stream are drawn.
        given: How many first shots of each film are given instead of drawn.
        sampling: Fields of `Euler` that differ from the run's.

    Raises:
        ZooError: if there is no checkpoint or no config beside it, or the data does not fit the model.
    """

    def __init__(
        self, run: Path, overrides: Sequence[str], *, films: int, given: int, sampling: Mapping[str, Any]
    ) -> None:
        self.checkpoint, before = _find(run)
        foreign = [x for x in overrides if x.partition("=")[0].strip().split(".")[0] != "data"]
        refuse("zoo sample", [f"only data can be changed, the rest is the checkpoint's; got {x!r}" for x in foreign])
        config = load([before, *overrides])
        self.given, self.settings = given, config["data"]
        of_run = {key: value for key, value in config["sampling"].items() if key != "every"}
        order = {"order": "shots"} if sampling.get("context") is not None else {}
        self.euler = Euler(**{**of_run, **order, **sampling})
        self.module, self.step = _load(self.checkpoint)
        data = build(config["data"])
        assert isinstance(data, pl.LightningDataModule)
        model = self.module.model
        refuse(
            "zoo sample",
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
        self.metrics = MetricCollection(dict(data.sample_metrics()), compute_groups=False)
        self.batches = _first(data.val_dataloader(), films)
        every = all(bool(self._known(batch).all()) for batch in self.batches)
        refuse("zoo sample", [f"with {given} shots given there is nothing left to draw"] if every else [])
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # it would tell of GPUs and products
        self.trainer = pl.Trainer(
            accelerator=config["trainer"].get("accelerator", "auto"),
            devices=1,
            precision=config["trainer"].get("precision"),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    @property
    def steps(self) -> int:
        """Euler steps in all."""
        return sum(self.euler.count(batch, self._known(batch)) for batch in self.batches)

    def draw(self, out: Path | None, told: Callable[[], object]) -> Sampled:
        """Draw every film, write strips and `sample.json` into `out`; `told` is called once a step.

        By default `out` is a new folder in the run's `samples`. A strip shows the real film, the model's guess of it
        from half noise, and what was drawn.
        """
        start = time.perf_counter()
        folder = out or self.checkpoint.parent.parent / "samples" / f"{datetime.now():%Y%m%d-%H%M%S}"
        device, precision = self.trainer.strategy.root_device, self.trainer.precision_plugin
        module, metrics = self.module.to(device), self.metrics.to(device)
        precision.convert_module(module)  # in place
        films: list[dict[str, Any]] = []
        caught: list[warnings.WarningMessage] = []
        for number, cpu in enumerate(self.batches):
            batch, known = move_data_to_device(cpu, device), self._known(cpu)
            with precision.forward_context(), warnings.catch_warnings(record=True) as new:
                warnings.simplefilter("always")
                guess = module.flow.denoise(module.model, batch, SampleFilms.GUESS_FROM, step=self.step, seed=number)
                drawn = self.euler.draw(
                    module.model, module.flow, batch, seed=number, known=known, step=self.step, told=told
                )
            caught += new
            metrics.update(drawn.clips, batch)
            rows = (batch["clips"], guess, drawn.clips)
            for item in range(len(batch["text"])):
                for i, picture in enumerate(film_pictures(batch["layout"], rows, item)):
                    shots = len(batch["layout"].films[i].shots)
                    films.append(
                        {
                            "name": _name(batch, item, i) or f"film {len(films)}",
                            "shots": shots,
                            "given": min(self.given, shots),
                            "strip": str(write_picture(folder / f"film_{len(films):03d}.png", picture)),
                            "taken": drawn.taken[i][item] if drawn.taken else None,
                        }
                    )
        found = {name: float(value) for name, value in metrics.compute().items()} if len(metrics) else {}
        sampled = Sampled(
            str(self.checkpoint),
            self.step,
            str(folder),
            asdict(self.euler),
            self.settings,
            films,
            {name: value if math.isfinite(value) else None for name, value in found.items()},
            list(dict.fromkeys(str(warning.message) for warning in caught)),
            time.perf_counter() - start,
        )
        write_json(folder / "sample.json", asdict(sampled))
        return sampled

    def _known(self, batch: Batch) -> torch.Tensor:
        number = torch.cat([torch.arange(len(film.shots)) for film in batch["layout"].films])
        return number < self.given


def _find(run: Path) -> tuple[Path, Config]:
    """The latest checkpoint of a run's folder, or the one named, and the run's config."""
    refuse("zoo sample", [] if run.exists() else [f"no such run or checkpoint: {run}"])
    checkpoints = sorted(run.glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
    if run.is_file():
        checkpoints = [run]
    refuse("zoo sample", [] if checkpoints else [f"{run} holds no checkpoints/*.ckpt; is it a run's folder?"])
    path = checkpoints[-1].absolute()
    result = path.parent.parent / "result.json"
    refuse("zoo sample", [] if result.is_file() else [f"{path} lies in no run: there is no {result} with its config"])
    config: Config = json.loads(result.read_text())["config"]
    return path, config


def _load(checkpoint: Path) -> tuple[LitVideoDiT, int]:
    """The module with its averaged weights, and its step of training."""
    try:
        step = int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])
        return LitVideoDiT.load_from_checkpoint(checkpoint, map_location="cpu"), step
    except (KeyError, TypeError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ZooError(f"{checkpoint} is no checkpoint of a run: {type(error).__name__}: {error}") from error


def _name(batch: Batch, item: int, film: int) -> str:
    """What our datamodules call a film: either batch items or the films of a stream are many."""
    names: list[str] = batch.get("names", [])
    number = item * len(batch["layout"].films) + film
    return names[number] if number < len(names) else ""


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
