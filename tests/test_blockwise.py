"""MoBA, VMoBA and XAttention: by hand, against slow rules at many settings, and at the ends of their knobs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_zoo as zoo
from sparse_zoo import Layout, Shot, blocks, selectors, testing
from sparse_zoo.budgets import ONE, weights, within_budget
from sparse_zoo.testing import slow_blockwise
from sparse_zoo.testing.subject import PACKED, STORY, make

LINE = Layout.film([Shot(8, 1, 1)])


def mask(name: str, call: zoo.Call, **settings: Any) -> Tensor:
    """bool (B, H, Lq, L)"""
    attention = zoo.build(name, heads=call.q.shape[1], head_dim=call.q.shape[3], **settings)
    (branch,) = attention.branches(call)
    assert isinstance(branch, zoo.Branch)
    return branch.plan.validate().dense_mask().expand(*call.q.shape[:2], -1, -1)


def drawn(rows: list[str]) -> Tensor:
    return torch.tensor([[cell == "x" for cell in row] for row in rows])


def call_of(q: list[float], k: list[float], **context: Any) -> zoo.Call:
    """One head of one channel on eight tokens in a line."""
    x, y = (torch.tensor(values).view(1, 1, -1, 1) for values in (q, k))
    return zoo.Call(x, y, y, LINE, **context)


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_moba_takes_its_own_block_and_the_best_other_one() -> None:
    # Means of the blocks of three: 1, 0, 2.
    call = call_of([1, 1, -1, 1, -1, 1, 1, -1], [0, 1, 2, -1, 0, 1, 1, 3])
    assert torch.equal(
        mask("moba", call, top_k=2, block_tokens=3)[0, 0],
        drawn(
            [
                "xxx...xx",
                "xxx...xx",
                "xxxxxx..",
                "...xxxxx",
                "xxxxxx..",
                "...xxxxx",
                "xxx...xx",
                "...xxxxx",
            ]
        ),
    )


def test_vmoba_spends_a_heads_share_on_the_most_similar_pairs() -> None:
    # Means of the blocks of four: 0 and 1, so that similarities are 0 and q: 0 … 8 once scaled by 8.
    call = call_of([8, 1, 1, 1, 4, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1])
    settings = {"temporal": 4, "spatial": (1, 1), "spatiotemporal": (1, 1, 1)}
    own = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).bool()
    # Of 15 in all the own blocks hold 4: 8 more are needed for 0.8, that is the first query's other block.
    first = own.clone()
    first[0] = True
    second = first.clone()
    second[1] = True  # of three alike the earliest
    for share, want in ((0.26, own), (0.27, first), (0.8, first), (0.81, second)):
        assert torch.equal(mask("vmoba", call, threshold=share, **settings)[0, 0], want), share
    # By itself the first query has 8 elsewhere and 0 at home; the fifth has all that it has at home.
    alone = mask("vmoba", call, threshold=0.5, scope="query", **settings)[0, 0]
    assert alone[0].all()
    assert torch.equal(alone[4], own[4])
    # As many places as queries are for their own blocks; twice as many hold all pairs that there are.
    assert torch.equal(mask("vmoba", call, threshold=None, top_k=1, **settings)[0, 0], own)
    assert mask("vmoba", call, threshold=None, top_k=2, **settings).all()


def test_xattention_sums_antidiagonals() -> None:
    # Groups of two, blocks of four. Queries ask crosswise: the first of a group meets the second of the other's.
    call = call_of([9, 0, 9, 0, 0, 9, 0, 9], [0, 9, 0, 0, 0, 0, 9, 0])
    got = mask("xattention", call, threshold=0.5, block_tokens=4, stride=2)[0, 0]
    assert torch.equal(got, drawn(["xxxx...."] * 4 + ["....xxxx"] * 4))


def test_xattention_may_leave_out_the_own_block() -> None:
    call = call_of([9, 0, 9, 0, 0, 9, 0, 9], [0, 0, 9, 0, 0, 9, 0, 0])
    got = mask("xattention", call, threshold=0.5, block_tokens=4, stride=2)[0, 0]
    assert torch.equal(got, drawn(["....xxxx"] * 4 + ["xxxx...."] * 4))


# -- at many settings -------------------------------------------------------------------------------------------------

TILES = {"temporal": 1, "spatial": (2, 2), "spatiotemporal": (2, 1, 3)}
SETTINGS: list[tuple[str, dict[str, Any], int]] = [
    ("moba", {"top_k": 1, "block_tokens": 5}, 0),
    ("moba", {"top_k": 4, "block_tokens": 3}, 0),
    *(
        ("vmoba", {"threshold": 0.3, "scope": scope}, layer)
        for scope in ("query", "head", "global")
        for layer in (0, 2)
    ),
    *(("vmoba", {"threshold": None, "top_k": 2, "scope": scope}, 4) for scope in ("query", "head", "global")),
    ("vmoba", {"threshold": 0.5, "stop_at_shots": False}, 3),
    ("vmoba", {"threshold": 0.5, "stop_at_shots": False}, 5),
    ("xattention", {"threshold": 0.3, "block_tokens": 6, "stride": 3}, 0),
    ("xattention", {"threshold": 0.95, "block_tokens": 4, "stride": 1}, 0),
    ("xattention", {"threshold": 0.55, "block_tokens": 5, "stride": 5}, 0),
]


@pytest.mark.parametrize(("name", "settings", "layer"), SETTINGS, ids=str)
def test_plans_are_the_slow_rules(name: str, settings: dict[str, Any], layer: int) -> None:
    settings = (TILES if name == "vmoba" else {}) | settings
    rule = getattr(slow_blockwise, name)
    for tied in (False, True):
        call = make(PACKED, batch=1, heads=2, kv_heads=1, layer=layer)
        if tied:
            call.q.zero_()
        ((want, _),) = rule(zoo.build(name, heads=2, head_dim=8, **settings), call)
        assert torch.equal(mask(name, call, **settings), want.expand(1, 2, -1, -1))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("moba", {"top_k": 2, "block_tokens": 3}),
        ("vmoba", TILES),
        ("vmoba", TILES | {"scope": "global"}),
        ("vmoba", TILES | {"scope": "query"}),
        ("xattention", {"threshold": 0.5, "block_tokens": 4, "stride": 2}),
    ],
    ids=str,
)
def test_the_size_of_slices_does_not_matter(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make(STORY, layer=2)
    want = mask(name, call, **settings)
    for size in (1, 500):
        monkeypatch.setattr(blocks, "SLICE", size)
        assert torch.equal(mask(name, call, **settings), want)


# -- the ends of the knobs --------------------------------------------------------------------------------------------


def test_smallest_budget_keeps_the_own_block_and_text() -> None:
    call = make(PACKED)
    text = PACKED.is_text | PACKED.is_text[:, None]
    near = mask("moba", call, top_k=1, block_tokens=4)[0, 0] & ~text
    own = PACKED.shot_frame
    assert near.sum(-1)[~PACKED.is_text].max() == 4
    assert near.diagonal()[~PACKED.is_text].all()
    least = mask("vmoba", call, threshold=1e-9, temporal=1)[0, 0] & ~text
    same = (own == own[:, None]) & (PACKED.shot == PACKED.shot[:, None]) & (PACKED.sample == PACKED.sample[:, None])
    assert torch.equal(least, same & ~text)


def test_xattention_reads_one_block_at_least() -> None:
    call = make(LINE, batch=1)
    counts = mask("xattention", call, threshold=1e-9, block_tokens=2, stride=2).sum(-1)
    assert (counts == 2).all()


def test_text_is_read_by_all_and_reads_all() -> None:
    call = make(STORY, batch=1)
    for name in ("moba", "vmoba", "xattention"):
        got = mask(name, call)
        assert got[:, :, STORY.is_text].all()
        assert got[..., STORY.is_text].all()


def test_forced_entries_are_kept_and_spend_budget() -> None:
    row = torch.tensor([5.0, 1.0, 1.0, 3.0])
    first = torch.tensor([False, True, True, False])
    for share, want in ((0.05, first), (0.2, first), (0.3, [True, True, True, False]), (0.71, [True] * 4)):
        assert selectors.heaviest(row, share, first=first).tolist() == list(want), share


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 40, 1 << 24])
@pytest.mark.parametrize(
    "budget",
    [{"share": 0.02}, {"share": 0.5}, {"share": 0.999}, {"count": 0}, {"count": 137}, {"count": 5000}],
    ids=str,
)
def test_budget_is_spent_on_the_largest_entries(levels: int, budget: dict[str, Any]) -> None:
    """Against a sort of them all."""
    scores = (torch.rand(3, 1000) * levels).floor() - 7
    scores[2] = 0.25  # all alike
    first = torch.rand(3, 1000) < 0.05
    cuts = [1, 400, 37, 562]

    def slices() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(scores.split(cuts, -1), first.split(cuts, -1), strict=True)

    kept = list(within_budget(slices, **budget))
    assert [x.shape[-1] for x in kept] == cuts
    got = torch.cat(kept, -1)
    value = weights(scores, scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True))
    for row in range(3):
        order = sorted(range(1000), key=lambda i: (not first[row, i], -int(value[row, i]), i))
        goal = budget["share"] * int(value[row].sum()) if "share" in budget else budget["count"]
        want, spent = set(first[row].nonzero()[:, 0].tolist()), 0
        for i in order:
            if spent < goal:
                want.add(i)
            spent += int(value[row, i]) if "share" in budget else 1
        assert set(got[row].nonzero()[:, 0].tolist()) == want


def test_weights_go_from_nothing_to_one_and_are_one_where_all_are_alike() -> None:
    low, high = torch.tensor(-3.0), torch.tensor(1.0)
    assert weights(torch.tensor([-3.0, -1.0, 1.0]), low, high).tolist() == [0, ONE // 2, ONE]
    assert weights(torch.tensor([2.0, 2.0]), torch.tensor(2.0), torch.tensor(2.0)).tolist() == [ONE, ONE]


# -- what is declared and refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"scope": "query"}, {"scope": "query", "threshold": None, "top_k": 2}, {"threshold": None, "top_k": 2}],
    ids=str,
)
def test_other_settings_conform(settings: dict[str, Any]) -> None:
    testing.check_method("vmoba", only=CHECKS, **settings)


def test_over_all_heads_some_heads_are_refused_and_the_rest_conforms() -> None:
    testing.check_method("vmoba", only=CHECKS, scope="global")
    outcomes = testing.check_method("vmoba", only=["head_slices", "ranks_equal_one"], scope="global")
    why = "needs_all_heads: with scope 'global' all heads share a budget"
    assert [(outcome.status, outcome.reason) for outcome in outcomes] == [("skipped", why)] * 2
    call = make(STORY)
    attention = zoo.build("vmoba", heads=8, head_dim=8, scope="global")
    with pytest.raises(zoo.ZooError, match="scope 'global' needs all 8 heads at once, got 4"):
        attention.run(call)


CHECKS = ["some_queries", "films_packed", "batch_items_apart", "heads_permute", "shared_keys"]


@pytest.mark.parametrize(
    ("name", "settings", "reasons"),
    [
        ("moba", {"top_k": 0, "block_tokens": 1.5}, ["top_k must be a whole number", "block_tokens must be a whole"]),
        (
            "vmoba",
            {
                "threshold": 1.5,
                "top_k": 0,
                "scope": "heads",
                "temporal": 0,
                "spatial": [2],
                "spatiotemporal": [1, 2, 0],
            },
            [
                "one of threshold and top_k must be given",
                "threshold must be in (0, 1], got 1.5",
                "top_k must be a whole number",
                "unknown scope 'heads'; did you mean 'head'?",
                "temporal must be 1 whole number of",
                "spatial must be 2 whole numbers of at least 1, got (2,)",
                "spatiotemporal must be 3 whole numbers",
            ],
        ),
        ("vmoba", {"threshold": 0}, ["threshold must be in (0, 1], got 0"]),
        ("vmoba", {"threshold": None}, ["one of threshold and top_k must be given, the other null, got None and None"]),
        ("xattention", {"threshold": 0, "stride": 0}, ["threshold must be in (0, 1], got 0", "stride must be a whole"]),
        (
            "xattention",
            {"block_tokens": 100, "stride": 8},
            ["block_tokens must be a multiple of stride, got 100 and 8"],
        ),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_with_all_reasons(name: str, settings: dict[str, Any], reasons: list[str]) -> None:
    with pytest.raises(zoo.ZooError) as refused:
        zoo.build(name, heads=1, head_dim=4, **settings)
    assert [reason for reason in reasons if reason not in str(refused.value)] == []


def test_routing_is_counted() -> None:
    call = make(LINE, batch=1, heads=2, kv_heads=1, head_dim=4)

    def flops(name: str, **settings: Any) -> int:
        return zoo.build(name, heads=2, head_dim=4, **settings).routing_flops(call)

    assert flops("moba", block_tokens=3) == 2 * 2 * 4 * 8 * 3 + 4 * 8
    assert flops("vmoba", temporal=4, scope="query") == 2 * 2 * 4 * 8 * 2 + 4 * 8
    assert flops("vmoba", temporal=4) == 4 * 2 * 2 * 4 * 8 * 2 + 4 * 8
    assert flops("xattention", block_tokens=4, stride=2) == 2 * 2 * 4 * 2 * (2 * 2) ** 2
