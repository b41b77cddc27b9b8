"""Before a sweep runs: every cell is built on its own films, and it is said what the sweep would take."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny import BASE, write_sweep
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from experiments.cli import app
from experiments.config import resolve as config_module
from experiments.config.datamodule import build
from experiments.config.resolve import Config, load
from experiments.sweep import dry_run, preflight
from experiments.sweep import expand as sweep_module
from experiments.sweep.dry_run import Forecast
from experiments.sweep.expand import read
from experiments.tracking import provenance as code_module
from experiments.tracking.provenance import provenance
from experiments.tracking.store import Result
from lit_modules import AttentionCost, LitVideoDiT, VideoDiT
from sparse_zoo.errors import ZooError

LONG = '''
import torch

import sparse_zoo as zoo


@zoo.register("twice")
class Twice(zoo.Attention):
    """Names a chunk twice for one query where there are more than four shots."""

    def plan(self, q, k, layout):
        shots = layout.chunks("shot", captions="inside")
        chosen = torch.zeros(1, 1, len(layout), 2, dtype=torch.int64)
        chosen[..., 1] = 0 if shots.count > 4 else -1
        return zoo.Plan.routed(shots, chosen)


@zoo.register("short")
class Short(zoo.Attention):
    """Dense in films of up to four shots, and nothing at all in longer ones."""

    def plan(self, q, k, layout):
        if int(layout.shot.max()) > 3:
            raise IndexError("five shots are too many")
        return zoo.Plan.dense(layout)
'''


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("COLUMNS", "100")
    preflight._run_preflight.cache_clear()
    preflight._step_seconds.cache_clear()
    return tmp_path / "runs"


def zoo_(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def config_of(*overrides: dict[str, Any]) -> Config:
    return load([BASE, *overrides])


# -- a trial -----------------------------------------------------------------------------------------------------------


def first_step(config: Config) -> AttentionCost:
    """What Lightning's own first training step counts."""
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    data: Any = build(config["data"])
    shape = {"channels": data.channels, "patch": list(data.patch), "vocabulary": data.vocabulary}
    model = {**config["model"], **shape, "attention": config["attention"]}
    module = LitVideoDiT(model, config["flow"], config["optim"], seed=config["seed"])
    cost = AttentionCost()
    quiet: dict[str, Any] = dict.fromkeys(
        ["enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False
    )
    trainer = pl.Trainer(
        **config["trainer"] | {"max_steps": 1, "limit_val_batches": 0}, logger=False, callbacks=[cost], **quiet
    )
    trainer.fit(module, datamodule=data)
    return cost


@pytest.mark.filterwarnings("ignore")
def test_a_trial_sees_what_the_first_step_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router's groups follow from the weights, the film, its noise and its time: all must be those of the run."""
    monkeypatch.setattr(preflight, "BATCHES", 1)
    preflight._data.cache_clear()
    attention = {"name": "moga", "groups": 3}
    config = config_of({"attention": attention, "model.depth": 2, "seed": 3, "data.subjects": 2, "data.tags": 2})
    found, real = preflight.run_preflight(config), first_step(config).summary()
    assert [layer.density for layer in found.layers] == real["layers"]
    assert found.layers[0].density != found.layers[1].density
    assert found.varies
    assert found.attention_flops == real["flops"] + real["flops_backward"] + real["routing_flops"]
    preflight._data.cache_clear()


def test_flops_are_those_of_a_whole_batch() -> None:
    """Against torch's own counter over forward and backward of dense attention, four films at once."""
    config = config_of({"data.batch_size": 4, "model": {"dim": 24, "depth": 2}, "flow.drop_text": 0.0})
    found = preflight.run_preflight(config)
    made, batches = preflight._data(json.dumps(config["data"]))
    shape: dict[str, Any] = {"channels": made.channels, "patch": made.patch, "vocabulary": made.vocabulary}
    model = VideoDiT(**config["model"], **shape, attention={"name": "dense", "kernel": "reference"})
    with FlopCounterMode(display=False) as counter:
        preflight._loss(config, model, batches[0], 0, "cpu").loss.backward()
    counted = counter.get_total_flops()
    # The reference kernel's backward has four products of a dense mask, a flash kernel's five: one is 2 · pairs · dim.
    film = len(batches[0]["layout"])
    missing = 2 * config["model"]["depth"] * 4 * film * film * 24
    assert found.flops == counted + missing
    assert (found.tokens, found.items) == (film, 4)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.density == 1
    assert not found.varies


def test_cells_are_tried_on_their_own_films(tmp_path: Path) -> None:
    """What a small film does not show: a wrong plan, an error, a refusal; each cell is named."""
    plugin = tmp_path / "long.py"
    plugin.write_text(LONG)
    axes = {"attention": {"t": "twice", "s": "short", "d": "dense"}}
    base = {**BASE, "data": BASE["data"] | {"subjects": 3, "tags": 3}}
    sweep = read(write_sweep(tmp_path / "s.yaml", base=base, axes=axes, plugins=["long.py"], seeds=2))
    with pytest.raises(ZooError) as caught:
        preflight.check(sweep.cells)
    said = str(caught.value)
    assert "cell t: plan: part 0 names a key piece twice for one query piece" in said
    assert "cell s: IndexError: five shots are too many" in said
    assert "cell d" not in said
    assert said.count("cell s") == 1
    preflight.check(cell for cell in sweep.cells if cell.group == "d")


def test_no_cell_starts_where_one_cannot(tmp_path: Path, home: Path) -> None:
    (tmp_path / "long.py").write_text(LONG)
    base = {**BASE, "data": BASE["data"] | {"subjects": 3, "tags": 3}}
    path = write_sweep(tmp_path / "s.yaml", base=base, axes={"attention": ["dense", "short"]}, plugins=["long.py"])
    done = zoo_("sweep", path)
    assert done.exit_code == 2
    assert "cell short: IndexError" in done.stderr
    assert not home.exists()


# -- a forecast --------------------------------------------------------------------------------------------------------

AXES = {"attention": {"moc": {"name": "moc", "top_k": 1, "anchors": []}, "moga": {"name": "moga", "groups": 2}}}


@pytest.fixture
def a_second_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "step_seconds", lambda _: 1.0)


@pytest.mark.parametrize(
    ("given", "reasons"),
    [
        (["trainer.limit_train_batches=0.2"], ["trainer.limit_train_batches=0.2 of 4 batches is none; give a count"]),
        (["trainer.limit_train_batches=0.25"], []),
        (["trainer.limit_train_batches=0.25", "parallel.data=2"], ["limit_train_batches=0.25 of 2 batches is none"]),
        (["trainer.limit_val_batches=0.3"], ["trainer.limit_val_batches=0.3 of 3 batches is none"]),
        (["trainer.limit_test_batches=0.4"], []),  # no test
        (["trainer.limit_test_batches=0.4", "data.test_films=2"], ["limit_test_batches=0.4 of 2 batches is none"]),
        (["trainer.val_check_interval=5"], []),  # counted across epochs
        (["trainer.check_val_every_n_epoch=1", "trainer.val_check_interval=4"], []),
        (["trainer.check_val_every_n_epoch=1", "trainer.val_check_interval=5"], ["is more than the 4 batches of an"]),
        (
            ["trainer.check_val_every_n_epoch=2", "trainer.val_check_interval=3", "trainer.limit_train_batches=0.5"],
            ["trainer.val_check_interval=3 is more than the 2 batches of an epoch"],
        ),
        (["trainer.limit_train_batches=0.1", "trainer.limit_val_batches=0.1"], ["0.1 of 4 batch", "0.1 of 3 batch"]),
    ],
)
def test_limits_that_leave_no_batch_are_refused(given: list[str], reasons: list[str]) -> None:
    found = preflight.unfit_limits(load([BASE, "data.films_per_epoch=4", "data.val_films=3", *given]))
    assert len(found) == len(reasons)
    assert all(reason in told for reason, told in zip(reasons, found, strict=True)), found


def test_a_dry_run_refuses_limits_that_leave_no_batch(tmp_path: Path) -> None:
    file = write_sweep(tmp_path / "s.yaml", axes={"trainer.limit_val_batches": [1, 0.5]})
    done = CliRunner().invoke(app, ["sweep", str(file), "--dry-run"])
    assert done.exit_code == 2
    assert "cell limit_val_batches=0.5: trainer.limit_val_batches=0.5 of 1 batches is none" in done.stderr
    assert "limit_val_batches=1:" not in done.stderr
    alone = tmp_path / "run.yaml"
    alone.write_text(json.dumps(BASE))
    done = CliRunner().invoke(app, ["train", "--config", str(alone), "trainer.limit_val_batches=0.5"])
    assert done.exit_code == 2
    assert "zoo train: trainer.limit_val_batches=0.5 of 1 batches is none" in done.stderr


def test_a_dry_run_says_what_a_sweep_would_take(tmp_path: Path, home: Path) -> None:
    path = write_sweep(tmp_path / "dry.yaml", about="Two.", axes=AXES, seeds=2)
    plain = json.loads(zoo_("sweep", path, "--dry-run", "--json").stdout)
    assert (plain["name"], plain["about"]) == ("dry", "Two.")
    assert [row["name"] for row in plain["rows"]] == ["moc", "moga"]
    for row, cell in zip(plain["rows"], read(path).cells[::2], strict=True):
        found = preflight.run_preflight(cell.config)
        assert row["density"] == found.density
        assert row["density_varies"] is (row["name"] == "moga")
        assert row["tokens"] == found.tokens
        assert row["attention_flops"] == found.attention_flops
        assert row["flops"] == found.flops > row["attention_flops"] > 0
        assert row["parameters"] == found.parameters
        assert row["seconds"] > 0
        assert row["seconds_from"] == "steps timed now"
        assert row["settings"] == {f"attention.{key}": value for key, value in cell.config["attention"].items()}
        assert [run["status"] for run in row["cells"]] == ["missing", "missing"]
        assert [run["seed"] for run in row["cells"]] == [0, 1]
        assert row["cells"][0]["id"] == cell.id
    assert plain["seconds"] == pytest.approx(sum(2 * row["seconds"] for row in plain["rows"]))
    assert any("estimate" in note for note in plain["notes"])
    assert not home.exists()  # nothing is written
    text = zoo_("sweep", path, "--dry-run").stdout
    for shown in ("dry: 4 cells, 0 finished", "moga, groups 2", "0, 1", "missing", "left to do", "estimate"):
        assert shown in text
    refused = zoo_("sweep", path, "--json")
    assert refused.exit_code == 2
    assert "--json goes with --dry-run" in refused.stderr


@pytest.mark.usefixtures("a_second_a_step")
def test_what_has_been_done_counts(tmp_path: Path) -> None:
    base = {**BASE, "trainer": BASE["trainer"] | {"max_steps": 10}}
    sweep = read(write_sweep(tmp_path / "part.yaml", base=base, axes=AXES, seeds=3))
    here = provenance()

    def put(number: int, **fields: Any) -> None:
        cell = sweep.cells[number]
        Result(cell.name, cell.config["attention"], seed=cell.config["seed"], **fields).write(cell.folder("part"))

    put(0, status="finished", steps=10, seconds=70.0, provenance=here)
    put(1, status="finished", steps=10, seconds=50.0, provenance=here)
    put(3, status="missing", steps=4, provenance=here)
    put(4, status="finished", steps=10, seconds=999.0, provenance=here | {"host": "elsewhere"})
    put(5, status="failed", reason="bad", provenance=here)
    moc, moga = Forecast.of(sweep).rows
    assert [run["status"] for run in moc.cells] == ["finished", "finished", "missing"]
    assert (moc.seconds, moc.seconds_from) == (60.0, "finished runs here")
    assert [(run["status"], run["steps"]) for run in moga.cells] == [("half done", 4), ("finished", 10), ("failed", 0)]
    assert (moga.seconds, moga.seconds_from) == (10.0, "steps timed now")  # another machine's clock says nothing
    assert Forecast.of(sweep).seconds == 60 + (0.6 + 1) * 10
    assert "1 half done at step 4, 1 finished, 1 failed" in str(dry_run._status(moga))


@pytest.mark.usefixtures("a_second_a_step")
def test_a_solved_budget_is_shown(tmp_path: Path) -> None:
    axes = {"attention": {"moc": {"name": "moc", "anchors": [], "causal": None}}}
    path = write_sweep(tmp_path / "b.yaml", axes=axes, match={"density": 1.0})
    plain = json.loads(zoo_("sweep", path, "--dry-run", "--json").stdout)
    (row,) = plain["rows"]
    assert row["match"]["density"] == 1.0
    assert row["match"]["set"].keys() == {"top_k"}
    assert row["density"] == pytest.approx(1, rel=0.02)


def test_a_machine_without_the_device_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sweep = read(write_sweep(tmp_path / "gpu.yaml", sizes={"gpu": {"trainer.accelerator": "gpu"}}), size="gpu")
    found = Forecast.of(sweep)
    assert found.rows[0].seconds is None
    assert found.seconds is None
    assert found.rows[0].flops > 0


# -- many cells --------------------------------------------------------------------------------------------------------


def test_dry_run_of_many_cells_builds_and_reads_each_thing_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counted(*arguments: Any) -> Any:
            counts[name] += 1
            return function(*arguments)

        monkeypatch.setattr(module, name, counted)

    for module, name in (
        (preflight, "_model"),
        (config_module, "read_yaml"),
        (sweep_module, "known"),
        (code_module, "_git"),
    ):
        count(module, name)
    for cached in (config_module._shipped, code_module._code):
        cached.cache_clear()
    base = {**BASE, "attention": "moc"}
    axes = {"attention.top_k": [1, 2], "optim.lr": [1e-4, 2e-4, 3e-4, 4e-4, 5e-4]}
    loaded = read(write_sweep(tmp_path / "many.yaml", base=base, axes=axes, seeds=3))
    assert len(loaded.cells) == 30
    preflight.check(loaded.cells)
    assert len(Forecast.of(loaded).rows) == 10
    models, tries = 2, 2  # planned once and timed once
    assert counts.pop("_git") <= 2  # outside of a checkout, one
    assert counts == {"_model": models * tries, "read_yaml": 2, "known": 1}
