"""Mixture-of-Groups Attention (MoGA): a learned router assigns tokens to groups; tokens attend within their group.

Paper: Mixture-of-Groups Attention for End-to-End Long Video Generation, arXiv 2510.18692.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_zoo.attention import Attention, Branch, Call, Card, Knob, Limit, Term
from sparse_zoo.blocks import shot_for_captions, text_for_all
from sparse_zoo.errors import unknown
from sparse_zoo.layout import Layout
from sparse_zoo.partition import Partition
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered
from sparse_zoo.requirements import is_count, require
from sparse_zoo.routing import balance

MIX = ("group", "stga", "frame")
BORROWED = 2
"""Latent frames whose keys a temporal group borrows from each adjacent shot: the paper's number."""


@register("moga")
class MoGA(Attention):
    """Mean of routed groups, local space-time groups and single frames.

    **Rule**

    The output is the mean of the branches in `mix`:

    - "group": a router assigns each token to the group g(x) = argmax softmax(W x), one assignment per token and layer
      for all heads. The output is p(g(x) | x) · attention within the group.
    - "stga": spatial-temporal group attention, within spatial windows × temporal groups of one shot.
    - "frame": attention within each frame.

    Training adds the balance loss α · M · Σ_i F_i P_i.

    **Paper**

    - Temporal groups stop at shots and borrow the keys, not the queries, of two latent frames of each adjacent shot.
    - The three branches are averaged; `balance` names two readings of the loss's P.

    **Our choices**

    - The paper has no joint text and video stream. Here text is never routed: its keys are in every branch. Text
      queries attend, in each branch with weight 1, to all text and to the video of their own shot; the global caption
      attends to all text.
    - On an axis of r rows cut into n windows, the row x lies in window x · n // r.
    - Every temporal group of a shot borrows keys. A shot of fewer than two frames lends all that it has.

    **Not to be confused with**

    - `moc`, `moba`: routing without parameters, by similarity of queries and pooled keys.
    - `svg2`: groups from k-means clusters of queries and keys, without training.

    Args:
        groups: Groups M of the router.
        windows: Spatial windows of the "stga" branch along (rows, cols).
        frames_per_group: Latent frames in a temporal group of the "stga" branch; null: the whole shot.
        mix: Branches that are averaged, any of "group", "stga", "frame".
        balance: P_i of the balance loss: "printed" (p summed over the tokens assigned to group i, as the paper prints
            it) or "switch" (mean of p over all tokens).
        alpha: Weight α of the balance loss; 0 turns it off.
    """

    limits = Limit({"groups": 1, "mix": ("group",)}, text=False)
    strict = "groups hold tokens of all shots"
    anchors = ("text",)
    knob = Knob("groups", 64, 1)
    card = Card(
        paper="Mixture-of-Groups Attention for End-to-End Long Video Generation, arXiv 2510.18692",
        granularity="token -> group, window and shot, frame",
        chosen_by="a learned router, one choice for all heads of a layer",
        trained="from Wan 2.1 1.3B and 14B, and an MMDiT",
        claim="71.25 % of pairs pruned, 1.7x in training and inference at 187k tokens (Wan 1.3B), against dense",
    )
    small = {"groups": 3, "frames_per_group": 2}

    def __init__(
        self,
        *,
        groups: int = 5,
        windows: Sequence[int] = (2, 2),
        frames_per_group: int | None = None,
        mix: Sequence[str] = MIX,
        balance: Literal["printed", "switch"] = "printed",
        alpha: float = 0.1,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        windows, mix = tuple(windows), (mix,) if isinstance(mix, str) else tuple(mix)
        require(
            self,
            f"windows must be two whole numbers of at least 1, got {windows!r}"
            if len(windows) != 2 or not all(map(is_count, windows))
            else "",
            f"frames_per_group must be null or at least 1, got {frames_per_group!r}"
            if frames_per_group is not None and not is_count(frames_per_group)
            else "",
            *(unknown("branch", name, MIX) for name in mix if name not in MIX),
            f"mix needs at least one of {MIX}, each once, got {mix!r}" if len(set(mix)) != len(mix) or not mix else "",
            unknown("balance", balance, ("printed", "switch")) if balance not in ("printed", "switch") else "",
            f"alpha must be at least 0, got {alpha!r}" if not alpha >= 0 else "",
            "dim, the width of hidden, is needed for the router" if self.dim is None else "",
            counts={"groups": groups},
        )
        self.groups, self.windows, self.frames_per_group = groups, windows, frames_per_group
        self.mix, self.balance, self.alpha = mix, balance, float(alpha)
        self.router = nn.Linear(self.dim or 0, groups)

    def features(self, hidden: Tensor) -> dict[str, Tensor]:
        """The router's decision for each token.

        Args:
            hidden: Hidden features (B, L, dim).

        Returns:
            `p`, float32 (B, L, M), the router's softmax, and `group`, int64 (B, L), its argmax.
        """
        p = self.router(hidden).float().softmax(-1)
        return {"p": p, "group": p.argmax(-1)}

    def branches(self, call: Call) -> list[Branch | Term]:
        """One branch for each name in `mix`, weighted by the router's probability and 1 / len(mix)."""
        return [Branch(self._plan(name, call), self._weight(name, call) / len(self.mix)) for name in self.mix]

    def _plan(self, name: str, call: Call) -> Plan:
        layout = call.layout
        if name == "group":
            group = self.featured(call)["group"]
            labels = torch.where(layout.is_text, -1, group + self.groups * layout.sample)[:, None]
            queries = labels if call.q_rows is None else labels[:, :, call.q_rows]
            plan = Plan.groups(queries, labels, count=self.groups * len(layout.films), routed=True)
        else:
            local = _frames(layout) if name == "frame" else _stga(layout, self.windows, self.frames_per_group)
            plan = call.narrow(local)
        # The branch's plan joins video to video; these parts have text on one side, so that no pair is held twice.
        text = (*text_for_all(layout), *shot_for_captions(layout))
        return Plan(*call.narrow(Plan(*text)).parts, *plan.parts) if text else plan

    def _weight(self, name: str, call: Call) -> Tensor | float:
        if name != "group":
            return 1.0
        routing = self.featured(call)
        p = routing["p"].gather(-1, routing["group"][..., None])
        p = torch.where(call.layout.is_text[:, None], 1.0, p)
        return (p if call.q_rows is None else p[:, call.q_rows])[:, None].to(call.q.dtype)

    def losses(self, call: Call) -> dict[str, Tensor]:
        """The balance loss, α · M · Σ_i F_i P_i over the video tokens of each film, averaged over films.

        F carries no gradient.
        """
        if self.alpha == 0 or "group" not in self.mix or not call.layout.video_tokens:
            return {}
        routing = self.featured(call)
        loss = balance(routing["p"], routing["group"], call.layout, assigned_alone=self.balance == "printed")
        return {"balance": self.alpha * self.groups * loss}

    def routing_flops(self, call: Call) -> int:
        """The router's matrix product, if the "group" branch is in `mix`."""
        return 2 * call.k.shape[0] * call.k.shape[2] * (self.dim or 0) * self.groups if "group" in self.mix else 0


@remembered(32)
def _frames(layout: Layout) -> Plan:
    return Plan.within(layout.partition("shot", "frame", where=~layout.is_text))


@remembered(32)
def _stga(layout: Layout, windows: tuple[int, ...], frames_per_group: int | None) -> Plan:
    """Windows × temporal groups; the nearest frames of adjacent shots, in the same window, are added to their keys."""
    time = layout.shot_frame // frames_per_group if frames_per_group else torch.zeros_like(layout.shot_frame)
    place = [layout.row * windows[0] // layout.rows, layout.col * windows[1] // layout.cols]
    first = layout.shot_frame < BORROWED
    last = layout.frames - layout.shot_frame <= BORROWED
    video = ~layout.is_text
    queries = layout.partition("shot", time, *place, where=video)
    keys = layout.partition("shot", time, first, last, *place, where=video)

    def both(pieces: Partition, values: Tensor) -> Tensor:
        return queries.of(values)[:, None] == pieces.of(values)

    same_window = both(keys, layout.sample) & both(keys, place[0]) & both(keys, place[1])
    gap = keys.shot - queries.shot[:, None]
    own = (gap == 0) & both(keys, time)
    lent = ((gap == -1) & (keys.of(last) == 1)) | ((gap == 1) & (keys.of(first) == 1))
    return Plan.blocks(queries, keys, same_window & (own | lent))
