"""Planning and attention on a GPU never make the host wait: shown on the CPU, with meta tensors in the GPU's place."""

# ruff: noqa: ARG004, ARG005 -- what is tried on the watcher takes what all take

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, Synchronises, fake_cuda, no_synchronisation
from tiers import cases
from torch import Tensor

import sparse_zoo as zoo
from lit_modules import VideoDiT
from lit_modules.callbacks import EMA
from lit_modules.flow import RectifiedFlow, generator
from sparse_zoo.bench import QUICK
from sparse_zoo.host_time import host_seconds
from sparse_zoo.remember import copy_to, on_device, origin

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are recorded, not run")

HEADS, HEAD_DIM, DIM = 4, 64, 32


def new_film(width: int) -> zoo.Layout:
    """Two films with captions and without, the first large enough for dense rectangles; new for every width."""
    first = zoo.Layout.film([zoo.Shot(3, 16, width, text=20), zoo.Shot(2, 16, width), zoo.Shot(3, 16, 16)], caption=5)
    return zoo.Layout.pack([first, zoo.Layout.film([zoo.Shot(2, 16, width)] * 2)])


def attend(method: str, film: zoo.Layout, *, rows: int | None = None, **settings: Any) -> None:
    """Two training steps on a film that no other test has: both count, the first one too."""
    attention = zoo.build(method, heads=HEADS, head_dim=HEAD_DIM, dim=DIM, kernel="triton", **settings).to(CUDA)
    length = len(film) if rows is None else rows
    with fake_cuda() as launches:
        for step in range(2):
            q, k, v = (
                torch.empty(1, HEADS, n, HEAD_DIM, dtype=torch.bfloat16, device=CUDA, requires_grad=True)
                for n in (length, len(film), len(film))
            )
            hidden = torch.empty(1, len(film), DIM, device=CUDA, requires_grad=True)
            q_rows = None if rows is None else torch.arange(len(film) - rows, len(film), device=CUDA)
            launches.clear()
            result = attention(q, k, v, film, hidden=hidden, step=step, q_rows=q_rows)
            sum(result.losses.values(), result.out.float().sum()).backward()
            assert result.kernel == "triton"
            names = {launch.name for launch in launches}
            assert names & {"merge", "fold"}
            assert q.grad is not None


@needs_triton
@pytest.mark.parametrize("method", cases(zoo.names()))
def test_training_steps_never_wait(method: str) -> None:
    attend(method, new_film(19), **QUICK.get(method, {}))


@needs_triton
@pytest.mark.parametrize("method", cases(zoo.names()))
def test_captions_that_read_text_alone_never_wait(method: str) -> None:
    attend(method, new_film(18), text_reads="text", **QUICK.get(method, {}))


@needs_triton
@pytest.mark.parametrize("method", cases(name for name in zoo.names() if not zoo.get(name).pools_queries))
def test_some_of_the_queries_never_wait(method: str) -> None:
    scope = {"scope": "query"} if method == "vmoba" else {}
    attend(method, new_film(17), rows=100, **QUICK.get(method, {}), **scope)


@needs_triton
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("moc", {"drop_off": 0.5, "drop_in": 1.0}),
        ("moc", {"causal": "strict", "anchors": ["text", "shot", "chunk"]}),
        ("moc", {"schedule": {"top_k": {0: 5, 1: 2}, "name": {1: "window"}}}),
        ("moc_fixed", {"chunk_tokens": 77, "top_k": 20}),
        ("moga", {"balance": "switch", "frames_per_group": 2}),
        ("sta", {"tile": [2, 4, 4], "window": [[3, 3, 3], [1, 1, 1]]}),
        ("vsa", {"tile": [2, 4, 4], "gates": "coarse"}),
    ],
)
def test_settings_that_change_the_plan_never_wait(method: str, settings: dict[str, Any]) -> None:
    attend(method, new_film(15), **settings)


@needs_triton
def test_the_hosts_share_is_measured_without_a_gpu() -> None:
    attention = zoo.build("moc", heads=HEADS, head_dim=HEAD_DIM, dim=DIM, kernel="triton")
    seconds = host_seconds(attention, new_film(21), HEADS, HEAD_DIM, repeats=2)
    assert seconds.keys() == {"first", "forward", "forward+backward"}
    assert min(seconds.values()) > 0


# -- the watcher itself -----------------------------------------------------------------------------------------------

HARMFUL: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "item": lambda x, n: n.sum().item(),
    "int": lambda x, n: int(n.sum()),
    "float": lambda x, n: float(x.sum()),
    "bool": lambda x, n: bool((x > 0).any()),
    "if": lambda x, n: 1 if (x > 0).any() else 2,
    "cpu": lambda x, n: x.cpu(),
    "to cpu": lambda x, n: x.to("cpu"),
    "to cpu without blocking": lambda x, n: x.to("cpu", non_blocking=True),
    "tolist": lambda x, n: n.tolist(),
    "numpy": lambda x, n: x.detach().numpy(),
    "format": lambda x, n: f"{x.sum():.3f}",
    "index of a list": lambda x, n: [1, 2, 3][n[0]],
    "slice up to a tensor": lambda x, n: x[: n[0]],
    "equal": lambda x, n: torch.equal(x, x),
    "allclose": lambda x, n: torch.allclose(x, x),
    "tensor of a list": lambda x, n: torch.tensor([1, 2], device=x.device),
    "tensor of a number": lambda x, n: torch.tensor(3.0, device=x.device),
    "as_tensor of a list": lambda x, n: torch.as_tensor([1, 2], device=x.device),
    "asarray of a list": lambda x, n: torch.asarray([1, 2], device=x.device),
    "new_tensor": lambda x, n: x.new_tensor([1, 2]),
    "list to the device": lambda x, n: torch.tensor([1, 2]).to(x.device),
    "unpinned, without blocking": lambda x, n: torch.ones(2).to(x.device, non_blocking=True),
    "copy_ from the host": lambda x, n: torch.empty_like(n).copy_(torch.ones(n.shape)),
    "list of indices": lambda x, n: x[[0, 1]],
    "indices on the host": lambda x, n: x[torch.tensor([0, 1])],
    "tensor on the host": lambda x, n: n + torch.ones(n.shape, dtype=torch.int64),
    "mask": lambda x, n: x[x > 0],
    "values under a mask": lambda x, n: n.clone().__setitem__(n > 0, torch.zeros_like(n[:1])),
    "masked_select": lambda x, n: x.masked_select(x > 0),
    "nonzero": lambda x, n: n.nonzero(),
    "where without values": lambda x, n: torch.where(n > 0),
    "argwhere": lambda x, n: torch.argwhere(n),
    "unique": lambda x, n: n.unique(),
    "unique rows": lambda x, n: torch.unique(n[:, None], dim=0),
    "unique_consecutive": lambda x, n: torch.unique_consecutive(n),
    "bincount": lambda x, n: torch.bincount(n),
    "one_hot": lambda x, n: torch.nn.functional.one_hot(n),
    "repeat_interleave": lambda x, n: n.repeat_interleave(n),
    "repeats alone": lambda x, n: torch.repeat_interleave(n),
    "arange up to a tensor": lambda x, n: torch.arange(n.sum(), device=n.device),
}


@needs_triton
@pytest.mark.parametrize("harm", HARMFUL)
@pytest.mark.parametrize("where", ["plan", "backward"])
def test_watcher_fails_when_a_method_waits(harm: str, where: str) -> None:
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            HARMFUL[harm](grad, torch.empty(8, dtype=torch.int64, device=grad.device))
            return grad

    class Toy(zoo.Attention):
        def branches(self, call: zoo.Call) -> list[zoo.Branch | zoo.Term]:
            if where == "plan":
                HARMFUL[harm](call.q, torch.empty(8, dtype=torch.int64, device=call.q.device))
                return [zoo.Branch(zoo.Plan.dense(call.layout))]
            return [zoo.Branch(zoo.Plan.dense(call.layout)), zoo.Term(Backward.apply(call.q), 0)]

    zoo.register("toy")(Toy)
    with pytest.raises(Synchronises):
        attend("toy", zoo.Layout.film([zoo.Shot(2, 4, 4)]))


def test_watcher_lets_pass_what_a_gpu_does_alone() -> None:
    x, n = torch.empty(3, 4, device=CUDA), torch.empty(3, dtype=torch.int64, device=CUDA)
    with no_synchronisation():
        x[n].masked_fill(x > 0, 0.0).index_add(0, n, x).sort(stable=True)
        n.repeat_interleave(n, output_size=7).cumsum(0)
        torch.where(x > 0, 1.0, x).add_(torch.tensor(2.0)).to(torch.bfloat16)
        x[:, 1] = 3.0
        torch.full((3,), 1.5, device=CUDA)
        copy_to(torch.ones(3), CUDA)


# -- tables that follow from a layout ---------------------------------------------------------------------------------


def test_tables_are_made_on_the_host_once_and_copied() -> None:
    film = new_film(14)
    there = film.to(CUDA)
    chunks = there.chunks("frame")
    assert chunks is there.chunks("frame")
    assert chunks.offsets.device == chunks.sizes.device == chunks.shot.device == CUDA
    found = origin(chunks)
    assert found is not None
    assert found.host is film.chunks("frame")
    # What needs values is read on the host, and said of the copy.
    assert not chunks.is_singles
    assert zoo.Partition.singles(5, CUDA).is_singles
    assert zoo.Plan.dense(there).parts[0].grouping == zoo.Plan.dense(film).parts[0].grouping


def test_copies_say_what_the_originals_say() -> None:
    """Copied from the CPU to the CPU, everything can be compared."""
    film = new_film(13)
    plan = zoo.Plan.within(film.chunks("shot")) | zoo.Plan.within(film.chunks("tokens", tokens=70))
    copy = on_device(plan, torch.device("cpu", 0))
    assert copy is not plan
    assert copy is on_device(plan, torch.device("cpu", 0))
    assert torch.equal(copy.dense_mask(), plan.dense_mask())
    assert torch.equal(copy.pairs, plan.pairs)
    for mine, theirs in zip(copy.parts, plan.parts, strict=True):
        assert torch.equal(mine.queries.piece_of, theirs.queries.piece_of)
        assert torch.equal(mine.keys.sizes, theirs.keys.sizes)


# -- training ---------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("text", cases(["joint", "cross"], ["joint"]))
@pytest.mark.parametrize("method", cases(["dense", "moc", "moga", "vsa"], ["moga"]))
def test_a_training_step_of_the_model_never_waits(method: str, text: Any) -> None:
    film = zoo.Layout.pack(
        [zoo.Layout.film([zoo.Shot(2, 4, 6, text=3)] * 2, caption=2), zoo.Layout.film([zoo.Shot(2, 4, 6)])]
    )
    attention = {"name": method, "kernel": "triton", **QUICK.get(method, {})}
    model = VideoDiT(
        dim=128,
        depth=2,
        heads=2,
        channels=3,
        patch=(1, 2, 2),
        vocabulary=7,
        attention=attention,
        text=text,
        checkpoint=True,
    ).to(CUDA, torch.bfloat16)
    shots = [shot for each in film.films for shot in each.shots]
    batch = {
        "layout": film,
        "clips": [
            torch.empty(1, s.frames, 3, 2 * s.rows, 2 * s.cols, device=CUDA, dtype=torch.bfloat16) for s in shots
        ],
        "text": torch.empty(1, sum(s.text for s in shots) + 2, dtype=torch.int64, device=CUDA),
    }
    flow = RectifiedFlow(history=0.5, per_shot=True)
    with fake_cuda() as launches:
        for step in range(2):
            found = flow.training_loss(model, batch, generator("train", step), step=step, seed=step)
            sum(found.output.losses.values(), found.loss).backward()
        assert launches
    assert all(p.grad is not None for p in model.parameters())


@needs_triton
@pytest.mark.parametrize("method", ["moba", "moc", "nsa"])
def test_auto_chooses_chunks_on_the_device_too(method: str) -> None:
    film = new_film(12)
    attention = zoo.build(method, heads=HEADS, head_dim=HEAD_DIM, dim=DIM, **QUICK.get(method, {})).to(CUDA)
    q = torch.empty(1, HEADS, len(film), HEAD_DIM, dtype=torch.bfloat16, device=CUDA)
    with fake_cuda() as launches:
        assert attention(q, q, q, film, hidden=torch.empty(1, len(film), DIM, device=CUDA)).kernel == "triton"
    assert {"pool", "choose"} <= {launch.name for launch in launches}


def test_averaging_the_weights_never_waits() -> None:
    model: Any = torch.nn.Linear(3, 4)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=CUDA))
    ema = EMA(0.9)
    ema.setup(trainer, model, "fit")  # which Lightning calls before it moves the model
    model.to(CUDA)
    average = ema._average_model
    assert average is not None
    assert {x.device for x in average.module.parameters()} == {CUDA}
    with no_synchronisation():
        for _ in range(3):
            average.update_parameters(model)
    assert int(average.n_averaged) == 3
