"""`zoo bench`: the page's table and the plot are what was measured."""

import json
import re
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from typer.testing import CliRunner

from experiments.cli import app
from experiments.reporting.bench import markdown, plot

ROOT = Path(__file__).parent.parent
ON_GPU = json.loads((ROOT / "experiments/results/gpu_attention.json").read_text())
RESULTS = json.loads((ROOT / "experiments/results/cpu_attention.json").read_text())


def row(method: str, tokens: int, attained: float, **more: object) -> dict[str, object]:
    times = {"seconds": 1.0, "dense_seconds": attained, "attained": attained, "bound": 4.0, "pass": "forward+backward"}
    about = {"kernel": "cpu", "shots": 8, "heads": 2, "head_dim": 64, "dtype": "float32"}
    return {"method": method, "tokens": tokens, "attained_over_bound": attained / 4, **times, **about, **more}


FOUND = {
    "device": "a processor",
    "rows": [
        row("moc", 2048, 2.0),
        row("moc", 2048, 3.0, **{"pass": "forward"}),
        row("moc", 16384, 3.0),
        row("window", 16384, 1.0),
        {"method": "moga", "kernel": "cpu", "tokens": 2048, "failed": "out of memory"},
    ],
}


def test_the_table_has_a_cell_for_what_was_timed() -> None:
    assert markdown(FOUND).splitlines() == [
        "| method | 2,048 tokens | 16,384 tokens |",
        "|---|---|---|",
        "| `moc` | 2.00x of 4.00x: **0.50** | 3.00x of 4.00x: **0.75** |",
        "| `window` | – | 1.00x of 4.00x: **0.25** |",
    ]


def test_plot_is_written(tmp_path: Path) -> None:
    picture = imread(plot(FOUND, tmp_path / "inside" / "time.png"))
    assert picture.shape == (675, 1050, 4)
    assert picture[..., :3].std() > 0.05


def test_docs_and_readme_show_what_was_measured_on_a_gpu() -> None:
    """Every row of both tables; docs/kernels.md has one for all that was timed on `triton`."""
    timed = [row for row in ON_GPU["rows"] if row["kind"] == "time" and row.get("kernel") == "triton"]
    cells = {
        (row["method"], f"{row['tokens']:,}", str(row["shots"]), row["pass"]): (
            f"{row['attained']:.2f}x of {row['bound']:.2f}x: **{row['attained_over_bound']:.2f}**"
        )
        for row in timed
    }
    for page in ("README.md", "docs/kernels.md"):
        found = re.findall(
            r"^\| `(\w+)` \| ([\d,]+) \| (\d+) \| (.+) \| (.+) \|$", (ROOT / page).read_text(), flags=re.M
        )
        assert found
        shown = {(*row[:3], "forward") for row in found}
        assert page == "README.md" or shown == {key for key in cells if key[3] == "forward"}
        for *key, forward, both in found:
            assert (forward, both) == tuple(cells[*key, which] for which in ("forward", "forward+backward"))


def test_readme_shows_the_training_step_that_was_measured() -> None:
    seconds = {row["name"]: row["seconds"] for row in ON_GPU["rows"] if row["kind"] == "time" and "seconds" in row}
    moc, dense = (seconds[f"training step, {name}"] for name in ("moc on triton", "dense on sdpa"))
    assert f"takes {moc:.2f} s with `moc` and {dense:.2f} s with dense attention" in (ROOT / "README.md").read_text()


def test_docs_and_readme_show_what_was_measured() -> None:
    table = markdown(RESULTS)
    assert table in (ROOT / "docs" / "kernels.md").read_text()
    rows = re.findall(r"^\| (`\w+`) \| (\d+\.\d+x of .*) \|$", (ROOT / "README.md").read_text(), flags=re.M)
    measured = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()}
    assert rows
    for method, cells in rows:
        assert [cell for cell in cells.split(" | ") if f"| {cell}: " not in measured[method]] == []


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a kernel that cannot run without a GPU")
def test_bench_writes_and_exits_by_what_failed(tmp_path: Path) -> None:
    asked = ["bench", "--tokens", "2048", "--method", "window", "--repeats", "1", "--max-repeats", "1"]
    ran = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")])
    assert ran.exit_code == 0, ran.output
    assert [row["pass"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]] == [
        "forward",
        "forward+backward",
        "host",
    ]
    assert (tmp_path / "a.png").stat().st_size > 1000
    refused = CliRunner().invoke(app, [*asked, "--kernel", "torch", "--json"])
    assert refused.exit_code == 1
    assert "needs a CUDA device" in json.loads(refused.stdout)["rows"][0]["failed"]
