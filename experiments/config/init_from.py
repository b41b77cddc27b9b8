"""`init_from`: the finished run whose weights another run begins with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from experiments.config.datamodule import absolute_path
from experiments.config.names import is_pretrained
from experiments.tracking.schema import read_result
from experiments.tracking.store import home, read_sweep
from lit_modules.settings import Model
from sparse_zoo.errors import ZooError, refuse, unknown

NO_WEIGHTS = {"checkpoint"}  # settings of a model that no weight depends on


@dataclass(frozen=True)
class Start:
    """A finished run.

    id: what it computed, see `tracking.identity`; steps: its training steps; config: as it was resolved.
    """

    folder: Path
    id: str
    steps: int
    config: Mapping[str, Any]

    @property
    def checkpoint(self) -> Path:
        """The weights of its last step."""
        return self.folder / "checkpoints" / f"step={self.steps}.ckpt"


def absolute_start(given: Any) -> Any:
    """A run's folder with one spelling; SWEEP/CELL, and what is no text, stay as they are."""
    is_folder = isinstance(given, str) and Path(os.path.expanduser(given)).is_dir()
    return absolute_path(given) if is_folder else given


def find_start(given: Any) -> Start:
    """Return a run by its folder, or by SWEEP/CELL: the run of that name that the sweep was last asked for.

    Raises:
        ZooError: if there is no such run, it has not finished, or its weights are gone.
    """
    if not isinstance(given, str):
        raise ZooError(f"init_from must be a run's folder or SWEEP/CELL, got {given!r}")
    folder = Path(given) if Path(given).is_dir() else _in_sweep(given)
    try:
        result = read_result(folder)
    except (ValueError, OSError) as error:
        raise ZooError(f"init_from={given}: {folder} holds no run that can be read ({error})") from error
    start = Start(folder, str(result.get("id")), int(result.get("steps") or 0), result.get("config") or {})
    state = result.get("status")
    refuse(
        "init_from",
        [
            f"the run {given} has not finished, it is {state!r}; run it to its end first"
            if state != "finished"
            else f"the run {given} has no weights left: {start.checkpoint} is missing"
            if not start.checkpoint.exists()
            else ""
        ],
    )
    return start


def unfit_start(config: Mapping[str, Any]) -> list[str]:
    """Why a config's model cannot begin with the weights of its `init_from`; nothing where it has none, or can."""
    if "init_from" not in config:
        return []
    if is_pretrained(config["model"]):
        return ["init_from is for models of our own; a pretrained model begins with the weights of its folder"]
    try:
        before = find_start(config["init_from"]).config.get("model", {})
    except ZooError as error:
        return [str(error)]
    if is_pretrained(before):
        return [f"init_from={config['init_from']} trained a pretrained model; its weights are read by model=FOLDER"]
    theirs, ours = ({**_defaults(), **model} for model in (before, config["model"]))
    return [
        f"init_from: model.{key} is {ours[key]!r}, and that of {config['init_from']} is {theirs.get(key)!r}"
        for key in ours
        if key not in NO_WEIGHTS and ours[key] != theirs.get(key)
    ]


def _in_sweep(given: str) -> Path:
    """The folder of SWEEP/CELL."""
    sweep, _, name = given.partition("/")
    if not (home() / sweep / "sweep.json").is_file():
        raise ZooError(
            f"init_from={given}: no such folder, and no sweep {sweep!r} in {home()}. Give a run's folder, or "
            f"SWEEP/CELL once `zoo sweep SWEEP` has run"
        )
    cells = {cell.name: cell for cell in read_sweep(sweep).cells}
    refuse("init_from", [] if name in cells else [unknown(f"cell of {sweep}", name, cells)])
    return cells[name].folder(sweep)


def _defaults() -> dict[str, Any]:
    return {field.name: field.default for field in dataclass_fields(Model) if field.default is not MISSING}
