import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_zoo import Layout, Part, Partition, Plan, Shot, ZooError
from sparse_zoo.plan import named
from sparse_zoo.remember import on_device

LENGTH = 23


def random_partition(draw: st.DrawFn, batch: int, heads: int, length: int) -> Partition:
    count = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    kind = draw(st.sampled_from(["shared", "each", "singles", "contiguous"]))
    if kind == "singles":
        return Partition.singles(length)
    if kind == "contiguous":
        return Partition.from_labels(torch.randint(0, count, (length,), generator=generator).sort().values, count)
    shape = (1, 1, length) if kind == "shared" else (batch, heads, length)
    return Partition.from_labels(torch.randint(-1, count, shape, generator=generator), count)


@st.composite
def plans(draw: st.DrawFn, batch: int = 2, heads: int = 2, q_length: int = LENGTH, k_length: int = LENGTH) -> Plan:
    """One part: any partitions, any edges, as a table or as indices with gaps."""
    queries, keys = random_partition(draw, batch, heads, q_length), random_partition(draw, batch, heads, k_length)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), queries.count, keys.count)
    table = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    if draw(st.booleans()):
        return Plan(Part(queries, keys, table))
    scores = torch.rand(shape, generator=generator).masked_fill(~table, -1)
    best, index = scores.sort(dim=-1, descending=True)
    return Plan(Part(queries, keys, index.masked_fill(best < 0, -1)[..., : draw(st.integers(1, keys.count))].int()))


@given(plans(), plans(), plans())
@settings(max_examples=60, deadline=None)
def test_union_is_exact_and_holds_each_pair_once(a: Plan, b: Plan, c: Plan) -> None:
    union = (a | b | c).validate()
    masks = [plan.dense_mask().expand(2, 2, -1, -1) for plan in (a, b, c)]
    want = masks[0] | masks[1] | masks[2]
    held = sum(part.mask().expand(2, 2, -1, -1).int() for part in union.parts)
    assert isinstance(held, torch.Tensor)
    assert torch.equal(held, want.int())
    assert torch.equal(union.pairs.expand(2, 2), want.sum((-1, -2)))


@given(plans())
@settings(max_examples=40, deadline=None)
def test_narrow_keep_and_pairs_follow_the_mask(plan: Plan) -> None:
    mask = plan.dense_mask()
    rows = torch.tensor([7, 0, 22, 7 + 1])
    assert torch.equal(plan.narrow(rows).dense_mask(), mask[:, :, rows])
    where = torch.arange(LENGTH) % 3 == 0
    assert torch.equal(plan.keep(where).dense_mask(), mask & where[:, None])
    assert torch.equal(plan.pairs, mask.sum((-1, -2)))


def test_makers() -> None:
    film = Layout.pack([Layout.film([Shot(1, 2, 2, 1)]), Layout.film([Shot(2, 1, 2)])])
    same = film.sample[:, None] == film.sample
    assert torch.equal(Plan.dense(film).dense_mask()[0, 0], same)
    labels = torch.tensor([0, 1, -1, 1, 0, 2, 2, 0, -1])
    alike = (labels[:, None] == labels) & (labels >= 0)
    assert torch.equal(Plan.groups(labels).dense_mask()[0, 0], alike)
    keys = torch.tensor([1, 1, 0, -1])
    assert torch.equal(Plan.groups(labels, keys).dense_mask()[0, 0], (labels[:, None] == keys) & (keys >= 0))
    chunks = film.chunks("frame")
    chosen = torch.randint(0, chunks.count, (2, 3, len(film), 1))
    want = (chunks.piece_of[0, 0] == chosen).expand(2, 3, -1, -1)
    assert torch.equal(Plan.routed(chunks, chosen).dense_mask(), want)
    wanted = torch.rand(chunks.count, chunks.count) < 0.5
    piece = chunks.piece_of[0, 0]
    assert torch.equal(Plan.blocks(chunks, chunks, wanted).dense_mask()[0, 0], wanted[piece][:, piece])


def test_cost_counts_pairs_against_the_samples() -> None:
    film = Layout.pack([Layout.film([Shot(1, 2, 2)]), Layout.film([Shot(2, 1, 1)])])
    cost = Plan.dense(film).cost(8, batch=2, heads=3)
    assert (cost.pairs, cost.density, cost.flops, cost.flops_backward) == (6 * 20, 1.0, 4 * 120 * 8, 10 * 120 * 8)
    pieces = film.chunks("frame")
    half = Plan.within(pieces).cost(8)
    assert (half.pairs, half.density) == (16 + 1 + 1, 18 / 20)
    assert (half + half).density == half.density


def test_validate_names_every_fault() -> None:
    film = Layout.film([Shot(2, 2, 2)])
    chunks = film.chunks("frame")
    twice = torch.zeros(1, 1, 8, 2, dtype=torch.int64)
    with pytest.raises(ZooError, match="names a key piece twice"):
        Plan.routed(chunks, twice).validate()
    with pytest.raises(ZooError, match=r"edges 5 … 5; allowed are -1 … 1"):
        Plan.routed(chunks, torch.full((1, 1, 8, 1), 5)).validate()
    own = Plan.within(chunks)
    with pytest.raises(ZooError, match="parts 0 and 1 hold 32 pairs both"):
        Plan(*Plan.dense(film).parts, *own.parts).validate()


def test_parts_that_do_not_fit_are_refused() -> None:
    film = Layout.film([Shot(2, 2, 2)])
    chunks = film.chunks("frame")
    with pytest.raises(ZooError, match="table of edges is for 3 key pieces, there are 2"):
        Plan.blocks(chunks, chunks, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ZooError, match="different lengths"):
        Plan(*Plan.within(chunks).parts, *Plan.groups(torch.zeros(3, dtype=torch.int64)).parts)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=30, deadline=None)
def test_means_of_pieces(data: st.DataObject) -> None:
    pieces = random_partition(data.draw, 2, 3, LENGTH)
    x = torch.randn(2, 3, LENGTH, 4, dtype=torch.float64, requires_grad=True)
    member = pieces.piece_of.expand(2, 3, -1)[:, :, None] == torch.arange(pieces.count)[:, None]
    weight = member.double() / member.sum(-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(pieces.mean(x), weight @ x, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(pieces.mean, x)


def test_union_with_empty_pieces_beside_cut_ones() -> None:
    """An empty piece and one cut in two leave as many pieces as there were; trailing empty pieces have no children."""
    ends = torch.tensor([0, 0, 1, 1])
    first_half = Plan.blocks(
        Partition.from_labels(ends, 2), Partition.from_labels(ends, 2), torch.tensor([[True, False], [False, False]])
    )
    for label in (0, 1):  # the empty piece comes after, or before
        pieces = Partition.from_labels(torch.full((4,), label), 2)
        for edges in (torch.ones(1, 1, 2, 2, dtype=torch.bool), torch.tensor([[[[0, 1], [1, 0]]]])):
            union = first_half | Plan(Part(pieces, pieces, edges))
            held = sum(part.mask().int() for part in union.parts)
            assert isinstance(held, torch.Tensor)
            assert torch.equal(held[0, 0], torch.ones(4, 4, dtype=torch.int32))
            assert int(union.pairs) == 16


def test_pairs_of_a_table_of_many_rows() -> None:
    """They are counted some rows at a time."""
    keys = Partition.from_labels(torch.tensor([0, 1, 1, 2, 2, 2]), 3)
    plan = Plan.routed(keys, torch.rand(2, 1, 2500, 3) < 0.3)
    assert torch.equal(plan.pairs, plan.dense_mask().sum((2, 3)))


def test_pickles_hold_no_caches() -> None:
    """A kernel may cache what no pickle takes, and copies on devices would be written too."""
    plan = Plan.dense(Layout.film([Shot(2, 3, 4)] * 2))
    alone = pickle.dumps(plan)
    on_device(plan, torch.device("meta"))
    plan.parts[0].__dict__["_blocks"] = {(1, 1): lambda: 0}
    assert plan.parts[0].queries.is_singles is False
    assert pickle.dumps(plan) == alone
    again = pickle.loads(alone)
    assert torch.equal(again.dense_mask(), plan.dense_mask())
    assert copy.deepcopy(plan).parts[0].__dict__.keys() == {"queries", "keys", "edges", "routed", "log_weight"}
    del plan.parts[0].__dict__["_blocks"]


def test_a_row_with_more_entries_than_promised_is_refused() -> None:
    table = torch.tensor([[True, False, True], [False, False, False]])
    assert named(table, 2).tolist() == [[0, 2], [-1, -1]]
    with pytest.raises(ZooError, match="a row keeps 2 entries; at most 1 were promised"):
        named(table, 1)
