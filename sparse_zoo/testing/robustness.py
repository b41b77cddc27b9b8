"""Checks of what happens around a method: odd films, odd memory, seeds, copies, autocast, compiling, recomputing."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from sparse_zoo.attention import Attention, Branch, Call, Result
from sparse_zoo.errors import ZooError
from sparse_zoo.kernels import _kernels
from sparse_zoo.kernels.base import Kernel
from sparse_zoo.layout import Layout, Shot
from sparse_zoo.plan import Plan
from sparse_zoo.testing import oracle
from sparse_zoo.testing.results import EXACT, bound
from sparse_zoo.testing.subject import AUTO, CASES, PACKED, RAGGED, STORY, Subject, make
from sparse_zoo.testing.suite import Checks, Skip, expect, fail, same

checks: Checks[Subject] = Checks()


def tensors(call: Call) -> dict[str, Tensor]:
    """Those of q, k, v and hidden that the call holds, by name."""
    found = {"q": call.q, "k": call.k, "v": call.v}
    return found if call.hidden is None else found | {"hidden": call.hidden}


def total(result: Result) -> Tensor:
    """A scalar that depends on all that a result holds."""
    value: Tensor = result.out.square().sum()
    for loss in result.losses.values():
        value = value + loss
    return value


@checks
def ragged_films(subject: Subject) -> None:
    """One-frame shots, empty captions, one token, text alone, sizes that no tile divides: finite, forward and back."""
    attention = subject.build(AUTO)
    for film, layout in RAGGED.items():
        call = make(layout, grad=True)
        result = attention.run(call)
        expect(
            result.out.shape == call.q.shape,
            f"an output of shape {tuple(call.q.shape)} on {film}",
            f"{tuple(result.out.shape)}",
            "sizes taken from somewhere else than the layout",
        )
        given = tensors(call)
        grads = torch.autograd.grad(total(result), list(given.values()), allow_unused=True)
        for name, x in (
            ("output", result.out),
            *((f"gradient of {n}", g) for n, g in zip(given, grads, strict=True)),
        ):
            expect(
                x is None or bool(torch.isfinite(x).all()),
                f"finite numbers on {film}",
                f"NaN or infinity in {name}",
                "means and shares of empty pieces",
            )


@checks
def inputs_untouched(subject: Subject) -> None:
    """q, k, v, hidden and q_rows are as they were after a forward and backward pass."""
    attention, call = subject.build(AUTO), make(STORY, grad=True)
    given = tensors(call)
    before = {name: x.detach().clone() for name, x in given.items()}
    total(attention.run(call)).backward()
    for name, x in given.items():
        expect(torch.equal(x.detach(), before[name]), f"{name} untouched", "written to", "the operation in place")


@checks
def strided_inputs(subject: Subject) -> None:
    """Non-contiguous q, k, v (cut from one projection, heads last in memory) give what contiguous ones give."""
    attention, call = subject.build(AUTO), make(STORY, grad=True)
    strided = replace(call, q=_heads_last(call.q), k=_heads_last(call.k), v=_heads_last(call.v))
    out, want = attention.run(strided).out, attention.run(call).out
    change = "reshape instead of view; strides from the tensors"
    same(out, want, EXACT, "outputs of strided and contiguous inputs", change)
    weight = torch.randn(out.shape, dtype=out.dtype)
    grads = (torch.autograd.grad((x * weight).sum(), [c.q, c.k, c.v]) for x, c in ((out, strided), (want, call)))
    for name, ours, right in zip("qkv", *grads, strict=True):
        same(ours, right, EXACT, f"gradients of strided and contiguous {name}", change)


def _heads_last(x: Tensor) -> Tensor:
    """The same numbers in memory of (B, L, H, 2·D), of which half is read."""
    batch, heads, length, dim = x.shape
    wide = x.new_zeros(batch, length, heads, 2 * dim)
    wide[..., ::2] = x.detach().transpose(1, 2)
    return wide[..., ::2].transpose(1, 2).requires_grad_(x.requires_grad)


@checks
def deterministic(subject: Subject) -> None:
    """In training, the same seed and step give the same bits, whatever torch's global generator holds or is left at."""
    attention, call = subject.build(AUTO).train(), make(STORY, seed=3, step=5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(10)
        first = attention.run(call).out
        untouched = torch.rand(1)
        torch.manual_seed(10)
        expect(
            torch.equal(untouched, torch.rand(1)),
            "torch's global generator untouched",
            "numbers drawn from it",
            "draw from torch.Generator().manual_seed of call.seed, step, layer and head",
        )
        torch.manual_seed(99)
        second = attention.run(call).out
    expect(
        torch.equal(first, second),
        "the same bits on a second call",
        f"a difference of {float((first - second).detach().abs().max()):.3g}",
        "draw by call.seed, call.step and call.layer alone",
    )


@checks
def draws_recomputed(subject: Subject) -> None:
    """In training, a call gives the same after calls of other seeds, steps, layers and films."""
    attention, call = subject.build(AUTO).train(), make(STORY, seed=3, step=5, layer=1, layers=3)
    first = attention.run(call)
    for other in (replace(call, step=6), replace(call, layer=2), replace(call, seed=4), make(PACKED, step=5)):
        attention.run(other)
    again = attention.run(call)
    for mine, other_plan in zip(first.plans, again.plans, strict=True):
        expect(
            torch.equal(oracle.mask_of(mine), oracle.mask_of(other_plan)),
            "the same plan when recomputed",
            "another",
            "make draws functions of (seed, step, layer, head, token); count no calls",
        )
    same(again.out, first.out, 0.0, "outputs of one call before and after others", "keep nothing between calls")


@checks
def eval_draws_nothing(subject: Subject) -> None:
    """In eval mode the output does not depend on seed and step: randomness is for training."""
    attention = subject.build().eval()
    outs = [attention.run(make(STORY, step=step)).out for step in (0, 1, None, 1001, 1_234_567)]
    outs.append(attention.run(replace(make(STORY, step=1), seed=8)).out)
    for out in outs[1:]:
        same(out, outs[0], 0.0, "outputs in eval mode at other seeds and steps", "draw only where self.training")


@checks
def training_is_evaluation(subject: Subject) -> None:
    """At the settings that `same_in_training` declares, outputs, plans and losses are those of evaluation."""
    settings = subject.cls.same_in_training
    if isinstance(settings, str):
        raise Skip(f"same_in_training: {settings}")
    change = "use self.training for nothing but the draws that same_in_training switches off"
    calls = [(subject.build(settings), make(STORY, step=5, seed=3))]
    calls += [(subject.build_for(case, settings), case.call(seed=3)) for case in CASES.values()]
    for attention, call in calls:
        with torch.no_grad():
            trained, judged = attention.train().run(call), attention.eval().run(call)
        for mine, other in zip(trained.plans, judged.plans, strict=True):
            expect(
                torch.equal(oracle.mask_of(mine), oracle.mask_of(other)),
                "the plans of evaluation in training",
                "others",
                change,
            )
        same(trained.out, judged.out, EXACT, "outputs in training and in evaluation", change)
        expect(
            trained.losses.keys() == judged.losses.keys(), f"losses {[*judged.losses]}", f"{[*trained.losses]}", change
        )
        for name, loss in trained.losses.items():
            same(loss, judged.losses[name], EXACT, f"losses[{name!r}] in training and in evaluation", change)


@checks
def leaves_no_state(subject: Subject) -> None:
    """A forward pass leaves the module as it was: no attribute, buffer or parameter changes."""
    attention = subject.build().train()
    before = _state(attention)
    for layout in (STORY, PACKED):
        total(attention.run(make(layout, step=2, grad=True))).backward()
    for parameter in attention.parameters():
        parameter.grad = None
    after = _state(attention)
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    expect(
        not changed,
        "a module as it was before",
        f"changes in {', '.join(changed)}",
        "return it in the Result (losses, plans), or remember it by layout outside of the module",
    )


def _state(attention: Attention) -> dict[str, bytes]:
    """Every attribute of every module, as bytes that compare."""
    hidden = {"_parameters", "_buffers", "_modules"}
    state = {
        f"{path}.{key}".lstrip("."): pickle.dumps(value)
        for path, module in attention.named_modules()
        for key, value in vars(module).items()
        if key not in hidden
    }
    named = [*attention.named_parameters(), *attention.named_buffers()]
    return state | {name: pickle.dumps(x.detach().tolist()) for name, x in named}


@checks
def state_dict_restores(subject: Subject) -> None:
    """A state dict, saved and loaded into a fresh module, gives the same output."""
    attention, call = subject.build(), make(STORY)
    want = attention.run(call).out
    file = io.BytesIO()
    torch.save(attention.state_dict(), file)
    file.seek(0)
    fresh = subject.build(start=2)
    try:
        fresh.load_state_dict(torch.load(file, weights_only=True))
    except (RuntimeError, pickle.UnpicklingError) as error:
        fail("a state dict that loads", str(error), "parameters and buffers made in __init__, of fixed shape")
    same(fresh.run(call).out, want, 0.0, "outputs after loading", "register what forward needs")


@checks
def copies_and_pickles(subject: Subject) -> None:
    """deepcopy and pickle give a module with the same output, before and after it has run."""
    attention, call = subject.build(AUTO), make(STORY)
    ways: dict[str, Callable[[Attention], Attention]] = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    }
    fresh = {}
    want: Tensor | None = None
    for when in ("before", "after"):
        for name, way in ways.items():
            try:
                fresh[f"{name} {when} a run"] = way(attention)
            except (TypeError, AttributeError, pickle.PicklingError, RuntimeError) as error:
                fail(
                    f"{name} to copy it", f"{type(error).__name__}: {error}", "lambdas, handles or graphs on the module"
                )
        want = attention.run(call).out
    for name, module in fresh.items():
        same(module.run(call).out, want, 0.0, f"outputs of a {name}", "what copying leaves out")


@checks
def autocast(subject: Subject) -> None:
    """Under autocast to bfloat16 it chooses as without; gives q's dtype, what its branches mean, finite gradients."""
    attention, long = subject.build(AUTO, dtype=torch.float32), replace(CASES["a long film"], heads=8, kv_heads=2)
    # Of many keys close to each other, half precision takes others for the nearest.
    close = replace(long, k_offset=2.0)
    for chooses, given in (
        (attention, make(STORY, dtype=torch.float32)),
        (subject.build_for(close, dtype=torch.float32), close.call(dtype=torch.float32)),
        (subject.build_for(long, dtype=torch.float32).train(), long.call(dtype=torch.float32)),
    ):
        call, plain = oracle.routed(chooses, given)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                narrowed = chooses.branches(call)
            for mine, other in zip(narrowed, plain, strict=True):
                if not (isinstance(mine, Branch) and isinstance(other, Branch)):
                    continue
                for narrow, wide in zip(mine.key_sets, other.key_sets, strict=True):
                    expect(
                        torch.equal(narrow.plan.dense_mask(), wide.plan.dense_mask()),
                        f"the same plan from the same q, k and features under autocast to {dtype}",
                        "another",
                        "take what decides under torch.autocast(device, enabled=False): it narrows .float() too",
                    )
    for dtype in (torch.float32, torch.bfloat16):
        call = make(STORY, dtype=dtype, grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = attention.run(call)
            routed, branches = oracle.routed(attention, call)
        want = oracle.plain(attention, routed, branches=branches)
        # Under autocast a kernel's own products may be taken in bfloat16.
        atol = max(bound(attention, routed, want, branches), 0.02 * float(want.detach().abs().max()))
        expect(result.out.dtype == dtype, f"an output in {dtype}", f"{result.out.dtype}", "the dtype of the weights")
        same(result.out, want, atol, f"outputs under autocast from {dtype}", "score and pool in float32")
        for name, loss in result.losses.items():
            expect(torch.isfinite(loss).all(), f"losses[{name!r}] finite", "NaN or infinity", "what autocast rounds")
        total(result).backward()
        for name, x in tensors(call).items():
            expect(
                x.grad is None or bool(torch.isfinite(x.grad).all()),
                f"finite gradients of {name}",
                "NaN or infinity",
                "what autocast rounds on the way",
            )


@checks
def compiles(subject: Subject) -> None:
    """torch.compile around it changes neither output nor gradients (backend "eager": graphs are cut, not generated)."""
    attention, call = subject.build(AUTO), make(STORY, grad=True)
    given = list(tensors(call).values())

    def step(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        result: Result = attention(q, k, v, STORY, hidden=hidden)
        return 2 * result.out

    torch.compiler.reset()
    results = [function(*given) for function in (step, torch.compile(step, backend="eager"))]
    change = "decorate what dynamo cannot follow with torch.compiler.disable"
    same(results[1], results[0], EXACT, "outputs compiled and not", change)
    grads = [torch.autograd.grad(result.square().sum(), given, allow_unused=True) for result in results]
    for name, ours, right in zip(tensors(call), grads[1], grads[0], strict=True):
        same(ours, right, EXACT, f"gradients of {name} compiled and not", change)


@checks
def checkpointing(subject: Subject) -> None:
    """Under activation checkpointing, routing recomputed in the backward pass is the same, and so are gradients."""
    attention, call = subject.build(AUTO).train(), make(STORY, grad=True, seed=3, step=5)
    given = list(tensors(call).values())
    seen: list[list[Plan]] = []

    def step(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        result = attention.run(replace(call, q=q, k=k, v=v, hidden=hidden))
        seen.append(result.plans)
        return total(result)

    def grads(value: Tensor) -> Sequence[Tensor | None]:
        wanted = [*given, *attention.parameters()]
        return torch.autograd.grad(value, wanted, allow_unused=True)

    plain = grads(step(*given))
    seen.clear()
    with set_checkpoint_early_stop(False):
        # Its own draws must repeat by themselves: the state of the global generator is not put back.
        value: Any = checkpoint(step, *given, use_reentrant=False, preserve_rng_state=False)
        again = grads(value)
    change = "draw by call.seed, step and layer; keep nothing between calls"
    expect(len(seen) == 2, "one forward and one recomputation", f"{len(seen)} runs", change)
    for mine, other in zip(*seen, strict=True):
        expect(
            torch.equal(oracle.mask_of(mine), oracle.mask_of(other)), "the same plan when recomputed", "another", change
        )
    for number, (ours, right) in enumerate(zip(again, plain, strict=True)):
        same(ours, right, EXACT, f"gradient {number} with and without checkpointing", change)


fresh = itertools.count()


@checks
def inference_then_training(subject: Subject) -> None:
    """What a run in inference mode left behind serves training: validation may come first."""
    attention = subject.build(AUTO)
    # What is remembered is remembered by layout: this must be one that nothing has run on.
    layout = Layout.film([Shot(2, 3, 4, 2), Shot(3, 2, 2, next(fresh) % 64)], caption=3)
    with torch.inference_mode():
        first = attention.run(make(layout))
        first.cost()
    call = make(layout, grad=True)
    try:
        result = attention.run(call)
        total(result).backward()
    except RuntimeError as error:
        fail("a backward pass after inference mode", str(error), "remember tensors with sparse_zoo.remember")
    same(result.out, first.out.clone(), EXACT, "outputs in training and in inference mode", "what grad mode changes")


class Refuses(Kernel):
    """A kernel that cannot run, for two reasons."""

    name = "refuses"
    reasons: ClassVar[list[str]] = ["it needs a device that nobody has", "it is Sunday"]

    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:  # noqa: ARG002
        """The two reasons, whatever is asked."""
        return self.reasons

    def run(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
        """Never reached: `why_not` refuses."""
        raise NotImplementedError

    def executed(self, plan: Plan, batch: int, heads: int) -> int:
        """Never reached: `why_not` refuses."""
        raise NotImplementedError


@checks
def named_kernel_refuses(subject: Subject) -> None:
    """A kernel asked by name that cannot run raises with every reason; an unknown name is refused when it is made."""
    call = make(STORY)
    with patch.dict(_kernels, {Refuses.name: Refuses()}):
        attention = subject.build({"kernel": Refuses.name})
        try:
            used = attention.run(call).kernel
        except ZooError as error:
            missing = [reason for reason in Refuses.reasons if reason not in str(error)]
            expect(not missing, f"the reasons {Refuses.reasons}", str(error), "raise what attend raises")
        else:
            fail(
                "a ZooError for a kernel that cannot run", f"a result by {used!r}", "pass kernel=self.kernel to attend"
            )
    try:
        subject.build({"kernel": "no_such_kernel"})
    except ZooError:
        return
    fail("a ZooError for an unknown kernel", "a module", "pass **base on to Attention.__init__")


@checks
def bad_input_refused(subject: Subject) -> None:
    """q, k, v and hidden that do not fit the layout are refused with a ZooError."""
    attention, call = subject.build(), make(STORY)
    q, k, v, hidden = call.q, call.k, call.v, call.hidden
    for what, bad in {
        "q one token short": (q[:, :, :-1], k, v, hidden),
        "k and v one token short": (q, k[:, :, :-1], v[:, :, :-1], hidden),
        "three query heads for two key heads": (q[:, :3], k, v, hidden),
        "hidden one token short": (q, k, v, None if hidden is None else hidden[:, :-1]),
    }.items():
        try:
            attention(*bad[:3], STORY, hidden=bad[3])
        except ZooError:
            continue
        fail(f"a ZooError for {what}", "a result", "make a Call of what forward is given")
