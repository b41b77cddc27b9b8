"""Every preset on ShotWorld runs, each of its cells, and asks what its file says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import sparse_zoo as zoo
from experiments.config.resolve import load
from experiments.config.yaml12 import read_yaml
from experiments.execution.progress import Bar
from experiments.execution.scheduler import execute
from experiments.reporting.report import build_report
from experiments.sweep.expand import SWEEPS, Sweep, find, read
from experiments.tracking.store import Cell
from sparse_zoo import testing

ON_FILM = ("quickstart", "zoo_film")
PRESETS = sorted(path.stem for path in SWEEPS.glob("*.yaml") if path.stem not in ON_FILM)
TINY = {
    "trainer.max_steps": 2,
    "model.depth": 1,
    "data.batch_size": 2,
    "data.films_per_epoch": 4,
    "data.val_films": 2,
    "data.test_films": 2,
    "sampling.steps": 1,
    "trainer.log_every_n_steps": 1,
}
UNTRAINED = {"init_from": None}  # to read a sweep whose models begin with those of another one


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


def once(sweep: Sweep) -> Sweep:
    """The sweep with one seed."""
    return replace(sweep, cells=tuple(cell for cell in sweep.cells if cell.config["seed"] == 0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "moc_causal" else pytest.mark.slow) for name in PRESETS]
)
def test_every_cell_of_every_preset_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: str
) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    if "init_from" in read_yaml(find(name)).get("base", {}):
        before = read(find("benchmark_dense"), [TINY])  # of every seed: the sweep is read whole
        execute(before, Bar(Console(quiet=True), len(before.cells)))
    sweep = once(read(find(name), [TINY]))
    results = execute(sweep, Bar(Console(quiet=True), len(sweep.cells)))
    assert {result.name: result.reason for result in results if result.status != "finished"} == {}
    for result in results:
        assert result.steps == 2
        assert result.density is not None
        assert "identity_recall" in result.metrics
        assert "cross_shot_consistency" in result.metrics
        for outcomes in ("identity_recall", "whole_identity_recall"):
            assert len(result.films[outcomes]) == TINY["data.test_films"]  # each film of the test, once
        assert result.chance["identity_recall"] == 1 / (48 if name.startswith("benchmark") else 192)
    assert {group.name for group in build_report(sweep.name).sweep.groups} == {cell.group for cell in sweep.cells}
    assert all(cell.config["trainer"]["accelerator"] == "cpu" for cell in sweep.cells)
    densities = {round(result.density or 0, 6) for result in results}
    assert len(densities) > 1 or name in ("moc_causal", "moga_balance", "benchmark_dense")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_gpu_size_and_says_what_it_asks(name: str) -> None:
    plain = read_yaml(find(name))
    assert "on one core" in plain["about"]
    large = read(find(name), [{"match": None} | UNTRAINED], size="gpu")
    assert large.name == f"{name}-gpu"
    if "init_from" in plain.get("base", {}):
        assert plain["sizes"]["gpu"]["init_from"] == "benchmark_dense-gpu/dense-s${seed}"
    for cell in large.cells:
        assert cell.config["trainer"]["accelerator"] == "gpu"
        assert cell.config["model"]["dim"] == (128 if name.startswith("benchmark") else 256)
        # Captions that read video would carry identities from shot to shot, past any attention.
        attention, beside = cell.config["attention"], cell.config["model"].get("text") == "cross"
        assert beside or attention.get("text_reads") == "text" or attention["name"] == "own_shot"


@pytest.mark.parametrize("name", ["zoo", "zoo_film"])
def test_the_zoo_preset_has_every_method(name: str) -> None:
    cells = once(read(find(name), [{"match": None}])).cells
    own = {name for name in zoo.names() if zoo.get(name).__module__.startswith("sparse_zoo.methods.")}
    assert {cell.config["attention"]["name"] for cell in cells} - {"own_shot", "random_shots"} == own


def test_motion_is_judged_where_branches_differ() -> None:
    assert all(cell.config["data"]["frames_per_shot"] >= 4 for cell in read(find("moga_branches")).cells)


@pytest.mark.filterwarnings("ignore")
def test_aligned_and_fixed_chunks_are_compared_at_one_density() -> None:
    densities = {cell.group: _density(cell) for cell in once(read(find("moc_aligned_fixed"))).cells}
    for name, density in densities.items():
        assert density == pytest.approx(densities["aligned"], rel=0.02), name
    assert densities["aligned"] < 0.65 * _density(Cell("dense", load([{"attention": "dense"}, *_films()])))


@pytest.mark.parametrize("name", ["benchmark", "benchmark_scratch"])
def test_methods_of_the_benchmark_attend_to_one_share_of_the_pairs(name: str) -> None:
    """As written and as tried: not `holocine`, whose rule leaves no choice, nor `moga`, which learns to balance."""
    film = zoo.Layout.film([zoo.Shot(2, 3, 3)] * 28)
    loaded = read(find(name), [UNTRAINED])
    cells = (*(loaded.trials.sweep.cells if loaded.trials else ()), *loaded.cells)
    seen = set()
    for cell in cells:
        own = {key: value for key, value in cell.config["attention"].items() if key != "kernel"}
        if own["name"] in ("holocine", "moga") or repr(own) in seen:
            continue
        seen.add(repr(own))
        torch.manual_seed(0)
        attention = zoo.build(**own, heads=2, head_dim=16, dim=32)
        q, k, v = torch.randn(3, 2, 2, len(film), 16)
        density = attention(q, k, v, film, hidden=torch.randn(2, len(film), 32)).cost().density
        assert density == pytest.approx(0.107, rel=0.06), own
        blind = own.get("chunk_tokens", own.get("block_tokens"))
        if blind is not None:  # else what ends at shots and what does not would be the same
            assert 18 % blind, own
    assert len(seen) == (10 if name == "benchmark" else 5)


def test_the_own_shot_is_all_that_the_null_sees() -> None:
    zoo.load_plugin(SWEEPS.parent / "tools" / "baselines.py")
    layout = zoo.Layout.pack(
        [
            zoo.Layout.film([zoo.Shot(2, 2, 1, 3), zoo.Shot(1, 2, 2)], caption=2),
            zoo.Layout.film([zoo.Shot(1, 2, 2, 1)]),
        ]
    )
    x = torch.randn(1, 2, len(layout), 8)
    mask = zoo.build("own_shot", heads=2, head_dim=8).plan(x, x, layout).dense_mask()
    same = (layout.sample[:, None] == layout.sample) & (layout.shot[:, None] == layout.shot)
    assert torch.equal(mask.expand(1, 2, -1, -1), same.expand(1, 2, -1, -1))


@pytest.mark.parametrize("each", ["shot", "token"])
@pytest.mark.parametrize("shots", [0, 1, 9])
def test_random_shots_are_whole_of_the_film_and_fixed_for_it(shots: int, each: str) -> None:
    zoo.load_plugin(SWEEPS.parent / "tools" / "baselines.py")
    film = zoo.Layout.film([zoo.Shot(1, 2, 2, 1)] * 5)
    layout = zoo.Layout.pack([film, zoo.Layout.film([zoo.Shot(1, 2, 1)] * 2)])
    attention = zoo.build("random_shots", heads=2, head_dim=8, shots=shots, each=each)
    x = torch.randn(1, 2, len(layout), 8)
    numbers = torch.stack([layout.sample, layout.shot]).unique(dim=1, return_inverse=True)[1]

    def seen(**context: int) -> torch.Tensor:
        """The share of each shot that each token sees, (heads, tokens, shots)."""
        mask = attention(x, x, x, layout, **context).plans[0].dense_mask().expand(1, 2, -1, -1)[0]
        assert not mask[:, layout.sample[:, None] != layout.sample].any()
        return torch.zeros(2, len(layout), 7).index_add_(2, numbers, mask.float()) / numbers.bincount()

    drawn = seen(seed=3)
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}  # shots are seen whole or not at all
    assert drawn.gather(2, numbers[None, :, None].expand(2, -1, 1)).all()
    others = torch.where(layout.sample == 0, 4, 1).clamp(max=shots)
    assert torch.equal(drawn.sum(-1) - 1, others.expand(2, -1).float())
    assert torch.equal(drawn, seen(seed=3, step=7))
    if shots != 1:
        return
    assert any(not torch.equal(drawn, seen(seed=seed)) for seed in range(4, 9))
    first, second = (layout.shot == 0) & (layout.sample == 0), (layout.shot == 1) & (layout.sample == 0)
    alike = [
        torch.equal(drawn, seen(seed=3, layer=1)),
        torch.equal(drawn[0], drawn[1]),
        bool((drawn[:, first] == drawn[:, first][:, :1]).all()),
        bool((drawn[:, second] == drawn[:, second][:, :1]).all()),
    ]
    assert alike == [each == "shot"] * 4


@pytest.mark.parametrize("each", ["shot", "token"])
def test_random_shots_of_a_film_are_alike_packed_and_alone(each: str) -> None:
    zoo.load_plugin(SWEEPS.parent / "tools" / "baselines.py")
    films = [zoo.Layout.film([zoo.Shot(1, 2, 2, 1)] * 6, caption=1), zoo.Layout.film([zoo.Shot(1, 2, 1)] * 7)]
    attention = zoo.build("random_shots", heads=2, head_dim=8, each=each)

    def mask(layout: zoo.Layout) -> torch.Tensor:
        x = torch.zeros(1, 2, len(layout), 8)
        return attention(x, x, x, layout, seed=3).plans[0].dense_mask().expand(1, 2, -1, -1)

    packed = mask(zoo.Layout.pack(films))
    first = len(films[0])
    assert torch.equal(packed[..., :first, :first], mask(films[0]))
    assert torch.equal(packed[..., first:, first:], mask(films[1]))


@pytest.mark.slow
def test_the_baselines_conform() -> None:
    zoo.load_plugin(SWEEPS.parent / "tools" / "baselines.py")
    testing.check_method("own_shot")
    for each in ("shot", "token"):
        testing.check_method(
            "random_shots", each=each, known_failures={"eval_draws_nothing": "a seed stands for films"}
        )


ROUTED = {"name": "moc", "chunk": "frame", "top_k": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [("last_shots", {}), ("shot_summary", {}), ("pooled_memory", {}), ("frozen_router", {"of": ROUTED})],
)
def test_recurrence_compression_and_frozen_routers_conform(name: str, settings: dict[str, Any]) -> None:
    zoo.load_plugin(SWEEPS.parent / "tools" / "baselines.py")
    testing.check_method(name, **settings)


def _films() -> list[dict[str, object]]:
    plain = read_yaml(find("recall"))["base"]
    return [{key: plain[key] for key in ("data", "data.frames_per_shot", "model")}]


def _density(cell: Cell) -> float:
    """Measured from the plans of one training step."""
    from experiments.config.datamodule import build
    from lit_modules import RectifiedFlow, VideoDiT
    from lit_modules.flow import generator

    data = build(cell.config["data"])
    shape = {"channels": data.channels, "patch": data.patch, "vocabulary": data.vocabulary}
    torch.manual_seed(0)
    model = VideoDiT(**cell.config["model"], **shape, attention=cell.config["attention"])  # type: ignore[arg-type]
    batch = next(iter(data.train_dataloader()))
    results = RectifiedFlow().training_loss(model, batch, generator("density"), step=0, seed=0).output.results
    costs = [result.cost() for result in results]
    return sum(cost.density for cost in costs) / len(costs)
