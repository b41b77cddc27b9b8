"""The `flash_attn` engine: flash-attn of generation 3, 4 or 2, whichever is installed and made for the device."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_zoo.kernels.varlen import Segments, Varlen

Three = tuple[Tensor, Tensor, Tensor]


class Generation(NamedTuple):
    """A generation of the package, the compute capabilities that it is used on, and how it is called.

    `load` returns what holds its calls, or raises ImportError; `forward(api, q, k, v, segments, scale)` and
    `backward(api, grad, (q, k, v), out, lse, segments, scale)` are `Varlen.attend` and `gradients`.
    """

    title: str
    lowest: tuple[int, int]
    highest: tuple[int, int]
    load: Callable[[], Any]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Three]


class FlashAttn(Varlen):
    """The first of `GENERATIONS` that is installed and made for this device; `package()` says which."""

    name = "flash_attn"

    def missing(self) -> list[str]:
        """Say of each generation why it cannot be used; empty if one can be."""
        return _chosen()[2]

    def package(self) -> str:
        """What runs here, such as "flash-attn 3"; empty where nothing does."""
        generation = _chosen()[0]
        return generation.title if generation else ""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
        """Call the forward of the chosen generation."""
        generation, api, _ = _chosen()
        assert generation is not None
        return generation.forward(api, q, k, v, segments, scale)

    def gradients(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, scale: float
    ) -> Three:
        """Call the backward of the chosen generation."""
        generation, api, _ = _chosen()
        assert generation is not None
        return generation.backward(api, grad, (q, k, v), out, lse, segments, scale)


@cache
def _chosen() -> tuple[Generation | None, Any, list[str]]:
    """The generation to use and what holds its calls, or why there is none."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    reasons = []
    for generation in GENERATIONS:
        try:
            api = generation.load()
        except ImportError as error:
            reasons.append(f"{generation.title}: {error}")
            continue
        if capability is None or generation.lowest <= capability <= generation.highest:
            return generation, api, []
        allowed = f"{generation.lowest} to {generation.highest}"
        reasons.append(f"{generation.title}: is for compute capability {allowed}, this device has {capability}")
    return None, None, reasons


def _by_name(segments: Segments) -> dict[str, Any]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, segments, strict=True))


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _load2() -> Any:
    api = import_module("flash_attn.flash_attn_interface")
    version = str(getattr(import_module("flash_attn"), "__version__", "0"))
    # Before 2.7 calls of the same names took and returned something else.
    if [int(number) for number in re.findall(r"\d+", version)[:2]] < [2, 7]:
        raise ImportError(f"needs 2.7 or newer, found {version}")
    return api


def _forward2(api: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = api._flash_attn_varlen_forward(q, k, v, *segments, dropout_p=0.0, softmax_scale=scale, causal=False)
    return out, lse


def _backward2(api: Any, grad: Tensor, qkv: Three, out: Tensor, lse: Tensor, segments: Segments, scale: float) -> Three:
    dq, dk, dv = (torch.empty_like(x) for x in qkv)
    api._flash_attn_varlen_backward(
        *(grad, *qkv, out, lse, dq, dk, dv, *segments),
        dropout_p=0.0,
        softmax_scale=scale,
        causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=_deterministic(),
    )
    return dq, dk, dv


def _load3() -> Any:
    import_module("flash_attn_3._C")  # brings the operators, whose schema changed less than what wraps them in Python
    return torch.ops.flash_attn_3


def _forward3(api: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = api.fwd(q, k, v, **_by_name(segments), softmax_scale=scale, num_splits=1)
    return out, lse


def _backward3(api: Any, grad: Tensor, qkv: Three, out: Tensor, lse: Tensor, segments: Segments, scale: float) -> Three:
    dq, dk, dv = (torch.empty_like(x) for x in qkv)
    rest = {"softmax_scale": scale, "deterministic": _deterministic()}
    api.bwd(grad, *qkv, out, lse, dq, dk, dv, **_by_name(segments), **rest)
    return dq, dk, dv


def _load4() -> Any:
    api = import_module("flash_attn.cute.interface")
    for name in ("_flash_attn_fwd", "_flash_attn_bwd"):
        if not hasattr(api, name):
            raise ImportError(f"{api.__name__} has no {name}")
    return api


def _forward4(api: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = api._flash_attn_fwd(q, k, v, **_by_name(segments), softmax_scale=scale, return_lse=True)
    return out, lse


def _backward4(api: Any, grad: Tensor, qkv: Three, out: Tensor, lse: Tensor, segments: Segments, scale: float) -> Three:
    rest = {"softmax_scale": scale, "deterministic": _deterministic()}
    dq, dk, dv, *_ = api._flash_attn_bwd(*qkv, out, grad, lse, **_by_name(segments), **rest)
    return dq, dk, dv


GENERATIONS = (
    Generation("flash-attn 3", (9, 0), (9, 0), _load3, _forward3, _backward3),
    Generation("flash-attn 4", (9, 0), (12, 1), _load4, _forward4, _backward4),
    Generation("flash-attn 2", (8, 0), (12, 1), _load2, _forward2, _backward2),
)
"""By preference: 3 is the fastest that is finished, on Hopper alone; newer devices have 4; 2 runs on all."""
