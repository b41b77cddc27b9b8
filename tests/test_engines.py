"""The CUDA engines without a GPU: their own work is ours to test, the packages' calls are played by plain code.

A player takes exactly the arguments that its package's call takes, by name and order, and demands what it demands.
"""

# ruff: noqa: ARG001 -- a player's arguments are its package's, those it has no use for too

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import check, inputs
from test_plan import plans
from torch import Tensor

import sparse_zoo as zoo
from sparse_zoo.kernels import flash_attn, varlen, xformers
from sparse_zoo.kernels.rectangles import rectangles

# -- what every one of them computes --------------------------------------------------------------------------------


def segments(x: Tensor, ends: Tensor) -> list[Tensor]:
    assert ends.dtype == torch.int32
    assert ends[0] == 0
    assert ends[-1] == len(x)
    return [x[a:b] for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, q_most: int, k_most: int, scale: float
) -> tuple[Tensor, Tensor]:
    """q (n, 1, D), k, v (m, 1, D) -> out (n, 1, D), lse (1, n)."""
    assert q.shape[1] == k.shape[1] == v.shape[1] == 1
    assert (q_most, k_most) == (int(q_ends.diff().max()), int(k_ends.diff().max()))
    outs, lses = [], []
    for a, b, c in zip(segments(q, q_ends), segments(k, k_ends), segments(v, k_ends), strict=True):
        assert len(a)
        assert len(b)
        scores = a[:, 0] @ b[:, 0].T * scale
        outs.append(scores.softmax(-1) @ c[:, 0])
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs)[:, None], torch.cat(lses)[None]


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_ends: Tensor,
    k_ends: Tensor,
    q_most: int,
    k_most: int,
    scale: float,
) -> tuple[Tensor, ...]:
    assert lse.shape == (1, len(q))
    assert (q_most, k_most) == (int(q_ends.diff().max()), int(k_ends.diff().max()))
    parts = []
    sides = [segments(x[:, 0], q_ends) for x in (grad, q, out)] + [segments(x[:, 0], k_ends) for x in (k, v)]
    for g, a, o, b, c, total in zip(*sides, segments(lse[0], q_ends), strict=True):
        p = (a @ b.T * scale - total[:, None]).exp()
        ds = p * (g @ c.T - (g * o).sum(-1, keepdim=True)) * scale
        parts.append((ds @ b, ds.T @ a, p.T @ g))
    return tuple(torch.cat(x)[:, None] for x in zip(*parts, strict=True))


# -- the packages ---------------------------------------------------------------------------------------------------


def module(patch: pytest.MonkeyPatch, name: str, **held: Any) -> None:
    made = ModuleType(name)
    vars(made).update(held)
    patch.setitem(sys.modules, name, made)


def torch_itself(patch: pytest.MonkeyPatch) -> None:
    def flash_forward(
        query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int,
        dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert (dropout_p, is_causal, return_debug_mask) == (0.0, False, False)
        none = torch.empty(0)
        return *forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, scale), none, none, none

    def flash_backward(
        grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, cum_seq_q: Tensor,
        cum_seq_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool, rng_state: Tensor,
        unused: Tensor, *, scale: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert (dropout_p, is_causal, rng_state.dtype) == (0.0, False, torch.uint64)
        return backward(
            grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, scale
        )  # fmt: skip

    patch.setattr(varlen, "flash_forward", flash_forward)
    patch.setattr(varlen, "flash_backward", flash_backward)


def flash_attn_2(patch: pytest.MonkeyPatch, version: str = "2.8.3") -> None:
    def _flash_attn_varlen_forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1,
        window_size_right: int = -1, softcap: float = 0.0,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        done = forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
        return *done, torch.empty(0), torch.empty(0)

    def _flash_attn_varlen_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
        dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
        softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float,
        alibi_slopes: Tensor | None, deterministic: bool, rng_state: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        for into, x in zip(
            (dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, *bounds, softmax_scale), strict=True
        ):
            into.copy_(x)
        return torch.empty(0)

    calls = {f.__name__: f for f in (_flash_attn_varlen_forward, _flash_attn_varlen_backward)}
    module(patch, "flash_attn", __version__=version)
    module(patch, "flash_attn.flash_attn_interface", **calls)


FORWARD_3 = """fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None,
Tensor? q_v=None, Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,
Tensor? cu_seqlens_k_new=None,
Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None,
Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None,
Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None,
Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1,
int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False,
Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0)
-> (Tensor(out!), Tensor, Tensor, Tensor)"""
BACKWARD_3 = """bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None,
Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,
Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None,
float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1,
float softcap=0.0, bool deterministic=False, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"""


@pytest.fixture(scope="module", autouse=True)
def operators_3() -> Iterator[None]:
    """Real operators of these schemas, so that torch itself checks how they are called."""
    library = torch.library.Library("flash_attn_3", "FRAGMENT")

    def fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        names = [argument.name for argument in torch.ops.flash_attn_3.fwd.default._schema.arguments[3:]]
        given = dict(zip(names, rest, strict=False))
        done = forward(q, k, v, *bounds(given), given["softmax_scale"])
        return *done, torch.empty(0), torch.empty(0)

    def bwd(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        names = [argument.name for argument in torch.ops.flash_attn_3.bwd.default._schema.arguments[6:]]
        given = dict(zip(names, rest, strict=False))
        for name, x in zip(
            ("dq", "dk", "dv"),
            backward(dout, q, k, v, out, lse, *bounds(given), given["softmax_scale"]),
            strict=True,
        ):
            given[name].copy_(x)
        return tuple(torch.empty(0) for _ in range(5))

    def bounds(given: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(given[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"))

    for schema, call in ((FORWARD_3, fwd), (BACKWARD_3, bwd)):
        library.define(schema.replace("\n", " "))
        library.impl(schema[:3], call, "CPU")
    yield
    library._destroy()


def flash_attn_3(patch: pytest.MonkeyPatch) -> None:
    module(patch, "flash_attn_3._C")


def flash_attn_4(patch: pytest.MonkeyPatch) -> None:
    def _flash_attn_fwd(
        q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
        seqused_q: Any = None, seqused_k: Any = None, max_seqlen_q: Any = None, max_seqlen_k: Any = None,
        min_seqlen_k: Any = None, page_table: Any = None, softmax_scale: Any = None, causal: bool = False,
        softcap: float | None = None, return_lse: bool = False,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        done = forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
        return done[0], done[1] if return_lse else None, None, None, None

    def _flash_attn_bwd(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, softmax_scale: Any = None,
        causal: bool = False, softcap: float = 0.0, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
        seqused_q: Any = None, seqused_k: Any = None, max_seqlen_q: Any = None, max_seqlen_k: Any = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return backward(
            dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale
        )  # fmt: skip

    module(patch, "flash_attn.cute.interface", _flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)


def xformers_ops(patch: pytest.MonkeyPatch, available: bool = True) -> None:
    class BlockDiagonalMask:
        def __init__(self, q_seqlen: list[int], kv_seqlen: list[int]) -> None:
            ends = [torch.tensor([0, *sizes]).cumsum(0).int() for sizes in (q_seqlen, kv_seqlen)]
            self.bounds = (*ends, max(q_seqlen), max(kv_seqlen))

        @classmethod
        def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int], *, device: torch.device) -> Any:
            assert isinstance(device, torch.device)
            return cls(q_seqlen, kv_seqlen)

    def memory_efficient_attention_forward_requires_grad(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: Any = None, *, op: Any
    ) -> tuple[Tensor, Tensor]:
        assert op is FwOp
        out, lse = forward(query[0], key[0], value[0], *attn_bias.bounds, scale)
        return out[None], lse[None]

    def memory_efficient_attention_backward(
        grad: Tensor, output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None,
        p: float = 0.0, scale: Any = None, *, op: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert op is BwOp
        tensors = (x[0] for x in (grad, query, key, value, output, lse))
        return tuple(x[None] for x in backward(*tensors, *attn_bias.bounds, scale))

    FwOp = SimpleNamespace(is_available=lambda: available)
    BwOp = SimpleNamespace(is_available=lambda: available, IS_DETERMINISTIC=False)
    calls = (memory_efficient_attention_forward_requires_grad, memory_efficient_attention_backward)
    module(
        patch,
        "xformers.ops.fmha",
        flash=SimpleNamespace(FwOp=FwOp, BwOp=BwOp),
        attn_bias=SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask),
        **{call.__name__: call for call in calls},
    )


# -- tests ----------------------------------------------------------------------------------------------------------


@contextmanager
def installed(*packages: Callable[[pytest.MonkeyPatch], None]) -> Iterator[pytest.MonkeyPatch]:
    """These packages and no other."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("flash_attn", "flash_attn_3", "xformers"):
            patch.setitem(sys.modules, name, None)
        for package in packages:
            package(patch)
        forget()
        yield patch
    forget()


def forget() -> None:
    flash_attn._chosen.cache_clear()
    xformers._fmha.cache_clear()


ENGINES: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "torch": ("torch", torch_itself),
    "flash-attn 2": ("flash_attn", flash_attn_2),
    "flash-attn 3": ("flash_attn", flash_attn_3),
    "flash-attn 4": ("flash_attn", flash_attn_4),
    "xformers": ("xformers", xformers_ops),
}


@pytest.mark.parametrize("engine", ENGINES)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_engines_pack_and_call_right(engine: str, data: st.DataObject) -> None:
    """Any plan, forward and backward, against masked softmax in float64, in few calls and in many."""
    kernel, package = ENGINES[engine]
    plan = data.draw(plans()) | data.draw(plans())
    with installed(package) as patch:
        patch.setattr(varlen, "ROWS_OF_A_CALL", data.draw(st.sampled_from([1, 800, 1 << 20])))
        patch.setattr(varlen.Varlen, "why_not", lambda *_: [])
        torch.manual_seed(1)
        check(kernel, plan, inputs(23, 23, kv_heads=data.draw(st.sampled_from([1, 2]))), atol=1e-12)


def test_calls_are_bounded_and_hold_every_rectangle_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = torch.tensor([1, 1, 400, 3, 5, 2000, 1, 2])
    plan = zoo.Plan.groups(torch.arange(len(sizes)).repeat_interleave(sizes))
    (rects,) = rectangles(plan, 1, 1)
    monkeypatch.setattr(varlen, "ROWS_OF_A_CALL", bound := 1200)
    calls = [(call.q_size + call.k_size + 2 * varlen.TILE).tolist() for call in varlen._calls(rects)]
    assert [size for call in calls for size in call] == (2 * sizes + 2 * varlen.TILE).tolist()
    assert all(sum(call) <= bound or len(call) == 1 for call in calls)
    assert all(sum(a) + b[0] > bound for a, b in pairwise(calls))


def test_a_call_has_fewer_segments_than_a_grid_dimension() -> None:
    assert varlen.ROWS_OF_A_CALL // (2 * varlen.TILE) < 65_535


def test_torchs_operators_take_what_they_are_given() -> None:
    """Torch's own schema check, before any kernel is looked for: the CPU has none."""
    x, ends, lse = torch.zeros(4, 1, 8), torch.tensor([0, 4], dtype=torch.int32), torch.zeros(1, 4)
    bounds = varlen.Segments(ends, ends, 4, 4)
    engine = varlen.TorchVarlen()
    with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
        engine.attend(x, x, x, bounds, 0.5)
    with pytest.raises(NotImplementedError, match="_flash_attention_backward"):
        engine.gradients(x, x, x, x, x, lse, bounds, 0.5)


def why_not(kernel: str) -> str:
    return "; ".join(zoo.kernels()[kernel])


def test_what_is_not_installed_is_named() -> None:
    with installed():
        for words in ("flash-attn 2: ", "flash-attn 3: ", "flash-attn 4: "):
            assert words in why_not("flash_attn")
        assert "xformers: " in why_not("xformers")


def test_what_is_too_old_or_not_built_for_this_is_named() -> None:
    with installed(lambda patch: flash_attn_2(patch, "2.6.3")):
        assert "flash-attn 2: needs 2.7 or newer, found 2.6.3" in why_not("flash_attn")
    with installed(lambda patch: flash_attn_2(patch, "2.10.0")):
        assert "flash-attn" not in why_not("flash_attn")
    with installed(lambda patch: module(patch, "flash_attn.cute.interface")):
        assert "flash-attn 4: flash_attn.cute.interface has no _flash_attn_fwd" in why_not("flash_attn")
    with installed(lambda patch: xformers_ops(patch, available=False)):
        assert "xformers finds no flash attention here" in why_not("xformers")
    with installed(xformers_ops):
        assert "xformers" not in why_not("xformers")
        torch.use_deterministic_algorithms(True)
        try:
            assert "its backward is not deterministic" in why_not("xformers")
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("capability", "packages", "chosen"),
    [
        ((9, 0), (flash_attn_2, flash_attn_3, flash_attn_4), "flash-attn 3"),
        ((9, 0), (flash_attn_2, flash_attn_4), "flash-attn 4"),
        ((10, 0), (flash_attn_2, flash_attn_3, flash_attn_4), "flash-attn 4"),
        ((8, 6), (flash_attn_2, flash_attn_3, flash_attn_4), "flash-attn 2"),
        ((8, 0), (flash_attn_3, flash_attn_4), ""),
    ],
)
def test_the_device_chooses_the_generation(
    capability: tuple[int, int], packages: tuple[Callable[[pytest.MonkeyPatch], None], ...], chosen: str
) -> None:
    with installed(*packages) as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        assert flash_attn.FlashAttn().package() == chosen
        if not chosen:
            assert f"is for compute capability (9, 0) to (9, 0), this device has {capability}" in why_not("flash_attn")


def test_every_reason_of_the_tensors_is_reported() -> None:
    q, v = torch.zeros(1, 1, 4, 12), torch.zeros(1, 1, 4, 8)
    for kernel in ("torch", "flash_attn", "xformers"):
        with pytest.raises(zoo.ZooError) as error:
            zoo.attend(q, q, v, zoo.Plan.dense(zoo.Layout.film([zoo.Shot(1, 2, 2)])), kernel=kernel)
        for words in ("are on cpu", "float32 is not float16", "12 is not a multiple of 8", "of v (8) differs"):
            assert words in str(error.value)
