"""Video Sparse Attention: cubes attend to cubes coarsely, and to the tokens of the best of them.

Paper: Faster Video Diffusion with Trainable Sparse Attention, arXiv 2505.13389.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from sparse_zoo.attention import Attention, Branch, Call, Card, Knob, Limit, Term, is_count
from sparse_zoo.blocks import joint, pooled, same_film, whole_film
from sparse_zoo.errors import refuse, unknown
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register
from sparse_zoo.selectors import chosen, largest

GATES = ("both", "coarse", "none")


@register("vsa")
class VSA(Attention):
    """Attention among pooled cubes; then each one's best cubes in full.

    The paper's (section 2.2): video is cut into cubes of 4 × 4 × 4 tokens, over which q, k and v are averaged. The
    coarse stage is attention among these means, O_c = softmax(Q_c K_c^T / sqrt(D)) V_c, which every token of a cube
    reads. In the fine stage the tokens of a cube attend to those of the top_k cubes of largest score, O_f; the own cube
    has no privilege. The output is O_c · G_c + O_f · G_f, the gates linear in hidden, for each token, head and channel,
    without an activation. Where a model trained with full attention is adapted (section 2.3), G_c starts at zero, G_f
    is left out (gates="coarse"; the authors' code has no other gate) and top_k falls from all cubes, as a `schedule`
    can. gates="none" is the ablation "F (no O_c)" of table 1b.

    Ours: with gates="both" they start as torch starts a linear layer (the paper: at random). Ragged cubes are averaged
    over the tokens they have (the paper asks for sizes that 4 divides). Cubes restart at each shot. Choices are made
    for each head, in float32; ties go to the earlier cube. Text is in no cube: it is read by all and reads all in the
    fine stage, ungated, and gets nothing from the coarse one.

    Args:
        top_k: Cubes each cube of queries chooses for the fine stage.
        tile: Tokens of a cube along (frames, rows, cols).
        stop_at_shots: Cubes restart at each shot, so that none holds frames of two.
        gates: "both": coarse and fine stage have a gate; "coarse": the coarse one alone, from zero; "none": there is no
            coarse stage and no gate.
    """

    limits = Limit({"top_k": 1 << 30, "gates": "none"})
    strict = "cubes choose among those of all shots"
    anchors = ("text",)
    pools_queries = True
    own_heads = "each head has gates of its own"
    knob = Knob("top_k", 1, 64)
    card = Card(
        paper="Faster Video Diffusion with Trainable Sparse Attention, arXiv 2505.13389",
        granularity="cube of queries -> cube of keys",
        chosen_by="q · k of cube means, top-k",
        trained="from scratch, or adapted by lowering top_k",
        claim="attention 6x faster on Wan2.1-1.3B, a video in 18 s for 31 s; 2.53x fewer training FLOPs at equal loss",
    )
    small = {"tile": (2, 2, 2), "top_k": 2}

    def __init__(
        self,
        *,
        top_k: int = 32,
        tile: Sequence[int] = (4, 4, 4),
        stop_at_shots: bool = True,
        gates: Literal["both", "coarse", "none"] = "both",
        **base: Any,
    ) -> None:
        super().__init__(**base)
        tile = tuple(tile)
        refuse(
            type(self).__name__,
            [
                f"top_k must be a whole number of at least 1, got {top_k!r}" if not is_count(top_k) else "",
                f"tile must be three whole numbers of at least 1, got {tile!r}"
                if len(tile) != 3 or not all(map(is_count, tile))
                else "",
                unknown("gates", gates, GATES) if gates not in GATES else "",
                "dim, the width of hidden, is needed for the gates" if gates != "none" and self.dim is None else "",
            ],
        )
        self.top_k, self.tile, self.stop_at_shots = top_k, tile, bool(stop_at_shots)
        stages = {"both": ("coarse", "fine"), "coarse": ("coarse",), "none": ()}[gates]
        self.gates = nn.ModuleDict({name: nn.Linear(self.dim or 0, self.heads * self.head_dim) for name in stages})
        if gates == "coarse":
            for parameter in self.gates.parameters():
                nn.init.zeros_(parameter)

    def features(self, hidden: Tensor) -> dict[str, Tensor]:
        """The gates, (B, L, heads · head_dim) each."""
        return {name: gate(hidden) for name, gate in self.gates.items()}

    def branches(self, call: Call) -> list[Branch | Term]:
        cubes = call.layout.tiles(self.tile, stop_at_shots=self.stop_at_shots)
        if not cubes.count:
            return [Branch(joint(call.layout))]
        q, k, v = (pooled(cubes, x) for x in (call.q, call.k, call.v))
        best = chosen(q, k, same_film(cubes, cubes), lambda scores, _: largest(scores, self.top_k))
        gates = self._gates(call)
        fine = joint(call.layout, *Plan.blocks(cubes, cubes, best, routed=True).parts)
        made: list[Branch | Term] = [Branch(fine, gates.get("fine", 1.0))]
        if "coarse" in gates:
            film = whole_film(call.layout, cubes, cubes)
            q, k, v = (x.to(call.q.dtype) for x in (q, k, v))
            made.append(Branch(film, gates["coarse"], q=q, k=k, v=v, rows=cubes.piece_of[0, 0]))
        return made

    def _gates(self, call: Call) -> dict[str, Tensor]:
        """Those of this call's heads, (B, H, L, D) each, 1 for text."""
        width = call.v.shape[-1]
        refuse(
            type(self).__name__,
            [f"v has head dim {width}; gates are for {self.head_dim}"] if self.gates and width != self.head_dim else [],
        )
        heads = slice(call.head_offset, call.head_offset + call.q.shape[1])
        text = call.layout.is_text[:, None]
        found = {}
        for name in self.gates:
            gate = self.featured(call)[name].unflatten(-1, (self.heads, self.head_dim))
            found[name] = gate[:, :, heads].transpose(1, 2).to(call.q.dtype).masked_fill(text, 1.0)
        return found

    def routing_flops(self, call: Call) -> int:
        """Pooling of q and k, and one product for each pair of cubes and head."""
        batch, heads, length, dim = call.q.shape
        count = call.layout.tiles(self.tile, stop_at_shots=self.stop_at_shots).count
        return batch * dim * (2 * heads * count**2 + (heads + call.k.shape[1]) * length)
