"""Watching routing must change nothing, and log what the diagnostics say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from tiers import cases
from torch.utils.data import DataLoader
from toy_films import FIRST, PACKED, arguments, attention, batch
from typing_extensions import override

import sparse_zoo as zoo
from lit_modules import LitVideoDiT, RoutingWatch
from lit_modules.flow import generator
from lit_modules.routing_watch import TIMES
from lit_modules.stream import stream
from sparse_zoo.diagnostics import churn, diagnose

pytestmark = pytest.mark.filterwarnings("ignore")


class Kept(DummyLogger):
    """Keeps what is logged by step."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, dict[str, float]] = {}

    @override
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:  # type: ignore[override]
        if any(name.startswith("diagnostics/") for name in metrics):
            assert step not in self.found
            self.found[step] = dict(metrics)


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))


def lit(**model: Any) -> LitVideoDiT:
    torch.manual_seed(0)
    module = LitVideoDiT(arguments(**model), {"drop_text": 0.5}, {"lr": 5e-3, "warmup_steps": 2, "ema_decay": 0.9})
    with torch.no_grad():  # a new DiT's gates are shut: its layers would see the same
        for parameter in module.model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return module


def fit(module: LitVideoDiT, steps: int, *callbacks: Callback, batches: int = 1, **settings: Any) -> Kept:
    logger = Kept()
    given = {"accelerator": "cpu", "enable_checkpointing": False, "enable_progress_bar": False} | settings
    trainer = Trainer(
        max_steps=steps,
        logger=logger,
        callbacks=list(callbacks),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **given,
    )
    films = [batch(PACKED, size=2, seed=seed) for seed in range(batches)]
    trainer.fit(module, DataLoader(films * steps, batch_size=None), DataLoader([batch(FIRST)], batch_size=None))
    return logger


@pytest.mark.parametrize("precision", cases(["32-true", "bf16-mixed"], ["32-true"]))
def test_training_is_the_same_with_it_bit_for_bit(tmp_path: Path, precision: Any) -> None:
    ended = []
    for watch in ([], [RoutingWatch(tmp_path, every=1)]):
        losses, module = Losses(), lit(attention=[attention("moc"), attention("moga")], checkpoint=True)
        torch.manual_seed(3)
        fit(module, 5, losses, *watch, batches=2, precision=precision, val_check_interval=2)
        # Validation puts the averaged weights in their place, so these are the average's.
        ended.append((losses.losses, [p.detach().clone() for p in module.parameters()], torch.get_rng_state()))
        assert module.model.training
    (plain, weights, state), (watched, same, after) = ended
    assert plain == watched
    assert len(set(plain)) == 5
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    assert torch.equal(state, after)


def probe(module: LitVideoDiT, films: dict[str, Any], at: float, step: int) -> list[tuple[zoo.Call, zoo.Result]]:
    """The probe made by hand: the first item of the batch, in eval mode, each layer's call kept."""
    seen = []
    item = {"clips": [clip[:1] for clip in films["clips"]], "text": films["text"][:1]}
    originals = [block.attention.run for block in module.model.blocks]
    for block, run in zip(module.model.blocks, originals, strict=True):

        def keep(call: zoo.Call, run: Any = run) -> zoo.Result:
            seen.append((call, run(call)))
            return seen[-1][1]

        block.attention.run = keep
    time = torch.full((1, len(stream(PACKED).film_of_shot)), at)
    module.model.eval()
    with torch.no_grad():
        draws = generator("routing", 0)
        module.flow.loss(module.model, item["clips"], item["text"], time, PACKED, draws, step=step, seed=0)
    module.model.train()
    for block in module.model.blocks:
        del block.attention.run
    return seen


class Probe(Callback):
    """Keeps what the probe by hand gives after each step."""

    def __init__(self) -> None:
        self.seen: dict[int, list[list[tuple[zoo.Call, zoo.Result]]]] = {}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LitVideoDiT)
        step = trainer.global_step
        films = globals()["batch"](PACKED, size=2, seed=0)  # the first batch, whatever this one is
        self.seen[step] = [probe(pl_module, films, at, trainer.fit_loop.total_batch_idx) for at in TIMES]


@pytest.mark.slow
def test_it_logs_what_the_diagnostics_say_of_the_probe(tmp_path: Path) -> None:
    module, by_hand, watch = (
        lit(attention=[attention("moc"), attention("moga")]),
        Probe(),
        RoutingWatch(tmp_path, every=3),
    )
    logged = fit(module, 7, by_hand, watch, batches=3).found
    assert list(logged) == [1, 3, 6]
    lines = [json.loads(line) for line in (tmp_path / "diagnostics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3, 6]
    for step, line in zip(logged, lines, strict=True):
        middle, noisy = by_hand.seen[step]
        for i, ((call, result), (_, other)) in enumerate(zip(middle, noisy, strict=True)):
            found = diagnose(call, result.plans)
            want = {**found[0].scalars(), "churn_times": float(churn(result.plans[0], other.plans[0]).mean())}
            if step > 1:
                before = by_hand.seen[1 if step == 3 else 3][0][i][1].plans[0]
                want["churn_steps"] = float(churn(before, result.plans[0]).mean())
            for name, value in want.items():
                assert logged[step][f"diagnostics/{name}/layer_{i}"] == pytest.approx(value), name
            assert line["layers"][i]["means"] == pytest.approx(want)
            assert line["layers"][i]["branches"] == [json.loads(json.dumps(one.to_json())) for one in found]
        for name in ("mass", "churn_times", "load_entropy"):
            layers = [logged[step][f"diagnostics/{name}/layer_{i}"] for i in (0, 1)]
            assert logged[step][f"diagnostics/{name}"] == pytest.approx(sum(layers) / 2)
    assert max(logged[6][f"diagnostics/churn_steps/layer_{i}"] for i in (0, 1)) > 0
    assert max(logged[6][f"diagnostics/churn_times/layer_{i}"] for i in (0, 1)) > 0

    told = watch.summary()
    assert told["step"] == 6
    assert told["mass"] == logged[6]["diagnostics/mass"]
    assert [[len(branch) for branch in layer] for layer in told["loops"]] == [[2], [2]]  # by head
    assert told["share_of_time"] > 0
    json.dumps(told, allow_nan=False)


def test_its_seconds_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second in two probes beside steps of a tenth: the share says so."""
    clock = [0.0]
    monkeypatch.setattr("lit_modules.routing_watch.time.perf_counter", lambda: clock[0])

    class Slow(Callback):
        @override
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            clock[0] += 0.1

    watch = RoutingWatch(tmp_path, every=4)
    probing = watch._probe

    def slow(*given: Any) -> Any:
        clock[0] += 0.25
        return probing(*given)

    monkeypatch.setattr(watch, "_probe", slow)
    logged = fit(lit(), 4, watch, Slow()).found
    assert logged[1]["diagnostics/share_of_time"] == pytest.approx(0.25 / 0.1)
    assert logged[4]["diagnostics/share_of_time"] == pytest.approx(0.5 / 0.4)
    assert watch.summary()["share_of_time"] == pytest.approx(0.5 / 0.4)


def test_a_method_that_routes_nothing_has_masses_alone(tmp_path: Path) -> None:
    watch = RoutingWatch(tmp_path)
    logged = fit(lit(attention=attention("window")), 2, watch).found[1]
    assert {name for name in logged if name.count("/") == 1} == {
        "diagnostics/mass",
        "diagnostics/mass_best",
        "diagnostics/share_of_time",
    }
    assert watch.summary()["loops"] == [[], []]
    assert RoutingWatch(tmp_path).summary() == {}
    with pytest.raises(zoo.ZooError, match="every must be at least 1"):
        RoutingWatch(tmp_path, every=0)


def test_the_probe_is_in_eval_mode_and_leaves_no_hook(tmp_path: Path) -> None:
    module = lit(attention=attention("moc"))
    modes = []
    module.model.blocks[0].attention.register_forward_pre_hook(
        lambda attention, _: modes.append((torch.is_grad_enabled(), attention.training))
    )
    fit(module, 1, RoutingWatch(tmp_path))
    # The first step, the probe; validation follows.
    assert modes[: 1 + len(TIMES)] == [(True, True), *[(False, False)] * len(TIMES)]
    assert module.model.training
    assert [len(block.attention._forward_hooks) for block in module.model.blocks] == [0, 0]


def test_accumulated_batches_are_probed_once_a_step(tmp_path: Path) -> None:
    logged = fit(lit(attention=attention("moc")), 2, RoutingWatch(tmp_path, every=1), accumulate_grad_batches=3).found
    assert list(logged) == [1, 2]


@pytest.mark.parametrize("name", ["moga", "vsa", "nsa"])
def test_a_schedule_may_go_to_a_method_of_other_branches(name: str, tmp_path: Path) -> None:
    """And back: the plans of one method are not compared with those of another."""
    own = {**attention(name), "name": "dense", "schedule": {"name": {2: name, 4: "dense"}}}
    logged = fit(lit(attention=own), 5, RoutingWatch(tmp_path, every=1), batches=5).found
    churned = [step for step, figures in logged.items() if "diagnostics/churn_steps" in figures]
    assert list(logged) == [1, 2, 3, 4, 5]
    assert churned == [4]
