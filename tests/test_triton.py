"""The `triton` kernel without a GPU: its tables, its operators' arguments, and its kernels in Triton's interpreter.

The interpreter is chosen when Triton is imported, so what needs it is in interpreted_triton.py and runs in processes of
its own; that kernels compile for GPUs is test_triton_compile.py's.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import plans
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_zoo as zoo
from sparse_zoo import routing
from sparse_zoo.bench import PAPER_FILM, PAPER_MOC
from sparse_zoo.host_time import META, record_launches
from sparse_zoo.kernels import triton as kernel
from sparse_zoo.kernels.triton import cudnn, dense
from sparse_zoo.kernels.triton.configs import CONFIGS, INTERPRETED, choose
from sparse_zoo.kernels.triton.work import Work, work_of

HERE = Path(__file__).parent


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
@pytest.mark.slow
@pytest.mark.parametrize("which", ["test_conforms", "not test_conforms"])
def test_kernels_pass_in_the_interpreter(which: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", which, HERE / "interpreted_triton.py"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


# -- tables -----------------------------------------------------------------------------------------------------------


def pairs_of(work: Work, other: Work, item: int, head: int, rows: int, columns: int) -> Tensor:
    """How often the tiles of a table meet each (token, token of the other table): int64 (rows, columns)."""
    tokens, tiles, segments = (x.tolist() for x in of(work, item, head))
    (others,) = (x.tolist() for x in of((other.tokens,), item, head))
    met = torch.zeros(rows, columns, dtype=torch.int64)
    for first, count, low, high in tiles:
        for begin, end in segments[low:high] if count else []:
            for token in tokens[first : first + count]:
                met[token, others[begin:end]] += 1
    return met


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_tiles_meet_each_pair_once_from_both_sides(data: st.DataObject) -> None:
    plan = data.draw(plans(k_length=17)) | data.draw(plans(k_length=17))
    mask = plan.dense_mask().expand(2, 2, -1, -1)
    tiles = INTERPRETED.pieces
    for item, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        by_query, by_key = torch.zeros(23, 17, dtype=torch.int64), torch.zeros(17, 23, dtype=torch.int64)
        for part in plan.parts:
            work = work_of(part, INTERPRETED)
            if work is None:
                assert not part.mask().any()
                continue
            by_query += pairs_of(work.by_query, work.by_key, item, head, 23, 17)
            by_key += pairs_of(work.by_key, work.by_query, item, head, 17, 23)
            for table, most in ((work.by_query, tiles.attend.rows), (work.by_key, tiles.grad_keys.rows)):
                assert int(table.tiles[..., 1].max()) <= most
                assert all(x.dtype == torch.int32 for x in table)
        assert torch.equal(by_query, mask[item, head].long())
        assert torch.equal(by_key, mask[item, head].T.long())


@given(plan=plans(k_length=17))
@settings(max_examples=60, deadline=None)
def test_rows_have_one_writer_and_slots_find_them(plan: zoo.Plan) -> None:
    (part,) = plan.parts
    work = work_of(part, INTERPRETED)
    if work is None:
        return
    mask = plan.dense_mask().expand(2, 2, -1, -1)
    for item, head in ((0, 0), (1, 1)):
        by_query, by_key = of(work.by_query, item, head), of(work.by_key, item, head)
        (slots,) = of((work.slots,), item, head)
        for _, tiles, *_ in (by_query, by_key):
            assert len(set(places(tiles))) == len(places(tiles))
        keys = by_key[0][places(by_key[1])].tolist()
        assert len(set(keys)) == len(keys)
        for query, row in enumerate(slots.tolist()):
            held = [place for place in row if place >= 0]
            assert set(held) <= set(places(by_query[1]))
            assert all(int(by_query[0][place]) == query for place in held)
            assert held or not mask[item, head, query].any()
        named = slots[slots >= 0]
        assert len(named.unique()) == len(named)


def of(tables: Iterable[Tensor], item: int, head: int) -> list[Tensor]:
    """Tables of one batch item and head."""
    return [x[item if x.shape[0] > 1 else 0, head if x.shape[1] > 1 else 0] for x in tables]


def places(tiles: Tensor) -> list[int]:
    return [place for first, count, *_ in tiles.tolist() for place in range(first, first + count)]


def test_routed_lists_ascend_and_need_no_count_from_the_device() -> None:
    """On tensors without values every size has to follow from shapes."""
    chosen = torch.randint(-1, 9, (2, 3, 50, 1))
    chunks = zoo.Partition.from_labels(torch.arange(50) // 6, 9)
    work = work_of(zoo.Plan.routed(chunks, chosen).parts[0], INTERPRETED)
    assert work is not None
    for item in range(2):
        for head in range(3):
            for chunk in range(9):
                first, end = work.by_key.segments[item, head, chunk].tolist()
                want = (chosen[item, head, :, 0] == chunk).nonzero()[:, 0].tolist()
                assert work.by_query.tokens[item, head, first:end].tolist() == want
    singles = zoo.Partition.singles(50)
    assert singles.is_singles
    empty = zoo.Partition(None, chunks.offsets.to("meta"), 50)
    asked = zoo.Part(singles, empty, chosen.to("meta"))
    table = zoo.Part(empty, empty, torch.empty(1, 1, 9, 9, dtype=torch.bool, device="meta"))
    assert work_of(asked, INTERPRETED)
    assert work_of(table, INTERPRETED)


def test_executed_counts_padded_tiles() -> None:
    tile = CONFIGS[max(CONFIGS)].pieces.attend
    labels = torch.arange(3 * tile.rows) // tile.rows
    exact = zoo.Plan.groups(labels)
    assert exact.executed("triton", batch=2, heads=3) == 6 * 3 * tile.rows**2
    ragged = zoo.Plan.groups(torch.arange(2 * tile.rows + 2) // (tile.rows + 1))
    steps = -(-(tile.rows + 1) // tile.step)
    assert ragged.executed("triton", batch=1, heads=1) == 2 * 2 * steps * tile.step * tile.rows


def test_configurations_follow_the_capability() -> None:
    assert choose((8, 6), 128) == CONFIGS[(8, 0), 128]
    assert choose((9, 0), 64) == CONFIGS[(9, 0), 64]
    assert choose((10, 0), 64) == CONFIGS[(9, 0), 64]
    for config in (*CONFIGS.values(), INTERPRETED):
        for tiles in (config.routed, config.pieces):
            assert tiles.attend.rows == tiles.grad_queries.rows


# -- what it takes ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_kernel_gives_every_reason_when_it_cannot_run() -> None:
    q, v = torch.zeros(1, 1, 4, 48), torch.zeros(1, 1, 4, 16)
    reasons = "; ".join(kernel.Triton().why_not(q, v))
    for words in (
        "needs a CUDA device",
        "tensors are on cpu, not cuda",
        "dtype torch.float32 is not torch.bfloat16 or torch.float16",
        "head dim 48 is not 64 or 128",
        "head dim of v (16) differs from that of q (48)",
    ):
        assert words in reasons
    assert zoo.kernels()["triton"] == [kernel.Triton().why_not()[0]]


def test_old_devices_and_a_missing_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(kernel, "find_spec", lambda _: None)
    package, capability = kernel.Triton().why_not()
    assert "needs the package triton" in package
    assert "8.0 or newer, this device has (7, 5)" in capability
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(kernel, "find_spec", lambda _: object())
    assert kernel.Triton().why_not() == []


def test_scales_that_are_not_above_0_are_refused() -> None:
    q = torch.zeros(1, 1, 4, 64)
    with pytest.raises(zoo.ZooError, match=r"scale must be above 0, got -1\.0"):
        kernel.Triton().run(q, q, q, zoo.Plan.groups(torch.zeros(4, dtype=torch.int64)), -1.0)


def test_nothing_imports_triton_before_it_is_selected() -> None:
    code = "import sys, sparse_zoo as zoo; zoo.kernels(); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE.parent)
    assert done.stdout.strip() == "False"


def test_routing_goes_to_the_device_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 9, 8)
    chunks, kind = zoo.Partition.from_labels(torch.arange(9) // 3, 3), torch.zeros(9, dtype=torch.int64)
    legal = torch.ones(1, 3, dtype=torch.bool)
    assert not routing.fused.fits(q, chunks, 2)
    monkeypatch.setattr(routing.fused, "fits", lambda *_: True)
    monkeypatch.setattr(routing.fused, "top_chunks", lambda *given: given)
    assert routing.top_chunks(q, q, chunks, legal, kind, 2, on_device=True) == (q, q, chunks, legal, kind, 2)
    assert torch.is_tensor(routing.top_chunks(q, q, chunks, legal, kind, 2))  # not unless it is asked for
    asked: list[bool] = []

    def watched(*given: Any, on_device: bool) -> Tensor:
        asked.append(on_device)
        return top_chunks(*given)

    top_chunks = routing.top_chunks
    monkeypatch.setattr(routing, "top_chunks", watched)
    film = zoo.Layout.film([zoo.Shot(1, 2, 2)] * 3)
    for name in ("cpu", "triton"):
        attention = zoo.build("moc", heads=2, head_dim=8, kernel=name)
        attention.branches(zoo.Call(*torch.randn(3, 1, 2, 12, 8), film))
    assert asked == [False, True]


# -- dense rectangles -------------------------------------------------------------------------------------------------


def test_parts_are_sorted_into_dense_and_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    film = zoo.Layout.film([zoo.Shot(2, 4, 4, 3), zoo.Shot(3, 4, 4, 2)], caption=2)
    text = zoo.Plan.blocks(film.partition(), film.partition(where=film.is_text), torch.ones(1, 1, dtype=torch.bool))
    own = zoo.Plan.within(film.partition("shot", where=film.shot >= 0))
    plan = text | own
    monkeypatch.setattr(dense, "PAIRS", 1)
    mask = torch.zeros(len(film), len(film), dtype=torch.int64)
    for part in plan.parts:
        found = dense.rectangles(part)
        assert found
        for queries, keys, pairs in found:
            block = mask[queries][:, keys]
            assert block.numel() == pairs
            rows = torch.arange(len(film))
            mask[rows[queries][:, None], rows[keys]] += 1
    assert torch.equal(mask, plan.dense_mask()[0, 0].long())
    # The film's own rows and each shot's are slices; captions lie apart.
    (everyone,), shots = dense.rectangles(plan.parts[0]) or [], dense.rectangles(plan.parts[1]) or []
    assert everyone.queries == slice(0, len(film))
    assert isinstance(everyone.keys, Tensor)
    assert [type(keys) for _, keys, _ in shots] == [slice, slice]
    # Several key pieces of one query piece are one rectangle.
    pieces = film.partition("shot")
    joined = zoo.Plan.blocks(film.partition(), pieces, torch.ones(1, pieces.count, dtype=torch.bool))
    (rectangle,) = dense.rectangles(joined.parts[0]) or []
    assert rectangle.pairs == len(film) ** 2
    singles = zoo.Plan.routed(film.chunks("frame"), torch.zeros(1, 1, len(film), 1, dtype=torch.int64))
    heads = zoo.Plan.groups(film.shot.clamp(min=0).expand(1, 2, -1))
    for other in (singles, heads):
        assert dense.rectangles(other.parts[0]) is None
    monkeypatch.setattr(dense, "PAIRS", len(film) ** 2)
    assert dense.rectangles(own.parts[0]) is None
    monkeypatch.setattr(dense, "PAIRS", 1)
    monkeypatch.setattr(dense, "CALLS", 1)
    assert dense.rectangles(own.parts[0]) is None


@pytest.mark.parametrize("has_cudnn", [True, False])
def test_operators_take_what_they_are_given(has_cudnn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own shape functions: names, order and ranks of this version's arguments."""
    monkeypatch.setattr(dense, "cudnn", lambda: has_cudnn)
    calls: list[tuple[str, dict[str, Any], Any]] = []
    call = dense._call

    def recorded(op: Any, given: dict[str, Any]) -> Any:
        calls.append((str(op), given, call(op, given)))
        return calls[-1][2]

    monkeypatch.setattr(dense, "_call", recorded)
    q = torch.empty(2, 3, 10, 64, dtype=torch.bfloat16, device="meta")
    k = torch.empty(2, 3, 7, 64, dtype=torch.bfloat16, device="meta")
    out, lse = dense.forward(q, k, k, 0.1)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], torch.float32)
    shapes = [x.shape for x in dense.backward(out, q, k, k, out, lse, 0.1)]
    assert shapes == [q.shape, k.shape, k.shape]
    (forward, _, outs), (backward, given, _) = calls
    assert ("cudnn" in forward, "cudnn" in backward) == (has_cudnn, has_cudnn)
    assert given["logsumexp"].shape == outs[1].shape
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    dense.backward(out, q, k, k, out, lse, 0.1)
    assert "flash" in calls[-1][0]


def test_backward_gets_the_layout_of_the_forwards_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN caches plans by the strides of q, k and v alone."""
    given: dict[str, Any] = {}
    q, k = (torch.randn(1, 2, n, 8) for n in (10, 7))
    monkeypatch.setattr(dense, "_call", lambda _, arguments: given.update(arguments) or (q, k, k))
    wide = torch.randn(1, 10, 2, 9)[..., :8].transpose(1, 2)
    dense.backward(wide, q, k, k, wide, torch.randn(1, 2, 20)[:, :, ::2], 0.1)
    assert given["grad_out"].stride() == given["out"].stride() == torch.empty_like(q).stride()
    assert given["logsumexp"].is_contiguous()


def test_an_operator_of_another_version_is_refused() -> None:
    with pytest.raises(zoo.ZooError, match=r"(?s)aten::_flash_attention_forward of torch.*'max_q' is not known"):
        dense._call(torch.ops.aten._flash_attention_forward, dict.fromkeys(("query", "key", "value", "cum_seq_q")))


# -- rectangles in batches --------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2), st.booleans()), min_size=1, max_size=9),
    gap=st.integers(0, 2),
)
@settings(max_examples=80, deadline=None)
def test_batches_hold_each_rectangle_once(sizes: list[tuple[int, int, bool]], gap: int) -> None:
    """Slices of 1 to 3 queries, with keys before, at or after them, and lists of tokens among them."""
    found, first = [], 0
    for length, shift, listed in sizes:
        queries, keys = slice(first, first + length), slice(first + shift, first + shift + length + gap)
        rows = torch.arange(keys.start, keys.stop) if listed else keys
        found.append(dense.Rectangle(queries, rows, length * (length + gap)))
        first += length
    x = torch.arange(40.0)[None, None, :, None].expand(1, 2, -1, -1).contiguous()

    def rows(which: Any) -> list[list[int]]:
        return [y[0, :, 0].int().tolist() for y in dense.rows_of(x, which)]

    got = [pair for batch in dense.batches(found) for pair in zip(rows(batch.queries), rows(batch.keys), strict=True)]
    want = [(list(range(40))[q], list(range(40))[k] if isinstance(k, slice) else k.tolist()) for q, k, _ in found]
    assert sorted(got) == sorted(want)
    for batch in dense.batches(found):
        keys = [key for group in rows(batch.keys) for key in group]
        assert len(set(keys)) == len(keys)  # each has a writer of its own
    held = [key for _, keys in want for key in keys]
    assert dense.overlap(found) or len(set(held)) == len(held)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
@pytest.mark.parametrize(("shots", "calls", "backward"), [(8, 3, 2 * 4 + 2 + 2), (64, 2, 2 * 4 + 4)])
def test_anchors_are_few_calls_whatever_the_heads(shots: int, calls: int, backward: int) -> None:
    """At 180k tokens and 24 heads: own shots of two lengths or of one, and all captions.

    A backward holds a partial dq, and cuDNN's in float32: so it takes slices of heads, of a gigabyte each. The captions
    have 64 tokens more than a multiple of 128, and are cut in two.
    """
    film = {
        8: PAPER_FILM,
        64: zoo.Layout.film([zoo.Shot(2, 32, 44, text=25)] * 64),
    }[shots]
    attention = zoo.build("moc", heads=24, head_dim=128, kernel="triton", **PAPER_MOC)
    q = torch.empty(1, 24, len(film), 128, dtype=torch.bfloat16, device=META, requires_grad=True)
    with record_launches() as launches, Counting() as operators:
        attention(q, q, q, film).out.sum().backward()
    names = [launch.name for launch in launches]
    assert operators.counted["_scaled_dot_product_cudnn_attention"] == calls
    assert operators.counted["_scaled_dot_product_cudnn_attention_backward"] == backward
    assert names.count("fold") == calls


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
@pytest.mark.parametrize(("name", "copies", "heads"), [("cudnn", 1, 2), ("triton", 3, 1)])
def test_backward_lists_q_and_grad_only_for_our_kernels(
    name: str, copies: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 180k tokens: so a gigabyte holds twice as many heads where every routed part goes to cuDNN."""
    from sparse_zoo.kernels.triton import union

    monkeypatch.setattr(cudnn, "forward", lambda rows, *_: (rows, rows[..., 0]))
    monkeypatch.setattr(cudnn, "backward", lambda _, rows, k, *__: (rows, *[k[:, : rows.shape[1]]] * 2))
    monkeypatch.setattr(kernel.Cudnn, "why_not", lambda *_: [])
    found: list[list[tuple[int, ...]]] = []
    backward = union._backward

    def watched(*given: Any) -> None:
        with Counting() as operators:
            backward(*given)
        found.append(operators.empty)

    monkeypatch.setattr(union, "_backward", watched)
    attention = zoo.build("moc", heads=24, head_dim=128, kernel=name, **PAPER_MOC)
    q = torch.empty(1, 24, len(PAPER_FILM), 128, dtype=torch.bfloat16, device=META, requires_grad=True)
    with record_launches():
        attention(q, q, q, PAPER_FILM).out.sum().backward()
    rows = 5 * len(PAPER_FILM)  # a query chooses five chunks
    partial = [next(shape for shape in shapes if shape[2:] == (rows, 128)) for shapes in found]
    assert partial == [(copies, heads, rows, 128)] * (24 // heads)


def test_keys_are_cut_where_cudnn_gives_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of cuDNN's backward has 64 keys more than a multiple of 128; what is cut gives the same gradients."""
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    for keys in range(1, 400):
        found = dense.cuts(keys, backward)
        assert [x for cut in found for x in range(keys)[cut]] == list(range(keys))
        assert all((cut.stop - cut.start) % 128 != 64 for cut in found)
        assert len(found) == 1 + (keys % 128 == 64)
        assert dense.cuts(keys, None) == [slice(0, keys)]
    q, grad = (torch.randn(1, 2, 50, 16, generator=torch.Generator().manual_seed(i)) for i in range(2))
    k, v = (torch.randn(1, 2, 192, 16, generator=torch.Generator().manual_seed(i)) for i in (2, 3))
    out, lse = dense.forward(q, k, v, 0.25)
    whole = dense.backward(grad, q, k, v, out, lse, 0.25)
    cut = dense.cuts(192, backward)
    monkeypatch.setattr(dense, "cuts", lambda *_: cut)
    for one, other in zip(whole, dense.backward(grad, q, k, v, out, lse, 0.25), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_segments_are_joined_into_the_same_keys(k: int) -> None:
    """Pieces that follow each other become one segment, in tables whose rows lie one after the other."""
    draw = torch.Generator().manual_seed(k)
    starts = torch.tensor([0, 4, 9, 9, 15, 20, 28, 30], dtype=torch.int32)
    chosen = torch.stack([torch.randperm(7, generator=draw)[:k].sort().values for _ in range(6)])
    chosen[2, -1] = -1
    pieces = zoo.Partition.from_labels(torch.repeat_interleave(torch.arange(7), starts.diff()), 7)
    part = zoo.Part(zoo.Partition.from_labels(torch.arange(12) // 2, 6), pieces, chosen[None, None])
    work = work_of(part, INTERPRETED)
    assert work is not None
    assert all(x.is_contiguous() for tables in (work.by_query, work.by_key) for x in tables)
    for first, count, low, high in work.by_query.tiles[0, 0].tolist():
        met = [x for a, b in work.by_query.segments[0, 0, low:high].tolist() for x in range(a, b)]
        want = {x for i in chosen[first // 2].tolist() if i >= 0 for x in range(int(starts[i]), int(starts[i + 1]))}
        assert not count or (sorted(met) == sorted(want) and len(set(met)) == len(met))
    follow = work_of(zoo.Part(part.queries, pieces, torch.arange(3).expand(1, 1, 6, 3)), INTERPRETED)
    assert follow is not None
    assert follow.by_query.tiles[0, 0, 0, 2:].tolist() == [0, 1]  # one segment of three pieces


class Counting(TorchDispatchMode):
    """How often each operator is called, and the shapes of tensors that `torch.empty` makes."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()
        self.empty: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted[func.overloadpacket.__name__] += 1
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "empty":
            self.empty.append(tuple(out.shape))
        return out
