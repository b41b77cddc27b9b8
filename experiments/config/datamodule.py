"""Which datamodule a config names: one of ours, or a class of yours."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import getattr_static, isclass
from pathlib import Path
from typing import Any, Protocol, cast, get_args

from lightning.pytorch import LightningDataModule
from torchmetrics import Metric

from datamodules import LatentFilms, ShotWorld, VideoFilms
from experiments.config.declared import declared_types
from experiments.config.sections import DATA
from sparse_zoo.errors import refuse, unknown
from sparse_zoo.registry import import_file, importing

OF_LATENTS = ("summary", "train_dataloader", "val_dataloader")  # what a run of a pretrained model asks for
ASKED = ("channels", "patch", "vocabulary", "sample_metrics", *OF_LATENTS)


class FilmData(Protocol):
    """What a run asks of a `LightningDataModule` beside loaders for training and validation.

    Their batches are those that `LitVideoDiT` describes.
    """

    @property
    def channels(self) -> int:
        """Of the clips."""
        ...

    @property
    def patch(self) -> tuple[int, int, int]:
        """Pixels of a token along (frames, rows, cols)."""
        ...

    @property
    def vocabulary(self) -> int:
        """The ids of text tokens lie below it."""
        ...

    def summary(self) -> dict[str, Any]:
        """What the films are, ready for JSON; asked for after `setup`."""
        ...

    def sample_metrics(self) -> dict[str, Metric]:
        """Metrics by name, whose `update(clips, batch)` judges films that are generated at validation."""
        ...


CLIPS = ("shot_world", "video_films")  # what of ours is no data for a pretrained model
PATHS = ("folder", "captions", "cache", "vae")  # settings of ours that name files
OURS: dict[str, Callable[..., FilmData]] = {
    "shot_world": ShotWorld,
    "video_films": VideoFilms,
    "latent_films": LatentFilms,
}


def find(name: str) -> Callable[..., FilmData]:
    """The class of a datamodule: one of `OURS`, "path/of/file.py:Class" or "package.module:Class".

    Raises `ZooError` if there is none.
    """
    if name in OURS:
        return OURS[name]
    place, colon, wanted = name.rpartition(":")
    refuse("data", [] if colon else [unknown("data", name, OURS)])
    if place.endswith(".py"):
        module = import_file(place)
    else:
        with importing(f"data {name!r}"):
            module = import_module(place)
    classes = {key: value for key, value in vars(module).items() if isclass(value) and _is_data(value)}
    refuse(f"data {name!r}", [] if wanted in classes else [unknown("LightningDataModule", wanted, classes)])
    return cast("Callable[..., FilmData]", classes[wanted])


def declares(films: Callable[..., FilmData]) -> Callable[..., Any]:
    """Return what declares the settings of a datamodule: the dataclass of one of ours, or the class itself.

    A class of yours that inherits from one of ours and has no `__init__` of its own takes the same settings.
    """
    own = getattr_static(films, "__init__")
    return next((DATA[name] for name, cls in OURS.items() if own is getattr_static(cls, "__init__")), films)


def _is_data(cls: type) -> bool:
    return issubclass(cls, LightningDataModule) and cls is not LightningDataModule


def absolute(settings: Mapping[str, Any], films: Callable[..., FilmData]) -> dict[str, Any]:
    """The settings of a class with its paths made absolute, links followed: a folder has one spelling, from anywhere.

    Paths are `PATHS` of our own classes, and whatever a class of yours declares as `Path`; so is the file in its name.
    An expression, which stands for a text of the environment, stays one.
    """
    types = declared_types(films)
    ours = PATHS if films in OURS.values() else ()
    made = dict(settings)
    for key, value in settings.items():
        if key in ours or types.get(key) is Path or Path in get_args(types.get(key)):
            made[key] = [absolute_path(one) for one in value] if isinstance(value, list) else absolute_path(value)
    place, colon, wanted = str(settings["name"]).rpartition(":")
    if place.endswith(".py"):
        made["name"] = f"{absolute_path(place)}{colon}{wanted}"
    return made


def absolute_path(place: Any) -> Any:
    """A path made absolute, links followed; what is no path on this machine's disk stays as it is."""
    if not isinstance(place, str) or place.startswith("package:") or "://" in place or "${" in place:
        return place
    return os.path.realpath(os.path.expanduser(place))


def shape(data: FilmData) -> dict[str, Any]:
    """The arguments of `VideoDiT` that follow from the data."""
    text = {"text_dim": data.text_dim} if hasattr(data, "text_dim") else {}
    return {"channels": data.channels, "patch": list(data.patch), "vocabulary": data.vocabulary, **text}


def build(settings: Mapping[str, Any], *, pretrained: bool = False) -> FilmData:
    """The datamodule of a config's `data`; raises `ZooError` if it lacks what a run asks of it.

    A pretrained model trains on batches as `LitPretrained` describes them, which clips of pixels are not.
    """
    name = settings["name"]
    made = find(name)(**{key: value for key, value in settings.items() if key != "name"})

    def has(asked: str) -> bool:
        own, base = (getattr_static(cls, asked, None) for cls in (type(made), LightningDataModule))
        return own is not base or asked in vars(made)  # Lightning's own loaders only raise

    refuse(
        f"data {name!r}",
        [f"{type(made).__name__} has no {asked!r}" for asked in (OF_LATENTS if pretrained else ASKED) if not has(asked)]
        + (
            [f"{name} has clips of pixels; a pretrained model=DIR needs latents and text embeddings"]
            if pretrained and name in CLIPS
            else []
        )
        + [
            f"batches must be {wanted} for a {'pretrained model=DIR' if pretrained else 'model of ours'}, "
            f"got {settings.get('batches', 'packed')}"
            for wanted in ("pretrained" if pretrained else "packed",)
            if name == "latent_films" and settings.get("batches", "packed") != wanted
        ],
    )
    return made
