"""What routing did, against plain Python that counts token by token."""

import math
import re
from itertools import permutations
from pathlib import Path

import pytest
import torch
from matplotlib import image

import sparse_zoo as zoo
from sparse_zoo import Call, Layout, Partition, Plan, Shot, ZooError, diagnostics
from sparse_zoo.diagnostics import churn, diagnose, loops, trapped

STORY = Layout.film([Shot(2, 2, 3, 2), Shot(1, 3, 2), Shot(3, 2, 2, 1), Shot(1, 1, 1, 1)], caption=2)
PACKED = Layout.pack([STORY, Layout.film([Shot(1, 2, 2, 1), Shot(2, 1, 3), Shot(1, 2, 2)])])
BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 6


def call_on(layout: Layout, seed: int = 0, rows: torch.Tensor | None = None) -> Call:
    draws = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(BATCH, heads, len(layout), 8, generator=draws, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    hidden = torch.randn(BATCH, len(layout), DIM, generator=draws, dtype=torch.float64)
    return Call(q if rows is None else q[:, :, rows], k, v, layout, q_rows=rows, hidden=hidden)


def method(name: str, **settings: object) -> zoo.Attention:
    torch.manual_seed(1)
    return zoo.build(name, heads=HEADS, head_dim=8, dim=DIM, **settings).eval().double()


METHODS = {
    "moc": ("moc", {"top_k": 2}),
    "moc, any chunk": ("moc", {"top_k": 3, "causal": None}),
    "moc, no anchors": ("moc", {"top_k": 2, "anchors": (), "causal": None}),
    "moc_fixed, cut at anchors": ("moc_fixed", {"top_k": 2, "chunk_tokens": 5}),
    "moga": ("moga", {"groups": 3, "mix": ("group",)}),
}


def plan_of(case: str, call: Call) -> Plan:
    """The plans of methods, and parts of kinds that no method here has."""
    if case in METHODS:
        name, settings = METHODS[case]
        branch = method(name, **settings).branches(call)[0]
        assert isinstance(branch, zoo.Branch)
        return branch.plan
    draws = torch.Generator().manual_seed(5)
    layout, lq = call.layout, call.q.shape[2]
    tokens = torch.arange(len(layout)) if call.q_rows is None else call.q_rows
    shots, frames = layout.partition("shot"), layout.chunks("frame")
    if case == "table of blocks":
        wanted = torch.rand(1, HEADS, shots.count, frames.count, generator=draws) < 0.4
        wanted &= shots.sample[:, None] == frames.sample
        return Plan.blocks(shots.narrow(tokens), frames, wanted, routed=True)
    if case == "table of tokens, beside own shot":
        chosen = torch.rand(BATCH, 1, lq, frames.count, generator=draws) < 0.3
        chosen &= layout.sample[tokens][:, None] == frames.sample
        return Plan.within(shots).narrow(tokens) | Plan.routed(frames, chosen)
    assert case == "groups of each head, some in none"
    labels = torch.randint(-1, 3, (BATCH, HEADS, len(layout)), generator=draws)
    labels = torch.where(labels < 0, -1, labels + 4 * layout.sample)
    return Plan.groups(labels[:, :, tokens], labels, count=4 * len(layout.films), routed=True)


CASES = [*METHODS, "table of blocks", "table of tokens, beside own shot", "groups of each head, some in none"]


def slow(call: Call, plan: Plan, batch: int, head: int, rows: list[int]) -> dict[str, object]:
    """Every figure of one batch item and head, from dense masks and lists."""
    layout = call.layout
    (part,) = [part for part in plan.parts if part.routed]
    lq, lk = plan.shape
    mask = plan.dense_mask().expand(BATCH, HEADS, -1, -1)[batch, head].tolist()
    taken = part.mask().expand(BATCH, HEADS, -1, -1)[batch, head].tolist()
    piece_of = part.keys.piece_of.expand(BATCH, HEADS, -1)[batch, head].tolist()
    pieces = [[j for j in range(lk) if piece_of[j] == c] for c in range(part.keys.count)]
    token = list(range(lq)) if call.q_rows is None else call.q_rows.tolist()
    sample, shot, frame = layout.sample.tolist(), layout.shot.tolist(), layout.frame.tolist()
    picks = [(i, c) for i in range(lq) for c, held in enumerate(pieces) if held and all(taken[i][j] for j in held)]

    q, k = call.q[batch, head].tolist(), call.k[batch, head // (HEADS // KV_HEADS)].tolist()
    sums = {"mass": 0.0, "mass_best": 0.0, "mass_best_pieces": 0.0, "mass_random_pieces": 0.0}
    could = set()
    for i in rows:
        scores = [sum(a * b for a, b in zip(q[i], key, strict=True)) / math.sqrt(8) for key in k]
        odds = [math.exp(s) if sample[j] == sample[token[i]] else 0.0 for j, s in enumerate(scores)]
        p = [x / sum(odds) for x in odds]
        rest = [mask[i][j] and not taken[i][j] for j in range(lk)]
        given = sum(p[j] for j in range(lk) if rest[j])
        free = [[j for j in held if not rest[j] and sample[j] == sample[token[i]]] for held in pieces]
        could |= {c for c, held in enumerate(free) if held}
        worth = sorted((sum(p[j] for j in held) for held in free if held), reverse=True)
        budget = sum(1 for a, _ in picks if a == i)
        sums["mass"] += sum(p[j] for j in range(lk) if mask[i][j])
        sums["mass_best"] += sum(sorted(p, reverse=True)[: sum(mask[i])])
        sums["mass_best_pieces"] += given + sum(worth[:budget])
        sums["mass_random_pieces"] += given + (sum(worth) / len(worth) * budget if worth else 0)

    load = [sum(1 for _, b in picks if b == c) for c in range(len(pieces))]
    counted = {c for c, held in enumerate(pieces) if not held or c in could or load[c]}
    entropy = -sum(x / sum(load) * math.log(x / sum(load)) for x in load if x) / math.log(len(counted))
    firsts = [sum(len(film.shots) for film in layout.films[:f]) for f in range(len(layout.films))]
    through = [-1 if shot[j] < 0 else firsts[sample[j]] + shot[j] for j in range(lk)]
    number = sum(len(film.shots) for film in layout.films)
    shots = [[0.0] * number for _ in range(number)]
    frames = []
    for i, c in picks:
        for j in pieces[c]:
            if through[token[i]] >= 0 and through[j] >= 0:
                shots[through[token[i]]][through[j]] += 1 / len(pieces[c])
            if frame[token[i]] >= 0 and frame[j] >= 0:
                frames.append((abs(frame[token[i]] - frame[j]), 1 / len(pieces[c])))
    apart = [(abs(a - b), shots[a][b]) for a in range(number) for b in range(number)]
    return {
        **{name: total / len(rows) for name, total in sums.items()},
        "load": load,
        "shots": shots,
        "load_entropy": entropy,
        "starved": sum(1 for c in counted if not load[c]) / len(counted),
        "distance_shots": sum(d * w for d, w in apart) / sum(w for _, w in apart),
        "distance_frames": sum(d * w for d, w in frames) / sum(w for _, w in frames),
    }


@pytest.mark.parametrize("rows", [None, torch.tensor([30, 3, 45, 8, 50, 21])], ids=["all queries", "some queries"])
@pytest.mark.parametrize("case", CASES)
def test_every_figure_is_the_slow_one(case: str, rows: torch.Tensor | None) -> None:
    call = call_on(PACKED, rows=rows)
    plan = plan_of(case, call).validate()
    (found,) = diagnose(call, [plan])
    assert found.routing is not None
    figures = {**found.by_head(), "load": found.routing.load, "shots": found.routing.shots}
    for batch in range(BATCH):
        for head in (0, HEADS - 1):
            want = slow(call, plan, batch, head, list(range(plan.shape[0])))
            for name, value in want.items():
                got = figures[name][batch, head].double()
                torch.testing.assert_close(got, torch.tensor(value).double(), rtol=1e-6, atol=1e-9, msg=name)


def test_sampled_queries_are_the_middles_of_equal_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_on(STORY)
    plan = plan_of("moc, any chunk", call)
    length = len(STORY)
    for rows, block in ((5, diagnostics.BLOCK), (5, 1), (1, 1)):  # in one go, query by query, one alone
        middles = [int((n + 0.5) * length / rows) for n in range(rows)]
        want = slow(call, plan, 1, 2, middles)
        monkeypatch.setattr(diagnostics, "BLOCK", block)
        figures = diagnose(call, [plan], rows=rows)[0].by_head()
        for name in ("mass", "mass_best", "mass_best_pieces", "mass_random_pieces", "starved", "load_entropy"):
            assert float(figures[name][1, 2]) == pytest.approx(want[name], abs=1e-9), name


def test_no_choice_beats_the_best_and_dense_holds_all() -> None:
    call = call_on(PACKED)
    for case in CASES:
        (found,) = diagnose(call, [plan_of(case, call)])
        figures = found.by_head()
        assert (figures["mass"] <= figures["mass_best_pieces"] + 1e-9).all(), case
        assert (figures["mass"] <= figures["mass_best"] + 1e-9).all(), case
    (dense,) = diagnose(call, [Plan.dense(PACKED)])
    assert dense.routing is None
    assert dense.scalars() == pytest.approx({"mass": 1.0, "mass_best": 1.0})


def test_half_precision_is_widened() -> None:
    call = call_on(STORY)
    plan = plan_of("moc", call)
    half = Call(call.q.bfloat16(), call.k.bfloat16(), call.v.bfloat16(), STORY)
    (found,) = diagnose(half, [plan])
    assert found.mass.dtype == torch.float32
    assert found.scalars() == pytest.approx(diagnose(call, [plan])[0].scalars(), rel=0.05)


@pytest.mark.parametrize("case", CASES)
def test_churn_is_the_share_of_new_picks(case: str) -> None:
    calls = [call_on(PACKED, seed) for seed in (0, 7)]
    if case in METHODS:
        before, after = (plan_of(case, call) for call in calls)
    else:
        after = plan_of(case, calls[0])
        (part,) = [part for part in after.parts if part.routed]
        before = Plan(zoo.Part(part.queries, part.keys, part.edges.roll(1, dims=2), routed=True))
    found = churn(before, after)
    routed = [next(part for part in plan.parts if part.routed) for plan in (before, after)]
    for batch in range(BATCH):
        for head in (0, HEADS - 1):
            picked = []
            for part in routed:
                rows = part.queries.piece_of.expand(BATCH, HEADS, -1)[batch, head].tolist()
                table = part.table.expand(BATCH, HEADS, -1, -1)[batch, head].tolist()
                picked.append(
                    {(i, c) for i, row in enumerate(rows) if row >= 0 for c, on in enumerate(table[row]) if on}
                )
            want = len(picked[1] - picked[0]) / len(picked[1])
            got = float(found.expand(BATCH, HEADS)[batch, head])
            assert got == pytest.approx(want, abs=1e-6)
            assert case == "groups of each head, some in none" or want > 0
    assert churn(after, after).abs().max() < 1e-6


def test_churn_of_a_table_and_of_indices() -> None:
    chunks = STORY.chunks("frame")
    before = Plan.routed(chunks, torch.zeros(1, 1, len(STORY), 1, dtype=torch.int32))
    both = torch.zeros(1, 1, len(STORY), chunks.count, dtype=torch.bool)
    both[..., :2] = True
    assert churn(before, Plan.routed(chunks, both)).tolist() == [[0.5]]
    assert churn(Plan.routed(chunks, both), before).tolist() == [[0.0]]


def test_churn_refuses_plans_that_do_not_compare() -> None:
    call = call_on(STORY)
    frames, fixed = plan_of("moc", call), plan_of("moc_fixed, cut at anchors", call)
    with pytest.raises(ZooError, match=r"same \(queries, pieces\)"):
        churn(frames, fixed)
    with pytest.raises(ZooError, match="neither plan has a routed part"):
        churn(Plan.dense(STORY), Plan.dense(STORY))


def test_groups_that_collapse() -> None:
    """MoGA with every token in one group: load is the group sizes, empty groups starve, no entropy is left."""
    call = call_on(STORY)
    moga = method("moga", groups=4)
    assert isinstance(moga.router, torch.nn.Linear)
    with torch.no_grad():
        moga.router.weight.zero_()
        moga.router.bias.copy_(torch.tensor([0.0, 0.0, 5.0, 0.0]))
    group, stga, frame = diagnose(call, moga.run(call).plans)
    assert group.routing is not None
    assert group.routing.load[1, 3].tolist() == [0, 0, int((~STORY.is_text).sum()), 0]
    assert group.scalars()["starved"] == 0.75
    assert group.scalars()["load_entropy"] == 0
    assert stga.routing is None
    assert frame.routing is None
    assert [found.branch for found in (group, stga, frame)] == [0, 1, 2]


def test_anchored_chunks_are_not_said_to_starve() -> None:
    """Captions are given to every query by the text anchor: they are no chunks that routing left out."""
    call = call_on(STORY)
    chunks = STORY.chunks("frame")
    (found,) = diagnose(call, [plan_of("moc, any chunk", call)])
    assert found.routing is not None
    assert found.routing.counted[0, 0].tolist() == (chunks.is_text == 0).tolist()
    (bare,) = diagnose(call, [plan_of("moc, no anchors", call)])
    assert bare.routing is not None
    assert bare.routing.counted.all()


def test_nothing_to_choose_is_left_out_of_the_scalars() -> None:
    alone = Layout.film([Shot(1, 2, 2)])
    call = call_on(alone)
    (found,) = diagnose(call, [plan_of("moc", call)])
    assert {"load_entropy", "starved", "distance_shots"} & found.scalars().keys() == set()
    assert found.to_json()["load_entropy"] == [[None] * HEADS] * BATCH
    assert found.scalars()["mass"] == pytest.approx(1)


def test_plans_of_pooled_keys_are_left_out() -> None:
    call = call_on(STORY)
    pooled = Plan.groups(torch.zeros(len(STORY), dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    assert diagnose(call, [pooled, Plan.dense(STORY)])[0].branch == 1
    with pytest.raises(ZooError, match="rows must be at least 1"):
        diagnose(call, [], rows=0)


# -- which parts are routed ------------------------------------------------------------------------------------------


def test_only_what_values_chose_is_routed() -> None:
    call = call_on(PACKED)
    for name, settings, want in (
        ("dense", {}, [0]),
        ("window", {"tile": [1, 2, 2], "window": [3, 1, 1]}, [0]),
        ("moc", {}, [1]),
        ("moc_fixed", {"chunk_tokens": 5}, [1]),
        ("moga", {}, [1, 0, 0]),
    ):
        plans = method(name, **settings).run(call).plans
        assert [sum(part.routed for part in plan.parts) for plan in plans] == want, name


def test_routed_is_carried_through_what_is_made_of_a_part() -> None:
    frames, shots, own = STORY.chunks("frame"), STORY.partition("shot"), Plan.within(STORY.partition("shot"))
    fixed = STORY.chunks("fixed", tokens=5)
    labels = torch.randint(0, 3, (len(STORY),))
    made = {
        "indices": Plan.routed(fixed, torch.zeros(1, 1, len(STORY), 1, dtype=torch.int64)),
        "table": Plan.routed(fixed, torch.ones(1, 1, len(STORY), len(fixed), dtype=torch.bool)),
        "groups": Plan.groups(labels, routed=True),
        "blocks": Plan.blocks(shots, frames, torch.ones(len(shots), len(frames), dtype=torch.bool), routed=True),
    }
    rows, where = torch.tensor([3, 1, 9]), torch.arange(len(STORY)) % 2 == 0
    for name, plan in made.items():
        for after in (plan, own | plan, plan.narrow(rows), plan.keep(where), plan | own):
            assert sum(part.routed for part in after.parts) == 1, name
    assert not any(part.routed for part in (own | Plan.groups(labels) | Plan.dense(STORY)).parts)
    assert Partition.singles(3).count == 3


# -- loops -----------------------------------------------------------------------------------------------------------


def picks(size: int, **of: dict[int, float]) -> torch.Tensor:
    """A table of picks from {shot: {shot: picks}}, written as s3={4: 2.0}."""
    shots = torch.zeros(size, size)
    for name, row in of.items():
        for other, count in row.items():
            shots[int(name[1:]), other] = count
    return shots


def test_two_shots_that_choose_each_other_lose_the_others() -> None:
    """The paper's case: 9 and 11 route to each other."""
    film = picks(12, s1={0: 4}, s5={0: 3, 2: 3, 3: 3}, s9={11: 6, 3: 1, 9: 50}, s11={9: 5, 2: 2, 10: 2}, s10={0: 9})
    assert loops(film) == [[9, 11]]
    assert trapped(film, loops(film)) == [9, 11]
    assert loops(film.tril()) == []  # causal routing


def test_the_share_that_makes_an_edge() -> None:
    film = picks(4, s1={2: 5, 0: 5}, s2={1: 7, 0: 3})
    assert loops(film) == [[1, 2]]
    assert trapped(film, [[1, 2]]) == [2]  # 1 keeps half of its picks for shot 0
    assert loops(film, 0.6) == []
    assert loops(picks(3, s0={1: 4}, s1={0: 4})) == [[0, 1]]
    assert trapped(picks(3, s0={1: 4}, s1={0: 4}), [[0, 1]]) == []  # nothing came before
    assert loops(torch.zeros(3, 3)) == []
    for bad in (0.4, 1.1):
        with pytest.raises(ZooError, match="share must be in"):
            loops(film, bad)


def test_loops_are_all_elementary_cycles() -> None:
    """Against every ordering of every subset, on graphs with ties, where a shot leads to two."""
    found_any = set()
    for seed in range(40):
        draws = torch.Generator().manual_seed(seed)
        shots = torch.zeros(5, 5)
        for a in range(5):
            first, second = torch.randperm(5, generator=draws)[:2].tolist()
            shots[a, first] += 2
            shots[a, second] += 2
            shots[a, a] = 7
        edges = {
            (a, b)
            for a in range(5)
            for b in range(5)
            if a != b and shots[a, b] > 0 and 2 * shots[a, b] >= shots[a].sum() - shots[a, a]
        }
        want = [
            list(path)
            for size in range(2, 6)
            for path in permutations(range(5), size)
            if path[0] == min(path) and all((a, b) in edges for a, b in zip(path, [*path[1:], path[0]], strict=True))
        ]
        assert sorted(loops(shots)) == sorted(want)
        found_any |= {len(path) for path in want}
    assert found_any == {2, 3, 4, 5}


def test_loops_of_heads() -> None:
    """Two late shots alike: without causality each chooses the other in both heads, with it none does."""
    film = Layout.film([Shot(2, 2, 2) for _ in range(6)])
    sight = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 3, 4, 4]), 8).double()[film.shot]
    q = 4 * sight.expand(1, 2, -1, -1)
    # The first shots see nothing of theirs elsewhere: ties go to the earliest.
    for causal, want in ((None, [[[[0, 1], [4, 5]]] * 2]), ("routing", [[[], []]])):
        attention = zoo.build("moc", heads=2, head_dim=8, top_k=2, causal=causal)
        call = Call(q, q, q, film)
        (found,) = diagnose(call, attention.run(call).plans)
        assert found.routing is not None
        assert found.routing.loops() == want
        assert found.scalars()["loops"] == len(want[0][0])
        assert found.to_json()["loops_of_shots"] == want


# -- the page --------------------------------------------------------------------------------------------------------


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = Path(__file__).parent.parent / "docs"
    page = (docs / "diagnostics.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        exec(block, names)
    (found,) = names["diagnose"](names["call"], names["plans"])  # type: ignore[operator]
    told = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", page, flags=re.M))))
    assert told - {"churn_steps", "churn_times"} == found.by_head().keys()
    # The picture that the README shows is the one that the page draws.
    assert (image.imread("moc.png") == image.imread(docs / "pictures" / "moc.png")).all()
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (docs / link.partition("#")[0]).is_file(), link
