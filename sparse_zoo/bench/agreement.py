"""No time for a kernel that errs: what it must agree with before it is timed."""

from __future__ import annotations

import torch
from torch import Tensor

import sparse_zoo as zoo
from sparse_zoo.plan import Plan
from sparse_zoo.testing import large

FILM = zoo.Layout.film([zoo.Shot(2, 6, 9, text=3)] * 8, caption=2)
"""890 tokens, every row of which is checked."""


def gate(attention: zoo.Attention, q: Tensor, k: Tensor, v: Tensor, film: zoo.Layout, hidden: Tensor) -> str:
    """Why a method on its kernel may not be timed on these tensors; empty where it may.

    Out, lse and gradients of each of its plans, by the rule of `sparse_zoo.testing.large`: every row on a small film,
    then, on the very tensors that are to be timed, sampled queries and keys against gathered float64. A method that
    hands several plans to the kernel at once must give the weighted sum of what they give alone.
    """
    few = large.Inputs.random(len(FILM), 1, 1, q.shape[3], q.dtype, q.device, seed=0)
    draw = torch.Generator(q.device).manual_seed(1)
    some_hidden = torch.randn(1, len(FILM), hidden.shape[-1], device=q.device, generator=draw)
    own = large.Inputs(
        q.detach(),
        k.detach(),
        v.detach(),
        large.Inputs.random(len(film), q.shape[1], k.shape[1], q.shape[3], q.dtype, q.device, seed=2).grad,
    )
    for given, layout, context, whole in ((few, FILM, some_hidden, True), (own, film, hidden, False)):
        found = _wrong(attention, given, layout.to(q.device), context, whole)
        if found:
            return f"on {len(layout)} tokens: {found}"
    return ""


def _wrong(attention: zoo.Attention, given: large.Inputs, film: zoo.Layout, hidden: Tensor, whole: bool) -> str:
    with torch.no_grad():
        result = attention(*given[:3], film, hidden=hidden)
    findings = []
    for plan in result.plans:
        inputs = _fitting(given, plan)
        got = large.run(result.kernel, plan, inputs)
        findings += large.judge_whole(got, plan, inputs) if whole else large.Sampled(plan, inputs).judge(got)
        del got
    return large.failures(findings + _sum(attention, given, film, hidden))


def _fitting(given: large.Inputs, plan: Plan) -> large.Inputs:
    """A coarse branch has fewer queries and keys: for them, the first of these do as well.

    One of several segments has more keys than there are tokens: the first serve again.
    """
    queries, keys = plan.shape
    q, k, v, grad = given
    place = torch.arange(keys, device=k.device) % k.shape[2]
    k, v = (x[:, :, :keys] if keys <= x.shape[2] else x[:, :, place] for x in (k, v))
    return large.Inputs(q[:, :, :queries], k, v, grad[:, :, :queries])


def _sum(attention: zoo.Attention, given: large.Inputs, film: zoo.Layout, hidden: Tensor) -> list[large.Finding]:
    """Of a method whose branches share q, k and v: its output and gradients against the sum of its branches alone."""
    q, k, v = (x.detach().requires_grad_() for x in given[:3])
    call = attention.ready(zoo.Call(q, k, v, film, hidden=hidden))
    branches = attention.branches(call)
    if len(branches) < 2 or attention.text_reads != "method":
        return []
    total: Tensor | None = None
    for branch in branches:
        if not isinstance(branch, zoo.Branch) or not branch.of_tokens:
            return []
        part = branch.weight * zoo.attend(q, k, v, branch.plan, kernel=attention.kernel).out
        total = part if total is None else total + part
    assert total is not None
    want = [total, *torch.autograd.grad(total, (q, k, v), given.grad)]
    together = attention.run(call).out
    got = [together, *torch.autograd.grad(together, (q, k, v), given.grad)]
    return [
        large.compare(f"sum of {what}", x.detach(), y.detach().double(), y.detach())
        for what, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True)
    ]
