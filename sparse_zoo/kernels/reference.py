"""The oracle: masked softmax on the dense mask, in float32 or the inputs' wider type."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_zoo.kernels.base import Kernel
from sparse_zoo.plan import Plan


class Reference(Kernel):
    """Makes the whole L × L: for small streams, anywhere; float64 inputs give a float64 result."""

    name = "reference"
    weighs_keys = True

    def why_not(self, q: Tensor | None = None, v: Tensor | None = None) -> list[str]:  # noqa: ARG002
        """Refuse dtypes that are not floating-point, and nothing else."""
        if q is None or q.is_floating_point():
            return []
        return [f"dtype {q.dtype} is not a floating-point type"]

    def run(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
        """Compute the softmax of the whole (Lq, Lk) scores under the plan's mask, in float32 or wider."""
        wide = torch.promote_types(q.dtype, torch.float32)
        share = q.shape[1] // k.shape[1]
        keys, values = (x.to(wide).repeat_interleave(share, dim=1) for x in (k, v))
        mask = plan.dense_mask()
        reached = mask.any(-1)
        scores = (q.to(wide) @ keys.transpose(-1, -2)) * scale
        for part in plan.parts:
            if part.log_weight is not None:
                scores = scores + part.log_weight[:, :, None].to(wide) * part.mask()
        # A row without keys gets zeros for scores, so that no NaN arises, and loses them again below.
        scores = scores.masked_fill(~mask & reached[..., None], -torch.inf).masked_fill(~reached[..., None], 0)
        out = (scores.softmax(-1) * reached[..., None]) @ values
        lse = scores.detach().logsumexp(-1).masked_fill(~reached, -torch.inf)
        return out.to(q.dtype), lse

    def executed(self, plan: Plan, batch: int, heads: int) -> int:
        """Count all pairs of queries and keys, whatever the plan."""
        return batch * heads * plan.shape[0] * plan.shape[1]
