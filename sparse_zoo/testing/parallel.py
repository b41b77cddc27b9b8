"""Checks of several ranks: P of them give what one gives. They run as threads, through the code that processes run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sparse_zoo.attention import Attention, Call
from sparse_zoo.errors import ZooError
from sparse_zoo.parallel import Peers, Ulysses, split_sizes
from sparse_zoo.testing.subject import CASES, HEAD_DIM, PACKED, STORY, Subject, make
from sparse_zoo.testing.suite import Checks, Skip, expect, same

checks: Checks[Subject] = Checks()

EXACT = 1e-9
GRADIENT = 1e-6
"""Gradients pass through a float32 router or gate, and differ by its rounding."""
ENGINE: type[Ulysses] = Ulysses
"""What splits the stream; mutants put a broken one here."""

T = TypeVar("T")


class Room:
    """Where threads that are ranks meet to exchange tensors."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=60)
        self.sent: list[Sequence[Tensor]] = [()] * size


class Seat:
    """One rank of a `Room`: `sparse_zoo.parallel.Peers` without processes.

    Args:
        room: Where the ranks meet.
        rank: Which of them this is.
    """

    def __init__(self, room: Room, rank: int) -> None:
        self.room, self.rank, self.size = room, rank, room.size

    def all_to_all(self, sent: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send `sent[i]` to rank i, and return copies of what each rank sent to this one."""
        self.room.sent[self.rank] = sent
        self.room.barrier.wait()
        # As processes do it: what arrives is a number of elements, and the receiver gives them their shape.
        got = [self.room.sent[i][self.rank].detach().clone().view(*shapes[i]) for i in range(self.size)]
        self.room.barrier.wait()
        return got


def run_ranks(size: int, function: Callable[[Seat], T]) -> list[T]:
    """What a function of a rank returns on each of `size` ranks, which run as threads of this process.

    Raises the first error that is not the consequence of another rank's.
    """
    room, grad = Room(size), torch.is_grad_enabled()
    found: dict[int, T] = {}
    errors: list[BaseException] = []

    def serve(rank: int) -> None:
        try:
            with torch.set_grad_enabled(grad):
                found[rank] = function(Seat(room, rank))
        except BaseException as error:  # raised below, in the thread that asked
            errors.append(error)
            room.barrier.abort()

    threads = [threading.Thread(target=serve, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    causes = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if errors:
        raise (causes or errors)[0]
    return [found[rank] for rank in range(size)]


class Passed(NamedTuple):
    """A forward and backward pass: the output, gradients of q, k, v, hidden, of parameters, and the losses."""

    out: Tensor
    inputs: list[Tensor | None]
    parameters: list[Tensor | None]
    losses: Mapping[str, Tensor]


def _own(call: Call, size: int, rank: int) -> dict[str, Tensor]:
    """A rank's part of the tensors of a call, as leaves of a graph."""
    rows = len(call.layout) if call.q_rows is None else len(call.q_rows)
    own = {"q": rows, "k": len(call.layout), "v": len(call.layout), "hidden": len(call.layout)}
    parts = {}
    for name, count in own.items():
        x = getattr(call, name)
        part = x.detach().split(split_sizes(count, size), dim=x.dim() - 2)[rank]
        parts[name] = part.clone().requires_grad_()
    return parts


def run_pass(attention: Attention, call: Call, seat: Peers | None) -> Passed:
    """One pass on a rank, or without one on all tokens. The loss weighs the output, and has the auxiliary losses."""
    size, rank = (1, 0) if seat is None else (seat.size, seat.rank)
    mine = _own(call, size, rank)
    context = {name: getattr(call, name) for name in ("layer", "layers", "noise", "step", "seed", "memory", "q_rows")}
    q, k, v, hidden = mine.values()
    rows = len(call.layout) if call.q_rows is None else len(call.q_rows)
    if seat is None:
        result = attention(q, k, v, call.layout, hidden=hidden, **context)
        out = result.out
    else:
        engine = ENGINE(seat)
        result = engine.run(attention, q, k, v, call.layout, hidden=hidden, **context)
        out = engine.gather(result.out, 2, split_sizes(rows, size))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    loss = (out * weight).sum() + sum(result.losses.values())
    inputs, parameters = list(mine.values()), list(attention.parameters())
    grads: list[Tensor | None] = list(torch.autograd.grad(loss, [*inputs, *parameters], allow_unused=True))
    return Passed(out.detach(), grads[: len(inputs)], grads[len(inputs) :], result.losses)


def mean_gradient(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The mean over ranks of a parameter's gradient, as FSDP and DDP take it."""
    given = [part for part in parts if part is not None]
    return torch.stack(given).sum(0) / len(parts) if given else None


def joined_gradient(parts: Sequence[Tensor | None], dim: int) -> Tensor | None:
    """The gradient of an input from those of its parts, each of which is as many times too large as there are ranks."""
    given = [part for part in parts if part is not None]
    return torch.cat(given, dim) / len(parts) if given else None


def _cases(subject: Subject, attention: Attention) -> dict[str, tuple[Attention, Call, int]]:
    """A method, a call and a number of ranks each: uneven parts, fewer key heads than ranks, training."""
    crowd = CASES["many films, items and heads"].call(batch=1, heads=12, head_dim=HEAD_DIM, kv_heads=4)
    cases = {
        "4 ranks in training": (attention.train(), make(STORY, step=3, seed=7, layer=2, layers=4, noise=0.5), 4),
        "2 ranks, films packed": (subject.build(), make(PACKED), 2),
        "3 ranks, many films": (subject.build(heads=crowd.q.shape[1]), crowd, 3),
    }
    if not attention.pools_queries:
        rows = torch.arange(0, len(STORY), 2).flip(0)
        call = make(STORY)
        cases["2 ranks, some queries"] = (subject.build(), replace(call, q=call.q[:, :, rows], q_rows=rows), 2)
    return cases


@checks
def ranks_equal_one(subject: Subject) -> None:
    """P ranks that each hold a part of the tokens give what one gives: outputs, gradients, losses, all steps."""
    attention = subject.build()
    if attention.needs_all_heads is not None:
        _is_refused(attention)
        raise Skip(f"needs_all_heads: {attention.needs_all_heads}")
    change = "decide by q, k, v of the heads given, call.head_offset and features(hidden), never by hidden itself"
    for name, (method, call, size) in _cases(subject, attention).items():
        whole = run_pass(method, call, None)

        def on_rank(seat: Seat, method: Attention = method, call: Call = call) -> Passed:
            return run_pass(method, call, seat)

        parts = run_ranks(size, on_rank)
        for part in parts:
            same(part.out, whole.out, EXACT * max(1.0, float(whole.out.abs().max())), f"outputs of {name}", change)
            expect(
                part.losses.keys() == whole.losses.keys(),
                f"losses {list(whole.losses)} of {name}",
                f"{list(part.losses)}",
                change,
            )
            for loss, value in whole.losses.items():
                mean = "a loss over heads is their mean, a loss of features is of all tokens"
                same(part.losses[loss], value, GRADIENT, f"losses[{loss!r}] of {name}", mean)
        for i, (what, dim) in enumerate({"q": 2, "k": 2, "v": 2, "hidden": 1}.items()):
            _alike(
                joined_gradient([part.inputs[i] for part in parts], dim),
                whole.inputs[i],
                f"gradients of {what}, {name}",
            )
        for i, (what, _) in enumerate(method.named_parameters()):
            got = mean_gradient([part.parameters[i] for part in parts])
            _alike(got, whole.parameters[i], f"gradients of {what}, {name}")
    _steps_alike(subject, change)


def _alike(got: Tensor | None, want: Tensor | None, what: str) -> None:
    change = "let gradients flow by way of features(hidden), q, k and v alone"
    scale = 1.0 if want is None else max(1.0, float(want.abs().max()))
    if got is None or want is None:  # a part that nothing reached has a gradient of 0
        got, want = (torch.zeros(()) if x is None else x.abs().max() for x in (got, want))
    same(got, want, GRADIENT * scale, what, change)


def _steps_alike(subject: Subject, change: str) -> None:
    """What a method keeps between noise steps serves ranks as it serves one."""
    attention, calls = subject.build(), [make(STORY, noise=noise, seed=seed) for seed, noise in ((3, 0.9), (4, 0.6))]

    def sample(seat: Seat | None) -> Tensor:
        memory: dict[Any, Any] = {}
        with torch.no_grad():
            out = calls[0].q
            for call in calls:
                mine = _own(call, 1 if seat is None else seat.size, 0 if seat is None else seat.rank)
                q, k, v, hidden = mine.values()
                context: dict[str, Any] = {"hidden": hidden, "noise": call.noise, "memory": memory}
                if seat is None:
                    out = attention(q, k, v, call.layout, **context).out
                else:
                    engine = ENGINE(seat)
                    out = engine.run(attention, q, k, v, call.layout, **context).out
                    out = engine.gather(out, 2, split_sizes(len(call.layout), seat.size))
        return out

    whole = sample(None)
    for part in run_ranks(2, sample):
        same(part, whole, EXACT, "outputs of a second noise step, with memory", change)


def _is_refused(attention: Attention) -> None:
    call = make(STORY)

    def on_rank(seat: Seat) -> str:
        try:
            run_pass(attention, call, seat)
        except ZooError as error:
            return str(error)
        return ""

    for said in run_ranks(2, on_rank):
        expect(
            str(attention.needs_all_heads) in said,
            "a refusal that gives the declared reason",
            said or "a result",
            "Ulysses.run",
        )
