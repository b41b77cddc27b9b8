"""A GPU played by torch's meta device: tensors without values, so that what would wait for a value fails.

`fake_cuda()` runs `kernel="triton"` there, lists its launches, and refuses whatever would make the host wait for a GPU
or copy to one behind its back:

    with fake_cuda() as launches:
        q = torch.empty(1, 4, len(film), 64, dtype=torch.bfloat16, device=CUDA)
        zoo.build("moc", heads=4, head_dim=64, kernel="triton")(q, q, q, film)
    launches[0].name, launches[0].args, launches[0].constants, launches[0].grid

The CPU build of torch cannot run autograd on tensors that FakeTensorMode says are on CUDA (it has no guard for that
device, and aborts). A FakeTensor is a meta tensor that tells another device; here the meta tensors stand for CUDA, and
real tensors for the host.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_zoo.host_time import META, Launch, record_launches
from sparse_zoo.remember import copy_to

CUDA = META
"""The device that plays CUDA."""

aten = torch.ops.aten

WAITING = {
    aten._local_scalar_dense: "reads a number back",
    aten.is_nonzero: "reads a number back",
    aten.equal: "reads a number back",
    aten.nonzero: "has a size that depends on values",
    aten.nonzero_numpy: "has a size that depends on values",
    aten.masked_select: "has a size that depends on values",
    aten._unique: "has a size that depends on values",
    aten._unique2: "has a size that depends on values",
    aten.unique_dim: "has a size that depends on values",
    aten.unique_consecutive: "has a size that depends on values",
    aten.unique_dim_consecutive: "has a size that depends on values",
    aten.bincount: "has a size that depends on values",
    aten.histc: "reads its bounds back",
}
"""Operators that wait for a GPU, whatever they are given."""

READING = (
    *(torch.equal, Tensor.equal, Tensor.cpu, Tensor.tolist, Tensor.numpy, Tensor.item),
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__array__),
    *(Tensor.__contains__, Tensor.__format__),
)
"""What reads values, some of it before any operator is called."""

FROM_HOST_DATA = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)


class Synchronises(RuntimeError):
    """The host would wait for the GPU here."""


@contextmanager
def fake_cuda() -> Iterator[list[Launch]]:
    """Within, meta tensors are on a GPU: launches are listed, and what synchronises raises `Synchronises`."""
    with record_launches() as launches, no_synchronisation():
        yield launches


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raise `Synchronises` where an operator on meta tensors would make the host wait, were they on a GPU."""
    run_backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def backward(*args: Any, **kwargs: Any) -> Any:
        with _Functions():  # the outer one is off while it handles `backward` itself
            return run_backward(*args, **kwargs)

    with patch.object(torch.autograd, "_engine_run_backward", backward), _Functions(), _Operators():
        yield


class _Functions(TorchFunctionMode):
    """What never becomes an operator of its own: tensors made of Python's numbers, and reading values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if func in READING and _on_gpu((args, kwargs)):
            raise Synchronises(f"{name} reads values back")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and _on_gpu(args[0]) and _has_list(args[1]):
            raise Synchronises(f"{name} copies a list of indices to the GPU")
        try:
            made = func(*args, **kwargs)
        except RuntimeError as error:
            if "cannot be called on meta tensors" in str(error):
                raise Synchronises(f"{name} reads values back") from error
            raise
        data = args[1 if func is Tensor.new_tensor else 0] if args else kwargs.get("data", kwargs.get("obj"))
        if func in FROM_HOST_DATA and _on_gpu(made) and not isinstance(data, Tensor):
            raise Synchronises(f"{name} copies Python's numbers to the GPU, and waits")
        return made


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _on_gpu((args, kwargs)) or kwargs.get("device") == META:
            _refuse_waiting(func, args, kwargs)
        return func(*args, **kwargs)


def _refuse_waiting(func: Any, args: Any, kwargs: Any) -> None:
    packet = func.overloadpacket
    if packet in WAITING:
        raise Synchronises(f"{func} {WAITING[packet]}")
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        raise Synchronises(f"{func} without output_size waits for the size of its result")
    if packet in (aten._to_copy, aten.copy_):
        _refuse_copy(func, args, kwargs)
        return
    indices = args[1] if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) else ()
    if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices):
        raise Synchronises(f"{func} with a mask waits for the number of its places")
    # A host tensor of no dimension is an argument of the launch.
    host = [x for x in _tensors((args, kwargs)) if x.device.type == "cpu" and x.dim()]
    if host:
        raise Synchronises(f"{func} is given a tensor of the host beside one of the GPU")


def _refuse_copy(func: Any, args: Any, kwargs: Any) -> None:
    source, to = (args[1], args[0].device) if func.overloadpacket is aten.copy_ else (args[0], kwargs.get("device"))
    if to is None or to == source.device:
        return
    if source.device == META:
        raise Synchronises(f"{func} copies from the GPU to the host")
    # "non_blocking" alone is not enough: a copy of memory that is not pinned waits for the GPU all the same.
    frame = sys._getframe()
    while frame is not None and frame.f_code is not copy_to.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        raise Synchronises(f"{func} copies to the GPU and waits; use sparse_zoo.remember.copy_to")


def _tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]


def _on_gpu(x: Any) -> bool:
    return any(leaf.device == META for leaf in _tensors(x))


def _has_list(index: Any) -> bool:
    return any(isinstance(x, list) for x in (index if isinstance(index, tuple) else (index,)))
