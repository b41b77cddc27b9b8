"""MoGA's limits, branches and balance loss, each against plain arithmetic in float64."""

from itertools import combinations
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sparse_zoo as zoo
from lit_modules.dit import VideoDiT
from sparse_zoo import Call, Layout, Shot
from sparse_zoo.methods.moga import MIX, MoGA
from sparse_zoo.testing import slow

DIM = 6
FILM = Layout.film([Shot(3, 4, 4, 3), Shot(1, 5, 3), Shot(4, 3, 2, 2)], caption=2)
SILENT = Layout.film([Shot(3, 4, 4), Shot(1, 5, 3), Shot(4, 3, 2)])


def make(film: Layout, batch: int = 2) -> Call:
    q, k, v = (torch.randn(batch, 2, len(film), 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    return Call(q, k, v, film, hidden=torch.randn(batch, len(film), DIM, dtype=torch.float64, requires_grad=True))


def build(*, groups: int = 3, **settings: Any) -> MoGA:
    return MoGA(heads=2, head_dim=8, dim=DIM, groups=groups, **settings).double()


def leaves(call: Call) -> list[Tensor]:
    assert call.hidden is not None
    return [call.q, call.k, call.v, call.hidden]


def masks(attention: MoGA, call: Call) -> list[Tensor]:
    found = []
    for branch in attention.branches(call):
        assert isinstance(branch, zoo.Branch)
        found.append(branch.plan.dense_mask().expand(len(call.q), 1, -1, -1))
    return found


# -- the limit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("film", [SILENT, FILM], ids=["silent", "with text"])
def test_one_group_alone_is_dense_but_for_what_captions_read(film: Layout) -> None:
    """Forward and backward. Text queries read all text and their own shot, the global caption text alone."""
    call, text, shot = make(film), film.is_text, film.shot
    allowed = ~text[:, None] | text | ((shot[:, None] == shot) & (shot >= 0))
    assert bool(allowed.all()) == (film is SILENT)
    out = build(groups=1, mix=("group",)).run(call).out
    want = scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=allowed)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    weight = torch.randn_like(out)
    qkv = [call.q, call.k, call.v]
    for ours, right in zip(
        torch.autograd.grad((out * weight).sum(), qkv), torch.autograd.grad((want * weight).sum(), qkv), strict=True
    ):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)
    dense = scaled_dot_product_attention(call.q, call.k, call.v)
    torch.testing.assert_close(out[:, :, ~text], dense[:, :, ~text], rtol=0, atol=1e-12)


# -- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("film", [SILENT, FILM], ids=["silent", "with text"])
def test_empty_groups_cost_nothing_and_have_finite_gradients(film: Layout) -> None:
    call, attention = make(film), build(groups=5, mix=("group",), alpha=0.3)
    with torch.no_grad():
        attention.router.bias.copy_(torch.tensor([-50.0, 0, -50.0, 0, -50.0]))
    result = attention.run(call)
    group = attention.features(leaves(call)[3])["group"]
    assert set(group.flatten().tolist()) == {1, 3}
    with_text = len(film) * int(film.is_text.sum()) + sum(
        x.text * x.frames * x.rows * x.cols for x in film.films[0].shots
    )
    sizes = [int((one[~film.is_text] == g).sum()) for one in group for g in (1, 3)]
    assert result.cost().pairs == 2 * (2 * with_text + sum(n * n for n in sizes))  # 2 heads
    grads = torch.autograd.grad(
        result.out.square().sum() + result.losses["balance"], [*leaves(call), *attention.parameters()]
    )
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert all(float(grad.abs().max()) > 0 for grad in grads)


SUBSETS = [subset for n in (1, 2, 3) for subset in combinations(MIX, n)] + [MIX[::-1]]


@pytest.mark.parametrize("mix", SUBSETS, ids="-".join)
def test_any_mix_is_the_mean_of_its_branches(mix: tuple[str, ...]) -> None:
    call = make(FILM)

    def out(mix: tuple[str, ...]) -> Tensor:
        torch.manual_seed(4)
        return build(mix=mix).run(call).out

    alone = torch.stack([out((name,)) for name in mix])
    torch.testing.assert_close(out(mix), alone.mean(0), rtol=0, atol=1e-12)
    assert len({float(x.detach().sum()) for x in alone}) == len(mix)


# -- borrowed frames --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames_per_group", "reads"),
    [
        (None, ["012", *["0123456"] * 4, *["345678"] * 3, "678"]),
        (2, ["012", *["01256"] * 2, *["03456"] * 2, *["34568"] * 2, "3478", "678"]),
    ],
    ids=["whole shots", "two frames"],
)
def test_a_group_borrows_the_keys_of_two_frames_of_each_shot_beside(
    frames_per_group: int | None, reads: list[str]
) -> None:
    """Shots of 1, 4, 3 and 1 frames of one token: token i is frame i.

    A shot of one frame lends it. Keys are borrowed, not queries: frame 3 reads frame 0, which does not read it.
    """
    film = Layout.film([Shot(n, 1, 1) for n in (1, 4, 3, 1)])
    (mask,) = masks(build(mix=("stga",), frames_per_group=frames_per_group), make(film, batch=1))
    assert ["".join(str(int(j)) for j in keys.nonzero()[:, 0]) for keys in mask[0, 0]] == reads


# -- balance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", ["printed", "switch"])
def test_balance_loss_and_its_gradients(balance: Literal["printed", "switch"], film: Layout) -> None:
    call, alpha, groups = make(film), 0.7, 3
    attention = build(groups=groups, balance=balance, alpha=alpha)
    weight, bias, hidden = attention.router.weight, attention.router.bias, leaves(call)[3]
    p = (hidden @ weight.T + bias).softmax(-1)
    terms = []
    for b in range(len(p)):
        for sample in range(len(film.films)):
            mine = [i for i, t in enumerate(slow.tokens(film)) if t.sample == sample and not t.text]
            group = {i: int(p[b, i].argmax()) for i in mine}
            total = p.new_zeros(())
            for g in range(groups):
                taken = [i for i in mine if group[i] == g]
                for i in taken if balance == "printed" else mine:
                    total = total + len(taken) / len(mine) * p[b, i, g] / len(mine)
            terms.append(alpha * groups * total)
    want = torch.stack(terms).mean()
    loss = attention.run(call).losses["balance"]
    assert float(loss.detach()) == pytest.approx(float(want.detach()), abs=1e-6)
    grads = (torch.autograd.grad(x, [weight, bias, hidden]) for x in (loss, want))
    for ours, right in zip(*grads, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-6)


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [("group",), ("stga",), ("frame",), MIX], ids="-".join)
def test_video_reads_video_alike_with_and_without_text_in_the_stream(mix: tuple[str, ...]) -> None:
    torch.manual_seed(4)
    attention, joint = build(mix=mix), make(FILM)
    video = ~FILM.is_text
    q, k, v, hidden = leaves(joint)
    cross = Call(q[:, :, video], k[:, :, video], v[:, :, video], SILENT, hidden=hidden[:, video])
    for with_text, without in zip(masks(attention, joint), masks(attention, cross), strict=True):
        assert torch.equal(with_text[:, :, video][:, :, :, video], without)
        assert bool(with_text[:, :, :, ~video].all())
    torch.testing.assert_close(attention.losses(joint), attention.losses(cross), rtol=0, atol=1e-12)


@pytest.mark.parametrize("text", ["joint", "cross"])
def test_the_model_trains_with_text_in_the_stream_and_beside_it(text: Literal["joint", "cross"]) -> None:
    torch.manual_seed(0)
    model = VideoDiT(
        dim=16, depth=1, heads=2, patch=(1, 1, 1), channels=1, vocabulary=5, text=text, attention={"name": "moga"}
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    clips = [torch.randn(1, shot.frames, 1, shot.rows, shot.cols) for shot in FILM.films[0].shots]
    words = torch.randint(5, (1, int(FILM.is_text.sum())))
    output = model(model.patchify(clips), words, torch.full((1, 3), 0.5), FILM)
    length = len(FILM) if text == "joint" else len(SILENT)
    assert {plan.shape for result in output.results for plan in result.plans} == {(length, length)}
    (output.velocity.square().mean() + output.losses["balance"]).backward()
    router = model.get_parameter("blocks.0.attention.router.weight").grad
    assert router is not None
    assert float(router.abs().max()) > 0
    other = model(model.patchify(clips), (words + 1) % 5, torch.full((1, 3), 0.5), FILM)
    assert not torch.equal(other.velocity, output.velocity)
