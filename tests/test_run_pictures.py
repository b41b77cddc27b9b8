"""Pictures of runs are stored as arrays and drawn when they are shown; a file of somebody else is data."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import film, finished, plan
from PIL import Image
from typer.testing import CliRunner

import sparse_zoo as zoo
from experiments.cli import app
from experiments.reporting.html import html
from experiments.reporting.pictures import LOOP, sample_map
from experiments.reporting.report import build_report
from experiments.reporting.run_pictures import SHOT_PIXELS, draw, read_film, save_picks, save_plans
from experiments.tracking import arrays
from experiments.tracking.arrays import read_arrays, write_arrays
from experiments.tracking.store import Cell, SweepRequest, write_sweep
from sparse_zoo.picture import INK, PAPER, picture


def test_stored_plan_is_plotted_as_the_plan_itself(tmp_path: Path) -> None:
    layout = zoo.Layout.pack([zoo.Layout.film([zoo.Shot(2, 3, 5, text=2), zoo.Shot(1, 4, 4)], caption=3)] * 2)
    attention = zoo.build("moc", heads=2, head_dim=8, dim=8, top_k=1)
    call = zoo.Call(*torch.randn(3, 1, 2, len(layout), 8), layout, hidden=torch.randn(1, len(layout), 8))
    with torch.no_grad():
        result = attention.eval().run(call)
    (saved,) = save_plans([result], tmp_path)
    assert saved == {"file": "plan-1-1.npz", "label": "layer 1"}
    assert np.array_equal(draw(tmp_path, saved["file"]), picture(result.plans[0], layout).numpy())


def test_stored_picks_are_a_matrix_with_red_loops(tmp_path: Path) -> None:
    found = sample_map("moc", {"causal": None}).found
    (saved,) = save_picks([found], tmp_path)
    assert saved["label"] == "layer 1, picks by shot, loops 9 <-> 11"
    image, stored = draw(tmp_path, saved["file"]), read_arrays(tmp_path, saved["file"])
    assert image.shape == (12 * SHOT_PIXELS, 12 * SHOT_PIXELS, 3)
    assert np.argwhere(stored["looped"]).tolist() == [[9, 11], [11, 9]]
    for a in range(12):
        for b in range(12):
            corner, middle = (image[a * SHOT_PIXELS + at, b * SHOT_PIXELS + at] for at in (0, SHOT_PIXELS // 2 + 1))
            assert (tuple(corner) == LOOP) == bool(stored["looped"][a, b])
            share = (stored["picks"][a, b] / max(1, stored["picks"][a].sum())) ** 0.5
            want = [round(p * (1 - share) + i * share) for p, i in zip(PAPER, INK, strict=True)]
            assert a == b or np.abs(middle.astype(int) - want).max() <= 1


def test_a_stored_film_comes_back(tmp_path: Path) -> None:
    write_arrays(tmp_path / "film.npz", film(0.5))
    rows = read_film(tmp_path, "film.npz")
    assert all(np.array_equal(row, kept) for row, kept in zip(rows, film(0.5).values(), strict=True))
    assert draw(tmp_path, "film.npz").shape[0] == 3 * rows[0].shape[0]


def _pack(name: str, header: str, data: bytes = b"") -> bytes:
    """A `.npz` file of one array with a header of one's choice."""
    text = (header + " " * (118 - len(header) - 1) + "\n").encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data)
    return buffer.getvalue()


def _saved(**values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **values)
    return buffer.getvalue()


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "objects": (lambda: _saved(real=np.array([{}], object)), "not an array of numbers"),
    "huge claim": (
        lambda: _pack("share", "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }"),
        "of the size that it states",
    ),
    "bomb": (
        lambda: _pack("share", "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", bytes(1 << 28)),
        "at most",
    ),
    "large file": (lambda: bytes(arrays.MAX_FILE_BYTES + 1), "at most"),
    "text": (lambda: b"no picture", "cannot be read as an .npz file"),
    "cut short": (lambda: _saved(**film(0.5))[:-30], "cannot be read as an .npz file"),
    "code for a header": (lambda: _pack("share", "__import__('os').system('true')"), "a header that cannot be read"),
    "another array": (lambda: _saved(other=np.zeros(3)), "no array 'real'"),
    "floats for pixels": (lambda: _saved(**{k: v.astype(float) for k, v in film(0.5).items()}), "has type float64"),
    "rows of two sizes": (lambda: _saved(**film(0.5) | {"real": np.zeros((4, 4, 3), np.uint8)}), "not the rows"),
    "four channels": (lambda: _saved(**{k: v[..., :2] for k, v in film(0.5).items()}), "not the rows of a film"),
    "share of two": (lambda: _saved(**plan() | {"share": np.full((8, 8), 2, np.float32)}), "not the map of a plan"),
    "share of nan": (lambda: _saved(**plan() | {"share": np.full((8, 8), np.nan, np.float32)}), "not the map"),
    "unknown kind": (lambda: _saved(**plan() | {"kind": np.full(8, 9, np.uint8)}), "not the map of a plan"),
    "short ruler": (lambda: _saved(**plan() | {"kind": np.zeros(3, np.uint8)}), "not the map of a plan"),
    "no square": (
        lambda: _saved(picks=np.zeros((2, 3), np.float32), looped=np.zeros((2, 3), bool)),
        "not a matrix of picks",
    ),
    "too many shots": (
        lambda: _saved(picks=np.zeros((999, 999), np.float32), looped=np.zeros((999, 999), bool)),
        "shape",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_is_no_picture_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    make, reason = HOSTILE[case]
    (tmp_path / "a.npz").write_bytes(make())
    with pytest.raises(ValueError, match=reason) as refused:
        draw(tmp_path, "a.npz")
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_pictures_of_an_earlier_version_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    cells = tuple(Cell(name, {"attention": {"name": "dense"}, "seed": i}) for i, name in enumerate("ab"))
    for cell in cells:
        made = finished(cell, "s", 0.5)
        for name in ("plan-1-1.png", "film.png"):
            Image.new("RGB", (8, 8)).save(Path(made.folder) / name)
        old = [{"file": "plan-1-1.png", "label": "layer 1"}]
        replace(made, pictures=old, strips=["film.png"]).write(Path(made.folder))
    write_sweep("s", SweepRequest("", cells))
    page = html(build_report("s"))
    assert page.count("<li>4 pictures of a, b are PNG files, which an earlier version stored") == 1
    assert "data:image/png" not in page
    assert CliRunner().invoke(app, ["report", "s"]).exit_code == 0
