"""`make gpu`, as far as a machine without a GPU can tell: a rehearsal with stages that crash, all stages' code."""

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import sparse_zoo as zoo
from experiments.tools.gpu import __main__ as gpu
from experiments.tools.gpu import checks, common, instruments, machine, model, pack, pack_compile, rows, times
from experiments.tools.gpu.rows import Row, Rows
from experiments.tools.gpu.stage import Run, in_one_line, run_stage
from experiments.tools.gpu.stages import LONG, MACHINE, STAGES, Stage
from experiments.tools.gpu.summary import summary
from sparse_zoo.kernels import _kernels, grouped
from sparse_zoo.kernels.triton import configs
from sparse_zoo.testing import Outcome

ROOT = Path(__file__).parent.parent

# -- the rehearsal: the real parent, real processes, stand-ins for what stages do -------------------------------------

STAND_INS = """
import ctypes, os, subprocess, sys, time
from pathlib import Path

def fact(run):
    lacks = {"ncu": "ncu is not on the path"}
    yield {"kind": "fact", "name": "machine", "gpu": True, "device": "a stand-in", "versions": {}, "lacks": lacks}

def fine(run):
    yield {"kind": "check", "name": "fine", "status": "passed", "reason": ""}
    yield {"kind": "time", "name": "fine", "seconds": 0.5}

def crash(run):
    yield {"kind": "time", "name": "before the crash", "seconds": 1.0}
    ctypes.string_at(0)

def hang(run):
    yield {"kind": "time", "name": "before the hang", "seconds": 2.0}
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(run.out / "grandchild").write_text(str(child.pid))
    time.sleep(60)

class CompilationError(Exception):
    pass

def compile_error(run):
    raise CompilationError("at 12:4:\\n  tl.dot(a, b)\\n  ^")
    yield

def full(run):
    yield {"kind": "time", "name": "before memory was full", "seconds": 3.0}
    raise MemoryError("CUDA out of memory. Tried to allocate 4.00 GiB")

def illegal(run):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\\nCUDA kernel errors might be ...")
    yield

def wrong(run):
    yield {"kind": "check", "name": "a sum", "status": "failed", "reason": "out errs by 1e-01, allowed is 1e-03"}

def half(run):
    with open(run.rows.path, "a") as file:
        file.write('{"kind": "time", "na')
    os._exit(7)

def last(run):
    reason = run.rows.untimed(["fine"]), run.rows.untimed(["a sum"]), run.rows.untimed(["never"])
    yield {"kind": "fact", "name": "may be timed", "reasons": list(reason)}
"""


@pytest.fixture(scope="module", autouse=True)
def _kernels_as_before() -> Iterator[None]:
    """A stage registers the dense rival, which would join the kernels of every later test in this process."""
    with patch.dict(_kernels):
        yield


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[Row], Path]:
    """One run of the parent over all stand-ins."""
    folder = tmp_path_factory.mktemp("rehearsal")
    (folder / "stand_ins.py").write_text(STAND_INS)
    names = ["fine", "crash", "hang", "compile_error", "full", "illegal", "wrong", "half", "last"]
    stages = [Stage("machine", 20, 0, "stand_ins:fact")]
    stages += [Stage(name, 2 if name == "hang" else 20, 1, f"stand_ins:{name}") for name in names]
    stages.insert(3, Stage("counted", 20, 1, "stand_ins:fine", ("ncu",)))
    out = folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
        patch.setattr(gpu, "LONGEST", 1.0)
        code = gpu.Parent(out, stages, 5, loaded=()).run()
    return code, Rows(out / "results.jsonl").read(), out


def ends(found: list[Row]) -> dict[str, Row]:
    return {row["name"]: row for row in found if row["kind"] == "end"}


@pytest.mark.slow
def test_every_row_survives_what_ends_a_stage(rehearsed: tuple[int, list[Row], Path]) -> None:
    _, found, _ = rehearsed
    timed = [row["name"] for row in found if row["kind"] == "time"]
    assert timed == ["fine", "before the crash", "before the hang", "before memory was full"]


def test_exit_code_and_rows_say_which_stage_failed_and_how(rehearsed: tuple[int, list[Row], Path]) -> None:
    code, found, _ = rehearsed
    assert code == 1
    said = {name: (row["status"], row["reason"]) for name, row in ends(found).items()}
    assert said == {
        "machine": ("passed", ""),
        "fine": ("passed", ""),
        "crash": ("failed", "killed by SIGSEGV"),
        "counted": ("skipped", "ncu is not on the path"),
        "hang": ("failed", "stopped at its limit of 2 s"),
        "compile_error": ("failed", "compile error: CompilationError: at 12:4:"),
        "full": ("failed", "out of memory: MemoryError: CUDA out of memory. Tried to allocate 4.00 GiB"),
        "illegal": (
            "failed",
            "illegal access: RuntimeError: CUDA error: an illegal memory access was encountered",
        ),
        "wrong": ("failed", "failed checks: a sum"),
        "half": ("failed", "ended with exit code 7"),
        "last": ("passed", ""),
    }


def test_the_table_says_it_too(rehearsed: tuple[int, list[Row], Path]) -> None:
    _, _, out = rehearsed
    page = (out / "summary.md").read_text()
    assert "| crash | 0 | 0 | **failed**: killed by SIGSEGV |" in page
    assert "| a sum | **failed**: out errs by 1e-01, allowed is 1e-03 |" in page
    assert "| before the hang | 2e+03 |  |" in page
    assert "Failed stages: crash, hang, compile_error, full, illegal, wrong, half. Skipped stages: counted." in page


def test_what_a_hung_stage_started_ends_with_it(rehearsed: tuple[int, list[Row], Path]) -> None:
    _, _, out = rehearsed
    child = int((out / "grandchild").read_text())
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("it still runs")


def test_nothing_is_timed_that_was_not_checked(rehearsed: tuple[int, list[Row], Path]) -> None:
    _, found, _ = rehearsed
    (row,) = [row for row in found if row["name"] == "may be timed"]
    assert row["reasons"] == ["", "not timed: a sum failed", "not timed: never was not run"]


def test_a_run_is_few_small_files(rehearsed: tuple[int, list[Row], Path]) -> None:
    _, _, out = rehearsed
    written = {file.name for file in out.iterdir()} - {"grandchild"}
    assert written == {"results.jsonl", "log.txt", "summary.md"}
    assert "Segmentation fault" in (out / "log.txt").read_text()  # with where it was, for whoever looks


def test_a_log_without_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LOG_BYTES", 1000)
    parent = gpu.Parent(tmp_path, [], 1, loaded=())
    parent.log.write_text("first\n" + "x" * 50_000 + "\nlast\n")
    parent._shorten_log()
    text = parent.log.read_text()
    assert len(text) < 2100
    assert text.startswith("first")
    assert text.endswith("last\n")


def test_a_check_that_once_failed_allows_no_timing(tmp_path: Path) -> None:
    kept = Rows(tmp_path / "rows.jsonl")
    kept.add(rows.check("a", "wrong"))
    kept.add(rows.check("a"))
    kept.add(rows.skipped("b", "no time"))
    assert kept.untimed(["a", "b"]) == "not timed: a failed, b was skipped"


# -- time -------------------------------------------------------------------------------------------------------------


def parent_with(tmp_path: Path, seconds: float, stages: list[Stage]) -> gpu.Parent:
    return gpu.Parent(tmp_path, stages, seconds / 60, loaded=())


def test_where_time_is_short_what_matters_least_is_left_out(tmp_path: Path) -> None:
    first, little, much = Stage("a", 100, 5, ""), Stage("b", 50, 9, ""), Stage("c", 100, 1, "")
    parent = parent_with(tmp_path, 160, [])
    assert parent._left_out(first, [little, much]) is None
    left = parent._left_out(little, [much])
    assert left is None  # 60 of its 50 seconds are there
    parent = parent_with(tmp_path, 130, [])
    assert parent._limit(first, [little, much]) == pytest.approx(30, abs=1)
    found = parent._left_out(first, [little, much])
    assert found is not None
    assert found["reason"] == "no time was left for it (see --minutes)"
    assert parent._limit(much, []) == pytest.approx(130, abs=1)


def test_all_stages_fit_into_the_default_minutes() -> None:
    assert sum(stage.seconds for stage in STAGES) <= 60 * gpu.MINUTES + 20
    assert STAGES[0] is MACHINE


def test_stage_selected_alone_runs_its_checks() -> None:
    assert [stage.name for stage in gpu.chosen(["tiles"])] == ["machine", LONG, "tiles"]
    assert gpu.chosen([]) == list(STAGES)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs all stages where there is a GPU")
def test_without_a_gpu_it_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.tools.gpu", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("make gpu: torch sees no CUDA device")
    assert "Traceback" not in done.stderr
    assert [row["name"] for row in Rows(tmp_path / "out" / "results.jsonl").read()] == ["machine", "machine"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--only", "everything"], "invalid choice: 'everything'"), (["--minutes", "0"], "--minutes: 0.0; it must be")],
)
def test_bad_arguments_are_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_list_has_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [stage.name for stage in STAGES]


def test_without_torch_it_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda _: None)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no torch" in line
    assert not list(tmp_path.iterdir())


def test_the_parent_imports_no_torch() -> None:
    code = "import sys, experiments.tools.gpu.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_an_old_gpu_and_missing_packages_are_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        multi_processor_count, total_memory = 40, 16 << 30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old one")
    monkeypatch.setattr(machine, "find_spec", lambda _: None)
    found = machine.found(torch.device("cuda"))
    assert found["lacks"]["sm80"] == "compute capability 7.5 is older than 8.0"
    assert found["lacks"]["triton"] == "the package triton is not installed"
    parent_needs = {need for stage in STAGES for need in stage.needs}
    assert parent_needs <= {"triton", "sm80", "lightning", *machine.TOOLS}


# -- every stage's code, on the CPU -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Row]], Path]:
    """The rows of every real stage at sizes for a CPU, in order, with the CPU's kernel."""
    run = Run(tmp_path_factory.mktemp("tiny"), 600, tiny=True)
    found: dict[str, list[Row]] = {}
    for stage in STAGES:
        run_stage(stage.name, stage.function, run)
        found[stage.name] = [row for row in run.rows.read() if row["stage"] == stage.name]
    return found, run.out


@pytest.mark.slow
def test_every_stage_runs_to_its_end(tried: tuple[dict[str, list[Row]], Path]) -> None:
    found, _ = tried
    for name, own in found.items():
        assert own, name
        bad = [row for row in own if row["kind"] == "error" or row.get("status") == "failed" or "not_timed" in row]
        assert not bad, name


def test_every_check_and_timing_has_its_row(tried: tuple[dict[str, list[Row]], Path]) -> None:
    found, out = tried

    def names(stage: str, kind: str) -> list[str]:
        return [row["name"] for row in found[stage] if row["kind"] == kind]

    assert names("check-dense", "check") == ["dense, float32, d 16"]
    assert names("check-varlen", "check") == ["variable length, float32, d 16"]
    assert names("check-choice", "check") == [
        f"choice, {what}, float32, d 16" for what in ("few chunks", "shared keys, k 16", "180k tokens")
    ]
    assert names("check-film", "check") == ["film, float32, d 16"]
    assert found["check-film"][0]["dense_parts"] > 0
    assert names(LONG, "check") == ["180k tokens, float32, d 16"]
    assert [set(row) >= {"out", "lse", "dq", "dk", "dv"} for row in found[LONG]] == [True]
    assert {"forward: whole", "forward+backward: until the host is done"} <= set(names("breakdown", "time"))
    assert {"moga, forward: all kernels", "moga, forward+backward: all kernels"} <= set(names("breakdown", "time"))
    assert names("tiles", "time") == [times.sweep_name(*pair) for pair in tiny_sweep()]
    assert len(names("end-to-end", "time")) == 2
    assert names("step", "fact") == ["training step, dense ÷ moc"]
    assert (out / "trace.json.gz").stat().st_size > 100
    assert len(list(out.iterdir())) <= 8


def tiny_sweep() -> Iterator[tuple[str, Any]]:
    for kernel, options in times.TINY_SWEEP:
        for tile in options:
            yield kernel, tile


def test_without_their_checks_timings_say_so(tmp_path: Path) -> None:
    run = Run(tmp_path, 600, tiny=True)
    for function in (times.breakdown, times.anchors, model.step):
        found = list(function(run))
        wanted = [row for row in found if "dense on sdpa" not in row["name"]]
        assert wanted
        assert all("was not run" in row["not_timed"] for row in wanted), function


def test_a_wrong_kernel_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = grouped._Softmax.result

    def wrong(self: grouped._Softmax, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(self, dtype)
        return out * 1.01, lse

    monkeypatch.setattr(grouped._Softmax, "result", wrong)
    run = Run(tmp_path, 600, tiny=True)
    assert not run_stage("check-film", "experiments.tools.gpu.checks:film", run)
    assert not run_stage("check-long", "experiments.tools.gpu.checks:long", run)
    assert not run_stage("tiles", "experiments.tools.gpu.times:sweep", run)
    assert not run_stage("end-to-end", "experiments.tools.gpu.times:end_to_end", run)
    assert not [row for row in run.rows.read() if row["kind"] == "time" and "seconds" in row]


def test_out_of_memory_is_one_line_and_the_dense_step_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = model._steps

    def steps(attention: dict[str, Any], run: Run) -> dict[str, Any]:
        if attention["name"] == "moc":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 GiB")
        return right(attention, run)

    monkeypatch.setattr(model, "_steps", steps)
    run = Run(tmp_path, 600, tiny=True)
    for name in (checks.FILM, checks.LONG):
        run.rows.add({"stage": "x", **rows.check(checks.name_of(name, torch.float32, 16))})
    first, second = model.step(run)
    assert first["reason"] == "out of memory: OutOfMemoryError: CUDA out of memory. Tried to allocate 40.00 GiB"
    assert second["name"] == "training step, dense on sdpa"


FAKE_TOOL = """#!/bin/sh
while [ "${1%python*}" = "$1" ]; do shift; done
echo '"1","attend","sm__throughput.avg.pct_of_peak_sustained_elapsed","%","71.2"'
"$@"
echo '========= ERROR SUMMARY: 2 errors'
"""


@pytest.mark.slow
def test_what_tools_print_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "tool"
    tool.write_text(FAKE_TOOL)
    tool.chmod(0o755)
    monkeypatch.setattr(instruments, "tool_path", lambda _: str(tool))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run = Run(tmp_path, 100, tiny=True)
    (found,) = instruments.memory(run)
    assert found["reason"] == "2 errors: see memory.txt"
    assert "small plan 1" in (tmp_path / "memory.txt").read_text()
    first = next(instruments.counters(run))
    assert first["sm__throughput.avg.pct_of_peak_sustained_elapsed"] == "71.2"


def test_a_suite_that_does_not_end_is_named(tmp_path: Path) -> None:
    found = list(checks.suite(Run(tmp_path, 5.2, tiny=True)))
    assert [row["name"] for row in found] == [
        "suite of cpu: kernel_overlapping_keys",
        "suite of cpu: kernel_shared_keys",
    ]
    assert {(row["status"], row["reason"]) for row in found} == {("skipped", "did not end in its time")}


def _stalls(asked: tuple[str, str]) -> Outcome:
    """Stand in for a check in a process of the suite; one of them does not end."""
    kernel, check = asked
    if check == "kernel_shared_keys":
        time.sleep(600)
    return Outcome(kernel, check, "passed", "", 0.0)


def test_what_has_ended_of_a_suite_is_kept_where_another_check_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_outcome", _stalls)
    run = Run(tmp_path, 100, tiny=True)
    found = checks.suite(run)
    first = next(found)
    run.end = time.monotonic() + 5.2
    assert [(row["name"], row["status"]) for row in (first, *found)] == [
        ("suite of cpu: kernel_overlapping_keys", "passed"),
        ("suite of cpu: kernel_shared_keys", "skipped"),
    ]


def test_kernels_are_grouped_by_what_they_are_for() -> None:
    for name, group in {
        "attend": "attend",
        "merge": "merge",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "dense forward",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16": "dense backward",
        "void cub::DeviceRadixSortOnesweepKernel": "index",
        "Memcpy DtoD (Device -> Device)": "copies",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>": "zeros",
        "void at::native::reduce_kernel<512, 1>": "sums and casts",
        "void some_other_kernel": "other",
    }.items():
        assert times.group_of(name) == group, name


def test_other_tiles_last_as_long_as_their_block() -> None:
    before = dict(configs.CONFIGS)
    with common.tiles(128, "attend", configs.Tile(64, 64, 4, 2), attend_rows=True):
        changed = configs.choose((9, 0), 128).routed
        assert changed.attend == configs.Tile(64, 64, 4, 2)
        assert changed.grad_queries.rows == 64
        assert configs.choose((9, 0), 64) == before[(9, 0), 64]
    assert before == configs.CONFIGS


def test_failures_are_named_in_one_line() -> None:
    assert in_one_line(ValueError("\n\nfirst\nsecond")) == "ValueError:"
    assert in_one_line(zoo.ZooError("kernel 'triton': needs a GPU")) == "ZooError: kernel 'triton': needs a GPU"


def test_the_summary_of_nothing_is_a_page() -> None:
    assert "Failed stages: none" in summary([], 0.0)


# -- what travels -----------------------------------------------------------------------------------------------------

SAME_KEYS = """
import json, sys
import torch
from triton.runtime import driver
from sparse_zoo.kernels.triton import device
from experiments.tools.gpu.pack_compile import Driver
driver.set_active(Driver(90))
for launch in json.load(open(sys.argv[1])):
    args = [torch.empty(8, dtype=getattr(torch, x["dtype"][6:])) if isinstance(x, dict) else x for x in launch["args"]]
    getattr(device, launch["name"]).warmup(*args, grid=(1,), **launch["constants"])
"""


@pytest.mark.slow
def test_what_is_compiled_without_torch_is_found_with_it_and_elsewhere(tmp_path: Path) -> None:
    """Kernels compiled by the torch-free script are not compiled again for torch's tensors, after the cache moved."""
    pytest.importorskip("triton", reason="needs the package triton")
    film = zoo.Layout.film([zoo.Shot(2, 16, 16, text=3)] * 3)
    launches = pack._step("moc", {"top_k": 1, "causal": None}, film, 2, 64, torch.bfloat16)
    few = [pack.described(launch) for launch in launches if launch.name in ("merge", "row_dots", "pool")]
    assert {launch["name"] for launch in few} == {"merge", "row_dots", "pool"}
    first, moved = tmp_path / "first", tmp_path / "moved"
    first.mkdir()
    (first / pack_compile.LAUNCHES).write_text(json.dumps(few))
    script, kernels = pack_compile.__file__, ROOT / "sparse_zoo" / "kernels" / "triton" / "device.py"
    environment = {name: x for name, x in os.environ.items() if name not in ("TRITON_INTERPRET", "TRITON_CACHE_DIR")}
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, script, str(first), str(kernels), "90"],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 kernels compiled" in done.stdout
    assert " 0 failed" in done.stdout
    first.rename(moved)
    found = gpu.unpacked(moved)
    before = {entry.name for entry in (moved / pack_compile.CACHE).iterdir()}
    environment |= found | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", SAME_KEYS, str(moved / pack_compile.LAUNCHES)], check=True, env=environment, cwd=ROOT
    )
    files = list((moved / pack_compile.CACHE).glob("*/*"))
    assert {file.parent.name for file in files} == before
    assert {file.suffix for file in files} == {".cubin", ".json"}  # compiled anew, there would be others


def test_launches_are_recorded_once_for_each_kernel() -> None:
    pytest.importorskip("triton", reason="needs the package triton")
    film = zoo.Layout.film([zoo.Shot(2, 16, 16, text=3)] * 3)
    with common.tiles(128, "attend", configs.Tile(128, 128, 8, 2, tma=True), attend_rows=True):
        launches = pack._step("moc", {"top_k": 1, "causal": None}, film, 2, 128, torch.bfloat16)
    found = [pack.described(launch) for launch in launches]
    assert json.loads(json.dumps(found)) == found
    assert {"attend", "grad_queries", "grad_keys", "merge", "choose"} <= {launch["name"] for launch in found}
    blocks = [
        [x["block"] for x in launch["args"] if isinstance(x, dict) and "block" in x]
        for launch in found
        if launch["name"] == "attend"
    ]
    assert [[1, 1, 128, 128]] * 2 in blocks  # keys and values, by the copy engine


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--python", "no-such-python"], "no-such-python"),
        (["--out", "."], "exists; give a new folder"),
    ],
)
def test_a_pack_that_cannot_be_made_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack.main(["--out", str(tmp_path / "pack"), *arguments]) == 1
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_a_folder_that_is_no_pack_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--pack", str(tmp_path)])
    assert ended.value.code == 2
    assert "has no triton-cache" in capsys.readouterr().err


# -- what it imports --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_needs_torch_and_triton_alone_and_lightning_for_the_step() -> None:
    """In a process where the train extra's other packages cannot be imported, every stage's module and the DiT are."""
    absent = [
        "mlflow",
        "omegaconf",
        "av",
        "scenedetect",
        "typer",
        "rich",
        "matplotlib",
        "jinja2",
        "scipy",
        "pandas",
        "submitit",
        "ray",
    ]
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from importlib import import_module
from experiments.tools.gpu.stages import STAGES
for stage in STAGES:
    import_module(stage.function.partition(":")[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_modules_name_what_they_import_at_the_top() -> None:
    """Of the command, the core and the model: torch, Triton, Lightning and torchmetrics, nothing else."""
    own = {"sparse_zoo", "lit_modules", "experiments", *sys.stdlib_module_names}
    tool = ROOT / "experiments" / "tools" / "gpu"
    for file in [*tool.glob("*.py"), *(ROOT / "sparse_zoo").rglob("*.py"), *(ROOT / "lit_modules").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())) if file.parent == tool else ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            tops = {name.split(".")[0] for name in names}
            assert tops <= own | {"torch", "triton", "lightning", "torchmetrics", "typing_extensions", "numpy"}, file
            inside = {name for name in names if name.startswith("experiments")}
            assert all(name.startswith("experiments.tools.gpu") for name in inside), file


def test_every_stage_names_a_function() -> None:
    for stage in STAGES:
        module, _, function = stage.function.partition(":")
        assert callable(getattr(import_module(module), function))
