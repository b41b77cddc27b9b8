"""Fine-tuning of a pretrained model: what trains, towards what, from a folder on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from tiers import cases
from torch import nn

import sparse_zoo as zoo
from experiments.tools.tiny_models import inputs, transformer, write
from lit_modules.pretrained import LitPretrained
from sparse_zoo.errors import ZooError

MOGA = {"name": "moga", **zoo.get("moga").small}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write(folder, ["wan", "hunyuan_video", "hunyuan_video_15", "ltx", "kandinsky5", "cogvideox", "cosmos"])
    return folder


def batch(family: str = "wan", seed: int = 0) -> dict[str, Any]:
    given = inputs(family, batch=2, seed=seed)
    latents = given.pop("hidden_states")
    if family == "hunyuan_video_15":  # those of a picture and its mask are no latents
        latents = latents[:, :4]
    if family == "kandinsky5":
        latents = latents[..., :4]
    return {"latents": latents, "arguments": without_time(given), "shots": [2, 4]}


def without_time(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in given.items() if name not in ("timestep", "return_dict")}


def fit(module: LitPretrained, tmp_path: Path, steps: int = 3, family: str = "wan") -> Trainer:
    batches = [batch(family, seed) for seed in range(steps)]
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        val_check_interval=steps,
        num_sanity_val_steps=0,
    )
    whole = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(module, whole, torch.utils.data.DataLoader(batches[:1], batch_size=None))
    return trainer


@pytest.mark.parametrize("family", cases(["wan", "hunyuan_video"], ["wan"]))
def test_lora_trains_adapters_and_routers_alone(models: Path, tmp_path: Path, family):
    module = LitPretrained(
        {"folder": str(models / family), "lora_rank": 2, "distill_output": 1.0, "distill_layers": 0.5},
        MOGA,
        optim={"ema_decay": 0.5},
    )
    before = {name: x.clone() for name, x in module.model.named_parameters()}
    trainer = fit(module, tmp_path, family=family)
    moved = {name for name, x in module.model.named_parameters() if not x.equal(before[name])}
    assert moved
    assert all("lora_" in name or ".zoo." in name for name in moved)
    assert sum(".zoo." in name for name in moved) == 4
    assert any("lora_B" in name for name in moved)
    metrics = {name: float(x) for name, x in trainer.callback_metrics.items()}
    parts = ("flow", "distill_output", "distill_layers", "aux/balance")
    assert metrics["train/loss"] == pytest.approx(sum(metrics[f"train/{part}"] for part in parts), rel=1e-5)
    assert 0 < metrics["val/sample_error"] < 10
    assert metrics["val/loss"] > 0


@pytest.mark.slow
def test_full_fine_tuning_moves_all_and_leaves_the_teacher(models: Path, tmp_path: Path):
    module = LitPretrained({"folder": str(models / "wan"), "distill_layers": 1.0}, MOGA, optim={"ema_decay": 0.0})
    assert module.teacher is not None
    original = transformer("wan").state_dict()
    fit(module, tmp_path)
    assert all(x.equal(original[name]) for name, x in module.teacher.model.state_dict().items())
    assert not any("teacher" in name for name in module.state_dict())
    still = [name for name, x in module.model.named_parameters() if ".zoo." not in name and x.equal(original[name])]
    assert not still


def test_a_dense_student_is_its_own_teacher(models: Path):
    for rank in (2, 0):
        own = {"folder": str(models / "wan"), "lora_rank": rank, "distill_output": 1.0, "distill_layers": 1.0}
        module = LitPretrained(own, {"name": "dense"})
        alike = module.losses(batch(), torch.tensor([0.3, 0.8]), torch.Generator().manual_seed(0), seed=0)
        assert alike["distill_output"] <= 1e-12
        assert alike["distill_layers"] <= 1e-12
        sparse = LitPretrained(own, {"name": "moc", "top_k": 1})
        far = sparse.losses(batch(), torch.tensor([0.3, 0.8]), torch.Generator().manual_seed(0), seed=0)
        assert far["distill_output"] > 1e-6
        assert far["distill_layers"] > 1e-6
        assert far["flow"] != alike["flow"]


@pytest.mark.parametrize("rank", [0, 4])
def test_sparge2_is_tuned_towards_the_outputs_of_the_dense_model(models: Path, rank: int) -> None:
    """What its paper trains by: the velocity of the dense model is the target, and the film's own noise is none."""
    shares = {"top_fraction": 0.2, "top_p": 0.2, "query_tokens": 4, "block_tokens": 4}
    own = {"folder": str(models / "wan"), "lora_rank": rank, "distill_output": 2.0}
    module = LitPretrained(own, {"name": "sparge2", **shares})
    time = torch.tensor([0.3, 0.8])

    def loss() -> torch.Tensor:
        return module.losses(batch(), time, torch.Generator().manual_seed(1), seed=0)["distill_output"]

    first = loss()
    noise = torch.randn(batch()["latents"].shape, generator=torch.Generator().manual_seed(1))
    noisy = batch()["latents"] * (1 - time[:, None, None, None, None]) + noise * time[:, None, None, None, None]
    dense, sparse = transformer("wan"), transformer("wan")
    bridge = zoo.attach(sparse, "sparge2", **shares)
    bridge.film([2, 4])
    text = batch()["arguments"]["encoder_hidden_states"]
    with torch.no_grad():
        outputs = [x(noisy, 1000 * time, text, return_dict=False)[0] for x in (dense, sparse)]
    torch.testing.assert_close(first, 2 * (outputs[0] - outputs[1]).square().mean(), rtol=1e-4, atol=0)
    assert bridge.cost().density < 0.9

    first.backward()
    trained = {name: x for name, x in module.named_parameters() if x.requires_grad}
    assert all("lora_" in name for name in trained) == (rank > 0)
    for part in ("attn1.to_q", "attn1.to_k", "attn1.to_v"):
        learns = "lora_B" if rank else "weight"
        found = [x.grad for name, x in trained.items() if part in name and learns in name]
        assert found
        assert all(x is not None and float(x.abs().max()) > 0 for x in found), part
    assert not [name for name, x in module.named_parameters() if not x.requires_grad and x.grad is not None]
    if module.teacher is not None:
        assert not [x for x in module.teacher.model.parameters() if x.grad is not None]

    optimizer = torch.optim.Adam(trained.values(), lr=1e-2 if rank else 1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < 0.5 * float(first.detach())


def test_the_flow_loss_is_that_of_its_definition(models: Path):
    module = LitPretrained(models / "wan", {"name": "dense"})
    assert module.flow.shift == 3.0  # the scheduler's
    films, time = batch(), torch.tensor([0.25, 0.75])
    found = module.losses(films, time, torch.Generator().manual_seed(1), seed=0)
    noise = torch.randn(films["latents"].shape, generator=torch.Generator().manual_seed(1))
    wanted = []
    for i, t in enumerate(time.tolist()):
        noisy = (1 - t) * films["latents"][i] + t * noise[i]
        text = films["arguments"]["encoder_hidden_states"][i]
        velocity = transformer("wan")(noisy[None], torch.tensor([1000 * t]), text[None], return_dict=False)[0][0]
        wanted.append((velocity - (noise[i] - films["latents"][i])).square().mean())
    assert found["flow"].item() == pytest.approx(torch.stack(wanted).mean().item(), rel=1e-5)
    assert set(found) == {"flow"}


@pytest.mark.parametrize("family", ["hunyuan_video_15", "kandinsky5", "ltx"])
def test_other_families_train_too(models: Path, family: str):
    """Every adapter and router has a gradient; without text of a picture, its latents and mask are zero."""
    module = LitPretrained({"folder": str(models / family), "lora_rank": 2, "lora_targets": TARGETS[family]}, MOGA)
    films, seen = batch(family), []
    module.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)  # noqa: ARG005
    sum(module.losses(films, torch.tensor([0.3, 0.8]), torch.Generator().manual_seed(0), seed=0).values()).backward()
    trained = {name: p.grad for name, p in module.model.named_parameters() if p.requires_grad}
    assert any(".zoo." in name for name in trained)
    # Adapters' second matrices are zero at the start, so that their first have no gradient yet.
    silent = [n for n, g in trained.items() if "lora_A" not in n and (g is None or not bool(g.abs().sum() > 0))]
    assert not silent
    given, latents = seen[0]["hidden_states"], films["latents"]
    if family == "ltx":
        assert given.shape == latents.shape
        return
    dim = 1 if family == "hunyuan_video_15" else 4
    own, picture = given.split([4, 5], dim)
    assert not picture.any()
    assert not own.equal(latents)  # noise


TARGETS = {
    "hunyuan_video_15": ["to_q", "to_k", "to_v"],
    "kandinsky5": ["visual_transformer_blocks.0.self_attention.to_query"],
    "ltx": ["attn1.to_q", "attn1.to_k"],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"latents": torch.zeros(2, 16, 6, 8, 12)},
            r"latents have shape \(2, 16, 6, 8, 12\); it takes 5 .* 4 channels",
        ),
        ({"latents": torch.zeros(2, 144, 4)}, "it takes 5 dimensions with 4 channels in dimension 1"),
        ({"arguments": {"encoder_hidden_states": torch.zeros(2, 7, 1)}}, "are 1 wide, it takes 16.*have no captions"),
        ({"arguments": {}}, "arguments lack encoder_hidden_states"),
        ({"arguments": {"encoder_hidden_state": None}}, "did you mean 'encoder_hidden_states'"),
        ({"arguments": None}, "it has no 'arguments'"),
    ],
)
def test_a_batch_that_the_transformer_does_not_take_is_refused(models: Path, change: dict, message: str):
    module = LitPretrained(models / "wan", {"name": "dense"})
    films = {name: x for name, x in {**batch(), **change}.items() if x is not None}
    with pytest.raises(ZooError, match=message):
        module.losses(films, torch.tensor([0.3, 0.8]), torch.Generator(), seed=0)


@pytest.mark.slow
def test_a_schedule_goes_by_the_optimizer_step(models: Path, tmp_path: Path):
    module = LitPretrained(
        {"folder": str(models / "wan"), "lora_rank": 2},
        {"name": "dense", "schedule": {"name": {2: "moga"}}, **zoo.get("moga").small},
    )
    densities: list[float] = []
    module.on_train_batch_end = lambda *_: densities.append(module.bridge.cost().density)  # type: ignore[method-assign]
    fit(module, tmp_path, steps=4)
    assert densities[:2] == [1, 1]
    assert max(densities[2:]) < 1


def test_what_does_not_fit_is_refused(models: Path, tmp_path: Path):
    with pytest.raises(ZooError, match=r"config\.json is missing; give the folder of a diffusers pipeline"):
        LitPretrained(tmp_path, {"name": "dense"})
    with pytest.raises(ZooError, match=r"its family cosmos has no flow loss here; families that train: wan,"):
        LitPretrained(models / "cosmos", {"name": "dense"})
    with pytest.raises(ZooError, match="scheduler CogVideoXDDIMScheduler is not one of a flow"):
        LitPretrained(models / "cogvideox", {"name": "dense"})
    own = {"folder": str(models / "wan")}
    with pytest.raises(ZooError, match="did you mean 'distill_output'"):
        LitPretrained({**own, "distill_outputs": 1.0}, {"name": "dense"})
    with pytest.raises(ZooError, match="lora_rank must be at least 0"):
        LitPretrained({**own, "lora_rank": -1}, {"name": "dense"})
    with pytest.raises(ZooError, match=r"model\.lora_targets: .*no_such_layer"):
        LitPretrained({**own, "lora_rank": 2, "lora_targets": ["no_such_layer"]}, {"name": "dense"})
    with pytest.raises(ZooError, match="of its self-attentions are to_query, to_key, to_value, out_layer"):
        LitPretrained({"folder": str(models / "kandinsky5"), "lora_rank": 2}, {"name": "dense"})
    for part, given in (
        ("flow", {"per_shot": True}),
        ("flow", {"history": 0.5}),
        ("flow", {"drop_text": 0.1}),
        ("optim", {"optimizer": "muon"}),
        ("sampling", {"guidance": 2.0}),
        ("sampling", {"order": "shots"}),
    ):
        with pytest.raises(ZooError, match=f"{part}.{next(iter(given))}"):
            LitPretrained(own, {"name": "dense"}, **{part: given})
    (tmp_path / "config.json").write_text('{"_class_name": "NoSuchModel"}')
    with pytest.raises(ZooError, match="has no class 'NoSuchModel'"):
        LitPretrained(tmp_path, {"name": "dense"})


def test_the_teacher_is_the_original(models: Path):
    module = LitPretrained({"folder": str(models / "wan"), "lora_rank": 2, "distill_output": 1.0}, MOGA)
    for name, parameter in module.model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    given = inputs("wan")
    with module._dense_teacher() as (teacher, _), torch.no_grad():
        assert (teacher(**given)[0] - transformer("wan")(**given)[0]).abs().max() <= 2e-6
    assert (module.model(**given)[0] - transformer("wan")(**given)[0]).abs().max() > 1e-3
    trained = [name for name, parameter in module.model.named_parameters() if parameter.requires_grad]
    assert any("lora_" in name for name in trained)  # disabling adapters freezes them; enabling undoes it
