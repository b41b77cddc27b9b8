"""Schedules: each phase is the method built with its settings, whatever is asked around it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_registry import EXAMPLE
from toy_films import PACKED, batch, open_model

import sparse_zoo as zoo
from lit_modules.module import schedules
from sparse_zoo.schedule import phases
from sparse_zoo.testing import check_method
from sparse_zoo.testing.subject import STORY, make

SHAPE = {"heads": 4, "head_dim": 8, "dim": 6}


def same_as(attention, call, name, **settings):
    """Whether it attends as `name` with these settings, given the same parameters, does."""
    torch.manual_seed(3)
    plain = zoo.build(name, **SHAPE, **settings).double()
    plain.load_state_dict(dict(attention.at(call.step).state_dict()))
    got, want = attention.run(call), plain.run(call)
    assert [plan.dense_mask().sum() for plan in got.plans] == [plan.dense_mask().sum() for plan in want.plans]
    assert got.routing_flops == want.routing_flops
    assert got.losses == want.losses
    return torch.equal(got.out, want.out)


def test_several_settings_change_each_at_its_own_steps():
    scheduled = {"top_k": {"10": 1, 3: 2}, "chunk": {10: "fixed"}, "chunk_tokens": {10: 7, 20: 5}}
    attention = zoo.build("moc", **SHAPE, schedule=scheduled, top_k=4)
    assert attention.starts == (0, 3, 10, 20)
    for steps, settings in (
        ((None, 0, 2), {"top_k": 4}),
        ((3, 9), {"top_k": 2}),
        ((10, 19), {"top_k": 1, "chunk": "fixed", "chunk_tokens": 7}),
        ((20, 10**6), {"top_k": 1, "chunk": "fixed", "chunk_tokens": 5}),
    ):
        for step in steps:
            assert same_as(attention, make(STORY, step=step), "moc", **settings)
    assert attention.settings[1] == {"top_k": 2, "chunk": "frame", "chunk_tokens": 1280}  # defaults too


def test_the_first_phase_may_be_scheduled_at_0():
    attention = zoo.build("moc", **SHAPE, schedule={"top_k": {0: 1, 5: 2}}, top_k=4)
    assert attention.starts == (0, 5)
    assert same_as(attention, make(STORY), "moc", top_k=1)


def test_the_method_itself_changes_and_settings_go_to_those_who_know_them():
    changes = {"name": {4: "moga", 8: "moc"}, "frames_per_group": {6: 1}, "top_k": {9: 3}}
    attention = zoo.build("dense", **SHAPE, schedule=changes, groups=3, text_reads="text").double()
    text, moga = {"text_reads": "text"}, {"text_reads": "text", "groups": 3}
    assert same_as(attention, make(STORY, step=3), "dense", **text)
    assert same_as(attention, make(STORY, step=5), "moga", **moga)
    assert same_as(attention, make(STORY, step=7), "moga", **moga, frames_per_group=1)
    assert same_as(attention, make(STORY, step=8), "moc", **text)
    assert same_as(attention, make(STORY, step=9), "moc", **text, top_k=3)
    assert attention.settings[0] == {"name": "dense"}
    with pytest.raises(zoo.ZooError, match="unknown setting 'windows'"):
        zoo.build("dense", **SHAPE, schedule={"name": {4: "moc"}}, windows=(1, 1))


def test_phases_share_parameters_initialised_as_without_a_schedule():
    torch.manual_seed(0)
    plain, after = zoo.build("moga", **SHAPE), torch.rand(1)
    torch.manual_seed(0)
    attention, then = zoo.build("moga", **SHAPE, schedule={"alpha": {3: 0.5}, "mix": {6: "group"}}), torch.rand(1)
    assert torch.equal(after, then)
    (weight, bias) = attention.parameters()
    assert torch.equal(weight, plain.router.weight)
    for step in (0, 3, 6):
        weight.grad = None
        attention.run(make(STORY, dtype=torch.float32, step=step)).losses["balance"].backward()
        assert weight.grad.any()
    assert bias is attention.at(6).router.bias
    copied = zoo.build("moga", **SHAPE, schedule={"alpha": {3: 0.5}, "mix": {6: "group"}})
    copied.load_state_dict(attention.state_dict())
    assert torch.equal(copied.at(3).router.weight, weight)


def test_features_made_beforehand_serve_whatever_phase():
    attention = zoo.build("dense", **SHAPE, schedule={"name": {4: "moga"}, "mix": {6: ["group"]}}).double()
    for step in (0, 5, 7):
        call = make(STORY, step=step)
        told = replace(call, features=attention.features(call.hidden), hidden=None)
        assert torch.equal(attention.run(told).out, attention.run(call).out)


@pytest.mark.parametrize(
    ("schedule", "messages"),
    [
        ({}, ["at least one setting, got {}"]),
        ([], ["must be {setting: {step: value}}"]),
        ({"top_k": {}}, ["top_k must be {step: value} with at least one step, got {}"]),
        ({"top_k": 3}, ["top_k must be {step: value}"]),
        (
            {"top_k": {-1: 2, "x": 3, 1.5: 1, True: 2, None: 1}},
            ["at least 0, got -1", "got 'x'", "got 1.5", "got True", "got None"],
        ),
        ({"top_k": {2: 1, "2": 1}}, ["top_k: step 2 is given twice"]),
        (
            {"topk": {3: 1}, "top_k": {7: 0}, "chunk": {9: "sho"}},
            ["did you mean 'top_k'", "from step 7: MoC: top_k must be", "from step 9:", "did you mean 'shot'"],
        ),
        ({"name": {3: "mocc"}}, ["unknown method 'mocc'; did you mean 'moc'"]),
        ({"schedule": {3: {}}}, ["unknown setting 'schedule'"]),
        ({"heads": {3: 2}}, ["unknown setting 'heads'"]),
    ],
)
def test_refusals_name_everything_and_the_step(schedule, messages):
    with pytest.raises(zoo.ZooError) as error:
        zoo.build("moc", **SHAPE, schedule=schedule)
    for message in messages:
        assert message in str(error.value)


def test_shapes_of_parameters_may_not_change():
    with pytest.raises(zoo.ZooError, match=r"from step 9: 'router.weight' would change from \(4, 6\) to \(2, 6\)"):
        zoo.build("moga", **SHAPE, groups=4, schedule={"groups": {3: 4, 9: 2}})


def test_what_is_declared_holds_in_every_phase():
    def scheduled(**values):
        return zoo.build("moc", **SHAPE, schedule={name: dict(enumerate(given)) for name, given in values.items()})

    assert scheduled(causal=["strict", "strict"], top_k=[1, 2]).causality == "strict"
    assert scheduled(causal=["strict", "routing"]).causality == "routing"
    assert scheduled(causal=["routing", None]).causality is None
    assert scheduled(anchors=[["text", "shot"], ["shot", "chunk"]]).anchors == ("shot",)
    assert scheduled(causal=["strict", "strict"]).anchors == ("text", "shot")
    assert scheduled(causal=["strict", "routing"]).anchors == ("shot",)  # not all of the film's text in both
    assert [scheduled(anchors=[["text", "shot"], [last]]).may_be_empty for last in ("chunk", "shot")] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moc", "moga"])
def test_a_scheduled_method_is_judged_by_the_checks(method):
    """Those that a wrapper could fail, of what `zoo check` runs."""
    wrapper = ["settings_survive_yaml", "causality_holds", "text_reads_text", "anchors_attended", "checkpointing"]
    state = ["state_dict_restores", "copies_and_pickles", "features_per_token", "some_queries", "parameters_learn"]
    changes = {"text_reads": {"4": "method"}, "kernel": {4: "reference", 6: "auto"}}
    check_method(method, schedule=changes, only=wrapper + state)


def test_it_is_a_setting_of_every_method_and_plug_ins_may_not_take_its_name(tmp_path: Path):
    for name in zoo.names():
        assert list(zoo.settings(name))[-1] == "schedule"
    file = tmp_path / "mine.py"
    file.write_text(EXAMPLE.format(name="mine"))
    zoo.load_plugin(file)
    attention = zoo.build("mine", **SHAPE, schedule={"reach": {2: 0}})
    assert same_as(attention, make(STORY, step=2), "mine", reach=0)
    file = tmp_path / "other.py"
    file.write_text(EXAMPLE.format(name="other").replace("reach", "schedule"))
    with pytest.raises(zoo.ZooError, match="every method has a setting 'schedule'"):
        zoo.load_plugin(file)


def test_phases_of_plain_settings():
    assert phases({"a": 1, "b": 2}, {"a": {"5": 3}, "c": {0: 4, 7: 5}}) == {
        0: {"a": 1, "b": 2, "c": 4},
        5: {"a": 3, "b": 2, "c": 4},
        7: {"a": 3, "b": 2, "c": 5},
    }


def test_recomputed_activations_meet_the_phase_of_their_step():
    changing = {"name": "moc", "schedule": {"top_k": {3: 1}}, "top_k": 3}
    gradients = {}
    for recompute in (False, True):
        for step in (2, 3):
            model = open_model(attention=changing, checkpoint=recompute)
            films = batch(PACKED)
            x, time = model.patchify(films["clips"]), torch.full((1,), 0.5)
            model(x, films["text"], time, PACKED, step=step).velocity.square().sum().backward()
            gradients[recompute, step] = model.blocks[0].qkv.weight.grad
    for step in (2, 3):
        assert torch.equal(gradients[False, step], gradients[True, step])
    assert not torch.equal(gradients[True, 2], gradients[True, 3])


def test_what_is_in_force_is_shown_by_layer_only_where_layers_differ():
    one = {"name": "moc", "schedule": {"top_k": {3: 1}, "chunk": {5: "shot"}}}
    assert schedules(open_model(attention=one), 4) == {"schedule/phase": 1.0, "schedule/top_k": 1.0}
    mixed = open_model(attention=[one, {"name": "dense", "schedule": {"name": {4: "moc"}, "top_k": {6: 2}}}])
    assert schedules(mixed, 3) == {
        "schedule/layer_0/phase": 1.0, "schedule/layer_0/top_k": 1.0, "schedule/layer_1/phase": 0.0,
    }  # fmt: skip
    assert schedules(mixed, 4)["schedule/layer_1/top_k"] == 5.0  # the default
    assert schedules(open_model(), 4) == {}
