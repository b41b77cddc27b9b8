"""The names that users, plug-ins and other projects call: each exists, and is called as the documentation writes it."""

from __future__ import annotations

import inspect

import pytest
import torch

import sparse_zoo as zoo
from sparse_zoo import testing

TOP = [
    "names",
    "settings",
    "kernels",
    "build",
    "attend",
    "merge",
    "register",
    "Attention",
    "Call",
    "Branch",
    "Term",
    "Plan",
    "Layout",
    "Shot",
    "Limit",
    "Knob",
    "Card",
    "Kernel",
    "register_kernel",
    "load_plugin",
    "Scheduled",
    "attach",
]
FILM = zoo.Layout.film([zoo.Shot(frames=2, rows=2, cols=3, text=2), zoo.Shot(frames=1, rows=3, cols=3)], caption=1)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four query heads share two key heads."""
    return random(1, 4, len(FILM), 8), random(1, 2, len(FILM), 8), random(1, 2, len(FILM), 8)


@pytest.mark.parametrize("name", TOP)
def test_package_offers_each_public_name(name: str) -> None:
    assert hasattr(zoo, name)
    assert name in zoo.__all__


@pytest.mark.parametrize("name", ["check_method", "check_kernel", "parametrize_methods", "slow_routing"])
def test_testing_package_offers_each_public_name(name: str) -> None:
    assert callable(getattr(testing, name))
    assert name in testing.__all__


def test_catalogue_lists_methods_their_settings_and_kernels() -> None:
    assert {"dense", "moc", "moc_fixed", "moga", "window"} <= set(zoo.names())
    assert {"top_k", "chunk", "anchors", "causal", "drop_off", "drop_in", "text_reads"} <= set(zoo.settings("moc"))
    reasons = zoo.kernels()
    assert {"reference", "cpu", "torch", "flash_attn", "xformers", "flex", "triton"} <= set(reasons)
    assert reasons["reference"] == []


def test_method_is_built_called_and_reports_its_result(qkv: tuple[torch.Tensor, ...]) -> None:
    q, k, v = qkv
    attn = zoo.build(
        "moc", heads=4, head_dim=8, dim=6, top_k=1, chunk="frame",
        anchors=("text", "shot"), causal="routing", kernel="auto",
    )  # fmt: skip
    assert isinstance(attn, torch.nn.Module)
    result = attn(q, k, v, FILM, hidden=random(1, len(FILM), 6))
    assert result.out.shape == q.shape
    assert [type(plan) for plan in result.plans] == [zoo.Plan]
    assert dict(result.losses) == {}
    assert isinstance(result.kernel, str)
    assert 0 < result.cost().density <= 1
    assert attn.features(random(1, len(FILM), 6)) == {}
    for name in ("limits", "causality", "may_be_empty", "knob", "anchors", "strict", "pools_queries", "own_heads"):
        assert hasattr(type(attn), name), name
    assert {"pairs", "density", "flops", "flops_backward", "routing_flops"} <= set(dir(result.cost()))


def test_plan_is_drawn_costed_and_validated(qkv: tuple[torch.Tensor, ...]) -> None:
    q, k, _ = qkv
    plan = zoo.build("moc", heads=4, head_dim=8, dim=6, top_k=1).plan(q, k, FILM)
    assert plan.dense_mask().shape[-2:] == (len(FILM), len(FILM))
    cost = plan.cost(8)
    assert plan.executed("reference") >= cost.pairs
    assert plan.validate() is plan


def test_plans_are_attended_and_merged_exactly(qkv: tuple[torch.Tensor, ...]) -> None:
    q, k, v = qkv
    plan = zoo.Plan.dense(FILM)
    whole = zoo.attend(q, k, v, plan, kernel="auto", scale=None)
    assert (whole.out.shape, whole.lse.shape, whole.lse.dtype) == (q.shape, q.shape[:3], torch.float32)
    assert isinstance(whole.kernel, str)
    early = torch.arange(len(FILM)) < 5
    parts = [zoo.attend(q, k, v, zoo.Plan.groups(FILM.sample, FILM.sample.where(x, -1))) for x in (early, ~early)]
    merged = zoo.merge([part.out for part in parts], [part.lse for part in parts])
    out, lse = merged[0], merged[1]
    torch.testing.assert_close(out, whole.out)
    torch.testing.assert_close(lse, whole.lse)


def test_plan_makers_join_to_a_union() -> None:
    shots = FILM.chunks("shot", captions="inside")
    chosen = torch.zeros(1, 1, len(FILM), 1, dtype=torch.int64)
    wanted = torch.eye(shots.count, dtype=torch.bool)
    made = [
        zoo.Plan.dense(FILM),
        zoo.Plan.within(shots),
        zoo.Plan.groups(FILM.sample),
        zoo.Plan.routed(shots, chosen),
        zoo.Plan.blocks(shots, shots, wanted),
    ]
    for a in made:
        for b in made:
            assert torch.equal((a | b).dense_mask(), a.dense_mask() | b.dense_mask())


def test_layout_says_what_each_token_is() -> None:
    packed = zoo.Layout.pack([FILM, FILM])
    for name in ("sample", "shot", "frame", "row", "col", "is_text"):
        assert getattr(packed, name).shape == (2 * len(FILM),), name
    assert FILM.shot.tolist() == [-1] + [0] * 14 + [1] * 9
    assert FILM.is_text.tolist() == [True] * 3 + [False] * 12 + [False] * 9
    assert (FILM.frame[FILM.is_text] == -1).all()
    assert packed.sample.tolist() == [0] * len(FILM) + [1] * len(FILM)


def test_class_declares_what_plug_ins_override() -> None:
    for name in ("plan", "branches", "losses", "features", "routing_flops"):
        assert callable(getattr(zoo.Attention, name)), name
    assert list(inspect.signature(zoo.Attention.plan).parameters) == ["self", "q", "k", "layout"]
    assert list(inspect.signature(zoo.Attention.branches).parameters) == ["self", "call"]
    assert {"q", "k", "v", "layout", "hidden", "features", "q_rows", "seed", "step", "layer", "layers", "noise"} <= set(
        inspect.signature(zoo.Call).parameters
    )
    assert {"plan", "weight"} <= set(inspect.signature(zoo.Branch).parameters)
