"""Refuse unknown names and values of a wrong type before torch is imported, which takes seconds.

Sections and our datamodules are declared by the dataclasses of `sections`. Methods and kernels are classes that need
torch, so their names and settings are read from their source text. `experiments.config.resolve` judges everything
else: ranges of values, and names that only the user's own classes know.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from experiments.config import yaml12
from experiments.config.declared import misfits
from experiments.config.sections import DATA, Match, refused_settings, sections_of
from sparse_zoo.errors import ZooError, refuse, unknown, unknown_setting

CONFIGS = Path(__file__).parents[1] / "configs"
# Options that take one of a few names.
CHOICES = {
    "executor": ("local", "slurm", "ray"),
    "suite": ("quick", "cpu", "shots", "gpu"),
    "dtype": ("float32", "bfloat16", "float16"),
    "paper": ("moc", "moga"),
    "order": ("film", "shots"),
    "text_mode": ("joint", "cross"),
}
SHAPE = {"heads", "head_dim", "dim"}  # of attention: the model's

Override = str | Mapping[str, Any]


def is_pretrained(model: Any) -> bool:
    """Whether a `model`, a section or what is given for it, is a pretrained one: a folder, or a mapping with one."""
    return isinstance(model, str) or (isinstance(model, Mapping) and "folder" in model)


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


def parse_methods(texts: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Methods as --methods has them, "moc:top_k=2,causal=null,sta": `parse_method` of each.

    A comma before key= or inside brackets belongs to a method's settings, any other separates two methods.
    """
    found: list[str] = []
    for text in texts:
        whole = ""
        for piece in text.split(","):
            inside = any(whole.count(a) > whole.count(b) for a, b in ("[]", "{}"))
            if whole and (inside or re.match(r"\s*\w+\s*=", piece)):
                whole += f",{piece}"
            else:
                found += [whole] if whole else []
                whole = piece
        found.append(whole)
    return [parse_method(text) for text in found]


def misspelt(overrides: Sequence[Override], *, plugins: bool) -> list[str]:
    """Return why overrides cannot be right: unknown names, and values of a wrong type.

    Args:
        overrides: Overrides as `experiments.config.resolve.load` takes them.
        plugins: Whether plug-ins may bring methods that are not known here.

    Returns:
        The reasons, each once; none where all names and types are right.
    """
    base = _yaml("base.yaml")
    reasons: list[str] = []
    pretrained = False
    named = {"attention": base["attention"], "data": base["data"]}
    inside: dict[str, dict[str, Any]] = {section: {} for section in base}
    for key, value in _pairs(overrides, reasons):
        section, *below = key.split(".")
        if section not in base:
            reasons.append(unknown("config key", key, base))
        elif below:
            for part in reversed(below[1:]):
                value = {part: value}
            inside[section][below[0]] = value
        elif section in named:
            merged = section == "data" and isinstance(value, Mapping) and "name" not in value
            named[section] = {"name": value} if isinstance(value, str) else named[section] if merged else value
            if section == "attention" or (isinstance(value, Mapping) and "name" in value):
                inside[section] = {}
        elif section == "model" and is_pretrained(value):
            pretrained, inside[section] = True, {}
        if section in base and not below and isinstance(value, Mapping):
            inside[section] |= value
    for section, declared in {**sections_of(pretrained=pretrained), "match": Match}.items():
        reasons += misfits(section, inside[section], declared, partial=True)
    reasons += refused_settings(inside["trainer"]).values()
    reasons += _data(named["data"], inside["data"]) + _attention(named["attention"], inside["attention"], plugins)
    return list(dict.fromkeys(reasons))


def misspelt_in_cells(cells: Mapping[str, Sequence[Override]], *, plugins: bool, all_run: bool) -> list[str]:
    """Return the reasons of `misspelt` for the cells of a sweep; unless `all_run`, those that all cells share."""
    found = {name: misspelt(overrides, plugins=plugins) for name, overrides in cells.items()}
    common = [reason for reason in next(iter(found.values()), []) if all(reason in own for own in found.values())]
    own = [f"cell {name}: {reason}" for name, reasons in found.items() for reason in reasons if reason not in common]
    return [f"every cell: {reason}" for reason in common] + (own if all_run else [])


def misspelt_methods(asked: Iterable[tuple[str, Iterable[str]]], *, plugins: bool) -> list[str]:
    """Return the reasons of `misspelt` for methods, each given by its name and the names of its settings."""
    reasons = (_misspelt_method(name, keys, plugins) for name, keys in asked)
    return list(dict.fromkeys(reason for own in reasons for reason in own))


def misspelt_choices(plugins: bool, **given: str | None) -> list[str]:
    """Return the reasons of `misspelt` for options that take one of a few names, see `CHOICES`, and for `kernel`."""
    allowed = CHOICES | ({} if _more(plugins) else {"kernel": ("auto", *kernels())})
    return [
        unknown(key.replace("_", "-"), value, allowed[key])
        for key, value in given.items()
        if value is not None and key in allowed and value not in allowed[key]
    ]


def misspelt_match(asked: str | None) -> list[str]:
    """Return the reasons of `misspelt` for a budget, KIND=VALUE."""
    return [] if asked is None else misfits("match", dict([parse(asked)]), Match)


def _pairs(overrides: Sequence[Override], reasons: list[str]) -> list[tuple[str, Any]]:
    """Keys and values in the order in which they are laid over the base config; adds what cannot be read to reasons."""
    groups = [list(override.items()) for override in overrides if isinstance(override, Mapping)]
    texts = []
    for override in (override for override in overrides if isinstance(override, str)):
        try:
            texts.append(parse(override))
        except ZooError as error:
            reasons.append(str(error).removeprefix("config: "))
    ordered = (sorted(group, key=lambda pair: str(pair[0]).count(".")) for group in [*groups, texts])
    return [(str(key), value) for group in ordered for key, value in group]


def _data(named: Any, inside: Mapping[str, Any]) -> list[str]:
    name = str(named.get("name")) if isinstance(named, Mapping) else ""
    if name in DATA:
        own = {key: value for key, value in inside.items() if key != "name"}
        return misfits("data", own, DATA[name], partial=True)
    if ":" in name:
        return []
    known = unknown("data", name, _yaml("data.yaml"))
    return [f"{known}; or a class of yours, as file.py:Class or package.module:Class"]


def _attention(named: Any, inside: Mapping[str, Any], plugins: bool) -> list[str]:
    entries = named if isinstance(named, list) else [named]
    entries = [inner for x in entries for inner in (x["cycle"] if isinstance(x, Mapping) and "cycle" in x else [x])]
    reasons = []
    for entry in entries:
        keys = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
        keys |= {} if isinstance(named, list) else inside
        name = keys.pop("name", None) or (named.get("name") if isinstance(named, Mapping) else None)
        if isinstance(name, str) and "${" not in name:  # `experiments.config.resolve` says what an entry must be
            # A schedule may bring other methods, whose settings these are.
            own = [] if "schedule" in keys else [key for key in keys if key != "layers"]
            reasons += _misspelt_method(name, own, plugins)
    return reasons


def _misspelt_method(name: str, keys: Iterable[str], plugins: bool) -> list[str]:
    known = methods()
    if name not in known:
        return [] if _more(plugins) else [unknown("method", name, known)]
    allowed = settings(known[name])
    if allowed is None:
        return []
    allowed = (allowed - SHAPE) | {"schedule"}
    return [f"{name}: {unknown_setting(key, allowed)}" for key in keys if key not in allowed]


def _more(plugins: bool) -> bool:
    """Whether there may be methods and kernels beside those of `sparse_zoo`."""
    from importlib.metadata import entry_points  # here: it takes a tenth of the time of `zoo --help`

    return plugins or any(entry_points(group="sparse_zoo.methods"))


@cache
def _yaml(file: str) -> Any:
    return yaml12.load((CONFIGS / file).read_bytes())


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
def kernels() -> list[str]:
    """The kernels of `sparse_zoo`: what their classes have as `name`."""
    return [
        ast.literal_eval(line.value)
        for file in sorted(_file("sparse_zoo.kernels").parent.rglob("*.py"))
        for node in ast.parse(file.read_bytes()).body
        if isinstance(node, ast.ClassDef)
        for line in node.body
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "name"
    ]


@cache
def settings(place: str) -> set[str] | None:
    """Return the names of a class's settings, "package.module:Class"; None where its source does not tell them."""
    module, name = place.split(":")
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
    bases = [settings(f"{module}:{base.id}") if isinstance(base, ast.Name) else None for base in node.bases]
    return None if None in bases else found.union(*(base for base in bases if base))


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
