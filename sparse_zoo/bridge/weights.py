"""The file of an attached model's methods: which they are and their weights, without the model's."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from sparse_zoo.errors import ZooError, refuse
from sparse_zoo.layers import Layer

FORMAT = "sparse_zoo bridge 1"


def save_weights(path: Path, family: str, layers: Sequence[Layer], methods: Sequence[nn.Module]) -> Path:
    """Write the file, whole or not at all."""
    weights = {f"{i}.{name}": x.detach().cpu() for i, own in enumerate(methods) for name, x in own.state_dict().items()}
    held = {"format": FORMAT, "family": family, "layers": [dict(layer) for layer in layers], "weights": weights}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, begun = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(held, file)
        Path(begun).replace(path)
    except BaseException:  # Ctrl-C too leaves no half-written file; raised again
        Path(begun).unlink(missing_ok=True)
        raise
    return path


def load_weights(path: Path, layers: Sequence[Layer], methods: Sequence[nn.Module]) -> None:
    """Read the file into methods; `ZooError` with every reason where it is not of these."""
    refuse(f"load {path}", ["no such file"] if not path.is_file() else [])
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ZooError(f"load {path}: it is no file of Bridge.save: {str(error).splitlines()[0]}") from error
    given = held.get("format") if isinstance(held, dict) else None
    refuse(f"load {path}", [f"its format is {given!r}, not {FORMAT!r}"] if given != FORMAT else [])
    names, own = [[one["name"] for one in x] for x in (held["layers"], layers)]
    found = held["weights"]
    wanted = {f"{i}.{name}": x for i, method in enumerate(methods) for name, x in method.state_dict().items()}
    refuse(
        f"load {path}",
        [f"it has methods {names}, the model has {own}" if names != own else ""]
        + [f"{name} is missing" for name in wanted if name not in found]
        + [f"{name} is not of these methods" for name in found if name not in wanted]
        + [
            f"{name} is {tuple(found[name].shape)}, must be {tuple(x.shape)}"
            for name, x in wanted.items()
            if name in found and found[name].shape != x.shape
        ],
    )
    for i, method in enumerate(methods):
        mine = f"{i}."
        method.load_state_dict({name.removeprefix(mine): x for name, x in found.items() if name.startswith(mine)})
