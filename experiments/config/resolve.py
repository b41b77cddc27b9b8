"""From YAML and `key=value` overrides to one config: resolved, checked whole, refused with every reason at once."""

from __future__ import annotations

import json
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

import sparse_zoo as zoo
from experiments.analysis.metrics import TOLERANCE
from experiments.config import datamodule
from experiments.config.budget import Budget
from experiments.config.declared import as_declared, declared_types, fits, misfit, misfits, parameters
from experiments.config.init_from import absolute_start, find_start, unfit_start
from experiments.config.names import CONFIGS, Override, is_pretrained, parse
from experiments.config.names import methods as shipped_methods
from experiments.config.sections import PRECISIONS, Match, refused_settings, sections_of
from experiments.config.yaml12 import read_yaml
from experiments.redact import hide
from experiments.tracking.identity import identity
from experiments.tracking.store import Cell, config_id, home
from lit_modules.precision import default_precision
from lit_modules.settings import Outline
from sparse_zoo.errors import ZooError, refuse, unknown
from sparse_zoo.layers import per_layer
from sparse_zoo.schedule import phases as phases_of

Config = dict[str, Any]


def _environment(name: str, *default: Any) -> Any:
    """What `${oc.env:name,default}` gives; a value of the environment is shown as the expression from then on."""
    if name in os.environ:
        hide(os.environ[name], f"${{oc.env:{name}}}")
    return oc.env(name, *default)


OmegaConf.register_resolver("zoo_home", lambda: str(home()), replace=True)
OmegaConf.register_resolver("oc.env", _environment, replace=True)


def load(overrides: Sequence[Override] = ()) -> Config:
    """`configs/base.yaml` under the mappings, in order, under the texts; interpolations resolved, everything checked.

    An override is "dotted.key=value" (the value is YAML) or a mapping, whose keys may be dotted too. `attention=moc`
    replaces the node by {"name": "moc"}, and a list gives each layer its own (`layers.per_layer` has its short forms);
    `model=DIR` replaces the node by a pretrained model in a folder, whose flow has the shift of its scheduler;
    `data=shot_world` replaces the node by that preset of `configs/data.yaml`, `data=file.py:Class` by a datamodule of
    one's own. Mappings are merged, but `attention` and `match` are always replaced as a whole. Raises `ZooError`.
    """
    config, reasons = merge(overrides)
    refuse("config", reasons + check(config))
    return config


def merge(overrides: Sequence[Override]) -> tuple[Config, list[str]]:
    """The resolved config, not checked yet, and why some overrides could not be laid over it; as in `load`."""
    config: Config = deepcopy(_shipped("base.yaml"))
    for key in ("attention", "data"):
        _assign(config, [key], config.pop(key))
    groups = [list(override.items()) for override in overrides if isinstance(override, Mapping)]
    groups.append([parse(override) for override in overrides if isinstance(override, str)])
    reasons: list[str] = []
    for group in groups:
        # A name replaces its node, so it goes before the settings inside, wherever it was written.
        for key, value in sorted(group, key=lambda pair: str(pair[0]).count(".")):
            reasons += filter(None, [_assign(config, str(key).split("."), deepcopy(value))])
    config = _storable(config, resolve(config))
    if is_pretrained(config["model"]):
        reasons += refusals(lambda: _settle_pretrained(config))
    if isinstance(config["attention"], list):
        config["attention"], misfits = per_layer(config["attention"], _depth(config["model"]))
        reasons += misfits
    if not config["match"]:
        del config["match"]  # so that a run has one id, whether or not a sweep around it matches budgets
    if config["init_from"] is None:
        del config["init_from"]
    else:
        config["init_from"] = absolute_start(config["init_from"])
    if all(value == 1 for value in (config["parallel"] or {}).values()):
        del config["parallel"]  # one device, as where nothing is said
    return _canonical(config), reasons


def _canonical(config: Config) -> Config:
    """The config with one spelling for each value, so that what computes the same has one id.

    A number is as its setting is declared (`1` is `1.0` where a float is wanted), a tuple is a list, a path of data is
    absolute, a precision has Lightning's full name. What does not fit stays as it is, for `check` to refuse.
    """
    made = dict(config)
    for section, build in _sections(config["model"]).items():
        if isinstance(config.get(section), Mapping):
            made[section] = _declared(config[section], declared_types(build))
    if isinstance(made["trainer"], Mapping) and "precision" in made["trainer"]:
        precision = made["trainer"]["precision"]
        made["trainer"] = {**made["trainer"]} | {"precision": PRECISIONS.get(str(precision), precision)}
    if isinstance(config["data"], Mapping):
        with suppress(ZooError):  # `check` says why there is no such class
            films = datamodule.find(str(config["data"].get("name")))
            made["data"] = datamodule.absolute(
                _declared(config["data"], declared_types(datamodule.declares(films))), films
            )
    layers = config["attention"] if isinstance(config["attention"], list) else [config["attention"]]
    layers = [_declared_method(layer) for layer in layers]
    made["attention"] = layers if isinstance(config["attention"], list) else layers[0]
    if "match" in config:
        made["match"] = {
            key: float(value) if key != "also" and fits(value, float) else value
            for key, value in config["match"].items()
        }
    return made


def _settle_pretrained(config: Config) -> None:
    """Make a pretrained model's folder absolute, and write down what its files decide: the shift of its flow."""
    from lit_modules.pretrained import flow_shift

    folder = datamodule.absolute_path(config["model"]["folder"])
    config["model"] = {**config["model"], "folder": folder}
    if isinstance(folder, str) and isinstance(config["flow"], Mapping):
        config["flow"] = {"drop_text": 0.0, "shift": flow_shift(Path(folder)), **config["flow"]}


def _depth(model: Mapping[str, Any]) -> Any:
    """The layers of a model; None where it does not say how many."""
    if not is_pretrained(model):
        return model.get("depth")
    with suppress(ZooError):  # `check` says why there is no such model
        return attention_shape(model).depth
    return None


def attention_shape(model: Mapping[str, Any]) -> Outline:
    """The self-attentions of a config's model: how many, their heads and their width.

    Raises:
        ZooError: if a pretrained model's folder has no model of a known family.
    """
    if is_pretrained(model):
        from lit_modules.pretrained import outline

        return outline(str(model["folder"]))
    return Outline(model["depth"], model["heads"], model["dim"] // model["heads"], model["dim"])


def _is_method(name: Any) -> bool:
    """Whether a method has that name. Not by `zoo.names`, which looks through all that is installed: 20 ms."""
    return isinstance(name, str) and not refusals(lambda: zoo.get(name))


def cell(name: str, config: Config, group: str | None = None) -> Cell:
    """Return the cell of a config.

    Its id is that of all settings, so that a default that is written out changes nothing. A text from the environment
    is part of the id in `attention`, where it may decide what is computed, and not in `data`, where it is a place. Of
    `init_from` the id of that run counts, not its place. Raises `ZooError` where there is no such run.
    """
    computed = config
    if "init_from" in config:
        computed = computed | {"init_from": find_start(config["init_from"]).id}
    if any("${" in text for text in _texts(config["attention"])):
        computed = computed | {"attention": resolve(config)["attention"]}
    return Cell(name, config, group, config_id(identity(_complete(computed))))


# What Lightning makes of None.
NONE_MEANS = {
    "limit_train_batches": 1.0,
    "limit_val_batches": 1.0,
    "limit_test_batches": 1.0,
    "limit_predict_batches": 1.0,
    "val_check_interval": 1.0,
    "num_sanity_val_steps": 2,
    "gradient_clip_algorithm": "norm",
    "deterministic": False,
}


def _complete(config: Config) -> Config:
    """The config with every default of its classes written out, and a method for each layer."""
    made = dict(config)
    for section, build in _sections(config["model"]).items():
        if section in config:
            made[section] = _defaults(build) | config[section]
    made["trainer"] |= {key: value for key, value in NONE_MEANS.items() if made["trainer"].get(key) is None}
    if is_default_precision(made["trainer"]):
        made["trainer"]["precision"] = None
    films = datamodule.find(str(config["data"]["name"]))
    made["data"] = datamodule.absolute(_defaults(datamodule.declares(films)) | config["data"], films)
    layers = config["attention"] if isinstance(config["attention"], list) else [config["attention"]]
    layers = [_default_settings(layer["name"]) | layer for layer in layers]
    made["attention"] = (
        layers * attention_shape(config["model"]).depth if isinstance(config["attention"], dict) else layers
    )
    if "match" in config:
        made["match"] = {"within": TOLERANCE, "also": {}} | config["match"]
    return made


def is_default_precision(trainer: Mapping[str, Any]) -> bool:
    """Return whether the trainer's precision is written out and is the default of its accelerator on this machine.

    A GPU that is asked for and is not here is another machine's, whose default is not known.
    """
    accelerator = trainer.get("accelerator", "auto")
    elsewhere = accelerator in ("gpu", "cuda") and not torch.cuda.is_available()
    return not elsewhere and trainer.get("precision") == default_precision(accelerator)


def _defaults(build: Callable[..., Any]) -> dict[str, Any]:
    """The defaults that JSON knows, by name."""
    found, hints = {}, declared_types(build)
    for name, parameter in parameters(build).items():
        with suppress(TypeError, ValueError):
            json.dumps(parameter.default, allow_nan=False)
            found[name] = as_declared(parameter.default, hints.get(name, Any))
    return found


def _default_settings(name: str) -> dict[str, Any]:
    hints = _hints_of_method(name)
    settings = zoo.settings(name).items()
    return {key: as_declared(own.default, hints.get(key, Any)) for key, own in settings if not own.required}


def _declared_method(settings: Any) -> Any:
    """A method's settings, and those of its schedule's steps, as the method declares them."""
    if not isinstance(settings, Mapping) or not _is_method(settings.get("name")):
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


def resolve(config: Config) -> Config:
    """The config with every interpolation replaced by its value: what is computed with, and never written.

    OmegaConf is given only the sections that hold an interpolation, and those that one may mean: making its nodes is
    most of the time that a sweep of thousands of cells takes to read.
    """
    expressions = [text for text in _texts(config) if "${" in text]
    involved = {
        key: section
        for key, section in config.items()
        if any(key in text for text in expressions) or any("${" in text for text in _texts(section))
    }
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(involved), resolve=True)
    except OmegaConfBaseException as error:
        raise ZooError(f"config: {error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(resolved, dict)
    return {key: resolved.get(key, section) for key, section in config.items()}


def _texts(part: Any) -> Iterator[str]:
    """Every text inside a part of a config."""
    inner = part.values() if isinstance(part, Mapping) else part if isinstance(part, list) else ()
    if isinstance(part, str):
        yield part
    for value in inner:
        yield from _texts(value)


def _storable(config: Config, resolved: Config) -> Config:
    """The resolved config, with the expression in place of each free text that comes from the environment.

    Such a text may be a secret, or a place on this machine, so it is never written. Free texts are those of `data` and
    of methods of one's own: every other text is one of a few choices, and stays, as do numbers (`oc.decode`) and the
    names of methods and data.
    """
    secrets: set[str] = set()

    def collect(raw: Any, value: Any) -> None:
        if isinstance(raw, str) and "oc.env:" in raw and isinstance(value, str) and value:
            secrets.add(value)
        for key, inner in _items(raw):
            collect(inner, _at(value, key))

    def keep(raw: Any, value: Any) -> Any:
        if isinstance(raw, Mapping) and isinstance(value, Mapping):
            return {key: inner if key == "name" else keep(raw.get(key), inner) for key, inner in value.items()}
        if isinstance(raw, list) and isinstance(value, list):
            return [keep(*pair) for pair in zip(raw, value, strict=True)]
        secret = isinstance(value, str | list | Mapping) and any(one in str(value) for one in secrets)
        return raw if isinstance(raw, str) and "${" in raw and secret else value

    def keep_methods(raw: Any, value: Any) -> Any:
        if isinstance(raw, list) and isinstance(value, list):
            return [keep_methods(*pair) for pair in zip(raw, value, strict=True)]
        if not isinstance(raw, Mapping) or not isinstance(value, Mapping):
            return value
        if "cycle" in value:
            return {**value, "cycle": keep_methods(raw.get("cycle"), value["cycle"])}
        return value if value.get("name") in shipped_methods() else keep(raw, value)

    collect(config, resolved)
    if not secrets:
        return resolved
    attention = keep_methods(config["attention"], resolved["attention"])
    return resolved | {"data": keep(config["data"], resolved["data"]), "attention": attention}


def _items(part: Any) -> Iterable[tuple[Any, Any]]:
    return part.items() if isinstance(part, Mapping) else enumerate(part) if isinstance(part, list) else ()


def _at(part: Any, key: Any) -> Any:
    return part[key] if isinstance(part, Mapping | list) else None


def _sections(model: Any) -> dict[str, type]:
    """The dataclass of each section of a config with this model."""
    return sections_of(pretrained=is_pretrained(model))


@cache
def _shipped(name: str) -> dict[str, Any]:
    """A file of `configs`, read once for all cells of a sweep; callers copy what they change."""
    return read_yaml(CONFIGS / name)


def check(config: Config) -> list[str]:
    """Every reason why this config cannot run; none when it can."""
    config = resolve(config)
    from lit_modules import VideoDiT
    from lit_modules.settings import Pretrained

    model, films = config["model"], {key: value for key, value in config["data"].items() if key != "name"}
    # What has the right names and types may still be out of range: the parts themselves know.
    parts: dict[str, Callable[[], object]] = {
        section: partial(_sections(model)[section], **config.get(section, {}))
        for section in ("flow", "optim", "sampling", "parallel")
    }
    try:
        reasons = misfits("data", films, datamodule.declares(datamodule.find(str(config["data"].get("name")))))
    except ZooError as error:
        reasons = [str(error)]
    reasons = reasons or refusals(
        lambda: datamodule.build(config["data"], pretrained=is_pretrained(model)), f"data {config['data']['name']!r}"
    )
    for section, build in _sections(model).items():
        wrong = [] if section == "model" else misfits(section, config.get(section, {}), build)
        reasons += wrong or refusals(parts.get(section, lambda: None))
        if section == "trainer":
            reasons += _trainer({key: value for key, value in config[section].items() if _takes(build, key, value)})
    if not fits(config["seed"], int) or not 0 <= config["seed"] < 2**32:
        reasons.append(f"seed must be a whole number from 0 to 2³² - 1, got {config['seed']!r}")
    if "match" in config:
        reasons += refusals(lambda: Budget.of(config["match"]))
    reasons += unfit_start(config)
    if is_pretrained(model):
        reasons += misfits("model", model, Pretrained) or _pretrained(config)
        return reasons or _parallel(config)
    wrong = misfits("model", model, _sections(model)["model"])
    if not wrong and (model["heads"] < 1 or model["dim"] % model["heads"]):
        wrong = [f"model.heads {model['heads']} must divide model.dim {model['dim']}"]
    # Where the model's shape is wrong, the attention is still judged, in one that is right.
    attention = _attention(config, Outline(1, 1, 64, 64) if wrong else attention_shape(model))
    if not wrong and not attention:
        shape: dict[str, Any] = {"channels": 3, "patch": (1, 1, 1), "vocabulary": 1, "attention": {"name": "dense"}}
        wrong = refusals(lambda: VideoDiT(**{**model, "depth": min(model["depth"], 1)}, **shape))
    several = [] if reasons + wrong + attention else _parallel(config)
    return reasons + wrong + attention + several


def _parallel(config: Config) -> list[str]:
    """Every reason why a run cannot have the devices that it asks for; `cannot_start` counts those of this machine."""
    from lit_modules.settings import Parallel
    from sparse_zoo.parallel import why_not

    if "parallel" not in config:
        return []
    parallel, trainer, model = Parallel(**config["parallel"]), config["trainer"], config["model"]
    if is_pretrained(model) and parallel.sequence > 1:
        return [
            f"parallel.sequence must be 1 for a pretrained model, got {parallel.sequence}: its layers outside of "
            "attention work on whole films. Use parallel.data"
        ]
    accelerator = trainer.get("accelerator", "auto")
    reasons = [
        f"parallel needs trainer.accelerator cpu, gpu, cuda or auto, got {accelerator!r}: no backend exchanges there"
        if accelerator not in ("auto", "cpu", "gpu", "cuda")
        else "",
        f"parallel chooses the strategy; leave out trainer.strategy, got {trainer['strategy']!r}"
        if trainer.get("strategy", "auto") != "auto"
        else "",
    ]
    if parallel.sequence > 1:
        precision = str(trainer.get("precision") or "")
        heads, layers = model["heads"], config["attention"]
        layers = layers if isinstance(layers, list) else [layers]
        for settings in [layer for i, layer in enumerate(layers) if layer not in layers[:i]]:
            built = zoo.build(**settings, heads=heads, head_dim=model["dim"] // heads, dim=model["dim"])
            reasons += why_not(built, heads, parallel.sequence)
        reasons += [
            "optim.optimizer muon needs whole matrices, which parallel.sequence above 1 shards; use adamw"
            if config["optim"].get("optimizer") == "muon"
            else "",
            f"trainer.precision {precision} scales losses, which shards do not take; use bf16-mixed or 32-true"
            if precision.startswith("16")
            else "",
            "sampling.context reads the first block's input outside of a pass, where weights are shards; leave it out"
            if config["sampling"].get("context") is not None
            else "",
        ]
    return [f"parallel: {reason}" for reason in dict.fromkeys(reasons) if reason]


def _pretrained(config: Config) -> list[str]:
    """Every reason against a pretrained model's settings, its folder, and what cannot apply to one."""
    from lit_modules.pretrained import inapplicable
    from lit_modules.settings import Pretrained

    reasons = refusals(lambda: Pretrained(**config["model"]))
    reasons += filter(None, inapplicable(config["flow"], config["optim"], config["sampling"]))
    try:
        shape = attention_shape(config["model"])
    except ZooError as error:
        return [*reasons, str(error)]
    return [*reasons, *_attention(config, shape)]


def known(config: Config) -> set[str]:
    """The dotted keys, at most two deep, that the parts of a config know; they need not be set."""
    inside = {section: [*parameters(build)] for section, build in _sections(config["model"]).items()}
    inside |= {
        "match": [key for key in parameters(Match) if key != "set"],
        "attention": ["name", "schedule"],
        "data": ["name"],
    }
    if isinstance(config["attention"], dict) and (method := config["attention"].get("name")) in zoo.names():
        inside["attention"] += zoo.settings(method)
    with suppress(ZooError):
        inside["data"] += parameters(datamodule.declares(datamodule.find(str(config["data"].get("name")))))
    return {"seed", "init_from", *inside, *(f"{section}.{key}" for section, keys in inside.items() for key in keys)}


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
    } | refused_settings(given)
    accelerator = given.get("accelerator", "auto")
    here = accelerator == "auto" or _available(accelerator)
    away = {"accelerator", "devices", "num_nodes", *(() if here else ("precision", "strategy")), *bad}
    where = {"accelerator": accelerator if here else "cpu", "devices": 1}
    own = {key: value for key, value in given.items() if key not in away}
    reasons = [*bad.values()]
    while reason := _refused_trainer(own | where):
        # Without the setting that is at fault Lightning gives another reason, or none.
        culprit = next((key for key in own if _refused_trainer(_without(own, key) | where) != reason), None)
        if culprit is None:
            reasons.append(reason)
            break
        given_too = "" if str(own[culprit]) in reason else f"; got {culprit}={own[culprit]!r}"
        reasons.append(reason.rstrip(".") + given_too)
        own = _without(own, culprit)
    return reasons


def cannot_start(config: Mapping[str, Any]) -> list[str]:
    """Why a run cannot start on this very machine, with the devices that its config asks for."""
    import torch

    from lit_modules.settings import Parallel

    trainer, wanted = config["trainer"], Parallel(**config.get("parallel", {})).devices
    reason, there = _refused_trainer({"devices": 1, **trainer}), torch.cuda.device_count()
    few = wanted > there > 0 and trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    return ([reason] if reason else []) + (
        [f"parallel asks for {wanted} devices, this machine has {there}; lower parallel.data or parallel.sequence"]
        if few
        else []
    )


def _without(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {other: value for other, value in settings.items() if other != key}


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


def refusals(build: Callable[[], object], whose: str = "") -> list[str]:
    """What `build` is refused with; nothing where it succeeds.

    `whose` names the class of an author that it makes or calls: what that raises is a reason too, with its place.
    """
    try:
        build()
    except ZooError as error:
        return [str(error)]
    except (Exception, SystemExit) as error:
        if not whose:
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        return [f"{whose}: {type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"]
    return []


def _attention(config: Config, shape: Outline) -> list[str]:
    """Build every layer's method and let it attend in a small film, where and as precisely as the trainer will."""
    layers = config["attention"] if isinstance(config["attention"], list) else [config["attention"]]
    distinct = [layer for i, layer in enumerate(layers) if layer not in layers[:i]]
    return [reason for layer in distinct for reason in _attends(layer, shape, config["trainer"])]


def _attends(settings: Mapping[str, Any], shape: Outline, trainer: Mapping[str, Any]) -> list[str]:
    """Why a layer's method cannot be built or attend, in every phase where its settings are scheduled."""
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
    precision = str(trainer.get("precision") or default_precision(trainer.get("accelerator", "auto")))
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32
    device = "cuda" if cuda else "cpu"
    built: list[zoo.Attention] = []
    size: dict[str, Any] = {"heads": shape.heads, "head_dim": shape.head_dim, "dim": shape.dim}
    method = f"method {settings['name']!r}"
    if wrong := refusals(lambda: built.append(zoo.build(**settings, **size).to(device)), method):
        return wrong

    def attend(step: int) -> None:
        x = torch.zeros(1, shape.heads, len(layout), shape.head_dim, device=device, dtype=dtype)
        hidden = torch.zeros(1, len(layout), shape.dim, device=device)
        with torch.no_grad():
            built[0](x, x, x, layout, hidden=hidden, step=step)

    return [_since(start, reason) for start in phases for reason in refusals(partial(attend, start), method)]


def _misfits_of_method(settings: Mapping[str, Any]) -> list[str]:
    """An unknown name, or values of a wrong type."""
    name = settings.get("name")
    if not _is_method(name):
        return [unknown("method", name, zoo.names())]
    assert isinstance(name, str)
    hints = _hints_of_method(name)
    found = [misfit(f"attention.{key}", value, hints[key]) for key, value in settings.items() if key in hints]
    return [reason for reason in found if reason]


def _hints_of_method(name: str) -> dict[str, Any]:
    """The declared types of a method's settings, those of its bases too."""
    hints: dict[str, Any] = {}
    for cls in reversed(zoo.get(name).__mro__[:-1]):
        hints |= declared_types(cls)
    return hints


def _since(step: int, reason: str) -> str:
    return f"from step {step}: {reason}" if step else reason


def _assign(config: Config, path: list[str], value: Any) -> str:
    """Set one value; the reason why it cannot be set, or nothing."""
    value = keyed_by_text(value)
    if path == ["attention"]:
        return _assign_attention(config, value)
    if path == ["model"] and is_pretrained(value):
        config["model"] = {"folder": value} if isinstance(value, str) else value
        return ""
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
    presets = _shipped("data.yaml")
    if "${" in str(value["name"]):  # of the environment: it decides which preset lies below
        value = value | resolve({"name": value["name"]})
    name = str(value["name"])
    if name not in presets and ":" not in name:
        return f"{unknown('data', name, presets)}; or a class of yours, as file.py:Class or package.module:Class"
    config["data"] = {**deepcopy(presets.get(name, {})), **value}
    return ""


def _takes(build: Callable[..., Any], key: str, value: Any) -> bool:
    """Whether a class takes such a value under this key."""
    return key in parameters(build) and fits(value, declared_types(build).get(key, Any))
