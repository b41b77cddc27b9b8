"""Which kernel "auto" takes, and the one that it takes where nothing faster runs."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import sparse_zoo as zoo
from experiments.cli import app
from sparse_zoo import testing
from sparse_zoo.host_time import record_launches
from sparse_zoo.kernels import exact as engine
from sparse_zoo.kernels import routes_on_device
from sparse_zoo.kernels.automatic import H100, RULES, automatic
from sparse_zoo.testing import oracle

ON_H100 = {
    torch.bfloat16: {64: "triton", 128: "triton", 80: "torch", 256: "torch", 40: "torch", 36: "exact"},
    torch.float16: {64: "triton", 128: "triton", 80: "torch", 256: "torch", 40: "torch", 36: "exact"},
    torch.float32: {64: "exact", 128: "exact", 80: "exact", 256: "exact", 40: "exact", 36: "exact"},
}


def test_what_auto_takes_on_an_h100() -> None:
    found = {dtype: {dim: automatic("cuda", H100, dtype, dim) for dim in dims} for dtype, dims in ON_H100.items()}
    assert found == ON_H100


def test_an_old_gpu_takes_what_runs_there() -> None:
    assert automatic("cuda", (7, 5), torch.float16, 64) == "exact"
    assert automatic("cuda", (8, 0), torch.bfloat16, 64) == "triton"
    assert automatic("cpu", (0, 0), torch.float32, 64) == "cpu"
    assert automatic("cuda", H100, torch.int32, 64) == ""


def test_every_rule_is_of_a_kernel() -> None:
    assert {rule.kernel for rule in RULES} <= {*zoo.kernels()}


def test_on_the_cpu_nothing_changes() -> None:
    q = torch.randn(1, 1, 4, 8)
    film = zoo.Layout.film([zoo.Shot(1, 2, 2)])
    assert zoo.attend(q, q, q, zoo.Plan.dense(film)).kernel == "cpu"
    assert any("needs a CUDA device" in reason for reason in zoo.kernels()["exact"])


def test_auto_follows_the_rules_device_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q = torch.randn(1, 1, 4, 64)
    film = zoo.Layout.film([zoo.Shot(1, 2, 2)])
    assert zoo.attend(q, q, q, zoo.Plan.dense(film)).kernel == "cpu"
    assert not routes_on_device("auto", q, q)
    with pytest.raises(zoo.ZooError) as refused:
        zoo.attend(q.int(), q.int(), q.int(), zoo.Plan.dense(film))
    assert all(f"{rule.kernel}: " in str(refused.value) for rule in RULES)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
def test_auto_and_the_fused_top_k_agree() -> None:
    q = torch.empty(1, 1, 4, 64, dtype=torch.bfloat16, device="meta")
    with record_launches():
        assert routes_on_device("auto", q, q)
        assert routes_on_device("triton", q, q)
        assert not routes_on_device("auto", q.float(), q.float())  # "exact" attends
        assert not routes_on_device("auto", q[..., :40], q[..., :40])  # "torch" attends
        assert not routes_on_device("torch", q, q)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel, allowed on the CPU: its operators are the same everywhere."""
    why_not = engine.Exact.why_not

    def why_not_besides_cuda(self: Any, *tensors: Any) -> list[str]:
        return [reason for reason in why_not(self, *tensors) if "cuda" not in reason.lower()]

    monkeypatch.setattr(engine.Exact, "why_not", why_not_besides_cuda)


class AtMost(TorchDispatchMode):
    """Fail at the first torch operation beyond a number of them, before a Python loop takes minutes."""

    def __init__(self, operations: int) -> None:
        super().__init__()
        self.left = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        assert self.left >= 0, f"too many torch operations, the last one is {func}"
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("exact")
def test_exact_needs_few_operations_for_many_rectangles() -> None:
    q = torch.randn(1, 1, 65_536, 8, requires_grad=True)
    plan = zoo.Plan.groups(torch.arange(65_536))
    with AtMost(600):
        out = zoo.attend(q, q, q, plan, kernel="exact").out
        torch.autograd.grad(out.sum(), q)


def test_exact_pads_each_side_to_less_than_twice_its_size() -> None:
    films = [zoo.Layout.film([zoo.Shot(1, 1, size)]) for size in (1, 2, 5, 8, 65, 128)]
    plan = zoo.Plan.within(zoo.Layout.pack(films).chunks("shot"))
    pairs = plan.cost(8).pairs
    assert pairs < plan.executed("exact") < 4 * pairs


SLOW = ("kernel_large_plans", "kernel_drawn_plans")


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    "check", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in testing.kernel_checks()]
)
def test_exact_conforms(check: str) -> None:
    (outcome,) = testing.check_kernel("exact", only=[check])
    assert outcome.status == "passed"


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("method", ["moc", "moga", "window", "dense"])
@pytest.mark.parametrize("elements", [50, 5_000, engine.ELEMENTS])  # cut rectangles, many batches, few batches
def test_exact_agrees_with_the_oracle(
    elements: int, method: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "ELEMENTS", elements)
    film = zoo.Layout.film([zoo.Shot(2, 3, 3, text=2), zoo.Shot(1, 3, 3), zoo.Shot(2, 2, 3)], caption=3)
    attention = zoo.build(method, heads=4, head_dim=6, dim=5)
    q = torch.randn(2, 4, len(film), 6, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, len(film), 6, requires_grad=True) for _ in "kv")
    call = zoo.Call(q, k, v, film, hidden=torch.randn(2, len(film), 5))
    plan = next(branch.plan for branch in attention.branches(call) if isinstance(branch, zoo.Branch))
    out, lse, name = zoo.attend(q, k, v, plan, kernel="exact")
    assert name == "exact"
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, want_lse = oracle.masked_softmax(*wide, oracle.mask_of(plan))
    _close(out, want)
    _close(lse, want_lse)
    weight = torch.randn(out.shape)
    grads = torch.autograd.grad(out, (q, k, v), weight)
    for grad, expected in zip(grads, torch.autograd.grad(want, wide, weight.double()), strict=True):
        _close(grad, expected)


def _close(found: Tensor, want: Tensor) -> None:
    """Within 1e-6 of the largest value: of float32, not of TF32 or bfloat16, which err by 1e-3."""
    torch.testing.assert_close(found.double(), want, rtol=0, atol=1e-6 * float(want.detach().abs().max()))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("setting", ["allow_tf32", "fp32_precision", "set_float32_matmul_precision", "none"])
def test_exact_works_whichever_way_tf32_was_allowed(setting: str) -> None:
    products = torch.backends.cuda.matmul
    film = zoo.Layout.film([zoo.Shot(2, 2, 2)] * 2)
    q = torch.randn(1, 1, len(film), 8, requires_grad=True)
    seen = []
    try:
        if setting == "allow_tf32":
            products.allow_tf32 = True
        elif setting == "fp32_precision":
            products.fp32_precision = "tf32"  # from here on, torch raises where allow_tf32 is asked
        elif setting == "set_float32_matmul_precision":
            torch.set_float32_matmul_precision("high")
        before = products.fp32_precision
        out = zoo.attend(q, q, q, zoo.Plan.within(film.chunks("shot")), kernel="exact").out
        with engine._in_full(q.device):
            seen.append(products.fp32_precision)
        out.sum().backward()
        assert seen == ["ieee"]
        assert products.fp32_precision == before
        if setting != "fp32_precision":
            assert products.allow_tf32 == (setting != "none")
    finally:
        products.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        products.fp32_precision = "none"


@pytest.mark.usefixtures("exact")
def test_exact_is_not_narrowed_by_autocast() -> None:
    film = zoo.Layout.film([zoo.Shot(2, 4, 4)] * 2)
    q = torch.randn(1, 1, len(film), 8)
    plan = zoo.Plan.within(film.chunks("shot"))
    want = zoo.attend(q, q, q, plan, kernel="exact").out
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(zoo.attend(q, q, q, plan, kernel="exact").out, want)


def test_the_docs_have_the_rules() -> None:
    text = (Path(__file__).parent.parent / "docs" / "kernels.md").read_text(encoding="utf-8")
    for rule in RULES:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in rule.dtypes]
        oldest = "any" if rule.oldest == (0, 0) else "{}.{} or newer".format(*rule.oldest)
        line = f"| `{rule.kernel}` | {rule.device} | {', '.join(dtypes)} | {oldest} | {rule.described()} |"
        assert line in text


def test_zoo_list_shows_an_h100() -> None:
    done = CliRunner().invoke(app, ["list"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    shown = done.stdout[done.stdout.index("on an H100") :]
    assert re.search(r"bfloat16 +triton +torch +triton +torch", shown)
    assert re.search(r"float32 +exact +exact +exact +exact", shown)
