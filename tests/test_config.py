"""A config is what was asked for, or a refusal that names everything wrong with it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from experiments.config.declared import fits
from experiments.config.names import parse
from experiments.config.resolve import cannot_start, load
from experiments.config.yaml12 import read_yaml
from experiments.tracking.store import config_id
from sparse_zoo.errors import ZooError


class Thing:
    """No value of YAML is one."""


def test_base_is_valid_and_resolved() -> None:
    config = load()
    assert config["attention"] == {"name": "dense"}
    assert config["data"]["name"] == "video_films"
    assert config["data"]["seed"] == config["seed"] == 0


def test_a_name_replaces_its_node_wherever_it_is_typed() -> None:
    wanted = {"name": "moc", "top_k": 2}
    assert load(["attention=moc", "attention.top_k=2"])["attention"] == wanted
    assert load(["attention.top_k=2", "attention=moc"])["attention"] == wanted
    assert load([{"attention": {"name": "window", "edge": "cut"}}, "attention=moc"])["attention"] == {"name": "moc"}


def test_data_takes_a_preset_with_changes() -> None:
    data = load(["data=shot_world", "data.subjects=2"])["data"]
    assert (data["name"], data["subjects"], data["frames_per_shot"]) == ("shot_world", 2, 2)
    assert "folder" not in data


def test_a_list_gives_each_layer_its_own() -> None:
    config = load(["model.depth=2", "attention=[dense, {name: moc, top_k: 1}]"])
    assert config["attention"] == [{"name": "dense"}, {"name": "moc", "top_k": 1}]


def test_one_device_may_be_chosen() -> None:
    assert load(["trainer.devices=[1]"])["trainer"]["devices"] == [1]
    assert load(["trainer.devices=1", "trainer.num_nodes=1"])["trainer"]["devices"] == 1


def test_interpolation_resolves() -> None:
    config = load(["seed=7", "optim.warmup_steps=${seed}"])
    assert config["optim"]["warmup_steps"] == config["data"]["seed"] == 7
    with pytest.raises(ZooError, match="'nothing' not found"):
        load(["optim.warmup_steps=${nothing}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.devices=2"], r"trainer.devices must be 1, or a list of one index, got 2: a run has one process"),
        (["trainer.devices=-1"], r"trainer.devices must be 1, or a list of one index, got -1"),
        (["trainer.devices=auto"], r"trainer.devices must be 1, or a list of one index, got 'auto'"),
        (["trainer.devices=[0, 1]"], r"trainer.devices must be 1, or a list of one index, got \[0, 1\]"),
        (["trainer.num_nodes=2"], r"trainer.num_nodes must be 1, got 2"),
        (["attention=mocc"], r"unknown method 'mocc'; did you mean 'moc'\? known: bsa, dense, "),
        (["attention=dense", "trainer.val_check_interval=0.5"], r"count of batches where .*epoch is null, got 0.5"),
        (["attention=moc", "attention.topk=2"], r"unknown setting 'topk'; did you mean 'top_k'\?"),
        (["attention=moc", "attention.top_k=two"], r"attention.top_k must be int, got 'two'"),
        (["attention=moc", "attention.top_k=0"], r"top_k .*at least 1, got 0"),
        (["attention=window", "attention.window=[2, 3, 3]"], r"odd"),
        (["attention=moc", "attention.kernel=flx"], r"unknown kernel 'flx'"),
        (["attention=[dense, moc]"], r"a list for 2 layers, the model has 4"),
        (["attention=[dense, dense, dense, moc]", "attention.top_k=1"], r"attention is a list, one mapping per layer"),
        (["attention=moc", "attention.schedule.top_k.20=two"], r"from step 20: attention.top_k must be int, got 'two'"),
        (["attention=moc", "attention.schedule.top_k.20=0"], r"from step 20: MoC: top_k .*at least 1, got 0"),
        (["attention=moc", "attention.schedule.topk.20=2"], r"unknown setting 'topk'; did you mean 'top_k'\?"),
        (["attention=moc", "attention.schedule.top_k.1e3=2"], r"top_k: a step must be a whole number .* got '1e3'"),
        (["attention=moc", "attention.schedule={}"], r"attention.schedule: must be .* got {}"),
        (["attention=dense", "attention.schedule.name.9=mocc"], r"from step 9: unknown method 'mocc'"),
        (
            ["attention.schedule.kernel.9=torch", "trainer.accelerator=cpu"],
            r"from step 9: .*kernel 'torch'",
        ),
        (["data=shotworld"], r"unknown data 'shotworld'; did you mean 'shot_world'\?"),
        (["data.fsp=3"], r"unknown key of data 'fsp'; did you mean 'fps'\?"),
        (["data.size=[41, 64]"], r"size \[41, 64\] is not in whole patches"),
        (["trainer.max_step=3"], r"unknown key of trainer 'max_step'; did you mean 'max_steps'\?"),
        (["trainer.max_steps=many"], r"trainer.max_steps must be int, got 'many'"),
        (["trainer.max_steps=-5"], r"trainer.max_steps must be at least 1, got -5"),
        (["trainer.accelerator=cuda2"], r"unknown trainer.accelerator 'cuda2'; did you mean 'cuda'"),
        (["trainer.strategy=banana"], r"unknown trainer.strategy 'banana'; known: auto, ddp"),
        (["trainer.strategy=fsdp", "trainer.accelerator=cpu"], r"trainer: .*fsdp.* requires a GPU"),
        (["trainer.precision=99"], r"trainer.precision must be one of 32-true, .*bf16-mixed.* got 99"),
        (["trainer.limit_train_batches=0"], r"limit_train_batches must be a count of at least 1, or a share .* got 0"),
        (
            ["trainer.limit_train_batches=0.0"],
            r"limit_train_batches must be a count of at least 1, or a share .* got 0.0",
        ),
        (
            ["trainer.limit_train_batches=-1"],
            r"limit_train_batches must be a count of at least 1, or a share .* got -1",
        ),
        (["trainer.limit_val_batches=2.5"], r"limit_val_batches must be .* a share above 0 and at most 1, got 2.5"),
        (["trainer.max_steps=0"], r"trainer.max_steps must be at least 1, got 0"),
        (["trainer.max_epochs=0"], r"trainer.max_epochs must be null, got 0: a run ends after trainer.max_steps"),
        (["trainer.accumulate_grad_batches=0"], r"trainer.accumulate_grad_batches must be at least 1, got 0"),
        (["trainer.gradient_clip_val=-1"], r"trainer.gradient_clip_val must be at least 0, got -1"),
        (["trainer.val_check_interval=0"], r"trainer.val_check_interval must be a count of at least 1, .* got 0"),
        (["trainer.check_val_every_n_epoch=0"], r"trainer.check_val_every_n_epoch must be at least 1, got 0"),
        (["trainer.profiler=stopwatch"], r"trainer.profiler must be one of simple, .* got 'stopwatch'"),
        (["trainer.max_time=soon"], r"trainer.max_time must be null, got 'soon'"),
        (["trainer.devices=[0]", "trainer.accelerator=cpu"], r"trainer.devices must be 1 where"),
        (["trainer.plugins=x"], r"unknown key of trainer 'plugins'"),
        (["data.films_per_batch=0"], r"films_per_batch must be at least 1, got 0"),
        (["optim.lr=.nan"], r"optim.lr must be float, got nan"),
        (["trainer.logger=true"], r"unknown key of trainer 'logger'"),
        (["model.channels=3"], r"unknown key of model 'channels'"),
        (["model.dim=130"], r"model.heads 4 must divide model.dim 130"),
        (["model.heads=64"], r"head_dim = dim / heads must be even and at least 6"),
        (["optim.lr=fast"], r"optim.lr must be float, got 'fast'"),
        (["optim.lr=-1"], r"lr must be above 0, got -1"),
        (["flow.drop_text=2"], r"drop_text must be in \[0, 1\], got 2"),
        (["sampling.steps=0"], r"steps must be at least 1, got 0"),
        (["modell.dim=3"], r"unknown config key 'modell.dim'; did you mean 'model'\?"),
        (["model=3"], r"model must be a mapping, got 3"),
        (["seed=-1"], r"seed must be a whole number from 0 to 2³² - 1, got -1"),
        (["seed=4294967296"], r"seed must be a whole number from 0 to 2³² - 1, got 4294967296"),
        (["trainer.limit_val_batches=0"], r"limit_val_batches must be a count of at least 1, .* got 0"),
        (["trainer.limit_test_batches=0.0"], r"limit_test_batches must be a count of at least 1, .* got 0.0"),
        (["trainer.log_every_n_steps=0"], r"trainer.log_every_n_steps must be at least 1, got 0"),
        (["trainer.num_sanity_val_steps=-2"], r"trainer.num_sanity_val_steps must be at least -1, got -2"),
        (["trainer.max_time=00:00:00:00"], r"trainer.max_time must be null, got '00:00:00:00'"),
        (["model.mlp_ratio=0"], r"mlp_ratio must be at least 1 / dim, got 0"),
        (["model.mlp_ratio=-1"], r"mlp_ratio must be at least 1 / dim, got -1"),
        (["data=shot_world", "data.batch_size=0"], r"batch_size must be at least 1, got 0"),
        (["data.num_workers=-1"], r"num_workers must be at least 0, got -1"),
        (["attention"], r"an override is key=value, got 'attention'"),
        (["attention=[dense"], r"is no YAML"),
        (["trainer.max_steps=${nope}"], r"config: trainer.max_steps: Interpolation key 'nope' not found"),
        (["optim.lr=${oc.env:"], r"config: optim.lr: mismatched input"),
    ],
)
def test_refusals(overrides: list[str], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        load(overrides)


def test_a_schedule_is_one_config_however_its_steps_are_written() -> None:
    wanted = {"name": "moc", "chunk": "fixed", "schedule": {"chunk_tokens": {"0": 64, "20": 32}, "top_k": {"5": 3}}}
    dotted = ["attention.schedule.top_k.5=3", "attention.schedule.chunk_tokens.0=64", "attention.chunk=fixed"]
    last = "attention.schedule.chunk_tokens.20=32"
    plain = {**wanted, "schedule": {"chunk_tokens": {20: 32, 0: 64}, "top_k": {5: 3}}}
    other = {**wanted, "schedule": {"chunk_tokens": {20: 16, 0: 64}, "top_k": {5: 3}}}
    asked: list[list[str | Mapping[str, Any]]] = [
        ["attention=moc", "attention.chunk=fixed", "attention.schedule={chunk_tokens: {0: 64, 20: 32}, top_k: {5: 3}}"],
        ["attention=moc", *dotted, last],
        [{"attention": plain}],
        [{"attention": other}, last],
    ]
    configs = [load(overrides) for overrides in asked]
    assert all(config["attention"] == wanted for config in configs)
    assert len({config_id(config) for config in configs}) == 1


def test_each_layer_may_have_its_own_schedule() -> None:
    layers = "[{name: moc, schedule: {top_k: {5: 1}}}, {name: dense, schedule: {name: {3: moc}}, top_k: 2}]"
    config = load(["model.depth=2", f"attention={layers}"])
    assert config["attention"][1] == {"name": "dense", "schedule": {"name": {"3": "moc"}}, "top_k": 2}


def test_all_reasons_come_at_once() -> None:
    wrong = ["trainer.max_step=1", "optim.lr=fast", "data.siz=1", "attention=mocc", "nothing=1", "seed=x"]
    with pytest.raises(ZooError) as caught:
        load(wrong)
    for name in ("max_step", "optim.lr", "siz", "mocc", "nothing", "seed"):
        assert name in str(caught.value)


def test_all_reasons_of_a_trainer_come_at_once() -> None:
    wrong = {
        "strategy": "banana", "precision": "99", "accelerator": "gpuu", "limit_train_batches": -1, "max_steps": 0,
        "gradient_clip_val": -1, "profiler": "stopwatch", "devices": 3, "max_epochs": -7,
    }  # fmt: skip
    with pytest.raises(ZooError) as caught:
        load([{"trainer": wrong}, "optim.lr=-1", "flow.std=-1", "model.depth=0"])
    for name in [*wrong, "lr must be above 0", "std must be at least 0"]:
        assert name in str(caught.value), name


def test_a_device_that_is_not_on_this_machine_cannot_start_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cannot_start({"trainer": {"accelerator": "cpu", "strategy": "auto"}}) == []
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (reason,) = cannot_start({"trainer": {"accelerator": "cuda", "devices": 1}})
    assert reason.startswith("trainer: ")


def test_a_kernel_that_cannot_run_is_refused_with_every_reason() -> None:
    with pytest.raises(ZooError, match="kernel 'torch'") as caught:
        load(["attention.kernel=torch", "trainer.accelerator=cpu"])
    assert str(caught.value).count("\n  - ") >= 2


@pytest.mark.parametrize(
    ("value", "hint", "answer"),
    [
        (1, float, True),
        (float("nan"), float, False),
        (float("inf"), float | None, False),
        (True, int, False),
        (1.5, int, False),
        ("a", Literal["a", "b"], True),
        (1, Literal[True], False),
        (True, Literal[1], False),
        (10**400, float, False),
        ([1, "two"], Iterable[int], False),
        (3, Thing, False),
        (3, "Thing", True),  # a forward name: nothing to hold a value against
        (None, int | None, True),
        ([1, 2, 3], tuple[int, int, int], True),
        ([1, 2], tuple[int, int, int], False),
        ("text", Sequence[str], False),
        (["a", 1], Sequence[str], False),
        ({"a": 1}, Mapping[str, Any], True),
        ("a/b", str | Path, True),
        (3, str | Path, False),
    ],
)
def test_fits(value: object, hint: object, answer: bool) -> None:
    assert fits(value, hint) is answer


def test_values_are_yaml() -> None:
    assert parse("a.b=1e-3") == ("a.b", 1e-3)
    assert parse("a=null") == ("a", None)
    assert parse("a=x=y") == ("a", "x=y")


def test_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("- 1")
    with pytest.raises(ZooError, match="must hold a mapping"):
        read_yaml(path)
    for wrong in (b"a: [1", b"a:\n\tb: 1", b"a: 1\na: 2", b"\xff\xfe\x00"):
        path.write_bytes(wrong)
        with pytest.raises(ZooError, match="is no YAML") as caught:
            read_yaml(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("devices", [[], ["trainer.devices=1"], ["trainer.devices=[1]"]])
def test_a_device_that_is_not_here_may_be_on_a_cluster(devices: list[str]) -> None:
    assert load(["trainer.accelerator=gpu", *devices])["trainer"]["accelerator"] == "gpu"


def test_attention_is_judged_beside_a_model_that_is_wrong() -> None:
    with pytest.raises(ZooError) as error:
        load(["model.heads=5", "attention=window", "attention.window=[2,3,3]", "trainer.maxsteps=1"])
    for words in ("model.heads 5 must divide model.dim 128", "three odd whole numbers", "did you mean 'max_steps'"):
        assert words in str(error.value)
