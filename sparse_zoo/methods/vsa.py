"""Video Sparse Attention (VSA): coarse attention among pooled cubes, then full attention to the best cubes.

Paper: Faster Video Diffusion with Trainable Sparse Attention, arXiv 2505.13389.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from sparse_zoo.attention import Branch, Call, Card, Knob, Limit, Term
from sparse_zoo.blocks import joint, pooled, same_film, whole_film
from sparse_zoo.blockwise import Blockwise
from sparse_zoo.errors import unknown
from sparse_zoo.registry import register
from sparse_zoo.requirements import require
from sparse_zoo.selectors import chosen, largest

GATES = ("both", "coarse", "none")


@register("vsa")
class VSA(Blockwise):
    """Attention among pooled cubes, then to the best cubes in full.

    **Rule**

    Video is cut into cubes of `tile` tokens, and q, k, v are averaged over each cube.

    - Coarse stage: O_c = softmax(Q_c K_c^T / √D) V_c among the means; all tokens of a cube receive its row.
    - Fine stage: O_f is attention of the tokens of a cube to the tokens of the `top_k` cubes of highest coarse score.
    - The output is O_c · G_c + O_f · G_f, with gates linear in the hidden features, per token, head and channel.

    **Paper**

    - Section 2.2: cubes of 4 × 4 × 4; the own cube has no privilege; the gates have no activation.
    - Section 2.3, adapting a dense model: G_c starts at zero and G_f is left out (gates="coarse"; the authors' code has
      no other gate), and top_k falls from all cubes, which a `schedule` expresses.
    - gates="none" is the ablation "F (no O_c)" of table 1b.

    **Our choices**

    - With gates="both" the gates start as torch initialises a linear layer (the paper: at random).
    - Partial cubes are averaged over the tokens they have; the paper asks for sizes that 4 divides.
    - Cubes restart at each shot. Each head chooses for itself, in float32; ties go to the earlier cube.
    - Text is in no cube. In the fine stage it attends to everything and is attended by everything, ungated; it takes no
      part in the coarse stage.

    **Not to be confused with**

    - `nsa`: single queries choose, blocks are 1D, and there is a window branch.
    - `sla`: a linear term, not a softmax over means, covers what is not attended exactly.

    Args:
        top_k: Cubes that each cube of queries chooses for the fine stage.
        tile: Tokens of a cube along (frames, rows, cols).
        stop_at_shots: Cubes restart at each shot, so that no cube holds frames of two shots.
        gates: "both": gates on the coarse and the fine stage. "coarse": a gate on the coarse stage alone, from zero.
            "none": no coarse stage and no gates.
    """

    limits = Limit({"top_k": 1 << 30, "gates": "none"})
    strict = "cubes of all shots are candidates"
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
        require(
            self,
            unknown("gates", gates, GATES) if gates not in GATES else "",
            "dim, the width of hidden, is needed for the gates" if gates != "none" and self.dim is None else "",
            counts={"top_k": top_k},
            triples={"tile": tile},
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
        """The fine branch and, unless gates is "none", the coarse branch."""
        cubes = self.queries(call.layout)
        if not cubes.count:
            return [Branch(joint(call.layout))]
        q, k, v = (pooled(cubes, x) for x in (call.q, call.k, call.v))
        best = chosen(q, k, same_film(cubes, cubes), lambda scores, _: largest(scores, self.top_k), self.top_k)
        gates = self._gates(call)
        made: list[Branch | Term] = [Branch(self.exact(call, best), gates.get("fine", 1.0))]
        if "coarse" in gates:
            film = whole_film(call.layout, cubes, cubes)
            q, k, v = (x.to(call.q.dtype) for x in (q, k, v))
            made.append(Branch(film, gates["coarse"], q=q, k=k, v=v, rows=cubes.piece_of[0, 0]))
        return made

    def _gates(self, call: Call) -> dict[str, Tensor]:
        """The gates of this call's heads, (B, H, L, D) each, 1 for text."""
        if self.gates:
            self.require_width(call, "gates are")
        text = call.layout.is_text[:, None]
        found = {}
        for name in self.gates:
            gate = self.featured(call)[name].unflatten(-1, (self.heads, self.head_dim))
            found[name] = gate[:, :, call.heads].transpose(1, 2).to(call.q.dtype).masked_fill(text, 1.0)
        return found
