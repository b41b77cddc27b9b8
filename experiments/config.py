"""From YAML and `key=value` overrides to one config: resolved, checked whole, refused with every reason at once."""

from __future__ import annotations

import inspect
import logging
import math
import re
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import sparse_zoo as zoo
from experiments.layers import per_layer
from sparse_zoo.errors import ZooError, refuse, unknown
from sparse_zoo.schedule import phases as phases_of

CONFIGS = Path(__file__).parent / "configs"
Config = dict[str, Any]
Override = str | Mapping[str, Any]

# What the run itself hands to these constructors; a config may not.
GIVEN = {
    "model": {"channels", "patch", "vocabulary", "attention"},
    "trainer": {
        "logger",
        "callbacks",
        "default_root_dir",
        "enable_progress_bar",
        "enable_checkpointing",
        "enable_model_summary",
        "barebones",
    },
    "sampling": {"folder", "on_image", "seed"},
}


def load(overrides: Sequence[Override] = ()) -> Config:
    """`configs/base.yaml` under the mappings, in order, under the texts; interpolations resolved, everything checked.

    An override is "dotted.key=value" (the value is YAML) or a mapping, whose keys may be dotted too. `attention=moc`
    replaces the node by {"name": "moc"}, and a list gives each layer its own (`layers.per_layer` has its short forms);
    `data=shot_world` replaces the node by that preset of `configs/data.yaml`, `data=file.py:Class` by a datamodule of
    one's own. Mappings are merged, but `attention` and `match` are always replaced as a whole. Raises `ZooError`.
    """
    config, reasons = merge(overrides)
    refuse("config", reasons + check(config))
    return config


def merge(overrides: Sequence[Override]) -> tuple[Config, list[str]]:
    """The resolved config, not checked yet, and why some overrides could not be laid over it; as in `load`."""
    config: Config = read_yaml(CONFIGS / "base.yaml")
    for key in ("attention", "data"):
        _assign(config, [key], config.pop(key))
    groups = [list(override.items()) for override in overrides if isinstance(override, Mapping)]
    groups.append([parse(override) for override in overrides if isinstance(override, str)])
    reasons: list[str] = []
    for group in groups:
        # A name replaces its node, so it goes before the settings inside, wherever it was written.
        for key, value in sorted(group, key=lambda pair: str(pair[0]).count(".")):
            reasons += filter(None, [_assign(config, str(key).split("."), deepcopy(value))])
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    except OmegaConfBaseException as error:
        raise ZooError(f"config: {str(error).splitlines()[0]}") from error
    assert isinstance(resolved, dict)
    config = {str(key): value for key, value in resolved.items()}
    if isinstance(config["attention"], list):
        config["attention"], misfits = per_layer(config["attention"], config["model"].get("depth"))
        reasons += misfits
    if not config["match"]:
        del config["match"]  # so that a run has one id, whether or not a sweep around it matches budgets
    return config, reasons


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping; raises `ZooError` with the path otherwise."""
    refuse(str(path), ["no such file"] if not path.is_file() else [])
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ZooError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    refuse(str(path), ["must hold a mapping"] if not isinstance(loaded, dict) else [])
    assert isinstance(loaded, dict)
    return {str(key): value for key, value in loaded.items()}


def check(config: Config) -> list[str]:
    """Every reason why this config cannot run; none when it can."""
    from lightning.pytorch import Trainer

    from experiments import data
    from experiments.match import Budget
    from lit_modules.callbacks import SampleFilms
    from lit_modules.dit import VideoDiT
    from lit_modules.flow import RectifiedFlow
    from lit_modules.module import Optim

    films = {key: value for key, value in config["data"].items() if key != "name"}
    try:
        reasons = _misfits("data", films, data.find(str(config["data"].get("name"))))
    except ZooError as error:
        reasons = [str(error)]
    reasons += _misfits("trainer", config["trainer"], Trainer, GIVEN["trainer"]) or _trainer(config["trainer"])
    sections: dict[str, type] = {"flow": RectifiedFlow, "optim": Optim, "sampling": SampleFilms}
    for section, build in sections.items():
        reasons += _misfits(section, config[section], build, GIVEN.get(section, ()))
    if not fits(config["seed"], int) or config["seed"] < 0:
        reasons.append(f"seed must be a whole number of at least 0, got {config['seed']!r}")
    if "match" in config:
        reasons += refusals(lambda: Budget.of(config["match"]))
    model = config["model"]
    wrong = _misfits("model", model, VideoDiT, GIVEN["model"])
    if not wrong and (model["heads"] < 1 or model["dim"] % model["heads"]):
        wrong = [f"model.heads {model['heads']} must divide model.dim {model['dim']}"]
    # Where the model's shape is wrong, the attention is still judged, in one that is right.
    wrong += _attention(config, *((64, 1) if wrong else (model["dim"], model["heads"])))
    if reasons or wrong:
        return reasons + wrong
    # What has the right names and types may still be out of range: the parts themselves know.
    shape: dict[str, Any] = {"channels": 3, "patch": (1, 1, 1), "vocabulary": 1, "attention": {"name": "dense"}}
    return [
        *refusals(lambda: data.build(config["data"])),
        *refusals(lambda: RectifiedFlow(**config["flow"])),
        *refusals(lambda: Optim(**config["optim"])),
        *refusals(lambda: SampleFilms(".", **config["sampling"])),
        *refusals(lambda: VideoDiT(**{**config["model"], "depth": 1}, **shape)),
    ]


def known(config: Config) -> set[str]:
    """The dotted keys, at most two deep, that the parts of a config know; they need not be set."""
    from lightning.pytorch import Trainer

    from experiments import data
    from experiments.match import KINDS
    from lit_modules import Optim, RectifiedFlow, SampleFilms, VideoDiT

    builders: dict[str, Callable[..., Any]] = {
        "model": VideoDiT, "flow": RectifiedFlow, "optim": Optim, "trainer": Trainer, "sampling": SampleFilms
    }  # fmt: skip
    inside = {section: [*_parameters(build, GIVEN.get(section, ()))] for section, build in builders.items()}
    inside |= {"match": [*KINDS, "also"], "attention": ["name", "schedule"], "data": ["name"]}
    if isinstance(config["attention"], dict) and (method := config["attention"].get("name")) in zoo.names():
        inside["attention"] += zoo.settings(method)
    with suppress(ZooError):
        inside["data"] += _parameters(data.find(str(config["data"].get("name"))))
    return {"seed", *inside, *(f"{section}.{key}" for section, keys in inside.items() for key in keys)}


def _trainer(given: Mapping[str, Any]) -> list[str]:
    """What Lightning refuses of its own settings; whether the device is there is not asked, a cluster may have it."""
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Trainer
    from lightning.pytorch.accelerators import AcceleratorRegistry

    accelerators = ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
    accelerator = given.get("accelerator", "auto")
    reasons = [] if accelerator in accelerators else [unknown("trainer.accelerator", accelerator, accelerators)]
    hardware = {"accelerator", "devices", "num_nodes", "strategy", "precision", "plugins"}
    whole_process = {"deterministic", "benchmark"}  # a trainer sets these for whatever runs here
    own = {key: value for key, value in given.items() if key not in hardware | whole_process}
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it tells of GPUs
    try:
        with warnings.catch_warnings(action="ignore"):
            Trainer(**own, **quiet, accelerator="cpu", devices=1, plugins=[LightningEnvironment()])
    except (MisconfigurationException, ValueError, TypeError) as error:
        reasons.append(f"trainer: {' '.join(str(error).split())}")
    finally:
        logging.disable(disabled)
    return reasons + _several(given)


def _several(trainer: Mapping[str, Any]) -> list[str]:
    """Why a run may not have more than one process; Lightning would start this very command again in each."""
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    one = devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1)
    return [
        f"trainer.{key} must be {allowed}, got {given!r}: a run has one process and one device; for many runs at once "
        "there is zoo sweep FILE --jobs"
        for key, given, allowed, fine in (
            ("devices", devices, "1, or a list of one", one),
            ("num_nodes", nodes, "1", nodes == 1),
        )
        if not fine
    ]


def refusals(build: Callable[[], object]) -> list[str]:
    """What `build` is refused with; nothing where it succeeds."""
    try:
        build()
    except ZooError as error:
        return [str(error)]
    return []


def _attention(config: Config, dim: int, heads: int) -> list[str]:
    """Build every layer's method and let it attend in a small film, where and as precisely as the trainer will."""
    layers = config["attention"] if isinstance(config["attention"], list) else [config["attention"]]
    distinct = [layer for i, layer in enumerate(layers) if layer not in layers[:i]]
    return [reason for layer in distinct for reason in _attends(layer, dim, heads, config["trainer"])]


def _attends(settings: Mapping[str, Any], dim: int, heads: int, trainer: Mapping[str, Any]) -> list[str]:
    """Why a layer's method cannot be built or attend, in every phase where its settings are scheduled."""
    import torch

    own = {key: value for key, value in settings.items() if key != "schedule"}
    try:
        phases = {0: own} if settings.get("schedule") is None else phases_of(own, settings["schedule"])
    except ZooError as error:
        return [f"attention.{error}"]
    misfits = {reason: start for start, phase in reversed(phases.items()) for reason in _misfits_of_method(phase)}
    if misfits:
        return [_since(start, reason) for reason, start in misfits.items()]
    layout = zoo.Layout.film([zoo.Shot(2, 2, 2, 1), zoo.Shot(1, 2, 2)], caption=1)
    cuda = torch.cuda.is_available() and trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    precision = str(trainer.get("precision", 32))
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32
    device = "cuda" if cuda else "cpu"
    try:
        attention = zoo.build(**settings, heads=heads, head_dim=dim // heads, dim=dim).to(device)
    except ZooError as error:
        return [str(error)]

    def attend(step: int) -> None:
        x = torch.zeros(1, heads, len(layout), dim // heads, device=device, dtype=dtype)
        hidden = torch.zeros(1, len(layout), dim, device=device)
        with torch.no_grad():
            attention(x, x, x, layout, hidden=hidden, step=step)

    return [_since(start, reason) for start in phases for reason in refusals(partial(attend, start))]


def _misfits_of_method(settings: Mapping[str, Any]) -> list[str]:
    """An unknown name, or values of a wrong type."""
    name = settings.get("name")
    if name not in zoo.names():
        return [unknown("method", name, zoo.names())]
    hints: dict[str, Any] = {}
    for cls in reversed(zoo.get(name).__mro__[:-1]):
        hints |= get_type_hints(inspect.getattr_static(cls, "__init__"))
    found = [_misfit(f"attention.{key}", value, hints[key]) for key, value in settings.items() if key in hints]
    return [reason for reason in found if reason]


def _since(step: int, reason: str) -> str:
    return f"from step {step}: {reason}" if step else reason


def parse(override: str) -> tuple[str, Any]:
    """A text key=value, whose value is YAML, as (key, value); raises `ZooError`."""
    key, equals, text = override.partition("=")
    refuse("config", [f"an override is key=value, got {override!r}"] if not equals or not key.strip() else [])
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ZooError(f"config: the value in {override!r} is no YAML: {' '.join(str(error).split())}") from error
    assert isinstance(parsed, dict)
    return key.strip(), parsed["value"]


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """METHOD[:key=value,...], values being YAML, as (name, settings): "moc:top_k=2,anchors=[text,shot]".

    Raises `ZooError` for settings that are not key=value.
    """
    name, _, rest = text.partition(":")
    return name.strip(), dict(parse(part) for part in re.split(r",(?=\s*\w+=)", rest) if rest)


def _assign(config: Config, path: list[str], value: Any) -> str:
    """Set one value; the reason why it cannot be set, or nothing."""
    value = keyed_by_text(value)
    if path == ["attention"]:
        return _assign_attention(config, value)
    if path == ["match"]:
        if value is not None and not isinstance(value, dict):
            return f"match must be a mapping or null, got {value!r}"
        config["match"] = value or {}
        return ""
    if path == ["data"] and (isinstance(value, str) or (isinstance(value, dict) and "name" in value)):
        return _assign_data(config, {"name": value} if isinstance(value, str) else value)
    if path[0] not in config:
        return unknown("config key", ".".join(path), config)
    node = config
    for depth, key in enumerate(path[:-1]):
        inner = node.setdefault(key, {})
        if not isinstance(inner, dict):
            what = "a list, one mapping per layer" if isinstance(inner, list) else repr(inner)
            return f"{'.'.join(path)} cannot be set: {'.'.join(path[: depth + 1])} is {what}"
        node = inner
    last = path[-1]
    if isinstance(node.get(last), dict):
        if not isinstance(value, dict):
            return f"{'.'.join(path)} must be a mapping, got {value!r}"
        return "; ".join(filter(None, [_assign(node, [last, str(key)], inner) for key, inner in value.items()]))
    node[last] = value
    return ""


def keyed_by_text(value: Any) -> Any:
    """Keys as JSON has them: a step given as 20 in YAML and one given as "20" on the command line are one key."""
    if isinstance(value, Mapping):
        return {str(key): keyed_by_text(inner) for key, inner in value.items()}
    return [keyed_by_text(inner) for inner in value] if isinstance(value, list) else value


def _assign_attention(config: Config, value: Any) -> str:
    value = {"name": value} if isinstance(value, str) else value
    if not (isinstance(value, list) and value) and not (isinstance(value, dict) and "name" in value):
        return f"attention must be a method's name, a mapping with a name, or a list for the layers, got {value!r}"
    config["attention"] = value
    return ""


def _assign_data(config: Config, value: dict[str, Any]) -> str:
    presets = read_yaml(CONFIGS / "data.yaml")
    name = str(value["name"])
    if name not in presets and ":" not in name:
        return f"{unknown('data', name, presets)}; or a class of yours, as file.py:Class or package.module:Class"
    config["data"] = {**presets.get(name, {}), **value}
    return ""


def _misfits(section: str, given: Mapping[str, Any], build: Callable[..., Any], taken: Iterable[str] = ()) -> list[str]:
    """Why the class `build` cannot be made from `given`."""
    hints = get_type_hints(inspect.getattr_static(build, "__init__"))
    parameters = _parameters(build, taken)
    needed = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    return [
        reason
        for reason in [
            *(unknown(f"key of {section}", key, parameters) for key in given if key not in parameters),
            *(f"{section}.{name} is needed" for name in needed if name not in given),
            *(_misfit(f"{section}.{key}", given[key], hints.get(key, Any)) for key in given if key in parameters),
        ]
        if reason
    ]


def _parameters(build: Callable[..., Any], taken: Iterable[str] = ()) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for name, parameter in inspect.signature(build).parameters.items()
        if name not in taken and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }


def _misfit(key: str, value: Any, hint: Any) -> str:
    if fits(value, hint):
        return ""
    wanted = (
        hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", "").replace("collections.abc.", "")
    )
    return f"{key} must be {wanted}, got {value!r}"


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain YAML value can stand for a parameter of this type: an int for a float, a list for a tuple."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is types.NoneType:
        return value is None
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if hint in (int, float):
        if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
            return False  # JSON, in which configs are kept, knows no other numbers than finite ones
        return isinstance(value, int if hint is int else (int, float))
    if hint is Path:
        return isinstance(value, str)
    if origin is tuple and args and args[-1] is not Ellipsis:
        return isinstance(value, list | tuple) and len(value) == len(args) and all(map(fits, value, args))
    kind = origin or hint
    if not inspect.isclass(kind):
        return True  # a type variable or a forward name: nothing to hold a value against
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    if kind in (list, tuple) or (issubclass(kind, Iterable) and not issubclass(kind, str)):
        return isinstance(value, list | tuple) and all(fits(inner, args[0]) for inner in value if args)
    return isinstance(value, kind)
