"""What is held before anything is timed, riskiest first."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from multiprocessing import TimeoutError as TookTooLong
from multiprocessing import get_context

import torch
from torch import Tensor

import sparse_zoo as zoo
from experiments.tools.gpu import rows
from experiments.tools.gpu.common import Problem, device_of, dtype_of, film_size, kernel_of, long_size, problem
from experiments.tools.gpu.rows import Row
from experiments.tools.gpu.stage import Run
from sparse_zoo import routing
from sparse_zoo.kernels import get
from sparse_zoo.kernels.triton import dense
from sparse_zoo.kernels.triton import routing as fused
from sparse_zoo.methods import moc
from sparse_zoo.testing import Outcome, kernel_checks, large, run_kernel_checks
from sparse_zoo.testing import kernels as small
from sparse_zoo.testing.subject import place

FILM = "film"
LONG = "180k tokens"
CHOICE = "choice"
VARLEN = "variable length"
SMALL_PLANS = 8
LENGTHS = ((1280, 1280), (1216, 1344), (1227, 1301))
"""Of queries and keys: multiples of 128, with a rest of 64, with other rests."""
MORE_LENGTHS = ((1280, 1344), (1216, 1280), (1216, 1312), (1216, 32), (1184, 1344), (32, 1344))
"""A rest of 64 on one side alone, and the pieces that such lengths are cut into (`dense.cuts`)."""

LOW = ", scores near -200"
CHUNKS = ((1344, 192, 64, 320), (1408, 192, 64, 320), (1280, 200, 77, 32))
"""Tokens of chunks: all with a rest of 64 of 128, all but the longest, none."""


def name_of(what: str, dtype: torch.dtype, head_dim: int) -> str:
    """The name of a check, by which timings ask for it: what is checked, in which dtype and head dim."""
    return f"{what}, {str(dtype).removeprefix('torch.')}, d {head_dim}"


def judged(name: str, findings: list[large.Finding], reason: str = "") -> Row:
    """A check's row, with the errors found and allowed."""
    errors = {finding.what: [finding.error, finding.allowed] for finding in findings}
    return rows.check(name, "; ".join(filter(None, (reason, large.failures(findings)))), **errors)


def judged_cases(name: str, cases: dict[str, list[large.Finding]]) -> Row:
    """The row of a check of several cases: what failed in each, and the largest share of what is allowed."""
    reasons = [f"{what}: {large.failures(findings)}" for what, findings in cases.items() if large.failures(findings)]
    shares = [finding.error / finding.allowed if finding.allowed else 0.0 for x in cases.values() for finding in x]
    return judged(name, [], "; ".join(reasons)) | {"worst": max(shares)}


# -- the vendor's dense kernel ----------------------------------------------------------------------------------------


def dense_engine(run: Run) -> Iterator[Row]:
    """Forward and backward of one of two key sets, with the output and lse of both; lengths by their rest of 128."""
    head_dims = (16,) if run.tiny else (128, 64)
    for head_dim, dtype in itertools.product(
        head_dims, (dtype_of(run),) if run.tiny else (torch.bfloat16, torch.float16)
    ):
        cases = {}
        lengths: tuple[tuple[int, int], ...] = ((128, 128), (192, 64), (200, 77)) if run.tiny else LENGTHS
        if (head_dim, dtype) == (128, torch.bfloat16):
            lengths += MORE_LENGTHS
        for (queries, keys), low in itertools.product(lengths, (False, True)):
            what = f"{queries} × {keys}{LOW if low else ''}"
            cases[what] = two_key_sets(run, queries, keys, head_dim, dtype, low)
        yield judged_cases(name_of("dense", dtype, head_dim), cases)


def two_key_sets(
    run: Run, queries: int, keys: int, head_dim: int, dtype: torch.dtype, low: bool
) -> list[large.Finding]:
    """The vendor's kernel on the first of two key sets of a softmax over both."""
    device, heads = device_of(run), 2
    other = keys // 2 + 1
    given = large.Inputs.random(max(queries, keys + other), heads, heads, head_dim, dtype, device, seed=1)
    q, grad = (x[:, :, :queries].contiguous() for x in (given.q, given.grad))
    k, v = (x[:, :, : keys + other].contiguous() for x in (given.k, given.v))
    if low:  # all scores near -200: an lse below -88 makes exp(-lse) infinite
        size = (200 / head_dim**0.5) ** 0.5
        q, k = -(size + 0.1 * q), size + 0.1 * k
    scale = head_dim**-0.5
    (own_k, rest_k), (own_v, rest_v) = ((x[:, :, :keys].contiguous(), x[:, :, keys:].contiguous()) for x in (k, v))
    first, second = dense.forward(q, own_k, own_v, scale), dense.forward(q, rest_k, rest_v, scale)
    out, lse = zoo.merge([first[0], second[0]], [first[1], second[1]])
    got = dense.backward(grad, q, own_k, own_v, out.to(dtype), lse.float(), scale)
    found = []
    reads = torch.ones(queries, keys + other, dtype=torch.bool, device=device)
    wide, plain = (
        [large._rows(q[0, h].to(d), k[0, h].to(d), v[0, h].to(d), grad[0, h].to(d), reads, scale) for h in range(heads)]
        for d in (torch.float64, dtype)
    )

    def parts(made: list[large._Rows], d: torch.dtype) -> list[Tensor]:
        """out, lse of both sets; dq, dk, dv of the first."""
        scores = [row.grad_scores[:, :keys] for row in made]
        return [
            torch.stack([row.out for row in made]),
            torch.stack([row.lse for row in made]),
            torch.stack([score @ own_k[0, h].to(d) * scale for h, score in enumerate(scores)]),
            torch.stack([score.mT @ q[0, h].to(d) * scale for h, score in enumerate(scores)]),
            torch.stack([row.weights[:, :keys].mT @ grad[0, h].to(d) for h, row in enumerate(made)]),
        ]

    results = (out[0].to(dtype), lse[0], *(x[0] for x in got))
    for what, ours, want, rough in zip(
        large.Run._fields, results, parts(wide, torch.float64), parts(plain, dtype), strict=True
    ):
        found.append(large.compare(what, ours, want, rough))
    return found


# -- cuDNN's variable-length attention --------------------------------------------------------------------------------


def varlen_engine(run: Run) -> Iterator[Row]:
    """Forward and backward of the kernel "cudnn" on routed chunks, by their rest of 128; every row, against float64.

    With scores near -200 plain attention in half precision errs so much that only NaN and gross errors fail.
    """
    kernel = "cudnn" if kernel_of(run) == "triton" else kernel_of(run)
    kinds = itertools.product((128, 64), (torch.bfloat16, torch.float16))
    for head_dim, dtype in [(16, dtype_of(run))] if run.tiny else kinds:
        name = name_of(VARLEN, dtype, head_dim)
        few = torch.zeros(1, 1, 1, head_dim, dtype=dtype, device=device_of(run))
        reasons = get(kernel).why_not(few, few)
        if reasons:
            yield rows.skipped(name, "; ".join(reasons))
            continue
        cases = {}
        for lengths, low in itertools.product(((192, 64), (200, 77)) if run.tiny else CHUNKS, (False, True)):
            what = f"chunks of {', '.join(map(str, lengths))}{LOW if low else ''}"
            cases[what] = large.check_whole(kernel, *routed(run, lengths, head_dim, dtype, low))
        yield judged_cases(name, cases)


def routed(
    run: Run, lengths: tuple[int, ...], head_dim: int, dtype: torch.dtype, low: bool
) -> tuple[zoo.Plan, large.Inputs]:
    """A plan in which every query of two heads chooses one or two chunks of these lengths, and its inputs."""
    device, heads, total, count = device_of(run), 2, sum(lengths), len(lengths)
    given = large.Inputs.random(total, heads, heads, head_dim, dtype, device, seed=2)
    if low:  # in one channel alone: gradients of a whole softmax add up to 0, and would cancel in every channel
        given.q[..., 0], given.k[..., 0] = -200 * head_dim**0.5, 1
    draw = torch.Generator().manual_seed(2)
    first = torch.randint(count, (1, heads, total), generator=draw)
    second = torch.randint(1, count, (1, heads, total), generator=draw)
    second = torch.where(torch.rand(1, heads, total, generator=draw) < 0.5, (first + second) % count, -1)
    # Consecutive tokens of the stream, without an order: other chunks do not go to cuDNN.
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    chunks = zoo.Partition(None, bounds[None, None], total)
    return zoo.Plan.routed(chunks, torch.stack([first, second], dim=-1).to(device)), given


# -- routing ----------------------------------------------------------------------------------------------------------


def choice(run: Run) -> Iterator[Row]:
    """The fused top-k against scores in float64, as sets: few chunks and many, shared keys, a large k."""
    sizes = [("few chunks", film_size(run), 1, 3), ("shared keys, k 16", film_size(run), 2, 16)]
    sizes.append(("180k tokens", long_size(run), 1, 5))
    for what, size, share, top_k in sizes:
        asked = problem(run, size)
        k = asked.given.k[:, ::share].contiguous()
        finding = large.check_choice(
            routing.top_chunks if kernel_of(run) == "cpu" else fused.top_chunks,
            asked.given.q,
            k,
            *candidates(asked),
            min(top_k, candidates(asked)[0].count),
        )
        yield judged(name_of(f"{CHOICE}, {what}", dtype_of(run), size.head_dim), [finding])


def candidates(asked: Problem) -> tuple[zoo.Partition, Tensor, Tensor]:
    """moc's chunks, which kind of query may choose which, and the kind of each query."""
    assert isinstance(asked.attention, moc.MoC)
    static = moc._static(asked.film, asked.attention.cut)
    return static.chunks, static.legal, static.kind


# -- the kernel -------------------------------------------------------------------------------------------------------


def plans(run: Run) -> Iterator[Row]:
    """Each device kernel on small random plans: out, lse, gradients."""
    head_dim = 16 if run.tiny else 64
    subject = small.KernelSubject(get(kernel_of(run)), str(device_of(run)), dtype_of(run), head_dim)
    made = itertools.islice(small.recipes(), 2 if run.tiny else SMALL_PLANS)
    for number, recipe in enumerate(made):
        name = f"small plan {number}"
        try:
            given = small.inputs(subject, recipe.queries, recipe.keys, seed=recipe.seed)
            small.compare(subject, given, recipe.plan(subject.device), f"on {recipe}")
        except AssertionError as error:
            yield rows.check(name, str(error))
        else:
            yield rows.check(name)


def film(run: Run) -> Iterator[Row]:
    """moc on some 6k tokens in production's tiles, anchors by the vendor's kernel: every row, against float64."""
    kinds = [(dtype_of(run), film_size(run).head_dim)]
    if not run.tiny:
        kinds += [(torch.bfloat16, 64), (torch.float16, 128)]
    for dtype, head_dim in kinds:
        asked = problem(run, film_size(run)._replace(head_dim=head_dim), dtype=dtype)
        with large.dense_from(1 if run.tiny else 1 << 16):
            large_parts = sum(bool(dense.rectangles(part)) for part in asked.plan.parts)
            findings = large.check_whole(kernel_of(run), asked.plan, asked.given)
        reason = "" if large_parts else "no part went to the vendor's dense kernel, so that it was not checked"
        yield judged(name_of(FILM, dtype, head_dim), findings, reason) | {"dense_parts": large_parts}


def long(run: Run) -> Iterator[Row]:
    """moc at 180k tokens: sampled queries and keys of three heads against gathered float64."""
    size = long_size(run)
    asked = problem(run, size)
    findings = large.check_sampled(kernel_of(run), asked.plan, asked.given, tokens=16 if run.tiny else 256)
    yield judged(name_of(LONG, dtype_of(run), size.head_dim), findings)


def suite(run: Run) -> Iterator[Row]:
    """The conformance suite's checks of every kernel that runs on this device, as many at once as there are cores.

    Each check is a piece of work of its own: what has ended is kept where another takes all the time that there is.
    """
    own, device = kernel_of(run), device_of(run).type
    others = [name for name, reasons in zoo.kernels().items() if not reasons and name != own and not run.tiny]
    kernels = [own, *(name for name in others if (place(get(name)) or ("",))[0] == device)]
    waiting = [(kernel, check) for check in kernel_checks() for kernel in kernels]
    if run.tiny:
        waiting = [(own, "kernel_overlapping_keys"), (own, "kernel_shared_keys")]
    with get_context("spawn").Pool(min(len(waiting), os.cpu_count() or 1)) as pool:
        ended = pool.imap_unordered(_outcome, list(waiting))
        while waiting:
            try:
                outcome = ended.next(timeout=max(0.1, run.left() - 5))
            except TookTooLong:
                yield from (rows.skipped(_suite_name(*left), "did not end in its time") for left in waiting)
                return
            waiting.remove((outcome.method, outcome.check))
            yield {
                "kind": "check", "name": _suite_name(outcome.method, outcome.check),
                "status": outcome.status, "reason": outcome.reason, "seconds": round(outcome.seconds, 2),
            }  # fmt: skip


def _suite_name(kernel: str, check: str) -> str:
    return f"suite of {kernel}: {check}"


def _outcome(asked: tuple[str, str]) -> Outcome:
    kernel, check = asked
    (outcome,) = run_kernel_checks(kernel, only=(check,))
    return outcome
