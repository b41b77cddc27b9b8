"""Mixture of Contexts (MoC): each query attends to a few chunks, chosen by the mean of their keys, and to anchors.

Paper: Mixture of Contexts for Long Video Generation, arXiv 2508.21058.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from sparse_zoo.anchors import anchored, keys_given
from sparse_zoo.attention import ANCHORS, Attention, Branch, Call, Card, Knob, Limit, Term
from sparse_zoo.blocks import same_film
from sparse_zoo.errors import unknown
from sparse_zoo.layout import CHUNKS, Layout
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered
from sparse_zoo.requirements import require
from sparse_zoo.routing import Candidates, Drops

Chunk = Literal["shot", "frame", "tokens", "fixed"]
Causal = Literal["routing", "strict"]
CAUSAL = (None, "routing", "strict")


@register("moc")
class MoC(Attention):
    """Anchors, and for each query the top_k chunks by q · mean(keys).

    **Rule**

    The stream is cut into chunks that end at frame, shot and caption boundaries. A query and head scores each candidate
    chunk c with q · mean(K_c), which has no parameters, and chooses the `top_k` of highest score. One softmax runs over
    the keys of the chosen chunks and of the anchors (by default the text of the film and the own shot).

    **Paper**

    - Routing by mean-pooled keys, top-k per query and head; anchors are always attended and never routed to.
    - Chunk-level causality breaks loops between shots (section on causal routing).
    - In training, chunks are dropped at random (drop-off) and added at random (drop-in). The paper gives neither p_max
      nor λ.
    - Multi-shot films: chunk_tokens 10240, then 5120, 2560 and at last 1280; top_k 5, anchors text and shot, causal
      "routing". Single shots: chunk_tokens 256, top_k 3, anchors text and chunk, causal null.

    **Our choices**

    - chunk="tokens" cuts each shot evenly into whole frames; the paper does not say how a token target becomes frames.
    - A chunk that the anchors cover whole is no candidate. A chunk covered in part is scored over all its keys, counts
      as one of `top_k`, and adds the keys that were not covered.
    - If a query has fewer than `top_k` candidates, it takes all of them. Ties go to the earlier chunk.
    - Text queries follow the same rule. The global caption belongs to no shot.
    - With fixed chunks and causality, a query cannot reach the tokens of its own chunk that lie in another shot.

    **Not to be confused with**

    - `moba`: blocks of equal length, no anchors besides text, and the own block counts as one of `top_k`.
    - `moc_fixed`: this class with chunk="fixed", from which the paper sets itself apart.

    Args:
        top_k: Chunks that each query chooses; anchors are not counted.
        chunk: How the stream is cut: by "shot"; by "frame" (`frames_per_chunk`); by "tokens" (as many whole frames of a
            shot as `chunk_tokens` hold, evenly); or "fixed" (`chunk_tokens`, without regard to shots, frames and text).
        frames_per_chunk: Frames in a chunk when chunk is "frame"; the count restarts at each shot.
        chunk_tokens: Tokens in a chunk: the most when chunk is "tokens" (at least one frame), exactly when it is
            "fixed".
        anchors: What every query attends to, any of "text" (of the film), "shot" (the own one and its caption), "chunk"
            (the own one).
        causal: "routing": only chunks before the own one are candidates, anchors stay bidirectional. "strict": text of
            later shots is masked too, so that a prefix of shots attends as if it were alone. null: every chunk of the
            film is a candidate.
        drop_off: In training, floor(p·n) of the n chosen chunks of a query and head are dropped at random, with p
            uniform between 0 and this value (p_max of the paper), in [0, 1].
        drop_in: In training, a Poisson number of chunks with this mean (λ of the paper) is added at random from the
            candidates that were not chosen. A dropped chunk is not added again.
    """

    limits = Limit({"top_k": 1 << 30, "causal": None})
    strict = {"causal": "strict"}
    same_in_training: ClassVar[Mapping[str, Any] | str] = {"drop_off": 0.0, "drop_in": 0.0}
    knob = Knob("top_k", 1, 64)
    card = Card(
        paper="Mixture of Contexts for Long Video Generation, arXiv 2508.21058",
        granularity="query token and head -> chunk that ends with its frame, shot or caption",
        chosen_by="q · mean of the chunk's keys",
        trained="from LCT, a dense MMDiT of 3B, and Wan 2.1 1.3B",
        claim="85 % of pairs pruned, over 7x fewer attention FLOPs, 2.2x end to end at 180k tokens, against dense",
    )
    small: ClassVar[Mapping[str, Any]] = {"top_k": 2, "drop_off": 0.9, "drop_in": 0.7}

    def __init__(
        self,
        *,
        top_k: int = 5,
        chunk: Chunk = "frame",
        frames_per_chunk: int = 1,
        chunk_tokens: int = 1280,
        anchors: Sequence[str] = ("text", "shot"),
        causal: Causal | None = "routing",
        drop_off: float = 0.0,
        drop_in: float = 0.0,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        anchors = (anchors,) if isinstance(anchors, str) else tuple(anchors)
        counts = {"top_k": top_k, "frames_per_chunk": frames_per_chunk, "chunk_tokens": chunk_tokens}
        require(
            self,
            unknown("chunk", chunk, CHUNKS) if chunk not in CHUNKS else "",
            *(unknown("anchor", anchor, ANCHORS) for anchor in anchors if anchor not in ANCHORS),
            f"causal must be null, 'routing' or 'strict', got {causal!r}" if causal not in CAUSAL else "",
            f"drop_off must be in [0, 1], got {drop_off!r}" if not 0 <= drop_off <= 1 else "",
            f"drop_in must be at least 0 and finite, got {drop_in!r}" if not 0 <= drop_in < math.inf else "",
            counts=counts,
        )
        self.top_k, self.drop_off, self.drop_in = top_k, float(drop_off), float(drop_in)
        self.cut = _Cut(chunk, frames_per_chunk, chunk_tokens, tuple(a for a in ANCHORS if a in anchors), causal)
        self.causality, self.anchors = causal, self.cut.anchors
        # The first chunk has no chunk before it; the global caption has no shot. Drop-off leaves at least one chunk.
        self.may_be_empty = causal is not None and "chunk" not in anchors and not {"text", "shot"} <= set(anchors)

    def branches(self, call: Call) -> list[Branch | Term]:
        """One branch over the anchors and the chosen chunks."""
        static = _static(call.layout, self.cut)
        anchors = static.anchors and call.narrow(static.anchors)
        drops = Drops(call, self.drop_off, self.drop_in) if self.training and (self.drop_off or self.drop_in) else None
        routed = Plan.routed(static.chunks, static.best(self, call, self.top_k, drops))
        if anchors is None:
            return [Branch(routed)]
        # Unless a chunk is anchored in part, no chosen chunk overlaps an anchor, and the parts can simply be joined.
        return [Branch(anchors | routed if static.straddles else Plan(*anchors.parts, *routed.parts))]

    def routing_flops(self, call: Call) -> int:
        """Pooling, and one product per query, head and chunk."""
        return _static(call.layout, self.cut).flops(call)


@register("moc_fixed")
class MoCFixed(MoC):
    """`moc` with chunks of a fixed length, blind to shots and frames.

    **Rule**

    As `moc`, with chunk="fixed": chunks are `chunk_tokens` consecutive tokens of the stream, text included.

    **Paper**

    Mixture of Contexts sets its aligned chunks apart from fixed ones, and prints no figures for fixed chunks.

    **Our choices**

    As for `moc`.

    **Not to be confused with**

    `moba`, whose blocks hold video alone and whose own block counts as one of `top_k`.

    Args:
        top_k: Chunks that each query chooses; anchors are not counted.
        chunk_tokens: Tokens in a chunk; the count restarts at each film.
        anchors: What every query attends to, any of "text" (of the film), "shot" (the own one and its caption), "chunk"
            (the own one).
        causal: "routing": only chunks before the own one are candidates. "strict": text of later shots is masked too.
            null: every chunk of the film is a candidate.
        drop_off: In training, floor(p·n) of a query's n chosen chunks are dropped, with p uniform between 0 and this
            value.
        drop_in: In training, a Poisson number of further candidates with this mean is added at random.
        kernel: Name of a kernel, or "auto".
        text_reads: "method": text queries attend as the method says. "text": they attend to the text of their film
            alone.
        dense_above: In sampling, attend densely while the noise time is above this value; null: never.
    """

    knob: ClassVar[Knob] = Knob("top_k", 1, 64)
    card = Card(
        paper="Mixture of Contexts, arXiv 2508.21058, which sets itself apart from fixed chunks",
        granularity="query token and head -> chunk of `chunk_tokens` tokens of the stream",
        chosen_by="q · mean of the chunk's keys",
        trained="no",
        claim="none found: the paper prints no figures for fixed chunks",
    )
    small = {"top_k": 2, "chunk_tokens": 7, "drop_off": 0.9, "drop_in": 0.7}

    def __init__(
        self,
        *,
        heads: int,
        head_dim: int,
        dim: int | None = None,
        top_k: int = 5,
        chunk_tokens: int = 1280,
        anchors: Sequence[str] = ("text", "shot"),
        causal: Causal | None = "routing",
        drop_off: float = 0.0,
        drop_in: float = 0.0,
        kernel: str = "auto",
        text_reads: Literal["method", "text"] = "method",
        dense_above: float | None = None,
    ) -> None:
        super().__init__(
            heads=heads,
            head_dim=head_dim,
            dim=dim,
            top_k=top_k,
            chunk="fixed",
            chunk_tokens=chunk_tokens,
            anchors=anchors,
            causal=causal,
            drop_off=drop_off,
            drop_in=drop_in,
            kernel=kernel,
            text_reads=text_reads,
            dense_above=dense_above,
        )


@dataclass(frozen=True)
class _Cut:
    """The settings that fix everything that does not depend on q and k."""

    chunk: Chunk
    frames: int
    tokens: int
    anchors: tuple[str, ...]
    causal: Causal | None


@dataclass(frozen=True, eq=False)
class _Static(Candidates):
    """What follows from the layout: the chunks and who may choose them, and beside them the anchors.

    `anchors` is the plan of the anchors. `straddles` tells whether a legal chunk can be covered in part by anchors.
    """

    anchors: Plan | None
    straddles: bool


@remembered(32)
def _static(layout: Layout, cut: _Cut) -> _Static:
    chunks = layout.chunks(cut.chunk, frames=cut.frames, tokens=cut.tokens)
    own = chunks.piece_of[0, 0]
    kinds = layout.partition(own, "shot", "is_text")
    order = torch.arange(chunks.count, device=layout.device)
    legal = same_film(kinds, chunks)
    if cut.causal is not None:
        legal &= order < kinds.of(own)[:, None]
    anchors = anchored(layout, chunks, cut.anchors, past=cut.causal == "strict")
    held = keys_given(anchors, kinds, chunks) if anchors else torch.zeros_like(legal, dtype=torch.int64)
    legal &= held < chunks.sizes[0, 0]
    return _Static(chunks, kinds.piece_of[0, 0], legal, anchors, bool((legal & (held > 0)).any()))
