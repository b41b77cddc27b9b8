"""From YAML and `key=value` overrides to one config: resolved, checked whole, refused with every reason at once."""

from __future__ import annotations

import inspect
import json
import logging
import math
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import cache, lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import sparse_zoo as zoo
from experiments import yaml12
from experiments.names import CONFIGS, GIVEN, MATCH, SECTIONS, Override
from experiments.store import home
from sparse_zoo.errors import ZooError, refuse, unknown
from sparse_zoo.layers import per_layer
from sparse_zoo.schedule import phases as phases_of

Config = dict[str, Any]

OmegaConf.register_resolver("zoo_home", lambda: str(home()), replace=True)


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
    return _canonical(config), reasons


def _canonical(config: Config) -> Config:
    """The config with one spelling for each value, so that what computes the same has one id.

    A number is as its setting is declared (`1` is `1.0` where a float is wanted), a tuple is a list, a path of data is
    absolute, a precision has Lightning's full name. What does not fit stays as it is, for `check` to refuse.
    """
    from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT_STR_ALIAS_CONVERSION as PRECISIONS

    from experiments import data

    made = dict(config)
    for section, build in _sections().items():
        if isinstance(config[section], Mapping):
            made[section] = _declared(config[section], _hints(build))
    if isinstance(made["trainer"], Mapping) and "precision" in made["trainer"]:
        precision = made["trainer"]["precision"]
        made["trainer"] = {**made["trainer"]} | {"precision": PRECISIONS.get(str(precision), precision)}
    if isinstance(config["data"], Mapping):
        with suppress(ZooError):  # `check` says why there is no such class
            films = data.find(str(config["data"].get("name")))
            made["data"] = data.absolute(_declared(config["data"], _hints(films)), films)
    layers = config["attention"] if isinstance(config["attention"], list) else [config["attention"]]
    layers = [_declared_method(layer) for layer in layers]
    made["attention"] = layers if isinstance(config["attention"], list) else layers[0]
    if "match" in config:
        made["match"] = {
            key: float(value) if key != "also" and fits(value, float) else value
            for key, value in config["match"].items()
        }
    return made


def _declared_method(settings: Any) -> Any:
    """A method's settings, and those of its schedule's steps, as the method declares them."""
    if not isinstance(settings, Mapping) or settings.get("name") not in zoo.names():
        return settings
    hints = _hints_of_method(settings["name"])
    made = _declared(settings, hints)
    schedule = settings.get("schedule")
    if isinstance(schedule, Mapping):
        made["schedule"] = {
            key: {step: as_declared(value, hints.get(key, Any)) for step, value in steps.items()}
            if isinstance(steps, Mapping)
            else steps
            for key, steps in schedule.items()
        }
    return made


def _declared(settings: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    return {key: as_declared(value, hints.get(key, Any)) for key, value in settings.items()}


def as_declared(value: Any, hint: Any) -> Any:
    """A value that `fits` a type, as that type has it: a float for an int where a float is meant, lists for tuples.

    Of several types the first that takes the value unchanged: for `int | float`, 1 and 1.0 are two values.
    """
    origin, args = get_origin(hint), get_args(hint)
    if not fits(value, hint):
        return value
    if hint is float:
        return float(value)
    if origin in (Union, types.UnionType):
        made = [as_declared(value, arg) for arg in args if fits(value, arg)]
        return next((one for one in made if repr(one) == repr(value)), made[0])
    if isinstance(value, list | tuple):
        each = args if origin is tuple and args[-1:] != (Ellipsis,) else args[:1] * len(value)
        return [as_declared(inner, arg) for inner, arg in zip(value, each or [Any] * len(value), strict=True)]
    if isinstance(value, Mapping) and len(args) == 2:
        return {key: as_declared(inner, args[1]) for key, inner in value.items()}
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, see `experiments.yaml12`; raises `ZooError` with the path otherwise."""
    refuse(str(path), ["no such file"] if not path.is_file() else [])
    try:
        loaded = yaml12.load(path.read_bytes())
    except yaml.YAMLError as error:
        raise ZooError(f"{path} is no YAML: {error}") from error
    loaded = {} if loaded is None else loaded
    refuse(str(path), ["must hold a mapping"] if not isinstance(loaded, dict) else [])
    assert isinstance(loaded, dict)
    return loaded


def _sections() -> dict[str, Callable[..., Any]]:
    """The class that each section of a config is made into."""
    places = {section: place.split(":") for section, place in SECTIONS.items()}
    return {section: getattr(import_module(module), name) for section, (module, name) in places.items()}


def check(config: Config) -> list[str]:
    """Every reason why this config cannot run; none when it can."""
    from experiments import data
    from experiments.match import Budget
    from lit_modules import Optim, RectifiedFlow, SampleFilms, VideoDiT

    model, films = config["model"], {key: value for key, value in config["data"].items() if key != "name"}
    # What has the right names and types may still be out of range: the parts themselves know.
    parts: dict[str, Callable[[], object]] = {
        "flow": lambda: RectifiedFlow(**config["flow"]),
        "optim": lambda: Optim(**config["optim"]),
        "sampling": lambda: SampleFilms(".", **config["sampling"]),
    }
    try:
        reasons = _misfits("data", films, data.find(str(config["data"].get("name"))))
    except ZooError as error:
        reasons = [str(error)]
    reasons = reasons or refusals(lambda: data.build(config["data"]))
    for section, build in _sections().items():
        wrong = [] if section == "model" else _misfits(section, config[section], build, GIVEN.get(section, ()))
        reasons += wrong or refusals(parts.get(section, lambda: None))
        if section == "trainer":
            reasons += _trainer({key: value for key, value in config[section].items() if _declares(build, key, value)})
    if not fits(config["seed"], int) or config["seed"] < 0:
        reasons.append(f"seed must be a whole number of at least 0, got {config['seed']!r}")
    if "match" in config:
        reasons += refusals(lambda: Budget.of(config["match"]))
    wrong = _misfits("model", model, VideoDiT, GIVEN["model"])
    if not wrong and (model["heads"] < 1 or model["dim"] % model["heads"]):
        wrong = [f"model.heads {model['heads']} must divide model.dim {model['dim']}"]
    # Where the model's shape is wrong, the attention is still judged, in one that is right.
    attention = _attention(config, *((64, 1) if wrong else (model["dim"], model["heads"])))
    if not wrong and not attention:
        shape: dict[str, Any] = {"channels": 3, "patch": (1, 1, 1), "vocabulary": 1, "attention": {"name": "dense"}}
        wrong = refusals(lambda: VideoDiT(**{**model, "depth": min(model["depth"], 1)}, **shape))
    return reasons + wrong + attention


def known(config: Config) -> set[str]:
    """The dotted keys, at most two deep, that the parts of a config know; they need not be set."""
    from experiments import data

    inside = {section: [*_parameters(build, GIVEN.get(section, ()))] for section, build in _sections().items()}
    inside |= {"match": [key for key in MATCH if key != "set"], "attention": ["name", "schedule"], "data": ["name"]}
    if isinstance(config["attention"], dict) and (method := config["attention"].get("name")) in zoo.names():
        inside["attention"] += zoo.settings(method)
    with suppress(ZooError):
        inside["data"] += _parameters(data.find(str(config["data"].get("name"))))
    return {"seed", *inside, *(f"{section}.{key}" for section, keys in inside.items() for key in keys)}


# What Lightning takes and then divides by, leaves out, or trains nothing with; it refuses negative ones itself.
AT_LEAST = {"accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "gradient_clip_val": 0, "log_every_n_steps": 0}
ABOVE_ZERO = ("max_steps", "max_epochs", "limit_train_batches", "val_check_interval")


def _trainer(given: Mapping[str, Any]) -> list[str]:
    """Every reason against the settings of Lightning's trainer.

    Whether a device that is named is here is not asked, a cluster may have it: `cannot_start` does.
    """
    from lightning.pytorch.accelerators import AcceleratorRegistry
    from lightning.pytorch.strategies import StrategyRegistry

    accelerators = ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
    strategies = ["auto", *StrategyRegistry.available_strategies()]
    bad = {
        key: unknown(f"trainer.{key}", given[key], names)
        for key, names in (("accelerator", accelerators), ("strategy", strategies))
        if key in given and given[key] not in names
    } | _out_of_range(given)
    accelerator = given.get("accelerator", "auto")
    here = accelerator == "auto" or _available(accelerator)
    away = {"accelerator", "devices", "num_nodes", *(() if here else ("precision", "strategy")), *bad}
    where = {"accelerator": accelerator if here else "cpu", "devices": 1}
    own = {key: value for key, value in given.items() if key not in away}
    reasons = [*bad.values()]
    while reason := _refused_trainer(own | where):
        reasons.append(reason)
        # Without the setting that is at fault Lightning gives another reason, or none.
        culprit = next((key for key in own if _refused_trainer(_without(own, key) | where) != reason), None)
        if culprit is None:
            break
        own = _without(own, culprit)
    return reasons + _several(given)


def cannot_start(trainer: Mapping[str, Any]) -> list[str]:
    """Why Lightning cannot make this trainer on this very machine, with the device that is asked for."""
    reason = _refused_trainer({"devices": 1, **trainer})
    return [reason] if reason else []


def _without(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {other: value for other, value in settings.items() if other != key}


def _out_of_range(given: Mapping[str, Any]) -> dict[str, str]:
    """Which settings are too small, by key the reason."""
    low = {
        key: f"trainer.{key} must be at least {least}, got {given[key]!r}"
        for key, least in AT_LEAST.items()
        if isinstance(given.get(key), int | float) and given[key] < least
    }
    return low | {
        key: f"trainer.{key} must be above 0, got {given[key]!r}"
        for key in ABOVE_ZERO
        if isinstance(given.get(key), int | float) and given[key] == 0
    }


def _available(accelerator: str) -> bool:
    """Whether Lightning finds such a device on this machine."""
    from lightning.pytorch.accelerators import AcceleratorRegistry

    known = AcceleratorRegistry.available_accelerators()
    names = {name for name in known if AcceleratorRegistry[name]["accelerator"].is_available()}
    return accelerator in names or (accelerator == "gpu" and bool({"cuda", "mps"} & names))


def _refused_trainer(settings: Mapping[str, Any]) -> str:
    """What Lightning refuses a trainer with, in one line; nothing where it makes one."""
    return _refusal(json.dumps(settings, sort_keys=True))


@lru_cache(maxsize=256)
def _refusal(settings: str) -> str:
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Trainer

    whole_process = {"deterministic", "benchmark"}  # a trainer sets these for whatever runs here
    own = {key: value for key, value in json.loads(settings).items() if key not in whole_process}
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it tells of GPUs
    try:
        with warnings.catch_warnings(action="ignore"):
            Trainer(**own, **quiet, plugins=[LightningEnvironment()])
    except (MisconfigurationException, ImportError, RuntimeError, ValueError, TypeError) as error:
        return f"trainer: {' '.join(str(error).split())}"
    finally:
        logging.disable(disabled)
    return ""


def _several(trainer: Mapping[str, Any]) -> list[str]:
    """Why a run may not have more than one process; Lightning would start this very command again in each."""
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    listed = isinstance(devices, list) and len(devices) == 1
    return [
        f"trainer.{key} must be {allowed}, got {given!r}: a run has one process and one device; for many runs at once "
        "there is zoo sweep FILE --jobs"
        for key, given, allowed, fine in (
            ("devices", devices, "1, or a list of one", devices in (1, "1") or listed),
            ("num_nodes", nodes, "1", nodes == 1),
        )
        if not fine
    ] + (
        [f"trainer.devices must be 1 where trainer.accelerator is 'cpu', got {devices!r}"]
        if listed and trainer.get("accelerator") == "cpu"
        else []
    )


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
    from lit_modules.precision import default_precision

    precision = str(trainer.get("precision") or default_precision(trainer.get("accelerator", "auto")))
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
    hints = _hints_of_method(name)
    found = [_misfit(f"attention.{key}", value, hints[key]) for key, value in settings.items() if key in hints]
    return [reason for reason in found if reason]


def _hints_of_method(name: str) -> dict[str, Any]:
    """The declared types of a method's settings, those of its bases too."""
    hints: dict[str, Any] = {}
    for cls in reversed(zoo.get(name).__mro__[:-1]):
        hints |= _hints(cls)
    return hints


@cache
def _hints(build: Callable[..., Any]) -> dict[str, Any]:
    """The declared types of what a class is made from."""
    hints = get_type_hints(inspect.getattr_static(build, "__init__"))
    # Lightning's limits and intervals count where they are ints and are shares where they are floats; this is a length.
    return hints | ({"gradient_clip_val": float | None} if "gradient_clip_val" in hints else {})


def _since(step: int, reason: str) -> str:
    return f"from step {step}: {reason}" if step else reason


def parse(override: str) -> tuple[str, Any]:
    """A text key=value, whose value `yaml12.load_value` reads, as (key, value); raises `ZooError`."""
    key, equals, text = override.partition("=")
    refuse("config", [f"an override is key=value, got {override!r}"] if not equals or not key.strip() else [])
    try:
        return key.strip(), yaml12.load_value(text)
    except yaml.YAMLError as error:
        raise ZooError(f"config: the value in {override!r} is no YAML: {error}") from error


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
    hints = _hints(build)
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


def _declares(build: Callable[..., Any], key: str, value: Any) -> bool:
    """Whether a class takes such a value under this key."""
    return key in _parameters(build) and fits(value, _hints(build).get(key, Any))


def _parameters(build: Callable[..., Any], taken: Iterable[str] = ()) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for name, parameter in inspect.signature(build).parameters.items()
        if name not in taken and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }


def _misfit(key: str, value: Any, hint: Any) -> str:
    if fits(value, hint):
        return ""
    if choices := _choices(hint):
        return f"{key} must be one of {', '.join(dict.fromkeys(map(str, choices)))}, got {value!r}"
    wanted = hint.__name__ if inspect.isclass(hint) else re.sub(r"typing\.|collections\.abc\.", "", str(hint))
    wanted = re.sub(r"\bbool\b", "true or false", wanted)
    return f"{key} must be {wanted}, got {value!r}"


def _choices(hint: Any) -> list[Any]:
    """The values of a type that is made of `Literal`s, and of None, alone; none of any other type."""
    if get_origin(hint) is Literal:
        return [*get_args(hint)]
    if hint is types.NoneType:
        return ["null"]
    each = [_choices(arg) for arg in get_args(hint)] if get_origin(hint) in (Union, types.UnionType) else [[]]
    return [choice for own in each for choice in own] if all(each) else []


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
        if hint is float and isinstance(value, int) and abs(value) > sys.float_info.max:
            return False
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
