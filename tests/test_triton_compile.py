"""Every configuration that `triton` can pick, compiled ahead of time for its GPU: no GPU is needed, and none is used.

What is compiled is what the launcher launches: its calls are recorded, and their arguments give the signatures.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_zoo as zoo
from sparse_zoo.kernels.triton.configs import CONFIGS, MOST_CHUNKS, Config, choose_tile

triton = pytest.importorskip("triton", reason="needs the package triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompiledKernel  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from sparse_zoo.kernels.triton import cudnn, dense, device, union  # noqa: E402
from sparse_zoo.kernels.triton import routing as fused  # noqa: E402

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}
MULTIPLY = ("attend", "grad_queries", "grad_keys")
OTHERS = ("merge", "fold", "add_rows", "add_up", "row_dots", "gather")
ROUTING = ("pool", "choose")
SPILLS = {
    # Not run on a card. Some words of the rest of a segment, which is multiplied with masks, once, after the loop.
    ((8, 0), 128, "attend", False): (16, 0),
    ((8, 0), 128, "grad_queries", False): (24, 0),
    # The fastest tile of those timed on an H200: 69 ms, and 73 for the next, which spills too. Triton 3.7.1 reads five
    # words again in a loop of some 450 instructions, 3.6.0 none; the rest lies outside, as above.
    ((9, 0), 128, "grad_keys", False): (72, 5),
    ((9, 0), 128, "grad_keys", True): (352, 5),
}
"""Bytes of the stack, and loads and stores of it in a loop that multiplies, of kernels that spill, by compute
capability, head dim, name and PIECES. All others spill nothing."""
OLDEST = "3.6.0"
OLDEST_PACKAGE = Path(sys.prefix) / f"triton-{OLDEST}"
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}


@dataclass(frozen=True)
class Launch:
    """A recorded launch: positional arguments, compile-time constants, and options such as num_warps."""

    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


@dataclass
class Recorder:
    """Stands for a kernel of the device module."""

    launches: list[Launch]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
            self.launches.append(Launch(args, constants, {"num_warps": num_warps, "num_stages": num_stages}))

        return launch


def recorded(config: Config, dim: int) -> dict[str, list[Launch]]:
    """The launches, forward and backward, of a plan with a routed part and one of pieces."""
    length = 64
    chunks = zoo.Partition.from_labels(torch.arange(length) // 16, 4)
    routed = zoo.Plan.routed(chunks, torch.zeros(1, 4, length, 1, dtype=torch.int64))
    plan = zoo.Plan(*routed.parts, *zoo.Plan.groups(torch.arange(length) % 2).parts)
    q, k, v = (torch.zeros(2, heads, length, dim, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
    with recording((*MULTIPLY, *OTHERS)) as launches, pytest.MonkeyPatch.context() as patch:
        for settings in (config, config._replace(cudnn=True)):
            patch.setattr(cudnn, "forward", lambda rows, *_: (rows, rows[..., 0]))
            patch.setattr(cudnn, "backward", lambda grad, rows, *_: (rows, *[grad[..., :length, :]] * 2))
            out, _ = union.Union.apply(q, k, v, plan, 0.1, settings)
            out.backward(torch.zeros_like(out))
            patch.setattr(dense, "PAIRS", 1)  # then the pieces are rectangles
    return launches


@contextmanager
def recording(names: Iterable[str]) -> Iterator[dict[str, list[Launch]]]:
    launches: dict[str, list[Launch]] = {name: [] for name in names}
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(device, name, Recorder(launches[name]))
        yield launches


def compiled(name: str, launch: Launch, capability: int) -> CompiledKernel:
    kernel = getattr(device, name)
    signature, attributes = dict.fromkeys(kernel.arg_names, "constexpr"), {}
    assert set(kernel.arg_names[len(launch.args) :]) == set(launch.constants)
    for i, (argument, value) in enumerate(zip(kernel.arg_names, launch.args, strict=False)):
        if isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[argument] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
            continue
        if isinstance(value, Tensor):
            signature[argument] = f"*{TYPES[value.dtype]}"
        else:
            signature[argument] = "fp32" if isinstance(value, float) else "i32"
        # Triton assumes that a pointer or integer that it specialises on stays a multiple of 16.
        specialised = not kernel.params[i].do_not_specialize
        if (
            specialised
            and (value.data_ptr() if isinstance(value, Tensor) else value if isinstance(value, int) else 1) % 16 == 0
        ):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=launch.constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")  # what is taken from the cache leaves no log
    monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")


def check(
    name: str,
    launch: Launch,
    target: int,
    capfd: pytest.CaptureFixture[str],
    folder: Path,
    most_spills: tuple[int, int] = (0, 0),
) -> None:
    """No more spills than allowed, no warnings, memory that fits, rows in 64 bits, tensor cores."""
    capfd.readouterr()
    kernel = compiled(name, launch, target)
    log = capfd.readouterr().out
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) == 1, log
    code = sass(kernel, folder)
    most_bytes, most_in_loop = most_spills
    assert int(spills[0][0]) <= most_bytes, log
    assert max([len(re.findall(r"\b(LDL|STL)\b", loop)) for loop in loops(code)], default=0) <= most_in_loop
    assert "warning" not in log.lower(), log
    assert "C75" not in log, log
    assert kernel.metadata.shared <= SHARED_MEMORY[target]
    # Row offsets pass 2^31: what is multiplied by a stride has 64 bits.
    assert name in ROUTING or not re.search(r"arith\.muli .* : tensor<\d+x1xi32>", kernel.asm["ttir"])
    if name in (*MULTIPLY, "choose"):
        assert loops(code) or name == "choose"
        assert ("HGMMA" if target == 90 else "HMMA") in code
        assert ("UTMALDG" in code) is launch.constants.get("TMA", False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dim", "name"),
    [(*key, name) for key in sorted(CONFIGS) for name in (*MULTIPLY, *OTHERS)],
    ids=str,
)
def test_attention_compiles(
    capability: tuple[int, int], dim: int, name: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    launches = recorded(CONFIGS[capability, dim], dim)[name]
    if name not in MULTIPLY:
        kinds = {str((launch.constants, [getattr(x, "dtype", 0) for x in launch.args])): launch for launch in launches}
        assert kinds
        for launch in kinds.values():
            check(name, launch, capability[0] * 10 + capability[1], capfd, tmp_path)
        return
    assert [launch.constants.get("PIECES") for launch in launches] == [False, True]
    assert [launch.constants["TMA"] for launch in launches] == [capability >= (9, 0)] * 2
    for launch in launches:
        few = SPILLS.get((capability, dim, name, launch.constants["PIECES"]), (0, 0))
        check(name, launch, capability[0] * 10 + capability[1], capfd, tmp_path, few)


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize(("capability", "dim"), sorted(CONFIGS), ids=str)
def test_gradients_of_one_part_are_added_where_they_stay(
    capability: tuple[int, int], dim: int, pieces: bool, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In half precision, which is another kernel than that which sums several parts in float32."""
    chunks = zoo.Partition.from_labels(torch.arange(64) // 16, 4)
    plan = zoo.Plan.within(chunks) if pieces else zoo.Plan.routed(chunks, torch.zeros(1, 2, 64, 1, dtype=torch.int64))
    q, k, v = (torch.zeros(1, 2, 64, dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with recording((*MULTIPLY, *OTHERS)) as launches:
        out, _ = union.Union.apply(q, k, v, plan, 0.1, CONFIGS[capability, dim])
        out.backward(torch.zeros_like(out))
    (launch,) = launches["grad_keys"]
    sums = [launch.args[device.grad_keys.arg_names.index(name)] for name in ("dk", "dv")]
    assert [x.dtype for x in sums] == [torch.bfloat16] * 2
    few = SPILLS.get((capability, dim, "grad_keys", pieces), (0, 0))
    check("grad_keys", launch, capability[0] * 10 + capability[1], capfd, tmp_path, few)


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90])
def test_routing_compiles(
    target: int, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_tile", lambda _: choose_tile(divmod(target, 10)))
    q = torch.zeros(1, 2, MOST_CHUNKS, 128, dtype=torch.bfloat16)
    legal, kind = torch.ones(1, MOST_CHUNKS, dtype=torch.bool), torch.zeros(MOST_CHUNKS, dtype=torch.int64)
    with recording(ROUTING) as launches:
        fused.top_chunks(q, q, zoo.Partition.singles(MOST_CHUNKS), legal, kind, fused.MOST_K)
    for name in ROUTING:
        (launch,) = launches[name]
        check(name, launch, target, capfd, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(triton.__version__ == OLDEST, reason="this is that run")
@pytest.mark.skipif(not OLDEST_PACKAGE.exists(), reason=f"needs Triton {OLDEST} in {OLDEST_PACKAGE}: make test-slow")
def test_everything_compiles_with_the_oldest_triton() -> None:
    """The code generators differ in registers and spills: what GPU machines with torch 2.11 have is checked as well."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "", __file__],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(OLDEST_PACKAGE), *sys.path])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 skipped" in done.stdout  # this test itself: the other Triton was the one imported


def loops(code: str) -> list[str]:
    """The innermost loops that multiply, as text; what goes back because a load was waited for is none."""
    lines = code.splitlines()
    labels = {line.strip(" :"): i for i, line in enumerate(lines) if re.match(r"\s*\.L_x_\d+:", line)}
    jumps = [(i, re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) for i, line in enumerate(lines)]
    ends = [(labels[jump[1]], i) for i, jump in jumps if jump]
    ends = [(a, b) for a, b in ends if "TRYWAIT" not in "\n".join(lines[b - 6 : b])]
    found = [(a, b) for a, b in ends if a < b and re.search(r"\bHG?MMA\b", "\n".join(lines[a:b]))]
    inner = [(a, b) for a, b in found if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in found)]
    return ["\n".join(lines[a : b + 1]) for a, b in inner]


def sass(kernel: CompiledKernel, folder: Path) -> str:
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    return subprocess.run([tool, "-c", binary], capture_output=True, text=True, check=True).stdout
