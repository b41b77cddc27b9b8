"""Attach methods to the self-attentions of a model, through hooks that a deep copy carries with it."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparse_zoo.attention import Attention, Call, Result
from sparse_zoo.bridge.family import Arguments, Family, Sizes, find_family
from sparse_zoo.bridge.stream import Intercept, Stream, film_layout, kept_tokens, make_stream
from sparse_zoo.bridge.weights import load_weights, save_weights
from sparse_zoo.cost import Cost
from sparse_zoo.errors import ZooError, refuse
from sparse_zoo.layers import Layer, per_layer
from sparse_zoo.light import opaque
from sparse_zoo.registry import build
from sparse_zoo.requirements import is_count
from sparse_zoo.simulate import Simulated, simulate

ATTRIBUTE = "_zoo_bridge"
SITE = "_zoo_site"
NATIVE = ("native", "_native_math", "_native_efficient", "_native_flash", "_native_cudnn")
"""Attention backends of diffusers that call torch's SDPA."""

CONTEXT = ("hidden", "layer", "layers", "noise", "step", "seed", "memory")
COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Captured:
    """A call as a layer got it, on the CPU, and {"name": method, **settings} of the attention that served it."""

    call: Call
    method: Layer


@dataclass(frozen=True)
class Film:
    """What a model is not told: where shots begin, whose the text is, and by what random draws go."""

    shots: tuple[int, ...] | None = None
    captions: tuple[int, ...] | None = None
    noise: float | Tensor | None = None
    step: int | None = None
    seed: int = 0


@dataclass(eq=False)
class Site:
    """One self-attention of the model. `active` holds the interceptions that are under way."""

    bridge: Bridge
    module: nn.Module
    layer: int
    handles: list[Any] = field(default_factory=list)
    active: list[Intercept] = field(default_factory=list)


class Bridge:
    """A model whose self-attentions are served by methods of the zoo; made by `attach`.

    Methods are the submodules `zoo` of the self-attentions, so they move, train, copy and are saved with the model;
    `save` and `load` take their weights apart.

    Attributes:
        model: The transformer.
        family: How it lays out its stream.
        layers: {"name": method, **settings} of each self-attention, in order.
        results: The last forward pass, by layer: what `Attention` gave, without data and graph.
    """

    def __init__(self, model: nn.Module, family: Family, layers: Sequence[Layer], modules: Sequence[nn.Module]) -> None:
        self.model, self.family, self.layers = model, family, [dict(layer) for layer in layers]
        self.sites = [Site(self, module, layer) for layer, module in enumerate(modules)]
        self.results: dict[int, Result] = {}
        self._film = Film()
        self._grid: Sizes | None = None
        self._noise: Tensor | None = None
        self._losses: dict[int, dict[str, Tensor]] = {}
        self._streams: dict[Any, Stream] = {}
        self._masks: list[tuple[Tensor, Tensor | None]] = []
        self._memories: dict[int | str, dict[Any, Any]] = {}
        self._memory: dict[Any, Any] | None = None
        self._last: tuple[float, int] | None = None
        self._call: str | None = None  # the name that a pipeline gives a call, "cond" or "uncond"
        self._trains = False
        self._captures: list[tuple[frozenset[int] | None, list[Captured]]] = []
        self._routers_train = True
        self._bypassed = False
        self._handles: list[Any] = []

    # -- what a user says and reads ----------------------------------------------------------------------------------

    def film(
        self,
        shots: Sequence[int] | None = None,
        captions: Sequence[int] | None = None,
        *,
        noise: float | Tensor | None = None,
        step: int | None = None,
        seed: int = 0,
    ) -> Bridge:
        """Say what the next forward passes are of; what is not given is as at the start.

        Args:
            shots: Frames of tokens of each shot (latent frames, divided by the temporal patch); None: one shot.
            captions: Text tokens of each shot's caption, where the stream has text: the last ones, in order; those
                before them are the film's. None: all text is the film's.
            noise: Noise time, 0 clean … 1, one number or one a sample; None: as the model is told.
            step: Training step, by which schedules go.
            seed: Seed of random draws.

        Raises:
            ZooError: for what cannot be; whether shots and captions add up shows when the model is called.
        """
        refuse(
            "film",
            [
                f"shots must be whole numbers of at least 1, got {list(shots)}"
                if shots is not None and (not shots or not all(is_count(x) for x in shots))
                else "",
                f"captions must be whole numbers of at least 0, got {list(captions)}"
                if captions is not None and not all(is_count(x, 0) for x in captions)
                else "",
                f"there are {len(captions)} captions and {len(shots or [0])} shots"
                if captions is not None and len(captions) != len(shots or [0])
                else "",
            ],
        )
        film = Film(_counts(shots), _counts(captions), noise, step, seed)
        if (film.shots, film.captions, film.seed) != (self._film.shots, self._film.captions, self._film.seed):
            self._forget()
        self._film = film
        return self

    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses of the last forward pass by name, weighted, summed over layers: add them to the loss."""
        found: dict[str, Tensor] = {}
        for own in self._losses.values():
            for name, loss in own.items():
                found[name] = found[name] + loss.to(found[name].device) if name in found else loss
        return found

    def cost(self) -> Cost:
        """What the attentions of the last forward pass took together; `results[layer].cost()` tells them apart."""
        refuse("cost", ["the model has not run yet; call it first"] if not self.results else [])
        return reduce(add, (result.cost() for result in self.results.values()))

    @contextmanager
    def capture(self, layers: Sequence[int] | None = None) -> Iterator[list[Captured]]:
        """Collect the calls that `layers` (all, when None) get within; a sampler's `memory` is left out."""
        refuse(
            "capture",
            [
                f"layers must be in 0 … {len(self.sites) - 1}, got {layer!r}"
                for layer in layers or []
                if not is_count(layer, 0) or layer >= len(self.sites)
            ],
        )
        found = (None if layers is None else frozenset(layers)), list[Captured]()
        self._captures.append(found)
        try:
            yield found[1]
        finally:
            self._captures = [other for other in self._captures if other is not found]

    @contextmanager
    def original(self) -> Iterator[nn.Module]:
        """The model with its own attention within, as a dense teacher; adapters stay as they are."""
        before, self._bypassed = self._bypassed, True
        try:
            yield self.model
        finally:
            self._bypassed = before

    def simulate(
        self,
        latent: Sizes,
        *,
        text: int = 0,
        shots: Sequence[int] | None = None,
        captions: Sequence[int] | None = None,
        batch: int = 1,
    ) -> list[Simulated]:
        """What each layer would cost on latents of these frames, rows and columns; needs no weights.

        `text` tokens are in the stream; shots and captions are as in `film`. See `sparse_zoo.simulate` for what is
        exact.
        """
        patch = self.family.patch(self.model)
        f, h, w = (size // own for size, own in zip(latent, patch, strict=True))
        refuse(
            "simulate",
            [f"{self.family.name} has no text in its stream, got {text}"] * bool(self.family.text == "none" and text),
        )
        layout = film_layout((f, h, w), _counts(shots), text, _counts(captions))
        known: dict[str, Simulated] = {}
        found = []
        for site, layer in zip(self.sites, self.layers, strict=True):
            heads, head_dim, dim = self.family.shape(site.module)
            settings = {key: value for key, value in layer.items() if key != "name"}
            key = repr((layer, heads, head_dim, dim))
            if key not in known:
                known[key] = simulate(
                    layer["name"], layout, heads=heads, head_dim=head_dim, dim=dim, batch=batch, settings=settings
                )
            found.append(known[key])
        return found

    def methods(self) -> list[Attention]:
        """The attached methods, by layer."""
        return [cast(Attention, site.module.zoo) for site in self.sites]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The methods' own parameters: routers, gates, projections."""
        return (parameter for method in self.methods() for parameter in method.parameters())

    def requires_grad_(self, train: bool = True) -> Bridge:
        """Let the methods' parameters train, or freeze them."""
        self._routers_train = train
        for parameter in self.parameters():
            parameter.requires_grad_(train)
        return self

    def save(self, path: str | Path) -> Path:
        """Write the methods with their weights, apart from the model's."""
        return save_weights(Path(path), self.family.name, self.layers, self.methods())

    def load(self, path: str | Path) -> Bridge:
        """Read what `save` wrote; raises `ZooError` where the methods or their shapes are others."""
        load_weights(Path(path), self.layers, self.methods())
        return self

    def detach(self) -> nn.Module:
        """Make the model what it was, and return it."""
        for handle in self._handles:
            handle.remove()
        for site in self.sites:
            for handle in site.handles:
                handle.remove()
            del site.module.zoo
            site.module.__dict__.pop(SITE)
        self.model.__dict__.pop(ATTRIBUTE)
        self.model.__dict__.pop("cache_context", None)
        self.sites, self._handles = [], []
        self._forget()
        return self.model

    # -- how it runs -------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._streams.clear()
        self._memories.clear()
        self._memory = self._last = None

    def _install(self) -> None:
        self.model.__dict__[ATTRIBUTE] = self
        if hasattr(type(self.model), "cache_context"):
            self.model.__dict__["cache_context"] = _NamedCalls(self)
        self._handles.append(self.model.register_forward_pre_hook(_before_model, with_kwargs=True))
        for site in self.sites:
            site.module.__dict__[SITE] = site
            site.handles += [
                site.module.register_forward_pre_hook(_before_attention, with_kwargs=True),
                site.module.register_forward_hook(_after_attention, always_call=True),
            ]

    def _begin(self, arguments: Arguments) -> None:
        """A forward pass of the model begins."""
        patch = self.family.patch(self.model)
        f, h, w = (size // own for size, own in zip(self.family.latent(self.model, arguments), patch, strict=True))
        if (f, h, w) != self._grid:
            self._forget()
        self._grid = f, h, w
        self.results, self._losses, self._masks = {}, {}, []
        time = self._film.noise if self._film.noise is not None else self.family.noise(self.model, arguments)
        self._noise = None if time is None else torch.as_tensor(time, dtype=torch.float32).reshape(-1).detach()
        self._trains = torch.is_grad_enabled()
        sampling = not self.model.training and not self._trains
        self._memory = self._branch_memory() if sampling and self._remembers() else None
        self._thaw()

    def _remembers(self) -> bool:
        return self._noise is not None and self._noise.device.type != "meta"

    def _branch_memory(self) -> dict[Any, Any]:
        """The memory of this call of a sampler.

        The calls of classifier-free guidance have one each: by the names that the pipeline gives them, or, where it
        gives none, by their order at one noise time. Where noise rises, a new film begins.
        """
        noise = float(cast(Tensor, self._noise).max())
        if self._last is not None and noise > self._last[0]:
            self._memories.clear()
        number = self._last[1] + 1 if self._last is not None and noise == self._last[0] else 0
        self._last = noise, number
        return self._memories.setdefault(number if self._call is None else self._call, {})

    def _thaw(self) -> None:
        """Adapters freeze all but themselves, routers too: undo that, and say so."""
        if not (self._routers_train and self.model.training and torch.is_grad_enabled()):
            return
        frozen = [parameter for parameter in self.parameters() if not parameter.requires_grad]
        if frozen:
            warnings.warn(
                f"{len(frozen)} parameters of attached methods were frozen from outside, as adapters do; they train "
                "again. Call bridge.requires_grad_(True) before making the optimizer, or bridge.requires_grad_(False) "
                "to keep them frozen.",
                stacklevel=4,
            )
            self.requires_grad_(True)

    def _stream(self, tokens: int, mask: Tensor | None, device: torch.device) -> Stream:
        if self._grid is None:
            raise ZooError(
                "attached attention: it was called outside the model's forward, so its grid is not known; "
                "call the model itself"
            )
        known = [kept for seen, kept in self._masks if seen is mask]
        kept = known[0] if known else kept_tokens(mask)
        if mask is not None and not known:
            self._masks = [(mask, kept)]
        film = self._film
        key = (tokens, device, self._grid, None if kept is None else tuple(kept.tolist()))
        if key not in self._streams:
            self._streams[key] = make_stream(
                self.family.text, self._grid, tokens, kept, film.shots, film.captions, device
            )
        return self._streams[key]

    def _serve(
        self,
        site: Site,
        hidden: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,  # noqa: ARG002  methods take fewer key heads as they are
    ) -> Tensor:
        """What torch's SDPA would be asked, answered by the layer's method."""
        tokens = query.shape[2]
        refuse(
            "attached attention",
            [
                f"it drops attention weights with probability {dropout_p}; methods do not. Set its dropout to 0"
                if dropout_p
                else "",
                "it is causal from token to token, which films are not" if is_causal else "",
                f"it has {tokens} queries and {key.shape[2]} keys; only self-attention can be served"
                if key.shape[2] != tokens
                else "",
            ],
        )
        stream = self._stream(tokens, attn_mask, query.device)
        if scale is not None:
            query = query * (scale * query.shape[-1] ** 0.5)  # kernels divide by the root of the head dim
        q, k, v = (stream.gather(x, 2) for x in (query, key, value))
        method = cast(Attention, site.module.zoo)
        _follow(method, query.device)
        call = Call(
            q,
            k,
            v,
            stream.layout,
            hidden=None if hidden is None or hidden.shape[1] != tokens else stream.gather(hidden, 1),
            layer=site.layer,
            layers=len(self.sites),
            noise=None if self._noise is None else self._noise.to(query.device),
            step=self._film.step,
            seed=self._film.seed,
            memory=self._memory,
        )
        for layers, calls in self._captures:
            if layers is None or site.layer in layers:
                calls.append(Captured(_on_cpu(call), dict(self.layers[site.layer])))
        context = {
            name: getattr(call, name) for name in ("hidden", "layer", "layers", "noise", "step", "seed", "memory")
        }
        result: Result = method(call.q, call.k, call.v, call.layout, **context)
        recomputes = torch._C._current_graph_task_id() != -1
        refuse(
            "attached attention",
            [
                f"{self.layers[site.layer]['name']} has auxiliary losses, which reentrant activation checkpointing "
                "computes without a gradient. Pass use_reentrant=False to torch.utils.checkpoint.checkpoint, as "
                "model.enable_gradient_checkpointing() does, or set the weight of the loss to 0"
            ]
            if self._trains and result.losses and not torch.is_grad_enabled() and not recomputes
            else [],
        )
        if not recomputes:  # a checkpoint that recomputes within backward has been counted
            self._losses[site.layer] = result.losses
            self.results[site.layer] = replace(
                result,
                out=result.out.detach().to("meta"),
                losses={name: loss.detach() for name, loss in result.losses.items()},
            )
        return stream.scatter(result.out, 2)


def attach(model: nn.Module, method: str | Sequence[Any], **settings: Any) -> Bridge:
    """Serve the self-attentions of a pretrained video transformer by a method of the zoo, in place.

    Args:
        model: A transformer of a known family, or a PEFT model around one.
        method: The method's name; or a list for the layers, as a config's `attention`: names, mappings with a name and
            settings, {cycle: [methods]}, each with `layers`, a number or "rest".
        settings: Settings of the method, where it is given by name; those of a list stand in its mappings.

    Returns:
        The bridge, by which to say what is sampled and to read what ran.

    Raises:
        ZooError: for a model of no known family, one that is attached already, another attention backend than torch's
            own, and whatever `sparse_zoo.build` refuses.
    """
    model = cast(nn.Module, model.get_base_model()) if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    family = find_family(model)
    modules = [module for name, module in model.named_modules() if re.fullmatch(family.sites, name)]
    layers, reasons = (
        per_layer([{"name": method, "layers": "rest", **settings}], len(modules))
        if isinstance(method, str)
        else per_layer(method, len(modules))
    )
    refuse(
        "attach",
        [
            "the model is attached already; call bridge.detach() first" if ATTRIBUTE in model.__dict__ else "",
            f"no module of {type(model).__name__} matches {family.sites!r}, the self-attentions of {family.name!r}"
            if not modules
            else "",
            "settings stand in the list's mappings, not beside it: " + ", ".join(settings)
            if settings and not isinstance(method, str)
            else "",
            *reasons,
            *{_backend(module) for module in modules},
        ],
    )
    built = [_built(family, module, layer) for module, layer in zip(modules, layers, strict=True)]
    for module, own in zip(modules, built, strict=True):
        module.zoo = own
    bridge = Bridge(model, family, layers, modules)
    bridge._install()
    return bridge


def bridge_of(model: nn.Module) -> Bridge:
    """The bridge of an attached model, a deep copy's own too; `ZooError` where there is none."""
    bridge = model.__dict__.get(ATTRIBUTE)
    refuse("bridge_of", [f"nothing is attached to this {type(model).__name__}"] if bridge is None else [])
    return cast(Bridge, bridge)


def _built(family: Family, module: nn.Module, layer: Mapping[str, Any]) -> Attention:
    """The method of a layer, where the self-attention is and as precise; never narrower than half precision."""
    heads, head_dim, dim = family.shape(module)
    weight = next(module.parameters())
    offloaded = weight.device.type == "meta" and any(hasattr(part, "_hf_hook") for part in module.modules())
    device = torch.device("cpu") if offloaded else weight.device
    settings = {key: value for key, value in layer.items() if key != "name"}
    with torch.device("meta" if device.type == "meta" else "cpu"):
        method = build(layer["name"], heads=heads, head_dim=head_dim, dim=dim, **settings)
    return method.to(device, weight.dtype if weight.dtype in COMPUTED else torch.float32).train(module.training)


def _follow(method: Attention, device: torch.device) -> None:
    """Bring a method to where its layer computes: offloading moves a layer's own modules alone."""
    for parameter in method.parameters():
        if parameter.device != device and parameter.device.type != "meta":
            method.to(device)
            return


def _backend(module: nn.Module) -> str:
    """Why the attention backend of a module cannot be served, if it cannot."""
    given = getattr(getattr(module, "processor", None), "_attention_backend", None)
    name = getattr(given, "value", given)
    if name is None or name in NATIVE:
        return ""
    return (
        f"the attention backend is {name!r}; methods are served in place of torch's own, {', '.join(NATIVE)}. "
        'Call model.set_attention_backend("native")'
    )


def _counts(given: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if given is None else tuple(given)


def _on_cpu(call: Call) -> Call:
    held = {name: getattr(call, name) for name in ("q", "k", "v", "hidden", "noise")}
    copies: dict[str, Any] = {name: x.detach().cpu().clone() for name, x in held.items() if isinstance(x, Tensor)}
    return replace(call, layout=call.layout.to("cpu"), memory=None, **copies)


class _NamedCalls:
    """A model's `cache_context`, by which pipelines of diffusers name the calls of guidance, told to the bridge too.

    An object, not a function: a deep copy of the model gets one that holds the copy's bridge.
    """

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge

    @contextmanager
    def __call__(self, name: str, **told: Any) -> Iterator[None]:
        bridge = self.bridge
        own: Any = type(bridge.model)
        before, bridge._call = bridge._call, name
        try:
            with own.cache_context(bridge.model, name, **told):
                yield
        finally:
            bridge._call = before


# Hooks are given the module that runs, so those of a deep copy serve the copy. Dynamo does not look into them.


@opaque
def _before_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    bridge = bridge_of(model)
    if not bridge._bypassed:
        bridge._begin(_by_name(type(model), (model, *args), kwargs))


@opaque
def _before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    site = cast(Site, module.__dict__[SITE])
    bridge = site.bridge
    if bridge._bypassed:
        return
    refuse("attached attention", [_backend(module)])
    hidden = bridge.family.stream_hidden(_by_name(type(module), (module, *args), kwargs))
    intercept = Intercept(lambda *given, **named: bridge._serve(site, hidden, *given, **named))
    site.active.append(intercept)
    intercept.__enter__()


@opaque
def _after_attention(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    site = cast(Site, module.__dict__[SITE])
    if not site.active:
        return  # bypassed, or refused before it began
    intercept = site.active.pop()
    intercept.__exit__(None, None, None)
    if output is None or intercept.calls == 1:  # None: it raised, which says more
        return
    raise ZooError(
        f"attached attention: layer {site.layer} called torch's scaled_dot_product_attention {intercept.calls} times, "
        "not once; another attention backend may be in force. "
        'Call model.set_attention_backend("native"), or set DIFFUSERS_ATTN_BACKEND=native'
    )


def _by_name(cls: type[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by parameter name, those of its **kwargs among them."""
    bound = inspect.signature(cls.forward).bind_partial(*args, **kwargs).arguments
    return {**bound, **bound.pop("kwargs", {})}
