"""The `xformers` engine: flash attention through xformers.ops.fmha, segments as a block-diagonal bias."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparse_zoo.kernels.varlen import Segments, Varlen


class XFormers(Varlen):
    """xformers' flash operators: as of 0.0.35 they call flash-attn 2 where it is installed, else torch's own.

    Asked for by name, since xformers' own choice may be operators that pad the lse of each segment.
    """

    name = "xformers"

    def missing(self) -> list[str]:
        """Say if xformers, its flash operators, or the deterministic backward that torch demands is missing."""
        fmha, reason = _fmha()
        if reason:
            return [reason]
        if not (fmha.flash.FwOp.is_available() and fmha.flash.BwOp.is_available()):
            return ["xformers finds no flash attention here"]
        if torch.are_deterministic_algorithms_enabled() and not fmha.flash.BwOp.IS_DETERMINISTIC:
            return ["its backward is not deterministic, as torch.use_deterministic_algorithms demands"]
        return []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
        """Call xformers' flash forward under a block-diagonal mask of the segments."""
        fmha, _ = _fmha()
        bias = _bias(fmha, segments)
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(
            q[None], k[None], v[None], bias, scale=scale, op=fmha.flash.FwOp
        )
        return out[0], lse[0]

    def gradients(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Call xformers' flash backward under a block-diagonal mask of the segments."""
        fmha, _ = _fmha()
        tensors = (x[None] for x in (grad, out, lse, q, k, v))
        bias = _bias(fmha, segments)
        dq, dk, dv = fmha.memory_efficient_attention_backward(*tensors, bias, scale=scale, op=fmha.flash.BwOp)
        return dq[0], dk[0], dv[0]


def _bias(fmha: Any, segments: Segments) -> Any:
    sizes = (ends.diff().tolist() for ends in (segments.q_ends, segments.k_ends))
    return fmha.attn_bias.BlockDiagonalMask.from_seqlens(*sizes, device=segments.q_ends.device)


@cache
def _fmha() -> tuple[Any, str]:
    """The module, or why it cannot be imported."""
    try:
        return import_module("xformers.ops.fmha"), ""
    except ImportError as error:
        return None, f"xformers: {error}"
