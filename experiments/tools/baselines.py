"""What the methods of a memory test are held against."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

import sparse_zoo as zoo
from sparse_zoo.blocks import pooled, same_film
from sparse_zoo.draws import numbers, uniform
from sparse_zoo.errors import ZooError, refuse, unknown
from sparse_zoo.partition import Partition
from sparse_zoo.remember import remembered
from sparse_zoo.requirements import is_count

CAPTIONS, EACH = ("own", "all"), ("shot", "token")


@zoo.register("own_shot")
class OwnShot(zoo.Attention):
    """Every token attends to its own shot: what can be drawn without memory of other shots.

    A shot's caption belongs to it; the global caption, which has no shot, attends to itself.

    Args:
        captions: Which captions are attended to besides. "all": those of the whole film. Where captions read video,
            which `text_reads="text"` forbids, they then carry it from shot to shot.
    """

    limits = "no setting reaches the video of another shot"
    strict: ClassVar[Mapping[str, Any] | str] = "captions of later shots are read too"
    anchors = ("shot",)

    def __init__(self, *, captions: Literal["own", "all"] = "own", **base: Any) -> None:
        super().__init__(**base)
        refuse("own_shot", [unknown("captions", captions, CAPTIONS)] if captions not in CAPTIONS else [])
        self.captions = captions
        if captions == "own":
            self.causality, self.strict = "strict", {}  # type: ignore[misc]

    def plan(self, q: Tensor, k: Tensor, layout: zoo.Layout) -> zoo.Plan:  # noqa: ARG002
        """Return a plan: each token attends to its own shot and, if `captions` is "all", to its film's captions."""
        shots = zoo.Plan.within(layout.partition("shot"))
        if self.captions == "own":
            return shots
        films, text = layout.partition(), layout.partition(where=layout.is_text)
        return shots | zoo.Plan.blocks(films, text, films.sample[:, None] == text.sample)


@zoo.register("random_shots")
class RandomShots(zoo.Attention):
    """The own shot, and others at random: what a budget brings without a choice.

    Captions belong to their shots; the global caption counts as one. Films are drawn with the same choice from first
    to last step. The films of a batch share it, and so do those of one stream: shots and tokens count from the first
    of their own film, so that a film is drawn alike packed and alone.

    Args:
        shots: Other shots; all of the film where it has fewer.
        each: Who draws. "shot": every shot once, for all its tokens, in all heads and layers, so that a shot that was
            not drawn cannot be seen in any way: the null. "token": every query in every head and layer, which is no
            null, since together the tokens of a shot see nearly all others.
    """

    limits = zoo.Limit({"shots": 1 << 30})
    strict = "later shots are drawn too"
    anchors = ("shot",)
    knob = zoo.Knob("shots", 0, 64)
    small: ClassVar[Mapping[str, Any]] = {"shots": 1}

    def __init__(self, *, shots: int = 2, each: Literal["shot", "token"] = "shot", **base: Any) -> None:
        super().__init__(**base)
        refuse(
            "random_shots",
            [
                f"shots must be a whole number of at least 0, got {shots!r}" if not is_count(shots, least=0) else "",
                unknown("each", each, EACH) if each not in EACH else "",
            ],
        )
        self.shots, self.each = shots, each
        self.own_heads = "each head draws shots of its own" if each == "token" else None

    def branches(self, call: zoo.Call) -> list[zoo.Branch | zoo.Term]:
        """Return one branch: the own shot, and up to `shots` other shots of the same film, chosen at random."""
        pieces = call.layout.partition("shot")
        rows = torch.arange(len(call.layout), device=call.q.device) if call.q_rows is None else call.q_rows
        mine = pieces.piece_of[0, 0][rows]
        own = zoo.Plan.within(pieces)
        if call.q_rows is not None:
            own = own.narrow(rows)
        if not self.shots:
            return [zoo.Branch(own)]
        number = torch.arange(pieces.count, device=rows.device)
        shot = _within(pieces.sample)
        # Not of the step: a seed stands for a batch of films, in all the steps in which they are drawn.
        if self.each == "shot":
            drawn = numbers(("random shots", call.seed), number[:1], shot, pieces.count)[:, mine]
        else:
            token = _within(call.layout.sample)
            drawn = uniform(replace(call, step=None, q_rows=token[rows]), "random shots", pieces.count)
        drawn = drawn[..., shot]
        legal = (pieces.sample[mine][:, None] == pieces.sample) & (mine[:, None] != number)
        best, which = drawn.masked_fill(~legal, -1.0).topk(min(self.shots, pieces.count))
        chosen = which.masked_fill(best < 0, -1)[None]
        return [zoo.Branch(zoo.Plan(*own.parts, *zoo.Plan.routed(pieces, chosen).parts))]


@zoo.register("last_shots")
class LastShots(zoo.Attention):
    """The own shot and those just before it: memory of a fixed length, without a choice.

    The global caption counts as the shot before the first.

    Args:
        shots: How many shots before the own one are attended to.
    """

    limits = "no setting reaches later shots"
    strict: ClassVar[Mapping[str, Any] | str] = {}
    causality = "strict"
    anchors = ("shot",)
    knob = zoo.Knob("shots", 0, 64)

    def __init__(self, *, shots: int = 1, **base: Any) -> None:
        super().__init__(**base)
        wrong = not is_count(shots, least=0)
        refuse("last_shots", [f"shots must be a whole number of at least 0, got {shots!r}"] if wrong else [])
        self.shots = shots

    def plan(self, q: Tensor, k: Tensor, layout: zoo.Layout) -> zoo.Plan:  # noqa: ARG002
        """Return a plan: each shot attends to itself and to the `shots` shots before it."""
        pieces = layout.partition("shot")
        back = pieces.shot[:, None] - pieces.shot
        return zoo.Plan.blocks(pieces, pieces, same_film(pieces, pieces) & (back >= 0) & (back <= self.shots))


@zoo.register("shot_summary")
class ShotSummary(zoo.Attention):
    """The own shot, and one summary token for each other shot: its mean key and value, in the same softmax.

    A summary counts as many tokens as it stands for, by the logarithm of their number, which is added to its score. The
    global caption counts as a shot.

    Args:
        causal: "strict": only earlier shots are summarised. null: all shots of the film.
    """

    limits = "a mean of keys is no set of keys"
    strict: ClassVar[Mapping[str, Any] | str] = {"causal": "strict"}
    anchors = ("shot",)

    def __init__(self, *, causal: Literal["strict"] | None = None, **base: Any) -> None:
        super().__init__(**base)
        refuse(
            "shot_summary",
            [unknown("causal", str(causal), ["strict", "null"])] if causal not in ("strict", None) else [],
        )
        self.causality = causal

    def branches(self, call: zoo.Call) -> list[zoo.Branch | zoo.Term]:
        """Return one branch: the own shot, with the means of other shots as further keys."""
        shots = call.layout.partition("shot")
        own, others = zoo.Plan.within(shots), same_film(shots, shots) & (shots.shot[:, None] != shots.shot)
        if self.causality == "strict":
            others &= shots.shot[:, None] > shots.shot
        means = zoo.Plan.blocks(shots, Partition.singles(shots.count, shots.device), others)
        if call.q_rows is not None:
            own, means = own.narrow(call.q_rows), means.narrow(call.q_rows)
        return [_remembering(own, means, call, pooled(shots, call.k), pooled(shots, call.v), shots.sizes)]


@zoo.register("pooled_memory")
class PooledMemory(zoo.Attention):
    """The own shot, and a memory of one frame: the mean of all earlier shots' keys and values at each place.

    The memory has the size of a frame however long the film is, as a recurrent state has. An entry counts as many
    tokens as it stands for, by the logarithm of their number, which is added to its score. Captions are remembered in
    no place, and the global caption neither.
    """

    limits = "a mean of keys is no set of keys"
    strict: ClassVar[Mapping[str, Any] | str] = {}
    causality = "strict"
    anchors = ("shot",)

    def branches(self, call: zoo.Call) -> list[zoo.Branch | zoo.Term]:
        """Return one branch: the own shot, with the memory of the shots before it as further keys."""
        memory = _memory(call.layout)
        own, past = zoo.Plan.within(memory.shots), memory.plan
        if call.q_rows is not None:
            own, past = own.narrow(call.q_rows), past.narrow(call.q_rows)
        k, v = (memory.mean.to(y.dtype) @ y for x in (call.k, call.v) for y in (pooled(memory.places, x),))
        return [_remembering(own, past, call, k, v, memory.counts)]

    def routing_flops(self, call: zoo.Call) -> int:
        """The sums over earlier shots."""
        batch, heads, _, dim = call.k.shape
        return 2 * batch * heads * _memory(call.layout).mean.numel() * (dim + call.v.shape[-1])


def _remembering(own: zoo.Plan, past: zoo.Plan, call: zoo.Call, k: Tensor, v: Tensor, counts: Tensor) -> zoo.Branch:
    """The own shot and pooled keys in one softmax; `counts` (B|1, H|1, n) are the tokens that a key stands for."""
    if not k.shape[2]:
        return zoo.Branch(own)
    weight = counts.clamp(min=1).to(k.dtype).log()
    summary = zoo.Segment(past, k.to(call.k.dtype), v.to(call.v.dtype), weight)
    return replace(zoo.Branch(own), segments=(summary,))


@dataclass(frozen=True, eq=False)
class _Memory:
    """What `PooledMemory` needs of a layout.

    `places` are the video tokens by shot and place; the n entries are of each shot and place that an earlier shot has.
    `mean` (n, places) makes an entry of the places' means; `counts` (1, 1, n) are tokens; `plan` is of shots × entries.
    """

    shots: Partition
    places: Partition
    mean: Tensor
    counts: Tensor
    plan: zoo.Plan


@remembered(32)
def _memory(layout: zoo.Layout) -> _Memory:
    shots = layout.partition("shot")
    places = layout.partition("shot", "row", "col", where=~layout.is_text)
    row, col, shot = (places.of(x) for x in (layout.row, layout.col, layout.shot))
    alike = same_film(places, places) & (row[:, None] == row) & (col[:, None] == col)
    taken = (alike & (shot[:, None] > shot)) * places.sizes[0, 0].float()
    kept = taken.sum(-1) > 0
    taken = taken[kept]
    counts = taken.sum(-1)
    # The shot, as a piece, of each entry.
    owner = (shots.sample[:, None] == places.sample[kept]) & (shots.shot[:, None] == shot[kept])
    entries = Partition.singles(len(taken), layout.device)
    return _Memory(shots, places, taken / counts[:, None], counts[None, None], zoo.Plan.blocks(shots, entries, owner))


@zoo.register("frozen_router")
class FrozenRouter(zoo.Attention):
    """A method whose router cannot learn: what it chooses by is random and frozen.

    A method with a router of its own, such as `moga`, keeps the parameters that it begins with. Any other chooses by
    frozen random projections of what q, k, v were projected from, in place of queries and keys. Auxiliary losses are
    left out. If this does as well as the method, the rest of the model has absorbed the routing: the choice itself has
    taught nothing.

    Args:
        of: The method, as {"name": method, **settings}; each of its branches attends to tokens.
    """

    limits = "the method inside has its own"
    strict: ClassVar[Mapping[str, Any] | str] = "the method inside has its own"
    small: ClassVar[Mapping[str, Any]] = {"of": {"name": "moc", "chunk": "shot", "top_k": 1}}

    def __init__(self, *, of: Mapping[str, Any], **base: Any) -> None:
        super().__init__(**base)
        refuse("frozen_router", ["dim, the width of hidden, is needed for the projections"] if not self.dim else [])
        settings = {key: value for key, value in dict(of).items() if key != "name"}
        sizes: dict[str, Any] = {
            "heads": self.heads,
            "head_dim": self.head_dim,
            "dim": self.dim,
            "text_reads": self.text_reads,
        }
        self.inner = zoo.build(of["name"], **sizes, **settings)
        for module in self.inner.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, weight.detach())
        for name in ("causality", "anchors", "may_be_empty", "pools_queries", "needs_all_heads"):
            setattr(self, name, getattr(self.inner, name))
        self.routes_by_features = bool(self.inner.features(torch.zeros(1, 1, self.dim or 0)))
        if not self.routes_by_features:
            self.own_heads = "each head has random projections of its own"
            for name in ("queries", "keys"):
                self.register_buffer(name, torch.randn(self.dim or 0, self.heads * self.head_dim))

    def features(self, hidden: Tensor) -> dict[str, Tensor]:
        """The features of the method inside, or the random queries and keys (B, L, heads · head_dim)."""
        if self.routes_by_features:
            return self.inner.features(hidden)
        return {name: hidden.detach() @ getattr(self, name).to(hidden.dtype) for name in ("queries", "keys")}

    def branches(self, call: zoo.Call) -> list[zoo.Branch | zoo.Term]:
        """Return the branches that the method inside makes of what is random."""
        if not self.routes_by_features:
            features, first = self.featured(call), call.head_offset
            q, k = (
                features[name].unflatten(-1, (self.heads, -1)).transpose(1, 2)[:, first : first + call.q.shape[1]]
                for name in ("queries", "keys")
            )
            call = replace(call, q=q if call.q_rows is None else q[:, :, call.q_rows], k=k, v=k, features=None)
        made = self.inner.branches(call)
        if not all(isinstance(branch, zoo.Branch) and branch.of_tokens for branch in made):
            raise ZooError(f"frozen_router: {type(self.inner).__name__} attends to more than tokens; try moc or moba")
        return made

    def routing_flops(self, call: zoo.Call) -> int:
        """The projections and the routing of the method inside."""
        batch, _, length, _ = call.k.shape
        projections = (
            0 if self.routes_by_features else 4 * batch * length * (self.dim or 0) * call.q.shape[1] * self.head_dim
        )
        return self.inner.routing_flops(call) + projections


def _within(sample: Tensor) -> Tensor:
    """The place of each entry among those of its own film, whose entries follow one another."""
    place = torch.arange(len(sample), device=sample.device)
    return place - torch.searchsorted(sample, sample)
