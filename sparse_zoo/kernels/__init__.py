"""Kernels compute a plan: (q, k, v, plan) -> (out, lse). They know no method."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_zoo.errors import refuse, unknown
from sparse_zoo.kernels import automatic
from sparse_zoo.kernels.automatic import RULES
from sparse_zoo.kernels.base import Kernel
from sparse_zoo.kernels.exact import Exact
from sparse_zoo.kernels.flash_attn import FlashAttn
from sparse_zoo.kernels.flex import Flex
from sparse_zoo.kernels.grouped import Cpu
from sparse_zoo.kernels.reference import Reference
from sparse_zoo.kernels.triton import Cudnn, Triton
from sparse_zoo.kernels.varlen import TorchVarlen
from sparse_zoo.kernels.xformers import XFormers
from sparse_zoo.light import opaque
from sparse_zoo.plan import Plan

_kernels: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (TorchVarlen(), Triton(), Cudnn(), FlashAttn(), XFormers(), Flex(), Cpu(), Exact(), Reference())
}


class Attended(NamedTuple):
    """out (B, H, Lq, D), lse (B, H, Lq) natural log, float32 or wider, no gradient; the kernel that ran."""

    out: Tensor
    lse: Tensor
    kernel: str


def kernels() -> dict[str, list[str]]:
    """Every kernel, with the reasons why it cannot run here: none if it can."""
    return {name: kernel.why_not() for name, kernel in _kernels.items()}


def names() -> list[str]:
    """What `kernel=` takes."""
    return ["auto", *_kernels]


def register_kernel(kernel: Kernel) -> None:
    """Make a kernel known by its `name`: `kernel=name` takes it, "auto" does not.

    Raises `ZooError` if it is no `Kernel` or its name is taken.
    """
    refuse("register_kernel", [f"{kernel!r} is not a sparse_zoo.Kernel"] if not isinstance(kernel, Kernel) else [])
    name = getattr(kernel, "name", None)
    refuse(
        f"register_kernel({type(kernel).__name__}())",
        [
            f"name must be lower-case letters, digits and underscores, got {name!r}"
            if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name)
            else "",
            f"the name {name!r} is taken; taken are: {', '.join(names())}" if name in names() else "",
        ],
    )
    _kernels[kernel.name] = kernel


def get(name: str) -> Kernel:
    """A kernel by name; raises `ZooError` with the nearest name and the list."""
    refuse("sparse_zoo", [unknown("kernel", name, _kernels)] if name not in _kernels else [])
    return _kernels[name]


@opaque
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    kernel: str = "auto",
    scale: float | None = None,
    check: bool = False,
) -> Attended:
    """Softmax attention over a plan: q (B, H, Lq, D), k, v (B, Hk, Lk, D), one dtype and device, H % Hk == 0.

    `scale` is D^-0.5 by default. "auto" takes the first of `automatic.RULES` that fits these tensors; a kernel asked
    by name runs or raises `ZooError` with every reason. `check` also checks that the plan holds no pair twice.
    """
    refuse("attend", _mismatches(q, k, v, plan))
    if check:
        plan.validate()
    chosen = _choose(kernel, q, v)
    refuse(f"kernel {chosen!r}", _unweighed(chosen, plan))
    out, lse = _kernels[chosen].run(q, k, v, plan, q.shape[-1] ** -0.5 if scale is None else scale)
    return Attended(out, lse, chosen)


@opaque
def attend_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plans: Sequence[Plan],
    weights: Sequence[Tensor | float],
    *,
    kernel: str = "auto",
    scale: float | None = None,
) -> tuple[Tensor, str]:
    """Σ weight · attend(q, k, v, plan).out over the plans, (B, H, Lq, D), and the kernel that ran.

    Weights are numbers or tensors that broadcast to the output. Arguments and errors are those of `attend`.
    """
    for plan in plans:
        refuse("attend", _mismatches(q, k, v, plan))
    chosen = _choose(kernel, q, v)
    refuse(f"kernel {chosen!r}", [reason for plan in plans for reason in _unweighed(chosen, plan)])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _kernels[chosen].run_sum(q, k, v, plans, weights, scale), chosen


def _unweighed(kernel: str, plan: Plan) -> list[str]:
    """Why a kernel would leave the log-weights of a plan out."""
    if _kernels[kernel].weighs_keys or not plan.weighs_keys:
        return []
    weighing = ", ".join(name for name, other in _kernels.items() if other.weighs_keys)
    return [f"the plan has log-weights of keys, which it does not add to scores; kernels that do: {weighing}"]


def _choose(kernel: str, q: Tensor, v: Tensor) -> str:
    """The kernel for these tensors; raises `ZooError` with every reason where none is."""
    if kernel != "auto":
        refuse(f"kernel {kernel!r}", get(kernel).why_not(q, v))
        return kernel
    chosen = _automatic(q, v)
    if not chosen:
        reasons = {
            rule.kernel: _kernels[rule.kernel].why_not(q, v)
            or [f'"auto" takes it on {rule.device} alone, for head dims: {rule.described()}']
            for rule in RULES
        }
        refuse("no kernel can run this", [f"{name}: {'; '.join(why)}" for name, why in reasons.items()])
    return chosen


def _automatic(q: Tensor, v: Tensor) -> str:
    """What "auto" takes for these tensors: the first rule that fits them and whose kernel can run; "" for none."""
    device, capability = automatic.place(q)
    return next(
        (
            rule.kernel
            for rule in RULES
            if rule.takes(device, capability, q.dtype, q.shape[-1]) and not _kernels[rule.kernel].why_not(q, v)
        ),
        "",
    )


def routes_on_device(kernel: str, q: Tensor, v: Tensor) -> bool:
    """Whether Triton's kernels attend to these tensors: then they choose chunks too. No other kernel needs Triton."""
    return isinstance(_kernels.get(_automatic(q, v) if kernel == "auto" else kernel), Triton)


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Exact merge of attentions over disjoint key sets: outs (…, L, D), lses (…, L) -> (out, lse)."""
    table = torch.stack(list(lses))
    lse = table.logsumexp(0)
    # Where no set had a key there is nothing to weigh: -inf - -inf is no weight.
    weights = (table - lse.masked_fill(lse == -torch.inf, 0)).exp()
    stacked = torch.stack(list(outs))
    return (weights[..., None].to(stacked.dtype) * stacked).sum(0), lse


def _mismatches(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> list[str]:
    given = f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        return [f"q, k, v must have four dimensions; {given}"]
    batch, heads = plan.batch_heads
    return [
        f"the plan is for {plan.shape[0]} queries and {plan.shape[1]} keys; {given}"
        if plan.shape != (q.shape[2], k.shape[2])
        else "",
        f"the plan tells {batch} batch items and {heads} heads apart; {given}"
        if batch not in (1, q.shape[0]) or heads not in (1, q.shape[1])
        else "",
        f"k and v must agree, q and k in batch and head dim, heads of q be a multiple of those of k; {given}"
        if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]
        else "",
        f"q, k, v must share dtype and device, got {[(x.dtype, str(x.device)) for x in (q, k, v)]}"
        if len({(x.dtype, x.device) for x in (q, k, v)}) > 1
        else "",
        *(
            f"the log-weights of part {i} are {tuple(part.log_weight.shape)}; {given}"
            for i, part in enumerate(plan.parts)
            if part.log_weight is not None
            and (part.log_weight.shape[0] not in (1, q.shape[0]) or part.log_weight.shape[1] not in (1, q.shape[1]))
        ),
    ]
