"""The registry of methods: names to classes, their settings, and plug-ins."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from sparse_zoo.attention import Attention
from sparse_zoo.errors import ZooError, refuse, unknown, unknown_setting
from sparse_zoo.kernels import _kernels
from sparse_zoo.schedule import Schedule, Scheduled, phases

ENTRY_POINTS = "sparse_zoo.methods"
SHAPE = ("heads", "head_dim", "dim")

_methods: dict[str, type[Attention]] = {}
_loaded_entry_points: set[str] = set()

Method = TypeVar("Method", bound=type[Attention])


@dataclass(frozen=True)
class Setting:
    """One setting of a method: default (None and `required` if there is none), type and line of documentation."""

    name: str
    default: Any
    type: str
    doc: str
    required: bool = False


SCHEDULE = Setting(
    "schedule",
    None,
    "Mapping[str, Mapping[int, Any]] | None",
    'Settings that change as training goes, {setting: {step: value}}, "name" (the method) among them.',
)
"""The one setting that is not a class's own: `build` makes a `Scheduled` of it."""


def register(name: str) -> Callable[[Method], Method]:
    """Decorate a class to register it as the method `name`.

    Raises:
        ZooError: If the name is taken by another class, or the class is not an `Attention`.
    """

    def add(cls: Method) -> Method:
        refuse(
            f"register({name!r})",
            [
                f"a name is lower-case letters, digits and underscores, got {name!r}"
                if not re.fullmatch(r"[a-z][a-z0-9_]*", name)
                else "",
                f"{cls!r} is not a subclass of sparse_zoo.Attention"
                if not (isinstance(cls, type) and issubclass(cls, Attention))
                else "",
                f"the name is taken by {_methods[name].__module__}.{_methods[name].__qualname__}"
                if name in _methods
                else "",
                "every method has a setting 'schedule'; call its own another name"
                if "schedule" in inspect.signature(cls).parameters
                else "",
            ],
        )
        _methods[name] = cls
        return cls

    return add


def names() -> list[str]:
    """The names of all registered methods, plug-ins included."""
    _load_entry_points()
    return sorted(_methods)


def get(name: str) -> type[Attention]:
    """The class of a method.

    Raises:
        ZooError: For an unknown name, with the nearest name and the list.
    """
    if name not in _methods:
        _load_entry_points()  # looks through all that is installed: 20 ms
    refuse("sparse_zoo", [unknown("method", name, _methods)] if name not in _methods else [])
    return _methods[name]


def summary(name: str) -> str:
    """The first line of a method's docstring."""
    return (inspect.getdoc(get(name)) or "").partition("\n")[0]


def settings(name: str) -> dict[str, Setting]:
    """A method's settings, its own first, `schedule` last, without the model's shape (heads, head_dim, dim)."""
    found: dict[str, Setting] = {}
    for cls in get(name).__mro__:
        if not issubclass(cls, Attention):
            break
        if "__init__" not in vars(cls):
            continue
        docs = _argument_docs(cls)
        parameters = inspect.signature(cls.__init__).parameters.values()
        for parameter in parameters:
            if parameter.name in ("self", *SHAPE) or parameter.kind is parameter.VAR_KEYWORD:
                continue
            required = parameter.default is parameter.empty
            default = None if required else parameter.default
            kind = "" if parameter.annotation is parameter.empty else str(parameter.annotation)
            own = Setting(parameter.name, default, kind, docs.get(parameter.name, ""), required)
            if parameter.name not in found:
                found[parameter.name] = own
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break  # it takes nothing from its bases
    return found | {SCHEDULE.name: SCHEDULE}


def build(
    name: str, *, heads: int, head_dim: int, dim: int | None = None, schedule: Schedule | None = None, **given: Any
) -> Attention:
    """Build a method, or with a `schedule` one whose settings change at given training steps.

    Args:
        name: A registered method.
        heads: Query heads.
        head_dim: Channels of a head.
        dim: Width of the hidden state, for methods with a router or gates.
        schedule: {setting: {step: value}}. Before its first step a scheduled setting has its value in `given`, or its
            default. "name", the method, may be scheduled too: each phase takes the settings that its method has.
        given: The method's settings (`settings(name)`).

    Raises:
        ZooError: For an unknown name or setting, and for values out of range, in any phase.
    """
    if schedule is not None:
        return _scheduled({"name": name, **given}, schedule, heads=heads, head_dim=head_dim, dim=dim)
    cls, allowed = get(name), settings(name)
    refuse(
        name,
        [unknown_setting(key, allowed) for key in given if key not in allowed]
        + [f"setting {key!r} is needed" for key, s in allowed.items() if s.required and key not in given],
    )
    attention = cls(heads=heads, head_dim=head_dim, dim=dim, **given)
    if attention.dense_above is not None:
        refuse(
            name,
            ["dense_above is not for strict causality: what is dense reads later shots"]
            if attention.causality == "strict"
            else [],
        )
        attention.causality = None
    return attention


def _scheduled(given: Mapping[str, Any], schedule: Schedule, **shape: Any) -> Scheduled:
    found = phases(given, schedule)
    named = dict.fromkeys(own["name"] for own in found.values())
    refuse("schedule", [unknown("method", name, names()) for name in named if name not in names()])
    known = {name: {key: s for key, s in settings(name).items() if key != SCHEDULE.name} for name in named}
    allowed = {"name"}.union(*known.values())
    reasons = [unknown_setting(key, allowed) for key in dict.fromkeys([*given, *schedule]) if key not in allowed]
    built: dict[int, Attention] = {}
    refused: dict[str, int] = {}
    for start, own in found.items():
        mine = {key: value for key, value in own.items() if key in known[own["name"]]}
        try:
            # Parameters that are shared are drawn once, so that the model starts as it would without a schedule.
            with torch.random.fork_rng(devices=[], enabled=get(own["name"]) in map(type, built.values())):
                built[start] = build(own["name"], **shape, **mine)
        except ZooError as error:
            refused.setdefault(str(error), start)
    reasons += [f"from step {start}: {reason}".replace("\n", "\n  ") for reason, start in refused.items()]
    refuse("schedule", reasons)
    return Scheduled(built, [_in_force(own, schedule, known[own["name"]]) for own in found.values()])


def _in_force(own: Mapping[str, Any], schedule: Schedule, known: Mapping[str, Setting]) -> dict[str, Any]:
    """The scheduled settings that a phase's method has, with its defaults."""
    return {key: own[key] if key in own else known[key].default for key in schedule if key in known or key == "name"}


def load_plugin(path: str | Path) -> list[str]:
    """Import a Python file that registers methods or kernels, and return the names of its methods.

    Raises `ZooError` if there is no such file, it does not import, or it registers nothing.
    """
    methods_before, kernels_before = set(_methods), set(_kernels)
    module = import_file(path)
    # A file is imported once; asked for again, it is known by the classes that are its own.
    own = module.__name__
    methods = [x for x, cls in _methods.items() if x not in methods_before or cls.__module__ == own]
    kernels = [x for x, kernel in _kernels.items() if x not in kernels_before or type(kernel).__module__ == own]
    refuse(
        f"plug-in {module.__file__}",
        ["it registers no method and no kernel; use @sparse_zoo.register(name) or sparse_zoo.register_kernel(kernel)"]
        if not methods and not kernels
        else [],
    )
    return sorted(methods)


def import_file(path: str | Path) -> ModuleType:
    """Import a Python file, once; if that fails, nothing that it registered stays.

    The module is named after the whole path, links followed: files of one name in different folders are two modules,
    and one file is the same module in every process.

    Raises `ZooError` if there is no such file or it does not import.
    """
    path = Path(path).resolve()
    refuse(f"plug-in {path}", ["no such file"] if not path.is_file() else [])
    stem, digest = re.sub(r"\W", "_", path.stem), hashlib.sha256(os.fsencode(path)).hexdigest()
    name = f"sparse_zoo_plugin_{stem}_{digest[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ZooError(f"plug-in {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with importing(f"plug-in {path}"):
            spec.loader.exec_module(module)
    except BaseException:  # Ctrl-C too: a file imported by half must not be found the next time
        del sys.modules[name]
        raise
    return module


def _load_entry_points() -> None:
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.value in _loaded_entry_points:
            continue
        _loaded_entry_points.add(entry.value)  # before it is loaded: it may ask for names
        try:
            with importing(f"plug-in {entry.value}, an entry point of {ENTRY_POINTS!r}"):
                entry.load()
        except ZooError:
            _loaded_entry_points.remove(entry.value)
            raise


@contextmanager
def importing(what: str) -> Iterator[None]:
    """What an author's code registers within stays; if it raises, none of it, and the `ZooError` says whose it is."""
    methods, kernels = dict(_methods), dict(_kernels)
    try:
        yield
    except (Exception, SystemExit) as error:  # an author's file may raise anything: one line names the file
        _methods.clear()
        _methods.update(methods)
        _kernels.clear()
        _kernels.update(kernels)
        raise ZooError(f"{what} does not import: {type(error).__name__}: {error}") from error


def _argument_docs(cls: type) -> dict[str, str]:
    """The lines of the docstring's Args section, by argument."""
    lines = (inspect.getdoc(cls) or "").splitlines()
    docs: dict[str, str] = {}
    start = lines.index("Args:") + 1 if "Args:" in lines else len(lines)
    current = ""
    for line in lines[start:]:
        if line and not line.startswith(" "):
            break
        named = re.match(r"    (\w+): (.*)", line)
        if named:
            current = named[1]
            docs[current] = named[2]
        elif current and line.strip():
            docs[current] += " " + line.strip()
    return docs
