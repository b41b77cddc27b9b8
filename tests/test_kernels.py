"""Kernels against an oracle written here: masked softmax in float64, with gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import plans
from torch import Tensor

import sparse_zoo as zoo
from sparse_zoo.kernels import grouped
from sparse_zoo.kernels.rectangles import Rectangles, rectangles
from sparse_zoo.partition import Partition


def oracle(q: Tensor, k: Tensor, v: Tensor, plan: zoo.Plan) -> tuple[Tensor, Tensor]:
    share = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(share, 1), v.double().repeat_interleave(share, 1)
    mask = plan.dense_mask().expand(q.shape[0], q.shape[1], -1, -1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    top = scores.detach().masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = torch.where(mask, (scores.masked_fill(~mask, 0) - top).exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    lse = total[..., 0].log() + top[..., 0]
    return torch.einsum("bhij,bhjd->bhid", weights / torch.where(total > 0, total, 1.0), v), lse


def inputs(q_length: int, k_length: int, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(2, 2, q_length, 8), (2, kv_heads, k_length, 8), (2, kv_heads, k_length, 8)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def check(kernel: str, plan: zoo.Plan, tensors: list[Tensor], atol: float) -> None:
    got = zoo.attend(*tensors, plan, kernel=kernel)
    want, want_lse = oracle(*tensors, plan)
    assert got.kernel == kernel
    weight = torch.randn_like(want)
    grads = torch.autograd.grad(got.out, tensors, weight.to(got.out.dtype))
    want_grads = torch.autograd.grad(want, tensors, weight)
    torch.testing.assert_close(got.out.double(), want, rtol=0, atol=atol)
    torch.testing.assert_close(got.lse.double(), want_lse.double(), rtol=0, atol=atol)
    for grad, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_plan_forward_and_backward(kernel: str, data: st.DataObject) -> None:
    plan = data.draw(plans()) | data.draw(plans())
    torch.manual_seed(1)
    check(kernel, plan, inputs(23, 23, kv_heads=data.draw(st.sampled_from([1, 2]))), atol=1e-12)


@given(plan=plans(q_length=5, k_length=17))
@settings(max_examples=20, deadline=None)
def test_fewer_queries_than_keys(plan: zoo.Plan) -> None:
    torch.manual_seed(1)
    check("cpu", plan, inputs(5, 17), atol=1e-12)


def test_float32_stays_close_to_float64() -> None:
    film = zoo.Layout.film([zoo.Shot(4, 8, 8), zoo.Shot(3, 7, 5)])
    plan = zoo.Plan.within(film.chunks("frame")) | zoo.Plan.routed(
        film.chunks("fixed", tokens=37), torch.randint(0, 9, (2, 2, len(film), 1))
    )
    check("cpu", plan, inputs(len(film), len(film), dtype=torch.float32), atol=5e-6)


def test_half_precision_errs_no_more_than_eager_does() -> None:
    film = zoo.Layout.film([zoo.Shot(4, 8, 8), zoo.Shot(3, 7, 5)])
    plan = zoo.Plan.within(film.chunks("frame")) | zoo.Plan.within(film.chunks("fixed", tokens=41))
    exact = inputs(len(film), len(film))
    want, _ = oracle(*exact, plan)
    halves = [x.detach().bfloat16() for x in exact]
    ours = zoo.attend(*halves, plan, kernel="cpu").out
    scores = (halves[0] @ halves[1].transpose(-1, -2) * 8**-0.5).masked_fill(~plan.dense_mask(), -torch.inf)
    eager = scores.softmax(-1) @ halves[2]
    assert (ours.double() - want).abs().max() <= 1.5 * (eager.double() - want).abs().max()


def test_very_negative_and_very_large_scores() -> None:
    film = zoo.Layout.film([zoo.Shot(2, 3, 3), zoo.Shot(1, 3, 3)])
    plan = zoo.Plan.within(film.chunks("frame")) | zoo.Plan.within(film.chunks("shot"))
    for scale in (-40.0, 40.0):
        q, k, v = inputs(len(film), len(film))
        q = (q.detach().abs() * scale).requires_grad_()
        k = (k.detach().abs() * 40).requires_grad_()
        check("cpu", plan, [q, k, v], atol=1e-9)


def test_queries_without_keys() -> None:
    labels = torch.tensor([0, 0, -1, 1, -1])
    tensors = inputs(5, 5)
    for kernel in ("reference", "cpu"):
        out, lse, _ = zoo.attend(*tensors, zoo.Plan.groups(labels), kernel=kernel)
        assert torch.equal(out[:, :, [2, 4]], torch.zeros(2, 2, 2, 8, dtype=torch.float64))
        assert bool((lse[:, :, [2, 4]] == -torch.inf).all())
        (dq,) = torch.autograd.grad(out.sum(), tensors[0])
        assert bool((dq[:, :, [2, 4]] == 0).all())


def test_nobody_attends_to_anything() -> None:
    out, lse, _ = zoo.attend(*inputs(5, 5), zoo.Plan.groups(torch.full((5,), -1), count=1), kernel="cpu")
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())


def test_pieces_of_nothing() -> None:
    pieces = Partition.from_labels(torch.full((5,), -1), 0)
    nothing = zoo.Plan.blocks(pieces, pieces, torch.zeros(0, 0, dtype=torch.bool))
    assert bool((zoo.attend(*inputs(5, 5), nothing, kernel="cpu").out == 0).all())


def test_more_rectangles_than_a_grid_dimension_holds() -> None:
    length = 70_000
    q, k, v = (torch.randn(1, 1, length, 8, dtype=torch.float64) for _ in range(3))
    out, _, _ = zoo.attend(q, k, v, zoo.Plan.groups(torch.arange(length)), kernel="cpu")
    torch.testing.assert_close(out, v, rtol=0, atol=1e-12)


def test_strided_inputs_are_read_right_and_left_alone() -> None:
    film = zoo.Layout.film([zoo.Shot(2, 3, 3)])
    packed = torch.randn(1, len(film), 3, 2, 8, dtype=torch.float64)
    before = packed.clone()
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    out = zoo.attend(q, k, v, zoo.Plan.dense(film)).out
    torch.testing.assert_close(out, oracle(q, k, v, zoo.Plan.dense(film))[0], rtol=0, atol=1e-12)
    assert torch.equal(packed, before)


def test_slabs_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    film = zoo.Layout.film([zoo.Shot(4, 4, 4), zoo.Shot(3, 3, 5)])
    plan = zoo.Plan.within(film.chunks("shot")) | zoo.Plan.within(film.chunks("fixed", tokens=11))
    tensors = inputs(len(film), len(film))
    monkeypatch.setattr(grouped, "SLAB_BYTES", 1)
    monkeypatch.setattr(grouped, "BATCH_BYTES", 1)
    check("cpu", plan, tensors, atol=1e-12)


def test_queries_of_the_same_keys_share_one_rectangle() -> None:
    film = zoo.Layout.film([zoo.Shot(4, 3, 5, text=2)])  # 4 x 3 x 5 tiles of one token; windows are pushed inside
    plan = zoo.build("window", heads=1, head_dim=8, tile=(1, 1, 1), window=(3, 3, 3)).plan(*inputs(62, 62)[:2], film)
    video = rectangles(plan, 1, 1)[0]
    assert len(video) == 2 * 1 * 3
    assert int((video.q_size * video.k_size).sum()) == int(zoo.Plan(plan.parts[0]).dense_mask().sum())
    check("cpu", plan, inputs(62, 62), 1e-12)


@pytest.mark.parametrize("per_head", [False, True])
def test_either_way_of_making_rectangles_holds_the_same_pairs(per_head: bool) -> None:
    film = zoo.Layout.film([zoo.Shot(4, 3, 5, text=2), zoo.Shot(3, 2, 2)])
    queries, keys = film.chunks("frame"), film.chunks("fixed", tokens=4)
    draw = torch.Generator().manual_seed(0)
    wanted = torch.rand(2, 3 if per_head else 1, queries.count, keys.count, generator=draw) < 0.4
    wanted[..., 1, :] = wanted[..., 0, :]  # pieces to be joined on both sides
    wanted[..., 3] = wanted[..., 2]
    plan = zoo.Plan.blocks(queries, keys, wanted if per_head else wanted[:1])
    shapes = []
    for cost in (lambda q, k: q + 1000 * k, lambda q, k: k + 1000 * q):
        (rects,) = rectangles(plan, 2, 3, cost)
        held = torch.zeros(6, len(film), len(film), dtype=torch.int64)
        for r in range(len(rects)):
            rows = rects.q_list[rects.q_start[r] :][: rects.q_size[r]].long()
            cols = rects.k_list[rects.k_start[r] :][: rects.k_size[r]].long()
            held[rects.group[r], rows[:, None], cols] += 1
        assert torch.equal(held.view(2, 3, *held.shape[1:]), plan.dense_mask().long().expand(2, 3, -1, -1))
        shapes.append((int(rects.q_size.sum()), int(rects.k_size.sum())))
    assert shapes[0][1] < shapes[1][1]
    assert shapes[0][0] > shapes[1][0]


def test_large_rectangles_are_cut_between_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    film = zoo.Layout.film([zoo.Shot(4, 5, 5), zoo.Shot(1, 2, 3)])
    plan = zoo.Plan.within(film.chunks("shot"))
    (rects,) = rectangles(plan, 1, 2)
    monkeypatch.setattr(grouped, "LEAST_QUERIES", 7)
    cut = grouped._cut(rects, 120)
    assert int(cut.q_size.max()) == 50  # half the keys; 120 - 100 would gather keys too often
    assert int((cut.q_size * cut.k_size).sum()) == int((rects.q_size * rects.k_size).sum())
    assert int(grouped._cut(rects, 170).q_size.max()) <= 70
    assert grouped._cut(rects, 10_000) is rects
    monkeypatch.setattr(grouped, "_budget", lambda _: 1)
    check("cpu", plan, inputs(len(film), len(film)), 1e-12)


def sized(q_size: list[int], k_size: list[int]) -> Rectangles:
    """Rectangles of these sizes, on lists of their own."""
    sizes = torch.tensor(q_size), torch.tensor(k_size)
    lists = [torch.arange(int(size.sum()), dtype=torch.int32) for size in sizes]
    starts = [size.cumsum(0) - size for size in sizes]
    return Rectangles(*lists, starts[0], sizes[0], starts[1], sizes[1], torch.arange(len(q_size)))


def test_batches_are_rounds_of_the_threads_padded_little(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    draw = torch.Generator().manual_seed(0)
    growing = torch.arange(1000, 1080, 4)[torch.randperm(20, generator=draw)].tolist()
    q_size = growing + torch.randint(500, 3000, (11,), generator=draw).tolist()
    k_size = [512] * 20 + [2048] * 11
    batches = list(grouped._alike(sized(q_size, k_size), 1, 1 << 40))
    assert sorted(torch.cat([batch.group for batch in batches]).tolist()) == list(range(31))
    assert len(batches) < 7 + 4  # 20 and 11 rectangles, by threes
    for keys, sizes in ((512, q_size[:20]), (2048, q_size[20:])):
        some = [batch for batch in batches if int(batch.k_size[0]) == keys]
        assert all(bool((batch.k_size == keys).all()) for batch in some)
        spent = [-(-len(batch) // threads) * int(batch.q_size.max()) for batch in some]
        rising = sorted(sizes)
        least = sum(max(rising[start : start + threads]) for start in range(0, len(rising), threads))
        assert threads * keys * (sum(spent) - least) <= grouped.PAIRS_OF_A_CALL * len(some)


def test_lone_rectangles_share_a_round_where_an_idle_thread_costs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert [len(batch) for batch in grouped._alike(sized([1000, 1000], [512, 600]), 1, 1 << 40)] == [2]
    assert [len(batch) for batch in grouped._alike(sized([3000, 500], [512, 2048]), 1, 1 << 40)] == [1, 1]


def test_a_batch_cut_for_its_memory_is_cut_between_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    rows_of_five = 5 * (1000 + 500)
    batches = grouped._alike(sized([1000] * 8, [500] * 8), 1, 4 * rows_of_five)
    assert [len(batch) for batch in batches] == [6, 2]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_rounds_change_nothing(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    film = zoo.Layout.film([zoo.Shot(2, 3, 3), zoo.Shot(3, 2, 5, text=2), zoo.Shot(1, 4, 4)], caption=3)
    chosen = torch.rand(2, 2, len(film), film.chunks("frame").count).argsort(dim=-1)[..., :2].int()
    plan = zoo.Plan.within(film.chunks("shot")) | zoo.Plan.routed(film.chunks("frame"), chosen)
    check("cpu", plan, inputs(len(film), len(film)), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_padding_pass_nothing_on(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(grouped, "PAIRS_OF_A_CALL", 1 << 40)
    q_labels, k_labels = torch.tensor([0] + [1] * 40), torch.tensor([0] * 7 + [1] * 9)
    q, k, v = inputs(41, 16, dtype=dtype)
    out = zoo.attend(q, k, v, zoo.Plan.groups(q_labels, k_labels), kernel="cpu").out
    weight = torch.zeros_like(out)
    weight[:, :, 0] = 1  # the one row of its group, which padding repeats 39 times
    dv = torch.autograd.grad(out, v, weight)[0][:, :, :7].double().sum(-2)
    torch.testing.assert_close(dv, torch.ones_like(dv), rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_merge_is_exact() -> None:
    q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float64) for _ in range(3))
    labels = [torch.tensor([0] * 4 + [-1] * 5), torch.tensor([-1] * 4 + [0] * 3 + [-1] * 2)]
    readers = torch.zeros(9, dtype=torch.int64).index_fill(0, torch.tensor([8]), -1)
    plans = [zoo.Plan.groups(readers, keys) for keys in labels]
    parts = [zoo.attend(q, k, v, plan) for plan in plans]
    out, lse = zoo.merge([part.out for part in parts], [part.lse for part in parts])
    want, want_lse = oracle(q, k, v, plans[0] | plans[1])
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)


def test_executed_pairs_are_never_fewer(film: zoo.Layout) -> None:
    plan = zoo.Plan.dense(film) | zoo.Plan.within(film.chunks("frame"))
    for kernel in zoo.kernels():
        assert plan.executed(kernel, batch=2, heads=3) >= plan.cost(8, batch=2, heads=3).pairs


def test_a_kernel_that_cannot_run_tells_every_reason() -> None:
    film = zoo.Layout.film([zoo.Shot(1, 2, 2)])
    q, k, v = (torch.randn(1, 1, 4, 12) for _ in range(3))
    if not torch.cuda.is_available():
        with pytest.raises(zoo.ZooError) as error:
            zoo.attend(q, k, v, zoo.Plan.dense(film), kernel="torch")
        for words in (
            "needs a CUDA device",
            "float32 is not float16 or bfloat16",
            "head dim 12 is not a multiple of 8",
        ):
            assert words in str(error.value)
    with pytest.raises(zoo.ZooError, match="unknown kernel 'cpuu'; did you mean 'cpu'"):
        zoo.attend(q, k, v, zoo.Plan.dense(film), kernel="cpuu")
    with pytest.raises(zoo.ZooError, match="the plan is for 4 queries and 4 keys; q is"):
        zoo.attend(q[:, :, :3], k, v, zoo.Plan.dense(film))
    whole = [x.to(torch.int32) for x in (q, k, v)]
    with pytest.raises(zoo.ZooError, match="no kernel can run this") as error:
        zoo.attend(*whole, zoo.Plan.dense(film))
    assert "cpu: dtype torch.int32" in str(error.value)
    with pytest.raises(zoo.ZooError, match=r"'reference': dtype torch\.int32 is not a floating-point type"):
        zoo.attend(*whole, zoo.Plan.dense(film), kernel="reference")


def test_check_refuses_overlap() -> None:
    film = zoo.Layout.film([zoo.Shot(1, 2, 2)])
    tensors = [torch.randn(1, 1, 4, 8) for _ in range(3)]
    dense = zoo.Plan.dense(film)
    with pytest.raises(zoo.ZooError, match="hold 16 pairs both"):
        zoo.attend(*tensors, zoo.Plan(*dense.parts, *dense.parts), check=True)


def test_backward_through_compile_and_autocast() -> None:
    film = zoo.Layout.film([zoo.Shot(2, 3, 3)])
    attention = zoo.build("moc", heads=2, head_dim=8, top_k=1, anchors=("chunk",))
    q, k, v = (torch.randn(1, 2, len(film), 8, requires_grad=True) for _ in range(3))
    eager = attention(q, k, v, film).out
    compiled = torch.compile(lambda *x: attention(*x, film).out * 2, backend="eager")(q, k, v)
    torch.testing.assert_close(compiled, eager * 2, rtol=0, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = attention(*(x.bfloat16() for x in (q, k, v)), film).out
    assert half.dtype == torch.bfloat16


def test_engine_is_named_by_what_it_is() -> None:
    assert grouped.Cpu().why_not() == []
    assert {"torch", "cpu", "reference"} <= set(zoo.kernels())
