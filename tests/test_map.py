"""The pages of `zoo map` and the pictures of runs show what the diagnostics say."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import sparse_zoo as zoo
from experiments.reporting import pictures
from experiments.reporting.pictures import FILM, HEADS, LOOP, sample_map
from experiments.reporting.run_pictures import save_picks, save_plans
from sparse_zoo.diagnostics import diagnose


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("moc", {}),
        ("moc", {"top_k": 2}),
        ("moc", {"top_k": 3, "anchors": ["text"]}),
        ("moc_fixed", {"top_k": 2, "chunk_tokens": 40}),
    ],
)
def test_the_late_shots_loop_unless_routing_is_causal(method: str, settings: dict[str, Any]) -> None:
    assert sample_map(method, {**settings, "causal": None}).to_json()["loops"] == [[9, 11]]
    assert sample_map(method, {**settings, "causal": "routing"}).to_json()["loops"] == []


def test_the_counts_are_of_all_heads() -> None:
    (row,) = sample_map("moc", {"top_k": 2, "causal": None}).to_json()["branches"]
    shots = torch.tensor(row["shots"])
    assert shots.diagonal().eq(0).all()  # the own shot is an anchor
    assert shots.sum(-1).tolist() == [2 * HEADS * int((FILM.shot == shot).sum()) for shot in range(12)]
    assert row["loops"] == [[9, 11]]


def test_the_json_names_what_is_not_routed() -> None:
    found = sample_map("moga", {"groups": 3}).to_json()
    assert [row["shots"] is None for row in found["branches"]] == [False, True, True]
    assert [row["loops"] for row in found["branches"]] == [[], None, None]
    assert found["density"] == pytest.approx(sum(row["density"] for row in found["branches"]))
    assert sample_map("dense", {}).to_json()["branches"] == [
        {
            "branch": 1,
            "density": 1.0,
            "mass": pytest.approx(1),
            "mass_best": pytest.approx(1),
            "shots": None,
            "loops": None,
        }
    ]


def test_the_film_is_the_same_every_time_and_touches_no_random_state() -> None:
    before = torch.get_rng_state()
    first, second = (sample_map("moga", {}).to_json() for _ in range(2))
    assert first == second
    assert torch.equal(before, torch.get_rng_state())


PAGES: list[tuple[str, dict[str, Any]]] = [
    ("dense", {}),
    ("moc", {"causal": None, "anchors": ["text", "shot"], "frames_per_chunk": 2, "top_k": 3}),
    ("moga", {"groups": 12, "mix": ["group"]}),
    ("moga", {}),
]


@pytest.mark.parametrize(("method", "settings"), PAGES)
def test_every_map_is_written(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    path = sample_map(method, settings).save(tmp_path / "a" / "page.png")
    assert image.imread(path).std() > 0.05


def test_the_matrix_shows_counts_shares_and_loops() -> None:
    counts = torch.zeros(4, 4)
    counts[1, 3], counts[3, 1], counts[3, 0], counts[2, 2] = 30, 20, 10, 5
    axis = Figure().add_subplot()
    pictures._draw_shots(axis, counts)
    share = torch.zeros(4, 4)
    share[1, 3], share[3, 1], share[3, 0], share[2, 2] = 1, 2 / 3, 1 / 3, 1
    torch.testing.assert_close(torch.from_numpy(axis.images[0].get_array().data), share.sqrt())
    told = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axis.texts}
    assert told == {(1, 3): "30", (3, 1): "20", (3, 0): "10", (2, 2): "5"}
    red = [p for p in axis.patches if isinstance(p, Rectangle) and p.get_edgecolor()[:3] == pictures._rgb(LOOP)]
    assert {(p.get_y() + 0.5, p.get_x() + 0.5) for p in red} == {(1, 3), (3, 1)}


def test_arcs_to_earlier_shots_lie_above_and_loops_are_red() -> None:
    counts = torch.zeros(4, 4)
    counts[2, 0], counts[0, 3], counts[1, 3], counts[3, 1], counts[1, 1] = 8, 8, 8, 8, 99
    figure = Figure()
    axis = figure.add_subplot()
    pictures._draw_arcs(axis, counts)
    figure.draw_without_rendering()
    red = 0
    for arrow in axis.patches:
        (start, _), (_, height), (end, _) = arrow.get_path().vertices[:3]  # of a curve: its ends, and what pulls it
        assert (height > 0) == (end < start)
        red += to_rgb(arrow.get_edgecolor()) == pytest.approx(pictures._rgb(LOOP))
    assert len(axis.patches) == 4
    assert red == 2


def test_groups_are_painted_where_their_tokens_are() -> None:
    drawn = sample_map("moga", {"groups": 4})
    labels = pictures._groups(drawn.result.plans[0])
    assert labels is not None
    assert [pictures._groups(plan) for plan in drawn.result.plans[1:]] == [None, None]
    assert pictures._groups(sample_map("moc", {}).result.plans[0]) is None
    assert labels[FILM.is_text].eq(-1).all()
    assert labels[~FILM.is_text].unique().tolist() == [0, 1, 2, 3]

    axis = Figure().add_subplot()
    pictures._draw_groups(axis, labels)
    canvas = axis.images[0].get_array()
    legend = axis.get_legend()
    colours = [tuple(round(255 * x) for x in patch.get_facecolor()[:3]) for patch in legend.get_patches()]
    assert [text.get_text() for text in legend.get_texts()] == [*(f"group {i}" for i in range(1, 5)), "in no group"]
    shots = FILM.films[0].shots
    for shot, row, col in product(range(12), range(4), range(6)):
        left = sum(s.frames * 7 + 1 for s in shots[shot // 6 * 6 : shot])
        for frame in range(shots[shot].frames):
            token = (FILM.shot == shot) & (FILM.shot_frame == frame) & (FILM.row == row) & (FILM.col == col)
            pixel = tuple(canvas[shot // 6 * 8 + row, left + 7 * frame + col])
            assert pixel == pytest.approx(colours[int(labels[token])], abs=1)
    numbers = [text.get_text() for text in axis.texts]
    assert numbers == [f"shot {i}" for i in range(12)]


def test_runs_get_a_picture_of_each_routed_branch(tmp_path: Path) -> None:
    call = pictures.simulated()
    layers = []
    for method, settings in (
        ("moc", {"causal": None}),
        ("window", {"tile": [1, 2, 2], "window": [1, 1, 1]}),
        ("moga", {}),
        ("svg", {}),  # a branch of two routed parts, spatial heads and temporal ones
    ):
        torch.manual_seed(0)
        attention = zoo.build(method, heads=HEADS, head_dim=16, dim=16, **settings).eval()
        layers.append(diagnose(call, attention.run(call).plans))
    written = save_picks(layers, tmp_path)
    assert [entry["label"] for entry in written] == [
        "layer 1, picks by shot, loops 9 <-> 11",
        "layer 3, picks by shot",
        "layer 4, picks by shot",
    ]
    assert len({entry["file"] for entry in written}) == 3
    assert len([one for one in layers[3] if one.routing is not None]) == 2
    assert all((tmp_path / entry["file"]).is_file() for entry in written)


@pytest.mark.slow
def test_plans_over_pooled_tokens_are_counted_and_not_plotted(tmp_path: Path) -> None:
    """The compressed branch of nsa is its first: 592 queries × 9 means of blocks."""
    drawn = sample_map("nsa", {"top_k": 1})
    rows = drawn.to_json()["branches"]
    assert rows[0]["density"] == pytest.approx(9 / len(FILM))
    assert "mass" not in rows[0]
    assert image.imread(drawn.save(tmp_path / "nsa.png")).std() > 0
    written = save_plans([drawn.result], tmp_path)
    assert [entry["label"] for entry in written] == ["layer 1, branch 2", "layer 1, branch 3"]


def test_loops_in_words() -> None:
    assert pictures.loop_text([9, 11]) == "9 <-> 11"
    assert pictures.loop_text([3, 5, 8]) == "3 -> 5 -> 8 -> 3"


def test_no_label_overprints_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loops and more beside the title of their matrix."""
    figures = []
    monkeypatch.setattr(pictures, "_write", lambda figure, path: figures.append(figure) or path)
    monkeypatch.setattr(pictures, "loops", lambda counts: [(0, 1), (2, 3, 4), (5, 6, 7, 8), (9, 11)][: len(counts)])
    pictures.sample_map("moc", {"causal": None}).save(tmp_path / "map.png")
    (figure,) = figures
    figure.draw_without_rendering()
    for axis in figure.axes:
        titles = [one for one in (axis.title, axis._left_title, axis._right_title) if one.get_text().strip()]
        lines = [(one, one.get_text().strip("\n").count("\n") + 1, one.get_text().count("\n") + 1) for one in titles]
        boxes = []
        for one, shown, every in lines:  # blank lines at the end of a title are room for the other one
            box = one.get_window_extent()
            blank = box.height * (every - shown) / every
            boxes.append((box.x0, box.y0 + blank, box.x1, box.y1))
        for i, a in enumerate(boxes):
            for b in boxes[i + 1 :]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] + 1 or b[3] <= a[1] + 1, (a, b)
