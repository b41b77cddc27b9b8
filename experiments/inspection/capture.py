"""Attention calls in a safetensors file: what a layer was given while a model ran, to be looked at offline.

    captured = load(Path("calls.safetensors"))
    result = sparse_zoo.build("moc", heads=8, head_dim=64).run(captured[0].call)

A capture is a saved `sparse_zoo.Call`, bit for bit. The tensors of call n are `n.q`, `n.k`, `n.v` and, where there are
any, `n.hidden`, `n.q_rows`, `n.noise` and `n.features.<name>`; the rest stands in the metadata, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import sparse_zoo as zoo
from experiments.tracking.store import atomic_write
from sparse_zoo.errors import ZooError, refuse

FORMAT = "sparse_zoo captures 1"
NEEDED = ("q", "k", "v")
TENSORS = (*NEEDED, "hidden", "q_rows", "noise")
NUMBERS = ("layer", "layers", "step", "seed", "head_offset")


@dataclass(frozen=True, eq=False)
class Captured:
    """A call on the CPU, and {"name": method, **settings} of the attention that served it."""

    call: zoo.Call
    method: Mapping[str, Any]


def save(path: Path, captured: Sequence[Captured]) -> Path:
    """Write the calls, whole or not at all.

    Raises ZooError for none, and for calls with a sampler's `memory`, which may hold anything; and where the file
    cannot be written.
    """
    refuse(
        "capture",
        ["there is no call to save"] * (not captured)
        + [f"call {n} has a sampler's memory" for n, x in enumerate(captured) if x.call.memory is not None],
    )
    tensors: dict[str, Tensor] = {}
    described = []
    for n, one in enumerate(captured):
        call = one.call
        held = {name: getattr(call, name) for name in TENSORS}
        held |= {f"features.{name}": value for name, value in (call.features or {}).items()}
        found = {name: value for name, value in held.items() if isinstance(value, Tensor)}
        # A copy of each: the format holds no two tensors that share memory, as k and v of one projection may.
        tensors |= {
            f"{n}.{name}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in found.items()
        }
        films = [
            {"caption": film.caption, "shots": [[x.frames, x.rows, x.cols, x.text] for x in film.shots]}
            for film in call.layout.films
        ]
        noise = None if isinstance(call.noise, Tensor) else call.noise
        numbers = {name: getattr(call, name) for name in NUMBERS}
        described.append({"films": films, "noise": noise, **numbers, "method": dict(one.method)})
    with atomic_write(path) as file:
        try:
            save_file(tensors, file.name, {"format": FORMAT, "calls": json.dumps(described)})
        except SafetensorError as error:  # among others a full disk
            raise ZooError(f"{path} could not be written: {error}") from error
    return path


def load(path: Path) -> list[Captured]:
    """The calls of a file, on the CPU; raises ZooError with all that is wrong with it."""
    refuse("captures", [] if path.is_file() else [f"no such file: {path}"])
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no mapping
    except (SafetensorError, OSError) as error:
        # Only now: the length of a header, with which these files begin, may look like the beginning of a pickle.
        with path.open("rb") as begun:
            pickled = begun.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        why = "a pickle, which can run code when it is loaded; give the safetensors file of `zoo capture`"
        raise ZooError(f"{path} is {why if pickled else f'no safetensors file: {error}'}") from error
    given = metadata.get("format")
    refuse(str(path), [f"is no file of captures: its format is {given!r}, not {FORMAT!r}"] if given != FORMAT else [])
    try:
        described = list(json.loads(metadata.get("calls", "")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ZooError(f"{path}: its list of calls is no JSON: {error}") from error
    reasons = [] if described else ["it holds no call"]
    known = {str(n) for n in range(len(described))}
    reasons += [f"tensor {name!r} is of no call" for name in tensors if name.partition(".")[0] not in known]
    found = []
    for n, one in enumerate(described):
        own = {name.partition(".")[2]: x for name, x in tensors.items() if name.partition(".")[0] == str(n)}
        try:
            found.append(_captured(own, one))
        except (ZooError, TypeError, ValueError, KeyError, AttributeError) as error:
            text = f"{error!r} is missing" if isinstance(error, KeyError) else str(error)
            reasons.append(f"call {n}: {text}".replace("\n", "\n  "))
    refuse(str(path), reasons)
    return found


def _captured(tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> Captured:
    features = {name.removeprefix("features."): x for name, x in tensors.items() if name.startswith("features.")}
    refuse(
        "its tensors",
        [f"{name} is missing" for name in NEEDED if name not in tensors]
        + [f"{name} is not known" for name in tensors if name not in TENSORS and not name.startswith("features.")],
    )
    shots = [[zoo.Shot(*shot) for shot in film["shots"]] for film in described["films"]]
    most, tokens = tensors["k"].shape[2], sum(len(shot) for film in shots for shot in film)
    refuse(
        "its films", [f"have {tokens} tokens, its k {most}"] * (tokens > most)
    )  # before any memory is taken for them
    films = [zoo.Layout.film(own, film["caption"]) for own, film in zip(shots, described["films"], strict=True)]
    held = {"noise": described["noise"], **{name: tensors[name] for name in TENSORS if name in tensors}}
    numbers = {name: described[name] for name in NUMBERS}
    call = zoo.Call(layout=zoo.Layout.pack(films), features=features or None, **held, **numbers)
    return Captured(call, dict(described["method"]))
