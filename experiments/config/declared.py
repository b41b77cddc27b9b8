"""Plain values against declared types: whether YAML's lists and numbers can stand for what a parameter is to be.

pydantic checks and casts, because it takes any type hint: one checker serves dataclasses and the signatures of
plug-ins. OmegaConf's structured configs know neither `Literal` nor most unions; tyro and jsonargparse bring a command
line of their own, and hydra-zen brings Hydra. Values are judged as JSON, in which configs are kept, and strictly: a
list stands for a tuple and 1 for 1.0, but no text stands for a number, and every number is finite.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from sparse_zoo.errors import unknown

if TYPE_CHECKING:
    from pydantic import ConfigDict, TypeAdapter

STRICT: ConfigDict = {"strict": True, "allow_inf_nan": False, "arbitrary_types_allowed": True}


@cache
def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    """The checker of a type; None where there is nothing to hold a value against, as for a forward name."""
    from pydantic import PydanticUserError, TypeAdapter  # here: it takes a fifth of a second, which `zoo --help` saves

    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=STRICT)
    except PydanticUserError:
        return None
    return adapter if adapter.pydantic_complete else None


def _cast(value: Any, hint: Any) -> Any:
    """The value as its declared type has it, in JSON's types; raises `ValueError` or `TypeError` if it does not fit."""
    adapter = None if hint is Any else _adapter(hint)
    if adapter is None:
        return value
    text = json.dumps(value, ensure_ascii=False)
    # Arguments may hold bytes that are not UTF-8, which Python keeps as lone surrogates and JSON cannot hold.
    clean = text.encode("utf-8", "replace").decode()
    made = adapter.dump_python(adapter.validate_json(clean), mode="json")
    if isinstance(made, bool) != isinstance(value, bool):
        raise TypeError(f"{value!r} is not {made!r}")  # to pydantic the literals 1 and True are one
    return value if isinstance(value, str) or clean != text else made  # a path stays as it was written


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain YAML value can stand for a parameter of this type: an int for a float, a list for a tuple."""
    try:
        _cast(value, hint)
    except (ValueError, TypeError):
        return False
    return True


def as_declared(value: Any, hint: Any) -> Any:
    """A value that `fits` a type, as that type has it: a float for an int where a float is meant, lists for tuples.

    Of several types the one that takes the value unchanged comes first: for `int | float`, 1 and 1.0 are two values. A
    value that does not fit is returned as it is.
    """
    try:
        return _cast(value, hint)
    except (ValueError, TypeError):
        return value


def misfit(key: str, value: Any, hint: Any) -> str:
    """Return why a value cannot stand for a parameter of this type; "" where it can, or is a `${...}` to resolve."""
    if "${" in str(value) or fits(value, hint):
        return ""
    if choices := _choices(hint):
        return f"{key} must be one of {', '.join(dict.fromkeys(map(str, choices)))}, got {value!r}"
    each = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return f"{key} must be {' | '.join(map(_in_words, each))}, got {value!r}"


def misfits(section: str, given: Mapping[str, Any], build: Callable[..., Any], *, partial: bool = False) -> list[str]:
    """Return why a class cannot be made from settings: unknown ones, values of a wrong type, and missing ones.

    Args:
        section: Name of the settings in messages.
        given: The settings by name.
        build: The class, or what else makes an object of them: its signature declares the settings.
        partial: Whether other settings may still be added, so that none is missing yet.

    Returns:
        The reasons; none where all settings fit.
    """
    declared, hints = parameters(build), declared_types(build)
    needed = [] if partial else [name for name, x in declared.items() if x.default is x.empty and name not in given]
    reasons = [
        *(unknown(f"key of {section}", key, declared) for key in given if key not in declared),
        *(f"{section}.{name} is needed" for name in needed),
        *(misfit(f"{section}.{key}", given[key], hints.get(key, Any)) for key in given if key in declared),
    ]
    return [reason for reason in reasons if reason]


def parameters(build: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters that `build` names, without `*args` and `**kwargs`."""
    every = inspect.signature(build).parameters.items()
    return {name: x for name, x in every if x.kind not in (x.VAR_KEYWORD, x.VAR_POSITIONAL)}


@cache
def declared_types(build: Callable[..., Any]) -> dict[str, Any]:
    """Return the declared types of what a class is made from."""
    return get_type_hints(inspect.getattr_static(build, "__init__"))


def _in_words(hint: Any) -> str:
    """A type as it is written, but for what YAML calls otherwise."""
    if hint is types.NoneType:
        return "null"
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, get_args(hint)))
    written = hint.__name__ if inspect.isclass(hint) else re.sub(r"typing\.|collections\.abc\.", "", str(hint))
    return re.sub(r"\bbool\b", "true or false", written)


def _choices(hint: Any) -> list[Any]:
    """The values of a type that is made of `Literal`s, and of None, alone; none of any other type."""
    if get_origin(hint) is Literal:
        return [*get_args(hint)]
    if hint is types.NoneType:
        return ["null"]
    each = [_choices(arg) for arg in get_args(hint)] if get_origin(hint) in (Union, types.UnionType) else [[]]
    return [choice for own in each for choice in own] if all(each) else []
