"""The command for a machine with a GPU, as far as a machine without one can tell."""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_zoo as zoo
from experiments import gpu
from sparse_zoo import bench
from sparse_zoo.testing import Outcome

CPU = torch.device("cpu")
FILM = zoo.Layout.film([zoo.Shot(2, 4, 4, text=3)] * 3, caption=2)
MODEL = {"dim": 16, "depth": 1, "heads": 2, "channels": 2, "patch": (1, 2, 2), "vocabulary": 8}


def report(path: Path, rows: str, seconds: float = 1000) -> gpu.Report:
    return gpu.Report(path / "out" / "found.json", rows, CPU, seconds)


def written(made: gpu.Report) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(made.path.read_text())
    return found


def test_without_a_gpu_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--part", "check", "step", "--out", str(tmp_path)]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bad_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--part", "everything"])
    assert ended.value.code == 2
    assert "invalid choice: 'everything'" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [False, True])
def test_checks_are_written_as_they_end(bad: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = report(tmp_path, "outcomes")
    seen: list[int] = []

    def outcomes(name: str, **_: Any) -> Iterator[Outcome]:
        for number in range(2):
            seen.append(len(written(made)["outcomes"]))
            failed = bad and name == "one" and number == 1
            yield Outcome(name, f"check {number}", "failed" if failed else "passed", "", 0.0)

    monkeypatch.setattr(gpu, "run_kernel_checks", outcomes)
    monkeypatch.setattr(gpu, "run_checks", outcomes)
    assert gpu.check(made, ["one", "two"], ["dense"]) is not bad
    found = written(made)
    assert seen == [0, 1, 2, 3, 4, 5]
    assert [row["method"] for row in found["outcomes"]] == ["one", "one", "two", "two", "dense", "dense"]
    assert found["left_out"] == []
    assert found["kernels"].keys() == zoo.kernels().keys()
    assert found["flash_attn"] == ""
    assert {"device", "versions", "commit", "date"} <= found.keys()


def test_real_suites_run_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "METHOD_CHECKS", ("pairs_counted",))
    made = report(tmp_path, "outcomes")
    assert gpu.check(made, [], ["dense"])
    assert [(row["check"], row["status"]) for row in written(made)["outcomes"]] == [("pairs_counted", "passed")]


def test_what_comes_too_late_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = report(tmp_path, "outcomes", seconds=0)
    assert gpu.check(made, ["cpu"], ["dense"])
    assert written(made)["left_out"] == ["cpu", "dense"]
    rounds = [bench.Round(FILM, (bench.MOC,))] * 2
    made = report(tmp_path, "rows", seconds=100)
    monkeypatch.setattr(bench, "measure", lambda *_: [])
    clock = iter([0.0, 0.0, 60.0, 60.0])
    made.end = 100.0
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    gpu.speed(made, rounds, 1, CPU)  # the first took 60 of 100 seconds: no second one is begun
    assert written(made)["left_out"] == ["107 tokens, head dim 64, float32: moc on auto"]


def test_speed_is_the_benchs(tmp_path: Path) -> None:
    made = report(tmp_path, "rows")
    gpu.speed(made, [bench.Round(FILM, (bench.MOC,))], 1, CPU)
    found = written(made)
    assert [row["pass"] for row in found["rows"]] == list(bench.PASSES)
    assert found["repeats"] == 1


def test_steps_are_measured_and_failures_told(tmp_path: Path) -> None:
    zoo.register_kernel(gpu.Sdpa())
    made = report(tmp_path, "steps")
    assert gpu.step(made, ["cpu"], FILM, MODEL, 2, CPU)
    rows = written(made)["steps"]
    assert [(row["method"], row["kernel"]) for row in rows] == [("dense", "sdpa"), ("moc", "cpu"), ("dense", "cpu")]
    assert [row["density"] for row in rows][::2] == [1.0, 1.0]
    assert 0 < rows[1]["density"] < 1
    assert all(row["seconds"] > 0 and row["peak_memory"] > 0 and row["parameters"] > 0 for row in rows)
    made = report(tmp_path, "steps")
    assert not gpu.step(made, ["flex"], FILM, MODEL, 1, CPU)
    assert "it has no backward on the CPU" in written(made)["steps"][1]["failed"]


def test_the_rival_is_dense_attention() -> None:
    zoo.register_kernel(gpu.Sdpa())
    q, k, v = torch.randn(1, 4, len(FILM), 8), torch.randn(1, 2, len(FILM), 8), torch.randn(1, 2, len(FILM), 8)
    plan = zoo.Plan.dense(FILM)
    got, want = (zoo.attend(q, k, v, plan, kernel=name, scale=0.3).out for name in ("sdpa", "reference"))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    with pytest.raises(zoo.ZooError, match="dense attention on one film alone"):
        zoo.attend(q, k, v, zoo.Plan.within(FILM.chunks("shot")), kernel="sdpa")


def test_it_needs_torch_triton_and_lightning_alone() -> None:
    """What the command, the core and the model import before a function runs."""
    root = Path(__file__).parent.parent
    own = {"sparse_zoo", "lit_modules", "experiments", *sys.stdlib_module_names}
    for file in [
        root / "experiments" / "gpu.py",
        *(root / "sparse_zoo").rglob("*.py"),
        *(root / "lit_modules").glob("*.py"),
    ]:
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            tops = {name.split(".")[0] for name in names}
            assert tops <= own | {"torch", "triton", "lightning", "torchmetrics", "typing_extensions"}, file
            assert "experiments" not in tops, file
