"""The most memory that attention holds at once on a GPU, counted without one.

Attention runs on torch's `meta` device, whose tensors have sizes and no memory, with kernel launches recorded instead
of made: every tensor that is allocated on a GPU is allocated there, and is let go at the same moment.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sparse_zoo.attention import Attention
from sparse_zoo.errors import refuse
from sparse_zoo.host_time import META, Launch, record_launches
from sparse_zoo.kernels.triton.configs import HEAD_DIMS
from sparse_zoo.layout import Layout

BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default


def peak_bytes(
    attention: Attention, layout: Layout, heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16, batch: int = 1
) -> Mapping[str, int]:
    """Bytes of q, k, v and of all that one call of `attention`, built for kernel "triton", holds beside them.

    The tables that a layout keeps from call to call are not counted, nor are the parameters, `hidden` and the gradient
    of the output. Of what cuDNN holds itself, its sum of dq in float32 is counted.

    Args:
        attention: The method; its `dim` is the width of the hidden state that it receives. It is moved to `META`.
        layout: The stream.
        heads: Query heads, and heads of keys.
        head_dim: Channels of a head.
        dtype: Of q, k and v.
        batch: Batch items.

    Returns:
        "forward" without gradients, "forward+backward" with them.

    Raises:
        ZooError: Without Triton, or for a head dim or dtype that its kernel does not take.
    """
    wrong = [
        f"head dim {head_dim} is not {' or '.join(map(str, HEAD_DIMS))}" if head_dim not in HEAD_DIMS else "",
        f"dtype {dtype} is not bfloat16 or float16" if dtype not in (torch.bfloat16, torch.float16) else "",
    ]
    refuse("peak memory with kernel 'triton'", wrong)
    attention = attention.to(META)
    found: dict[str, int] = {}
    with record_launches() as launches:
        for which, learns in (("tables", False), ("forward", False), ("forward+backward", True)):
            shape = (batch, heads, len(layout), head_dim)
            q, k, v = (torch.empty(shape, dtype=dtype, device=META, requires_grad=learns) for _ in range(3))
            hidden = torch.empty(batch, len(layout), attention.dim or 1, device=META)
            grad = torch.empty_like(q, requires_grad=False)
            peak = _Peak((q, k, v, hidden, grad, *attention.parameters(), *attention.buffers()), launches)
            with peak, torch.set_grad_enabled(learns):
                out = attention(q, k, v, layout, hidden=hidden, step=0).out
                if learns:
                    out.backward(grad)
            found[which] = peak.most + q.nbytes + k.nbytes + v.nbytes
    del found["tables"]  # the first call, which builds them
    return found


class _Peak(TorchDispatchMode):
    """Follows the storages that operations make; `most` bytes were there at once. What is `known` does not count."""

    def __init__(self, known: tuple[Tensor, ...], launches: list[Launch]) -> None:
        super().__init__()
        self.launches, self.now, self.most = launches, 0, 0
        self.held = dict.fromkeys((x.untyped_storage()._cdata for x in known), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches.clear()  # a recorded launch holds its tensors
        made = func(*args, **(kwargs or {}))
        for x in tree_iter(made):
            if isinstance(x, Tensor) and x.device == META:
                self._hold(x.untyped_storage())
        inside = 4 * args[1].numel() if func is BACKWARD else 0
        self.most = max(self.most, self.now + inside)
        return made

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.held:
            self.held[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._let_go, key)

    def _let_go(self, key: int) -> None:
        self.now -= self.held.pop(key, 0)
