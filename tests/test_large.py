"""Checks at sizes without an L × L table: they pass a right kernel and catch each wrong one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_zoo as zoo
from sparse_zoo import routing
from sparse_zoo.kernels import get
from sparse_zoo.kernels.base import Kernel
from sparse_zoo.kernels.triton import dense
from sparse_zoo.methods import moc
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Part, Plan
from sparse_zoo.testing import kernels as small
from sparse_zoo.testing import large, oracle

FILM = zoo.Layout.film([zoo.Shot(3, 4, 4, text=5), zoo.Shot(2, 4, 4), zoo.Shot(4, 3, 4, text=3)], caption=2)
HEADS, KV_HEADS, DIM = 4, 2, 16


def problem(dtype: torch.dtype = torch.float32, film: zoo.Layout = FILM) -> tuple[Plan, large.Inputs]:
    """moc with shared keys: dense anchors and chosen chunks."""
    given = large.Inputs.random(len(film), HEADS, KV_HEADS, DIM, dtype, "cpu", seed=0)
    attention = zoo.build("moc", heads=HEADS, head_dim=DIM, top_k=2, causal=None, kernel="cpu")
    return attention.plan(given.q, given.k, film), given


def whole(kernel: Kernel | str, plan: Plan, given: large.Inputs) -> list[large.Finding]:
    return large.check_whole(kernel, plan, given)


def sampled(kernel: Kernel | str, plan: Plan, given: large.Inputs) -> list[large.Finding]:
    return large.check_sampled(kernel, plan, given, tokens=24, heads=2)


CHECKS = pytest.mark.parametrize("check", [whole, sampled])


# -- right kernels ----------------------------------------------------------------------------------------------------


@CHECKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_right_kernels_pass(check: Callable[..., list[large.Finding]], kernel: str, dtype: torch.dtype) -> None:
    findings = check(kernel, *problem(dtype))
    assert [finding.what for finding in findings] == ["out", "lse", "dq", "dk", "dv"]
    assert large.failures(findings) == ""
    assert all(0 < finding.allowed < (0.1 if dtype != torch.float32 else 1e-4) for finding in findings)


@pytest.mark.parametrize("recipe", list(small.recipes())[:12], ids=lambda recipe: f"{recipe.kinds}")
def test_who_reads_whom_is_what_the_oracle_says(recipe: small.Recipe) -> None:
    plan = recipe.plan("cpu")
    want = oracle.mask_of(plan)
    queries, keys = torch.arange(plan.shape[0]), torch.arange(plan.shape[1]).flip(0)
    for item, head in ((0, 0), (recipe.batch - 1, recipe.heads - 1)):
        got = large.seen(plan, item, head, queries, keys)
        assert torch.equal(got, large._own(want, item, head)[:, keys])


def test_both_checks_agree_with_autograd_of_the_oracle() -> None:
    """The references themselves: a kernel that is the oracle in float64 errs by nothing."""
    plan, given = problem(torch.float64)
    q, k, v = (x.requires_grad_() for x in given[:3])
    out, lse = oracle.masked_softmax(q, k, v, oracle.mask_of(plan))
    got = large.Run(out.detach(), lse, *torch.autograd.grad(out, (q, k, v), given.grad))
    given = large.Inputs(*(x.detach() for x in given))
    for findings in (large.judge_whole(got, plan, given), large.Sampled(plan, given, tokens=9).judge(got)):
        assert max(finding.error for finding in findings) < 1e-13


def test_queries_without_keys_are_judged_too() -> None:
    labels = torch.tensor([0, 0, -1, 1, 1, -1, 2])
    given = large.Inputs.random(7, 2, 2, 8, torch.float32, "cpu", seed=0)
    plan = Plan.groups(labels)
    assert large.failures(whole("cpu", plan, given)) == ""
    got = large.run("cpu", plan, given)
    got.out[:, :, 2] = 0.1
    got.lse[:, :, 5] = 0.0
    said = large.failures(large.judge_whole(got, plan, given))
    assert "out errs" in said
    assert "lse of queries without keys" in said


# -- wrong kernels ----------------------------------------------------------------------------------------------------


class Wrong(Kernel):
    """The CPU's kernel with one change to its result or to the plan it computes."""

    name = "wrong"

    def __init__(
        self, change: Callable[[large.Run], large.Run] = lambda got: got, plan: Any = lambda plan: plan
    ) -> None:
        self.change, self.plan = change, plan

    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:  # noqa: ARG002
        return []

    def run(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = _Changed.apply(q, k, v, self.plan(plan), scale, self.change)
        return out, lse

    def executed(self, plan: Plan, batch: int, heads: int) -> int:
        return int(plan.pairs.sum()) * batch * heads


class _Changed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, change: Any) -> Any:
        with torch.enable_grad():
            held = [x.detach().requires_grad_() for x in (q, k, v)]
            out, lse = get("cpu").run(*held, plan, scale)
        ctx.held, ctx.out, ctx.change = held, out, change
        none = torch.zeros_like(q)
        got = change(
            large.Run(out.detach().clone(), lse.detach().clone(), none, torch.zeros_like(k), torch.zeros_like(v))
        )
        ctx.mark_non_differentiable(got.lse)
        return got.out, got.lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        dq, dk, dv = torch.autograd.grad(ctx.out, ctx.held, grad)
        got = ctx.change(large.Run(ctx.out.detach().clone(), grad.new_zeros(grad.shape[:3]), dq, dk, dv))
        return got.dq, got.dk, got.dv, None, None, None


def without_a_rectangle(plan: Plan) -> Plan:
    """The last shot's queries do not read their own shot."""
    first, *rest = plan.parts
    edges = first.edges.clone()
    edges[..., -1, :] = False if first.by_table else -1
    return Plan(Part(first.queries, first.keys, edges), *rest)


def with_a_shifted_rectangle(plan: Plan) -> Plan:
    """Chunks begin a token late: as an offset that is wrong by one."""
    *rest, routed = plan.parts
    keys = routed.keys
    offsets = keys.offsets.clone()
    offsets[..., 1:-1] += 1
    return Plan(*rest, Part(routed.queries, Partition(keys.order, offsets, keys.length), routed.edges))


def without_a_chunk(plan: Plan) -> Plan:
    """One head of every query reads one chunk less than it chose."""
    *rest, routed = plan.parts
    edges = routed.edges.clone()
    edges[:, -1, :, -1] = -1
    return Plan(*rest, Part(routed.queries, routed.keys, edges))


def changed(**how: Callable[[Tensor], Tensor]) -> Callable[[large.Run], large.Run]:
    return lambda got: got._replace(**{name: change(getattr(got, name)) for name, change in how.items()})


def zero_rows(x: Tensor) -> Tensor:
    """What a chunk's tile of keys that was never written would hold."""
    x = x.clone()
    x[:, -1, 20:60] = 0
    return x


MUTANTS: dict[str, tuple[Kernel, str]] = {
    "one rectangle missing": (Wrong(plan=without_a_rectangle), "out"),
    "one rectangle shifted": (Wrong(plan=with_a_shifted_rectangle), "out"),
    "a chosen chunk dropped": (Wrong(plan=without_a_chunk), "out"),
    "lse in base 2": (Wrong(changed(lse=lambda x: x / 0.6931471805599453)), "lse"),
    "lse of one part alone": (Wrong(changed(lse=lambda x: x - 0.05)), "lse"),
    "dq without the scale": (Wrong(changed(dq=lambda x: x * DIM**0.5)), "dq"),
    "dq off by two percent": (Wrong(changed(dq=lambda x: x * 1.02)), "dq"),
    "dk lost": (Wrong(changed(dk=torch.zeros_like)), "dk"),
    "dk of one tile lost": (Wrong(changed(dk=zero_rows)), "dk"),
    "dv of one tile lost": (Wrong(changed(dv=zero_rows)), "dv"),
    "heads swapped": (Wrong(changed(out=lambda x: x.flip(1))), "out"),
    "not a number": (Wrong(changed(out=lambda x: x.index_fill(2, torch.tensor([0]), torch.nan))), "out"),
}


@CHECKS
@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_kernels_are_caught(check: Callable[..., list[large.Finding]], name: str) -> None:
    kernel, what = MUTANTS[name]
    plan, given = problem()
    found = {finding.what: finding for finding in check(kernel, plan, given)}
    assert not found[what].passed, found
    assert large.failures(check(Wrong(), plan, given)) == ""  # unchanged, it passes


@CHECKS
@pytest.mark.parametrize("name", [name for name in MUTANTS if "two percent" not in name])
def test_wrong_kernels_are_caught_in_half_precision(check: Callable[..., list[large.Finding]], name: str) -> None:
    kernel, what = MUTANTS[name]
    found = {finding.what: finding for finding in check(kernel, *problem(torch.bfloat16))}
    assert not found[what].passed, found


# -- choosing ---------------------------------------------------------------------------------------------------------


def candidates() -> tuple[Tensor, Tensor, Partition, Tensor, Tensor, int]:
    attention = zoo.build("moc", heads=HEADS, head_dim=DIM, top_k=2, causal="routing")
    static = moc._static(FILM, attention.cut)
    given = large.Inputs.random(len(FILM), HEADS, KV_HEADS, DIM, torch.float32, "cpu", seed=0)
    return given.q, given.k, static.chunks, static.legal, static.kind, 2


def test_the_plain_choice_passes() -> None:
    assert large.check_choice(routing.top_chunks, *candidates()).passed


def swapped(chosen: Tensor, legal: Tensor, kind: Tensor) -> Tensor:
    """One query takes another legal chunk than the best."""
    row = int((legal[kind].sum(-1) > 2).nonzero()[-1])
    left = [chunk for chunk in legal[kind[row]].nonzero()[:, 0].tolist() if chunk not in chosen[0, 1, row].tolist()]
    chosen[0, 1, row, 0] = left[0]
    return chosen


def illegal(chosen: Tensor, legal: Tensor, kind: Tensor) -> Tensor:
    row = int((legal[kind].sum(-1) > 1).nonzero()[0])
    chosen[0, 0, row, 0] = int((~legal[kind[row]]).nonzero()[0])
    return chosen


def repeated(chosen: Tensor, legal: Tensor, kind: Tensor) -> Tensor:
    row = int((legal[kind].sum(-1) > 1).nonzero()[0])
    chosen[0, 0, row] = chosen[0, 0, row, 0]
    return chosen


def fewer(chosen: Tensor, legal: Tensor, kind: Tensor) -> Tensor:
    row = int((legal[kind].sum(-1) > 1).nonzero()[0])
    chosen[0, 0, row, 1] = -1
    return chosen


@pytest.mark.parametrize("change", [swapped, illegal, repeated, fewer])
def test_wrong_choices_are_caught(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    q, k, chunks, legal, kind, top_k = candidates()

    def choose(*given: Any) -> Tensor:
        return change(routing.top_chunks(*given), legal, kind)

    assert not large.check_choice(choose, q, k, chunks, legal, kind, top_k).passed


def test_the_order_within_a_choice_is_free() -> None:
    assert large.check_choice(lambda *given: routing.top_chunks(*given).flip(-1), *candidates()).passed


# -- the film that production's tiles run on --------------------------------------------------------------------------


def test_the_film_reaches_the_dense_path_when_its_threshold_is_lowered() -> None:
    attention = zoo.build("moc", heads=1, head_dim=DIM, top_k=2, causal=None)
    q = torch.zeros(1, 1, len(large.FILM), DIM)
    plan = attention.plan(q, q, large.FILM)
    before = dense.PAIRS
    with large.dense_from(1 << 16):
        assert all(dense.rectangles(part) for part in plan.parts[:-1])
    assert before == dense.PAIRS
    assert 6000 < len(large.FILM) < 7000
    sizes = [int(size) for size in plan.parts[-1].keys.sizes[0, 0]]
    assert any(size % 128 for size in sizes)
    assert max(sizes) >= 4 * 128


def test_findings_are_plain_data() -> None:
    found = large.Finding("dq", 0.5, 0.25)
    assert str(found) == "dq errs by 5.0e-01, allowed is 2.5e-01"
    assert dataclasses.asdict(found) == {"what": "dq", "error": 0.5, "allowed": 0.25}
