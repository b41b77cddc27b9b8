"""Mixture of Contexts: each query attends to a few chunks, chosen by the mean of their keys, and to anchors.

Paper: Mixture of Contexts for Long Video Generation, arXiv 2508.21058.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparse_zoo.attention import ANCHORS, Attention, Branch, Call, Card, Knob, Limit, Term, is_count
from sparse_zoo.errors import refuse, unknown
from sparse_zoo.layout import CHUNKS, Layout
from sparse_zoo.partition import Partition, refine
from sparse_zoo.plan import Plan
from sparse_zoo.registry import register
from sparse_zoo.remember import remembered
from sparse_zoo.routing import Drops, top_chunks

Chunk = Literal["shot", "frame", "tokens", "fixed"]
Causal = Literal["routing", "strict"]
CAUSAL = (None, "routing", "strict")


@register("moc")
class MoC(Attention):
    """Anchors, and the top_k chunks by q · mean(keys), for each query.

    The paper's: scores by mean-pooled keys without parameters, top-k per query and head, chunks that end at frame, shot
    and caption bounds, text and own shot attended always and never routed to, and chunk-level causality that breaks
    loops between shots (its section on causal routing), random drop-off and drop-in of chunks in training. Its films of
    many shots: chunk_tokens 10240, then 5120, 2560 and at last 1280, top_k 5, anchors text and shot, causal "routing".
    Its single shots: chunk_tokens 256, top_k 3, anchors text and chunk, causal null. Ours, where the paper is silent:
    how a token target becomes whole frames; a chunk that the anchors hold whole is no candidate, one held in part is
    scored over all its keys, costs one of k and adds the rest; with fewer candidates than k all are taken; ties go to
    the earlier chunk; text queries follow the same rule, the global caption having no shot. With fixed chunks and
    causality, what lies of the own chunk in another shot cannot be reached.

    Args:
        top_k: Chunks each query chooses; anchors are not counted.
        chunk: How the stream is cut: by "shot", by "frame" (frames_per_chunk), by "tokens" (as many whole frames of a
            shot as chunk_tokens hold, evenly), or "fixed" (chunk_tokens, blind to shots, frames and text).
        frames_per_chunk: Frames in a chunk cut by frame; restarts at each shot.
        chunk_tokens: The most tokens in a chunk cut by tokens (but at least one frame); all tokens in a fixed one.
        anchors: Attended always: any of "text" (of the film), "shot" (the own one, caption too), "chunk" (the own one).
        causal: "routing": only chunks before the own one are candidates, anchors stay bidirectional; "strict": text
            of later shots is unseen too, so that a prefix of shots is attended as alone; null: every chunk of the film.
        drop_off: In training, of the n chosen chunks of a query and head floor(p·n) at random are left out, p uniform
            between 0 and this (the paper's p_max, whose value it does not tell), 0 … 1.
        drop_in: In training, as many more chunks as a Poisson number of this mean (the paper's λ, not told either) come
            in at random from the candidates that were not chosen; what was left out does not come back.
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
        refuse(
            type(self).__name__,
            [f"{name} must be a whole number of at least 1, got {x!r}" for name, x in counts.items() if not is_count(x)]
            + ([unknown("chunk", chunk, CHUNKS)] if chunk not in CHUNKS else [])
            + [unknown("anchor", anchor, ANCHORS) for anchor in anchors if anchor not in ANCHORS]
            + ([f"causal must be null, 'routing' or 'strict', got {causal!r}"] if causal not in CAUSAL else [])
            + ([f"drop_off must be in [0, 1], got {drop_off!r}"] if not 0 <= drop_off <= 1 else [])
            + ([f"drop_in must be at least 0 and finite, got {drop_in!r}"] if not 0 <= drop_in < math.inf else []),
        )
        self.top_k, self.drop_off, self.drop_in = top_k, float(drop_off), float(drop_in)
        self.cut = _Cut(chunk, frames_per_chunk, chunk_tokens, tuple(a for a in ANCHORS if a in anchors), causal)
        self.causality, self.anchors = causal, self.cut.anchors
        # The first chunk has no chunk before it; the global caption has no shot. Drop-off leaves at least one chunk.
        self.may_be_empty = causal is not None and "chunk" not in anchors and not {"text", "shot"} <= set(anchors)

    def branches(self, call: Call) -> list[Branch | Term]:
        static = _static(call.layout, self.cut)
        kind, anchors = static.kind, static.anchors
        if call.q_rows is not None:
            kind, anchors = kind[call.q_rows], anchors and anchors.narrow(call.q_rows)
        drops = Drops(call, self.drop_off, self.drop_in) if self.training and (self.drop_off or self.drop_in) else None
        chosen = top_chunks(
            call.q,
            call.k,
            static.chunks,
            static.legal,
            kind,
            self.top_k,
            drops,
            on_device=self.on_device(call),
        )
        routed = Plan.routed(static.chunks, chosen)
        if anchors is None:
            return [Branch(routed)]
        # Where no chunk is anchored in part, no chosen chunk meets an anchor: nothing is to be cut.
        return [Branch(anchors | routed if static.straddles else Plan(*anchors.parts, *routed.parts))]

    def routing_flops(self, call: Call) -> int:
        """Pooling, and one product per query, head and chunk."""
        batch, heads, length, dim = call.q.shape
        count = _static(call.layout, self.cut).chunks.count
        return batch * dim * (2 * heads * length * count + call.k.shape[1] * call.k.shape[2])


@register("moc_fixed")
class MoCFixed(MoC):
    """`moc` with fixed chunks, blind to shots, frames and text.

    Args:
        top_k: Chunks each query chooses; anchors are not counted.
        chunk_tokens: Tokens in a chunk; the count restarts at each film.
        anchors: Attended always: any of "text" (of the film), "shot" (the own one, caption too), "chunk" (the own one).
        causal: "routing": only chunks before the own one are candidates; "strict": text of later shots is unseen too;
            null: every chunk of the film.
        drop_off: In training, of a query's n chosen chunks floor(p·n) are left out, p uniform between 0 and this.
        drop_in: In training, a Poisson number of this mean of further candidates comes in at random.
        kernel: Kernel by name, or "auto".
        text_reads: "method": as the method says; "text": text queries attend to the text of their film alone.
        dense_above: Attend densely in sampling while the noise time is above this; null: never.
    """

    knob: ClassVar[Knob] = Knob("top_k", 1, 64)
    card = Card(
        paper="what Mixture of Contexts, arXiv 2508.21058, sets itself apart from",
        granularity="query token and head -> chunk of so many tokens of the stream",
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
    """The settings that decide all that does not depend on q and k."""

    chunk: Chunk
    frames: int
    tokens: int
    anchors: tuple[str, ...]
    causal: Causal | None


@dataclass(frozen=True, eq=False)
class _Static:
    """What follows from the layout: chunks; the plan of the anchors; the kind of each token, by which `legal`, bool
    (kinds, C), tells what it may choose; whether a legal chunk can be anchored in part."""

    chunks: Partition
    anchors: Plan | None
    kind: Tensor
    legal: Tensor
    straddles: bool


@remembered(32)
def _static(layout: Layout, cut: _Cut) -> _Static:
    chunks = layout.chunks(cut.chunk, frames=cut.frames, tokens=cut.tokens)
    own = chunks.piece_of[0, 0]
    kinds = layout.partition(own, "shot", "is_text")
    order = torch.arange(chunks.count, device=layout.device)
    legal = kinds.sample[:, None] == chunks.sample
    if cut.causal is not None:
        legal &= order < kinds.of(own)[:, None]
    anchors = _anchors(layout, chunks, cut)
    held = _held(anchors, kinds, chunks) if anchors else torch.zeros_like(legal, dtype=torch.int64)
    size = chunks.sizes[0, 0]
    legal &= held < size
    return _Static(chunks, anchors, kinds.piece_of[0, 0], legal, bool((legal & (held > 0)).any()))


def _anchors(layout: Layout, chunks: Partition, cut: _Cut) -> Plan | None:
    plans = []
    strict = cut.causal == "strict"
    if "text" in cut.anchors and bool(layout.is_text.any()):
        keys = ("shot",) if strict else ()
        readers, text = layout.partition(*keys), layout.partition(*keys, where=layout.is_text)
        wanted = readers.sample[:, None] == text.sample
        plans.append(Plan.blocks(readers, text, wanted & (text.shot <= readers.shot[:, None]) if strict else wanted))
    if "shot" in cut.anchors and bool((layout.shot >= 0).any()):
        plans.append(Plan.within(layout.partition("shot", where=layout.shot >= 0)))
    if "chunk" in cut.anchors:
        if strict:
            pieces = layout.partition(chunks.piece_of[0, 0], "shot")
            chunk = pieces.of(chunks.piece_of[0, 0])
            past = pieces.shot <= pieces.shot[:, None]
            plans.append(Plan.blocks(pieces, pieces, (chunk[:, None] == chunk) & past))
        else:
            plans.append(Plan.within(chunks))
    joined = None
    for plan in plans:
        joined = plan if joined is None else joined | plan
    return joined


def _held(anchors: Plan, kinds: Partition, chunks: Partition) -> Tensor:
    """How many tokens of each chunk the anchors give to each kind of query: int64 (kinds, C)."""
    total = torch.zeros(kinds.count, chunks.count, dtype=torch.int64, device=kinds.device)
    for part in anchors.parts:
        atoms = refine(part.keys, chunks)
        sizes, parent, chunk = atoms.pieces.sizes[0, 0], atoms.of_a[0, 0], atoms.of_b[0, 0]
        given = torch.zeros(part.queries.count, chunks.count, dtype=torch.int64, device=kinds.device)
        given.index_add_(1, chunk, part.table[0, 0][:, parent] * sizes)
        piece = kinds.of(part.queries.piece_of[0, 0])
        total += given[piece.clamp(min=0)] * (piece >= 0)[:, None]
    return total
