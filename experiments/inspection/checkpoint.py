"""A run's checkpoint and config, found on disk without torch, so that what cannot be opened is refused at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.config.names import is_pretrained, misspelt
from experiments.config.sections import DATA
from experiments.tracking.schema import read_result
from sparse_zoo.errors import ZooError, refuse


def find(
    command: str, run: Path, overrides: Sequence[str], plugins: Sequence[Path] = ()
) -> tuple[Path, dict[str, Any]]:
    """The latest checkpoint of a run's folder, or the one named, and the run's config; see `inspection.trained`.

    Raises `ZooError` where there is none, where overrides cannot be laid over the config, or where its data is a class
    that the user did not name.
    """
    path, config = locate(command, run)
    refuse(
        command,
        [f"{run} trained a pretrained model, which has no films of pixels; zoo sample {run} --prompts FILE generates"]
        if is_pretrained(config.get("model"))
        else [],
    )
    data = config["data"]
    foreign = [x for x in overrides if x.partition("=")[0].strip().split(".")[0] != "data"]
    reasons = [f"only data can be changed, the rest is the checkpoint's; got {x!r}" for x in foreign]
    refuse(command, reasons)
    refuse(command, [_foreign_class(data, overrides, plugins), *misspelt([{"data": data}, *overrides], plugins=True)])
    return path, config


def locate(command: str, run: Path) -> tuple[Path, dict[str, Any]]:
    """The latest checkpoint of a run's folder, or the one named, and the run's config; `ZooError` if there is none."""
    refuse(command, [] if run.exists() else [f"no such run or checkpoint: {run}"])
    checkpoints = sorted(run.glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
    if run.is_file():
        checkpoints = [run]
    refuse(command, [] if checkpoints else [f"{run} holds no checkpoints/*.ckpt; is it a run's folder?"])
    path = checkpoints[-1].absolute()
    result = path.parent.parent / "result.json"
    refuse(command, [] if result.is_file() else [f"{path} is not in a run directory: {result.name} is missing"])
    try:
        config: dict[str, Any] = read_result(path.parent.parent)["config"]
        _ = config["data"]
    except (ValueError, KeyError, OSError) as error:
        raise ZooError(f"{command}: {result} cannot be read ({type(error).__name__}: {error})") from error
    return path, config


def _foreign_class(data: Mapping[str, Any], overrides: Sequence[str], plugins: Sequence[Path]) -> str:
    """Why the class of the run's data may not be imported; nothing where the user named it."""
    name = str(data.get("name"))
    named = any(x.partition("=")[0].strip() in ("data", "data.name") for x in overrides)
    given = name.rpartition(":")[0]
    if ":" not in name or name in DATA or named or any(Path(given).resolve() == one.resolve() for one in plugins):
        return ""
    how = f"--plugin {given}" if given.endswith(".py") else f"data.name={name}"
    return f"the run's data is the class {name!r}, and importing it runs code. Give {how} if you trust it"
