"""`dense_above`: films are drawn densely while there is much noise, and by the method after it."""

from dataclasses import replace

import pytest
import torch
from toy_films import FIRST, PACKED, batch, open_model

import sparse_zoo as zoo
from lit_modules import Euler, RectifiedFlow
from sparse_zoo.testing.subject import STORY, make

SHAPE = {"heads": 4, "head_dim": 8, "dim": 6}
MOC = {"name": "moc", "top_k": 1, "anchors": ["chunk"]}
FLOW = RectifiedFlow(shift=3.0)
TIMES = [1.0, 0.9, 0.75, 0.5]  # four steps: u = 1, .75, .5, .25 under the flow's shift


def drawing(**call):
    return replace(make(STORY), memory={}, **call)


class Told:
    """Which plans ran, by noise time: dense ones or not, and what was asked of the kernel."""

    def __init__(self, attention):
        self.times, self.dense, self.routing = [], [], []
        attention.register_forward_hook(self.see, with_kwargs=True)

    def see(self, _, __, context, result):
        self.times.append(round(float(context["noise"].max()), 6))
        self.dense.append(result.cost().density == 1 and len(result.plans) == 1)
        self.routing.append(result.routing_flops)


@pytest.mark.parametrize("order", ["film", "shots"])
def test_the_sampler_draws_densely_above_and_by_the_method_below(order):
    model, known = open_model(attention={**MOC, "dense_above": 0.7}), torch.tensor([True] + [False] * 7)
    told = Told(model.blocks[1].attention)
    Euler(4, guidance=2.0, order=order).generate(
        model, FLOW, batch(PACKED, size=2), known=known[: len(batch(PACKED)["clips"])]
    )
    times, shots = [time for time in TIMES for _ in range(2)], len(batch(PACKED)["clips"]) - 1
    assert told.times == times * (1 if order == "film" else shots)
    assert [routing == 0 for routing in told.routing] == [time > 0.7 for time in told.times]
    if order == "film":  # one shot alone is dense by the method too
        assert told.dense == [time > 0.7 for time in times]


def test_losses_are_of_the_method_itself_in_training_and_in_judging():
    films = batch(FIRST)
    for training in (True, False):
        found = []
        for settings in ({}, {"dense_above": 0.0}):
            model = open_model(attention={"name": "moga", "groups": 2, **settings}).train(training)
            time = torch.full((1, len(films["clips"])), 0.9)
            loss = FLOW.loss(model, films["clips"], films["text"], time, FIRST, torch.Generator().manual_seed(0))
            found.append(loss)
        assert torch.equal(found[0].loss, found[1].loss)
        assert found[0].output.losses == found[1].output.losses
        assert found[1].output.losses


@pytest.mark.parametrize("text_reads", ["method", "text"])
@pytest.mark.parametrize("method", ["moc", "moga", "window"])
def test_above_it_is_dense_attention(method, text_reads):
    attention = zoo.build(method, **SHAPE, dense_above=0.5, text_reads=text_reads).double()
    dense = zoo.build("dense", **SHAPE, text_reads=text_reads).double()
    above, below = (attention.run(drawing(noise=time)) for time in (0.51, 0.5))
    assert torch.equal(above.out, dense.run(drawing()).out)
    assert (above.losses, above.routing_flops, len(above.plans)) == ({}, 0, 1)
    plain = zoo.build(method, **SHAPE, text_reads=text_reads).double()
    plain.load_state_dict(attention.state_dict())  # and so a checkpoint fits with it and without
    assert torch.equal(below.out, plain.run(drawing()).out)
    assert not torch.equal(below.out, above.out)


def test_the_time_is_that_of_the_noisiest_shot_and_needed():
    attention = zoo.build("moc", **SHAPE, dense_above=0.5).double()
    given = torch.zeros(2, 6, dtype=torch.float64)
    given[:, -1] = 0.8
    costs = [attention.run(drawing(noise=noise)).routing_flops for noise in (given, 0.8, given.clamp(max=0.3), None)]
    assert [cost > 0 for cost in costs] == [False, False, True, True]


def test_some_queries_alone_are_dense_too():
    attention = zoo.build("moc", **SHAPE, dense_above=0.5).double()
    call = drawing(noise=0.9)
    rows = torch.tensor([0, 3, 7])
    part = replace(call, q=call.q[:, :, rows], q_rows=rows)
    torch.testing.assert_close(attention.run(part).out, attention.run(call).out[:, :, rows], rtol=0, atol=1e-12)


def test_it_may_be_scheduled_and_differ_by_layer():
    attention = zoo.build("moc", **SHAPE, dense_above=0.5, schedule={"dense_above": {3: None, 6: 0.9}}).double()
    costs = [attention.run(drawing(noise=0.8, step=step)).routing_flops for step in (0, 3, 6)]
    assert [cost > 0 for cost in costs] == [False, True, True]
    model = open_model(attention=[{**MOC, "dense_above": 0.7}, MOC])
    told = [Told(block.attention) for block in model.blocks]
    Euler(2).generate(model, FLOW, batch(FIRST))
    assert [layer.dense for layer in told] == [[True, True], [False, False]]


def test_what_is_declared_allows_for_it():
    assert zoo.build("moc", **SHAPE).causality == "routing"
    assert zoo.build("moc", **SHAPE, dense_above=0.5).causality is None
    for schedule in (None, {"top_k": {4: 1}}):
        with pytest.raises(zoo.ZooError, match="dense_above is not for strict causality"):
            zoo.build("moc", **SHAPE, causal="strict", dense_above=0.5, schedule=schedule)


@pytest.mark.parametrize("given", [1, 1.0, -0.1, True, "0.5", float("nan")])
def test_a_time_that_is_none_is_refused(given):
    with pytest.raises(zoo.ZooError, match=r"dense_above must be None or a noise time in \[0, 1\)"):
        zoo.build("moc", **SHAPE, dense_above=given)
