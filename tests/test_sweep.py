"""Cells come out of a file as written, or are refused all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from tiny import OWN_AND_PREVIOUS, write_sweep

from experiments.sweep.expand import SWEEPS, find, read
from experiments.sweep.schema import Written, find_sized
from experiments.tracking import store
from sparse_zoo.errors import ZooError

METHODS = {"attention": ["dense", "moc"]}


def test_axes_multiply_and_cells_are_added(tmp_path: Path) -> None:
    axes = {
        "attention": {"dense": "dense", "narrow": {"name": "moc", "top_k": 1}},
        "seed": [0, 1],
    }
    cells = {"long": {"attention": "moc", "attention.top_k": 7, "trainer.max_steps": 4}}
    sweep = read(write_sweep(tmp_path / "grid.yaml", axes=axes, cells=cells))
    assert sweep.name == "grid"
    assert [cell.name for cell in sweep.cells] == [
        "dense-seed=0", "dense-seed=1", "narrow-seed=0", "narrow-seed=1", "long",
    ]  # fmt: skip
    configs = {cell.name: cell.config for cell in sweep.cells}
    assert configs["narrow-seed=1"]["attention"] == {"name": "moc", "top_k": 1}
    assert configs["narrow-seed=1"]["seed"] == 1
    assert configs["long"]["trainer"]["max_steps"] == 4
    assert configs["long"]["attention"]["top_k"] == 7
    assert len({cell.id for cell in sweep.cells}) == 5


def test_values_without_labels_name_themselves(tmp_path: Path) -> None:
    axes = {"attention": [{"name": "moc", "top_k": 2, "anchors": ["text", "shot"]}, "dense"], "optim.lr": [0.001]}
    names = [cell.name for cell in read(write_sweep(tmp_path / "s.yaml", axes=axes)).cells]
    assert names == ["moc_top_k=2_anchors=text+shot-lr=0.001", "dense-lr=0.001"]


def test_no_axes_make_one_cell(tmp_path: Path) -> None:
    assert [cell.name for cell in read(write_sweep(tmp_path / "one.yaml")).cells] == ["one"]


def test_seeds_make_runs_of_one_group(tmp_path: Path) -> None:
    sweep = read(write_sweep(tmp_path / "s.yaml", seeds=3, axes=METHODS, cells={"long": {"trainer.max_steps": 9}}))
    names = [cell.name for cell in sweep.cells]
    assert names == [f"{label}-s{seed}" for label in ("dense", "moc", "long") for seed in range(3)]
    assert [cell.group for cell in sweep.cells] == [name[:-3] for name in names]
    assert [cell.config["seed"] for cell in sweep.cells] == [0, 1, 2] * 3
    assert [cell.config["data"]["seed"] for cell in sweep.cells] == [0, 1, 2] * 3  # other films too
    assert [cell.group for cell in read(write_sweep(tmp_path / "t.yaml", axes=METHODS)).cells] == [None, None]


def test_seeds_may_be_listed(tmp_path: Path) -> None:
    cells = read(write_sweep(tmp_path / "s.yaml", seeds=[1, 100], cells={"one": {}})).cells
    assert [(cell.name, cell.config["seed"]) for cell in cells] == [("one-s1", 1), ("one-s100", 100)]


def test_size_overrides_the_base_and_cells_override_the_size(tmp_path: Path) -> None:
    large = {"model.dim": 32, "trainer.max_steps": 50}
    parts: dict[str, Any] = {"axes": METHODS, "cells": {"own": {"attention": "window", "trainer.max_steps": 7}}}
    path = write_sweep(tmp_path / "s.yaml", sizes={"gpu": large}, **parts)
    small, big = read(path), read(path, size="gpu")
    assert (small.name, big.name) == ("s", "s-gpu")
    assert [cell.config["model"]["dim"] for cell in big.cells] == [32] * 3
    assert [cell.config["trainer"]["max_steps"] for cell in big.cells] == [50, 50, 7]
    assert [cell.config["model"]["dim"] for cell in small.cells] == [16] * 3
    cut = read(path, [{"trainer.max_steps": 1}], "gpu")
    assert [cell.config["trainer"]["max_steps"] for cell in cut.cells] == [1, 1, 1]
    with pytest.raises(ZooError, match="unknown size 'gqu'; did you mean 'gpu'"):
        read(path, size="gqu")


def test_overrides_hold_in_every_cell_with_ids_of_their_own(tmp_path: Path) -> None:
    path = write_sweep(tmp_path / "s.yaml", axes=METHODS, seeds=2)
    given = ["model.dim=32", "optim={lr: 1e-3}", "parallel.data=2", "attention.kernel=cpu"]
    Written.of(path).check_names(given)
    plain, changed = read(path).cells, read(path, given).cells
    assert [cell.name for cell in changed] == [cell.name for cell in plain]
    assert all(cell.config["model"]["dim"] == 32 and cell.config["parallel"] == {"data": 2} for cell in changed)
    assert {cell.config["optim"]["lr"] for cell in changed} == {1e-3}
    assert [cell.config["attention"]["name"] for cell in changed] == ["dense", "dense", "moc", "moc"]
    assert not {cell.id for cell in plain} & {cell.id for cell in changed}


@pytest.mark.parametrize(
    ("given", "reasons"),
    [
        ("attention.top_k=2", ["attention.top_k=2 is for every cell, but narrow, zipped set that themselves"]),
        ("attention=dense", ["attention=dense is for every cell, but moc, narrow, zipped, long set that themselves"]),
        ("optim={lr: 1e-2, warmup_steps: 1}", ["but long set that themselves; change it in the file"]),
        ("match.density=0.5", ["match.density=0.5 is for every cell, but moc set that themselves"]),
        ("seed=3", ["seed=3 is for every cell, but they have the seeds 0, 1; leave it out"]),
        ("model.dimm=3", ["every cell: unknown key of model 'dimm'; did you mean 'dim'?"]),
        ("trainer.max_steps=-1", ["every cell: trainer.max_steps must be at least 1, got -1"]),
        ("recall", ["an override is key=value, got 'recall'"]),
        ("seed=3 model.dimm=3", ["unknown key of model 'dimm'", "leave it out"]),
    ],
)
def test_override_of_what_a_cell_sets_is_refused_by_name(tmp_path: Path, given: str, reasons: list[str]) -> None:
    cells = {
        "moc": {"attention": "moc", "match": None},
        "narrow": {"attention": {"name": "moc", "top_k": 1}},
        "zipped": {"attention.name": "moc", "attention.top_k": 3},
        "long": {"attention": "dense", "optim": {"lr": 1e-4}},
    }
    path = write_sweep(tmp_path / "s.yaml", cells=cells, seeds=2)
    given_all = [given] if "{" in given else given.split()
    with pytest.raises(ZooError) as caught:
        Written.of(path).check_names(given_all)
    assert all(reason in str(caught.value) for reason in reasons), str(caught.value)


def test_a_file_extends_another(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN_AND_PREVIOUS)
    own = {"attention": "own_and_previous_shots"}
    write_sweep(
        tmp_path / "below.yaml",
        about="Below.",
        name="other",
        seeds=2,
        plugins=["mine.py"],
        cells={"own": own},
        sizes={"gpu": {"model.dim": 32, "optim.lr": 0.5}},
    )
    above = {"extends": "below.yaml", "axes": METHODS, "sizes": {"gpu": {"optim.lr": 0.25}}, "base": {"model.dim": 24}}
    (tmp_path / "above.yaml").write_text(yaml.safe_dump(above))
    sweep = read(tmp_path / "above.yaml", size="gpu")
    assert (sweep.name, sweep.about) == ("above-gpu", "Below.")
    assert [cell.group for cell in sweep.cells[::2]] == ["dense", "moc"]
    assert read(tmp_path / "below.yaml").cells[0].config["attention"] == {"name": "own_and_previous_shots"}
    assert {(cell.config["model"]["dim"], cell.config["optim"]["lr"]) for cell in sweep.cells} == {(32, 0.25)}
    assert {cell.config["model"]["dim"] for cell in read(tmp_path / "above.yaml").cells} == {24}
    assert sweep.cells[0].config["data"]["name"] == "shot_world"


def test_an_id_follows_the_content() -> None:
    assert store.config_id({"a": 1, "b": {"c": 2}}) == store.config_id({"b": {"c": 2}, "a": 1})
    assert store.config_id({"a": 1}) != store.config_id({"a": 2})


def test_every_cell_is_refused_at_once(tmp_path: Path) -> None:
    axes = {"attention": {"a": "mocc", "b": {"name": "moc", "top_k": 0}, "c": "dense"}}
    cells = {"c": {"attention": "dense"}, "d": {"attention": "window", "attention.edge": "mirror"}}
    with pytest.raises(ZooError) as caught:
        read(write_sweep(tmp_path / "bad.yaml", axes=axes, cells=cells))
    text = str(caught.value)
    for part in ("cell a: ", "'mocc'", "cell b: ", "got 0", "cell d: ", "'mirror'", "two cells are named 'c'"):
        assert part in text


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"axis": {}}, "unknown key 'axis'; did you mean 'axes'"),
        ({"axes": {"seed": []}}, "axis 'seed' must be a list or a mapping of values, and not empty"),
        ({"axes": {"sead": [1]}}, "unknown axis 'sead'; did you mean 'seed'"),
        ({"cells": {"a": "dense"}}, "cell 'a' must be a mapping"),
        ({"sizes": {"a": 3}}, "size 'a' must be a mapping"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"seeds": [0, 0]}, "seeds must be distinct whole numbers from 0, at least one, got \\[0, 0\\]"),
        ({"seeds": "two"}, "seeds must be a whole number, a list of whole numbers or null, got 'two'"),
        ({"plugins": "mine.py"}, "plugins must be a list of files, got 'mine.py'"),
        ({"plugins": [3]}, r"plugins must be a list of files, got \[3\]"),
        ({"axes": {1: [2]}}, "unknown axis '1'"),
        ({"zip": {1: [2]}}, "unknown axis '1'"),
        ({"axes": {"seed": [0, 1]}, "exclude": {1: 2}}, "unknown key of exclude '1'"),
        ({"name": "a/b"}, "a sweep's name is that of its folder: .*; got 'a/b'"),
        ({"name": ".."}, "a sweep's name is that of its folder"),
        ({"name": ""}, "a sweep's name is that of its folder"),
        ({"name": "it's"}, "a sweep's name is that of its folder"),
        ({"cells": {"../b": {"seed": 1}}}, "a cell's name is that of its folder: .*; got '../b'"),
        ({"axes": {"seed": {"x" * 201: 1}}}, "a cell's name is that of its folder: 1 to 200 bytes"),
        ({"plugins": ["none.py"]}, "none.py: no such file"),
        ({"extends": "none.yaml"}, "none.yaml: no such file"),
        ({"cells": {"a": {"seed": 1}, "b": {"seed": 1}}}, "'a' and 'b' are the same config"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, parts: dict[str, object], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        read(write_sweep(tmp_path / "bad.yaml", **parts))


def test_numbers_are_good_for_keys(tmp_path: Path) -> None:
    path = write_sweep(tmp_path / "s.yaml", sizes={3: {"model.dim": 32}}, cells={1: {"seed": 1}})
    sweep = read(path, size="3")
    assert (sweep.name, [cell.name for cell in sweep.cells]) == ("s-3", ["1"])
    assert sweep.cells[0].config["model"]["dim"] == 32


def test_sweeps_are_found_by_name_or_path(tmp_path: Path) -> None:
    assert find("quickstart").name == "quickstart.yaml"
    assert find(str(write_sweep(tmp_path / "mine.yaml"))) == tmp_path / "mine.yaml"
    with pytest.raises(ZooError, match="did you mean 'quickstart'"):
        find("quikstart")


def test_a_size_may_be_named_as_its_report_is() -> None:
    memory = SWEEPS / "memory.yaml"
    assert find_sized("memory-gpu") == (memory, "gpu")
    assert find_sized("memory", "gpu") == (memory, "gpu")
    assert find_sized("memory") == (memory, None)
    assert find_sized(str(memory)) == (memory, None)
    assert read(memory, size="gpu").name == "memory-gpu"
    with pytest.raises(ZooError, match="unknown size 'gpuu'"):
        read(memory, size=find_sized("memory-gpuu")[1])
    with pytest.raises(ZooError, match="unknown file or sweep 'memry-gpu'"):
        find_sized("memry-gpu")


def test_the_quickstart_has_the_cells_it_promises() -> None:
    cells = read(find("quickstart")).cells
    assert len(cells) >= 8
    assert {cell.config["attention"]["name"] for cell in cells} == {"dense", "moc", "moc_fixed", "moga", "window"}
