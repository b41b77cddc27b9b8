"""Plain values against declared types: whether YAML's lists and numbers can stand for what a parameter is to be."""

from __future__ import annotations

import inspect
import math
import re
import sys
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin


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


def misfit(key: str, value: Any, hint: Any) -> str:
    """Why a value cannot stand for a parameter of this type; nothing where it can."""
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
