"""vsa, nsa and sla: small examples worked out by hand, what they start as, gradients, counts and refusals."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sparse_zoo as zoo
from sparse_zoo import Branch, Call, Layout, Shot, Term
from sparse_zoo.blocks import members, pooled
from sparse_zoo.methods.nsa import NSA
from sparse_zoo.methods.sla import SLA
from sparse_zoo.methods.vsa import VSA
from sparse_zoo.selectors import largest
from sparse_zoo.testing import slow_coarse

DIM = 6
FILM = Layout.pack([Layout.film([Shot(2, 3, 3, 2), Shot(1, 2, 5)], caption=1), Layout.film([Shot(1, 2, 3, 1)])])


def make(film: Layout, head_dim: int = 4) -> Call:
    """Two heads that share keys and values."""
    draw = torch.Generator().manual_seed(0)
    of_keys = (1, 1, len(film), head_dim)
    shapes = [(1, 2, len(film), head_dim), of_keys, of_keys, (1, len(film), DIM)]
    q, k, v, hidden = (torch.randn(*s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes)
    return Call(q, k, v, film, hidden=hidden)


def build(name: str, heads: int = 2, head_dim: int = 4, **settings: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return zoo.build(name, heads=heads, head_dim=head_dim, dim=DIM, **settings).double()


def perturbed(attention: zoo.Attention) -> Any:
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return attention


def column(*values: float) -> Tensor:
    """One head of one channel: (1, 1, L, 1)."""
    return torch.tensor(values, dtype=torch.float64)[None, None, :, None]


def dense(call: Call) -> Tensor:
    together = call.layout.sample[:, None] == call.layout.sample
    return scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=together, enable_gqa=True)


def close(ours: Tensor, right: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(ours, right, rtol=0, atol=atol)


# -- gradients, through means, gates, choices and the linear part ------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vsa", {"tile": (1, 2, 2), "top_k": 2}),
        ("vsa", {"tile": (2, 2, 3), "top_k": 1, "gates": "coarse", "stop_at_shots": False}),
        ("nsa", {"block_tokens": 4, "top_k": 1, "window": 3}),
        ("sla", {"block_tokens": 4, "top_fraction": 0.3, "negligible": 0.2}),
    ],
)
def test_outputs_and_gradients_are_those_of_the_slow_version(name: str, settings: dict[str, Any]) -> None:
    attention, call = perturbed(build(name, **settings)), make(FILM)
    given = {"q": call.q, "k": call.k, "v": call.v, **dict(attention.named_parameters())}
    if name != "sla":  # it has no use for hidden
        given["hidden"] = call.hidden
    out, want = attention.run(call).out, getattr(slow_coarse, name)(attention, call)
    close(out, want)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grads = [torch.autograd.grad((x * weight).sum(), list(given.values())) for x in (out, want)]
    for what, ours, right in zip(given, *grads, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-10, msg=lambda m, what=what: f"{what}: {m}")


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_vsa_by_hand() -> None:
    """Two cubes of two tokens, means of q and k 1 and -1: each chooses itself, its two keys being alike."""
    attention = build("vsa", heads=1, head_dim=1, tile=(1, 1, 2), top_k=1)
    with torch.no_grad():
        for name, gate in (("coarse", 10.0), ("fine", 3.0)):
            attention.gates[name].weight.zero_()
            attention.gates[name].bias.fill_(gate)
    q, k, v = column(2, 0, -1, -1), column(1, 1, -1, -1), column(1, 3, 5, 7)
    out = attention(q, k, v, Layout.film([Shot(1, 1, 4)]), hidden=torch.ones(1, 4, DIM, dtype=torch.float64)).out
    near = 1 / (1 + math.exp(-2))  # softmax of (1, -1)
    coarse = [2 * near + 6 * (1 - near), 6 * near + 2 * (1 - near)]
    close(out, column(*[3 * 2 + 10 * coarse[0]] * 2, *[3 * 6 + 10 * coarse[1]] * 2))


def test_nsa_by_hand() -> None:
    """Seven tokens in blocks of one and alike keys: every softmax is a mean, and ties go to the earlier block."""
    attention = build("nsa", heads=1, head_dim=1, block_tokens=1, top_k=1, window=3)
    gates = torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64)
    with torch.no_grad():
        attention.gate.weight.zero_()
        attention.gate.bias.copy_(gates.logit())
    v = torch.tensor([1.0, 2, 4, 8, 16, 32, 64], dtype=torch.float64)
    ones = column(*[1] * 7)
    out = attention(ones, ones, column(*v), Layout.film([Shot(7, 1, 1)]), hidden=ones[0].expand(1, 7, DIM)).out
    chosen = [[0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3, 1], [0, 3, 4, 1], [0, 4, 5, 1], [0, 5, 6, 1]]
    window = [range(max(0, i - 1), min(7, i + 2)) for i in range(7)]
    want = [0.5 * v.mean() + 0.25 * v[chosen[i]].mean() + 0.125 * v[list(window[i])].mean() for i in range(7)]
    close(out, column(*want))


def test_sla_by_hand() -> None:
    """Four blocks of one token and alike scores: the first is critical, the last negligible, those between linear."""
    attention = build("sla", heads=1, head_dim=2, block_tokens=1, top_fraction=0.25, negligible=0.25)
    with torch.no_grad():
        attention.proj.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
    v = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]], dtype=torch.float64)
    zeros = torch.zeros(1, 1, 4, 2, dtype=torch.float64)
    out = attention(zeros, zeros, v[None, None], Layout.film([Shot(4, 1, 1)])).out
    rest = (v[1] + v[2]) / 2 / (1 + 1e-5)  # each weight is 1/2 · 1/2 + 1/2 · 1/2
    close(out, (v[0] + torch.tensor([2.0, 3.0]) * rest).expand(1, 1, 4, 2))


# -- what they start as ------------------------------------------------------------------------------------------------


def test_vsa_that_adapts_starts_as_dense_attention() -> None:
    """Section 2.3: the coarse gate from zero, no fine one, and all cubes chosen."""
    call = make(FILM)
    attention = build("vsa", tile=(2, 2, 2), top_k=99, gates="coarse")
    close(attention.run(call).out, dense(call))
    assert float((perturbed(attention).run(call).out - dense(call)).detach().abs().max()) > 0.1
    assert list(build("vsa", tile=(2, 2, 2)).gates) == ["coarse", "fine"]
    assert bool((build("vsa").gates["coarse"].weight != 0).any())


def test_sla_starts_as_its_sparse_part_and_learns_the_rest() -> None:
    call, attention = make(FILM), build("sla", block_tokens=4)
    made = attention.branches(call)
    (sparse,) = [x for x in made if isinstance(x, Branch)]
    out = attention.run(call).out
    close(out, zoo.attend(call.q, call.k, call.v, sparse.plan).out)
    (grad,) = torch.autograd.grad(out.square().sum(), [attention.proj.weight])
    assert float(grad.abs().max()) > 0


# -- counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 99])
def test_vsa_pairs_and_flops_equal_hand_counts(top_k: int) -> None:
    """16 cubes of 8 tokens and two tokens of text; the coarse stage adds 16 × 16 pairs."""
    film = Layout.film([Shot(4, 8, 4, 2)])
    cost = build("vsa", tile=(2, 2, 2), top_k=top_k).run(make(film)).cost()
    text = 130 * 2 + 2 * 128
    assert cost.pairs == 2 * (16 * 8 * 8 * min(top_k, 16) + text + 16 * 16)


@pytest.mark.parametrize(
    ("top_fraction", "negligible", "critical", "marginal"),
    [(0.05, 0.1, 1, 8), (0.2, 0.1, 2, 7), (0.25, 0.35, 2, 5), (1.0, 0.5, 10, 0), (0.9, 0.5, 9, 0)],
)
def test_sla_shares_are_rounded_down(top_fraction: float, negligible: float, critical: int, marginal: int) -> None:
    """Ten blocks of a film of 40 tokens; a second film has one block of two, which is critical."""
    film = Layout.pack([Layout.film([Shot(4, 2, 5)]), Layout.film([Shot(1, 1, 2)])])
    attention, call = build("sla", block_tokens=4, top_fraction=top_fraction, negligible=negligible), make(film)
    assert attention.run(call).cost().pairs == 2 * (40 * 4 * critical + 2 * 2)
    legal = torch.ones(1, 1, 10, 10, dtype=torch.bool)
    first, both = attention._counts(legal)
    assert set(first.flatten().tolist()) == {critical}
    assert set((both - first).flatten().tolist()) == {marginal}


@pytest.mark.parametrize("top_k", [1, 3, 99])
def test_nsa_reads_each_block_once_and_those_fixed_always(top_k: int) -> None:
    """A film of eleven blocks of 4, the last of 2."""
    attention, call = build("nsa", block_tokens=4, top_k=top_k, window=5), make(Layout.film([Shot(3, 2, 7)]))
    compressed, selected, window = attention.branches(call)
    assert compressed.plan.shape == (42, 11)
    assert bool(compressed.plan.dense_mask().all())
    selected.plan.validate()
    block = torch.arange(42) // 4
    mask = selected.plan.dense_mask()[0]
    for i in range(42):
        read = [set(block[row[i]].tolist()) for row in mask]
        fixed = {0, int(block[i]), max(0, int(block[i]) - 1)}
        for head in read:
            assert fixed <= head
            assert len(head) == min(11, len(fixed) + top_k)
    assert torch.equal(window.plan.dense_mask()[0, 0], (block[:, None] - block).abs() <= 2)


def test_sla_linear_flops_and_memory() -> None:
    """What it counts, and that the sums for each block of queries are not kept for the backward pass."""
    film = Layout.film([Shot(2, 8, 8)])
    attention, call = build("sla", head_dim=32, block_tokens=2), make(film, head_dim=32)
    (term,) = [x for x in attention.branches(call) if isinstance(x, Term)]
    assert term.flops == 2 * (2 * 32 * 33 * (2 * 128 + 64**2) + 2 * 32 * 32 * 128)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attention.branches(call)
    assert sum(kept.values()) < 64 * 32 * 33 * 8  # less than these sums of one head


# -- what is shared ----------------------------------------------------------------------------------------------------


def test_means_are_float32_at_least() -> None:
    """1 + 1/256 lies between two numbers of bfloat16."""
    pieces = Layout.film([Shot(2, 8, 8)]).partition()
    x = torch.ones(1, 1, 128, 1, dtype=torch.bfloat16)
    x[:, :, ::2] += 1 / 128
    assert pooled(pieces, x).item() == 1 + 1 / 256
    assert pooled(pieces, x.double()).dtype == torch.float64


def test_members_of_ragged_and_scattered_pieces() -> None:
    film = Layout.film([Shot(1, 2, 3, 1)], caption=1)
    assert members(film.tiles((1, 2, 2))).tolist() == [[2, 3, 5, 6], [4, 7, -1, -1]]
    assert members(film.partition(where=~film.is_text)).tolist() == [[2, 3, 4, 5, 6, 7]]
    assert members(film.partition(where=film.is_text & ~film.is_text)).shape == (0, 0)


def test_largest_takes_as_many_as_each_row_says() -> None:
    scores = torch.tensor([[1.0, 3, 3, 2], [1, 1, 1, -torch.inf]])
    kept = largest(scores, torch.tensor([[2], [4]]))
    assert kept.tolist() == [[False, True, True, False], [True, True, True, False]]
    assert largest(scores, 1).tolist() == [[False, True, False, False], [True, False, False, False]]


def test_a_film_without_video_beside_one_with() -> None:
    film = Layout.pack([Layout.film([], caption=3), Layout.film([Shot(1, 3, 3, 1)])])
    for name, settings in (("vsa", {"tile": (1, 2, 2)}), ("nsa", {"block_tokens": 4}), ("sla", {"block_tokens": 4})):
        attention, call = perturbed(build(name, **settings)), make(film)
        close(attention.run(call).out, getattr(slow_coarse, name)(attention, call))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "settings", "reasons"),
    [
        (VSA, {"top_k": 0, "tile": (4, 4), "gates": "all"}, ["top_k", "tile must be three", "gates 'all'", "dim, the"]),
        (
            NSA,
            {"top_k": 0, "block_tokens": 0, "window": 2},
            ["top_k", "block_tokens", "window must be an odd", "dim, the width"],
        ),
        (
            SLA,
            {"top_fraction": 1.5, "negligible": 1.0, "block_tokens": 0},
            ["top_fraction must be in (0, 1], got 1.5", "below 1, got 1.0", "block_tokens"],
        ),
    ],
)
def test_every_reason_is_given_at_once(cls: Any, settings: dict[str, Any], reasons: list[str]) -> None:
    with pytest.raises(zoo.ZooError) as error:
        cls(heads=2, head_dim=4, **settings)
    for reason in reasons:
        assert reason in str(error.value)


@pytest.mark.parametrize("name", ["vsa", "nsa"])
def test_gates_need_hidden(name: str) -> None:
    call = make(FILM)
    with pytest.raises(zoo.ZooError, match="give hidden="):
        build(name)(call.q, call.k, call.v, FILM)
    build("vsa", gates="none")(call.q, call.k, call.v, FILM)
