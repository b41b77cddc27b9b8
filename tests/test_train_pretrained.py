"""Pretrained models trained by the ordinary commands: one run, a sweep at equal density, what cannot be."""

import json
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from toy_latents import ToyLatents
from typer.testing import CliRunner

import sparse_zoo as zoo
from datamodules.loading import train_loader
from experiments.cli import app
from experiments.config.resolve import cell, load
from experiments.execution.run import run
from experiments.sweep.preflight import run_preflight
from experiments.tools.tiny_models import inputs, transformer, write
from experiments.tracking.mlflow_logger import Tracker
from lit_modules.flow import generator
from lit_modules.pretrained import ONE_TIME, LitPretrained
from lit_modules.settings import Optim
from sparse_zoo.errors import ZooError

pytestmark = pytest.mark.filterwarnings("ignore")

DATA = f"{Path(__file__).parent / 'toy_latents.py'}:ToyLatents"
SHORT = {"data": DATA, "trainer": {"max_steps": 4, "val_check_interval": 2, "accelerator": "cpu"}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write(folder, ["wan", "hunyuan_video", "cogvideox", "cosmos"])
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "runs"


def options(mapping: dict, before: str = "") -> list[str]:
    return [
        text
        for key, value in mapping.items()
        for text in (options(value, f"{before}{key}.") if isinstance(value, dict) else [f"{before}{key}={value}"])
    ]


def test_zoo_train_fine_tunes_a_model_and_zoo_sample_generates_with_it(models: Path, tmp_path: Path):
    own = ["model.lora_rank=2", "model.distill_layers=0.1", "optim.ema_decay=0.5", "attention=moga"]
    own += [f"attention.{key}={json.dumps(value)}" for key, value in zoo.get("moga").small.items()]
    done = CliRunner().invoke(app, ["train", f"model={models / 'wan'}", *own, *options(SHORT), "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout[done.stdout.index("{") :])
    assert (result["status"], result["steps"]) == ("finished", 4)
    assert result["config"]["model"] == {"folder": str(models / "wan"), "lora_rank": 2, "distill_layers": 0.1}
    assert result["config"]["flow"]["shift"] == 3.0
    assert result["metrics"]["sample_error"] > 0
    assert [step for step, _ in result["curves"]["val/loss"]] == [2, 4]
    assert len(result["costs"]["layers"]) == 2
    assert result["mlflow_run"]
    folder = Path(result["folder"])

    # What was exported is what the checkpoint has: adapters for diffusers, routers for a bridge.
    state = torch.load(result["checkpoint"], weights_only=True)["state_dict"]
    model = transformer("wan")
    original = model.state_dict()
    weights = "pytorch_lora_weights.safetensors"
    model.load_lora_adapter(folder / "lora", weight_name=weights, prefix=None, adapter_name="default")
    bridge = zoo.attach(model, "moga", **zoo.get("moga").small).load(folder / "methods.pt")
    bridge.film([2, 4])
    trained = {f"model.{name}": x for name, x in model.state_dict().items()}
    assert any("lora_B" in name and bool(x.any()) for name, x in trained.items())
    assert set(trained) == set(state)
    assert all(x.equal(state[name]) for name, x in trained.items())
    assert not model(**inputs("wan"))[0].equal(transformer("wan")(**inputs("wan"))[0])
    assert all(state[f"model.{name}"].equal(x) for name, x in original.items() if f"model.{name}" in state)

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball")
    asked = ["sample", str(folder), "--prompts", str(prompts), "--size", "9x64x96", "--steps", "2", "--shots", "1,2"]
    done = CliRunner().invoke(app, [*asked, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["method"] == "moga"
    assert found["videos"][0]["file"] == str(folder / "samples-4" / "0.mp4")
    assert Path(found["videos"][0]["file"]).stat().st_size > 0
    for command in ("ladder", "capture"):
        done = CliRunner().invoke(app, [command, str(folder)])
        assert done.exit_code == 2
        assert "trained a pretrained model" in done.output


@pytest.mark.slow
def test_methods_are_swept_at_one_density(models: Path, tmp_path: Path):
    file = tmp_path / "retrofit.yaml"
    file.write_text(
        f"""
name: retrofit
base:
  model: {{folder: {models / "hunyuan_video"}, lora_rank: 2}}
  data: {{name: {DATA}, family: hunyuan_video}}
  trainer: {{max_steps: 2, val_check_interval: 2, accelerator: cpu}}
  match: {{density: 0.8, within: 0.1}}
axes:
  attention:
    moc: {{name: moc}}
    window: {{name: window, tile: [1, 2, 2]}}
"""
    )
    dry = CliRunner().invoke(app, ["sweep", str(file), "--dry-run", "--json"])
    assert dry.exit_code == 0, dry.output
    rows = json.loads(dry.stdout)["rows"]
    assert {row["name"] for row in rows} == {"moc", "window"}
    for row in rows:
        assert row["density"] == pytest.approx(0.8, rel=0.1)
        assert row["seconds"] > 0
        assert row["flops"] > row["attention_flops"] > 0
        assert row["match"]["set"]
    done = CliRunner().invoke(app, ["sweep", str(file)])
    assert done.exit_code == 0, done.output
    results = [json.loads(path.read_text()) for path in (tmp_path / "runs" / "retrofit").glob("*/result.json")]
    assert len(results) == 2
    for result in results:
        assert result["status"] == "finished"
        assert result["density"] == pytest.approx(0.8, rel=0.1)  # what was planned ran
    assert (tmp_path / "runs" / "retrofit" / "report.html").is_file()


def test_a_preflight_counts_what_runs(models: Path):
    """Linear layers by hand, attention of all pairs."""
    config = load([{"model": str(models / "wan"), **SHORT}])
    found = run_preflight(config)
    tokens, words, wide = 6 * 4 * 6, 7, 32
    assert (found.tokens, found.items, found.density) == (tokens, 1, 1)
    assert found.attention_flops == 2 * (4 + 10) * tokens**2 * wide  # two layers; forward and backward
    per_block = 2 * tokens * (6 * wide * wide + 2 * wide * 64) + 2 * words * 2 * wide * wide
    ends = 2 * tokens * (4 * 4 * wide + wide * 4 * 4)
    text_and_time = 2 * words * (16 * wide + wide * wide) + 2 * (16 * wide + wide * wide + wide * 6 * wide)
    assert found.flops - found.attention_flops == 3 * (2 * per_block + ends + text_and_time)
    assert found.parameters == sum(p.numel() for p in transformer("wan").parameters())


def test_one_model_has_one_id(models: Path, monkeypatch: pytest.MonkeyPatch):
    """However its folder is spelt, and whether or not the scheduler's shift is written out."""
    plain = cell("a", load([{"model": str(models / "wan"), **SHORT}])).id
    monkeypatch.chdir(models)
    assert cell("a", load([{"model": "wan", **SHORT}])).id == plain
    assert cell("a", load([{"model": {"folder": "./wan"}, "flow.shift": 3, **SHORT}])).id == plain
    assert cell("a", load([{"model.lora_rank": 0, "model": "wan", **SHORT}])).id == plain
    assert cell("a", load([{"model": "wan", "flow.shift": 1, **SHORT}])).id != plain
    assert cell("a", load([{"model": "wan", "model.lora_rank": 4, **SHORT}])).id != plain
    layers = load([{"model": "wan", "attention": ["dense", {"name": "moc", "layers": "rest"}], **SHORT}])["attention"]
    assert [layer["name"] for layer in layers] == ["dense", "moc"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["model=no/such/folder"], "config.json is missing"),
        (["model=cogvideox"], "scheduler CogVideoXDDIMScheduler is not one of a flow"),
        (["model=wan", "model.lora_ranks=2"], "did you mean 'lora_rank'"),
        (["model=wan", "model.lora_rank=two"], "model.lora_rank must be int, got 'two'"),
        (["model=wan", "model.lora_rank=-1"], "lora_rank must be at least 0, got -1"),
        (["model=wan", "model.dim=64"], "unknown key of model 'dim'"),
        (["model=wan", "data=shot_world"], "shot_world has clips of pixels"),
        (["model=cosmos"], "its family cosmos has no flow loss here"),
        (["model=wan", "flow.drop_text=0.1"], "flow.drop_text must be 0"),
        (["model=wan", "optim.optimizer=muon"], "optim.optimizer must be adamw"),
        (["model=wan", "sampling.guidance=3"], "sampling.guidance must be 1"),
        (["model=wan", "attention=moc", "attention.top_k=0"], "top_k"),
    ],
)
def test_impossible_settings_are_refused(models: Path, monkeypatch: pytest.MonkeyPatch, given, message):
    monkeypatch.chdir(models)
    done = CliRunner().invoke(app, ["train", *options(SHORT), *given])
    assert done.exit_code == 2, done.output
    assert message in done.output


@pytest.mark.parametrize(
    ("parallel", "message"),
    [({"sequence": 2}, "parallel.sequence must be 1 for a pretrained model"), ({"data": "two"}, "data must be int")],
)
def test_devices_that_share_a_film_are_refused(models: Path, parallel: dict, message: str):
    with pytest.raises(ZooError, match=message):
        load([{"model": {"folder": str(models / "wan")}, "parallel": parallel}, SHORT])


class Quiet:
    """An observer that says nothing."""

    def started(self, name: str) -> None: ...

    def step(self, name: str, step: int, total: int | None, note: str) -> None: ...

    def ended(self, result: object) -> None: ...

    def note(self, line: str) -> None: ...


def by_one_process(config: dict, replicas: int) -> dict[str, torch.Tensor]:
    """The weights after training on the films of all data ranks in turn, without what trains on several devices."""
    given = {key: config[key] for key in ("model", "attention", "flow", "optim", "seed", "sampling")}
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    module, optim = LitPretrained(**given), Optim(**config["optim"])
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() == 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.dim() != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2))
    steps = config["trainer"]["max_steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: optim.rate(step, steps))
    data = ToyLatents(films=4)
    films = data._films(0, 4)
    share = [
        SimpleNamespace(distributed_sampler_kwargs={"num_replicas": replicas, "rank": r}, limit_train_batches=1.0)
        for r in range(replicas)
    ]
    streams = [iter(train_loader(films, 1, 0, 0, one)) for one in share]
    for step in range(steps):
        for rank, stream in enumerate(streams):
            purpose = (config["seed"], rank, step)
            draws, seed = generator("train", *purpose), generator("attention", *purpose).initial_seed()
            time = module.flow.draw_times(1, ONE_TIME, draws)[:, 0]
            losses = module.losses(next(stream), time, draws, seed=seed)
            (sum(losses.values()) / replicas).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config["trainer"]["gradient_clip_val"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in module.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 0], ids=["lora", "full"])
def test_two_processes_learn_what_one_learns(models: Path, rank: int):
    """Each trains on films of its own; adapters and routers, or all weights, towards the dense model."""
    model = {"folder": str(models / "wan"), "lora_rank": rank, "distill_layers": 0.1}
    config = load(
        [
            {
                **SHORT,
                "data": {"name": DATA, "films": 4},
                "trainer": {"max_steps": 2, "val_check_interval": 2, "accelerator": "cpu"},
                "model": model,
                "attention": {"name": "moga", **zoo.get("moga").small},
                "optim": {"ema_decay": 0.0, "lr": 1e-3},
                "parallel": {"data": 2},
            }
        ]
    )
    result = run(cell("two", config), "ranks", Tracker("ranks", lambda _: None), Quiet())
    assert result.status == "finished", result.traceback or result.reason
    assert (Path(result.folder) / "methods.pt").is_file()
    assert (Path(result.folder) / "lora").is_dir() is (rank > 0)
    state = torch.load(str(result.checkpoint), weights_only=True)["state_dict"]
    wanted = by_one_process(config, 2)
    original = transformer("wan").state_dict()
    assert set(state) >= set(wanted)
    for name, weight in wanted.items():
        torch.testing.assert_close(state[name], weight, rtol=0, atol=1e-6)
    moved = [n for n, x in wanted.items() if (o := original.get(n.removeprefix("model."))) is None or not x.equal(o)]
    assert moved


def test_all_reasons_are_given_at_once(models: Path):
    bad = {"model": {"folder": str(models / "wan"), "distill_output": -1.0}, "flow.history": 0.5, "seed": -1}
    with pytest.raises(ZooError) as error:
        load([bad, SHORT])
    assert all(part in str(error.value) for part in ("distill_output", "flow.history", "seed"))
