"""The flex kernel: its blocks against brute force, its forward by the shipped suite, its merge with gradients."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import check, inputs
from test_plan import plans
from torch import Tensor
from torch.nn.attention import flex_attention

import sparse_zoo as zoo
from sparse_zoo import testing
from sparse_zoo.kernels import flex, get
from sparse_zoo.kernels.flex import Flex
from sparse_zoo.testing import kernel_checks, run_kernel_checks


class Forward(Flex):
    """Flex's forward with the oracle's backward, since on the CPU it has none of its own."""

    name = "flex_forward"

    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:
        return super().why_not(*(x if x is None else x.detach() for x in (q, v)))

    def run(self, q: Tensor, k: Tensor, v: Tensor, plan: zoo.Plan, scale: float) -> tuple[Tensor, Tensor]:
        out, _ = get("reference").run(q, k, v, plan, scale)
        with torch.no_grad():
            ours, lse = super().run(q, k, v, plan, scale)
            difference = ours - out
        return out + difference, lse


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_forward_conforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # the same sums, sooner
    monkeypatch.setattr(flex, "BLOCK", 16)
    monkeypatch.setattr(testing.kernels, "SEEDED", 8)
    wanted = set(kernel_checks()) - {"kernel_gradients", "kernel_drawn_plans", "kernel_many_rectangles"}
    found = list(run_kernel_checks(Forward(), only=wanted))
    assert {outcome.check: outcome.reason for outcome in found if outcome.status != "passed"} == {}


@given(plan=plans(), block=st.sampled_from([2, 4, 16]))
@settings(max_examples=40, deadline=None)
def test_blocks_hold_what_the_plan_holds(plan: zoo.Plan, block: int) -> None:
    """Listed are the blocks with some pair, as full just those with all; the mask tells the pairs of the others."""
    batch, heads = 2, 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", block)
        for part in plan.parts:
            made = flex._build(part, batch, heads)
            lengths = made.q_order.shape[-1], made.k_order.shape[-1]
            dense = part.mask().expand(batch, heads, -1, -1)
            q_order, k_order = made.q_order.expand(batch, heads, -1), made.k_order.expand(batch, heads, -1)
            want = torch.zeros(batch, heads, *lengths, dtype=torch.bool)
            for b in range(batch):
                for h in range(heads):
                    sorted_pairs = dense[b, h][q_order[b, h, : dense.shape[2]]][:, k_order[b, h, : dense.shape[3]]]
                    want[b, h, : dense.shape[2], : dense.shape[3]] = sorted_pairs
            place = [torch.arange(n) for n in (batch, heads, *lengths)]
            grid = torch.meshgrid(*place, indexing="ij")
            assert torch.equal(made.mask.mask_mod(*grid), want)
            blocks = want.unflatten(3, (-1, block)).unflatten(2, (-1, block))
            some, every = blocks.any(-1).any(-2), blocks.all(-1).all(-2)
            full = listed(made.mask.full_kv_num_blocks, made.mask.full_kv_indices).expand_as(some)
            assert torch.equal(full, every)
            partial = listed(made.mask.kv_num_blocks, made.mask.kv_indices).expand_as(some)
            assert torch.equal(partial, some & ~every)
            assert made.number == int(some.sum())
            assert torch.equal(
                q_order.gather(2, made.q_place.expand(batch, heads, -1)),
                torch.arange(dense.shape[2]).expand(batch, heads, -1),
            )


def listed(number: Tensor, indices: Tensor) -> Tensor:
    """A table (B, H, rows, columns) of the blocks that BlockMask lists."""
    first = torch.arange(indices.shape[-1]) < number[..., None]
    return torch.zeros_like(first).scatter(-1, indices.long(), first)


def plain_flex(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> tuple[Tensor, Any]:
    """What `flex_attention` promises, lse with gradient included, whatever the dtype."""
    if rest["enable_gqa"]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    assert q.shape[1] == k.shape[1]
    grid = torch.meshgrid(*(torch.arange(n) for n in (*q.shape[:3], k.shape[2])), indexing="ij")
    mask = rest["block_mask"].mask_mod(*grid)
    reached = mask.any(-1)
    scores = (q @ k.mT * rest["scale"]).masked_fill(~mask & reached[..., None], -torch.inf)
    scores = scores.masked_fill(~reached[..., None], 0)
    out = (scores.softmax(-1) * reached[..., None]) @ v
    return out, flex.AuxRequest(lse=scores.logsumexp(-1).masked_fill(~reached, -torch.inf))


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_parts_merge_with_their_gradients(data: st.DataObject) -> None:
    """The kernel's own work, forward and backward, with `flex_attention` played by plain code in float64."""
    plan = data.draw(plans()) | data.draw(plans())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "_flex", plain_flex)
        patch.setattr(Flex, "why_not", lambda *_: [])
        torch.manual_seed(1)
        check("flex", plan, inputs(23, 23, kv_heads=data.draw(st.sampled_from([1, 2]))), atol=1e-12)


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    film = zoo.Layout.film([zoo.Shot(2, 3, 3)])
    q = torch.randn(1, 1, 18, 16, requires_grad=True)
    routed = zoo.Plan.routed(film.chunks("frame"), torch.zeros(1, 1, 18, 1, dtype=torch.int64))
    with pytest.raises(zoo.ZooError, match="it has no backward on the CPU"):
        zoo.attend(q, q, q, routed, kernel="flex")
    assert routed.executed("flex") == 128 * 128  # below the bound it is computed, in whole blocks
    monkeypatch.setattr(flex, "FEW_TOKENS", 17)
    with pytest.raises(zoo.ZooError, match="part 0 lets each of 18 query tokens choose its keys"), torch.no_grad():
        zoo.attend(q, q, q, routed, kernel="flex")
    assert routed.executed("flex", batch=2, heads=3) == 2 * 3 * 18 * 18
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(zoo.ZooError, match="'flex' cannot be checked here: needs a CUDA device for a backward pass"):
        list(run_kernel_checks("flex"))
    assert zoo.kernels()["flex"] == ["needs a CUDA device for a backward pass, torch sees none"]
    assert "float64 is not float32" in flex.Flex().why_not(q.detach().double(), q.detach().double())[0]


def test_like_plans_have_like_shapes() -> None:
    """No compilation for every film: lengths and numbers of pieces are rounded up, by less than a quarter."""
    shapes = set()
    for frames in (31, 32, 33):
        film = zoo.Layout.film([zoo.Shot(frames, 3, 5), zoo.Shot(4, 3, 5)])
        (part,) = zoo.Plan.within(film.chunks("frame")).parts
        made = flex._build(part, 1, 2)
        shapes.add(
            (made.q_order.shape, made.mask.kv_indices.shape, made.mask.mask_mod.__closure__[0].cell_contents.shape)
        )
    assert len(shapes) == 1
    for step in (1, 64, 128):
        rooms = [flex._room(size, step) for size in range(1, 5000)]
        assert all(size <= room < 1.25 * size + step for size, room in enumerate(rooms, start=1))
        assert all(room % step == 0 for room in rooms)
        assert len(set(rooms)) < 50 if step == 1 else True


def test_heads_alike_and_apart_are_compiled_once() -> None:
    """What FlexAttention compiles for is the shape and the strides of what its mask reads."""
    seen = set()
    for lead in itertools.product((1, 2), (1, 3)):
        queries, keys = (torch.randint(4, (*lead, 40)) for _ in range(2))
        (part,) = zoo.Plan.groups(queries, keys, count=4).parts
        read = [cell.cell_contents for cell in flex._build(part, 2, 3).mask.mask_mod.__closure__]
        seen.add(tuple((x.shape, x.stride()) for x in read))
    assert len(seen) == 1
