"""A plain kernel, part by part with a backward of its own, and broken ones made of it by one change each."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_zoo.kernels.base import Kernel
from sparse_zoo.light import broadcast_shapes
from sparse_zoo.plan import Plan
from sparse_zoo.testing import oracle
from sparse_zoo.testing.kernels import GRID
from sparse_zoo.testing.mutants.base import mutant


class Plain(Kernel):
    """Unbroken: softmax of each part of a plan on its dense mask, merged by log-sum-exp; small streams."""

    name: ClassVar[str] = "plain"

    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:
        reasons = []
        if q is not None and not q.is_floating_point():
            reasons.append(f"dtype {q.dtype} is not a floating-point type")
        if q is not None and v is not None and v.shape[-1] != q.shape[-1]:
            reasons.append(f"head dim of v ({v.shape[-1]}) differs from that of q ({q.shape[-1]})")
        return reasons

    def run(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
        wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v)]
        out, lse = _Parts.apply(*(self.read(x) for x in wide), plan, self, scale)
        return out.to(q.dtype), lse

    def executed(self, plan: Plan, batch: int, heads: int) -> int:
        return batch * heads * len(plan.parts) * plan.shape[0] * plan.shape[1]

    # -- the steps, each of which a mutant may break

    def read(self, x: Tensor) -> Tensor:
        return x

    def shared(self, x: Tensor, heads: int) -> Tensor:
        """Keys or values (B, Hk, L, D) for each query head."""
        return x.repeat_interleave(heads // x.shape[1], dim=1)

    def masks(self, plan: Plan) -> list[Tensor]:
        return [part.mask() for part in plan.parts]

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        return q @ k.transpose(-1, -2) * scale

    def total(self, lses: list[Tensor]) -> Tensor:
        return torch.stack(torch.broadcast_tensors(*lses)).logsumexp(0)

    def weights(self, scores: Tensor, mask: Tensor, lse: Tensor) -> Tensor:
        """exp(score - lse) on the mask; no weight where a query has no keys."""
        return torch.where(mask, scores - lse[..., None].nan_to_num(neginf=0.0), -torch.inf).exp()

    def lse_for_backward(self, own: Tensor, total: Tensor) -> Tensor:  # noqa: ARG002
        return total

    def probabilities(self, scores: Tensor, mask: Tensor, lse: Tensor) -> Tensor:
        """The weights of the backward pass."""
        return self.weights(scores, mask, lse)

    def grads(self, p: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, scale: float) -> Any:
        ds = p * (grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * scale
        return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, kernel: Plain, scale: float
    ) -> tuple[Tensor, Tensor]:
        keys, values = kernel.shared(k, q.shape[1]), kernel.shared(v, q.shape[1])
        scores, masks = kernel.scores(q, keys, scale), kernel.masks(plan)
        lses = [torch.where(mask, scores, -torch.inf).logsumexp(-1) for mask in masks]
        lse = kernel.total(lses).expand(q.shape[:3]).contiguous()
        out = torch.zeros_like(q)
        for mask in masks:
            out = out + kernel.weights(scores, mask, lse) @ values
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.given = plan, kernel, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        plan, kernel, scale = ctx.given
        keys, values = kernel.shared(k, q.shape[1]), kernel.shared(v, q.shape[1])
        scores = kernel.scores(q, keys, scale)
        total = [torch.zeros_like(x) for x in (q, keys, values)]
        for mask in kernel.masks(plan):
            own = torch.where(mask, scores, -torch.inf).logsumexp(-1)
            p = kernel.probabilities(scores, mask, kernel.lse_for_backward(own, lse))
            total = [a + b for a, b in zip(total, kernel.grads(p, q, keys, values, out, grad, scale), strict=True)]
        # The gradient of a copy is the sum over the copies, however they were made.
        dq, dk, dv = total
        with torch.enable_grad():
            ks, vs = (x.detach().requires_grad_() for x in (k, v))
            dk = torch.autograd.grad(kernel.shared(ks, q.shape[1]), ks, dk)[0]
            dv = torch.autograd.grad(kernel.shared(vs, q.shape[1]), vs, dv)[0]
        return dq, dk, dv, None, None, None


@mutant("kernel_gradients", "kernel_overlapping_keys", "kernel_drawn_plans")
class LocalLseBackward(Plain):
    """The backward of each part takes the part's own log-sum-exp; the forward is exact."""

    def lse_for_backward(self, own: Tensor, total: Tensor) -> Tensor:  # noqa: ARG002
        return own


@mutant("kernel_extreme_scores")
class ExpOfMinusLse(Plain):
    """The backward multiplies exp(score) by exp(-lse), which overflows with scores near -200."""

    def probabilities(self, scores: Tensor, mask: Tensor, lse: Tensor) -> Tensor:
        return torch.where(mask, scores.exp() * (-lse)[..., None].exp(), 0.0)


@mutant("kernel_extreme_scores")
class NoMaximum(Plain):
    """The forward sums exp(score) as it is."""

    def total(self, lses: list[Tensor]) -> Tensor:
        return torch.stack(torch.broadcast_tensors(*lses)).exp().sum(0).log()


@mutant("kernel_outputs", "kernel_scale")
class UnscaledLogits(Plain):
    """Scores are not scaled."""

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:  # noqa: ARG002
        return super().scores(q, k, 1.0)


@mutant("kernel_scale", "kernel_gradients")
class ScaleLeftOutOfTheBackward(Plain):
    """Gradients of q and k lack the factor of the scale."""

    def grads(self, p: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, scale: float) -> Any:  # noqa: ARG002
        return super().grads(p, q, k, v, out, grad, 1.0)


@mutant("kernel_scale")
class ScaleOfItsOwn(Plain):
    """The scale is always that of the head dim, whatever is asked for."""

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:  # noqa: ARG002
        return super().scores(q, k, q.shape[-1] ** -0.5)


@mutant("kernel_gradients")
class NoDelta(Plain):
    """The backward forgets the normaliser's share, grad · out."""

    def grads(self, p: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, scale: float) -> Any:
        return super().grads(p, q, k, v, torch.zeros_like(out), grad, scale)


@mutant("kernel_heads_apart", "kernel_outputs")
class FirstHeadsPlan(Plain):
    """All batch items and heads run the plan of the first."""

    def masks(self, plan: Plan) -> list[Tensor]:
        return [mask[:1, :1] for mask in super().masks(plan)]


@mutant("kernel_heads_apart")
class SwappedHeadsPlan(Plain):
    """Heads run one another's plans."""

    def masks(self, plan: Plan) -> list[Tensor]:
        return [mask.flip(1) for mask in super().masks(plan)]


@mutant("kernel_shared_keys", "kernel_gradients")
class SharedKeysInTurn(Plain):
    """Query head h reads key head h % Hk."""

    def shared(self, x: Tensor, heads: int) -> Tensor:
        return x.repeat(1, heads // x.shape[1], 1, 1)


@mutant("kernel_overlapping_keys", "kernel_outputs")
class LastPartLost(Plain):
    """The last part of a plan is left out."""

    def masks(self, plan: Plan) -> list[Tensor]:
        return super().masks(plan)[: max(1, len(plan.parts) - 1)]


@mutant("kernel_overlapping_keys")
class PartsAveraged(Plain):
    """Parts are averaged as if each held as much weight."""

    def total(self, lses: list[Tensor]) -> Tensor:
        some = [lse for lse in torch.broadcast_tensors(*lses) if bool(torch.isfinite(lse).any())]
        return super().total(some or lses) - torch.log(torch.tensor(1.0 + 0.5 * (len(some) > 1)))


@mutant("kernel_empty_queries")
class EmptyIsNaN(Plain):
    """A query without keys is divided by an empty sum."""

    def weights(self, scores: Tensor, mask: Tensor, lse: Tensor) -> Tensor:
        return torch.where(mask, scores, -torch.inf).sub(lse[..., None]).exp()


@mutant("kernel_empty_queries")
class EmptyReadsAll(Plain):
    """A query without keys reads all of them."""

    def masks(self, plan: Plan) -> list[Tensor]:
        masks = super().masks(plan)
        nothing = ~oracle.mask_of(plan).any(-1, keepdim=True)
        return [masks[0] | nothing, *masks[1:]]


@mutant("kernel_log_sum_exp")
class LseInBaseTwo(Plain):
    """lse is a logarithm to base 2."""

    def run(self, *given: Any) -> tuple[Tensor, Tensor]:
        out, lse = super().run(*given)
        return out, lse / torch.log(torch.tensor(2.0))


@mutant("kernel_log_sum_exp")
class LseInHalf(Plain):
    """lse is rounded to half precision."""

    def run(self, *given: Any) -> tuple[Tensor, Tensor]:
        out, lse = super().run(*given)
        return out, lse.half()


@mutant("kernel_many_rectangles")
class GridOverflows(Plain):
    """Rectangles past the 65,535th are never launched."""

    def run(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = super().run(q, k, v, plan, scale)
        row = torch.arange(out[..., 0].numel()).view(out.shape[:3])
        return torch.where((row < GRID)[..., None], out, 0.0), lse


@mutant("kernel_half_precision")
class SumsInHalf(Plain):
    """bfloat16 and float16 are rounded to sixteenths on the way."""

    def run(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
        if q.dtype in (torch.bfloat16, torch.float16):
            q, k, v = ((x * 16).round() / 16 for x in (q, k, v))
        return super().run(q, k, v, plan, scale)


@mutant("kernel_inputs")
class ScalesQInPlace(Plain):
    """q is scaled where it lies."""

    def read(self, x: Tensor) -> Tensor:
        x.data.mul_(1.0 + 1e-6)
        return x


@mutant("kernel_inputs")
class TakesMemoryInOrder(Plain):
    """Memory is read as if it were contiguous."""

    def read(self, x: Tensor) -> Tensor:
        return x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())


@mutant("kernel_executed")
class CountsNoPadding(Plain):
    """Half of what is multiplied is reported."""

    def executed(self, plan: Plan, batch: int, heads: int) -> int:
        return int(plan.pairs.expand(batch, heads).sum()) // 2


@mutant("kernel_tells_why_not")
class NeverSaysNo(Plain):
    """It claims to run anything."""

    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:  # noqa: ARG002
        return []


@mutant("kernel_drawn_plans", "kernel_outputs")
class PaddedKeysRead(Plain):
    """Each query reads key 0 besides its own, as padding repeats it."""

    def masks(self, plan: Plan) -> list[Tensor]:
        masks = super().masks(plan)
        reached = oracle.mask_of(plan).any(-1)
        first = masks[0].clone().expand(*broadcast_shapes(masks[0].shape, (*reached.shape, 1))).clone()
        first[..., 0] |= reached & ~oracle.mask_of(plan)[..., 0]
        return [first, *masks[1:]]


# -- sizes ------------------------------------------------------------------------------------------------------------


@mutant("kernel_large_plans")
class KernelKeysPast512(Plain):
    """Keys after the 512th are read by nobody."""

    def masks(self, plan: Plan) -> list[Tensor]:
        return [mask & (torch.arange(mask.shape[-1]) < 512) for mask in super().masks(plan)]


@mutant("kernel_large_plans")
class KernelQueriesPast512(Plain):
    """Queries after the 512th read nothing."""

    def masks(self, plan: Plan) -> list[Tensor]:
        return [mask & (torch.arange(mask.shape[-2]) < 512)[:, None] for mask in super().masks(plan)]


@mutant("kernel_large_plans")
class KernelItemsPastFour(Plain):
    """Batch items after the fourth run the fourth's plan."""

    def masks(self, plan: Plan) -> list[Tensor]:
        return [mask[torch.arange(mask.shape[0]).clamp(max=3)] for mask in super().masks(plan)]


@mutant("kernel_large_plans")
class KernelHeadsPastEight(Plain):
    """Heads after the eighth run the eighth's plan."""

    def masks(self, plan: Plan) -> list[Tensor]:
        return [mask[:, torch.arange(mask.shape[1]).clamp(max=7)] for mask in super().masks(plan)]


@mutant("kernel_large_plans")
class KernelSharedByFour(Plain):
    """No key head serves more than four query heads."""

    def shared(self, x: Tensor, heads: int) -> Tensor:
        share = min(4, heads // x.shape[1])
        return x[:, (torch.arange(heads) // share).clamp(max=x.shape[1] - 1)]


@mutant("kernel_large_plans")
class KernelChannelsPast64(Plain):
    """Scores are made of the first 64 channels."""

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        return super().scores(q[..., :64], k[..., :64], scale)


@mutant("kernel_large_plans")
class KernelPartsPastFour(Plain):
    """Parts after the fourth are left out."""

    def masks(self, plan: Plan) -> list[Tensor]:
        return super().masks(plan)[:4]


@mutant("kernel_large_plans")
class LargeGradientsInFloat32(Plain):
    """Gradients over more than 512 keys are rounded to float32."""

    def grads(self, p: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, scale: float) -> Any:
        found = super().grads(p, q, k, v, out, grad, scale)
        return [x.float().to(x.dtype) for x in found] if k.shape[2] > 512 else found


@mutant("kernel_gradients_alone")
class KernelKeysLearnWithValues(Plain):
    """k gets no gradient where v needs none."""

    def run(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
        return super().run(q, k if v.requires_grad else k.detach(), v, plan, scale)


@mutant("kernel_scale")
class ScaleOfAHundredthAtLeast(Plain):
    """Scales below a hundredth are taken for that."""

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        return super().scores(q, k, max(scale, 0.01))


@mutant("kernel_scale")
class ScaleOfOneAtMost(Plain):
    """Scales above one are taken for that."""

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        return super().scores(q, k, min(scale, 1.0))


@mutant("kernel_extreme_scores")
class ScoresClamped(Plain):
    """Scores are clamped at 256."""

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        return super().scores(q, k, scale).clamp(-256, 256)


@mutant("kernel_tells_why_not")
class WideValuesTaken(Plain):
    """Values wider than queries are taken, and their last channels lost."""

    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:
        narrower = q is not None and v is not None and v.shape[-1] < q.shape[-1]
        return super().why_not(q, v) if narrower else super().why_not(q)

    def run(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
        return super().run(q, k, v[..., : q.shape[-1]], plan, scale)
