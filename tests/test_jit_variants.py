"""How many kernels Triton compiles for a training step: each takes about a second, once on every machine."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from test_no_sync import DIM, HEAD_DIM, HEADS, new_film
from tiers import cases
from torch import Tensor

import sparse_zoo as zoo
from sparse_zoo.bench import QUICK
from sparse_zoo.host_time import Launch

triton = pytest.importorskip("triton", reason="needs the package triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are recorded, not run")

MOST = 20
BACKEND = make_backend(GPUTarget("cuda", 90, 32))


class Address:
    """A tensor without values as Triton sees it: its dtype, and an address as far from a multiple of 16 as it is."""

    def __init__(self, x: Tensor) -> None:
        self.dtype, self.at = x.dtype, x.storage_offset() * x.element_size()

    def data_ptr(self) -> int:
        return self.at


def variant(launch: Launch) -> str:
    """What Triton compiles this launch for, by its own rules."""
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    args = [Address(x) if isinstance(x, Tensor) else x for x in launch.args]
    options = {name: launch.constants[name] for name in ("num_warps", "num_stages")}
    constants = {name: x for name, x in launch.constants.items() if name not in options}
    _, specialization, _ = bind(*args, **constants)
    return str((launch.name, specialization, options))


def variants(method: str, film: zoo.Layout, **settings: Any) -> set[str]:
    attention = zoo.build(method, heads=HEADS, head_dim=HEAD_DIM, dim=DIM, kernel="triton", **settings).to(CUDA)
    with fake_cuda() as launches:
        q, k, v = (
            torch.empty(1, HEADS, len(film), HEAD_DIM, dtype=torch.bfloat16, device=CUDA, requires_grad=True)
            for _ in range(3)
        )
        hidden = torch.empty(1, len(film), DIM, device=CUDA, requires_grad=True)
        result = attention(q, k, v, film, hidden=hidden, step=0)
        sum(result.losses.values(), result.out.float().sum()).backward()
    return {variant(launch) for launch in launches}


FILMS = [zoo.Layout.film([zoo.Shot(3, 16, width, text=text)] * 3, caption=5) for width, text in ((16, 0), (17, 1))]


@pytest.mark.parametrize("method", cases(zoo.names(), ["moc", "vsa"]))
def test_a_training_step_compiles_few_kernels(method: str) -> None:
    """Films of other lengths, packs and heads in another slab need no others."""
    settings = QUICK.get(method, {})
    found = variants(method, new_film(20), **settings)
    assert 0 < len(found) <= MOST
    for film in FILMS:
        found |= variants(method, film, **settings)
    assert len(found) <= MOST


def test_variants_are_distinguished() -> None:
    """The counter itself: what Triton specialises by makes another variant, a length makes none."""
    with fake_cuda() as launches:
        for length in (64, 65):
            q = torch.empty(1, 1, length, 64, dtype=torch.bfloat16, device=CUDA)
            plan = zoo.Plan.groups(torch.arange(length) // 20)
            zoo.attend(q, q, q, plan, kernel="triton")
    attends = [launch for launch in launches if launch.name == "attend"]
    first, second = ({variant(launch) for launch in [one]} for one in attends)
    assert first == second
    wider = attends[0]._replace(constants=attends[0].constants | {"num_warps": 16})
    assert variant(wider) not in first
    at = attends[0].kernel.arg_names.index("q_row")
    odd = attends[0]._replace(args=(*attends[0].args[:at], 65, *attends[0].args[at + 1 :]))
    assert variant(odd) not in first
