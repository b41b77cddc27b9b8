"""A misspelt name is refused before torch is imported, by the names that the classes themselves have."""

from __future__ import annotations

import inspect
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import lightning
import pytest
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT, _PRECISION_INPUT_STR_ALIAS_CONVERSION
from typer.testing import CliRunner

import sparse_zoo as zoo
from experiments.cli import app
from experiments.cli.methods import TABLES
from experiments.config.budget import KINDS
from experiments.config.datamodule import OURS
from experiments.config.declared import parameters
from experiments.config.names import CHOICES, SHAPE, kernels, methods, misspelt, settings
from experiments.config.resolve import load
from experiments.config.sections import DATA, PRECISIONS, Match, Precision, Trainer, fields
from experiments.config.yaml12 import read_yaml
from experiments.sweep.schema import SWEEPS as PRESET_FILES
from experiments.sweep.schema import Written
from experiments.tools.paper_ledger import PAPERS
from experiments.tracking.store import Cell, Result, SweepRequest, write_sweep
from lit_modules.dit import TEXT
from lit_modules.settings import ORDERS
from sparse_zoo import registry
from sparse_zoo.bench import DTYPES, SUITES
from sparse_zoo.errors import ZooError
from sparse_zoo.kernels import get
from sparse_zoo.registry import SCHEDULE

WRONG: list[list[Any]] = [
    ["attenton=moc"],
    ["trainer.max_step=3"],
    ["optim.lrr=1"],
    ["model.dimm=1", "flow.shft=1", "sampling.step=1"],
    ["model.channels=3"],
    ["attention=mocc"],
    ["attention=moc", "attention.topk=2"],
    ["attention={name: moc_fixed, chunk: shot}"],
    ["model.depth=2", "attention=[dense, {name: moc, topk: 2}]"],
    ["data=shotworld"],
    ["data.fsp=3"],
    ["data=shot_world", "data.fps=3"],
    ["match.densty=0.5"],
    [{"trainer": {"max_step": 3}}],
]
RIGHT: list[list[Any]] = [
    [],
    ["attention=moc", "attention.top_k=2", "data=shot_world", "data.subjects=2", "seed=3"],
    ["attention.schedule.name.9=moc", "attention.top_k=2"],
    ["model.depth=4", "attention=[{cycle: [dense, moc], layers: rest}]"],
    [{"attention": {"name": "window", "edge": "cut"}}, "attention=moc"],
    ["match.density=0.5", "match.within=0.1"],
    [{"data": {"name": "shot_world"}}, {"data": {"subjects": 2}}],
]
PRESETS = [
    (path, size) for path in sorted(PRESET_FILES.glob("*.yaml")) for size in (None, *read_yaml(path).get("sizes", {}))
]


def test_the_names_are_those_of_the_classes() -> None:
    own = {name for name in zoo.names() if zoo.get(name).__module__.startswith("sparse_zoo.methods.")}
    assert {*methods()} == own
    for name, place in methods().items():
        assert (settings(place) or set()) - SHAPE == {*zoo.settings(name)} - {SCHEDULE.name}, name
    assert {*KINDS} < {*parameters(Match)}
    assert {*DATA} == {*OURS}


def test_the_trainer_s_settings_are_those_of_lightning() -> None:
    set_by_the_run = {"logger", "callbacks", "plugins", "default_root_dir", "barebones"}
    set_by_the_run |= {"enable_progress_bar", "enable_checkpointing", "enable_model_summary"}
    theirs = {key: x.default for key, x in inspect.signature(lightning.Trainer).parameters.items()}
    assert {key: x.default for key, x in parameters(Trainer).items()} == {
        key: default for key, default in theirs.items() if key not in set_by_the_run
    }
    assert {*get_args(Precision)} == {x for own in get_args(_PRECISION_INPUT) for x in get_args(own)}
    assert PRECISIONS == _PRECISION_INPUT_STR_ALIAS_CONVERSION


@pytest.mark.parametrize("table", TABLES)
def test_sections_list_every_setting_with_its_default_and_meaning(table: str) -> None:
    own, listed = parameters(TABLES[table]), fields(TABLES[table])
    assert [field.name for field in listed] == [*own]
    for field in listed:
        assert field.type, field
        assert re.fullmatch(r"\S[^\n]*[.)]", field.doc), field
        default = own[field.name].default
        if default is inspect.Parameter.empty:
            assert field.default == ""
        elif field.default in ("[]", "{}"):
            assert "factory" in repr(default)
        else:
            assert field.default == json.dumps(default)


WRONG_TYPES = [
    ("trainer.max_steps=many", "trainer.max_steps must be int, got 'many'"),
    ("trainer.precision=31", "trainer.precision must be one of 32-true"),
    ("optim.lr=fast", "optim.lr must be float, got 'fast'"),
    ("model.checkpoint=1", "model.checkpoint must be true or false, got 1"),
    ("flow.times=normal", "flow.times must be one of logistic, uniform, got 'normal'"),
    ("sampling.steps=1.5", "sampling.steps must be int, got 1.5"),
    ("data.size=48", "data.size must be Sequence[int], got 48"),
    ("trainer.fast_dev_run=true", "trainer.fast_dev_run must be false, got True"),
    ("trainer.fast_dev_run=3", "trainer.fast_dev_run must be false, got 3"),
    ("trainer.max_steps=-1", "trainer.max_steps must be at least 1, got -1"),
    ("trainer.max_steps=null", "trainer.max_steps must be int, got None"),
    ("trainer.min_steps=500", "trainer.min_steps must be null, got 500: a run ends after trainer.max_steps"),
    ("trainer.min_epochs=1", "trainer.min_epochs must be null, got 1: a run ends after"),
    ("trainer.max_epochs=-1", "trainer.max_epochs must be null, got -1: a run ends after"),
    ("trainer.max_time={hours: 1}", "trainer.max_time must be null, got {'hours': 1}: a run ends after"),
    ("trainer.overfit_batches=0.5", "trainer.overfit_batches must be 0, got 0.5: Lightning replaces the loader"),
    ("trainer.model_registry=x", "trainer.model_registry must be null, got 'x': checkpoints stay in"),
    ("trainer.limit_train_batches=-3", "trainer.limit_train_batches must be a count of at least 1, or a share"),
    ("trainer.limit_val_batches=1.5", "trainer.limit_val_batches must be a count of at least 1, or a share"),
    ("trainer.val_check_interval=-1", "trainer.val_check_interval must be a count of at least 1, or a share"),
    ("trainer.val_check_interval=00:01:00:00", "trainer.val_check_interval must be int | float | null, got '00:01:"),
    ("trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch must be at least 1, got 0"),
    ("trainer.accumulate_grad_batches=-2", "trainer.accumulate_grad_batches must be at least 1, got -2"),
    ("trainer.reload_dataloaders_every_n_epochs=-1", "trainer.reload_dataloaders_every_n_epochs must be at least 0"),
    ("trainer.gradient_clip_algorithm=hard", "trainer.gradient_clip_algorithm must be one of norm, value, null, got"),
    ("trainer.profiler=xla", "trainer.profiler must be one of simple, advanced, pytorch, null, got 'xla'"),
    ("trainer.devices=[-1]", "trainer.devices must be 1, or a list of one index, got [-1]"),
    ("trainer.devices='0,1'", "trainer.devices must be 1, or a list of one index, got '0,1'"),
    ("trainer.strategy=ddp_fork", "trainer.strategy must be one that starts no processes, got 'ddp_fork'"),
    ("trainer.strategy=ddp_spawn", "trainer.strategy must be one that starts no processes, got 'ddp_spawn'"),
    ("trainer.deterministic=maybe", "trainer.deterministic must be true or false | 'warn' | null, got 'maybe'"),
    ("trainer.num_nodes=0", "trainer.num_nodes must be 1, got 0"),
    ("trainer.default_root_dir=/tmp", "unknown key of trainer 'default_root_dir'"),
    ("trainer.enable_checkpointing=false", "unknown key of trainer 'enable_checkpointing'"),
    ("trainer.logger=false", "unknown key of trainer 'logger'"),
    ("trainer.callbacks=[]", "unknown key of trainer 'callbacks'"),
    ("trainer.barebones=true", "unknown key of trainer 'barebones'"),
]


@pytest.mark.parametrize(("override", "reason"), WRONG_TYPES)
def test_values_of_a_wrong_type_are_refused_by_name_check_and_config(override: str, reason: str) -> None:
    assert [found[: len(reason)] for found in misspelt([override], plugins=False)] == [reason]
    with pytest.raises(ZooError) as caught:
        load([override])
    assert reason in str(caught.value)


def test_the_settings_command_shows_sections_and_names_the_nearest() -> None:
    shown = CliRunner().invoke(app, ["settings", "optim", "sweep", "--json"])
    assert {*json.loads(shown.stdout)} == {"optim", "sweep"}
    rows = {row["name"]: row for row in json.loads(shown.stdout)["optim"]}
    assert rows["beta1"] == {"name": "beta1", "type": "float", "default": "0.9", "doc": "First beta of AdamW."}
    text = CliRunner().invoke(app, ["settings"]).stdout
    assert all(word in text for word in ("warmup_steps", "max_steps", "shot_world", "exclude"))


def test_the_page_on_configs_says_what_the_command_says() -> None:
    page = (Path(zoo.__file__).parents[1] / "docs" / "configs.md").read_text()
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \|$", page, re.M)
    assert len(rows) >= 3
    for written, message in rows:
        assert message in "; ".join(misspelt(written.split(), plugins=False)), written
    commands = re.findall(r"^zoo train (.+)$", page, re.M)
    assert commands
    assert [reason for command in commands for reason in misspelt(command.split(), plugins=False)] == []
    assert {name for names in re.findall(r"`zoo settings ([a-z_ ]+)`", page) for name in names.split()} == {*TABLES}


@pytest.mark.parametrize("overrides", WRONG)
def test_misspelt_names_are_refused_as_the_config_refuses_them(
    overrides: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = {x: cls for x, cls in registry._methods.items() if cls.__module__.startswith("sparse_zoo.methods.")}
    monkeypatch.setattr(registry, "_methods", shipped)  # other test files bring methods of their own
    quick = misspelt(overrides, plugins=False)
    assert quick
    with pytest.raises(ZooError) as caught:
        load(overrides)
    for reason in quick:
        assert reason in str(caught.value)


@pytest.mark.parametrize("overrides", RIGHT)
def test_right_names_pass(overrides: list[Any]) -> None:
    assert misspelt(overrides, plugins=False) == []


@pytest.mark.parametrize(("path", "size"), PRESETS, ids=lambda x: x.stem if isinstance(x, Path) else str(x))
def test_every_preset_passes_in_every_size(path: Path, size: str | None) -> None:
    Written.of(path, size).check_names()


def test_methods_of_ones_own_are_left_to_their_plugin() -> None:
    assert misspelt(["attention=mine", "attention.reach=2", "data=a.py:Films", "data.any=1"], plugins=True) == []
    assert misspelt(["attention=mine"], plugins=False)


def test_the_choices_of_options_are_those_of_the_modules() -> None:
    assert {*CHOICES["suite"]} == {*SUITES}
    assert {*CHOICES["dtype"]} == {*DTYPES}
    assert {*CHOICES["paper"]} == {*PAPERS}
    assert (CHOICES["order"], CHOICES["text_mode"]) == (ORDERS, TEXT)
    assert {*kernels()} == {x for x in zoo.kernels() if type(get(x)).__module__.startswith("sparse_zoo.kernels.")}


SWEEP = """
base: {trainer: {max_steps: 2}}
axes: {attention: [dense, moc]}
"""
SWEEPS = {
    "key.yaml": ("axis: {}", "did you mean 'axes'?"),
    "base.yaml": ("base: {trainer: {max_step: 3}}", "did you mean 'max_steps'?"),
    "method.yaml": ("axes: {attention: [dense, mocc]}", "cell mocc: unknown method 'mocc'; did you mean 'moc'?"),
    "axis.yaml": ("axes: {optim.lrr: [1, 2]}", "did you mean 'lr'?"),
    "zip.yaml": ("zip: {atention.top_k: [1], seed: [2]}", "did you mean 'attention'?"),
    "cell.yaml": ("cells: {a: {attention: moc, attention.topk: 3}}", "did you mean 'top_k'?"),
    "size.yaml": ("sizes: {small: {model.dimm: 3}}", "did you mean 'dim'?"),
    "matched.yaml": ("match: {densty: 0.5}", "did you mean 'density'?"),
    "above.yaml": ("extends: base.yaml", "did you mean 'max_steps'?"),
}
WRONG_NAMES = [
    *(
        ["sweep", name, *(["--size", "small"] if name == "size.yaml" else []), text]
        for name, (_, text) in SWEEPS.items()
    ),
    ["sweep", "quikstart", "did you mean 'quickstart'?"],
    ["sweep", "good.yaml", "--size", "smal", "unknown size 'smal'"],
    ["sweep", "good.yaml", "--executor", "slrum", "did you mean 'slurm'?"],
    ["train", "attenton=moc", "did you mean 'attention'?"],
    *(["train", override, reason] for override, reason in WRONG_TYPES),
    ["train", "--config", "file.yml", "did you mean 'max_steps'?"],
    ["report", "done", "--by", "val_los", "did you mean 'val_loss'?"],
    ["report", "nothing", "no sweep 'nothing'"],
    *(
        [command, *more, text]
        for command in ("sample", "ladder", "capture")
        for more, text in (
            (["run", "data.subject=3"], "did you mean 'subjects'?"),
            (["run", "model.dim=3"], "only data can be changed"),
            (["run", "data=shot_word"], "did you mean 'shot_world'?"),
            (["none"], "no such run"),
        )
    ),
    ["sample", "run", "--order", "shot", "did you mean 'shots'?"],
    ["ladder", "run", "--method", "moc:topk=3", "did you mean 'top_k'?"],
    ["replay", "calls.safetensors", "mocc", "did you mean 'moc'?"],
    ["replay", "calls.safetensors", "--match", "densty=1", "did you mean 'density'?"],
    ["map", "moc", "topk=3", "did you mean 'top_k'?"],
    ["cost", "mocc", "did you mean 'moc'?"],
    ["cost", "moc", "--kernel", "trition", "did you mean 'triton'?"],
    ["cost", "moc", "--match", "flop=1", "did you mean 'flops'?"],
    ["cost", "--paper", "mocc", "did you mean 'moc'?"],
    ["bench", "--suite", "cpuu", "did you mean 'cpu'?"],
    ["bench", "--method", "mocc", "did you mean 'moc'?"],
    ["bench", "--dtype", "bfloat", "did you mean 'bfloat16'?"],
    ["check", "mocc", "did you mean 'moc'?"],
    ["list", "mocc", "did you mean 'moc'?"],
    ["settings", "optin", "did you mean 'optim'?"],
]
WITHOUT_TORCH = """
import json, sys
from typer.testing import CliRunner
from experiments.cli import app
from experiments.cli.methods import TABLES
for *arguments, text in json.load(sys.stdin):
    done = CliRunner().invoke(app, arguments)
    late = sorted({"torch", "lightning", "mlflow", "numpy"} & {*sys.modules})
    if (done.exit_code, late) != (2, []) or text not in done.stderr:
        sys.exit(f"{arguments}: exit code {done.exit_code}, imported {late}, told {done.stderr!r}")
"""


@pytest.mark.slow
def test_every_command_refuses_a_wrong_name_before_torch_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, (text, _) in SWEEPS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "good.yaml").write_text(SWEEP)
    (tmp_path / "file.yml").write_text("trainer: {max_step: 3}")
    (tmp_path / "calls.safetensors").touch()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    config = {"attention": {"name": "dense"}, "data": {"name": "shot_world"}, "seed": 0}
    result = Result("dense", {"name": "dense"}, "finished", 0, config=config)
    result.write(tmp_path / "run")
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "runs"))
    cell = Cell("dense", config)
    write_sweep("done", SweepRequest("", (cell,)))
    Result("dense", {"name": "dense"}, "finished", 0, id=cell.id, config=config, val_loss=0.5).write(
        cell.folder("done")
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], input=json.dumps(WRONG_NAMES), capture_output=True, encoding="utf-8",
        check=False, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(zoo.__file__).parent.parent)},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Seconds of computing, whatever else the machine does: those of the import, and of each refusal.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2 + 0.1 * len(WRONG_NAMES)


def test_a_cell_that_exclude_leaves_out_may_have_wrong_names(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    axes = "axes: {attention: [dense, moc], attention.top_k: [1, 2]}\n"
    path.write_text(axes + "exclude: {attention: dense}\n")
    Written.of(path).check_names()
    path.write_text(axes)
    with pytest.raises(ZooError, match="dense: unknown setting 'top_k'"):
        Written.of(path).check_names()


@pytest.mark.slow
def test_errors_are_one_class_whatever_is_imported_first() -> None:
    code = """
import experiments, sparse_zoo.errors as first, sparse_zoo as zoo
try:
    zoo.build("mocc", heads=1, head_dim=2, dim=2)
except first.ZooError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, encoding="utf-8", check=False,
        env=os.environ | {"PYTHONPATH": str(Path(zoo.__file__).parent.parent)},
    )  # fmt: skip
    assert "unknown method 'mocc'" in done.stdout
