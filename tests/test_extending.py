"""The page on extending runs as it stands; what a plug-in may bring comes in, or is refused in one line."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import sparse_zoo as zoo
from experiments.cli import app
from experiments.config.resolve import load
from lit_modules import RectifiedFlow
from sparse_zoo import registry, testing
from sparse_zoo.kernels.reference import Reference

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
INTRODUCTION, *SECTIONS = re.split(r"^## ", PAGE, flags=re.M)
BY_TITLE = {section.partition("\n")[0]: section for section in SECTIONS}
TESTED = {
    "A method": "test_a_method",
    "A method from parts": "test_a_method_from_parts",
    "A choice for each query": "test_a_choice_for_each_query",
    "Several branches, a gate, an auxiliary loss": "test_several_branches",
    "A coarse branch": "test_a_coarse_branch",
    "A schedule": "test_a_schedule",
    "Layers and noise": "test_layers_and_noise",
    "A kernel": "test_a_kernel",
    "A datamodule": "test_a_datamodule",
    "A metric": "test_a_metric",
    "A sweep axis": "test_a_sweep_axis",
}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: str) -> Path:
    """A folder with all files of the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZOO_HOME", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    for _, code in blocks(PAGE):
        if name := re.match(r"# (\S+\.(?:py|yaml))\n", code):
            (tmp_path / name[1]).write_text(code)
    return tmp_path


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    found: list[tuple[str, str]] = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.S | re.M)
    return found


def command(line: str) -> None:
    program, *arguments = shlex.split(line)
    assert program == "zoo", line
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (line, result.output, result.exception)


def follow(title: str) -> list[dict[str, Any]]:
    """Do what a section shows, from top to bottom; the results of its runs."""
    for language, code in blocks(BY_TITLE[title]):
        if not language:
            for line in code.splitlines():
                command(line)
        elif language == "python" and not code.startswith("# "):
            exec(code, {})
    return [json.loads(path.read_text()) for path in sorted(Path("runs").glob("*/*/result.json"))]


def test_every_section_is_followed() -> None:
    assert list(BY_TITLE) == list(TESTED)
    assert all(test in globals() for test in TESTED.values())
    assert not [line for _, code in blocks(INTRODUCTION) for line in code.splitlines() if line.startswith("zoo ")]


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_method() -> None:
    (result,) = follow("A method")
    assert result["attention"] == {"name": "own_and_previous_shots", "reach": 2}
    assert result["density"] == 0.75  # two shots of one size, without a global caption
    (judged,) = testing.check_method("own_and_previous_shots", only=["routing_is_the_papers"])
    assert judged.status == "passed"


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_choice_for_each_query() -> None:
    (result,) = follow("A choice for each query")
    assert result["attention"] == {"name": "nearest_frames", "top_k": 1}
    film = zoo.Layout.film([zoo.Shot(1, 2, 2) for _ in range(3)])
    x = torch.zeros(1, 1, len(film), 4)
    mask = zoo.build("nearest_frames", heads=1, head_dim=4, top_k=1)(x, x, x, film).plans[0].dense_mask()[0, 0]
    assert torch.equal(mask, (film.shot[:, None] == film.shot) | (film.shot == 0))  # of equal scores the earliest


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_several_branches() -> None:
    (result,) = follow("Several branches, a gate, an auxiliary loss")
    assert result["density"] == 1.5  # half in one branch, all in the other
    film = zoo.Layout.film([zoo.Shot(1, 2, 2) for _ in range(2)])
    q, hidden = torch.randn(1, 1, len(film), 4), torch.randn(1, len(film), 6)
    attention = zoo.build("near_and_far", heads=1, head_dim=4, dim=6, price=0.5)
    far = attention.features(hidden)["far"]
    result = attention(q, q, q, film, hidden=hidden)
    near, whole = (zoo.attend(q, q, q, plan).out for plan in result.plans)
    torch.testing.assert_close(result.out, (1 - far) * near + far * whole)
    torch.testing.assert_close(result.losses, {"far": 0.5 * far.mean()})


@pytest.mark.usefixtures("here")
def test_a_method_from_parts_takes_at_most_fifteen_lines_and_conforms() -> None:
    code = next(code for language, code in blocks(BY_TITLE["A method from parts"]) if language == "python")
    lines = [line for line in code.splitlines()[1:] if line.strip()]  # after the file's name
    assert len(lines) <= 15
    zoo.load_plugin("sub_block_top_p.py")
    film = zoo.Layout.film([zoo.Shot(4, 8, 8, text=3), zoo.Shot(3, 8, 8)])
    q, k, v = torch.randn(3, 1, 2, len(film), 8)
    assert 0.3 < zoo.build("sub_block_top_p", heads=2, head_dim=8)(4 * q, 4 * k, v, film).cost().density < 0.9
    judged = testing.check_method("sub_block_top_p", only=["output_equals_oracle", "films_packed", "batch_items_apart"])
    assert [outcome.status for outcome in judged] == ["passed"] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_method_from_parts() -> None:
    (result,) = follow("A method from parts")
    assert result["status"] == "finished"


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_coarse_branch() -> None:
    (result,) = follow("A coarse branch")
    assert result["status"] == "finished"
    (judged,) = testing.check_method("shot_means", only=["routing_is_the_papers"])
    assert judged.status == "passed"
    film = zoo.Layout.film([zoo.Shot(1, 2, 2, 1), zoo.Shot(1, 1, 2)])
    q = torch.randn(1, 1, len(film), 4)
    near, coarse = zoo.build("shot_means", heads=1, head_dim=4).branches(zoo.Call(q, q, q, film))
    assert (near.plan.shape, coarse.plan.shape) == ((7, 7), (2, 2))
    assert coarse.rows.tolist() == [-1, 0, 0, 0, 0, 1, 1]


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    results = follow("A schedule")
    shown = [line.split() for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]
    assert [(step, round(float(density) * 9)) for step, density in shown] == [("0", 6), ("2000", 5), ("4000", 3)]
    schedules = [result["attention"]["schedule"] for result in results]
    assert sorted(map(str, schedules)) == ["{'name': {'1': 'own_and_previous_shots'}}", "{'reach': {'1': 0}}"]


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_layers_and_noise() -> None:
    results = [result["attention"] for result in follow("Layers and noise")]
    moc, shots = {"name": "moc"}, {"name": "moc", "chunk": "shot"}
    assert [{"name": "dense"}, *[{**moc, "top_k": 1}] * 3] in results
    assert [{"name": "dense"}, moc, shots, moc] in results
    assert {**moc, "dense_above": 0.9} in results
    # The page's rule for a share of the steps, beside the flow's own grid.
    for steps, shift, share in ((12, 3.0, 0.25), (50, 5.0, 0.3), (8, 1.0, 0.5)):
        above = shift * (1 - share) / (1 + (shift - 1) * (1 - share))
        grid = RectifiedFlow(shift=shift).warp(torch.linspace(1, 0, steps + 1, dtype=torch.float64))[:-1]
        assert int((grid > above + 1e-9).sum()) == round(share * steps)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_kernel() -> None:
    (result,) = follow("A kernel")
    assert result["kernel"] == "sdpa"
    film = zoo.Layout.film([zoo.Shot(5000, 1, 1)])
    q = torch.zeros(1, 1, len(film), 4)
    with pytest.raises(zoo.ZooError, match="for at most 4096 tokens; got 5000"):
        zoo.attend(q, q, q, zoo.Plan.dense(film), kernel="sdpa")
    assert zoo.attend(q[:, :, :1], q, q, zoo.Plan.dense(film).narrow(torch.tensor([0]))).kernel == "cpu"


@pytest.mark.usefixtures("here")
def test_a_datamodule() -> None:
    (result,) = follow("A datamodule")
    name = result["config"]["data"].pop("name")  # an absolute path: the run is found again from any folder
    assert name.endswith("/plain_colours.py:PlainColours")
    assert result["config"]["data"] == {"films": 4}
    assert result["data"] == {"train": {"films": 4, "shots": 8, "frames": 16}}
    assert result["strips"]


@pytest.mark.usefixtures("here")
def test_a_metric() -> None:
    (result,) = follow("A metric")
    assert 0 < result["metrics"]["colour_error"] < 2
    metric = registry.import_file("colour_error.py").ColourError()
    film = zoo.Layout.film([zoo.Shot(1, 1, 1), zoo.Shot(1, 1, 1)])
    batch = {"layout": zoo.Layout.pack([film, film]), "clips": [torch.zeros(1, 1, 3, 4, 4)] * 4}
    metric.update([torch.full((1, 1, 3, 4, 4), x) for x in (9.0, 0.25, 9.0, -0.75)], batch)
    assert float(metric.compute()) == 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_sweep_axis() -> None:
    results = follow("A sweep axis")
    names = {"reach=0-world", "reach=1-world", "reach=0-colours", "reach=1-colours", "dense"}
    assert {result["name"]: result["status"] for result in results} == dict.fromkeys(names, "finished")
    assert {result["density"] for result in results} == {0.5, 0.75, 1.0}


# -- a package --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_package_brings_its_method(tmp_path: Path) -> None:
    """Really installed, into an environment where nothing but what we have here is at hand."""
    source, fresh = tmp_path / "source", tmp_path / "fresh"
    shutil.copytree(ROOT / "examples" / "zoo-keyframes", source)
    venv.create(fresh, symlinks=True)
    site = fresh / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    # Not a path alone, but a site folder: one that is installed editable lies in a .pth file of its own.
    (site / "at_hand.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")

    def python(*arguments: str | Path) -> str:
        command = [fresh / "bin" / "python", *arguments]
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--disable-pip-version-check")
    python("-m", "pip", "install", "--quiet", *offline, source)
    assert (site / "zoo_keyframes.py").is_file()
    run = "from experiments.cli import main; main()"
    listed = {method["name"]: method for method in json.loads(python("-c", run, "list", "--json"))["methods"]}
    assert listed["keyframes"]["settings"]["reach"]["default"] == 4
    outcomes = json.loads(python("-c", run, "check", "keyframes", "--json"))["checks"]
    assert {outcome["check"] for outcome in outcomes} == set(testing.checks())
    assert {outcome["status"] for outcome in outcomes} == {"passed", "skipped"}
    own = "routing_is_the_papers or refused_together"
    told = python("-m", "pytest", "-p", "no:cacheprovider", source / "tests", "-k", own)
    assert re.search(r"2 passed", told), told


def test_a_broken_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        value = "zoo_broken"

        def load(self) -> None:
            zoo.register("half_registered")(type("Half", (zoo.Attention,), {"__doc__": "Half."}))
            zoo.register_kernel(Named("half_registered"))
            raise ImportError("no module named 'zoo_brokn'")

    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry()])  # noqa: ARG005
    monkeypatch.setattr(registry, "_loaded_entry_points", set())
    for _ in range(2):  # it is no better when asked again
        with pytest.raises(zoo.ZooError) as error:
            zoo.names()
        assert str(error.value) == (
            "plug-in zoo_broken, an entry point of 'sparse_zoo.methods' does not import: "
            "ImportError: no module named 'zoo_brokn'"
        )
    assert "half_registered" not in {*zoo.kernels(), *registry._methods}


def test_a_package_may_bring_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        value = "zoo_kernels"

        def load(self) -> None:
            zoo.register_kernel(Named("from_a_package"))

    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry()])  # noqa: ARG005
    monkeypatch.setattr(registry, "_loaded_entry_points", set())
    listed = json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)
    assert "from_a_package" in [kernel["name"] for kernel in listed["kernels"]]
    assert load(["attention.kernel=from_a_package"])["attention"]["kernel"] == "from_a_package"


# -- kernels ----------------------------------------------------------------------------------------------------------


class Named(Reference):
    """The oracle under another name."""

    def __init__(self, name: Any) -> None:
        self.name = name  # type: ignore[misc]


class Shy(Reference):
    """Says that it cannot run."""

    name: ClassVar[str] = "shy"

    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:  # noqa: ARG002
        return ["it is shy"]


def test_kernel_is_selected_by_its_name_alone() -> None:
    zoo.register_kernel(Named("mine"))
    zoo.register_kernel(Shy())
    assert (zoo.kernels()["mine"], zoo.kernels()["shy"]) == ([], ["it is shy"])
    film = zoo.Layout.film([zoo.Shot(1, 2, 2)])
    q = torch.randn(1, 1, 4, 4)
    attention = zoo.build("dense", heads=1, head_dim=4, kernel="mine")
    assert attention(q, q, q, film).kernel == "mine"
    assert attention.plan(q, q, film).executed("mine") == 16
    assert zoo.attend(q, q, q, zoo.Plan.dense(film)).kernel == "cpu"
    with pytest.raises(zoo.ZooError, match="kernel 'shy': it is shy"):
        zoo.attend(q, q, q, zoo.Plan.dense(film), kernel="shy")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (Named("cpu"), r"the name 'cpu' is taken; taken are: auto, torch, "),
        (Named("auto"), r"the name 'auto' is taken"),
        (Named("My kernel"), r"name must be lower-case letters, digits and underscores, got 'My kernel'"),
        (Named(None), r"got None"),
        (Reference, r"<class '.*Reference'> is not a sparse_zoo.Kernel"),
        (None, r"None is not a sparse_zoo.Kernel"),
    ],
)
def test_bad_kernels_are_refused(kernel: Any, said: str) -> None:
    before = zoo.kernels()
    with pytest.raises(zoo.ZooError, match=said):
        zoo.register_kernel(kernel)
    assert zoo.kernels() == before


def test_a_file_of_kernels_is_a_plugin_and_a_bad_one_leaves_nothing(here: Path) -> None:
    assert zoo.load_plugin("sdpa.py") == zoo.load_plugin("sdpa.py") == []
    assert "sdpa" in zoo.kernels()
    other = here / "other.py"
    other.write_text((here / "sdpa.py").read_text().replace('"sdpa"', '"other"') + "\n1 / 0\n")
    with pytest.raises(zoo.ZooError, match=r"other.py does not import: ZeroDivisionError"):
        zoo.load_plugin(other)
    assert "other" not in zoo.kernels()


RAISES = """
import sys

import sparse_zoo as zoo
from datamodules import ShotWorld


@zoo.register("bad_plan")
class BadPlan(zoo.Attention):
    def plan(self, q, k, layout):
        return 3


@zoo.register("bad_init")
class BadInit(zoo.Attention):
    def __init__(self, **base):
        super().__init__(**base)
        raise ValueError("no licence")

    def plan(self, q, k, layout):
        return zoo.Plan.dense(layout)


@zoo.register("bad_exit")
class BadExit(zoo.Attention):
    def plan(self, q, k, layout):
        sys.exit(0)


class BadFilms(ShotWorld):
    def __init__(self):
        raise KeyError("key")
"""


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["attention=bad_plan"], r"method 'bad_plan': AttributeError: 'int' object .* line \d+"),
        (["attention=bad_init"], r"method 'bad_init': ValueError: no licence \(raises.py, line 18\)"),
        (["attention=bad_exit"], r"method 'bad_exit': SystemExit: 0 \(raises.py, line 27\)"),
        (["data=raises.py:BadFilms"], r"raises.py:BadFilms': KeyError: 'key' \(raises.py, line 32\)"),
    ],
)
def test_what_an_author_s_class_raises_is_a_reason_with_its_place(here: Path, overrides: list[str], said: str) -> None:
    (here / "raises.py").write_text(RAISES)
    zoo.load_plugin("raises.py")
    with pytest.raises(zoo.ZooError, match=said):
        load(overrides)


# -- datamodules ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["data=plain_colours.py:PlainColour"],
            r"unknown LightningDataModule 'PlainColour'; did you mean 'PlainColours'",
        ),
        (["data=sdpa.py:Sdpa"], r"unknown LightningDataModule 'Sdpa'; known: none"),
        (["data=plain_colors.py:PlainColours"], r"plain_colors.py: no such file"),
        (["data=nothing.here:Films"], r"data 'nothing.here:Films' does not import: ModuleNotFoundError"),
        (["data=:Films"], r"data ':Films' does not import"),
        (["data=plaincolours"], r"unknown data 'plaincolours'; .*or a class of yours, as file.py:Class"),
        (["data=plain_colours.py:PlainColours", "data.film=3"], r"key of data 'film'; did you mean 'films'"),
        (["data=plain_colours.py:PlainColours", "data.films=x"], r"data.films must be int, got 'x'"),
    ],
)
def test_bad_datamodules_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(zoo.ZooError, match=said):
        load(overrides)


def test_missing_parts_of_a_datamodule_are_named(here: Path) -> None:
    (here / "bare.py").write_text(
        "from lightning.pytorch import LightningDataModule\n\n"
        "class Bare(LightningDataModule):\n"
        "    def __init__(self):\n        super().__init__()\n        self.channels = 3\n\n"
        "    def summary(self):\n        return {}\n"
    )
    with pytest.raises(zoo.ZooError) as error:
        load(["data=bare.py:Bare"])
    lacking = re.findall(r"Bare has no '(\w+)'", str(error.value))
    assert lacking == ["patch", "vocabulary", "sample_metrics", "train_dataloader", "val_dataloader"]


def test_one_file_may_bring_a_method_and_a_datamodule(here: Path) -> None:
    both = here / "both.py"
    both.write_text((here / "own_shots.py").read_text() + (here / "plain_colours.py").read_text())
    zoo.load_plugin(both)
    config = load(["attention=own_and_previous_shots", f"data={both}:PlainColours"])
    assert config["data"] == {"name": f"{both}:PlainColours"}


def test_a_datamodule_comes_from_a_package_too() -> None:
    config = load(["data=datamodules.shot_world:ShotWorld", "data.subjects=2"])
    assert config["data"] == {"name": "datamodules.shot_world:ShotWorld", "subjects": 2}
