"""An attached model in what people do with models: guidance, compilation, checkpointing, adapters, offloading."""

import copy
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from test_bridge import run
from tiers import cases
from torch import nn

import sparse_zoo as zoo
from experiments.inspection.capture import Captured, load, save
from experiments.inspection.replay import replay
from experiments.tools.paper_ledger import WAN_MOC, count
from experiments.tools.tiny_models import inputs, transformer
from sparse_zoo.bridge import bridge_of
from sparse_zoo.errors import ZooError
from sparse_zoo.ladder import ladder

MOGA = dict(zoo.get("moga").small)


def attached(method: str = "moga", family: str = "wan", **settings: object) -> nn.Module:
    model = transformer(family)
    bridge = zoo.attach(model, method, **(settings or zoo.get(method).small))
    bridge.film(shots=[2, 4])
    return model


@torch.no_grad()
def test_guidance_keeps_the_memory_of_its_two_calls_apart():
    """Each call of a step finds what the same call of the last step left, as if it had been sampled alone."""
    prompts = {name: inputs("wan", seed=seed) for seed, name in enumerate(("cond", "uncond"))}
    times = [torch.tensor([t]) for t in (900.0, 600.0, 300.0)]

    def sample(model: nn.Module, names: tuple[str, ...]) -> dict[str, list[torch.Tensor]]:
        found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for time in times:
            for name in names:
                found[name].append(run(model, {**prompts[name], "timestep": time}))
        return found

    both = sample(attached("svg2"), ("cond", "uncond"))
    for name, want in both.items():
        assert all(map(torch.equal, sample(attached("svg2"), (name,))[name], want))
    model = attached("svg2")
    again = [sample(model, ("cond", "uncond")) for _ in range(2)]
    assert all(map(torch.equal, again[0]["uncond"], again[1]["uncond"]))  # noise rises: a new film
    assert len(bridge_of(model)._memories) == 2


@torch.no_grad()
def test_calls_of_guidance_are_distinguished_by_their_names():
    """The order of the calls, and further calls at one noise time, do not mix them up; a copy has its own names."""
    prompts = {name: inputs("wan", seed=seed) for seed, name in enumerate(("cond", "uncond"))}

    def call(model: nn.Module, name: str, time: float) -> torch.Tensor:
        with model.cache_context(name):
            return run(model, {**prompts[name], "timestep": torch.tensor([time])})

    alone = attached("svg2")
    want = {name: [call(alone, name, time) for time in (900.0, 600.0)] for name in prompts}
    for model in (attached("svg2"), copy.deepcopy(attached("svg2"))):
        call(model, "cond", 900.0)
        call(model, "uncond", 900.0)
        second = call(model, "uncond", 600.0), call(model, "cond", 600.0)  # the other way round
        assert second[0].equal(want["uncond"][1])
        assert second[1].equal(want["cond"][1])
        assert set(bridge_of(model)._memories) == {"cond", "uncond"}
        bridge_of(model).detach()
        assert "cache_context" not in model.__dict__


@torch.no_grad()
def test_sampling_is_dense_above_a_noise_time_and_training_never():
    model = attached("moc", top_k=1, dense_above=0.6)
    bridge = bridge_of(model)
    densities = []
    for time in (900.0, 700.0, 500.0):
        run(model, {**inputs("wan"), "timestep": torch.tensor([time])})
        densities.append(bridge.cost().density)
    assert densities[:2] == [1, 1]
    assert densities[2] < 0.7
    bridge.film(shots=[2, 4], noise=0.1)  # said by hand
    run(model, {**inputs("wan"), "timestep": torch.tensor([900.0])})
    assert bridge.cost().density < 0.7
    with torch.enable_grad():
        bridge.film(shots=[2, 4])
        run(model.train(), {**inputs("wan"), "timestep": torch.tensor([900.0])})
    assert bridge.cost().density < 0.7


@pytest.mark.slow
def test_blocks_may_be_compiled():
    model, given = attached().train(), inputs("wan")
    want = run(model, given)
    model.compile_repeated_blocks(backend="aot_eager")
    found = run(model, given)
    assert (found - want).abs().max() <= 1e-6
    (found.square().mean() + sum(bridge_of(model).losses().values())).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in bridge_of(model).parameters())


def test_checkpointed_activations_change_no_gradient():
    plain, given = attached().train(), inputs("wan")
    lean = copy.deepcopy(plain)
    lean.enable_gradient_checkpointing()
    for model in (plain, lean):
        bridge = bridge_of(model)
        out = run(model, given)
        results = dict(bridge.results)
        losses = bridge.losses()
        assert losses
        (out.square().mean() + sum(losses.values())).backward()
        assert all(bridge.results[i] is result for i, result in results.items())  # recomputing has not counted again
    wanted = dict(plain.named_parameters())
    for name, parameter in lean.named_parameters():
        assert (parameter.grad - wanted[name].grad).abs().max() <= 1e-6 * wanted[name].grad.abs().max(), name


def test_reentrant_checkpointing_works_but_for_auxiliary_losses():
    reentrant = partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
    plain, given = attached("moc", top_k=1).train(), inputs("wan")
    lean = copy.deepcopy(plain)
    lean.enable_gradient_checkpointing(reentrant)
    for model in (plain, lean):
        run(model, given).square().mean().backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in lean.named_parameters():
        assert (parameter.grad - wanted[name].grad).abs().max() <= 1e-6 * wanted[name].grad.abs().max(), name
    with_loss = attached("moga").train()
    with_loss.enable_gradient_checkpointing(reentrant)
    with pytest.raises(ZooError, match="moga has auxiliary losses, which reentrant activation checkpointing"):
        run(with_loss, given)
    with torch.no_grad():
        run(with_loss, given)


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
@torch.no_grad()
def test_projections_may_be_fused(family):
    model, given = attached(family=family), inputs(family)
    want = run(model, given)
    model.fuse_qkv_projections()
    assert (run(model, given) - want).abs().max() <= 1e-5
    assert len(bridge_of(model).results) == 2
    model.unfuse_qkv_projections()
    assert run(model, given).equal(want)


@pytest.mark.parametrize("first", ["bridge", "adapter", "peft model"])
def test_an_adapter_trains_with_the_routers_and_nothing_else_does(first):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    model, given = transformer("wan"), inputs("wan")
    if first == "bridge":
        bridge = zoo.attach(model, "moga", **MOGA)
        model.add_adapter(config)
        bridge.requires_grad_(True)
    elif first == "adapter":
        model.requires_grad_(False)
        model.add_adapter(config)
        bridge = zoo.attach(model, "moga", **MOGA)
    else:
        model = get_peft_model(model, config)
        bridge = zoo.attach(model, "moga", **MOGA)
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = run(model, given)
    (out.square().mean() + sum(bridge.losses().values())).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert all("lora_" in name or ".zoo." in name for name in trained)
    assert sum(".zoo." in name for name in trained) == 4
    assert sum("lora_" in name for name in trained) == 2 * 2 * (4 + 4)  # cross-attention has adapters too
    assert all(bool(p.grad.abs().sum() > 0) for p in model.parameters() if p.grad is not None)


def test_routers_that_an_adapter_froze_train_again_and_it_is_said():
    from peft import LoraConfig

    model, given = transformer("wan").train(), inputs("wan")
    bridge = zoo.attach(model, "moga", **MOGA)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    assert not any(parameter.requires_grad for parameter in bridge.parameters())
    with pytest.warns(UserWarning, match="4 parameters of attached methods were frozen from outside"):
        run(model, given)
    assert all(parameter.requires_grad for parameter in bridge.parameters())
    bridge.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, given)
    assert not any(parameter.requires_grad for parameter in bridge.parameters())


@torch.no_grad()
def test_half_precision():
    given = {name: x.bfloat16() if name.endswith("states") else x for name, x in inputs("wan").items()}
    model = transformer("wan").bfloat16()
    exact = run(model, given)
    zoo.attach(model, "dense")
    assert (run(model, given) - exact).abs().max() <= 0.02 * exact.abs().max()
    for late in (False, True):
        model = transformer("wan")
        if not late:
            model.bfloat16()
        bridge = zoo.attach(model, "moga", **MOGA)
        model.bfloat16()
        assert {parameter.dtype for parameter in bridge.parameters()} == {torch.bfloat16}
        assert run(model, given).dtype == torch.bfloat16


def test_autocast_trains():
    model, given = attached().train(), inputs("wan")
    with torch.autocast("cpu", torch.bfloat16):
        out = run(model, given)
    (out.square().mean() + sum(bridge_of(model).losses().values())).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in bridge_of(model).parameters())


@pytest.mark.parametrize("late", [False, True])
@torch.no_grad()
def test_weights_may_be_offloaded(late):
    from accelerate import cpu_offload

    model, given = transformer("wan"), inputs("wan")
    if late:
        torch.manual_seed(3)
        zoo.attach(model, "moga", **MOGA).film(shots=[2, 4])
        want = run(model, given)
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        want = None
        cpu_offload(model, execution_device=torch.device("cpu"))
        zoo.attach(model, "moga", **MOGA).film(shots=[2, 4])
    assert model.blocks[0].attn1.to_q.weight.is_meta
    found = run(model, given)
    assert len(bridge_of(model).results) == 2
    assert want is None or found.equal(want)


def whole(captured: list) -> list[Captured]:
    return [Captured(one.call, one.method) for one in captured]


@pytest.mark.parametrize("method", ["dense", "moga", "moc"])
@torch.no_grad()
def test_a_capture_replays_bit_for_bit(tmp_path: Path, method):
    model, given = attached(method), inputs("wan")
    bridge = bridge_of(model)
    served: list[torch.Tensor] = []
    hooks = [own.register_forward_hook(lambda *x: served.append(x[2].out)) for own in bridge.methods()]
    with bridge.capture(layers=[1]) as captured:
        run(model, given)
    for hook in hooks:
        hook.remove()
    run(model, given)
    assert len(captured) == 1
    assert captured[0].method == {"name": method, **zoo.get(method).small}

    (loaded,) = load(save(tmp_path / "calls.safetensors", whole(captured)))
    assert (loaded.call.layer, loaded.call.layers) == (1, 2)
    assert loaded.call.layout == zoo.Layout.film([zoo.Shot(2, 4, 6), zoo.Shot(4, 4, 6)])
    assert loaded.call.noise.tolist() == [0.5]
    assert bridge.methods()[1].run(loaded.call).out.equal(served[1])

    rungs = ladder(bridge.methods()[1], loaded.call).means()
    assert rungs["method"]["error"] <= 1e-6 if method == "dense" else rungs["method"]["error"] > 1e-3
    rows = replay([loaded], [("dense", {}), ("moc", {"top_k": 1})])
    assert [row.failed for row in rows] == [None, None]


@pytest.mark.parametrize("frames", cases([81, 477], [81]))
@pytest.mark.parametrize("size", cases(["1.3B", "14B"], ["1.3B"]))
def test_a_model_of_wans_size_is_planned_without_its_weights(size, frames):
    """On the meta device, as the ledger counts it: density and FLOPs of each layer."""
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    config, parameters = WAN[size]
    with init_empty_weights():
        model = WanTransformer3DModel(**config)
    bridge = zoo.attach(model, ["dense", {"name": "moc", **dict(WAN_MOC.settings), "layers": "rest"}])
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=0.01)
    latent = (frames - 1) // 4 + 1
    layers = bridge.simulate((latent, 60, 104))
    assert len(layers) == config["num_layers"]
    tokens = latent * 1560
    counted = count(replace(WAN_MOC, layout=zoo.Layout.film([zoo.Shot(latent, 30, 52)])))
    width = config["num_attention_heads"] * 128
    assert layers[0].cost.density == 1
    assert layers[0].cost.flops == 4 * width * tokens**2
    for layer in layers[1:]:
        assert layer.cost.density == pytest.approx(counted.density, rel=1e-12)
        assert layer.cost.density == pytest.approx(4 / latent, rel=1e-12)  # its own frame and three others
        assert layer.cost.flops == pytest.approx(4 * width * counted.pairs, rel=1e-12)
        assert layer.cost.routing_flops > 0


WAN_1_3B = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
}
"""transformer/config.json of Wan2.1-T2V-1.3B-Diffusers."""
WAN_14B = WAN_1_3B | {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
WAN = {"1.3B": (WAN_1_3B, 1.42e9), "14B": (WAN_14B, 14.29e9)}
"""Configs, and parameters: those of the ledger for 1.3B; for 14B counted from the published shapes."""
