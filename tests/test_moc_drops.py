"""MoC's drop-off and drop-in: how many, which, and of what they are functions."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_zoo as zoo
from sparse_zoo import Call, Layout, Shot, routing
from sparse_zoo.methods.moc import MoC
from sparse_zoo.testing.routing import moc as slow_moc
from sparse_zoo.testing.suite import some

FILM = Layout.film([Shot(3, 4, 4, 3), Shot(1, 5, 3), Shot(4, 4, 4, 2)], caption=2)
MANY = Layout.film([Shot(1, 2, 4) for _ in range(100)])
"""Chunks of 8 tokens; shot s has s before it."""


def make(film: Layout = FILM, batch: int = 2, heads: int = 4, **context: Any) -> Call:
    q, k, v = (torch.randn(batch, heads, len(film), 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    return Call(q, k, v, film, **({"seed": 1, "step": 7, "layer": 2} | context))


def build(**settings: Any) -> MoC:
    """In training mode."""
    return MoC(heads=4, head_dim=8, **settings)


def chosen(attention: MoC, call: Call) -> tuple[Tensor, Tensor]:
    """Routed tables, bool (B, H, L, C), without and with what training changes."""
    tables = []
    for mode in (False, True):
        (branch,) = attention.train(mode).branches(call)
        assert isinstance(branch, zoo.Branch)
        tables.append(branch.plan.parts[-1].table)
    return tables[0], tables[1]


def mean_and_bound(x: Tensor) -> tuple[float, float]:
    """And four times its standard error."""
    x = x.double().flatten()
    return float(x.mean()), 4 * float(x.std()) / math.sqrt(len(x))


@pytest.mark.parametrize("p_max", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("top_k", [1, 2, 5, 20])
def test_drop_off_leaves_out_as_many_as_the_formula_says(top_k: int, p_max: float) -> None:
    call = make(MANY)
    before, after = chosen(build(top_k=top_k, anchors=("shot",), drop_off=p_max), call)
    assert not (after & ~before).any()
    n, left = before.sum(-1), after.sum(-1)
    full = n == top_k
    assert bool(full.any())
    # floor(p·n) >= m for p >= m / n: its mean is the sum of these chances.
    want = sum(1 - m / (top_k * p_max) for m in range(1, top_k) if m < top_k * p_max)
    got, bound = mean_and_bound((n - left)[full])
    assert abs(got - want) <= bound
    assert bool((n - left <= (n * p_max).floor()).all())
    assert bool(left[n > 0].all()), "at least one is left"


def test_drop_off_takes_every_rank_alike_and_keeps_the_order() -> None:
    call, chunks = make(MANY, batch=1), MANY.chunks("frame")
    earlier = torch.arange(100) < torch.arange(100)[:, None]
    ranked = routing.top_chunks(call.q, call.k, chunks, earlier, MANY.shot, 4)
    drops = routing.Drops(call, off=0.9, into=0.0)
    changed = routing.top_chunks(call.q, call.k, chunks, earlier, MANY.shot, 4, drops)
    gone = changed != ranked
    assert bool((changed[gone] == -1).all())
    share = gone[ranked[..., -1] >= 0].double()
    assert float((share.mean(0) - share.mean()).abs().max()) < 4 * 0.5 / math.sqrt(len(share))


@pytest.mark.parametrize("mean", [0.2, 1.0, 3.0, 30.0])
def test_drop_in_adds_a_poisson_number_of_legal_chunks(mean: float) -> None:
    call = make(MANY)
    before, after = chosen(build(top_k=2, anchors=("shot",), drop_in=mean), call)
    assert not (before & ~after).any()
    later = torch.arange(100) >= MANY.shot[:, None]
    assert not (after & later).any()
    added = (after & ~before).sum(-1)
    free = (MANY.shot - 2).clamp(min=0)  # candidates that are left
    assert bool((added <= free).all())
    enough = (free > mean + 7 * math.sqrt(mean) + 8) & (MANY.shot > 2)
    sample = added[0][:, enough].double()  # batch items draw alike
    got, bound = mean_and_bound(sample)
    assert abs(got - mean) <= bound
    assert float(sample.var()) == pytest.approx(mean, rel=6 * math.sqrt((2 + 1 / mean) / sample.numel()))
    for m in range(4):
        chance = math.exp(m * math.log(mean) - mean) / math.factorial(m)
        share = float((sample == m).double().mean())
        assert abs(share - chance) <= 4 * math.sqrt(chance * (1 - chance) / sample.numel()) + 1e-6
    if mean == 30.0:
        few = (MANY.shot > 2) & (free < 5)
        assert bool((added[:, :, few] == free[few]).all()), "fewer candidates than asked for: all of them"


def test_drop_in_picks_every_candidate_alike() -> None:
    call = make(MANY, batch=1)
    before, after = chosen(build(top_k=2, anchors=("shot",), drop_in=2.0), call)
    last = MANY.shot >= 90
    open_ = (~before[:, :, last] & (torch.arange(100) < MANY.shot[last][:, None])).double()
    came = (after & ~before)[:, :, last].double()
    want = (open_ * 2.0 / open_.sum(-1, keepdim=True)).sum((0, 1, 2))
    got = came.sum((0, 1, 2))
    assert float(((got - want).abs() / want.clamp(min=1).sqrt()).max()) < 5


def test_what_was_left_out_does_not_come_back_and_what_comes_in_may_pass_top_k() -> None:
    call = make(MANY)
    before, after = chosen(build(top_k=2, anchors=("shot",), drop_off=1.0, drop_in=5.0), call)
    alone = chosen(build(top_k=2, anchors=("shot",), drop_off=1.0), call)[1]
    assert torch.equal(after & before, alone)
    assert int(after.sum(-1).max()) > 2


STRADDLING = {"chunk": "fixed", "chunk_tokens": 7, "causal": None}


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 3, "causal": None},
        {"top_k": 1, "anchors": ("chunk",), "chunk": "tokens", "chunk_tokens": 32},
        {"top_k": 3, "anchors": (), "causal": "strict"},
        {"top_k": 999, "causal": None, "anchors": ("chunk",)},
        {"top_k": 2, **STRADDLING},
        {"top_k": 2, "anchors": ("text", "shot", "chunk"), **STRADDLING},
    ],
    ids=str,
)
def test_training_is_the_slow_training(settings: dict[str, Any], film: Layout) -> None:
    """Plans; outputs and gradients by a plain masked softmax of the slow rule's mask, in float64."""
    call = make(film)
    attention = build(drop_off=0.9, drop_in=1.5, **settings)
    result = attention.run(call)
    result.plans[0].validate()
    ((mask, _),) = slow_moc(attention, call)
    got = result.plans[0].dense_mask().expand_as(mask)
    assert torch.equal(got, mask), some(got != mask)
    scores = (call.q @ call.k.transpose(-1, -2) / 8**0.5).masked_fill(~mask, -torch.inf)
    want = scores.softmax(-1).nan_to_num(0.0).masked_fill(~mask, 0.0) @ call.v
    torch.testing.assert_close(result.out, want, rtol=0, atol=1e-12)
    weight = torch.randn_like(want)
    # A softmax over nothing has no gradient of its own: such rows are left out of the oracle's.
    weight = weight.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    filled = scores.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    oracle = torch.autograd.grad((filled.softmax(-1) @ call.v * weight).sum(), [call.q, call.k, call.v])
    grads = torch.autograd.grad((result.out * weight).sum(), [call.q, call.k, call.v])
    for ours, right in zip(grads, oracle, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)


def test_draws_are_those_of_the_seed_step_layer_head_and_token_alone() -> None:
    call, attention = make(), build(top_k=2, causal=None, drop_off=0.9, drop_in=1.0)

    def mask(call: Call) -> Tensor:
        return attention.run(call).plans[0].dense_mask()

    whole = mask(call)
    for change in ({"seed": 2}, {"step": 8}, {"layer": 3}, {"head_offset": 1}):
        assert not torch.equal(mask(replace(call, **change)), whole), change
    heads = replace(call, q=call.q[:, 2:], k=call.k[:, 2:], v=call.v[:, 2:], head_offset=2)
    assert torch.equal(mask(heads), whole[:, 2:])
    rows = torch.tensor([5, 100, 3, 60])
    assert torch.equal(mask(replace(call, q=call.q[:, :, rows], q_rows=rows)), whole[:, :, rows])
    torch.manual_seed(5)
    assert torch.equal(mask(call), whole)


def test_batch_items_draw_alike_and_heads_apart() -> None:
    call = make(batch=1)
    call = replace(
        call, q=call.q[:, :1].expand(2, 4, -1, -1), k=call.k[:, :1].expand(2, 4, -1, -1), v=call.v.expand(2, 4, -1, -1)
    )
    mask = build(top_k=3, causal=None, drop_off=0.9, drop_in=1.0).run(call).plans[0].dense_mask()
    assert torch.equal(mask[0], mask[1])
    assert not torch.equal(mask[:, 0], mask[:, 1])


def test_blocks_of_rows_draw_what_all_rows_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    call, attention = make(), build(top_k=2, causal=None, drop_off=0.9, drop_in=1.0)
    whole = attention.run(call).plans[0].dense_mask()
    monkeypatch.setattr(routing, "BLOCK_SCORES", 999)
    assert torch.equal(attention.run(call).plans[0].dense_mask(), whole)


@pytest.mark.parametrize(
    ("attention", "mode"),
    [
        pytest.param(lambda: build(top_k=2), True, id="nothing is dropped"),
        pytest.param(lambda: build(top_k=2, drop_off=0.9, drop_in=1.0), False, id="eval mode"),
    ],
)
def test_no_random_numbers_are_used_without_drops(
    attention: Callable[[], MoC], mode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Tensor:
        raise AssertionError("numbers were drawn")

    call = make()
    plain = build(top_k=2).eval().run(call)
    monkeypatch.setattr(routing, "uniform", fail)
    result = attention().train(mode).run(call)
    assert torch.equal(result.out, plain.out)
    assert [part.edges.shape for part in result.plans[0].parts] == [part.edges.shape for part in plain.plans[0].parts]


def test_shapes_do_not_depend_on_draws() -> None:
    attention = build(top_k=2, drop_off=0.9, drop_in=0.5)
    shapes = {tuple(attention.run(make(step=step)).plans[0].parts[-1].edges.shape) for step in range(5)}
    assert len(shapes) == 1
    # 2 chosen, and as many as a draw of 24 bits can bring in: P(more than 8) is the first below 2^-24.
    ((*_, width),) = shapes
    assert width == 2 + 8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"drop_off": -0.1}, "drop_off must be in [0, 1], got -0.1"),
        ({"drop_off": 1.5}, "drop_off must be in [0, 1], got 1.5"),
        ({"drop_off": math.nan}, "drop_off must be in [0, 1], got nan"),
        ({"drop_in": -1}, "drop_in must be at least 0 and finite, got -1"),
        ({"drop_in": math.inf}, "drop_in must be at least 0 and finite, got inf"),
    ],
)
@pytest.mark.parametrize("name", ["moc", "moc_fixed"])
def test_impossible_drops_are_refused(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(zoo.ZooError) as error:
        zoo.build(name, heads=4, head_dim=8, **settings)
    assert said in str(error.value)
