"""A run folder of somebody else is data: opening it runs no code and reads no file outside it."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import film, finished
from tiers import cases
from tiny import BASE
from typer.testing import CliRunner, Result

from experiments.cli import app
from experiments.execution.checkpointing import saved_step
from experiments.inspection.capture import load
from experiments.reporting.html import html
from experiments.reporting.report import build_report
from experiments.tracking.arrays import write_arrays
from experiments.tracking.store import Cell, SweepRequest, write_sweep
from lit_modules import RoutingWatch
from sparse_zoo.errors import ZooError

HERE = Path(__file__).parent


class Runs:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "ran")


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_HOME", str(home))
        config = home / "tiny.json"
        config.write_text(json.dumps(BASE))
        assert command("train", "--config", config, "attention=dense").exit_code == 0
    (run,) = (home / "train").glob("dense-*")
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize("name", cases(["sample", "ladder", "capture"], ["sample"]))
def test_a_checkpoint_that_would_run_code_is_refused(run: Path, tmp_path: Path, name: str) -> None:
    (checkpoint,) = run.glob("checkpoints/*.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"extra": Runs(tmp_path / "ran")}, checkpoint)
    told = command(name, run)
    assert told.exit_code == 2
    assert "would run code" in told.stderr
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="would run code"):
        saved_step(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_cannot_name_a_function_to_be_called(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning imports and calls what "_instantiator" names."""
    (tmp_path / "evil_instantiator.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n\ndef make(*_): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    (checkpoint,) = run.glob("checkpoints/*.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    state["hyper_parameters"]["_instantiator"] = "evil_instantiator.make"
    torch.save(state, checkpoint)
    assert command("sample", run).exit_code == 2
    assert not (tmp_path / "ran").exists()


def test_the_state_of_a_callback_runs_no_code(tmp_path: Path) -> None:
    torch.save({"layers": Runs(tmp_path / "ran")}, tmp_path / "kept")
    kept = torch.frombuffer(bytearray((tmp_path / "kept").read_bytes()), dtype=torch.uint8)
    with pytest.raises(pickle.UnpicklingError):
        RoutingWatch(tmp_path).load_state_dict({"kept": kept})
    assert not (tmp_path / "ran").exists()


def test_a_class_path_in_a_result_needs_a_plugin(run: Path, tmp_path: Path) -> None:
    own = tmp_path / "films.py"
    own.write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom datamodules import ShotWorld\n\n\nclass Films(ShotWorld): ...\n"
    )
    result = json.loads((run / "result.json").read_text())
    result["config"]["data"]["name"] = f"{own}:Films"
    (run / "result.json").write_text(json.dumps(result))
    for name in ("sample", "ladder", "capture"):
        told = command(name, run)
        assert told.exit_code == 2
        assert f"--plugin {own}" in told.stderr.replace("\n", "")
        assert not (tmp_path / "ran").exists()
    out = tmp_path / "calls.safetensors"
    assert command("capture", run, "--plugin", own, "--times", ".5", "--out", out).exit_code == 0
    assert (tmp_path / "ran").exists()
    assert command("capture", run, f"data.name={own}:Films", "--times", ".5", "--out", out).exit_code == 0


def test_nothing_unpickles_but_weights() -> None:
    """Every `torch.load` of the tree is weights-only, nothing is loaded by pickle, and no array may hold objects."""
    root = Path(__file__).parent.parent
    for file in (
        file
        for room in ("experiments", "lit_modules", "datamodules", "sparse_zoo")
        for file in (root / room).rglob("*.py")
    ):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            name, given = ast.unparse(call.func), {one.arg: ast.unparse(one.value) for one in call.keywords}
            assert name != "torch.load" or given.get("weights_only") == "True", (file, call.lineno)
            assert given.get("allow_pickle", "False") == "False", (file, call.lineno)
            assert not name.endswith(("load_from_checkpoint", "joblib.load", "yaml.unsafe_load")), (file, call.lineno)
            # The suite pickles a method that is at hand, to see that its copies are equal.
            own = file.parent.name == "testing" and ast.unparse(call).startswith("pickle.loads(pickle.dumps(")
            assert own or name not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), (file, call.lineno)


def test_a_pickle_is_no_capture(tmp_path: Path) -> None:
    torch.save({"q": Runs(tmp_path / "ran")}, tmp_path / "calls.safetensors")
    (tmp_path / "old.pkl").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    for name in ("calls.safetensors", "old.pkl"):
        with pytest.raises(ZooError, match="is a pickle, which can run code"):
            load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_page_holds_no_picture_from_outside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "runs"))
    secret = write_arrays(tmp_path / "secret.npz", film(-1.0))
    cell = Cell("a", {"attention": {"name": "dense"}, "seed": 0})
    made = finished(cell, "s", 0.5)
    (Path(made.folder) / "link.npz").symlink_to(secret)
    (Path(made.folder) / "text.npz").write_text("no picture")
    names = [str(secret), "../../../secret.npz", "link.npz", "text.npz", "none.npz", "."]
    pictures = [*made.pictures, *({"file": name, "label": "layer 2"} for name in names)]
    replace(made, pictures=pictures, strips=["film.npz", *names, "plan-1-1.npz"]).write(Path(made.folder))
    write_sweep("s", SweepRequest("", (cell,)))
    page = html(build_report("s"))
    assert page.count('alt="Generated by a"') == 1
    assert page.count("leads out of the run&#39;s folder") == 2 * 3
    assert page.count("cannot be read as an .npz file") == 2
    assert page.count("none.npz: there is no such file") == 2
    assert "a: plan-1-1.npz: it has no array &#39;real&#39;" in page
    assert 'alt="Attention plan of a, layer 1"' in page


def test_a_sweep_names_no_folder_outside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    write_sweep("s", SweepRequest("", (Cell("../../elsewhere", {"attention": {"name": "dense"}, "seed": 0}),)))
    with pytest.raises(ZooError, match="no name of a folder"):
        build_report("s")
