"""Several ranks: what they exchange, what is refused, and that a method may say that it cannot be split."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import BASE

import sparse_zoo as zoo
from experiments.config.resolve import cannot_start, cell, load
from experiments.inspection.devices import at_scale, device_share, read_parallel
from lit_modules.dit import VideoDiT
from lit_modules.flops import ModelShape
from lit_modules.settings import Parallel
from lit_modules.stream import stream
from sparse_zoo import testing
from sparse_zoo.parallel import Ulysses, exchanged_elements, split_sizes, why_not
from sparse_zoo.testing.parallel import Seat, mean_gradient, run_ranks
from sparse_zoo.testing.subject import PACKED, STORY, make

EVERY_HEAD = "scores are normalised over heads"


class Whole(zoo.Attention):
    """Dense attention whose queries are centred over heads, and which says so."""

    needs_all_heads = EVERY_HEAD

    def branches(self, call: zoo.Call) -> list[zoo.Branch | zoo.Term]:
        return [zoo.Branch(zoo.Plan.dense(call.layout), q=call.q - call.q.mean(1, keepdim=True))]


class Counting(Seat):
    """A rank that counts the elements it sends to others."""

    elements = 0

    def all_to_all(self, sent: Any, shapes: Any) -> list[torch.Tensor]:
        self.elements += sum(part.numel() for i, part in enumerate(sent) if i != self.rank)
        return super().all_to_all(sent, shapes)


def test_a_method_that_needs_all_heads_is_skipped_by_the_check_and_refused_by_ulysses() -> None:
    (outcome,) = testing.check_method(Whole, only=["ranks_equal_one"])
    assert (outcome.status, outcome.reason) == ("skipped", f"needs_all_heads: {EVERY_HEAD}")
    (outcome,) = testing.check_method(Whole, only=["head_slices"])
    assert outcome.status == "skipped"


def test_every_reason_why_a_method_cannot_be_split_is_given_at_once() -> None:
    reasons = why_not(Whole(heads=4, head_dim=8), 4, 3)
    assert [reason for reason in reasons if reason] == [
        "4 heads cannot be shared by 3 ranks; the number of ranks must divide the number of heads",
        f"Whole needs all heads on one device: {EVERY_HEAD}",
    ]
    assert why_not(Whole(heads=4, head_dim=8), 4, 1) == []


def test_a_schedule_needs_all_heads_where_one_of_its_phases_does() -> None:
    dense, whole = zoo.build("dense", heads=2, head_dim=8), Whole(heads=2, head_dim=8)
    assert zoo.Scheduled({0: dense, 5: whole}, [{}, {}]).needs_all_heads == EVERY_HEAD


def test_tokens_that_are_not_the_ranks_part_are_refused_with_every_tensor_named() -> None:
    call, attention = make(STORY), zoo.build("dense", heads=4, head_dim=8)

    def on_rank(seat: Seat) -> str:
        with pytest.raises(zoo.ZooError) as refused:
            Ulysses(seat).run(attention, call.q, call.k, call.v, STORY, hidden=call.hidden)
        return str(refused.value)

    for rank, said in enumerate(run_ranks(2, on_rank)):
        own = split_sizes(len(STORY), 2)[rank]
        for name in ("q", "k", "v", "hidden"):
            assert f"{name} has {len(STORY)} tokens; rank {rank} holds {own} of the stream's {len(STORY)}" in said


@pytest.mark.parametrize(("method", "features"), [("dense", 0), ("moga", 4), ("nsa", 12)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_elements_sent_are_those_of_the_formula(method: str, features: int, ranks: int) -> None:
    call = make(STORY, grad=True)
    attention = zoo.build(method, heads=4, head_dim=8, dim=6, **zoo.get(method).small).double()
    own = split_sizes(len(STORY), ranks)

    def on_rank(seat: Seat) -> tuple[int, int]:
        counting = Counting(seat.room, seat.rank)
        parts = [x.split(own, dim=x.dim() - 2)[seat.rank] for x in (call.q, call.k, call.v, call.hidden)]
        out = Ulysses(counting).run(attention, *parts[:3], STORY, hidden=parts[3]).out
        forward = counting.elements
        out.sum().backward()
        return forward, counting.elements - forward

    for rank, (forward, backward) in enumerate(run_ranks(ranks, on_rank)):
        sizes: dict[str, Any] = {"heads": 4, "key_heads": 2, "head_dim": 8, "batch": 2}
        without = 1 if method == "moga" else 0  # the group of a token is a choice, through which no gradient passes
        want = exchanged_elements(len(STORY), ranks, rank, features=features, **sizes)
        less = exchanged_elements(len(STORY), ranks, rank, features=features - without, **sizes)
        losses = (ranks - 1) * len(attention.losses(call)) if method == "moga" else 0
        assert (forward, backward) == (want[0] + losses, less[1])


def test_a_stream_shorter_than_the_ranks_leaves_some_without_tokens() -> None:
    film = zoo.Layout.film([zoo.Shot(1, 1, 1, 1)], caption=1)
    call, attention = make(film), zoo.build("moc", heads=4, head_dim=8, top_k=1).double()
    want = attention.run(call).out
    own = split_sizes(len(film), 4)
    assert own == [1, 1, 1, 0]

    def on_rank(seat: Seat) -> torch.Tensor:
        parts = [x.split(own, dim=2)[seat.rank] for x in (call.q, call.k, call.v)]
        return Ulysses(seat).run(attention, *parts, film).out

    torch.testing.assert_close(torch.cat(run_ranks(4, on_rank), dim=2), want)


def test_costs_of_all_ranks_add_up_to_the_whole_cost() -> None:
    call, attention = make(PACKED), zoo.build("moc", heads=4, head_dim=8, top_k=1).double()
    own = split_sizes(len(PACKED), 2)

    def on_rank(seat: Seat) -> zoo.Cost:
        parts = [x.split(own, dim=2)[seat.rank] for x in (call.q, call.k, call.v)]
        return Ulysses(seat).run(attention, *parts, PACKED).cost()

    first, second = run_ranks(2, on_rank)
    total, whole = first + second, attention.run(call).cost()
    assert (total.pairs, total.dense_pairs, total.flops) == (whole.pairs, whole.dense_pairs, whole.flops)


def test_an_error_on_one_rank_ends_all() -> None:
    def on_rank(seat: Seat) -> None:
        if seat.rank == 1:
            raise ValueError("rank 1")
        seat.all_to_all([torch.zeros(1)] * 3, [[1]] * 3)

    with pytest.raises(ValueError, match="rank 1"):
        run_ranks(3, on_rank)


@pytest.mark.parametrize("text", ["joint", "cross"])
@pytest.mark.parametrize("attention", [{"name": "moga", "groups": 3}, {"name": "moc", "top_k": 1, "drop_off": 0.9}])
@pytest.mark.parametrize(("film", "ranks"), [(STORY, 4), (PACKED, 2)], ids=["story", "packed"])
def test_a_transformer_on_several_ranks_gives_what_it_gives_on_one(
    text: Any, attention: dict[str, Any], film: zoo.Layout, ranks: int
) -> None:
    sizes: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 4, "channels": 1, "patch": (1, 2, 2), "vocabulary": 5}
    given = {"text": text, "pooled_text": "tokens", "predicts": "clean", "checkpoint": film is STORY}
    model = VideoDiT(**sizes, **given, attention=attention).double()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    table = stream(film)
    video, words = torch.randn(2, len(table.video), 4).double(), torch.randint(0, 5, (2, len(table.text)))
    time, weight = torch.rand(2, len(table.film_of_shot)).double(), torch.randn_like(video)

    def learn(seat: Seat | None) -> tuple[torch.Tensor, dict[str, torch.Tensor | None], dict[str, torch.Tensor]]:
        mine = copy.deepcopy(model)
        mine.sequence = None if seat is None else Ulysses(seat)
        found = mine(video, words, time, film, step=3, seed=5)
        ((found.velocity * weight).sum() + sum(found.losses.values())).backward()
        grads = {name: parameter.grad for name, parameter in mine.named_parameters()}
        return found.velocity.detach(), grads, {name: loss.detach() for name, loss in found.losses.items()}

    velocity, grads, losses = learn(None)
    parts = run_ranks(ranks, learn)
    for own in parts:
        torch.testing.assert_close(own[0], velocity, rtol=0, atol=1e-9)
        torch.testing.assert_close(own[2], losses, rtol=0, atol=1e-6)
    for name, grad in grads.items():
        scale = 1.0 if grad is None else max(1.0, float(grad.abs().max()))
        got = mean_gradient([own[1][name] for own in parts])
        torch.testing.assert_close(got, grad, rtol=0, atol=1e-6 * scale)  # the router is in float32


# -- what a config may ask for, and what that costs -------------------------------------------------------------------


def test_one_device_is_no_section_and_changes_no_id() -> None:
    plain = cell("run", load([BASE]))
    assert "parallel" not in plain.config
    assert cell("run", load([BASE, "parallel.data=1", "parallel.sequence=1"])).id == plain.id


def test_the_number_of_ranks_that_share_a_film_is_no_part_of_an_id_and_that_of_data_ranks_is() -> None:
    small = {"model": {"heads": 4, "dim": 32}}
    ids = [cell("run", load([BASE, small, *own])).id for own in ([], ["parallel.sequence=2"], ["parallel.sequence=4"])]
    assert ids[1] == ids[2] != ids[0]
    assert cell("run", load([BASE, small, "parallel.data=2"])).id not in ids


def test_every_reason_against_several_devices_is_given_before_training() -> None:
    asked = {"optim": {"optimizer": "muon"}, "sampling": {"order": "shots", "context": 1}, "trainer": {"precision": 16}}
    with pytest.raises(zoo.ZooError) as refused:
        load([BASE, asked, {"attention": {"name": "vmoba", "scope": "global"}}, "parallel.sequence=3"])
    for reason in (
        "2 heads cannot be shared by 3 ranks",
        "VMoBA needs all heads on one device: with scope 'global' all heads share a budget",
        "muon needs whole matrices",
        "scales losses, which shards do not take",
        "sampling.context reads the first block's input",
    ):
        assert reason in str(refused.value)
    with pytest.raises(zoo.ZooError, match=r"data must be at least 1, got 0"):
        load([BASE, "parallel.data=0"])
    with pytest.raises(zoo.ZooError, match=r"parallel.sequence must be int, got 'two'"):
        load([BASE, "parallel.sequence=two"])
    with pytest.raises(zoo.ZooError, match="no backend exchanges there"):
        load([BASE, {"trainer": {"accelerator": "mps"}}, "parallel.data=2"])


def test_more_ranks_than_devices_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load([BASE, {"trainer": {"accelerator": "auto"}}, "parallel.data=4"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (reason,) = [reason for reason in cannot_start(config) if reason.startswith("parallel")]
    assert reason == "parallel asks for 4 devices, this machine has 2; lower parallel.data or parallel.sequence"


def test_a_devices_share_follows_from_the_model_and_the_exchange() -> None:
    film, shape = zoo.Layout.film([zoo.Shot(2, 4, 4)]), ModelShape(dim=48, depth=3, heads=4)
    given: dict[str, Any] = {"layout": film, "shape": shape, "density": 0.5, "bandwidth": 1.0, "speed": 1.0}
    one = device_share("x", "dense", {}, parallel=Parallel(), **given)
    four = device_share("x", "dense", {}, parallel=Parallel(2, 2), **given)
    model = VideoDiT(dim=48, depth=3, heads=4, channels=64, patch=(1, 1, 1), vocabulary=0, attention={"name": "dense"})
    assert one.weights == 4 * (sum(p.numel() for p in model.parameters()))
    assert four.weights == one.weights / 4
    assert (one.attention_exchange, one.weights_exchange, one.share) == (0, 0, 0)
    forward, backward = exchanged_elements(len(film), 2, heads=4, head_dim=12)
    assert four.attention_exchange == 2 * (2 * forward + backward)
    assert four.compute_seconds == pytest.approx(one.compute_seconds / 2)
    rows = at_scale("dense", {}, film, shape, Parallel(8, 4), 0.5)
    assert [row.tokens for row in rows] == [32, 180_000, 582_000, 180_000, 582_000]
    with pytest.raises(zoo.ZooError, match=r"as asked: 4 heads cannot be shared by 3 ranks"):
        device_share("as asked", "dense", {}, parallel=Parallel(1, 3), **given)
    with pytest.raises(zoo.ZooError, match="unknown part 'sequences'; did you mean 'sequence'"):
        read_parallel("data=8,sequences=4")
