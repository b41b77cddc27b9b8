"""The contract of a method: it says who attends to whom; kernels compute it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sparse_zoo.cost import Cost
from sparse_zoo.errors import ZooError, refuse, unknown
from sparse_zoo.gather import take_rows
from sparse_zoo.kernels import attend, attend_sum, routes_on_device
from sparse_zoo.kernels import names as kernel_names
from sparse_zoo.layout import Layout
from sparse_zoo.light import opaque
from sparse_zoo.plan import Part, Plan
from sparse_zoo.remember import on_device, origin, remembered
from sparse_zoo.requirements import is_count

ANCHORS = ("text", "shot", "chunk")


@dataclass(frozen=True)
class Call:
    """Everything a method may look at.

    q (B, H, Lq, D); k, v (B, Hk, Lk, D) with H % Hk == 0, as in torch's SDPA. `layout` describes the Lk tokens of the
    stream; `q_rows`, int64 (Lq,), says which of them q holds (all, when None). `hidden` (B, Lk, dim) is what q, k, v
    were projected from, `features` what the method made of it. `noise` is the time of the noise, 0 clean … 1; `memory`
    is the sampler's, for methods that keep something between noise steps. Random draws are functions of seed, step,
    layer, `head_offset` + head, and token.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: Layout
    q_rows: Tensor | None = None
    hidden: Tensor | None = None
    features: Mapping[str, Tensor] | None = None
    layer: int = 0
    layers: int = 1
    noise: Tensor | float | None = None
    step: int | None = None
    seed: int = 0
    head_offset: int = 0
    memory: MutableMapping[Any, Any] | None = None

    def __post_init__(self) -> None:
        refuse("attention", self._mismatches())

    @property
    def is_text(self) -> Tensor:
        """Which queries are text, bool (Lq,)."""
        return self.at(self.layout.is_text)

    @property
    def heads(self) -> slice:
        """Which of the layer's query heads q holds."""
        return slice(self.head_offset, self.head_offset + self.q.shape[1])

    def at(self, values: Tensor) -> Tensor:
        """What q's tokens have of `values` (L, …), which all tokens of the stream have."""
        return values if self.q_rows is None else values[self.q_rows]

    def narrow(self, plan: Plan) -> Plan:
        """What q's tokens attend to in a plan for all tokens of the stream."""
        return plan if self.q_rows is None else plan.narrow(self.q_rows)

    def _mismatches(self) -> list[str]:
        q, k, v = self.q.shape, self.k.shape, self.v.shape
        if not len(q) == len(k) == len(v) == 4:
            return [f"q, k, v must be (B, H, L, D), got {tuple(q)}, {tuple(k)}, {tuple(v)}"]
        rows = len(self.layout) if self.q_rows is None else len(self.q_rows)
        named = "the layout" if self.q_rows is None else "q_rows"
        return [
            f"q has {q[2]} tokens, {named} has {rows}" if q[2] != rows else "",
            f"k has {k[2]} tokens, the layout has {len(self.layout)}" if k[2] != len(self.layout) else "",
            f"k is {tuple(k)} and v is {tuple(v)}; batch, heads and tokens must agree" if k[:3] != v[:3] else "",
            f"q has {q[0]} batch items, k has {k[0]}" if q[0] != k[0] else "",
            f"q has head dim {q[3]}, k has {k[3]}" if q[3] != k[3] else "",
            f"{q[1]} query heads are no multiple of {k[1]} key heads" if q[1] % k[1] else "",
            f"hidden is {tuple(self.hidden.shape)}, must be ({q[0]}, {len(self.layout)}, dim)"
            if self.hidden is not None and self.hidden.shape[:2] != (q[0], len(self.layout))
            else "",
        ]


@dataclass(frozen=True)
class Segment:
    """One of the key sets that a branch's softmax runs over.

    Attributes:
        plan: Which queries of the branch attend to which keys of this set.
        k: Keys (B, Hk, n, D); None: the call's.
        v: Values (B, Hk, n, D); None: the call's.
        log_weight: Finite numbers (B|1, H|1, n), without gradient, that are added to the scaled scores of each key: the
            logarithm of how many tokens it stands for. None: 0.
    """

    plan: Plan
    k: Tensor | None = None
    v: Tensor | None = None
    log_weight: Tensor | None = None


@dataclass(frozen=True)
class Branch:
    """A softmax over one or more key sets, times a weight that broadcasts to the output (B, H, Lq, D).

    Branches are summed. A branch with `segments` has one softmax over the union of all its key sets: the first is made
    of its own plan, k, v and log_weight, the others are the segments.

    Attributes:
        plan: Which queries attend to which keys.
        weight: A number, or a tensor that broadcasts to the output.
        q: Queries of a coarse branch (B, H, n, D); None: the call's.
        k: Keys; None: the call's.
        v: Values; None: the call's.
        rows: int64 (Lq,) or (B|1, H|1, Lq), which query of the branch each token of the output reads; -1 for none (it
            gets 0). None: each its own.
        log_weight: Added to the scores of the keys of `plan`, see `Segment`.
        segments: Further key sets in the same softmax.
    """

    plan: Plan
    weight: Tensor | float = 1.0
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    rows: Tensor | None = None
    log_weight: Tensor | None = None
    segments: tuple[Segment, ...] = ()

    @property
    def key_sets(self) -> tuple[Segment, ...]:
        """All segments, the first of which is the branch's own plan, k, v and log_weight."""
        return (Segment(self.plan, self.k, self.v, self.log_weight), *self.segments)

    @property
    def pools_queries(self) -> bool:
        """Whether its queries are no tokens, so that tokens read its output by `rows`."""
        return self.q is not None and self.rows is not None

    @property
    def of_tokens(self) -> bool:
        """Whether it is plain attention on the call's own q, k and v: one key set, without log-weights."""
        return self.q is self.k is self.v is self.rows is self.log_weight is None and not self.segments

    def tensors(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v that the softmax reads; keys and values of several segments one after the other."""
        q = call.q if self.q is None else self.q
        k = [call.k if x.k is None else x.k for x in self.key_sets]
        v = [call.v if x.v is None else x.v for x in self.key_sets]
        if not self.segments:
            return q, k[0], v[0]
        refuse(
            "Branch",
            [
                f"segment {i} has k {tuple(x.shape)}, v {tuple(y.shape)} in {x.dtype}; all must have the batch, heads, "
                f"head dims and dtype of the first: k {tuple(k[0].shape)}, v {tuple(v[0].shape)} in {k[0].dtype}"
                if _but_length(x) != _but_length(k[0]) or _but_length(y) != _but_length(v[0])
                else ""
                for i, (x, y) in enumerate(zip(k, v, strict=True))
            ],
        )
        return q, torch.cat(k, dim=2), torch.cat(v, dim=2)


def _but_length(x: Tensor) -> tuple[object, ...]:
    return (*x.shape[:2], x.shape[3], x.dtype)


@dataclass(frozen=True)
class Term:
    """An output (B, H, Lq, D) outside any softmax, and what it took."""

    value: Tensor
    flops: int


@dataclass(frozen=True)
class Result:
    """out (B, H, Lq, D); the plans that ran, one a branch; auxiliary losses by name, weighted; the kernel that ran."""

    out: Tensor
    plans: list[Plan]
    losses: dict[str, Tensor]
    kernel: str
    layout: Layout
    q_rows: Tensor | None = field(default=None, repr=False)
    routing_flops: int = 0
    term_flops: int = 0
    heads: int | None = None  # that the plans are of, where others lie on other ranks; None: those of out

    def cost(self) -> Cost:
        """Counted from the plans that ran, for this batch and these heads. Reads numbers back from the device."""
        batch, heads, _, dim = self.out.shape
        heads = self.heads or heads
        dense = self.layout.dense_pairs
        if self.q_rows is not None:
            lengths = torch.tensor([len(film) for film in self.layout.films], device=self.q_rows.device)
            dense = int(lengths[self.layout.sample[self.q_rows]].sum())
        pairs = sum(int(plan.pairs.expand(batch, heads).sum()) for plan in self.plans)
        return Cost.of(pairs, batch * heads * dense, dim, self.routing_flops, self.term_flops)


@dataclass(frozen=True)
class Limit:
    """Settings at which a method equals dense attention; with `text=False`, on streams without text only."""

    settings: Mapping[str, Any]
    text: bool = True


@dataclass(frozen=True)
class Knob:
    """The setting that buys density, from `low` to `high`; density never falls as it goes there."""

    setting: str
    low: Any
    high: Any


@dataclass(frozen=True)
class Card:
    """What a table of methods says of one, beyond what the class itself shows.

    paper: its title and arXiv number. granularity: who chooses, of what ("query token -> block of keys"). chosen_by: by
    what the choice is made; "" where the layout alone decides. trained: whether the paper trains with it. claim: the
    paper's own figure for speed or density, and what it was measured against.
    """

    paper: str
    granularity: str
    chosen_by: str
    trained: str
    claim: str


class Attention(nn.Module):
    """Base class of methods: override `plan`, or `branches` for what one plan cannot say.

    What a class declares, `sparse_zoo.testing` verifies:

    - `limits`: settings at which it equals dense attention, or a sentence saying why there are none.
    - `strict`: settings at which attention on a prefix of shots is that prefix of attention on the film, or why none.
    - `causality`: "routing": apart from what is always attended, no video of later shots is; "strict": nothing of
      later shots is.
    - `anchors`: what every query attends to in each branch, any of `ANCHORS`: "text" (of its film; under strict
      causality, of its shot and those before), "shot" (its own, caption too), "chunk" (its own, cut as the method
      cuts; at least the token itself).
    - `may_be_empty`: whether a query may be left without keys (its output is 0).
    - `pools_queries`: whether it chooses for blocks of queries, so that it needs all queries of the stream (no
      `q_rows`).
    - `own_heads`: what makes heads differ other than their q, k, v (parameters or windows of each), in a sentence;
      None: nothing.
    - `reads_values`: what makes its plans depend on v, in a sentence; None: nothing.
    - `needs_all_heads`: why heads cannot be computed apart, on different devices, in a sentence; None: they can.
    - `same_in_training`: settings at which training attends as evaluation does, or a sentence saying why it never does.
    - `knob`: the setting that buys density.
    - `card`: what a table of methods says of it (docs/zoo.md); checks do not look at it.
    - `small`: settings that suit films of a few dozen tokens; the conformance suite uses them.

    Args:
        heads: Query heads.
        head_dim: Channels of a head.
        dim: Width of `hidden`; needed by methods with parameters of their own.
        kernel: Kernel by name, or "auto".
        text_reads: "method": as the method says; "text": text queries attend to the text of their sample alone (under
            strict causality, of their shot and those before), so that captions cannot relay what they saw from shot to
            shot.
        dense_above: Attend densely in sampling while the noise time is above this, in [0, 1); None: never. Losses, in
            training and validation, are of the method itself.
    """

    limits: ClassVar[Limit | str] = "none declared"
    strict: ClassVar[Mapping[str, Any] | str] = "none declared"
    causality: Literal["routing", "strict"] | None = None
    anchors: tuple[str, ...] = ()
    may_be_empty: bool = False
    pools_queries: bool = False
    own_heads: str | None = None
    reads_values: str | None = None
    needs_all_heads: str | None = None
    same_in_training: ClassVar[Mapping[str, Any] | str] = {}
    knob: ClassVar[Knob | None] = None
    card: ClassVar[Card | None] = None
    small: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        *,
        heads: int,
        head_dim: int,
        dim: int | None = None,
        kernel: str = "auto",
        text_reads: Literal["method", "text"] = "method",
        dense_above: float | None = None,
    ) -> None:
        super().__init__()
        refuse(
            type(self).__name__,
            [
                f"heads must be at least 1, got {heads!r}" if not is_count(heads) else "",
                f"head_dim must be at least 1, got {head_dim!r}" if not is_count(head_dim) else "",
                f"dim must be at least 1, got {dim!r}" if dim is not None and not is_count(dim) else "",
                unknown("kernel", kernel, kernel_names()) if kernel not in kernel_names() else "",
                unknown("text_reads", text_reads, ("method", "text")) if text_reads not in ("method", "text") else "",
                f"dense_above must be None or a noise time in [0, 1), got {dense_above!r}"
                if dense_above is not None and not _is_time(dense_above)
                else "",
            ],
        )
        self.heads, self.head_dim, self.dim = heads, head_dim, dim
        self.kernel, self.text_reads, self.dense_above = kernel, text_reads, dense_above

    # -- what a method says -------------------------------------------------------------------------------------------

    def plan(self, q: Tensor, k: Tensor, layout: Layout) -> Plan:
        """Who attends to whom. q (B, H, L, D), k (B, Hk, L, D); made without gradient.

        By default the plan of the only branch.
        """
        if type(self).branches is Attention.branches:
            raise NotImplementedError(f"{type(self).__name__} must define plan(q, k, layout) or branches(call)")
        branches = self.branches(Call(q, k, k, layout))
        if len(branches) != 1 or not isinstance(branches[0], Branch):
            raise ZooError(f"{type(self).__name__} has {len(branches)} branches; ask for branches(call)")
        return branches[0].plan

    def branches(self, call: Call) -> list[Branch | Term]:
        """The softmaxes to sum; by default one over `plan`."""
        # Autocast would narrow the products that decide, those of .float() too.
        with torch.no_grad(), torch.autocast(call.q.device.type, enabled=False):
            plan = self.plan(call.q, call.k, call.layout)
        if call.q_rows is not None and plan.shape[0] == len(call.layout):
            plan = plan.narrow(call.q_rows)
        return [Branch(plan)]

    def features(self, hidden: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Small per-token tensors (B, L, …) that routing needs, from hidden (B, L, dim)."""
        return {}

    def featured(self, call: Call) -> Mapping[str, Tensor]:
        """The features of a call: those it brings, or made of its `hidden`; `ZooError` if it has neither."""
        if call.features is not None:
            return call.features
        if call.hidden is None:
            raise ZooError(f"{type(self).__name__} needs what q, k, v were projected from: give hidden=(B, L, dim)")
        return self.features(call.hidden)

    def on_device(self, call: Call) -> bool:
        """Whether `routing.top_chunks` may choose by Triton's kernels: where they attend, by name or by "auto"."""
        return routes_on_device(self.kernel, call.q, call.v)

    def losses(self, call: Call) -> dict[str, Tensor]:  # noqa: ARG002
        """Auxiliary losses by name, weighted: scalars to add to the loss."""
        return {}

    def routing_flops(self, call: Call) -> int:  # noqa: ARG002
        """What deciding takes, for the ledger."""
        return 0

    # -- how it runs --------------------------------------------------------------------------------------------------

    @opaque  # planning is index work on remembered tables: one opaque step, not a graph
    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, **context: Any) -> Result:
        """Attend: q (B, H, Lq, D), k, v (B, Hk, Lk, D); `context` holds further fields of `Call`."""
        return self.run(Call(q, k, v, layout.to(q.device), **context))

    def run(self, call: Call) -> Result:
        """Attend, with everything given as one `Call`."""
        call = self.ready(call)
        terms: list[Tensor] = []
        plans, used, flops = [], [], 0
        # Text queries that read text alone get nothing of terms and coarse branches.
        silent = None if self.text_reads == "method" else call.is_text
        # Branches on the call's own q, k, v go to the kernel together, which then shares memory between them.
        shared: list[Plan] = []
        weights: list[Tensor | float] = []
        warm_up = self._is_warm_up(call)
        for branch in _dense(call) if warm_up else self.branches(call):
            if isinstance(branch, Term):
                terms.append(branch.value if silent is None else branch.value.masked_fill(silent[:, None], 0))
                flops += branch.flops
                continue
            plan = self.attended(branch, call)
            plans.append(plan)
            if branch.of_tokens:
                shared.append(plan)
                weights.append(branch.weight)
                continue
            value, _, kernel = attend(*branch.tensors(call), plan, kernel=self.kernel)
            rows = read_rows(branch, silent)
            if rows is not None:
                value = take_rows(value, rows)
            terms.append(branch.weight * value)
            used.append(kernel)
        if shared:
            value, kernel = attend_sum(call.q, call.k, call.v, shared, weights, kernel=self.kernel)
            terms.append(value)
            used.append(kernel)
        if not terms:
            raise ZooError(f"{type(self).__name__}.branches gave nothing to attend with")
        out = sum(terms[1:], terms[0])
        kernel = ",".join(dict.fromkeys(used))
        return Result(
            out=out.to(call.q.dtype),
            plans=plans,
            losses={} if warm_up else self.losses(call),
            kernel=kernel,
            layout=call.layout,
            q_rows=call.q_rows,
            routing_flops=0 if warm_up else self.routing_flops(call),
            term_flops=flops,
        )

    def _is_warm_up(self, call: Call) -> bool:
        """Whether a film is being drawn, as `memory` tells, from more noise than `dense_above`.

        All that is drawn has one noise time; shots that are given have 0. Reads that time back from the device.
        """
        if self.dense_above is None or call.memory is None or call.noise is None:
            return False
        return float(torch.as_tensor(call.noise).max()) > self.dense_above

    def ready(self, call: Call) -> Call:
        """The call as `branches` wants it: with features. Raises `ZooError` for some queries where all are needed."""
        if self.pools_queries and call.q_rows is not None:
            raise ZooError(
                f"{type(self).__name__} chooses for blocks of queries: it needs all of them, not q_rows alone"
            )
        if call.features is None and call.hidden is not None:
            call = replace(call, features=self.features(call.hidden))
        return call

    def attended(self, branch: Branch, call: Call) -> Plan:
        """The plan that runs for a branch: its own, unless `text_reads` says otherwise for text queries.

        Where queries are pooled it is its own, and text tokens do not read the result. The plan of a branch with
        several segments is over the keys of all of them, one segment after the other.
        """
        plans = [
            plan if x.log_weight is None else plan.weighted(x.log_weight)
            for x in branch.key_sets
            for plan in (self._read_from(x, branch.pools_queries, call),)
        ]
        return plans[0] if len(plans) == 1 else Plan.beside(*plans)

    def _read_from(self, segment: Segment, pooled_queries: bool, call: Call) -> Plan:
        """The plan of one segment, with what `text_reads` makes of it."""
        if self.text_reads == "method" or pooled_queries:
            return segment.plan
        if call.q_rows is None:
            video = Plan(*(_of_video(part, call.layout) for part in segment.plan.parts))
        else:
            video = segment.plan.keep(~call.is_text)
        if segment.k is not None:
            return video  # its keys are no tokens
        among = call.narrow(_text_among_itself(call.layout, self.causality == "strict"))
        # Their queries are apart, so the parts cannot share a pair.
        return Plan(*video.parts, *among.parts)


def _dense(call: Call) -> list[Branch | Term]:
    return [Branch(call.narrow(Plan.dense(call.layout)))]


def read_rows(branch: Branch, silent: Tensor | None) -> Tensor | None:
    """The rows of a branch, -1 for silent tokens (Lq,) that would read a query other than a silent token's."""
    if branch.rows is None or silent is None:
        return branch.rows
    quiet = silent if branch.pools_queries else silent & ~silent[branch.rows.clamp(min=0)]
    return branch.rows.masked_fill(quiet, -1)


@remembered(32)
def _text_among_itself(layout: Layout, strict: bool) -> Plan:
    if not strict:
        return Plan.within(layout.partition(where=layout.is_text))
    captions = layout.partition("shot", where=layout.is_text)
    earlier = captions.shot <= captions.shot[:, None]
    return Plan.blocks(captions, captions, (captions.sample[:, None] == captions.sample) & earlier)


def _of_video(part: Part, layout: Layout) -> Part:
    """A part without the queries that are text. Remembered with the part, which a layout's plan brings each time."""
    known: dict[Layout, Part] = part.__dict__.setdefault("_of_video", {})
    if layout not in known:
        found = origin(part)
        with torch.inference_mode(False):
            known[layout] = (
                part.keep(~layout.is_text)
                if found is None
                else on_device(_of_video(found.host, layout.to(found.host.device)), found.device)
            )
    return known[layout]


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
