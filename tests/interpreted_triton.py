"""The kernels of `triton` in Triton's interpreter, on the CPU; test_triton.py runs this with TRITON_INTERPRET=1."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FILMS
from torch import Tensor
from triton.runtime import interpreter

import sparse_zoo as zoo
from experiments.tools.gpu import checks
from experiments.tools.gpu.stage import Run
from sparse_zoo import routing, testing
from sparse_zoo.kernels import get
from sparse_zoo.kernels.triton import cudnn as varlen
from sparse_zoo.kernels.triton import dense, device, union
from sparse_zoo.kernels.triton import routing as fused
from sparse_zoo.testing import kernels as kernel_checks
from sparse_zoo.testing import oracle

# numpy speaks of what a GPU does in silence: log(0), and numbers in rows that are never stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _patch_the_language_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter patches triton.language again at every call of a device function, which is half its time."""
    patch, patched = interpreter._patch_lang, set[int]()

    class Scope:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def restore(self) -> None:
            patched.clear()
            self.inner.restore()

    def once(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return None
        patched.add(id(fn.__globals__))
        return Scope(patch(fn))

    monkeypatch.setattr(interpreter, "_patch_lang", once)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite at a size that the interpreter can run: it takes milliseconds a step."""
    for name, value in {"BATCH": 1, "HEADS": 2, "SEEDED": 3, "DRAWN": 4}.items():
        monkeypatch.setattr(kernel_checks, name, value)


# 66,560 programs, or plans of hundreds of tokens, would take minutes; that grids have one dimension is tested below.
SLOW = ("kernel_many_rectangles", "kernel_large_plans")


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("check", [name for name in testing.kernel_checks() if name not in SLOW])
def test_conforms(check: str) -> None:
    (outcome,) = testing.check_kernel("triton", only=[check])
    assert outcome.status == "passed", outcome


def inputs(shape: tuple[int, int, int], keys: int, kv_heads: int, dim: int = 8) -> list[Tensor]:
    batch, heads, queries = shape
    shapes = [(batch, heads, queries, dim)] + [(batch, kv_heads, keys, dim)] * 2
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def compare(plan: zoo.Plan, tensors: list[Tensor], atol: float = 3e-6, kernel: str = "triton") -> None:
    out, lse, name = zoo.attend(*tensors, plan, kernel=kernel)
    assert name == kernel
    exact = [x.detach().double().requires_grad_() for x in tensors]
    want, want_lse = oracle.masked_softmax(*exact, oracle.mask_of(plan))
    weight = torch.randn(out.shape)
    grads = torch.autograd.grad(out, tensors, weight)
    want_grads = torch.autograd.grad(want, exact, weight.double())
    torch.testing.assert_close(out.double(), want, rtol=0, atol=atol)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=atol)
    for grad, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=4 * atol)


METHODS: list[tuple[str, dict[str, Any], str]] = [
    ("moc", {"top_k": 2}, "captioned"),
    ("moc", {"top_k": 20, "causal": None}, "packed"),  # more than there are candidates
    ("moc", {"top_k": 2, "anchors": ()}, "one_frame_shots"),  # queries without keys
    ("moc", {"top_k": 1, "chunk": "shot"}, "plain"),  # no candidates
    ("moc_fixed", {"top_k": 2, "chunk_tokens": 7}, "captioned"),  # chunks cut by the anchors
    ("moga", {"groups": 3}, "packed"),
    ("window", {"tile": (2, 2, 3), "window": (1, 3, 1)}, "captioned"),
]


@pytest.mark.parametrize("anchors", ["dense", "gathered"])
@pytest.mark.parametrize(("method", "settings", "film"), METHODS, ids=str)
def test_plans_of_methods(
    method: str, settings: dict[str, Any], film: str, anchors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "PAIRS", 1 if anchors == "dense" else 1 << 30)
    layout = FILMS[film]
    q, k, v = tensors = inputs((1, 2, len(layout)), len(layout), 1)
    attention = zoo.build(method, heads=2, head_dim=8, dim=6, **settings)
    call = zoo.Call(q, k, v, layout, hidden=torch.randn(1, len(layout), 6))
    branches = [branch for branch in attention.branches(call) if isinstance(branch, zoo.Branch)]
    compare(branches[-1].plan, tensors)


@pytest.mark.parametrize("heads_of_keys", [2, 4])
def test_slabs_change_nothing(heads_of_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four query heads; own frames by the dense kernel, a chosen frame by the gather kernel.

    Where no heads share keys, the latter adds to the gradients of keys what the former put there.
    """
    monkeypatch.setattr(dense, "PAIRS", 81)
    film = zoo.Layout.film([zoo.Shot(1, 3, 3) for _ in range(3)])
    length = len(film)
    chunks = film.chunks("frame")
    plan = zoo.Plan.within(chunks) | zoo.Plan.routed(chunks, torch.randint(-1, chunks.count, (2, 4, length, 1)))
    assert dense.rectangles(plan.parts[0])
    tensors = inputs((2, 4, length), length, heads_of_keys)
    whole = zoo.attend(*tensors, plan, kernel="triton")
    grads = torch.autograd.grad(whole.out.sum(), tensors)
    monkeypatch.setattr(union, "SLAB_BYTES", 1)
    slabs = list(union._slabs(tensors[0], tensors[1], 1 << 20))
    step = 4 // heads_of_keys
    assert [(slab.items.start, slab.head.start, slab.head.stop) for slab in slabs] == [
        (item, head, head + step) for item in range(2) for head in range(0, 4, step)
    ]
    again = zoo.attend(*tensors, plan, kernel="triton")
    assert torch.equal(again.out, whole.out)
    assert torch.equal(again.lse, whole.lse)
    assert all(map(torch.equal, torch.autograd.grad(again.out.sum(), tensors), grads))
    compare(plan, tensors)


def test_keys_past_the_end_are_masked_before_the_exponential() -> None:
    """Pieces of 5 keys, scores near -200: an unmasked score of 0 is exp(200) times too heavy."""
    q, k, v = inputs((1, 2, 20), 20, 2)
    with torch.no_grad():
        q.copy_(-(8 + q.abs()))
        k.copy_(8 + k.abs())
    labels = torch.arange(20) // 5
    for plan in (
        zoo.Plan.groups(labels),
        zoo.Plan.routed(zoo.Partition.from_labels(labels, 4), labels[None, None, :, None]),
    ):
        out, _, _ = zoo.attend(q, k, v, plan, kernel="triton")
        grads = torch.autograd.grad(out.sum(), [q, k, v])
        assert all(bool(x.isfinite().all()) for x in (out, *grads))
        compare(plan, [q, k, v], atol=1e-3)


class Recorder:
    """Stands for a kernel: notes the grid it is launched in."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *_, **__: None


def test_grids_have_one_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others end at 65,535."""
    recorders = {name: Recorder() for name in ("attend", "grad_queries", "grad_keys", "merge", "add_up", "row_dots")}
    for name, recorder in recorders.items():
        monkeypatch.setattr(device, name, recorder)
    length = 70_000
    q = torch.zeros(1, 1, length, 8, requires_grad=True)
    out, _, _ = zoo.attend(q, q, q, zoo.Plan.groups(torch.arange(length)), kernel="triton")
    out.sum().backward()
    for recorder in recorders.values():
        assert [len(grid) for grid in recorder.grids] == [1]
    assert min(recorders[name].grids[0][0] for name in ("attend", "grad_queries", "grad_keys")) >= length


def test_it_runs_the_vendors_kernel_on_anchors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "PAIRS", 200)
    shapes = []
    forward = dense.forward
    monkeypatch.setattr(dense, "forward", lambda q, *rest: (shapes.append(tuple(q.shape)), forward(q, *rest))[1])
    film = zoo.Layout.film([zoo.Shot(2, 4, 4), zoo.Shot(3, 4, 4)])
    chosen = torch.zeros(1, 2, len(film), 1, dtype=torch.int64).masked_fill(film.shot[:, None] == 0, -1)
    plan = zoo.Plan.within(film.partition("shot")) | zoo.Plan.routed(film.partition("frame"), chosen)
    compare(plan, inputs((1, 2, len(film)), len(film), 2))
    assert shapes == [(1, 2, 32, 8), (1, 2, 48, 8)]


def test_half_precision_partials_err_no_more_than_eager_does() -> None:
    q, k, v = (x.detach().half() for x in inputs((1, 2, 90), 90, 2))
    labels = torch.arange(90) % 3
    plan = zoo.Plan.groups(labels) | zoo.Plan.groups(torch.arange(90) // 30)
    mask = plan.dense_mask()
    want, _ = oracle.masked_softmax(q.double(), k.double(), v.double(), mask)
    eager = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    ours = zoo.attend(q, k, v, plan, kernel="triton").out
    assert (ours.double() - want).abs().max() <= 1.5 * (eager.double() - want).abs().max()


def test_what_the_interpreter_takes() -> None:
    assert zoo.kernels()["triton"] == []
    why_not = get("triton").why_not
    q = torch.zeros(1, 1, 4, 8)
    assert why_not(q, q) == []
    assert "dtype torch.bfloat16 is not torch.float32 or torch.float16" in why_not(q.bfloat16(), q.bfloat16())[0]
    assert why_not(q[..., :6], q[..., :6]) == ["head dim 6 is not a power of two"]


@pytest.mark.parametrize(("pieces", "top_k", "apart"), [(9, 3, False), (20, 16, False), (5, 9, True)])
def test_fused_routing_chooses_the_same(pieces: int, top_k: int, apart: bool) -> None:
    """On whole numbers small enough to be exact in any order, so that ties are ties: they go to the earlier chunk."""
    length = 37
    q = torch.randint(-2, 3, (2, 4, length, 8)).float()
    k = 27_720 * torch.randint(-2, 3, (2, 2, length, 8)).float()  # divided by any number up to 12
    labels = torch.arange(2 * 2 * length if apart else length) * 7 % pieces
    chunks = zoo.Partition.from_labels(labels.view(2, 2, length) if apart else labels, pieces + 1)  # and an empty one
    legal = torch.rand(3, pieces + 1) < 0.7
    legal[2] = False
    kind = torch.randint(0, 3, (length,))
    assert int(chunks.sizes.max()) <= 12
    want = routing.top_chunks(q, k, chunks, legal, kind, top_k)
    assert torch.equal(fused.top_chunks(q, k, chunks, legal, kind, top_k), want)


def test_fused_routing_keeps_float32s_accuracy_in_half_precision() -> None:
    q, k = torch.randn(1, 2, 16, 8).half(), torch.randn(1, 2, 96, 8).half()
    chunks = zoo.Partition.from_labels(torch.arange(96) // 3, 32)
    means = k.float().view(1, 2, 32, 3, 8).mean(3)
    scores = q.double() @ means.double().transpose(-1, -2)
    got = fused.top_chunks(q, k, chunks, torch.ones(1, 32, dtype=torch.bool), torch.zeros(16, dtype=torch.int64), 16)
    ordered = scores.gather(-1, got.long())
    assert float(ordered.diff(dim=-1).max()) < 1e-6
    assert float((ordered[..., -1] - scores.sort(dim=-1, descending=True).values[..., 15]).abs().max()) < 1e-6


def routed(length: int, heads: int) -> zoo.Plan:
    """Queries that choose one or two of three ragged chunks."""
    chunks = zoo.Partition.from_labels((torch.arange(length) // 13).clamp(max=2), 3)
    return zoo.Plan.routed(
        chunks, torch.stack([torch.randint(0, 2, (1, heads, length)), torch.full((1, heads, length), 2)], -1)
    )


def strided(aligned: bool) -> list[Tensor]:
    """q, k, v of 40 tokens, 4 query heads and 2 of keys, whose rows begin at multiples of 16 bytes or do not."""
    made = inputs((1, 4, 40), 40, 2)
    if aligned:
        return made
    return [torch.randn(1, x.shape[1], 40, 9)[..., :8].detach().requires_grad_() for x in made]


@pytest.mark.parametrize("aligned", [True, False])
def test_copy_engine_reads_what_pointers_read(aligned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    plain = union.copied_blocks

    def noted(*args: Any) -> Any:
        found = plain(*args)
        taken.append(found[1])
        return found

    plan, tensors = routed(40, 4), strided(aligned)
    monkeypatch.setattr(union, "copied_blocks", noted)
    out = zoo.attend(*tensors, plan, kernel="triton").out
    grads = torch.autograd.grad(out.sum(), tensors)
    assert taken == [aligned, aligned, True]  # dk and dv read copies of q and of the gradient, which are aligned
    monkeypatch.setattr(union, "copied_blocks", lambda k, v, *_: ((k, v), False))
    again = zoo.attend(*tensors, plan, kernel="triton").out
    assert torch.equal(again, out)
    assert all(map(torch.equal, torch.autograd.grad(again.sum(), tensors), grads))
    compare(plan, tensors)


def test_copy_engine_lets_no_nan_of_the_next_chunk_in() -> None:
    """Its blocks run past the end of a ragged chunk, into rows that these queries do not attend to."""
    q, k, v = strided(True)
    labels = (torch.arange(40) // 13).clamp(max=2)
    plan = zoo.Plan.routed(zoo.Partition.from_labels(labels, 3), torch.zeros(1, 4, 40, 1, dtype=torch.int64))
    want = zoo.attend(q, k, v, plan, kernel="triton").out
    want_grads = torch.autograd.grad(want.sum(), [q, k, v])
    with torch.no_grad():
        k[:, :, 13:] = torch.nan
        v[:, :, 13:] = torch.nan
    out = zoo.attend(q, k, v, plan, kernel="triton").out
    assert torch.equal(out, want)
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), [q, k, v]), want_grads))


# -- cuDNN's variable-length attention, played by plain code ----------------------------------------------------------


class Described:
    """A tensor of a graph, with what the engine says of it."""

    def __init__(self, dim: Any = None, stride: Any = None, ragged_offset: Any = None, **_: Any) -> None:
        self.dim, self.stride, self.at = dim, stride, ragged_offset

    def set_output(self, _: bool) -> "Described":
        return self

    set_data_type = set_output

    def set_dim(self, dim: Any) -> "Described":
        self.dim = dim
        return self

    def set_stride(self, stride: Any) -> "Described":
        self.stride = stride
        return self

    def set_ragged_offset(self, at: Any) -> "Described":
        self.at = at
        return self


class PlayedGraph:
    """What the documentation of cuDNN says that its attention with ragged offsets and lengths does, in float64."""

    def __init__(self, **_: Any) -> None:
        self.tensor = Described

    def sdpa(self, **given: Any) -> list[Described]:
        self.given, self.made = given, [Described(), Described()]
        return self.made

    def sdpa_backward(self, **given: Any) -> list[Described]:
        self.given, self.made = given, [Described(), Described(), Described()]
        return self.made

    def validate(self, *_: Any) -> None:
        pass

    build_operation_graph = create_execution_plans = build_plans = validate

    def check_support(self) -> None:
        if self.given["q"].dim[2] == self.given["k"].dim[2] == 1:
            raise RuntimeError("s_q = s_kv = 1 is not supported.")

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, tensors: dict[Described, Tensor], _: Tensor, handle: Any) -> None:
        assert handle is None

        def rows(x: Described, segment: int, count: int) -> Tensor:
            """The rows of a segment, as a view."""
            assert x.dim[0] == len(queries)
            assert count <= x.dim[2]
            first = int(tensors[x.at][segment])
            assert first + (count - 1) * x.stride[2] < tensors[x].numel()
            return tensors[x].flatten().as_strided((count, x.dim[3]), (x.stride[2], 1), first)

        queries, keys = (tensors[self.given[name]] for name in ("seq_len_q", "seq_len_kv"))
        for segment, (count, length) in enumerate(zip(queries.tolist(), keys.tolist(), strict=True)):
            if not count:
                continue
            given = {
                name: rows(x, segment, length if name in "kv" else count).double()
                for name, x in self.given.items()
                if name in ("q", "k", "v", "o", "dO", "stats")
            }
            scores = given["q"] @ given["k"].T * self.given["attn_scale"]
            if len(self.made) == 2:
                lse = scores.logsumexp(-1, keepdim=True)
                results = [(scores - lse).exp() @ given["v"], lse]
            else:
                weights = (scores - given["stats"]).exp()
                delta = (given["dO"] * given["o"]).sum(-1, keepdim=True)
                inner = weights * (given["dO"] @ given["v"].T - delta) * self.given["attn_scale"]
                results = [inner @ given["k"], inner.T @ given["q"], weights.T @ given["dO"]]
            for x, found in zip(self.made, results, strict=True):
                rows(x, segment, len(found)).copy_(found)


@pytest.fixture
def _played_cudnn(monkeypatch: pytest.MonkeyPatch) -> Any:
    played = SimpleNamespace(
        __spec__=ModuleSpec("cudnn", None),
        data_type=SimpleNamespace(BFLOAT16=0, HALF=1, FLOAT=2, INT32=3),
        heur_mode=SimpleNamespace(A=0, FALLBACK=1),
        pygraph=PlayedGraph,
    )
    monkeypatch.setitem(sys.modules, "cudnn", played)
    monkeypatch.setattr(varlen, "SEGMENT", 5)  # so that lists are cut
    varlen._graph.cache_clear()
    yield
    varlen._graph.cache_clear()


@pytest.mark.usefixtures("_played_cudnn")
def test_cudnn_takes_one_query_and_chunks_of_one_token() -> None:
    chunks = zoo.Partition(None, torch.tensor([[[0, 1, 1, 2, 2, 3]]], dtype=torch.int32), 3)
    plan = zoo.Plan.routed(chunks, torch.tensor([[[[0]], [[2]]]]))
    compare(plan, inputs((1, 2, 1), 3, 2), kernel="cudnn")


@pytest.mark.usefixtures("_played_cudnn")
@pytest.mark.parametrize("heads_of_keys", [1, 2, 4])
def test_cudnn_takes_routed_parts(heads_of_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared chunks, lists of several segments, queries that chose nothing, an empty chunk, keys in no chunk, slabs."""
    monkeypatch.setattr(union, "SLAB_BYTES", 1 << 14)
    labels = (torch.arange(40) // 13).clamp(max=2) * 2  # chunks 0, 2, 4; 1 and 3 are empty
    labels[:3] = -1
    chosen = torch.randint(-1, 5, (2, 4, 40, 2))
    chosen[..., 1] = chosen[..., 1].where(chosen[..., 1] != chosen[..., 0], -1)
    chunks = zoo.Partition(None, torch.tensor([[[3, 13, 13, 26, 26, 40]]], dtype=torch.int32), 40)
    plan = zoo.Plan.routed(chunks, chosen)
    assert chunks.order is None
    assert chunks.longest == 14
    tensors = inputs((2, 4, 40), 40, heads_of_keys)
    asked = []
    plain = varlen.forward
    monkeypatch.setattr(varlen, "forward", lambda *args: (asked.append(args), plain(*args))[1])
    compare(plan, tensors, kernel="cudnn")
    assert asked
    film = zoo.Layout.film([zoo.Shot(2, 3, 3, text=2)] * 3)
    q, k, _ = tensors = inputs((1, 2, len(film)), len(film), 1)
    moc = zoo.build("moc", heads=2, head_dim=8, top_k=2, causal=None)
    compare(moc.plan(q, k, film), tensors, kernel="cudnn")


@pytest.mark.usefixtures("_played_cudnn")
@pytest.mark.parametrize("faulty", [False, True])
def test_check_on_a_gpu_finds_nan_of_chunks_with_a_rest_of_64(
    faulty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As cuDNN 9.19's dense backward has it: where a log-sum-exp is below -88 too."""
    plain = varlen.backward
    met = []

    def backward(*given: Any) -> tuple[Tensor, ...]:
        dq, dk, dv = plain(*given)
        keys = given[7].by_query.segments.diff(dim=-1)
        met.extend(keys.flatten().tolist())
        if faulty and bool((keys % 128 == 64).any()) and float(given[5].min()) < -88:
            dq[:, :, 0] = torch.nan
        return dq, dk, dv

    monkeypatch.setattr(varlen, "backward", backward)
    (row,) = checks.varlen_engine(Run(tmp_path, 600, tiny=True))
    assert row["name"] == "variable length, float32, d 16"
    assert set(met) == {192, 64, 200, 77}
    if faulty:
        assert row["reason"].startswith("chunks of 192, 64, scores near -200: dq errs by nan")
        assert row["reason"].count("chunks") == 1
    else:
        assert row["status"] == "passed", row["reason"]


# -- rectangles in batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads_of_keys", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_equal_shots_are_one_call(batch: int, heads_of_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four shots of which three are equal, captions that all read, and a chunk that is chosen."""
    monkeypatch.setattr(dense, "PAIRS", 1)
    calls = []
    forward = dense.forward
    monkeypatch.setattr(dense, "forward", lambda q, *rest: (calls.append(tuple(q.shape)), forward(q, *rest))[1])
    film = zoo.Layout.film([zoo.Shot(1, 3, 3)] + [zoo.Shot(1, 2, 3, text=2)] * 3)
    moc = zoo.build("moc", heads=2, head_dim=8, top_k=1, causal=None)
    q, k, _ = tensors = inputs((batch, 2, len(film)), len(film), heads_of_keys)
    compare(moc.plan(q, k, film), tensors)
    assert calls.count((3, 2, 8, 8)) == batch


def test_rectangles_that_share_keys_add_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen rectangles read the same half of the keys: in half precision their gradients would lose small terms."""
    monkeypatch.setattr(dense, "PAIRS", 1)
    pieces = zoo.Partition.from_labels(torch.arange(64) // 4, 16)
    halves = zoo.Partition.from_labels(torch.arange(64) // 32, 2)
    plan = zoo.Plan.blocks(pieces, halves, torch.ones(16, 2, dtype=torch.bool))
    (part,) = plan.parts
    assert dense.overlap(dense.rectangles(part) or [])
    q, k, v = (x.detach().half().requires_grad_() for x in inputs((1, 1, 64), 64, 1))
    out = zoo.attend(q, k, v, plan, kernel="triton").out
    dk, dv = torch.autograd.grad(out.float().sum(), [k, v])
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, _ = oracle.masked_softmax(*exact, oracle.mask_of(plan))
    want_dk, want_dv = torch.autograd.grad(want.sum(), exact[1:])
    for got, expected in ((dk, want_dk), (dv, want_dv)):
        assert float((got.double() - expected).abs().max()) < 1e-3 * float(want_dv.abs().max())


def test_rows_that_no_rectangle_covers_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "PAIRS", 1)
    labels = torch.tensor([0] * 10 + [-1] * 5 + [1] * 10)
    plan = zoo.Plan.groups(labels)
    assert dense.rectangles(plan.parts[0])
    tensors = inputs((1, 2, 25), 25, 2)
    got = zoo.attend(*tensors, plan, kernel="triton")
    assert bool((got.out[:, :, 10:15] == 0).all())
    assert bool((got.lse[:, :, 10:15] == -torch.inf).all())
    compare(plan, tensors)


def test_gradients_can_be_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lists that the first backward pass lets go of are made again."""
    monkeypatch.setattr(union, "KEPT", 100)
    plan, tensors = routed(40, 4), strided(True)
    out = zoo.attend(*tensors, plan, kernel="triton").out
    assert out.grad_fn.work is not None
    first = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    assert out.grad_fn.work is None
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), tensors), first))
