"""Peak memory and the number of operations at 182,080 tokens, counted without a GPU."""

from __future__ import annotations

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import sparse_zoo as zoo
from experiments.cli import app
from sparse_zoo import bench
from sparse_zoo.host_time import META, record_launches
from sparse_zoo.peak_memory import _Peak, peak_bytes
from sparse_zoo.registry import names

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are recorded, not run"),
]
RESULTS = Path(__file__).parents[1] / "experiments" / "results" / "gpu_attention.json"
PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
HEADS, HEAD_DIM = 24, 128
MEASURED = [
    pytest.param(film, name, given, id=f"{name}-{len(film)}")
    for film, methods in bench.GPU_LAYOUTS
    for name, given in methods
    if given.get("anchors") != []  # which `make gpu` does not time
]
BEHIND = {"psa", "svg2"}
"""Methods whose choice itself multiplies all pairs of sampled tokens, or clusters all tokens again and again."""


def dense(film: zoo.Layout) -> dict[str, int]:
    """What the bench's dense attention holds: q, k, v, out and lse; with backward also dq, dk, dv and dq in float32."""
    rows = HEADS * len(film)
    return {"forward": rows * (4 * 2 * HEAD_DIM + 4), "forward+backward": rows * (9 * 2 * HEAD_DIM + 8)}


def build(name: str, **given: Any) -> zoo.Attention:
    return zoo.build(name, heads=HEADS, head_dim=HEAD_DIM, dim=HEADS * HEAD_DIM, kernel="triton", **given)


def ratios(film: zoo.Layout, name: str, **given: Any) -> dict[str, float]:
    held = peak_bytes(build(name, **given), film, HEADS, HEAD_DIM)
    return {which: held[which] / most for which, most in dense(film).items()}


@pytest.mark.parametrize(("film", "name", "given"), MEASURED)
def test_the_count_is_what_was_measured(film: zoo.Layout, name: str, given: dict[str, Any]) -> None:
    """On the H200, beside cuDNN's dense attention.

    Since then `vsa` holds less, whose chosen tiles are indices now; so do some backwards, which add in place.
    """
    shots = len(film.films[0].shots)
    measured = {
        row["pass"]: row["peak_memory_ratio"]
        for row in json.loads(RESULTS.read_text())["rows"]
        if (row.get("method"), row.get("kernel"), row.get("tokens"), row.get("shots"))
        == (name, "triton", len(film), shots)
    }
    assert len(measured) == 2
    counted = ratios(film, name, **given)
    if name != "vsa":
        assert counted["forward"] == pytest.approx(measured["forward"], rel=0.01)
    assert all(counted[which] < 1.03 * ratio for which, ratio in measured.items())


def test_what_is_let_go_is_not_counted() -> None:
    known = torch.empty(1000, device=META)
    with record_launches() as launches, _Peak((known,), launches) as peak:
        one = known + 1
        two = one[:500] * 2  # 4,000 and 2,000 bytes
        del one
        three = two.expand(3, 500)  # of the same bytes
        torch.empty(750, device=META)  # 3,000 bytes, gone at once
        four = three + known[:500]  # 6,000 bytes
    assert peak.most == 8000
    assert peak.now == 8000
    assert four.shape == (3, 500)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in BEHIND else name for name in names()]
)
def test_every_method_holds_what_the_page_says(name: str) -> None:
    line = next(line for line in PAGE.read_text().splitlines() if re.match(rf"\| `{name}` \| [\d.]+ GB", line))
    printed = [float(x) for x in re.findall(r"([\d.]+)x", line)]
    assert list(ratios(bench.PAPER_FILM, name).values()) == pytest.approx(printed, abs=0.02)


def test_the_command_counts_memory() -> None:
    sizes = ["--shots", "2", "--frames", "4", "--rows", "8", "--cols", "8", "--dim", "256", "--heads", "4"]
    done = CliRunner().invoke(app, ["cost", "window", *sizes, "--memory", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    film = zoo.Layout.film([zoo.Shot(4, 8, 8, 64)] * 2, caption=64)
    held = peak_bytes(zoo.build("window", heads=4, head_dim=64, kernel="triton"), film, 4, 64)
    assert found["cost"]["bytes"]["peak"] == {"forward": held["forward"], "forward_backward": held["forward+backward"]}
    assert found["dense"]["bytes"]["peak"]["forward"] < held["forward"]
    assert found["notes"][-1].startswith("Peak on a GPU")


def test_memory_is_refused_for_what_the_kernel_does_not_take() -> None:
    done = CliRunner().invoke(app, ["cost", "moc", "--dim", "160", "--heads", "2", "--memory"])
    assert done.exit_code == 2
    assert "head dim 80 is not 64 or 128" in done.output


class _Count(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in BEHIND else name for name in names()]
)
def test_the_host_of_a_gpu_gives_few_operations(name: str) -> None:
    """The host dispatches each operation, views included, however little the device has to do for it."""
    film = bench.PAPER_FILM
    attention = build(name).to(META)
    with record_launches(), torch.no_grad():
        for _ in range(2):  # the first builds the tables
            q, k, v = (torch.empty(1, HEADS, len(film), HEAD_DIM, dtype=torch.bfloat16, device=META) for _ in range(3))
            with _Count() as count:
                attention(q, k, v, film, hidden=torch.empty(1, len(film), HEADS * HEAD_DIM, device=META), step=0)
    assert count.number < (150_000 if name in BEHIND else 20_000)
