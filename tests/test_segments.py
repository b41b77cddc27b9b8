"""Several key sets in one softmax: what plans, branches, kernels and methods make of log-weights of keys."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_zoo as zoo
from sparse_zoo import Branch, Call, Layout, Plan, Segment, Shot, ZooError
from sparse_zoo.blocks import pooled, stretches, whole_film
from sparse_zoo.cost import Cost
from sparse_zoo.diagnostics import diagnose
from sparse_zoo.kernels import _kernels
from sparse_zoo.kernels.varlen import _carrying
from sparse_zoo.ladder import ladder
from sparse_zoo.testing.mutants.kernels import Plain
from sparse_zoo.testing.mutants.segments import Weighing
from sparse_zoo.testing.oracle import mask_of

FILM = Layout.film([Shot(2, 3, 3, 2), Shot(1, 2, 4)], caption=1)


def draws(length: int = len(FILM), *, heads: int = 2, dim: int = 8, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, heads, length, dim), (1, 1, length, dim), (1, 1, length, dim)]
    return [torch.randn(x, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for x in shapes]


class OneBranch(zoo.Attention):
    """Whatever branch it is given."""

    def __init__(self, branch: Branch, **base: Any) -> None:
        super().__init__(heads=2, head_dim=8, **base)
        self.branch = branch

    def branches(self, call: Call) -> list[Branch | zoo.Term]:  # noqa: ARG002
        return [self.branch]


def by_hand(q: Tensor, keys: list[Tensor], values: list[Tensor], masks: list[Tensor], logs: list[Tensor]) -> Tensor:
    scores = torch.cat([q @ k.mT / math.sqrt(q.shape[-1]) + w for k, w in zip(keys, logs, strict=True)], dim=-1)
    return scores.masked_fill(~torch.cat(masks, dim=-1), -torch.inf).softmax(-1) @ torch.cat(values, dim=2)


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_segments_are_one_softmax_over_all_their_keys(kernel: str) -> None:
    q, k, v = draws()
    blocks = stretches(FILM, 4)
    near = Plan.within(FILM.partition("shot"))
    far = whole_film(FILM, blocks)
    means = [pooled(blocks, x) for x in (k, v)]
    log_weight = blocks.sizes.double().log()
    branch = Branch(near, segments=(Segment(far, *means, log_weight),))
    result = OneBranch(branch, kernel=kernel).run(Call(q, k, v, FILM))
    masks = [mask_of(x).expand(1, 2, -1, -1) for x in (near, far)]
    want = by_hand(q, [k, means[0]], [v, means[1]], masks, [torch.zeros(1), log_weight[:, :, None]])
    torch.testing.assert_close(result.out, want, rtol=0, atol=1e-12)
    given = [torch.autograd.grad(x.square().sum(), (q, k, v), retain_graph=True) for x in (result.out, want)]
    for ours, right in zip(*given, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-10)
    assert result.cost() == Cost.of(2 * int(near.pairs + far.pairs), 2 * FILM.dense_pairs, 8)
    (plan,) = result.plans
    assert plan.first_segment is near
    assert [x.branch for x in diagnose(Call(q, k, v, FILM), result.plans)] == [0]


def test_every_token_as_a_key_of_its_own_in_a_second_segment_is_dense() -> None:
    q, k, v = draws()
    film = Plan.dense(FILM)
    halves = [film.keep(torch.arange(len(FILM)) < 0), film]
    branch = Branch(halves[0], segments=(Segment(halves[1], k, v, torch.zeros(1, 1, len(FILM))),))
    out = OneBranch(branch).run(Call(q, k, v, FILM)).out
    torch.testing.assert_close(out, zoo.attend(q, k, v, film).out, rtol=0, atol=1e-12)


def test_a_log_weight_of_log_2_counts_a_key_twice() -> None:
    q, k, v = draws(5)
    plan = Plan.groups(torch.zeros(5, dtype=torch.int64))
    weight = torch.tensor([0.0, 0.0, math.log(2), 0.0, 0.0])[None, None]
    twice = torch.tensor([0, 1, 2, 2, 3, 4])
    want = zoo.attend(q, k[:, :, twice], v[:, :, twice], Plan.groups(torch.zeros(5).long(), torch.zeros(6).long()))
    got = zoo.attend(q, k, v, plan.weighted(weight))
    torch.testing.assert_close(got.out, want.out, rtol=0, atol=1e-7)
    torch.testing.assert_close(got.lse, want.lse, rtol=0, atol=1e-7)


def test_a_kernel_that_does_not_weigh_keys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draws(4)
    plan = Plan.groups(torch.zeros(4, dtype=torch.int64))
    monkeypatch.setitem(_kernels, "plain", Plain())
    monkeypatch.setitem(_kernels, "weighing", Weighing())
    zoo.attend(q, k, v, plan, kernel="plain")
    with pytest.raises(
        ZooError, match=r"log-weights of keys, which it does not add to scores; kernels that do: .*weighing"
    ):
        zoo.attend(q, k, v, plan.weighted(torch.ones(1, 1, 4)), kernel="plain")
    zoo.attend(q, k, v, plan.weighted(torch.ones(1, 1, 4)), kernel="weighing")


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.ones(4), r"log_weight must be \(B\|1, H\|1, 4\)"),
        (torch.ones(1, 1, 3), r"log_weight must be \(B\|1, H\|1, 4\)"),
        (torch.ones(1, 1, 4).long(), "floating-point"),
        (torch.ones(1, 1, 4, requires_grad=True), "passes no gradient on"),
    ],
)
def test_log_weights_that_do_not_fit_are_refused(weight: Tensor, reason: str) -> None:
    with pytest.raises(ZooError, match=reason):
        Plan.groups(torch.zeros(4, dtype=torch.int64)).weighted(weight)


def test_log_weights_of_other_heads_and_segments_of_other_shapes_are_refused() -> None:
    q, k, v = draws(4)
    plan = Plan.groups(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ZooError, match=r"log-weights of part 0 are \(1, 3, 4\)"):
        zoo.attend(q, k, v, plan.weighted(torch.ones(1, 3, 4)))
    wrong = Branch(plan, segments=(Segment(plan, k.float(), v),))
    with pytest.raises(ZooError, match="segment 1 has k"):
        wrong.tensors(Call(q, k, v, Layout.film([Shot(1, 2, 2)])))


def test_weights_stay_with_what_is_made_of_a_plan() -> None:
    plan = Plan.groups(torch.arange(6) // 3).weighted(torch.arange(6.0)[None, None])
    rows = torch.tensor([4, 1])
    for made in (plan.narrow(rows), plan.keep(torch.arange(6) < 4), Plan.groups(torch.arange(6) // 2) | plan):
        assert torch.equal(made.parts[-1].log_weight, torch.arange(6.0)[None, None])
    placed = Plan.beside(Plan.groups(torch.zeros(6).long(), torch.zeros(2).long()), plan)
    assert placed.shape == (6, 8)
    assert placed.parts[0].log_weight is None
    assert torch.equal(placed.parts[1].log_weight[0, 0], torch.tensor([0.0, 0, 0, 1, 2, 3, 4, 5]))
    assert torch.equal(placed.dense_mask()[0, 0, :, 2:], plan.dense_mask()[0, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_channels_that_carry_weights_are_as_exact_as_float32(dtype: torch.dtype) -> None:
    """For engines of flash attention, which take no weights."""
    q, k, v = (x.detach()[0, 0, :, None] for x in draws(9, dim=16, dtype=dtype))
    bias = torch.linspace(0.1, 9.7, len(k)) * 4.0  # log-weights over the scale
    wide = _carrying(q, k, v, bias)
    assert {x.shape[-1] for x in wide} == {24}
    added = wide[0][:, 0].double() @ wide[1][:, 0].double().T - q[:, 0].double() @ k[:, 0].double().T
    torch.testing.assert_close(added, bias.double().expand_as(added), rtol=1e-6, atol=1e-6)
    with pytest.raises(ZooError, match="head dim 256; at most 248"):
        _carrying(torch.zeros(1, 1, 256), torch.zeros(1, 1, 256), torch.zeros(1, 1, 256), torch.zeros(1))


def test_flex_adds_log_weights() -> None:
    q, k, v = (x.detach().float() for x in draws(10, dim=16))
    plan = Plan.groups(torch.arange(10) // 5) | Plan.groups(torch.arange(10) % 2)
    weighted = Plan(plan.parts[0], *plan.weighted(torch.randn(1, 2, 10)).parts[1:])
    got, want = (zoo.attend(q, k, v, weighted, kernel=name) for name in ("flex", "reference"))
    torch.testing.assert_close(got.out, want.out)
    torch.testing.assert_close(got.lse, want.lse)


@pytest.mark.parametrize("name", ["sol", "bsa", "sla2"])
def test_the_ladder_gives_the_methods_own_output(name: str) -> None:
    """Its method's rung has the error of what runs, key sets and rows of single heads too."""
    q, k, v = (x.detach() for x in draws())
    attention: Any = zoo.build(name, heads=2, head_dim=8, dim=6, **dict(zoo.get(name).small)).double().eval()
    call = Call(q, k, v, FILM)
    dense = zoo.attend(q, k, v, Plan.dense(FILM)).out
    error = ((attention.run(call).out - dense).square().sum((2, 3)) / dense.square().sum((2, 3))).sqrt()
    torch.testing.assert_close(ladder(attention, call, draws=1).rungs["method"].error, error.double())
