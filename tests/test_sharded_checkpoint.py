"""Checkpoints in shards: what is whole is read, and what is damaged or names code to be run is refused."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from experiments.execution.checkpointing import saved_step
from lit_modules.parallel import META
from lit_modules.sharded_checkpoint import load_shards, read_metadata

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def saved(folder: Path, rate: Any = 0.1) -> Path:
    """A checkpoint at step 7, as a run on several devices writes it."""
    groups = [{"lr": rate, "betas": (0.9, 0.99), "foreach": None}]
    states = {"state": {"a": {"step": torch.tensor(7.0)}}, "param_groups": groups}
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    save({"state_dict": weights, "optimizer_0": states}, checkpoint_id=folder)
    torch.save({"global_step": 7}, folder / META)
    return folder


def empty() -> dict[str, Any]:
    """What is loaded into."""
    groups = [{"lr": None, "betas": (None, None), "foreach": 1}]
    states = {"state": {"a": {"step": torch.tensor(0.0)}}, "param_groups": groups}
    return {"state_dict": {"a": torch.zeros(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}, "optimizer_0": states}


def test_what_is_whole_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "resume.ckpt")
    assert saved_step(path) == 7
    found = empty()
    load_shards(found, path)
    assert torch.equal(found["state_dict"]["a"], torch.arange(6.0).view(2, 3))
    assert found["state_dict"]["b"].eq(1).all()
    assert found["optimizer_0"]["param_groups"] == [{"lr": 0.1, "betas": (0.9, 0.99), "foreach": None}]
    assert found["optimizer_0"]["state"]["a"]["step"] == 7


@pytest.mark.parametrize("hidden", [False, True], ids=["alone", "in the metadata"])
def test_metadata_that_names_code_is_refused_and_runs_nothing(tmp_path: Path, hidden: bool) -> None:
    path, made = saved(tmp_path / "resume.ckpt"), tmp_path / "made"
    metadata: Any = Hostile(made)
    if hidden:
        metadata = read_metadata(path)
        metadata.planner_data = Hostile(made)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"would run code when loaded \((posix|nt)\.mkdir\), so it is refused"):
        saved_step(path)
    with pytest.raises(ValueError, match="would run code when loaded"):
        load_shards(empty(), path)
    assert not made.exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert made.exists()  # elsewhere it would have done harm


@pytest.mark.parametrize("name", ["load", "ops.load_library", "serialization.load"])
def test_functions_of_torch_are_no_types_of_numbers(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / "resume.ckpt")
    (path / ".metadata").write_bytes(b"\x80\x04\x8c\x05torch\x8c" + bytes([len(name)]) + name.encode() + b"\x93.")
    with pytest.raises(ValueError, match="would run code when loaded"):
        saved_step(path)


def test_values_that_name_code_are_refused_and_run_nothing(tmp_path: Path) -> None:
    made = tmp_path / "made"
    path = saved(tmp_path / "resume.ckpt", Hostile(made))
    with pytest.raises(ValueError, match=r"checkpoint .*resume.ckpt: Weights only load failed"):
        load_shards(empty(), path)
    assert not made.exists()


def cut(path: Path) -> None:
    """Takes the end off the file with the tensors."""
    (file,) = path.glob("*.distcp")
    os.truncate(file, file.stat().st_size - 1)


def garbage(path: Path) -> None:
    """Makes the metadata no pickle."""
    (path / ".metadata").write_bytes(b"not a pickle")


def other(path: Path) -> None:
    """Makes the metadata something else."""
    (path / ".metadata").write_bytes(pickle.dumps({"a": 1}))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (cut, r"distcp in it is cut short"),
        (lambda path: next(path.glob("*.distcp")).unlink(), r"distcp in it is missing"),
        (garbage, "invalid load key"),
        (other, "its metadata is damaged"),
        (lambda path: (path / ".metadata").unlink(), "there is none"),
    ],
)
def test_damage_is_no_checkpoint_to_resume_from(tmp_path: Path, harm: Callable[[Path], None], reason: str) -> None:
    path = saved(tmp_path / "resume.ckpt")
    harm(path)
    with pytest.raises(ValueError, match=reason):
        saved_step(path)
