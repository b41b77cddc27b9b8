"""Methods in pretrained transformers, family by family: each token in its place, trained, saved, undone."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiers import cases
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import sparse_zoo as zoo
from experiments.tools.tiny_models import CONFIGS, inputs, transformer
from sparse_zoo.bridge import Family, bridge_of, family_names, register_family
from sparse_zoo.bridge import bridge as bridge_module
from sparse_zoo.bridge import family as family_module
from sparse_zoo.bridge.family import UNSERVED
from sparse_zoo.bridge.stream import kept_tokens, make_stream
from sparse_zoo.errors import ZooError

TEXT = {
    "hunyuan_video": ("after", 5),
    "hunyuan_video_15": ("after", 8),
    "cogvideox": ("before", 7),
    "consisid": ("before", 7),
    "easyanimate": ("before", 7),
}
"""Where the stream has text, and how many tokens of it are no padding, counted by hand from `inputs`."""


def run(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    out = model(**arguments)
    return out[0] if isinstance(out, tuple) else out


class RowsAlone(zoo.Attention):
    """Each row of a frame attends to itself, all text to itself."""

    limits = strict = same_in_training = "made up"

    def plan(self, q: Tensor, k: Tensor, layout: zoo.Layout) -> zoo.Plan:  # noqa: ARG002
        return zoo.Plan.within(layout.partition("frame", "row"))


class RowsByHand(TorchFunctionMode):
    """The same in the model's own token order, written as a mask for torch, for self-attentions of this length."""

    def __init__(self, tokens: int, labels: Tensor) -> None:
        super().__init__()
        self.tokens, self.mask = tokens, labels[:, None] == labels

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            query, key = (*args, kwargs.get("query"), kwargs.get("key"))[:2]
            if query.shape[2] == key.shape[2] == self.tokens:
                kwargs["attn_mask"] = self.mask
        return func(*args, **kwargs)


def rows_by_hand(family: str) -> RowsByHand:
    """6 frames of 4 rows of 6 tokens; padding reads nothing real, so that it has a label of its own."""
    video = torch.arange(24).repeat_interleave(6)
    place, text = TEXT.get(family, ("none", 0))
    total = {"hunyuan_video": 7, "hunyuan_video_15": 14}.get(family, text)
    words = torch.tensor([-1] * text + [-2] * (total - text), dtype=torch.long)
    labels = torch.cat([words, video] if place == "before" else [video, words])
    return RowsByHand(len(labels), labels)


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_dense_through_the_zoo_equals_the_original(family):
    model, given = transformer(family), inputs(family, batch=2)
    original = run(model, given)
    bridge = zoo.attach(model, "dense")
    assert (run(model, given) - original).abs().max() <= 1e-6
    text = TEXT.get(family, ("none", 0))[1]
    assert {result.layout for result in bridge.results.values()} == {zoo.Layout.film([zoo.Shot(6, 4, 6)], caption=text)}
    assert bridge.cost().density == 1
    assert len(bridge.results) == len(bridge.sites) >= 2


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_each_token_has_its_own_place_and_a_wrong_layout_or_text_order_differs(family):
    zoo.register("rows_alone")(RowsAlone)
    model, given = transformer(family), inputs(family)
    with rows_by_hand(family):
        by_hand = run(model, given)
    assert (by_hand - run(model, given)).abs().max() > 1e-3  # else nothing would be told apart
    bridge = zoo.attach(model, "rows_alone")
    assert (run(model, given) - by_hand).abs().max() <= 1e-6

    right = bridge.family
    bridge.family = replace(right, latent=lambda *_: swapped(right, model, given))
    assert (run(model, given) - by_hand).abs().max() > 1e-4

    if family in TEXT:
        bridge.family = replace(right, text="after" if right.text == "before" else "before")
        if right.text == "before":
            bridge._forget()
            assert (run(model, given) - by_hand).abs().max() > 1e-4
        else:  # padding then lies where the video would be
            with pytest.raises(ZooError, match="its mask hides video tokens"):
                run(model, given)


def swapped(family: Family, model: nn.Module, given: Mapping[str, Any]) -> tuple[int, int, int]:
    """Rows taken for columns."""
    f, h, w = family.latent(model, given)
    return f, w, h


@pytest.mark.parametrize("method", cases(zoo.names()))
@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])
def test_every_method_trains_in_a_pretrained_model(family, method):
    model, given = transformer(family).train(), inputs(family)
    small = zoo.get(method).small
    bridge = zoo.attach(model, method, **small)
    bridge.film(shots=[2, 4], step=0)
    out = run(model, given)
    (out.square().mean() + sum(bridge.losses().values())).backward()
    silent = {name for name, own in model.named_parameters() if own.grad is None or not own.grad.abs().sum() > 0}
    assert silent <= silent_in_the_original(family)
    assert all(own.grad.isfinite().all() for own in model.parameters() if own.grad is not None)
    assert {result.kernel for result in bridge.results.values()} != {""}


@pytest.mark.parametrize("method", zoo.names())
@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])
@torch.no_grad()
def test_every_method_is_saved_loaded_and_detached_exactly(tmp_path: Path, family, method):
    given, small = inputs(family), zoo.get(method).small
    model = transformer(family)
    original = run(model, given)
    bridge = zoo.attach(model, method, **small)
    for parameter in bridge.parameters():
        parameter.normal_()
    bridge.film(shots=[2, 4])
    wanted, path = run(model, given), bridge.save(tmp_path / "methods.pt")
    assert run(bridge.detach(), given).equal(original)
    again = zoo.attach(model, method, **small).load(path)
    again.film(shots=[2, 4])
    assert run(model, given).equal(wanted)


@cache
def silent_in_the_original(family: str) -> set[str]:
    """Parameters without gradient whoever attends: the last layer's text, for one, reaches no output."""
    model = transformer(family).train()
    run(model, inputs(family)).square().mean().backward()
    return {name for name, own in model.named_parameters() if own.grad is None or not own.grad.abs().sum() > 0}


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_detach_leaves_nothing_behind(family):
    model, given = transformer(family), inputs(family)
    before, keys = run(model, given), list(model.state_dict())
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    bridge = zoo.attach(model, "moga", **zoo.get("moga").small)
    bridge.film(shots=[2, 4])
    assert not run(model, given).equal(before)
    assert bridge.detach() is model
    assert run(model, given).equal(before)
    assert list(model.state_dict()) == keys
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    zoo.attach(model, "dense")  # and again


@torch.no_grad()
def test_weights_of_methods_are_saved_apart(tmp_path: Path):
    given = inputs("wan")
    model = transformer("wan")
    bridge = zoo.attach(model, "moga", **zoo.get("moga").small)
    for parameter in bridge.parameters():
        parameter.normal_()
    want = run(model, given)
    path = bridge.save(tmp_path / "in" / "routers.pt")
    other = zoo.attach(transformer("wan"), "moga", **zoo.get("moga").small)
    assert not run(other.model, given).equal(want)
    other.load(path)
    assert run(other.model, given).equal(want)
    assert list(path.parent.iterdir()) == [path]
    held = torch.load(path, weights_only=True)
    assert set(held["weights"]) == {f"{i}.router.{name}" for i in range(2) for name in ("weight", "bias")}

    with pytest.raises(ZooError, match=r"methods \['moga', 'moga'\], the model has \['moc', 'moc'\]"):
        zoo.attach(transformer("wan"), "moc", top_k=1).load(path)
    with pytest.raises(ZooError, match="no such file"):
        other.load(tmp_path / "none")
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(ZooError, match=r"no file of Bridge\.save"):
        other.load(tmp_path / "text")


def test_layers_may_have_different_methods():
    model = transformer("wan")
    bridge = zoo.attach(model, ["dense", {"name": "moc", "top_k": 1, "layers": "rest"}])
    bridge.film(shots=[2, 4])
    run(model, inputs("wan"))
    assert [bridge.results[i].cost().density == 1 for i in range(2)] == [True, False]
    bridge.detach()
    with pytest.raises(ZooError, match="a list for 3 layers, the model has 2") as error:
        zoo.attach(model, ["dense"] * 3, top_k=1)
    assert "settings stand in the list's mappings" in str(error.value)
    with pytest.raises(ZooError, match="top_q"):
        zoo.attach(model, "moc", top_q=1)
    assert not hasattr(model.blocks[0].attn1, "zoo")  # what is refused leaves the model as it was


def test_captions_of_shots_lie_with_their_shots():
    model, given = transformer("cogvideox"), inputs("cogvideox")
    bridge = zoo.attach(model, "moc", top_k=1)
    bridge.film(shots=[2, 4], captions=[1, 4])
    run(model, given)
    layout = bridge.results[0].layout
    assert layout == zoo.Layout.film([zoo.Shot(2, 4, 6, 1), zoo.Shot(4, 4, 6, 4)], caption=2)
    stream = make_stream("before", (6, 4, 6), 7 + 144, None, (2, 4), (1, 4), torch.device("cpu"))
    order = [0, 1, 2, *range(7, 55), 3, 4, 5, 6, *range(55, 151)]
    assert stream.order is not None
    assert stream.order.tolist() == order


def test_what_cannot_be_served_is_refused_by_name():
    model, given = transformer("wan"), inputs("wan")
    with pytest.raises(ZooError, match=r"unknown model class 'Linear'.*WanTransformer3DModel.*register_family"):
        zoo.attach(nn.Linear(2, 2), "dense")
    bridge = zoo.attach(model, "moc", top_k=1)
    with pytest.raises(ZooError, match="attached already"):
        zoo.attach(model, "dense")
    bridge.film(shots=[2, 5])
    with pytest.raises(ZooError, match=r"shots \[2, 5\] make 7 frames, the video has 6"):
        run(model, given)
    bridge.film(shots=[2, 4], captions=[1, 2])
    with pytest.raises(ZooError, match=r"take 3 text tokens, the stream has 0.*cross-attention"):
        run(model, given)
    for wrong in ({"shots": [0, 6]}, {"shots": []}, {"shots": [6], "captions": [1, 2]}, {"captions": [-1]}):
        with pytest.raises(ZooError, match="film"):
            bridge.film(**wrong)
    bridge.film(shots=[2, 4])
    run(model, given)  # a refusal leaves nothing in the way

    for block in model.blocks:
        block.attn1.processor._attention_backend = "flash"
    with pytest.raises(ZooError, match=r"attention backend is 'flash'.*native"):
        run(model, given)
    with pytest.raises(ZooError, match=r"attention backend is 'flash'"):
        zoo.attach(bridge.detach(), "dense")

    with pytest.raises(ZooError, match=r"layers must be in 0 … 1, got 2"), bridge_of(fresh()).capture(layers=[2]):
        pass
    with pytest.raises(ZooError, match="nothing is attached"):
        bridge_of(model)


def fresh() -> nn.Module:
    model = transformer("wan")
    zoo.attach(model, "moc", top_k=1)
    return model


@pytest.mark.slow
@torch.no_grad()
def test_a_backend_that_is_active_for_all_is_noticed():
    from diffusers.models.attention_dispatch import attention_backend

    model = fresh()
    with (
        attention_backend("flex"),
        pytest.raises(ZooError, match="called torch's scaled_dot_product_attention 0 times"),
    ):
        run(model, inputs("wan"))
    run(model, inputs("wan"))


OF_PICTURES = {"JoyImageEditPlusTransformer3DModel", "JoyImageEditTransformer3DModel"}


def test_every_video_transformer_of_diffusers_is_known_or_refused_by_name():
    """Those whose names say 3D or that are listed; the page says the same."""
    import diffusers

    known = {cls for family in family_module._families.values() for cls in family.classes}
    there = {name for name in dir(diffusers) if name.endswith("Transformer3DModel")} - OF_PICTURES
    assert there <= known | set(UNSERVED)
    assert not known & set(UNSERVED)
    assert all(hasattr(diffusers, name) for name in {*known, *UNSERVED})
    for name, reason in UNSERVED.items():
        made = type(name, (nn.Module,), {})()
        with pytest.raises(ZooError, match=f"attach: {name} cannot be served: {reason}"):
            zoo.attach(made, "dense")
    page = (Path(__file__).parent.parent / "docs" / "pretrained.md").read_text()
    assert all(f"`{name}`" in page for name in family_names())


def test_text_of_different_length_in_one_batch_is_refused():
    model, given = transformer("hunyuan_video"), inputs("hunyuan_video", batch=2)
    zoo.attach(model, "moc", top_k=1)
    given["encoder_attention_mask"][1, 4] = 0
    with pytest.raises(ZooError, match=r"samples of a batch have \[149, 148\] tokens that are no padding"):
        run(model, given)


def test_masks_that_are_not_padding_are_refused():
    causal = torch.ones(4, 4).tril().bool()[None, None]
    with pytest.raises(ZooError, match="queries read different keys"):
        kept_tokens(causal)
    with pytest.raises(ZooError, match=r"float32.*only a boolean mask"):
        kept_tokens(torch.zeros(1, 1, 1, 4))
    keys = torch.tensor([True, False, True, True])
    assert kept_tokens((keys & keys[:, None])[None, None]).tolist() == [0, 2, 3]
    assert kept_tokens(torch.ones(2, 1, 1, 4).bool()) is None


class OwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = 2, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2))


class OwnModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(OwnAttention() for _ in range(2))

    def forward(self, film: Tensor) -> Tensor:
        x = film.flatten(1, 3)
        for layer in self.layers:
            x = x + layer(x)
        return x.unflatten(1, film.shape[1:4])


def test_a_family_of_ones_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(family_module, "_families", dict(family_module._families))
    own = Family(
        name="own",
        classes=("OwnModel",),
        sites=r"layers\.\d+",
        text="none",
        patch=lambda _: (1, 1, 1),
        latent=lambda _, given: tuple(given["film"].shape[1:4]),
        noise=lambda *_: None,
        shape=lambda module: (module.heads, 4, 8),
        hidden=lambda given: given["tokens"],
    )
    register_family(own)
    assert "own" in family_names()
    with pytest.raises(ZooError, match="the name is taken") as error:
        register_family(own)
    assert "class OwnModel is of family 'own'" in str(error.value)
    with pytest.raises(ZooError, match=r"unknown place of text 'middle'"):
        replace(own, text="middle")
    model, film = OwnModel(), torch.randn(2, 4, 2, 3, 8)
    original = model(film)
    bridge = zoo.attach(model, "dense")
    assert (model(film) - original).abs().max() < 1e-6  # its own scale of the scores too
    bridge.detach()
    bridge = zoo.attach(model, "moga", **zoo.get("moga").small)
    bridge.film(shots=[1, 3])
    (model(film).mean() + sum(bridge.losses().values())).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in bridge.parameters())


@torch.no_grad()
def test_a_copy_is_served_by_itself():
    model, given = transformer("wan"), inputs("wan")
    bridge = zoo.attach(model, "moga", **zoo.get("moga").small)
    bridge.film(shots=[2, 4])
    want = run(model, given)
    twin = copy.deepcopy(model)
    other = bridge_of(twin)
    assert other is not bridge
    assert other.model is twin
    bridge.results.clear()
    for parameter in bridge.parameters():
        parameter.fill_(9)
    for parameter in model.parameters():
        parameter.zero_()
    assert run(twin, given).equal(want)
    assert len(other.results) == 2
    assert not bridge.results
    other.detach()
    assert not hasattr(twin.blocks[0].attn1, "zoo")
    assert hasattr(model.blocks[0].attn1, "zoo")
    run(model, given)
    assert len(bridge.results) == 2


def test_the_native_backends_are_those_of_diffusers():
    from diffusers.models.attention_dispatch import AttentionBackendName

    found = {name.value for name in AttentionBackendName if "native" in name.value and "npu" not in name.value}
    assert set(bridge_module.NATIVE) <= found
