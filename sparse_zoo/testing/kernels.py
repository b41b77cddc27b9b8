"""Checks for a kernel: any plan, forward and backward, against masked softmax in float64."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from sparse_zoo.errors import refuse
from sparse_zoo.kernels import get
from sparse_zoo.kernels.base import Kernel
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Part, Plan
from sparse_zoo.testing import oracle
from sparse_zoo.testing.subject import HEAD_DIM, place
from sparse_zoo.testing.suite import Check, Checks, Outcome, Skip, expect, same, settle

BATCH, HEADS = 2, 4
EXACT = 1e-10
SEEDED, DRAWN = 30, 60
GRID = 65_535
"""Where a grid dimension of CUDA ends."""
AFFORDABLE = 1 << 28
"""Pairs that a check may make a kernel execute."""
SMALL_SCALE = 1e-3


@dataclass(frozen=True)
class KernelSubject:
    """A kernel under test, the device it runs on, the widest dtype it takes there and the smallest head dim."""

    kernel: Kernel
    device: str
    dtype: torch.dtype
    head_dim: int = HEAD_DIM


_all: Checks[KernelSubject] = Checks()


def kernel_checks() -> dict[str, Check[KernelSubject]]:
    """All checks for a kernel, by name, in the order they run."""
    return dict(_all)


def run_kernel_checks(
    kernel: str | Kernel, *, known_failures: Mapping[str, str] | None = None, only: Collection[str] | None = None
) -> Iterator[Outcome]:
    """The outcome of each check, one by one as they end; `Outcome.method` is the kernel's name."""
    kernel = get(kernel) if isinstance(kernel, str) else kernel
    found = place(kernel)
    reasons = [] if found else kernel.why_not() or ["it runs no dtype forward and backward on any device"]
    refuse(f"kernel {kernel.name!r} cannot be checked here", reasons)
    assert found is not None
    yield from _all.run(kernel.name, KernelSubject(kernel, *found), known_failures=known_failures, only=only)


def check_kernel(
    kernel: str | Kernel, *, known_failures: Mapping[str, str] | None = None, only: Collection[str] | None = None
) -> list[Outcome]:
    """Run every check on a kernel, a name or an object; raise one `ConformanceError` that lists all failures.

    Plans are drawn with fixed seeds: unions of ragged pieces, whose key sets overlap, one-token rectangles, empty
    pieces and rectangles, edges as tables and as indices, batch items and heads alike or apart; and more than 65,535
    rectangles. Where Hypothesis is installed it draws 60 further plans and shrinks what fails; where it is not,
    `kernel_drawn_plans` is skipped and the seeded plans are all. Runs on the first device, widest dtype and smallest
    head dim that the kernel takes; raises `ZooError` with the kernel's reasons where there is none.
    """
    return settle(run_kernel_checks(kernel, known_failures=known_failures, only=only))


# -- plans ------------------------------------------------------------------------------------------------------------

KINDS = ("groups", "routed", "blocks", "singles", "sparse")


@dataclass(frozen=True)
class Recipe:
    """What a random plan is made of: the union of `kinds`, over `pieces` pieces, with batch items and heads apart."""

    queries: int
    keys: int
    kinds: tuple[str, ...]
    pieces: int
    batch: int
    heads: int
    seed: int

    def plan(self, device: str) -> Plan:
        """The plan, on a device: the same for the same seed."""
        draw = torch.Generator().manual_seed(self.seed)
        plan: Plan | None = None
        for kind in self.kinds:
            part = self._part(kind, draw, device)
            plan = Plan(part) if plan is None else plan | Plan(part)
        assert plan is not None
        return plan

    def _part(self, kind: str, draw: torch.Generator, device: str) -> Part:
        def whole(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=draw).to(device)

        lead, count = (self.batch, self.heads), self.pieces
        if kind == "groups":  # labels scattered over the stream, some tokens in no piece, some pieces empty
            queries, keys = (whole(-1, count, *lead, size) for size in (self.queries, self.keys))
            return Plan.groups(queries, keys, count=count).parts[0]
        chunks = Partition.from_labels(whole(0, count, self.keys).sort().values, count)
        if kind == "routed":  # every query token chooses for itself, some fewer than they may
            chosen = torch.rand(*lead, self.queries, count, generator=draw).argsort(-1)[..., : max(1, count // 2)]
            return Part(
                Partition.singles(self.queries, device),
                chunks,
                torch.where(whole(0, 4, *chosen.shape) > 0, chosen.to(device), -1),
            )
        pieces = Partition.from_labels(whole(0, count, self.queries).sort().values, count)
        if kind == "blocks":
            return Part(pieces, chunks, whole(0, 2, *lead, count, count).bool())
        if kind == "singles":  # one token × one token
            table = whole(0, 5, *lead, self.queries, self.keys) == 0
            return Part(Partition.singles(self.queries, device), Partition.singles(self.keys, device), table)
        return Part(pieces, chunks, whole(0, 9, *lead, count, count) == 0)  # "sparse": most pieces have no edge


def recipes() -> Iterator[Recipe]:
    """The seeded ones."""
    draw = random.Random(0)
    for seed in range(SEEDED):
        queries = draw.choice([1, 5, 17, 33])
        yield Recipe(
            queries,
            draw.choice([1, queries, 23, 40]),
            tuple(draw.choice(KINDS) for _ in range(draw.randint(1, 3))),
            draw.choice([1, 2, 5, 9]),
            draw.choice([1, BATCH]),
            draw.choice([1, HEADS]),
            seed,
        )


@dataclass(frozen=True)
class Large:
    """A plan and sizes beyond those of the seeded plans; head dims of which the first that the kernel takes is used."""

    recipe: Recipe
    lead: tuple[int, int]
    kv_heads: int
    head_dims: tuple[int, ...]


LARGE = (
    Large(Recipe(620, 700, ("routed", "groups", "sparse"), 90, 1, 2, 101), (1, 2), 1, (HEAD_DIM, 16, 32, 64)),
    Large(Recipe(40, 1100, ("groups",), 1, 1, 1, 102), (1, 1), 1, (HEAD_DIM, 16, 32, 64)),
    Large(Recipe(70, 90, 2 * ("blocks", "routed", "singles", "groups", "sparse"), 9, 6, 12, 103), (6, 12), 2, (80, 96)),
    Large(Recipe(33, 150, ("groups", "blocks"), 3, 1, 10, 104), (5, 10), 10, (128, 256)),
)
"""More than 512 queries and keys, 1,024 keys in one rectangle, 8 parts, 4 batch items, 8 heads, 4 query heads for a key
head, 64 channels."""


# -- comparing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """out, lse and the gradients of q, k, v under a fixed sum of the output; all detached."""

    out: Tensor
    lse: Tensor
    grads: tuple[Tensor, ...]


def inputs(
    subject: KernelSubject,
    queries: int,
    keys: int,
    kv_heads: int = 2,
    seed: int = 3,
    lead: tuple[int, int] | None = None,
) -> list[Tensor]:
    """q, k, v that need gradients; `lead`: batch items and query heads."""
    draw, (batch, heads) = torch.Generator().manual_seed(seed), lead or (BATCH, HEADS)
    shapes = [(batch, heads, queries, subject.head_dim)] + [(batch, kv_heads, keys, subject.head_dim)] * 2
    made = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    return [x.to(device=subject.device, dtype=subject.dtype).requires_grad_() for x in made]


def by_kernel(subject: KernelSubject, given: list[Tensor], plan: Plan, scale: float | None = None) -> Run:
    """What the kernel under test gives on `given`: q, k, v (B, H, L, D). `scale` is 1 / sqrt(D) by default."""
    scale = given[0].shape[-1] ** -0.5 if scale is None else scale
    return _run(*subject.kernel.run(given[0], given[1], given[2], plan, scale), given)


def by_oracle(given: list[Tensor], plan: Plan, dtype: torch.dtype = torch.float64, scale: float | None = None) -> Run:
    """What plain masked softmax gives in `dtype`, float64 by default. Arguments as `by_kernel`."""
    q, k, v = (x.to(dtype) for x in given)
    return _run(*oracle.masked_softmax(q, k, v, oracle.mask_of(plan), scale, oracle.log_weights_of(plan)), given)


def _run(out: Tensor, lse: Tensor, given: list[Tensor]) -> Run:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    grads = torch.autograd.grad((out * weight.to(out)).sum(), given)
    return Run(out.detach(), lse.detach(), grads)


def allowed(given: list[Tensor], got: Tensor, want: Tensor, rough: Tensor) -> float:
    """How far a result may be from the oracle's: by how much plain softmax in the inputs' dtype is."""
    if given[0].dtype == torch.float64:
        return EXACT
    return oracle.bound(got.dtype, want, rough)


def compare(subject: KernelSubject, given: list[Tensor], plan: Plan, what: str, *, only: str = "") -> None:
    """Fail unless out, lse and gradients agree with the oracle's; `only` one of "out", "lse", "grads"."""
    got, want, rough = by_kernel(subject, given, plan), by_oracle(given, plan), by_oracle(given, plan, given[0].dtype)
    if only in ("", "out"):
        atol = allowed(given, got.out, want.out, rough.out)
        same(got.out, want.out, atol, f"outputs {what}", "the forward: each pair counts once, over the union of keys")
    if only in ("", "lse"):
        expect(got.lse.dtype in (torch.float32, torch.float64), "lse float32 or wider", f"{got.lse.dtype}", "its dtype")
        change = "natural logarithm of the sum over all keys of the query, -inf without keys"
        same(got.lse, want.lse, allowed(given, got.lse, want.lse, rough.lse), f"lse {what}", change)
    if only in ("", "grads"):
        for name, ours, right, plain in zip("qkv", got.grads, want.grads, rough.grads, strict=True):
            atol = allowed(given, ours, right, plain)
            change = "the backward of each rectangle takes the final out and lse of the whole union, not its own"
            same(ours, right, atol, f"gradients of {name} {what}", change)


# -- checks -----------------------------------------------------------------------------------------------------------


@_all
def kernel_outputs(subject: KernelSubject) -> None:
    """Outputs on seeded random plans are those of masked softmax in float64."""
    for recipe in recipes():
        given = inputs(subject, recipe.queries, recipe.keys, seed=recipe.seed)
        compare(subject, given, recipe.plan(subject.device), f"on {recipe}", only="out")


@_all
def kernel_log_sum_exp(subject: KernelSubject) -> None:
    """lse on seeded random plans is the natural log-sum-exp, float32 or wider."""
    for recipe in recipes():
        given = inputs(subject, recipe.queries, recipe.keys, seed=recipe.seed)
        compare(subject, given, recipe.plan(subject.device), f"on {recipe}", only="lse")


@_all
def kernel_gradients(subject: KernelSubject) -> None:
    """Gradients of q, k, v on seeded random plans are those of masked softmax in float64."""
    for recipe in recipes():
        given = inputs(subject, recipe.queries, recipe.keys, seed=recipe.seed)
        compare(subject, given, recipe.plan(subject.device), f"on {recipe}", only="grads")


@_all
def kernel_large_plans(subject: KernelSubject) -> None:
    """Outputs, lse and gradients with many tokens, pieces, batch items, heads, shared keys and channels."""
    for large in LARGE:
        for head_dim in large.head_dims:
            sized = replace(subject, head_dim=head_dim)
            given = inputs(sized, large.recipe.queries, large.recipe.keys, large.kv_heads, lead=large.lead)
            if not subject.kernel.why_not(given[0], given[2]):
                compare(sized, given, large.recipe.plan(subject.device), f"on {large}")
                break


@_all
def kernel_gradients_alone(subject: KernelSubject) -> None:
    """Gradients of q, k and v are the same where only some of them need one."""
    length = 22
    plan = Plan.groups(torch.arange(length, device=subject.device) // 6)
    given = inputs(subject, length, length)
    want = dict(zip("qkv", by_kernel(subject, given, plan).grads, strict=True))
    for names in ("q", "k", "v", "qk", "qv", "kv"):
        some = {name: x.detach().requires_grad_(name in names) for name, x in zip("qkv", given, strict=True)}
        out, _ = subject.kernel.run(some["q"], some["k"], some["v"], plan, subject.head_dim**-0.5)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        value = (out * weight.to(out)).sum()
        wanted = [some[name] for name in names]
        grads = torch.autograd.grad(value, wanted, allow_unused=True) if value.requires_grad else [None] * len(wanted)
        for name, grad in zip(names, grads, strict=True):
            atol = EXACT if subject.dtype == torch.float64 else 8 * torch.finfo(subject.dtype).eps
            change = "what is saved for the backward pass: it may not depend on which other input needs a gradient"
            same(grad, want[name], atol, f"gradients of {name} where {', '.join(names)} alone need one", change)


@_all
def kernel_drawn_plans(subject: KernelSubject) -> None:
    """Outputs, lse and gradients on plans that Hypothesis draws, and shrinks where one fails."""
    if find_spec("hypothesis") is None:
        raise Skip("hypothesis is not installed; the seeded plans are all that is drawn")
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    size = st.integers(1, 40)
    drawn = st.builds(
        Recipe,
        queries=size,
        keys=size,
        kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4).map(tuple),
        pieces=st.integers(1, 12),
        batch=st.sampled_from([1, BATCH]),
        heads=st.sampled_from([1, HEADS]),
        seed=st.integers(0, 1000),
    )

    @settings(
        max_examples=DRAWN,
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(recipe=drawn, kv_heads=st.sampled_from([1, 2, HEADS]))
    def run(recipe: Recipe, kv_heads: int) -> None:
        tensors = inputs(subject, recipe.queries, recipe.keys, kv_heads, seed=recipe.seed)
        compare(subject, tensors, recipe.plan(subject.device), f"on {recipe} with {kv_heads} key heads")

    run()


@_all
def kernel_overlapping_keys(subject: KernelSubject) -> None:
    """A union whose key sets overlap counts each pair once."""
    length = 24
    token = torch.arange(length, device=subject.device)
    plan = Plan.groups(token // 8) | Plan.groups(token // 12) | Plan.groups(token % 2)
    compare(subject, inputs(subject, length, length), plan, "on overlapping key sets")


@_all
def kernel_heads_apart(subject: KernelSubject) -> None:
    """Batch items and heads with plans of their own get each its own."""
    length = 19
    labels = torch.arange(length) % (1 + torch.arange(BATCH * HEADS).view(BATCH, HEADS, 1))
    plan = Plan.groups(labels.to(subject.device))
    compare(subject, inputs(subject, length, length), plan, "where batch items and heads differ")


@_all
def kernel_shared_keys(subject: KernelSubject) -> None:
    """Query heads that share keys and values (GQA) read those of head h // (H // Hk), gradients included."""
    length = 21
    plan = Plan.groups(torch.arange(length, device=subject.device) // 7)
    for kv_heads in (1, 2, HEADS):
        given = inputs(subject, length, length, kv_heads)
        compare(subject, given, plan, f"with {kv_heads} key heads for {HEADS} query heads")


@_all
def kernel_empty_queries(subject: KernelSubject) -> None:
    """A query without keys gets out 0, lse -inf and no gradient; so do all when nobody attends to anything."""
    for labels in (torch.tensor([0, 0, -1, 1, -1, 1, 2]), torch.full((7,), -1)):
        plan = Plan.groups(labels.to(subject.device), count=4)
        given = inputs(subject, 7, 7)
        run = by_kernel(subject, given, plan)
        none = (labels < 0).to(subject.device)
        for what, x, value in (
            ("output", run.out[:, :, none], 0.0),
            ("lse", run.lse[:, :, none], -torch.inf),
            ("gradient of q", run.grads[0][:, :, none], 0.0),
            ("gradient of k of keys that nobody reads", run.grads[1][:, :, none], 0.0),
            ("gradient of v of keys that nobody reads", run.grads[2][:, :, none], 0.0),
        ):
            same(x, torch.full_like(x, value), 0.0, f"{what} of queries without keys", "divide by no empty sum")


@_all
def kernel_many_rectangles(subject: KernelSubject) -> None:
    """More than 65,535 rectangles: across batch items and heads and, where it makes no L × L, in one head."""
    shapes = [(4, 128, 130)]
    long = Plan.groups(torch.arange(GRID + 65, device=subject.device))
    if subject.kernel.executed(long, 1, 1) <= AFFORDABLE:
        shapes.append((1, 1, GRID + 65))
    for batch, heads, length in shapes:
        draw = torch.Generator().manual_seed(4)
        drawn = (torch.randn(batch, heads, length, subject.head_dim, generator=draw) for _ in "qkv")
        q, k, v = (x.to(device=subject.device, dtype=subject.dtype).requires_grad_() for x in drawn)
        plan = Plan.groups(torch.arange(length, device=subject.device))
        out, _ = subject.kernel.run(q, k, v, plan, 1.0)
        what = f"{batch * heads * length} rectangles of one token in {batch * heads} heads"
        change = "launch them in several grids, or number them in the grid dimension without that bound"
        eps = torch.finfo(subject.dtype).eps * 8
        same(out, v, eps, f"outputs and values over {what}", change)
        dq, dk, dv = torch.autograd.grad(out.sum(), [q, k, v])
        for name, got, want in (("q", dq, 0.0), ("k", dk, 0.0), ("v", dv, 1.0)):
            same(got, torch.full_like(got, want), 64 * eps, f"gradients of {name} over {what}", change)


@_all
def kernel_extreme_scores(subject: KernelSubject) -> None:
    """With scores near ±200 and far apart, in float32 where it is taken, outputs, lse and gradients are right."""
    narrow = torch.float32 if subject.dtype == torch.float64 else subject.dtype
    length = 24
    token = torch.arange(length, device=subject.device)
    plan = Plan.groups(token // 8) | Plan.groups(token % 2)
    for sign in (-1.0, 1.0, 0.0):
        q, k, v = inputs(replace(subject, dtype=narrow), length, length)
        with torch.no_grad():
            if sign:  # All q and k lie along one direction: every score has one sign.
                q.copy_(sign * (8 / subject.head_dim) ** 0.5 * (8.0 + q.abs()))
                k.copy_(8.0 + k.abs())
            else:  # of either sign, some hundreds apart
                q.mul_(150.0)
        given = [q, k, v]
        got, want = by_kernel(subject, given, plan), by_oracle(given, plan)
        rough = by_oracle(given, plan, narrow)
        triples = [("outputs", got.out, want.out, rough.out), ("lse", got.lse, want.lse, rough.lse)]
        for name, a, b, c in zip("qkv", got.grads, want.grads, rough.grads, strict=True):
            triples.append((f"gradients of {name}", a, b, c))
        for name, ours, right, plain in triples:
            # An lse of 200 is rounded by 2e-5 in float32, and gradients of q and k are differences of terms near 50.
            atol = allowed(given, ours, right, plain) + 1e-3 * max(1.0, float(right.abs().max()))
            change = "take exp(score - lse) in one piece, never exp(score) · exp(-lse)"
            near = f"{sign * 200:.0f}" if sign else "±300"
            same(ours, right, atol, f"{name} with scores near {near}", change)


@_all
def kernel_half_precision(subject: KernelSubject) -> None:
    """In bfloat16 and float16, where it takes them, errors are bounded by those of plain softmax in that precision."""
    length, ran = 160, 0
    token = torch.arange(length, device=subject.device)
    plan = Plan.groups(token // 40) | Plan.groups(token % 4)
    reasons = []
    for dtype in (torch.bfloat16, torch.float16):
        given = inputs(replace(subject, dtype=dtype), length, length)
        why_not = subject.kernel.why_not(given[0], given[2])
        if why_not:
            reasons += why_not
            continue
        compare(subject, given, plan, f"in {dtype}")
        ran += 1
    if not ran:
        raise Skip("; ".join(dict.fromkeys(reasons)))


@_all
def kernel_inputs(subject: KernelSubject) -> None:
    """q, k, v are left untouched, and non-contiguous ones give what contiguous ones give."""
    length = 17
    plan = Plan.groups(torch.arange(length, device=subject.device) // 5)
    given = inputs(subject, length, length)
    before = [x.detach().clone() for x in given]
    want = by_kernel(subject, given, plan)
    for name, x, old in zip("qkv", given, before, strict=True):
        expect(torch.equal(x.detach(), old), f"{name} untouched", "written to", "the operation in place")
    # Heads last in memory and every other channel, as cut from one projection.
    strided = []
    for x in before:
        wide = torch.stack([x, torch.full_like(x, torch.nan)], dim=-1).transpose(1, 2).contiguous()
        strided.append(wide[..., 0].transpose(1, 2).requires_grad_())
    got = by_kernel(subject, strided, plan)
    for name, ours, right in (
        ("outputs", got.out, want.out),
        *((f"gradients of {n}", a, b) for n, a, b in zip("qkv", got.grads, want.grads, strict=True)),
    ):
        atol = EXACT if subject.dtype == torch.float64 else 8 * torch.finfo(subject.dtype).eps
        same(ours, right, atol, f"{name} of strided and contiguous inputs", "read strides, or make contiguous copies")


@_all
def kernel_scale(subject: KernelSubject) -> None:
    """Scores are multiplied by the scale that is given, in forward and backward."""
    length = 12
    plan = Plan.groups(torch.arange(length, device=subject.device) // 6)
    for scale in (0.1, 1.0, SMALL_SCALE, 5.0):
        given = inputs(subject, length, length)
        with torch.no_grad():
            given[0].div_(scale)  # scores are ordinary whatever the scale: at large ones rounding alone would fail
        got, want = by_kernel(subject, given, plan, scale), by_oracle(given, plan, scale=scale)
        rough = by_oracle(given, plan, given[0].dtype, scale)
        atol = allowed(given, got.out, want.out, rough.out)
        same(got.out, want.out, atol, f"outputs at scale {scale}", "multiply scores by `scale` once")
        for name, ours, right, plain in zip("qkv", got.grads, want.grads, rough.grads, strict=True):
            atol = allowed(given, ours, right, plain)
            same(ours, right, atol, f"gradients of {name} at scale {scale}", "scale in the backward too")


@_all
def kernel_log_weights(subject: KernelSubject) -> None:
    """Log-weights of keys, of some parts or of all, are added to scaled scores: outputs, lse and gradients."""
    if not subject.kernel.weighs_keys:
        raise Skip("weighs_keys is False: plans with log-weights are refused before they reach it")
    draw = torch.Generator().manual_seed(8)
    for recipe in [x for x in recipes() if len(x.kinds) > 1][:3]:
        plan, (batch, heads) = recipe.plan(subject.device), (recipe.batch, recipe.heads)
        for weighted in (slice(1, None), slice(None)):
            # As large as the logarithms of block sizes, and some that all but hide a key.
            leads = ((1, 1), (batch, 1), (batch, heads))
            drawn = [4 * torch.randn(*lead, recipe.keys, generator=draw) for lead in leads]
            parts = list(plan.parts)
            for i in range(len(parts))[weighted]:
                parts[i] = replace(parts[i], log_weight=drawn[i % 3].to(subject.device))
            given = inputs(subject, recipe.queries, recipe.keys, seed=recipe.seed)
            some = "all" if weighted == slice(None) else "some"
            compare(subject, given, Plan(*parts), f"with log-weights of {some} parts on {recipe}")
    # A segment of pooled keys beside one of tokens, in half precision too: log-weights may not be rounded to it.
    tokens = Plan.groups(torch.arange(24, device=subject.device) // 8)
    queries, keys = (torch.zeros(n, dtype=torch.int64, device=subject.device) for n in (24, 6))
    pooled = Plan.groups(queries, keys)
    plan = Plan.beside(tokens, pooled.weighted(torch.linspace(5.3, 9.7, 6, device=subject.device)[None, None]))
    for dtype in dict.fromkeys((subject.dtype, torch.bfloat16, torch.float16)):
        given = inputs(replace(subject, dtype=dtype), 24, 30)
        if not subject.kernel.why_not(given[0], given[2]):
            compare(subject, given, plan, f"of tokens beside pooled keys in {dtype}")


@_all
def kernel_executed(subject: KernelSubject) -> None:
    """`executed` is a whole number, no fewer than the pairs of the plan."""
    for recipe in recipes():
        plan = recipe.plan(subject.device)
        pairs = int(oracle.mask_of(plan).expand(BATCH, HEADS, -1, -1).sum())
        executed = subject.kernel.executed(plan, BATCH, HEADS)
        expect(
            isinstance(executed, int) and executed >= pairs,
            f"{pairs} pairs or more on {recipe}",
            f"{executed!r}",
            "executed(plan, batch, heads) counts what is multiplied, padding included",
        )


@_all
def kernel_tells_why_not(subject: KernelSubject) -> None:
    """It gives reasons for tensors it cannot take; a head dim of v unlike q's it refuses or computes."""
    whole = torch.zeros(1, 1, 4, subject.head_dim, dtype=torch.int32, device=subject.device)
    reasons = subject.kernel.why_not(whole, whole)
    expect(
        bool(reasons) and all(isinstance(reason, str) and reason for reason in reasons),
        "reasons against int32",
        f"{reasons!r}",
        "why_not(q, v) returns every reason as a string, none only when it can run",
    )
    plan = Plan.groups(torch.arange(9, device=subject.device) // 3)
    q, k, v = inputs(subject, 9, 9)
    wider = torch.cat([v, v.flip(2)], dim=-1)
    for what, other in (("narrower", v[..., :4]), ("wider", wider)):
        given = [q, k, other.detach().contiguous().requires_grad_()]
        if not subject.kernel.why_not(q, given[2]):
            compare(subject, given, plan, f"where v is {what} than q")
