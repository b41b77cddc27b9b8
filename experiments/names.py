"""The names that a config may have, read from source text: a misspelt one is refused before torch is imported.

Importing torch and Lightning takes seconds, which nobody waits for to hear of a typing error. `experiments.config`
judges everything else: values, and names that only classes of one's own know.
"""

from __future__ import annotations

import ast
import runpy
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml  # type: ignore[import-untyped]

from experiments import yaml12

CONFIGS = Path(__file__).parent / "configs"
# The class that each section of a config is made into.
SECTIONS = {
    "model": "lit_modules.dit:VideoDiT",
    "flow": "lit_modules.flow:RectifiedFlow",
    "optim": "lit_modules.module:Optim",
    "trainer": "lightning.pytorch.trainer.trainer:Trainer",
    "sampling": "lit_modules.callbacks:SampleFilms",
}
# What the run itself hands to these classes; a config may not.
GIVEN: dict[str, set[str]] = {
    "model": {"channels", "patch", "vocabulary", "attention"},
    "trainer": {
        "logger",
        "callbacks",
        "default_root_dir",
        "enable_progress_bar",
        "enable_checkpointing",
        "enable_model_summary",
        "barebones",
        "plugins",
    },
    "sampling": {"folder", "on_image", "seed"},
}
DATA = {"shot_world": "datamodules.shot_world:ShotWorld", "video_films": "datamodules.videos:VideoFilms"}
MATCH = ("density", "flops", "seconds", "within", "also", "set")
SHAPE = {"heads", "head_dim", "dim"}  # of attention: the model's

Override = str | Mapping[str, Any]


def misspelt(overrides: Sequence[Override], *, plugins: bool) -> str | None:
    """The refusal of names that cannot be right, of overrides as `experiments.config.load` takes them; None if all may.

    With `plugins`, methods that are not known here may be theirs.
    """
    wording = _wording()
    base = yaml12.load((CONFIGS / "base.yaml").read_bytes())
    reasons: list[str] = []
    named = {"attention": base["attention"], "data": base["data"]}
    inside: dict[str, dict[str, Any]] = {section: {} for section in base}
    for key, value in _pairs(overrides, reasons):
        section, *below = key.split(".")
        if section not in base:
            reasons.append(wording.unknown("config key", key, base))
        elif below:
            inside[section][below[0]] = None
        elif section in named:
            named[section] = {"name": value} if isinstance(value, str) else value
            if section == "attention" or (isinstance(value, Mapping) and "name" in value):
                inside[section] = {}
        if section in base and not below and isinstance(value, Mapping):
            inside[section] |= value
    for section, place in SECTIONS.items():
        allowed = (settings(place) or set()) - GIVEN.get(section, set())
        reasons += [wording.unknown(f"key of {section}", x, allowed) for x in inside[section] if x not in allowed]
    reasons += [wording.unknown("key of match", x, MATCH) for x in inside["match"] if x not in MATCH]
    reasons += _data(wording, named["data"], inside["data"])
    own = plugins or any(entry_points(group="sparse_zoo.methods"))
    reasons += _attention(wording, named["attention"], inside["attention"], own)
    try:
        wording.refuse("config", dict.fromkeys(reasons))
    except ValueError as error:
        return str(error)
    return None


def _pairs(overrides: Sequence[Override], reasons: list[str]) -> list[tuple[str, Any]]:
    """Keys and values in the order in which they are laid over the base config; adds what cannot be read to reasons."""
    groups = [list(override.items()) for override in overrides if isinstance(override, Mapping)]
    texts = []
    for override in (override for override in overrides if isinstance(override, str)):
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            reasons.append(f"an override is key=value, got {override!r}")
            continue
        try:
            texts.append((key.strip(), yaml12.load_value(text)))
        except yaml.YAMLError as error:
            reasons.append(f"the value in {override!r} is no YAML: {error}")
    ordered = (sorted(group, key=lambda pair: str(pair[0]).count(".")) for group in [*groups, texts])
    return [(str(key), value) for group in ordered for key, value in group]


def _data(wording: Any, named: Any, inside: Mapping[str, Any]) -> list[str]:
    name = str(named.get("name")) if isinstance(named, Mapping) else ""
    presets = yaml12.load((CONFIGS / "data.yaml").read_bytes())
    if name in DATA:
        allowed = {"name"} | (settings(DATA[name]) or set())
        return [wording.unknown("key of data", key, allowed - {"name"}) for key in inside if key not in allowed]
    if ":" in name:
        return []
    return [f"{wording.unknown('data', name, presets)}; or a class of yours, as file.py:Class or package.module:Class"]


def _attention(wording: Any, named: Any, inside: Mapping[str, Any], own: bool) -> list[str]:
    known = methods()
    entries = named if isinstance(named, list) else [named]
    entries = [inner for x in entries for inner in (x["cycle"] if isinstance(x, Mapping) and "cycle" in x else [x])]
    reasons = []
    for entry in entries:
        keys = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
        keys |= {} if isinstance(named, list) else inside
        name = keys.get("name") or (named.get("name") if isinstance(named, Mapping) else None)
        if not isinstance(name, str) or "${" in name:
            continue  # `experiments.config` says what an entry must be, and what an expression stands for
        if name not in known:
            reasons += [] if own else [wording.unknown("method", name, known)]
            continue
        allowed = settings(known[name])
        if allowed is not None and "schedule" not in keys:  # a schedule may bring other methods
            allowed = (allowed - SHAPE) | {"schedule"}
            strange = [key for key in keys if key not in allowed | {"name", "layers"}]
            reasons += [f"{name}: {wording.unknown('setting', key, allowed)}" for key in strange]
    return reasons


@cache
def methods() -> dict[str, str]:
    """The methods of `sparse_zoo`, by name the place of the class."""
    return {
        str(ast.literal_eval(decorator.args[0])): f"sparse_zoo.methods.{file.stem}:{node.name}"
        for file in sorted(_file("sparse_zoo.methods").parent.glob("*.py"))
        for node in _classes(f"sparse_zoo.methods.{file.stem}").values()
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "register"
    }


@cache
def settings(place: str) -> set[str] | None:
    """What a class, "package.module:Class", is made from, by name; None where its text alone does not say."""
    module, _, name = place.partition(":")
    node = _classes(module).get(name)
    if node is None:
        source = _imports(module).get(name)
        return settings(f"{source}:{name}") if source else None
    made = [x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "__init__"]
    found: set[str] = set()
    if made:
        arguments = made[0].args
        found = {x.arg for x in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)} - {"self"}
        if arguments.kwarg is None:
            return found
    elif any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return {x.target.id for x in node.body if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)}
    bases = [settings(f"{module}:{base.id}") if isinstance(base, ast.Name) else None for base in node.bases]
    return None if None in bases else found.union(*(base for base in bases if base))


def _wording() -> Any:
    """`sparse_zoo.errors` by its file: importing its package would import torch."""
    return SimpleNamespace(**runpy.run_path(str(_file("sparse_zoo.errors"))))


@cache
def _file(module: str) -> Path:
    """The source of a module, which is not imported, nor are the packages around it."""
    top, *inner = module.split(".")
    spec = find_spec(top)
    assert spec is not None, module
    place = Path(*(spec.submodule_search_locations or []), *inner)
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_file(module).read_bytes())


def _classes(module: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _tree(module).body if isinstance(node, ast.ClassDef)}


def _imports(module: str) -> dict[str, str]:
    """By name the module that it is imported from."""
    lines: Iterable[ast.ImportFrom] = (node for node in _tree(module).body if isinstance(node, ast.ImportFrom))
    return {alias.name: str(node.module) for node in lines for alias in node.names}
