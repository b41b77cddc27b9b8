"""A run begins with the weights of a finished one: which are taken, what is refused, and what its id is made of."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BASE, write_sweep

from experiments.config.init_from import find_start, unfit_start
from experiments.config.resolve import cell, load
from experiments.execution.checkpointing import load_plain
from experiments.execution.initial_weights import load_initial_weights
from experiments.execution.run import run
from experiments.execution.train import Observer
from experiments.inspection.trained import Trained
from experiments.sweep.expand import read
from experiments.tracking.mlflow_logger import Tracker
from experiments.tracking.store import Result, SweepRequest
from experiments.tracking.store import write_sweep as store_sweep
from lit_modules import LitVideoDiT
from sparse_zoo.errors import ZooError

pytestmark = pytest.mark.filterwarnings("ignore")

SWEEP, NAME = "before", "dense-s0"


class Lines(Observer):
    """Keeps the lines for the user."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def started(self, name: str) -> None: ...

    def step(self, name: str, step: int, total: int | None, note: str) -> None: ...

    def ended(self, result: Result) -> None: ...

    def note(self, line: str) -> None:
        self.told.append(line)


def train(name: str, sweep: str, *overrides: Any) -> tuple[Result, list[str]]:
    made, lines = cell(name, load([BASE, *overrides])), Lines()
    store_sweep(sweep, SweepRequest("", (made,)))
    return run(made, sweep, Tracker(sweep, lines.note), lines), lines.told


def weights(result: Result) -> dict[str, torch.Tensor]:
    assert result.checkpoint is not None, result.traceback
    state: dict[str, torch.Tensor] = load_plain(Path(result.checkpoint))["state_dict"]
    return state


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a finished run; copied, since tests may change it."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_HOME", str(home))
        assert train(NAME, SWEEP)[0].status == "finished"
    return home


@pytest.fixture
def home(before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(before, tmp_path / "runs")
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.mark.usefixtures("home")
def test_a_run_begins_with_the_averaged_weights_of_another() -> None:
    """With next to no learning rate it ends with them; the method's own parameters are those of a fresh run."""
    still = {"optim": {"lr": 1e-30, "weight_decay": 0.0}, "attention": {"name": "nsa", "top_k": 1}}
    result, told = train("nsa", "after", still, {"init_from": f"{SWEEP}/{NAME}"})
    fresh, _ = train("fresh", "fresh", still)
    theirs, ours, own = weights(first_result()), weights(result), weights(fresh)
    assert ours.keys() == own.keys() != theirs.keys()
    assert any(not torch.equal(theirs[key], own[key]) for key in theirs)
    for key, value in ours.items():
        assert torch.allclose(value, theirs[key] if key in theirs else own[key], rtol=0, atol=1e-25), key
    assert any("begins with the weights of dense-s0" in line and "are new" in line for line in told), told
    assert "after 2 steps" in result.provenance["init_from"]


def first_result() -> Result:
    start = find_start(f"{SWEEP}/{NAME}")
    return Result(NAME, {"name": "dense"}, "finished", 0, checkpoint=str(start.checkpoint))


@pytest.mark.usefixtures("home")
def test_the_id_is_that_of_the_run_and_not_of_its_place(tmp_path: Path) -> None:
    """By its sweep, by its folder, and after it was moved a run is the same; without it, another."""
    folder = find_start(f"{SWEEP}/{NAME}").folder
    ids = {cell("x", load([BASE, {"init_from": given}])).id for given in (f"{SWEEP}/{NAME}", str(folder))}
    shutil.copytree(folder, tmp_path / "elsewhere")
    ids.add(cell("x", load([BASE, {"init_from": str(tmp_path / "elsewhere")}])).id)
    plain = {cell("x", load([BASE])).id, cell("x", load([BASE, {"init_from": None}])).id}
    assert len(ids) == len(plain) == 1
    assert ids != plain


@pytest.mark.usefixtures("home")
def test_a_sweep_takes_for_each_seed_the_run_of_that_seed(tmp_path: Path) -> None:
    other = cell("dense-s1", load([BASE, "seed=1"]))
    first = cell(NAME, load([BASE]))
    store_sweep(SWEEP, SweepRequest("", (first, other)))
    shutil.copytree(first.folder(SWEEP), other.folder(SWEEP))
    edit(other.folder(SWEEP), id=other.id, seed=1)
    path = write_sweep(tmp_path / "s.yaml", seeds=2, cells={"moc": {"attention": "moc"}})
    path.write_text(path.read_text().replace("base:", f"base:\n  init_from: {SWEEP}/dense-s${{seed}}"))
    assert [one.config["init_from"] for one in read(path).cells] == [f"{SWEEP}/dense-s0", f"{SWEEP}/dense-s1"]


@pytest.mark.usefixtures("home")
def test_the_sweep_of_the_docs_begins_with_the_dense_runs_of_recall(tmp_path: Path) -> None:
    """With the tiny model; the run of seed 0 stands for those of all seeds."""
    page = (Path(__file__).parent.parent / "docs" / "sweeps.md").read_text()
    text = re.search(r"^## Begin with trained weights\n.*?^```yaml\n(.*?)^```", page, flags=re.S | re.M)
    assert text is not None
    (tmp_path / "adapted.yaml").write_text(text[1])
    before = [cell(f"dense-s{seed}", load([BASE, f"seed={seed}"])) for seed in range(3)]
    store_sweep("recall", SweepRequest("", tuple(before)))
    for one in before:
        shutil.copytree(find_start(f"{SWEEP}/{NAME}").folder, one.folder("recall"))
    cells = read(tmp_path / "adapted.yaml", [BASE, {"model.text": "joint", "model.pooled_text": "adaln"}]).cells
    assert [one.name for one in cells] == [f"{name}-s{seed}" for name in ("moc", "window") for seed in range(3)]
    assert [one.config["init_from"] for one in cells] == [f"recall/dense-s{seed}" for seed in range(3)] * 2


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"init_from": "nowhere/x"}, "no such folder, and no sweep 'nowhere'"),
        ({"init_from": f"{SWEEP}/dense-s9"}, "unknown cell of before 'dense-s9'"),
        ({"init_from": 3}, "init_from must be a run's folder or SWEEP/CELL, got 3"),
        ({"init_from": f"{SWEEP}/{NAME}", "model.dim": 32}, "model.dim is 32, and that of before/dense-s0 is 16"),
    ],
)
@pytest.mark.usefixtures("home")
def test_what_cannot_be_begun_with_is_refused_before_the_first_step(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        load([BASE, overrides])


def test_a_pretrained_model_takes_no_initial_weights() -> None:
    (reason,) = unfit_start({"init_from": f"{SWEEP}/{NAME}", "model": {"folder": "wan"}})
    assert reason == "init_from is for models of our own; a pretrained model begins with the weights of its folder"


@pytest.mark.usefixtures("home")
def test_an_unfinished_run_and_missing_weights_are_refused() -> None:
    start = find_start(f"{SWEEP}/{NAME}")
    start.checkpoint.rename(start.checkpoint.with_suffix(".old"))
    with pytest.raises(ZooError, match="has no weights left"):
        load([BASE, {"init_from": f"{SWEEP}/{NAME}"}])
    edit(start.folder, status="running")
    with pytest.raises(ZooError, match="has not finished, it is 'running'"):
        load([BASE, {"init_from": f"{SWEEP}/{NAME}"}])


@pytest.mark.usefixtures("home")
def test_every_difference_outside_of_the_method_is_refused() -> None:
    """The data decides these shapes, so only the weights tell."""
    start = find_start(f"{SWEEP}/{NAME}")
    model = {**BASE["model"], "channels": 1, "patch": [1, 3, 3], "vocabulary": 99, "attention": {"name": "dense"}}
    with pytest.raises(ZooError) as caught:
        load_initial_weights(LitVideoDiT(model), start)
    for name in ("model.patches.weight", "model.words.weight", "model.final.weight"):
        assert f"{name} has the shape" in str(caught.value)


def test_a_trained_run_opens_when_the_run_before_it_is_gone(home: Path) -> None:
    result, _ = train("moc", "after", {"attention": {"name": "moc"}, "init_from": f"{SWEEP}/{NAME}"})
    shutil.rmtree(home / SWEEP)
    opened = Trained("test", Path(result.folder), [], 1)
    assert opened.step == 2
