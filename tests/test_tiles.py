"""Sliding tiles, radial bands and both Sparse VideoGens: what each pays for, counted by hand or done slowly."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiers import cases
from torch import Tensor

import sparse_zoo as zoo
from sparse_zoo.attention import Branch, Call
from sparse_zoo.cost import Cost
from sparse_zoo.kmeans import kmeans
from sparse_zoo.methods.svg import SVG, _sampled
from sparse_zoo.methods.svg2 import SVG2
from sparse_zoo.testing import slow
from sparse_zoo.testing.slow_tiles import lloyd, radial_keys
from sparse_zoo.testing.subject import PACKED, STORY, Subject, make

FAMILY = ("sta", "radial", "svg", "svg2")


@pytest.mark.parametrize("method", FAMILY)
def test_every_method_of_the_family_has_a_card(method: str) -> None:
    card = zoo.get(method).card
    assert card is not None
    assert all((card.paper, card.granularity, card.trained, card.claim))
    assert all(setting.doc for setting in zoo.settings(method).values())


@pytest.mark.parametrize(
    ("method", "settings", "reasons"),
    [
        ("sta", {"tile": (1, 2), "window": (2, 3, 3)}, ["tile must be three", "three odd whole numbers", "(2, 3, 3)"]),
        ("sta", {"window": [(3, 3, 3), (1, 1, 4)]}, ["or a list of such"]),
        ("sta", {"window": []}, ["three odd whole numbers"]),
        (
            "radial",
            {"decay": 0.0, "block_tokens": 0},
            ["the authors use 0.2 to 1), got 0.0", "block_tokens must be", "got 0"],
        ),
        ("radial", {"decay": float("inf")}, ["finite"]),
        ("svg", {"width": -1, "rows": 0}, ["width must be a whole number of at least 0", "rows must be"]),
        (
            "svg2",
            {"top_p": 0.0, "least": 1.5},
            ["top_p must be in (0, 1], got 0.0", "least must be in [0, 1]"],
        ),
        ("svg2", {"query_clusters": 0, "key_clusters": 1.5}, ["query_clusters must", "key_clusters must"]),
        ("svg2", {"first_rounds": 0, "later_rounds": 0}, ["first_rounds must", "later_rounds must"]),
    ],
)
def test_bad_settings_are_refused_with_all_reasons(method: str, settings: dict[str, Any], reasons: list[str]) -> None:
    with pytest.raises(zoo.ZooError) as error:
        zoo.build(method, heads=2, head_dim=4, **settings)
    for reason in reasons:
        assert reason in str(error.value)


def test_queries_of_a_part_of_the_stream_are_refused_where_all_are_needed() -> None:
    call = make(STORY)
    some = replace(call, q=call.q[:, :, :3], q_rows=torch.arange(3))
    for method in ("svg", "svg2"):
        with pytest.raises(zoo.ZooError, match="it needs all of them"):
            Subject(method, zoo.get(method)).build().run(some)


def mask_of(attention: zoo.Attention, call: Call) -> Tensor:
    (branch,) = attention.branches(call)
    assert isinstance(branch, Branch)
    return branch.plan.validate().dense_mask()


# -- sta --------------------------------------------------------------------------------------------------------------


def test_heads_take_the_windows_in_turn_by_their_place_in_the_layer() -> None:
    windows = [(3, 1, 3), (1, 3, 1), (1, 1, 1)]
    sta = zoo.build("sta", heads=7, head_dim=8, tile=(2, 2, 1), window=windows)
    call = make(STORY, heads=4, kv_heads=2, head_offset=2)
    got = mask_of(sta, call)
    for head, number in enumerate((2, 0, 1, 2)):
        alone = zoo.build("window", heads=1, head_dim=8, tile=(2, 2, 1), window=windows[number])
        assert torch.equal(got[0, head], mask_of(alone, make(STORY))[0, 0])


def test_windows_of_a_line_of_tiles_are_as_counted_by_hand() -> None:
    film = zoo.Layout.film([zoo.Shot(5, 1, 2)])
    sta = zoo.build("sta", heads=2, head_dim=8, tile=(1, 1, 2), window=[(3, 1, 1), (1, 1, 1)])
    frames = [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    want = torch.zeros(5, 5, dtype=torch.bool)
    for frame, kept in enumerate(frames):
        want[frame, kept] = True
    got = mask_of(sta, make(film, heads=2, kv_heads=2))
    assert torch.equal(got[0, 0], want.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert got[0, 1].sum() == 5 * 2 * 2


def test_one_window_for_all_heads_is_kept_once() -> None:
    for window in ((3, 1, 3), [(3, 1, 3)], [(3, 1, 3)] * 2):
        sta = zoo.build("sta", heads=4, head_dim=8, tile=(2, 2, 1), window=window)
        assert sta.own_heads is None
        assert mask_of(sta, make(STORY)).shape[:2] == (1, 1)


def test_a_schedule_of_windows_tells_that_heads_differ() -> None:
    changes = {"window": {5: [(1, 1, 1), (3, 3, 3)]}}
    scheduled = zoo.build("sta", heads=2, head_dim=8, schedule=changes)
    assert scheduled.own_heads is not None


# -- radial -----------------------------------------------------------------------------------------------------------


def test_frames_of_one_block_thin_out_at_powers_of_two() -> None:
    film = zoo.Layout.film([zoo.Shot(19, 2, 2)])
    radial = zoo.build("radial", heads=1, head_dim=8, block_tokens=4)
    mask = mask_of(radial, make(film))[0, 0]
    kept = mask.view(19, 4, 19, 4)
    assert torch.equal(kept.any(3).any(1), kept.all(3).all(1))
    # Frames of 4 tokens: widths 8/2, 8/4, 8/8, 8/16 in bands 1, 2-3, 4-7, 8-15, blocks of 4: every 1st, 2nd, 4th, 8th.
    for frame in range(19):
        near = {0} | {frame + sign * d for d in (0, 1, 2, 4, 8, 16) for sign in (1, -1)}
        assert set(kept[frame, 0, :, 0].nonzero()[:, 0].tolist()) == {f for f in near if 0 <= f < 19}


RADIAL_FILMS = {
    "story": STORY,
    "packed": PACKED,
    "unequal frames": zoo.Layout.film([zoo.Shot(4, 3, 5, 1), zoo.Shot(5, 4, 7), zoo.Shot(4, 2, 3, 2)]),
    "large frames": zoo.Layout.film([zoo.Shot(6, 6, 6)]),
}


@pytest.mark.parametrize(("decay", "block_tokens"), [(1.0, 4), (0.3, 3), (2.5, 7), (0.15, 1)])
@pytest.mark.parametrize("film", cases(RADIAL_FILMS, ["packed"]))
def test_blocks_are_those_of_the_mask_of_tokens(film: str, decay: float, block_tokens: int) -> None:
    layout = RADIAL_FILMS[film]
    radial = zoo.build("radial", heads=1, head_dim=8, decay=decay, block_tokens=block_tokens)
    want = slow.as_mask(radial_keys(layout, block_tokens, decay))
    assert torch.equal(mask_of(radial, make(layout))[0, 0], want)


def test_a_block_attends_to_itself_where_its_mask_is_thin() -> None:
    film = zoo.Layout.film([zoo.Shot(24, 1, 1)])
    radial = zoo.build("radial", heads=1, head_dim=8, block_tokens=12)
    mask = mask_of(radial, make(film))[0, 0]  # each token sees 3 of 12 in its own block, less than a third
    assert mask[12:, 12:].all()
    assert not mask[12:, :12].any()


def test_slices_of_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = RADIAL_FILMS["unequal frames"]
    radial = zoo.build("radial", heads=1, head_dim=8, decay=0.31, block_tokens=3)
    whole = mask_of(radial, make(layout))
    monkeypatch.setattr("sparse_zoo.blocks.SLICE", 1000)
    sliced = zoo.build("radial", heads=1, head_dim=8, decay=0.31000001, block_tokens=3)  # nothing remembered for it
    assert torch.equal(mask_of(sliced, make(layout)), whole)


def test_pairs_grow_as_n_log_n() -> None:
    radial = zoo.build("radial", heads=1, head_dim=8, block_tokens=16)

    def pairs(frames: int) -> int:
        film = zoo.Layout.film([zoo.Shot(frames, 4, 4)])
        return int(radial.plan(torch.empty(0), torch.empty(0), film).pairs.sum())

    few, many, more = pairs(64), pairs(128), pairs(256)
    assert many < 2.4 * few
    assert more < 2.4 * many  # 4 times where all attend to all


# -- svg --------------------------------------------------------------------------------------------------------------

FILM = zoo.Layout.film([zoo.Shot(6, 3, 4, 2)], caption=1)


def leaning(layout: zoo.Layout) -> Call:
    """Two heads: queries and keys of one frame agree in the first, those of one place in the second."""
    draw = torch.Generator().manual_seed(4)
    q, k, v = (0.1 * torch.randn(1, 2, len(layout), 16, generator=draw) for _ in range(3))
    place = layout.row * layout.cols + layout.col
    for head, at in enumerate((layout.frame, place)):
        names = 3 * torch.randn(int(at.max()) + 1, 16, generator=draw)
        video = ~layout.is_text
        q[0, head, video] += names[at[video]]
        k[0, head, video] += names[at[video]]
        v[0, head, video] += names[at[video]]
    return Call(q, k, v, layout)


def test_heads_take_the_mask_that_loses_less() -> None:
    svg = zoo.build("svg", heads=2, head_dim=16, width=0)
    mask = mask_of(svg, leaning(FILM))[0]
    frame, place = FILM.frame, FILM.row * FILM.cols + FILM.col
    always = FILM.is_text | FILM.is_text[:, None] | (frame == 0)
    assert torch.equal(mask[0], always | (frame[:, None] == frame))
    # 12 places in 6 groups, as many as there are frames: pairs of places.
    assert torch.equal(mask[1], always | (place[:, None] // 2 == place // 2))


def test_both_kinds_of_head_cost_alike() -> None:
    film = zoo.Layout.film([zoo.Shot(12, 6, 6)])
    svg = zoo.build("svg", heads=2, head_dim=16, width=2)
    spatial, temporal = mask_of(svg, leaning(film))[0].sum((-1, -2)).tolist()
    assert spatial == temporal


def test_each_film_and_batch_item_has_its_own_kinds_of_heads() -> None:
    packed, call = zoo.Layout.pack([FILM, FILM]), leaning(FILM)
    turned = replace(call, q=call.q.flip(1), k=call.k.flip(1), v=call.v.flip(1))

    def together(name: str) -> Tensor:
        pair = getattr(call, name), getattr(turned, name)
        return torch.cat([torch.cat(pair, 2), torch.cat(pair[::-1], 2)])

    svg = zoo.build("svg", heads=2, head_dim=16, width=0)
    assert isinstance(svg, SVG)
    temporal = svg._temporal(Call(together("q"), together("k"), together("v"), packed))
    assert temporal.tolist() == [[[False, True], [True, False]], [[True, False], [False, True]]]  # (B, H, films)


def test_a_tie_makes_a_spatial_head() -> None:
    svg, call = zoo.build("svg", heads=2, head_dim=16), leaning(FILM)
    assert isinstance(svg, SVG)
    assert not svg._temporal(replace(call, v=torch.zeros_like(call.v))).any()


def test_samples_are_spread_evenly_over_the_video() -> None:
    assert _sampled(FILM, 0, 4).tolist() == [3 + 9, 3 + 27, 3 + 45, 3 + 63]  # 3 of text, then 72
    assert _sampled(FILM, 0, 1000).tolist() == list(range(3, 75))


def test_slices_of_samples_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    svg, call = Subject("svg", SVG).build(), make(PACKED)
    whole = mask_of(svg, call)
    monkeypatch.setattr("sparse_zoo.blocks.SLICE", 1)
    assert torch.equal(mask_of(svg, call), whole)


def test_sampling_is_counted() -> None:
    svg, call = zoo.build("svg", heads=4, head_dim=8, rows=5), make(PACKED)
    lengths = [len(film) for film in PACKED.films]
    assert svg.run(call).cost().routing_flops == 2 * 4 * 5 * sum(lengths) * (2 * 8 + 3 * 2 * 8)


# -- svg2 -------------------------------------------------------------------------------------------------------------


def svg2(**settings: Any) -> SVG2:
    attention = Subject("svg2", SVG2).build(settings)
    assert isinstance(attention, SVG2)
    return attention


def test_k_means_equals_lloyds_algorithm() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 40, 5, generator=draw)
    tokens = torch.arange(3, 40)
    labels, centroids = kmeans(x, tokens, x[:, :, tokens[(2 * torch.arange(6) + 1) * 37 // 12]], 4)
    for item in range(2):
        for head in range(3):
            found = lloyd(x[item, head].double(), tokens.tolist(), 6, 4)
            for number, (centre, members) in enumerate(found):
                assert tokens[labels[item, head] == number].tolist() == members
                torch.testing.assert_close(centroids[item, head, number].double(), centre)


def test_slices_of_tokens_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mask_of(svg2(), make(PACKED))
    monkeypatch.setattr("sparse_zoo.kmeans.SCORES", 1)
    assert torch.equal(mask_of(svg2(), make(PACKED)), whole)


def test_rounds_that_would_change_nothing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x, tokens = torch.randn(2, 3, 40, 4), torch.arange(40)
    start = x[:, :, ::4].clone()
    start[0, 0, 0] = 9.0  # nobody's
    centroids, labels, moved = start, torch.tensor(-1), []
    for _ in range(30):
        before, (labels, centroids) = labels, kmeans(x, tokens, centroids, 1)
        moved.append(not torch.equal(labels, before))
    assert 2 < sum(moved) < 20
    rounds, equal = [], torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: rounds.append(1) or equal(a, b))
    found = kmeans(x, tokens, start, 30)
    assert len(rounds) == sum(moved) + 1
    assert equal(found[0], labels)
    assert equal(found[1], centroids)


def test_an_empty_cluster_stays_and_is_never_chosen() -> None:
    x = torch.zeros(1, 1, 4, 2)
    labels, centroids = kmeans(x, torch.arange(4), torch.tensor([[[[1.0, 0.0], [0.1, 0.0], [5.0, 5.0]]]]), 3)
    assert labels.tolist() == [[[1, 1, 1, 1]]]
    assert centroids[0, 0].tolist() == [[1.0, 0.0], [0.0, 0.0], [5.0, 5.0]]
    call = make(STORY)
    call.k.zero_()  # all keys in the first cluster
    (branch,) = svg2(top_p=0.99, least=1.0).branches(call)
    assert isinstance(branch, Branch)
    part = branch.plan.parts[0]
    assert part.edges[..., 0].all()
    assert not part.edges[..., 1:].any()


def test_chosen_clusters_hold_the_requested_share_of_attention() -> None:
    film, draw = zoo.Layout.film([zoo.Shot(6, 8, 8)]), torch.Generator().manual_seed(1)
    about = 2 * torch.randn(16, 8, generator=draw)
    topic = torch.randint(16, (len(film),), generator=draw)
    q, k = (about[topic] + 0.2 * torch.randn(1, 2, len(film), 8, generator=draw) for _ in range(2))
    call = Call(q, k, k, film)
    weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
    for top_p in (0.5, 0.8, 0.95):
        mask = mask_of(svg2(top_p=top_p, least=0.0, query_clusters=32, key_clusters=48, first_rounds=10), call)
        held = float((weights * mask).sum(-1).mean())
        assert held > top_p - 0.02
        assert float(mask.double().mean()) < 0.5


def test_the_least_share_of_clusters_is_chosen_in_any_case() -> None:
    call = make(zoo.Layout.film([zoo.Shot(4, 5, 5)]))
    (branch,) = svg2(top_p=1e-9, least=0.5, key_clusters=9).branches(call)
    assert isinstance(branch, Branch)
    assert set(branch.plan.parts[0].edges.sum(-1).flatten().tolist()) == {4}
    (branch,) = svg2(top_p=1e-9, least=0.0, key_clusters=9).branches(call)
    assert isinstance(branch, Branch)
    assert set(branch.plan.parts[0].edges.sum(-1).flatten().tolist()) == {1}


def steps(count: int, **context: Any) -> list[Call]:
    """Calls that drift as those of noise steps do."""
    call = make(PACKED, **context)
    return [
        replace(call, q=call.q + 0.1 * n * call.q.flip(2), k=call.k - 0.1 * n * call.k.flip(2)) for n in range(count)
    ]


def test_memory_is_all_that_is_kept_between_steps() -> None:
    first, second = steps(2)
    attention, memory = svg2(), dict[Any, Any]()
    fresh = mask_of(attention, first)
    assert torch.equal(mask_of(attention, replace(first, memory=memory)), fresh)
    held = copy.deepcopy(memory)
    warm = mask_of(attention, replace(second, memory=memory))
    # The same memory gives the same, in another module too; what it holds moves on.
    assert torch.equal(mask_of(svg2(), replace(second, memory=copy.deepcopy(held))), warm)
    assert not torch.equal(mask_of(attention, replace(second, memory=memory)), warm)
    # One later round from kept centroids is not three from the start, and without memory nothing is remembered.
    assert not torch.equal(mask_of(attention, second), warm)
    assert torch.equal(mask_of(attention, first), fresh)


def test_a_step_starts_from_the_centroids_of_the_one_before() -> None:
    first, second = steps(2)
    memory = dict[Any, Any]()
    svg2(first_rounds=3).branches(replace(first, memory=memory))
    on = mask_of(svg2(later_rounds=2), replace(second, memory=memory))
    (name, kept) = next(iter(memory.items()))
    assert name[0] == "svg2"
    slowly = []
    for item in range(2):
        for head in range(4):
            x, film = second.q[item, head].float().double(), PACKED.films[0]
            video = [i for i in range(len(film)) if not PACKED.is_text[i]]
            centres, _ = zip(*lloyd(first.q[item, head].float().double(), video, 4, 3), strict=True)
            for _ in range(2):
                near = (x[video][:, None] - torch.stack(centres)).square().sum(-1).argmin(-1)
                centres = tuple(
                    x[video][near == n].mean(0) if (near == n).any() else centre for n, centre in enumerate(centres)
                )
            slowly.append(torch.stack(centres))
    torch.testing.assert_close(kept.queries[0].double(), torch.stack(slowly).unflatten(0, (2, 4)))
    assert kept.rounds == 2
    assert on.shape[:2] == (2, 4)


def test_layers_heads_films_and_batches_do_not_meet_in_the_memory() -> None:
    first, second = steps(2)
    attention, memory = svg2(), dict[Any, Any]()

    def heads(call: Call, offset: int) -> Call:
        kv = slice(offset // 2, offset // 2 + 1)
        own = slice(offset, offset + 2)
        return replace(call, q=call.q[:, own], k=call.k[:, kv], v=call.v[:, kv], head_offset=offset)

    apart = [replace(first, layer=1), heads(first, 0), heads(first, 2)]
    apart.append(replace(first, q=first.q[:1], k=first.k[:1], v=first.v[:1], hidden=None))
    other = make(STORY)
    want: dict[int, dict[Any, Any]] = {}
    for number, call in enumerate([first, *apart, other]):
        want[number] = {}
        attention.branches(replace(call, memory=want[number]))
        attention.branches(replace(call, memory=memory))
    assert len(memory) == len(want)
    for own in want.values():
        ((name, kept),) = own.items()
        for mine, alone in zip(memory[name].keys, kept.keys, strict=True):
            assert torch.equal(mine, alone)
    # Heads in two shards go on as all heads do together.
    whole = mask_of(attention, replace(second, memory=memory))
    for offset in (0, 2):
        got = mask_of(attention, replace(heads(second, offset), memory=memory))
        assert torch.equal(got, whole[:, offset : offset + 2])


def test_rounds_that_ran_are_counted() -> None:
    (call,) = steps(1, batch=1)
    attention = svg2(first_rounds=5, later_rounds=2, query_clusters=4, key_clusters=7)
    films = [sum(not t for t in PACKED.is_text[PACKED.sample == n]) for n in (0, 1)]

    def flops(rounds: int) -> int:
        rows = sum(int(n) for n in films)
        return 8 * (4 * rounds * rows * (4 * 4 + 2 * 7) + 2 * 2 * 4 * 4 * 7)

    memory = dict[Any, Any]()

    def cost() -> Cost:
        return attention.run(replace(call, memory=memory)).cost()

    assert attention.run(call).cost().routing_flops == cost().routing_flops == flops(5)
    assert cost().routing_flops == flops(2)
