"""Checks of results: outputs, gradients and losses against what the branches mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparse_zoo.attention import Attention, Branch, Call, Term
from sparse_zoo.errors import ZooError
from sparse_zoo.testing import oracle
from sparse_zoo.testing.subject import AUTO, CASES, FILMS, HEAD_DIM, KV_HEADS, PACKED, STORY, Subject, make, usable
from sparse_zoo.testing.suite import Checks, expect, same, some

checks: Checks[Subject] = Checks()

EXACT = 1e-9
"""float64 against float64; what a method does in float32, such as a gate, is the same on both sides."""
GRADIENT = 1e-6
"""Gradients pass through a float32 gate, and differ by its rounding."""


def bound(attention: Attention, call: Call, want: Tensor, branches: Sequence[Branch | Term] | None = None) -> float:
    """How far an output may be from the oracle's: by how much plain softmax in the same dtype is."""
    if call.q.dtype == torch.float64:
        return EXACT
    return oracle.bound(call.q.dtype, want, oracle.plain(attention, call, None, branches))


def _exact(want: Tensor) -> float:
    return EXACT * max(1.0, float(want.abs().max()))


def gradients(attention: Attention, call: Call, out: Tensor) -> list[Tensor | None]:
    """Of a fixed sum of the output, with respect to q, k, v, hidden and the parameters."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    wanted = [call.q, call.k, call.v, call.hidden, *attention.parameters()]
    inputs = [x for x in wanted if x is not None]
    return list(torch.autograd.grad((out * weight.to(out)).sum(), inputs, allow_unused=True))


@checks
def output_equals_oracle(subject: Subject) -> None:
    """On every usable kernel the output is the masked softmax of the branches in float64, weighted and summed."""
    for kernel, device, dtype, head_dim in usable():
        attention = subject.build({"kernel": kernel}, head_dim=head_dim, dtype=dtype, device=device)
        for film, layout in FILMS.items():
            call = make(layout, head_dim=head_dim, dtype=dtype, device=device)
            with torch.no_grad():
                result, want = attention.run(call), oracle.plain(attention, call)
                expect(set(result.kernel.split(",")) <= {kernel}, f"kernel {kernel} to run", result.kernel, "run(call)")
                same(
                    result.out,
                    want,
                    bound(attention, call, want),
                    f"outputs of {kernel} on {film}",
                    "run(call) or the kernel: neither may add to, or leave out, what branches(call) says",
                )
    for name, case in CASES.items():
        attention, call = subject.build_for(case, AUTO), case.call()
        with torch.no_grad():
            want = oracle.plain(attention, call)
            change = "run(call) or the kernel: look for what only larger inputs, later layers and steps, or noise reach"
            same(attention.run(call).out, want, _exact(want), f"outputs on {name}", change)


@checks
def gradients_equal_oracle(subject: Subject) -> None:
    """On every usable kernel gradients of q, k, v, hidden and parameters are those of the oracle."""
    for kernel, device, dtype, head_dim in usable():
        attention = subject.build({"kernel": kernel}, head_dim=head_dim, dtype=dtype, device=device)
        for film in ("story", "packed", "one-frame shots"):
            call = make(FILMS[film], head_dim=head_dim, dtype=dtype, device=device, grad=True)
            got = gradients(attention, call, attention.run(call).out)
            want = gradients(attention, call, oracle.plain(attention, call))
            wide = dtype == torch.float64
            eager = want if wide else gradients(attention, call, oracle.plain(attention, call, None))
            names = ["q", "k", "v", "hidden", *(name for name, _ in attention.named_parameters())]
            for name, ours, right, rough in zip(names, got, want, eager, strict=True):
                atol = GRADIENT
                if not wide and right is not None and rough is not None:
                    atol = oracle.bound(dtype, right, rough)
                same(ours, right, atol, f"gradients of {name} by {kernel} on {film}", "run(call), or the backward")
    for film, case in CASES.items():
        attention, call = subject.build_for(case, AUTO).train(), case.call(grad=True)
        got = gradients(attention, call, attention.run(call).out)
        want = gradients(attention, call, oracle.plain(attention, call))
        names = ["q", "k", "v", "hidden", *(name for name, _ in attention.named_parameters())]
        for name, ours, right in zip(names, got, want, strict=True):
            atol = GRADIENT * (1.0 if right is None else max(1.0, float(right.abs().max())))
            same(ours, right, atol, f"gradients of {name} in training on {film}", "run(call), or the backward")


@checks
def influence_equals_mask(subject: Subject) -> None:
    """Output i depends on value j exactly where a branch's plan says so."""
    for layout in (STORY, PACKED):
        size = len(layout)
        attention = subject.build(head_dim=size)
        call = make(layout, batch=1, head_dim=size)
        # One value per channel: channel j of output i is what i takes of j. Small q keep every weight above 0.
        values = torch.eye(size, dtype=torch.float64).expand(1, KV_HEADS, -1, -1).contiguous()
        call = replace(call, q=call.q / size, v=values)
        reach = torch.zeros(1, 1, size, size, dtype=torch.bool)
        call, made = oracle.routed(attention, call)
        for branch in made:
            if isinstance(branch, Branch):
                value = oracle.inputs_of(branch, call)[2]
                read = (
                    oracle.masks(attention, call, branch).double()
                    @ (value.repeat_interleave(call.q.shape[1] // value.shape[1], dim=1) != 0).double()
                )
                read = read if branch.rows is None else oracle.at_rows(read, branch.rows)
                reach = reach | (read > 0)
            else:
                reach = reach | (branch.value != 0)
        out = attention.run(call).out != 0
        for wrong, expected, came in (
            (out & ~reach, "no influence outside of the plan", "influence"),
            (reach & ~out, "influence all over the plan", "none"),
        ):
            expect(~wrong.any(), expected, f"{came} {some(wrong)} (batch, head, query, key)", "run(call) or the plan")


@checks
def shared_keys(subject: Subject) -> None:
    """Keys and values shared by several query heads (GQA) give what copies of them give; routing is per query head."""
    crowd = CASES["many films, items and heads"]
    for attention, call in ((subject.build(), make(STORY)), (subject.build_for(crowd), crowd.call())):
        share = call.q.shape[1] // call.k.shape[1]
        copied = replace(call, k=call.k.repeat_interleave(share, dim=1), v=call.v.repeat_interleave(share, dim=1))
        same(
            attention.run(call).out,
            attention.run(copied).out,
            EXACT,
            f"outputs with keys shared by {share} heads and with copies of them",
            "query head h reads key head h // (H // Hk), in routing too",
        )


@checks
def values_of_another_width(subject: Subject) -> None:
    """Values wider or narrower than q give what the branches mean, or a ZooError."""
    attention, call = subject.build({"kernel": "reference"}), make(STORY)
    for width in (3, HEAD_DIM + 5):
        v = torch.randn(*call.v.shape[:3], width, generator=torch.Generator().manual_seed(7), dtype=call.v.dtype)
        other = replace(call, v=v)
        try:
            out = attention.run(other).out
        except ZooError:
            continue
        change = "take the width of outputs from v, or refuse another than q's"
        same(out, oracle.plain(attention, other), EXACT, f"outputs with values of width {width}", change)
        if subject.cls.reads_values is None:
            # Channels of v do not meet: those that both widths have come out the same.
            usual = attention.run(replace(call, v=torch.nn.functional.pad(v, (0, HEAD_DIM - width)))).out
            what = f"channels of values of width {width} and {HEAD_DIM}"
            same(out[..., :HEAD_DIM], usual[..., :width], EXACT, what, "what of q and k depends on the width of v")


@checks
def half_precision(subject: Subject) -> None:
    """In bfloat16 and float16 the error to float64 is bounded by that of plain softmax in the same precision."""
    long = CASES["a long film"]
    for dtype in (torch.bfloat16, torch.float16):
        calls = [(subject.build(AUTO, dtype=dtype), make(STORY, dtype=dtype))]
        calls.append((subject.build_for(long, AUTO, dtype=dtype), long.call(dtype=dtype)))
        for attention, call in calls:
            with torch.no_grad():
                out, want = attention.run(call).out, oracle.plain(attention, call)
                expect(out.dtype == dtype, f"an output in {dtype}", f"{out.dtype}", "the dtype of weights and terms")
                atol = bound(attention, call, want)
                same(out, want, atol, f"outputs in {dtype} and float64", "what run(call) rounds")


@checks
def extreme_scores(subject: Subject) -> None:
    """With scores near ±200, in float32, outputs and gradients stay finite and right."""
    attention = subject.build(AUTO, dtype=torch.float32)
    for sign in (-1.0, 1.0):
        call = make(STORY, dtype=torch.float32, grad=True)
        with torch.no_grad():
            # One direction for all q and k gives every score the same sign.
            call.q.copy_(sign * (8.0 + call.q.abs()))
            call.k.copy_(8.0 + call.k.abs())
        out, want = attention.run(call).out, oracle.plain(attention, call)
        scale = float(want.detach().abs().max())
        same(out, want, 1e-3 * scale, f"outputs with scores near {sign * 200:.0f}", "subtract the maximum before exp")
        for name, got, right in zip(
            ("q", "k", "v"), gradients(attention, call, out)[:3], gradients(attention, call, want)[:3], strict=True
        ):
            top = 1.0 if right is None else max(1.0, float(right.abs().max()))
            same(
                got,
                right,
                1e-2 * top,
                f"gradients of {name} with scores near {sign * 200:.0f}",
                "take exp(score - lse) in one piece, never exp(score) · exp(-lse)",
            )


@checks
def parameters_learn(subject: Subject) -> None:
    """Every parameter there is gets a gradient from the output itself, not from auxiliary losses alone."""
    attention = subject.build()
    named = [(name, parameter) for name, parameter in attention.named_parameters() if parameter.requires_grad]
    if not named:
        return
    call = make(STORY)
    out = attention.run(call).out
    expect(out.requires_grad, "an output that depends on the parameters", "none", "weigh a branch by what they give")
    grads = torch.autograd.grad(out.square().sum(), [parameter for _, parameter in named], allow_unused=True)
    for (name, _), grad in zip(named, grads, strict=True):
        expect(
            grad is not None and bool((grad != 0).any()),
            f"a gradient for {name}",
            "none",
            "a hard choice passes none: weigh the branch by the probability of the choice",
        )


@checks
def losses_are_scalars(subject: Subject) -> None:
    """Auxiliary losses, if any, are finite scalars in `Result.losses`, the same each time, and reach a parameter."""
    attention = subject.build()
    call = make(PACKED)
    first, second = attention.run(call).losses, attention.run(call).losses
    expect(first.keys() == second.keys(), f"losses {list(first)} on a second call", f"{list(second)}", "losses(call)")
    for name, loss in first.items():
        came = f"{tuple(loss.shape)} {loss.detach().flatten()[:3].tolist()}" if isinstance(loss, Tensor) else repr(loss)
        expect(
            isinstance(loss, Tensor) and loss.dim() == 0 and bool(torch.isfinite(loss)),
            f"losses[{name!r}] a finite scalar",
            came,
            "losses(call)",
        )
        expect(
            loss.requires_grad, f"losses[{name!r}] to carry gradient", "none", "what is detached or counted in losses"
        )
        same(second[name], loss, 0.0, f"losses[{name!r}] on a second call", "keep nothing in the module")


@checks
def features_per_token(subject: Subject) -> None:
    """`features(hidden)`, if any, are per token: some tokens alone give what they give among all, and serve so."""
    attention, call = subject.build(), make(STORY)
    assert call.hidden is not None
    features = attention.features(call.hidden)
    if not features:
        return
    rows = torch.arange(0, len(STORY), 3)
    change = "features(hidden) may not mix tokens: they are computed where the tokens are, and gathered"
    for name, some_tokens in attention.features(call.hidden[:, rows]).items():
        same(some_tokens, features[name][:, rows], EXACT, f"features {name!r} of some tokens and of all", change)
    given = attention.run(replace(call, features=features, hidden=None))
    change = "route by call.features where they are given"
    same(given.out, attention.run(call).out, EXACT, "outputs from features and from hidden", change)
