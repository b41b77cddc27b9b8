"""The five methods against slow routings written from the papers' words, and what every method must hold."""

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from tiers import cases
from torch import Tensor

import sparse_zoo as zoo
from sparse_zoo import Layout, Shot
from sparse_zoo.testing import slow

DIM = 6


def tensors(layout: Layout, batch: int = 2, heads: int = 2, kv_heads: int = 2) -> list[Tensor]:
    length = len(layout)
    shapes = [(batch, heads, length, 8), (batch, kv_heads, length, 8), (batch, kv_heads, length, 8)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def without_text(layout: Layout) -> Layout:
    return Layout(tuple(zoo.Film(0, tuple(replace(shot, text=0) for shot in film.shots)) for film in layout.films))


def build(name: str, **settings: Any) -> zoo.Attention:
    return zoo.build(name, heads=2, head_dim=8, dim=DIM, **settings).double()


def router_softmax(attention: zoo.Attention, hidden: Tensor) -> Tensor:
    weight, bias = attention.get_parameter("router.weight"), attention.get_parameter("router.bias")
    return (hidden @ weight.T + bias).detach().float().softmax(-1)


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "dense": [{}],
    "moc": [
        {"top_k": 1, "chunk": "shot"},
        {"top_k": 2, "frames_per_chunk": 2},
        {"top_k": 2, "anchors": ["chunk"], "causal": None},
        {"top_k": 1, "anchors": [], "causal": "routing"},
        {"top_k": 2, "chunk": "fixed", "chunk_tokens": 7, "anchors": ["text", "chunk"]},
        {"top_k": 2, "chunk": "tokens", "chunk_tokens": 33, "drop_off": 0.9, "drop_in": 0.7},
    ],
    "moc_fixed": [{"top_k": 2, "chunk_tokens": 9}, {"top_k": 3, "chunk_tokens": 5, "causal": None}],
    "moga": [
        {"groups": 3},
        {"groups": 2, "frames_per_group": 2, "windows": [3, 1]},
        {"groups": 4, "mix": ["group"]},
    ],
    "window": [
        {"tile": [2, 2, 2]},
        {"tile": [1, 3, 2], "window": [1, 3, 1], "edge": "cut"},
        {"tile": [2, 2, 2], "stop_at_shots": False},
    ],
}
CASES = [pytest.param(name, s, id=f"{name}-{i}") for name, every in SETTINGS.items() for i, s in enumerate(every)]


SUBSETS = [subset for n in range(4) for subset in combinations(("text", "shot", "chunk"), n)]
CUTS = [("shot", 1, 1), ("frame", 2, 1), ("tokens", 1, 33), ("fixed", 1, 7)]


@pytest.mark.parametrize("causal", [None, "routing", "strict"])
@pytest.mark.parametrize("anchors", cases(SUBSETS, [(), ("shot",), SUBSETS[-1]]), ids="-".join)
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut[0])
def test_moc_is_the_slow_moc(
    cut: tuple[str, int, int], anchors: tuple[str, ...], causal: str | None, film: Layout
) -> None:
    chunk, frames, size = cut
    q, k, _ = tensors(film)
    attention = build(
        "moc", top_k=2, chunk=chunk, frames_per_chunk=frames, chunk_tokens=size, anchors=anchors, causal=causal
    )
    plan = attention.plan(q, k, film).validate()
    mask = plan.dense_mask().expand(2, 2, -1, -1)
    for b, h in ((0, 0), (1, 1)):
        want = slow.moc(
            q[b, h], k[b, h], film, top_k=2, chunk=chunk, frames=frames, size=size, anchors=anchors, causal=causal
        )
        assert torch.equal(mask[b, h], slow.as_mask(want))
    if not attention.may_be_empty:
        assert bool(mask.any(-1).all())


def test_moc_ties_go_to_the_earlier_chunk_and_k_may_pass_the_candidates(film: Layout) -> None:
    q, k, _ = (torch.zeros_like(x) for x in tensors(film))
    for top_k in (1, 3, 999):
        plan = build("moc", top_k=top_k, anchors=("chunk",)).plan(q, k, film)
        settings = {"chunk": "frame", "frames": 1, "size": 1, "anchors": ("chunk",), "causal": "routing"}
        assert torch.equal(
            plan.dense_mask()[0, 0], slow.as_mask(slow.moc(q[0, 0], k[0, 0], film, top_k=top_k, **settings))
        )


def test_moc_routes_each_query_head_of_shared_keys(film: Layout) -> None:
    q, k, v = tensors(film, kv_heads=1)
    result = build("moc", top_k=1, anchors=("chunk",))(q, k, v, film)
    mask = result.plans[0].dense_mask().expand(2, 2, -1, -1)
    for h in range(2):
        settings = {"chunk": "frame", "frames": 1, "size": 1, "anchors": ("chunk",), "causal": "routing"}
        assert torch.equal(mask[1, h], slow.as_mask(slow.moc(q[1, h], k[1, 0], film, top_k=1, **settings)))


def test_moc_fixed_is_moc_with_fixed_chunks(film: Layout) -> None:
    q, k, _ = tensors(film)
    for causal in (None, "routing", "strict"):
        a = build("moc_fixed", top_k=2, chunk_tokens=9, causal=causal).plan(q, k, film)
        b = build("moc", top_k=2, chunk="fixed", chunk_tokens=9, causal=causal).plan(q, k, film)
        assert torch.equal(a.dense_mask(), b.dense_mask())


def test_scores_are_never_a_full_table(monkeypatch: pytest.MonkeyPatch) -> None:
    film = Layout.film([Shot(4, 4, 4), Shot(3, 4, 4)])
    q, k, _ = tensors(film)
    attention = build("moc", top_k=2, anchors=("chunk",))
    whole = attention.plan(q, k, film).dense_mask()
    monkeypatch.setattr("sparse_zoo.routing.BLOCK_SCORES", 64)
    assert torch.equal(attention.plan(q, k, film).dense_mask(), whole)


@pytest.mark.parametrize("frames", [None, 2])
@pytest.mark.parametrize("windows", [(1, 1), (2, 2), (3, 1)])
def test_moga_is_the_slow_moga(windows: tuple[int, int], frames: int | None, film: Layout) -> None:
    q, k, v = tensors(film)
    hidden = torch.randn(2, len(film), DIM, dtype=torch.float64)
    attention = build("moga", groups=3, windows=windows, frames_per_group=frames)
    call = zoo.Call(q, k, v, film, hidden=hidden)
    p = router_softmax(attention, hidden)
    group = p.argmax(-1)
    want = torch.zeros_like(q)
    for name, branch in zip(("group", "stga", "frame"), attention.branches(call), strict=True):
        assert isinstance(branch, zoo.Branch)
        mask = branch.plan.validate().dense_mask().expand(2, -1, -1, -1)
        for b in range(2):
            chosen = tuple(group[b].tolist())
            expected = slow.as_mask(slow.moga_branch(name, chosen, film, windows=windows, frames=frames))
            assert torch.equal(mask[b, 0], expected)
            weight = torch.ones(len(film), dtype=torch.float64)
            if name == "group":
                weight = torch.where(film.is_text, 1.0, p[b].amax(-1).double())
            scores = (q[b] @ k[b].transpose(-1, -2) / 8**0.5).masked_fill(~expected, -torch.inf)
            want[b] += weight[:, None] * (scores.softmax(-1) @ v[b]) / 3
    torch.testing.assert_close(attention(q, k, v, film, hidden=hidden).out, want, rtol=0, atol=1e-6)


def test_moga_gate_learns_and_alpha_zero_has_no_loss() -> None:
    film = Layout.film([Shot(2, 3, 3)])
    q, k, v = tensors(film)
    hidden = torch.randn(2, len(film), DIM, dtype=torch.float64)
    attention = build("moga", groups=3, alpha=0)
    result = attention(q, k, v, film, hidden=hidden)
    assert result.losses == {}
    result.out.square().sum().backward()
    grad = attention.get_parameter("router.weight").grad
    assert grad is not None
    assert float(grad.abs().max()) > 0


def test_moga_needs_hidden() -> None:
    film = Layout.film([Shot(2, 3, 3)])
    with pytest.raises(zoo.ZooError, match="give hidden="):
        build("moga")(*tensors(film), film)
    with pytest.raises(zoo.ZooError, match="dim, the width of hidden"):
        zoo.build("moga", heads=2, head_dim=8)


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("edge", ["shift", "cut"])
@pytest.mark.parametrize(("tile", "size"), [((2, 2, 2), (3, 3, 3)), ((1, 3, 2), (3, 1, 3)), ((2, 1, 4), (1, 5, 1))])
def test_window_is_the_slow_window(
    tile: tuple[int, int, int], size: tuple[int, int, int], edge: str, restart: bool, film: Layout
) -> None:
    q, k, _ = tensors(film)
    attention = build("window", tile=tile, window=size, edge=edge, stop_at_shots=restart)
    got = attention.plan(q, k, film).validate().dense_mask()
    want = slow.as_mask(slow.window(film, tile=tile, size=size, edge=edge, restart=restart))
    assert torch.equal(got[0, 0], want)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_declared_limit_is_dense(name: str, film: Layout) -> None:
    limit = zoo.get(name).limits
    assert isinstance(limit, zoo.Limit)
    if not limit.text:
        film = without_text(film)
    q, k, v = tensors(film)
    hidden = torch.randn(2, len(film), DIM, dtype=torch.float64)
    out = build(name, **limit.settings)(q, k, v, film, hidden=hidden).out
    same = film.sample[:, None] == film.sample
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=same)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_kernels_agree_forward_and_backward(name: str, settings: dict[str, Any], film: Layout) -> None:
    hidden = torch.randn(2, len(film), DIM, dtype=torch.float64, requires_grad=True)
    inputs = tensors(film)
    weight = torch.randn_like(inputs[0])
    results = []
    for kernel in ("cpu", "reference"):
        torch.manual_seed(3)
        attention = build(name, kernel=kernel, **settings)
        result = attention(*inputs, film, hidden=hidden)
        assert result.kernel == kernel
        loss = (result.out * weight).sum() + sum(result.losses.values())
        wanted = [*inputs, hidden, *attention.parameters()]
        results.append([result.out, *torch.autograd.grad(loss, wanted, allow_unused=True)])
    for ours, oracle in zip(*results, strict=True):
        assert (ours is None) == (oracle is None)
        if ours is not None:
            torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-6 if name == "moga" else 1e-12)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_packed_films_give_what_they_give_alone(name: str, settings: dict[str, Any]) -> None:
    films = [
        Layout.film([Shot(3, 3, 4, 2), Shot(2, 2, 5, 1)], caption=1),
        Layout.film([Shot(1, 3, 3), Shot(2, 4, 4, 1)]),
    ]
    packed = Layout.pack(films)
    q, k, v = tensors(packed)
    hidden = torch.randn(2, len(packed), DIM, dtype=torch.float64)
    attention = build(name, **settings).eval()  # draws go by a token's place in the stream
    together = attention(q, k, v, packed, hidden=hidden).out
    for number, film in enumerate(films):
        mine = packed.sample == number
        alone = attention(q[:, :, mine], k[:, :, mine], v[:, :, mine], film, hidden=hidden[:, mine]).out
        torch.testing.assert_close(together[:, :, mine], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_some_queries_give_what_all_give(name: str, settings: dict[str, Any], film: Layout) -> None:
    q, k, v = tensors(film)
    hidden = torch.randn(2, len(film), DIM, dtype=torch.float64)
    attention = build(name, **settings)
    rows = torch.randperm(len(film))[:5]
    some = attention(q[:, :, rows], k, v, film, hidden=hidden, q_rows=rows)
    every = attention(q, k, v, film, hidden=hidden)
    torch.testing.assert_close(some.out, every.out[:, :, rows], rtol=0, atol=1e-12)
    assert some.cost().dense_pairs == 4 * sum(int((film.sample == film.sample[r]).sum()) for r in rows)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_text_that_reads_text_alone(name: str, settings: dict[str, Any], film: Layout) -> None:
    q, k, v = tensors(film)
    hidden = torch.randn(2, len(film), DIM, dtype=torch.float64)
    torch.manual_seed(3)
    usual = build(name, **settings)(q, k, v, film, hidden=hidden)
    torch.manual_seed(3)
    result = build(name, text_reads="text", **settings)(q, k, v, film, hidden=hidden)
    among = (film.sample[:, None] == film.sample) & film.is_text
    for plan, before in zip(result.plans, usual.plans, strict=True):
        mask, other = plan.validate().dense_mask(), before.dense_mask()
        assert torch.equal(mask[:, :, film.is_text], among[film.is_text].expand_as(mask[:, :, film.is_text]))
        assert torch.equal(mask[:, :, ~film.is_text], other[:, :, ~film.is_text].expand_as(mask[:, :, ~film.is_text]))


@pytest.mark.parametrize("text_reads", ["method", "text"])
def test_strict_causality_keeps_the_prefix(text_reads: str) -> None:
    shots = [Shot(2, 3, 3, 2), Shot(1, 4, 2, 1), Shot(3, 2, 3, 2)]
    film, prefix = Layout.film(shots, caption=2), Layout.film(shots[:2], caption=2)
    q, k, v = tensors(film)
    n = len(prefix)
    for chunk in ("shot", "frame", "tokens", "fixed"):
        for anchors in (("text", "shot"), ("text", "shot", "chunk"), ("shot",)):
            settings = {"chunk_tokens": 5, "anchors": anchors, "causal": "strict", "text_reads": text_reads}
            attention = build("moc", top_k=1, chunk=chunk, **settings)
            whole = attention(q, k, v, film).out[:, :, :n]
            part = attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], prefix).out
            torch.testing.assert_close(whole, part, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_cost_is_what_ran(name: str, settings: dict[str, Any], film: Layout) -> None:
    q, k, v = tensors(film)
    result = build(name, **settings)(q, k, v, film, hidden=torch.randn(2, len(film), DIM, dtype=torch.float64))
    pairs = sum(int(plan.dense_mask().expand(2, 2, -1, -1).sum()) for plan in result.plans)
    cost = result.cost()
    assert cost.pairs == pairs
    assert cost.density == pytest.approx(pairs / (4 * film.dense_pairs))
    assert (cost.flops, cost.flops_backward) == (4 * pairs * 8, 10 * pairs * 8)


def test_inputs_that_do_not_match_the_layout_are_all_named() -> None:
    film = Layout.film([Shot(2, 3, 3)])
    q, k, v = tensors(film)
    with pytest.raises(zoo.ZooError) as error:
        build("dense")(q[:, :, :17], k[..., :7], v, film, hidden=torch.zeros(2, 3, DIM))
    for words in ("q has 17 tokens, the layout has 18", "q has head dim 8, k has 7", "must be (2, 18, dim)"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("moc", {"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ("moc", {"top_k": 2.5}, "got 2.5"),
        ("moc", {"chunk": "frames"}, "did you mean 'frame'"),
        ("moc", {"anchors": ["texts"]}, "did you mean 'text'"),
        ("moc", {"causal": "yes"}, "causal must be null, 'routing' or 'strict', got 'yes'"),
        ("moga", {"groups": 0}, "groups must be a whole number of at least 1, got 0"),
        ("moga", {"mix": []}, "mix needs at least one of"),
        ("moga", {"windows": [2]}, "windows must be two whole numbers"),
        ("window", {"window": [2, 3, 3]}, "three odd whole numbers of at least 1, got (2, 3, 3)"),
        ("window", {"tile": [1, 1]}, "tile must be three whole numbers"),
        ("dense", {"kernel": "cpus"}, "did you mean 'cpu'"),
        ("dense", {"text_reads": "none"}, "unknown text_reads 'none'"),
    ],
)
def test_values_out_of_range_are_refused(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(zoo.ZooError) as error:
        build(name, **settings)
    assert said in str(error.value)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_cache_filled_in_inference_mode_serves_training(name: str, settings: dict[str, Any]) -> None:
    film = Layout.film([Shot(2, 3, 4, 2), Shot(3, 2, 2, 1)], caption=3)
    q, k, v = tensors(film)
    hidden = torch.randn(2, len(film), DIM, dtype=torch.float64)
    attention = build(name, text_reads="text", **settings)
    with torch.inference_mode():
        first = attention(q, k, v, film, hidden=hidden)
        first.cost()
        for plan in first.plans:
            plan.dense_mask()
    result = attention(q, k, v, film, hidden=hidden)
    (result.out.sum() + sum(result.losses.values())).backward()
    torch.testing.assert_close(result.out.detach(), first.out.clone(), rtol=0, atol=1e-12)
