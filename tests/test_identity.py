"""A run's id is made of what it computes: not of where it lies, nor of how its settings are spelt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BASE, write_sweep
from typer.testing import CliRunner

from experiments.cli import app
from experiments.cli.runs import _machine_dependent
from experiments.config.declared import as_declared
from experiments.config.resolve import cell, load, merge
from experiments.sweep.expand import read
from experiments.tracking.store import Cell, SweepRequest, read_sweep
from experiments.tracking.store import write_sweep as write_sweep_file
from lit_modules.precision import default_precision


def id_of(*overrides: Any) -> str:
    return cell("any", load([*overrides])).id


def test_a_precision_is_the_default_of_its_accelerator_on_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a login node nobody knows the GPU of another machine, so a precision for that GPU is never its default."""
    gpu = "trainer.accelerator=gpu"
    for there, default in ((False, None), (True, "bf16-mixed")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        for precision in ("32-true", "bf16-mixed", "16-mixed"):
            one, other = (cell("any", merge(own)[0]).id for own in ([gpu], [gpu, f"trainer.precision={precision}"]))
            assert (one == other) == (precision == default), (there, precision)


def test_cells_for_other_machines_name_the_accelerator_of_their_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for settings, refused in (
        ({"precision": "32-true"}, True),
        ({"precision": "bf16-mixed"}, False),
        ({"precision": "32-true", "accelerator": "cpu"}, False),
        ({}, False),
    ):
        assert bool(_machine_dependent([Cell("a", {"trainer": settings}, id="0")])) == refused, settings


@pytest.mark.parametrize(
    "pair",
    [
        (["optim.lr=1"], ["optim.lr=1.0"]),
        (["optim.lr=1e-3"], ["optim.lr=0.001"]),
        (["trainer.gradient_clip_val=2"], ["trainer.gradient_clip_val=2.0"]),
        (["trainer.precision=32"], ["trainer.precision='32'"]),
        (["trainer.precision=bf16"], ["trainer.precision=bf16-mixed"]),
        (["data.fps=8"], ["data.fps=8.0"]),
        (["attention=moc", "attention.drop_in=1"], ["attention={drop_in: 1.0, name: moc}"]),
        (
            ["attention={name: moc, schedule: {drop_in: {5: 1}}}"],
            [{"attention": {"schedule": {"drop_in": {5: 1.0}}, "name": "moc"}}],
        ),
        (
            ["model.depth=1", "attention=[{name: sla, top_fraction: 1}]"],
            ["model.depth=1", "attention=[{name: sla, top_fraction: 1.0}]"],
        ),
        (["data.size=[48,80]"], [{"data": {"size": (48, 80)}}]),
        (["match.density=1"], ["match.density=1.0"]),
        ([], ["data.cache=/elsewhere"]),
        ([], ["data.cache=null"]),
        ([], ["data.num_workers=2"]),
        ([], ["trainer.devices=1"]),
        (["trainer.devices=[0]"], ["trainer.devices=[1]"]),
        ([], ["trainer.log_every_n_steps=3"]),
        ([], ["trainer.profiler=simple"]),
        # A default written out.
        (["attention=moc"], ["attention=moc", "attention.top_k=5"]),
        (["attention=moc"], ["attention=moc", "attention.anchors=[text, shot]", "attention.causal=routing"]),
        ([], ["attention.kernel=auto", "attention.schedule=null", "attention.text_reads=method"]),
        (["attention=moga"], ["attention=moga", "attention.alpha=0.1"]),
        (["model.depth=2", "attention=moc"], ["model.depth=2", "attention=[moc, {name: moc, top_k: 5}]"]),
        ([], ["model.text=joint", "model.mlp_ratio=4"]),
        ([], ["flow.shift=1e0"]),
        ([], ["optim.weight_decay=0.01", "optim.optimizer=adamw", "optim.floor=1e-1"]),
        ([], ["data.vocabulary=1024", "data.flip=false", "data.detector=content", "data.films_per_epoch=null"]),
        (["data=shot_world"], ["data=shot_world", "data.tags=6", "data.grid=[3, 3]"]),
        ([], ["trainer.accelerator=auto", "trainer.strategy=auto", "trainer.accumulate_grad_batches=1"]),
        ([], ["trainer.limit_train_batches=1.0"]),
        ([], ["trainer.detect_anomaly=false", "trainer.deterministic=null"]),
        ([], ["sampling.context=null", "sampling.guidance=1"]),
        (["trainer.accelerator=cpu"], ["trainer.accelerator=cpu", "trainer.precision=32"]),
        ([], [f"trainer.precision={default_precision()}"]),
        (["match.density=0.5"], ["match.density=5e-1", "match.within=0.02", "match.also={}"]),
    ],
)  # fmt: skip
def test_one_computation_has_one_id(pair: tuple[list[Any], list[Any]]) -> None:
    one, other = pair
    assert id_of(*one) == id_of(*other)


@pytest.mark.parametrize(
    "pair",
    [
        (["trainer.limit_train_batches=1"], ["trainer.limit_train_batches=1.0"]),  # one batch, or all of them
        (
            ["trainer.check_val_every_n_epoch=1", "trainer.val_check_interval=1"],
            ["trainer.check_val_every_n_epoch=1", "trainer.val_check_interval=1.0"],
        ),
        ([], ["seed=1"]),
        ([], ["trainer.accelerator=cpu"]),
        ([], ["trainer.max_steps=3"]),
        ([], ["data.folder=/elsewhere"]),
        (["attention=moc"], ["attention=moc", "attention.top_k=4"]),
        (["model.depth=2", "attention=moc"], ["model.depth=2", "attention=[moc, dense]"]),
    ],
)
def test_another_computation_has_another_id(pair: tuple[list[Any], list[Any]]) -> None:
    one, other = pair
    assert id_of(*one) != id_of(*other)


def test_a_home_that_moves_leaves_ids_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    monkeypatch.chdir(tmp_path)
    for home in (str(tmp_path / "a"), str(tmp_path / "b"), "a", "./a/", "../" + tmp_path.name + "/a", ""):
        monkeypatch.setenv("ZOO_HOME", home)
        found.add(id_of())
    monkeypatch.delenv("ZOO_HOME")
    found.add(id_of())
    assert len(found) == 1
    assert load()["data"]["cache"] == str(tmp_path / "runs" / "cache")


def test_a_folder_of_data_is_one_however_it_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = tmp_path / "work" / "clips"
    clips.mkdir(parents=True)
    (tmp_path / "link").symlink_to(clips)
    monkeypatch.chdir(clips.parent)
    monkeypatch.setenv("HOME", str(clips.parent))
    spellings = ["clips", "./clips/", str(clips), "../work/clips", "~/clips", str(tmp_path / "link")]
    assert {load([f"data.folder={folder}"])["data"]["folder"] for folder in spellings} == {str(clips)}
    assert load([f"data.folder=[clips, {clips}]"])["data"]["folder"] == [str(clips)] * 2
    assert len({id_of(f"data.folder={folder}") for folder in spellings}) == 1
    # What a run keeps can be opened from any other folder.
    kept = load(["data.folder=clips", "data.captions=words.json"])
    monkeypatch.chdir(tmp_path)
    assert load([kept])["data"] == kept["data"]
    assert load()["data"]["folder"].startswith("package:")


def test_paths_of_ones_own_datamodule_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n"
        "from datamodules import ShotWorld\n"
        "class Films(ShotWorld):\n"
        "    def __init__(self, root: str | Path, title: str = 'clips', scale: float = 1) -> None:\n"
        "        super().__init__()\n"
    )
    monkeypatch.chdir(tmp_path)
    data = load([BASE, "data=mine.py:Films", "data.root=clips", "data.scale=2"])["data"]
    assert data["name"] == f"{tmp_path}/mine.py:Films"
    assert data["root"] == str(tmp_path / "clips")
    assert (
        load([BASE, f"data={tmp_path}/mine.py:Films", f"data.root={tmp_path}/clips", "data.scale=2.0"])["data"] == data
    )


def test_a_sweep_keeps_the_ids_of_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report asks no class for its defaults: the method may be a plug-in's, or have other ones by now."""
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    cells = {
        written: read(write_sweep(tmp_path / "s.yaml", axes={"attention": ["moc"]}, base=BASE | own)).cells
        for written, own in {"not": {}, "out": {"optim": {"weight_decay": 0.01}}}.items()
    }
    assert cells["not"][0].id == cells["out"][0].id
    write_sweep_file("s", SweepRequest("", cells["out"]))
    assert [own.id for own in read_sweep("s").cells] == [cells["out"][0].id]


@pytest.mark.parametrize(
    ("value", "hint", "wanted"),
    [
        (1, float, 1.0),
        (1, int, 1),
        (1, float | None, 1.0),
        (1, int | float, 1),
        (1.0, int | float, 1.0),
        ((1, 2), list[float], [1.0, 2.0]),
        ([1, 2], tuple[int, float], [1, 2.0]),
        ([1, 2], tuple[float, ...], [1.0, 2.0]),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ("text", float, "text"),
        (True, float, True),
        (10**400, float, 10**400),
    ],
)
def test_a_value_is_as_its_setting_declares(value: Any, hint: Any, wanted: Any) -> None:
    assert repr(as_declared(value, hint)) == repr(wanted)


FILMS = """
from pathlib import Path
from datamodules import ShotWorld

class Films(ShotWorld):
    def __init__(self, root: Path, **world: int) -> None:
        super().__init__(subjects=1, tags=1, grid=[2, 2], patch=[1, 3, 3], frames_per_shot=1, batch_size=1, val_films=1)
        self.words = (Path(root) / "words.txt").read_text(encoding="utf-8")
"""


@pytest.mark.slow
def test_a_home_that_moved_has_its_runs_still_and_they_find_their_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder, and where the home's path has what a URL takes for its query, fragment or an escape."""
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    for folder in (work / "clips", elsewhere):
        folder.mkdir(parents=True)
    (work / "films.py").write_text(FILMS)
    (work / "clips" / "words.txt").touch()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    first, second = work / "a home?b=c#d%41'", elsewhere / "runs"
    base = {**BASE, "data": {"name": "films.py:Films", "root": "clips"}}
    path = write_sweep(work / "s.yaml", base=base)
    monkeypatch.chdir(work)
    monkeypatch.setenv("ZOO_HOME", str(first))
    assert CliRunner().invoke(app, ["sweep", str(path)]).exit_code == 0
    (result,) = first.glob("s/*/result.json")
    before = result.stat().st_mtime_ns

    first.rename(second)
    (moved,) = second.glob("s/*/result.json")
    monkeypatch.setenv("ZOO_HOME", str(second))
    done = CliRunner().invoke(app, ["sweep", str(path)])
    assert done.exit_code == 0, done.output
    assert [file.stat().st_mtime_ns for file in second.glob("s/*/result.json")] == [before]
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("ZOO_HOME", "")  # as if it were not set: `runs` in this folder
    assert "1 of 1 cells finished" in CliRunner().invoke(app, ["report", "s"]).output
    given = [str(moved.parent), "--plugin", str(work / "films.py"), "--films", "1", "--steps", "1"]
    done = CliRunner().invoke(app, ["sample", *given])
    assert done.exit_code == 0, done.output
