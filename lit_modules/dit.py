"""A video diffusion transformer whose attention is any registered method, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparse_zoo as zoo
from lit_modules.settings import Model
from lit_modules.stream import Stream, stream, video_only
from sparse_zoo.bounded import bounded
from sparse_zoo.errors import refuse, unknown
from sparse_zoo.gather import add_at, take
from sparse_zoo.parallel import Ulysses, split_sizes
from sparse_zoo.remember import remembered

TEXT = ("joint", "cross")
POOLED_TEXT = ("none", "adaln", "tokens")
PREDICTS = ("velocity", "clean")
LEAST_TIME = 0.05  # a velocity made from a clean prediction divides by no less
ROPE_BASE = (1000.0, 50.0, 50.0)  # of time, rows, columns: films are long, frames of tokens are small


@dataclass(frozen=True)
class DiTOutput:
    """velocity (B, Nv, P); losses by name, summed over layers, already weighted; one result per layer.

    The results hold what is needed to say what ran, not the graph: `out` is on the meta device (a shape without
    data), losses are detached. `past` is the given one and what this pass adds to it, None if none was given.
    """

    velocity: Tensor
    losses: dict[str, Tensor]
    results: list[zoo.Result]
    past: Past | None = None


@dataclass(frozen=True, eq=False)
class Past:
    """What later tokens need of the first `tokens` tokens of a stream, `video` of them video, layer by layer.

    Each layer keeps keys and values (B, H, tokens, D) and the hidden state (B, tokens, dim) that they were projected
    from, by which some methods route. Empty at the start.
    """

    tokens: int = 0
    video: int = 0
    layers: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()


@dataclass(frozen=True, eq=False)
class Captions:
    """What cross-attention reads."""

    words: Tensor  # (B, Nt, dim)
    rotation: tuple[Tensor, Tensor]  # cos, sin: (Nt, head_dim / 2)
    plan: zoo.Plan  # Nv queries × Nt keys


@dataclass(frozen=True, eq=False)
class Context:
    """What every block of one forward pass reads."""

    layout: zoo.Layout  # of the stream that the blocks see
    rows: Tensor | None  # (Lq,) the tokens of it that run; None: all
    row_of: Tensor  # (Lq,)
    condition: Tensor  # (B, S + F, dim)
    rotation: tuple[Tensor, Tensor]  # cos, sin: (Lq, head_dim / 2)
    captions: Captions | None  # with cross-attention only
    sequence: Ulysses | None  # the ranks that share the stream
    noise: Tensor  # (B, S)
    step: int | None
    seed: int
    memory: dict[Any, Any] | None
    past: Past | None


class VideoDiT(nn.Module):
    """Predicts the velocity of video patches from noisy patches, captions and one noise time per shot.

    attention: {"name": method, **settings}, for all blocks, or a list of them, one per layer.
    model: fields of `Model`. With text "cross" each video token reads its own shot's caption and its film's global
        caption by cross-attention, whose cost is not in `results`: they are of the registered attention alone. With
        pooled_text "adaln" the embeddings of the same captions are summed into the shot's condition; "tokens" adds a
        projection of that sum to the shot's video tokens too. From a "clean" prediction the velocity follows as
        (x_t - film) / t: the noise of patches of more numbers than `dim` cannot pass through the model.

    Each token is conditioned (adaLN-zero) by the time and pooled captions of its shot; a global caption, which is
    always clean, by time 0 and its own pooled words. So no token depends on later shots but through attention.
    Positions are rotary, see `stream`; of head_dim / 2 rotated pairs a third each (rounded down) tells rows and
    columns, the rest tells time. At the start the last layer says 0 everywhere.

    Captions are token ids, of which `vocabulary` is the learned null token that stands for a dropped caption; or, with
    `text_dim`, embeddings of that width from a text encoder, which are normalised and projected, and a learned null
    embedding stands for each token of a dropped caption.

    Where several ranks share a film, `sequence` holds them: each is given the whole film and embeds, modulates and maps
    its own tokens, and the velocity is gathered, so that every rank returns the whole of it. A pass with `past` is not
    shared: every rank computes it.

    Raises ZooError for sizes that do not fit together, and whatever `sparse_zoo.build` refuses.
    """

    sequence: Ulysses | None = None

    def __init__(
        self,
        *,
        channels: int,
        patch: Sequence[int],
        vocabulary: int,
        attention: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        text_dim: int | None = None,
        **model: Any,
    ) -> None:
        super().__init__()
        shape = Model(**model)
        dim, depth, heads, mlp_ratio = shape.dim, shape.depth, shape.heads, shape.mlp_ratio
        text, pooled_text, predicts, checkpoint = shape.text, shape.pooled_text, shape.predicts, shape.checkpoint
        per_layer = [attention] * depth if isinstance(attention, Mapping) else list(attention)
        choices = {"text": (text, TEXT), "pooled_text": (pooled_text, POOLED_TEXT), "predicts": (predicts, PREDICTS)}
        refuse(
            "VideoDiT",
            _misfits(dim, depth, heads, channels, patch, vocabulary, per_layer)
            + [unknown(name, given, allowed) for name, (given, allowed) in choices.items() if given not in allowed]
            + ([f"text_dim must be at least 1, got {text_dim}"] if text_dim is not None and text_dim < 1 else [])
            + ([f"mlp_ratio must be at least 1 / dim, got {mlp_ratio}"] if int(mlp_ratio * dim) < 1 else []),
        )
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.channels, self.patch, self.vocabulary = channels, (patch[0], patch[1], patch[2]), vocabulary
        self.text, self.pooled_text, self.predicts, self.checkpoint = text, pooled_text, predicts, checkpoint
        self.patch_size = channels * math.prod(self.patch)

        self.patches = nn.Linear(self.patch_size, dim)
        self.text_dim = text_dim
        self.words: nn.Module
        if text_dim is None:
            self.words = nn.Embedding(vocabulary + 1, dim)
        else:
            self.words = nn.Sequential(nn.RMSNorm(text_dim), nn.Linear(text_dim, dim))
            self.null_text = nn.Parameter(torch.randn(text_dim))
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.pooled = nn.Linear(dim, dim) if pooled_text == "tokens" else None
        self.blocks = nn.ModuleList(
            Block(
                dim=dim,
                heads=heads,
                hidden=int(mlp_ratio * dim),
                attention=zoo.build(
                    settings["name"],
                    heads=heads,
                    head_dim=self.head_dim,
                    dim=dim,
                    **{key: value for key, value in settings.items() if key != "name"},
                ),
                cross=text == "cross",
            )
            for settings in per_layer
        )
        self.modulation = nn.Linear(dim, 2 * dim)
        self.final = nn.Linear(dim, self.patch_size)

        if isinstance(self.words, nn.Embedding):
            nn.init.normal_(self.words.weight, std=0.5)
        for layer in (self.modulation, self.final):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def null_id(self) -> int:
        """The token id of a dropped caption."""
        return self.vocabulary

    def drop_text(self, text: Tensor, dropped: Tensor) -> Tensor:
        """Captions with the null token or embedding in the place of those that are dropped.

        Args:
            text: int64 (B, Nt), or (B, Nt, text_dim).
            dropped: bool (B, Nt).

        Returns:
            Captions of the same shape.
        """
        if self.text_dim is None:
            return text.masked_fill(dropped, self.null_id)
        return torch.where(dropped[..., None], self.null_text.to(text.dtype), text)

    def patchify(self, clips: Sequence[Tensor]) -> Tensor:
        """Clips (B, F, C, H, W), one per shot in stream order -> patches (B, Nv, P). Raises ZooError if they misfit."""
        f, h, w = self.patch
        refuse("patchify", self._bad_clips(clips))
        tokens = []
        for clip in clips:
            frames, _, height, width = clip.shape[1:]
            x = clip.unflatten(1, (frames // f, f)).unflatten(4, (height // h, h)).unflatten(6, (width // w, w))
            tokens.append(x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3))  # (B, frames·rows·cols, C·f·h·w)
        return torch.cat(tokens, dim=1)

    def unpatchify(self, x: Tensor, layout: zoo.Layout) -> list[Tensor]:
        """Patches (B, Nv, P) -> clips (B, F, C, H, W), one per shot in stream order."""
        shots = [shot for film in layout.films for shot in film.shots]
        sizes = [shot.frames * shot.rows * shot.cols for shot in shots]
        refuse("unpatchify", [_mismatch("video tokens", x.shape[1], sum(sizes))])
        clips = []
        for shot, tokens in zip(shots, x.split(sizes, dim=1), strict=True):
            grid = tokens.unflatten(1, (shot.frames, shot.rows, shot.cols)).unflatten(4, (self.channels, *self.patch))
            clips.append(grid.permute(0, 1, 5, 4, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(1, 2).contiguous())
        return clips

    @property
    def strict(self) -> bool:
        """Whether no token reads later shots in any layer: the shots so far are what they are in the whole film."""
        return all(cast(Block, block).attention.causality == "strict" for block in self.blocks)

    def embed(
        self, video: Tensor, words: Tensor, layout: zoo.Layout, sequence: Ulysses | None = None
    ) -> tuple[Tensor, zoo.Layout]:
        """What enters the first block, (B, L, dim), and its layout: the given one, or with "cross" that of the video.

        video (B, Nv, P), words (B, Nt, dim) as `self.words` embeds them. With `sequence`, of this rank's tokens alone.
        """
        table = stream(layout)
        inner = video_only(layout) if self.text == "cross" else layout
        shot_of_video, merge, own_words = table.shot_of_video, table.merge, words
        if sequence is not None:
            own = sequence.own(len(inner))
            tokens = _video_before(inner, own)
            video, shot_of_video = video[:, tokens], shot_of_video[tokens]
            own_words = words[:, own.start - tokens.start : own.stop - tokens.stop]
            merge = torch.cat([inner.is_text[own].nonzero()[:, 0], (~inner.is_text[own]).nonzero()[:, 0]]).argsort()
        x = self.patches(video)  # (B, Nv, dim)
        if self.pooled is not None:
            x = x + self.pooled(take(_pool(words, table), 1, shot_of_video))
        if self.text == "cross":
            return x, inner
        return take(torch.cat([own_words, x], dim=1), 1, merge), layout

    def forward(
        self,
        video: Tensor,
        text: Tensor,
        time: Tensor,
        layout: zoo.Layout,
        *,
        step: int | None = None,
        seed: int = 0,
        memory: dict[Any, Any] | None = None,
        past: Past | None = None,
    ) -> DiTOutput:
        """video (B, Nv, P), text int64 (B, Nt) or (B, Nt, text_dim), time in [0, 1] (B, S), one a shot, or (B,).

        `layout` is the joint one, captions included. `step` (of training, by which schedules go), `seed` and `memory`
        go to the attention. With `past`, of the first tokens of this stream in earlier passes, only the tokens after
        them run, and the velocity is that of their video; this is the same where the model is `strict`. Raises
        ZooError where a tensor does not match the layout, or the model is not strict and `past` is given.
        """
        layout = layout.to(video.device)
        table = stream(layout)
        shots = len(table.film_of_shot)
        time = time[:, None].expand(-1, shots) if time.dim() == 1 else time
        refuse("VideoDiT", self._mismatches(video, text, time, table, past))

        words = self.words(text)  # (B, Nt, dim)
        sequence = self.sequence if past is None else None
        x, inner = self.embed(video, words, layout, sequence)  # (B, L, dim)
        clean = time.new_zeros(len(time), len(layout.films))  # a film's global caption
        condition = self.time(_sinusoid(torch.cat([time, clean], dim=1), self.dim).to(words.dtype))  # (B, S + F, dim)
        if self.pooled_text != "none":
            condition = condition + _pool(words, table)
        seen = table if inner is layout else stream(inner)

        # The tokens that run here, `own` of the stream, and which video tokens those are.
        if sequence is not None:
            own = sequence.own(len(inner))
            own_tokens = _video_before(inner, own)
        else:
            own, own_tokens = (
                slice(0 if past is None else past.tokens, len(inner)),
                slice(0 if past is None else past.video, len(seen.video)),
            )
        row_of = seen.row_of[own]
        own_video = seen.video[own_tokens] - own.start  # (Nv', ): of the tokens that run
        every = past is None and sequence is None
        rows = None if every else torch.arange(own.start, own.stop, device=inner.device)
        captions = None
        if self.text == "cross" and len(table.text):
            plan = own_captions(layout, inner)
            rotation = _rotation(table.positions[table.text], self.head_dim)
            captions = Captions(words, rotation, plan if rows is None else plan.narrow(rows))
        context = Context(
            layout=inner,
            rows=rows if sequence is None else None,
            row_of=row_of,
            condition=F.silu(condition),
            rotation=_rotation(seen.positions[own], self.head_dim),
            captions=captions,
            sequence=sequence,
            noise=time,
            step=step,
            seed=seed,
            memory=memory,
            past=past,
        )
        x = x if sequence is not None else x[:, own]
        losses: dict[str, Tensor] = {}
        results, kept = [], []
        for i, block in enumerate(self.blocks):
            if self.checkpoint and torch.is_grad_enabled():
                x, result, keys = checkpoint(block, x, context, i, len(self.blocks), use_reentrant=False)
            else:
                x, result, keys = block(x, context, i, len(self.blocks))
            for name, loss in result.losses.items():
                losses[name] = losses[name] + loss if name in losses else loss
            results.append(replace(result, losses={name: loss.detach() for name, loss in result.losses.items()}))
            kept.append(keys)

        x = take(x, 1, own_video)  # (B, Nv', dim)
        shot_of_video = row_of[own_video]
        scale, shift = take(self.modulation(context.condition), 1, shot_of_video).chunk(2, dim=-1)
        out = self.final(_modulate(x, scale, shift))  # (B, Nv', P)
        if self.predicts == "clean":
            t = time[:, shot_of_video, None].clamp(min=LEAST_TIME).to(video.dtype)
            out = (video[:, own_tokens] - out) / t
        if sequence is not None:
            out = sequence.gather(out, 1, _video_on_ranks(inner, sequence.size))
        grown = None if past is None else Past(len(inner), len(seen.video), tuple(kept))
        return DiTOutput(out, losses, results, grown)

    def _bad_clips(self, clips: Sequence[Tensor]) -> list[str]:
        f, h, w = self.patch
        reasons = ["needs at least one clip"] if not clips else []
        for i, clip in enumerate(clips):
            shape = tuple(clip.shape)
            if len(shape) != 5:
                reasons.append(f"clip {i} must be (B, F, C, H, W), got {shape}")
            elif shape[2] != self.channels or shape[1] % f or shape[3] % h or shape[4] % w:
                want = f"(B, a multiple of {f}, {self.channels}, a multiple of {h}, a multiple of {w})"
                reasons.append(f"clip {i} must be {want}, got {shape}")
        return reasons

    def _mismatches(self, video: Tensor, text: Tensor, time: Tensor, table: Stream, past: Past | None) -> list[str]:
        batches = {"video": video.shape[0], "text": text.shape[0], "time": time.shape[0]}
        wanted = () if self.text_dim is None else (self.text_dim,)
        return [
            f"text must be (B, Nt{''.join(f', {n}' for n in wanted)}), got {tuple(text.shape)}"
            if text.shape[2:] != wanted
            else "",
            _mismatch("video tokens", video.shape[1], len(table.video)),
            _mismatch("text tokens", text.shape[1], len(table.text)),
            _mismatch("shot times", time.shape[1], len(table.film_of_shot)),
            f"patches have {video.shape[2]} numbers, the model's have {self.patch_size}"
            if video.shape[2] != self.patch_size
            else "",
            f"batch sizes differ: {batches}" if len(set(batches.values())) > 1 else "",
            "keys of earlier shots can be kept only where every layer's attention is strictly causal"
            if past is not None and not self.strict
            else "",
        ]


class Block(nn.Module):
    """adaLN-zero block: registered self-attention, cross-attention to captions where asked for, MLP."""

    def __init__(self, *, dim: int, heads: int, hidden: int, attention: zoo.Attention, cross: bool) -> None:
        super().__init__()
        self.heads = heads
        self.attention = attention
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = nn.RMSNorm(dim // heads), nn.RMSNorm(dim // heads)
        self.out = nn.Linear(dim, dim)
        self.captions = CaptionAttention(dim, heads) if cross else None
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def matrices(self) -> list[Tensor]:
        """What maps tokens to tokens: the weights of attention and MLP, not of the modulation."""
        maps: list[nn.Module] = [self.qkv, self.out, *self.mlp]
        if self.captions is not None:
            maps += [self.captions.q, self.captions.kv, self.captions.out]
        return [layer.weight for layer in maps if isinstance(layer, nn.Linear)]

    def forward(
        self, x: Tensor, context: Context, layer: int, layers: int
    ) -> tuple[Tensor, zoo.Result, tuple[Tensor, Tensor, Tensor] | None]:
        """x (B, Lq, dim) after this block, what attention did, and, where there is a past, this layer of the next."""
        modulation = take(self.modulation(context.condition), 1, context.row_of)  # (B, Lq, 6·dim)
        scale_a, shift_a, gate_a, scale_m, shift_m, gate_m = modulation.chunk(6, dim=-1)

        hidden = _modulate(x, scale_a, shift_a)  # (B, Lq, dim)
        q, k, v = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, Lq, D) each
        q = _rotate(self.q_norm(q), context.rotation).to(v.dtype)
        k = _rotate(self.k_norm(k), context.rotation).to(v.dtype)
        kept = None
        if context.past is not None:
            if context.past.layers:
                before = context.past.layers[layer]
                k, v, hidden = (torch.cat(pair, dim=-2) for pair in zip(before, (k, v, hidden), strict=True))
            kept = k, v, hidden
        attend = self.attention if context.sequence is None else partial(context.sequence.run, self.attention)
        result = attend(
            q,
            k,
            v,
            context.layout,
            q_rows=context.rows,
            hidden=hidden,
            layer=layer,
            layers=layers,
            noise=context.noise,
            step=context.step,
            seed=context.seed,
            memory=context.memory,
        )
        x = x + gate_a * self.out(_join_heads(result.out))
        if self.captions is not None and context.captions is not None:
            x = x + self.captions(x, context.rotation, context.captions)
        x = x + gate_m * self.mlp(_modulate(x, scale_m, shift_m))
        return x, replace(result, out=result.out.detach().to("meta")), kept


class CaptionAttention(nn.Module):
    """Video tokens (B, Nv, dim) read the words that the captions' plan gives them; where there are none they gain 0."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.q_norm, self.k_norm = nn.RMSNorm(dim // heads), nn.RMSNorm(dim // heads)
        self.out = nn.Linear(dim, dim, bias=False)  # a bias would move tokens that read nothing
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], captions: Captions) -> Tensor:
        q = self.q(F.layer_norm(x, x.shape[-1:])).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, Nv, D)
        k, v = self.kv(captions.words).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, Nt, D) each
        q = _rotate(self.q_norm(q), rotation).to(v.dtype)
        k = _rotate(self.k_norm(k), captions.rotation).to(v.dtype)
        read: Tensor = self.out(_join_heads(zoo.attend(q, k, v, captions.plan).out))
        return read


def _misfits(
    dim: int,
    depth: int,
    heads: int,
    channels: int,
    patch: Sequence[int],
    vocabulary: int,
    attention: Sequence[Mapping[str, Any]],
) -> list[str]:
    sizes = {"dim": dim, "depth": depth, "heads": heads, "channels": channels}
    reasons = [f"{name} must be at least 1, got {value}" for name, value in sizes.items() if value < 1]
    if vocabulary < 0:
        reasons.append(f"vocabulary must be at least 0, got {vocabulary}")
    if len(patch) != 3 or min(patch) < 1:
        reasons.append(f"patch must be (frames, rows, cols), each at least 1, got {list(patch)}")
    if heads >= 1 and dim % heads:
        reasons.append(f"heads must divide dim, got dim {dim} and {heads} heads")
    elif heads >= 1 and (dim // heads % 2 or dim // heads < 6):
        reasons.append(f"head_dim = dim / heads must be even and at least 6 for 3D RoPE, got {dim // heads}")
    if len(attention) != depth:
        reasons.append(f"attention must be one mapping or a list of depth = {depth} mappings, got {len(attention)}")
    reasons += [
        f"attention of layer {i} must be a mapping with a 'name', got {dict(settings)}"
        for i, settings in enumerate(attention)
        if "name" not in settings
    ]
    return reasons


def _mismatch(what: str, given: int, want: int) -> str:
    return f"got {given} {what}, the layout has {want}" if given != want else ""


def _modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def _join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, H, L, D) -> (B, L, H·D)


def _sinusoid(time: Tensor, dim: int) -> Tensor:
    """Times in [0, 1], (B, S) -> (B, S, dim), periods from about 1/100 to 10."""
    frequency = torch.exp(-math.log(1000.0) * torch.arange((dim + 1) // 2, device=time.device) / ((dim + 1) // 2))
    angle = 600.0 * time.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)[..., :dim]


def _rotation(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (L, head_dim / 2), of positions (L, 3)."""
    pairs = head_dim // 2
    angles = []
    for axis, (base, count) in enumerate(
        zip(ROPE_BASE, (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3), strict=True)
    ):
        frequency = base ** (-torch.arange(count, device=positions.device) / count)
        angles.append(positions[:, axis, None] * frequency)
    angle = torch.cat(angles, dim=-1)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _pool(words: Tensor, table: Stream) -> Tensor:
    """(B, Nt, dim) -> (B, S + F, dim): sums of words.

    For each shot of its caption's and its film's global caption's; then for each film of the global caption's alone.
    """
    shots, films = len(table.film_of_shot), len(table.shots_of_film)
    total = words.new_zeros(words.shape[0], shots + films, words.shape[2])
    total = add_at(total, 1, table.row_of[table.text], words)
    film = total[:, shots:]
    return torch.cat([total[:, :shots] + take(film, 1, table.film_of_shot), film], dim=1)


def _video_before(layout: zoo.Layout, own: slice) -> slice:
    """Which of the stream's video tokens, counted among themselves, are those of a rank's tokens `own`."""
    before = _video_counts(layout)
    return slice(before[own.start], before[own.stop])


def _video_on_ranks(layout: zoo.Layout, ranks: int) -> list[int]:
    """How many video tokens each rank holds."""
    before = _video_counts(layout)
    ends = [0, *accumulate(split_sizes(len(layout), ranks))]
    return [before[last] - before[first] for first, last in pairwise(ends)]


@bounded(32)
def _video_counts(layout: zoo.Layout) -> list[int]:
    """How many video tokens lie before each token of the stream, and in all."""
    return [0, *(~layout.to("cpu").is_text).cumsum(0).tolist()]


@remembered(32)
def own_captions(layout: zoo.Layout, video: zoo.Layout) -> zoo.Plan:
    """Video tokens × text tokens: each shot reads its own caption and its film's global caption."""
    shots = video.partition("shot")
    captions = layout.partition("shot", where=layout.is_text)
    own = (shots.shot[:, None] == captions.shot) | (captions.shot == -1)
    same_film = shots.sample[:, None] == captions.sample
    return zoo.Plan.blocks(shots, captions.narrow(stream(layout).text), own & same_film)
