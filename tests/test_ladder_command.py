"""`zoo ladder`, `zoo capture` and `zoo replay` on a run that was trained for two steps."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_cli import zoo
from test_sample_command import Nobody
from tiny import BASE
from torch import Tensor

from experiments.config.names import parse_method
from experiments.config.resolve import load as load_config
from experiments.execution.run import run
from experiments.inspection.capture import FORMAT, Captured, load, save
from experiments.inspection.replay import Replayed, parse_methods, replay
from experiments.inspection.trained import Trained
from experiments.sweep.budget import Budget
from experiments.tracking.mlflow_logger import Tracker
from experiments.tracking.store import Cell
from lit_modules.routing_watch import each_attention
from sparse_zoo import Attention, Call, Layout, Shot, ZooError
from sparse_zoo import build as build_method
from sparse_zoo.ladder import RUNGS, ladder, verdict

LAYERS = [{"name": "moc", "top_k": 1, "anchors": []}, {"name": "moga", "groups": 2}]
FIELDS = ("layer", "layers", "step", "seed", "head_offset")
TENSORS = ("q", "k", "v", "hidden", "noise", "q_rows")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ZOO_HOME", str(home))
        patched.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
        few = ["data.val_films=3", "data.batch_size=2", "trainer.max_steps=2", "model.depth=2", "sampling.every=9"]
        result = run(
            Cell("two", load_config([BASE, {"attention": LAYERS}, *few])), "train", Tracker("train", print), Nobody()
        )
    assert result.status == "finished", result.traceback
    return Path(result.folder)


@pytest.fixture(scope="module")
def calls(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("calls") / "deep" / "calls.safetensors"
    result = zoo("capture", trained, "--out", file, "--films", "3", "--times", ".3", "--times", ".9", "--json")
    assert result.exit_code == 0, result.output
    # Two batches of films, two times, two layers.
    told = {"file": str(file), "bytes": file.stat().st_size, "calls": 8, "step": 2}
    assert json.loads(result.stdout) == told
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    return file


def same(a: Call, b: Call) -> None:
    for name in TENSORS:
        one, other = getattr(a, name), getattr(b, name)
        if isinstance(one, Tensor):
            assert torch.equal(one, other), name
            assert one.dtype == other.dtype, name
        else:
            assert one == other, name
    assert (a.features or {}).keys() == (b.features or {}).keys()
    assert all(torch.equal(value, (b.features or {})[name]) for name, value in (a.features or {}).items())
    assert [getattr(a, name) for name in FIELDS] == [getattr(b, name) for name in FIELDS]
    assert a.layout == b.layout


# -- captures -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_capture_is_what_the_layers_were_given(trained: Path, calls: Path) -> None:
    opened = Trained("test", trained, [], 3)
    want: list[Call] = []
    with torch.no_grad():
        for batch in opened.batches:
            for time in (0.3, 0.9):
                want += each_attention(opened.module, batch, time, opened.step, lambda _, call, __: call)
    got = load(calls)
    for one, call in zip(got, want, strict=True):
        same(one.call, call)
        assert one.method == LAYERS[call.layer]
    assert [(len(one.call.q), one.call.layer) for one in got] == [(2, 0), (2, 1)] * 2 + [(1, 0), (1, 1)] * 2
    assert got[0].call.step == 2


@pytest.mark.slow
def test_some_layers(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "some.safetensors"
    result = zoo("capture", trained, "--out", file, "--layers", "1", "--times", "0.5")
    assert (result.exit_code, result.stdout.split()[:2]) == (0, ["1", "calls,"])
    assert [one.call.layer for one in load(file)] == [1]
    for layers, message in (("2", "layers are 0 … 1, got 2"), ("a", "must be whole numbers as in 0,2, got 'a'")):
        refused = zoo("capture", trained, "--out", tmp_path / "none", "--layers", layers)
        assert (refused.exit_code, message in refused.stderr) == (2, True)
    assert not (tmp_path / "none").exists()


def test_a_capture_whose_header_is_as_long_as_a_pickle_begins_is_read(tmp_path: Path) -> None:
    call = Call(*torch.randn(3, 1, 1, 4, 2), Layout.film([Shot(1, 2, 2)]))
    begins = set()
    for length in range(0, 1024, 8):
        file = save(tmp_path / "calls.safetensors", [Captured(call, {"name": "dense", "note": "x" * length})])
        begins.add(file.read_bytes()[:2])
        same(load(file)[0].call, call)
    assert begins >= {b"\x80\x03", b"\x80\x04"}  # 896 and 1152 bytes, as pickles of protocols 3 and 4


def awkward() -> list[Captured]:
    """Half precision, shared key heads, some queries, features, two films, k and v that are one tensor."""
    film = Layout.film([Shot(1, 2, 3, 1), Shot(2, 1, 1)], caption=2)
    packed = Layout.pack([film, Layout.film([Shot(1, 1, 2)])])
    k = torch.randn(2, 2, len(packed), 4).bfloat16()
    rows = torch.tensor([3, 0, 9])
    some = Call(torch.randn(2, 4, 3, 4).bfloat16(), k, k, packed, q_rows=rows, noise=0.25, step=None, head_offset=4)
    q = torch.randn(1, len(film), 2, 4).transpose(1, 2)  # not contiguous
    features = {"p": torch.rand(1, len(film), 3), "group": torch.randint(3, (1, len(film)))}
    noise, hidden = torch.rand(1, 2), torch.randn(1, len(film), 6, dtype=torch.float64)
    whole = Call(q, q, q, film, hidden=hidden, features=features, layer=3, layers=5, noise=noise, step=7, seed=1 << 40)
    return [Captured(some, {"name": "dense"}), Captured(whole, {"name": "moga", "mix": ["group"], "schedule": None})]


def test_a_call_is_saved_bit_for_bit(tmp_path: Path) -> None:
    given = awkward()
    got = load(save(tmp_path / "calls.safetensors", given))
    for one, two in zip(got, given, strict=True):
        same(one.call, two.call)
        assert one.method == two.method


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="there is no call to save"):
        save(tmp_path / "none", [])
    some, whole = awkward()
    with pytest.raises(ZooError, match="call 1 has a sampler's memory"):
        save(tmp_path / "none", [some, Captured(replace(whole.call, memory={}), {})])
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = save(tmp_path / "calls", awkward()).read_bytes()

    def full(_: object, path: str, *__: object) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("experiments.inspection.capture.save_file", full)
    with pytest.raises(ZooError, match="calls could not be written: No space left on device"):
        save(tmp_path / "calls", awkward())
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [there]


def test_bad_files_are_refused_with_all_reasons(tmp_path: Path) -> None:
    good = save(tmp_path / "good", awkward())
    tensors = load_file(good)
    (tmp_path / "text").write_text("no tensors")
    save_file(tensors, tmp_path / "foreign", {"format": "pt"})
    save_file(tensors, tmp_path / "broken", {"format": FORMAT, "calls": "[{"})
    save_file({}, tmp_path / "empty", {"format": FORMAT, "calls": "[]"})
    for name, message in (
        ("none", "no such file"),
        ("text", "is no safetensors file"),
        ("foreign", "its format is 'pt'"),
        ("broken", "its list of calls is no JSON"),
        ("empty", "it holds no call"),
    ):
        result = zoo("replay", tmp_path / name)
        assert (result.exit_code, message in result.stderr.replace("\n", " ")) == (2, True), result.stderr
    first = {"films": [], "noise": None, "method": {}, "layer": 0}
    second = {"films": [{"caption": 0, "shots": [[0, 1, 1, 0]]}], "noise": None, "method": {}, "layer": 0}
    del tensors["0.v"]
    tensors |= {"0.w": torch.zeros(1), "5.q": torch.zeros(1)}
    save_file(tensors, tmp_path / "bad", {"format": FORMAT, "calls": json.dumps([first, second])})
    with pytest.raises(ZooError) as error:
        load(tmp_path / "bad")
    for reason in (
        "v is missing",
        "w is not known",
        "'5.q' is of no call",
        "call 1: Shot",
        "frames must be at least 1",
    ):
        assert reason in str(error.value), reason


# -- ladder ---------------------------------------------------------------------------------------------------------


def test_the_ladder_of_a_run(trained: Path, calls: Path, tmp_path: Path) -> None:
    asked = ["--films", "3", "--times", ".3", "--times", ".9", "--method", "moc:top_k=2,anchors=[text]"]
    result = zoo("ladder", trained, *asked, "--plot", tmp_path / "a" / "ladder.svg", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert Path(found["plot"]).read_text().startswith("<?xml")
    assert (found["step"], found["films"], found["times"]) == (2, 3, [0.3, 0.9])
    own, other = found["methods"]
    assert (own, other) == ("moc · top_k 1 · anchors none / moga · groups 2", "moc · top_k 2 · anchors text")
    steps = {(x["method"], x["layer"], x["time"]): x for x in found["steps"]}
    assert steps.keys() == {(m, layer, time) for m in found["methods"] for layer in (0, 1) for time in (0.3, 0.9)}

    # Each step is the ladder of the calls of that layer and time, its items the films of both batches.
    opened = Trained("test", trained, [], 3).module.eval()
    captured = load(calls)
    asked_for = build_method("moc", heads=2, head_dim=8, top_k=2, anchors=["text"])
    for number, time in ((0, 0.3), (2, 0.9)):
        for layer in (0, 1):
            parts = [captured[number + layer].call, captured[number + 4 + layer].call]
            attention = opened.model.blocks[layer].attention
            for method, name in ((attention, own), (asked_for, other)):
                rungs = [ladder(method, call).rungs for call in parts]
                step = steps[name, layer, time]
                assert list(step["rungs"]) == list(rungs[0]) == list(RUNGS)
                for rung in rungs[0]:
                    for key in ("mass", "error", "density"):
                        by_head = torch.cat([getattr(x[rung], key) for x in rungs]).mean(0)
                        assert step["heads"][rung][key] == pytest.approx(by_head.tolist(), abs=1e-6)
                        assert step["rungs"][rung][key] == pytest.approx(float(by_head.mean()), abs=1e-6)

    for layer in (0, 1):
        (judged,) = [x for x in found["verdicts"] if (x["method"], x["layer"]) == (own, layer)]
        mass = {rung: sum(steps[own, layer, time]["rungs"][rung]["mass"] for time in (0.3, 0.9)) / 2 for rung in RUNGS}
        assert judged["mass"] == pytest.approx(mass)
        assert judged["verdict"] == verdict(mass)


def test_the_ladder_of_a_capture_is_that_of_the_run(trained: Path, calls: Path) -> None:
    method, given = "moc:top_k=2,anchors=[text]", ["--films", "3", "--times", ".3", "--times", ".9"]
    of_calls, of_run = (
        json.loads(zoo("ladder", *arguments, "--method", method, "--json").stdout)
        for arguments in ([calls], [trained, *given])
    )
    assert of_calls["methods"] == of_run["methods"][1:]
    for key in ("step", "films", "times"):
        assert of_calls[key] == of_run[key]
    assert of_calls["steps"] == [step for step in of_run["steps"] if step["method"] in of_calls["methods"]]
    assert of_calls["verdicts"] == [x for x in of_run["verdicts"] if x["method"] in of_calls["methods"]]
    assert of_calls["plot"] == str(calls.parent / "ladder.png")

    served = json.loads(zoo("ladder", calls, "--json").stdout)  # by what served them, built anew
    assert served["methods"] == ["moc · top_k 1 · anchors none", "moga · groups 2 (untrained)"]
    assert {step["layer"] for step in served["steps"]} == {0, 1}


def test_what_a_capture_cannot_be_asked_is_refused(calls: Path, tmp_path: Path) -> None:
    refused = zoo("ladder", calls, "data.subjects=3", "--films", "2", "--times", "0.5")
    assert refused.exit_code == 2
    for name in ("overrides", "--films", "--times"):
        assert f"has films and noise times of its own; leave {name} out" in " ".join(refused.stderr.split())
    first, *_ = load(calls)
    silent = Captured(replace(first.call, noise=None), first.method)
    narrow = replace(first.call, q=first.call.q[:, :1], k=first.call.k[:, :1], v=first.call.v[:, :1])
    refused = zoo("ladder", save(tmp_path / "odd.safetensors", [silent, Captured(narrow, first.method)]))
    assert refused.exit_code == 2
    assert "call 0 does not say its noise time" in refused.stderr
    assert "its calls must have heads of one number and width, got [(1, 8), (2, 8)]" in " ".join(refused.stderr.split())


@pytest.mark.slow
def test_the_ladder_for_people(trained: Path) -> None:
    result = zoo("ladder", trained, "--films", "1", "--times", "0.5", "--heads", "--method", "dense")
    assert result.exit_code == 0, result.output
    assert "By layer, mean over noise times 0.5" in result.stdout
    assert "By noise time, mean over layers" in result.stdout
    assert "1, head 1" in result.stdout
    assert "dense, layer 1: enough: keeps 100.0 %, the best choice of as many pieces 100.0 %" in result.stdout
    assert image.imread(trained / "ladder.png").shape[1] == 12 * 130
    alone = zoo("ladder", trained, "--films", "1", "--times", "0.5", "--method", "moga:groups=3").stdout
    assert "moga · groups 3 (untrained), layer 0: " in alone
    assert "head" not in alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--times", "0"], "must be above 0 and at most 1, got 0"),
        (["--method", "mocc"], "did you mean 'moc'"),
        (["--method", "moc:topk=2"], "did you mean 'top_k'"),
        (["--method", "moc:2"], "an override is key=value"),
        (["model.dim=3"], "zoo ladder: only data can be changed"),
    ],
)
def test_what_the_ladder_refuses(trained: Path, arguments: list[str], message: str) -> None:
    result = zoo("ladder", trained, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_a_method_in_one_word() -> None:
    assert parse_method("moc") == ("moc", {})
    given = {"top_k": 2, "anchors": ["text", "shot"], "causal": None}
    assert parse_method("moc:top_k=2,anchors=[text,shot],causal=null") == ("moc", given)


# -- replay ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_methods_are_ranked_on_the_calls(calls: Path, tmp_path: Path) -> None:
    result = zoo("replay", calls, "dense", "moc:top_k=1", "moc:top_k=2", "moga", "--json", "--plot", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["calls"][1] == {"layer": 1, "tokens": len(load(calls)[0].call.layout), "method": LAYERS[1]}
    assert image.imread(tmp_path / "a.png").shape[2] == 4
    rows = {(row["method"], row["settings"].get("top_k")): row for row in found["rows"]}
    assert [row["error"] for row in found["rows"]] == sorted(row["error"] for row in found["rows"])
    dense = rows["dense", None]
    assert (dense["density"], dense["pareto"], dense["untrained"]) == (1, True, False)
    assert dense["error"] < 1e-5
    assert rows["moga", None]["untrained"]
    assert rows["moga", None]["settings"] == {}  # the class's defaults, not those of the suite
    one = rows["moc", 1]
    calls_of = [captured.call for captured in load(calls)]
    moc = build_method("moc", heads=2, head_dim=8, top_k=1)
    assert one["density"] == pytest.approx(sum(moc.run(call).cost().density for call in calls_of) / 8)
    for key, rung, figure in (
        ("mass", "method", "mass"),
        ("best_mass", "best", "mass"),
        ("best_error", "best", "error"),
    ):
        assert one[key] == pytest.approx(sum(ladder(moc, call).means()[rung][figure] for call in calls_of) / 8)
    assert one["seconds"] > 0


@pytest.mark.slow
def test_replay_for_people(calls: Path, here: Path) -> None:
    result = zoo("replay", calls)
    assert result.exit_code == 0, result.output
    assert "untrained" in result.stdout
    assert "by error" in result.stdout
    assert "dense: error 0.0 % with 100.0 % of the pairs, 100.0 % kept\n" in result.stderr  # as soon as it is known
    assert not list(here.glob("*.png"))


def test_a_method_that_cannot_run_says_why(calls: Path) -> None:
    result = zoo("replay", calls, "moc:top_k=0", "dense", "--plot", "front.png")
    assert result.exit_code == 1
    assert "top_k must be a whole number of at least 1, got 0" in result.stdout
    assert "100.0 %" in result.stdout
    alone = zoo("replay", calls, "moc:top_k=0")
    assert alone.exit_code == 1
    assert "100.0 %" in alone.stdout  # dense is there as the reference
    unknown = zoo("replay", calls, "mocc")
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    assert "did you mean 'moc'" in unknown.stderr


@pytest.mark.slow
def test_methods_rank_at_one_cost() -> None:
    """Each knob is turned on the calls themselves, which no two cost the same; who cannot cost as much says why."""
    film = Layout.film([Shot(2, 4, 4, 2)] * 4, caption=2)
    captured = []
    for seed in range(2):
        draws = torch.Generator().manual_seed(seed)
        q, k, v = torch.randn(3, 1, 2, len(film), 8, generator=draws)
        captured.append(Captured(Call(q * (1 + seed), k, v, film, seed=seed), {}))
    given: list[tuple[str, dict[str, Any]]] = [
        ("svg2", {"query_clusters": 8, "key_clusters": 16, "least": 0.0}),
        ("xattention", {"block_tokens": 8, "stride": 4}),
        ("dense", {}),
        ("moc", {"top_k": 1}),
        ("moc", {"chunk": "frame"}),
        ("moc", {"chunk": "shot"}),
    ]
    found = replay(captured, given, Budget.of({"density": 0.5}))
    ran = [row for row in found if row.failed is None]
    assert {row.method for row in ran} == {"svg2", "xattention", "dense"}  # the reference has no budget
    for row in (row for row in ran if row.method != "dense"):
        attention = build_method(row.method, heads=2, head_dim=8, **row.settings).eval()
        costs = [attention.run(one.call).cost().density for one in captured]
        assert row.figures["density"] == pytest.approx(sum(costs) / 2) == pytest.approx(0.5, rel=0.02)
        assert abs(costs[0] - costs[1]) > 0.02
        assert row.settings.items() >= dict(given)[row.method].items()
    named, coarse, ends = (str(row.failed) for row in found if row.failed is not None)
    assert named == "match: top_k of moc is to be solved: leave it out"
    assert coarse.endswith("Another setting of moc may bring it nearer")
    assert "moc cannot reach density 0.5: the closest is" in ends


def test_named_method_that_misses_the_budget_fails(calls: Path) -> None:
    named = zoo("replay", calls, "dense", "moc", "--match", "density=0.5", "--json")
    assert named.exit_code == 1
    found = json.loads(named.stdout)
    assert found["match"] == {"density": 0.5}
    assert found["rows"][-1]["failed"]


@pytest.mark.slow
def test_methods_that_miss_a_budget_are_listed_when_none_is_named(calls: Path) -> None:
    everyone = zoo("replay", calls, "--match", "density=0.8")
    assert re.search(r"\bdense +100.0 %", everyone.stdout)
    assert "cannot reach density 0.8: the closest is" in everyone.stdout
    assert "by error" in everyone.stdout
    assert everyone.exit_code == 0


@pytest.mark.slow
def test_the_layout_is_planned_once_where_it_alone_decides(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, run = [], Attention.run
    monkeypatch.setattr(Attention, "run", lambda own, call: runs.append(own) or run(own, call))
    captured = load(calls)
    layouts = {(one.call.layout, one.call.q.shape) for one in captured}
    for method, once in (("window", True), ("moc", False)):
        budget, own, told = Budget.of({"flops": 1e5}), {"tile": [1, 1, 1]} if once else {}, []
        (row,) = replay(captured, [(method, own)], budget, lambda note, row: told.append((note, row)))  # noqa: B023
        measured = [note for note, _ in told if " at " in note]
        served = 0 if row.failed else len(captured) + len({one.call.layout for one in captured})
        assert len(runs) == len(measured) * (len(layouts) if once else len(captured)) + served
        assert told[-1] == (method, row)
        runs.clear()


def test_a_budget_that_cannot_be_is_refused_at_once(calls: Path) -> None:
    for text, message in (("dencity=0.5", "did you mean 'density'"), ("density=-1", "must be a number above 0")):
        result = zoo("replay", calls, "--match", text)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr
    (row,) = replay(load(calls), [("moc", {})], Budget.of({"seconds": 1.0}))
    assert row.failed == "match: seconds can be matched in zoo train and zoo sweep alone"


def test_the_front_is_what_nothing_beats(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {1: (0.2, 0.5), 2: (0.4, 0.3), 3: (0.4, 0.4), 4: (0.5, 0.3), 5: (0.2, 0.5)}

    def served(_: object, method: str, given: dict[str, int], __: object) -> Replayed:
        density, error = figures[given["top_k"]]
        return Replayed(method, given, {"density": density, "error": error})

    monkeypatch.setattr("experiments.inspection.replay._served", served)
    rows = replay(load(calls), [("moc", {"top_k": n}) for n in figures])
    assert {row.settings["top_k"] for row in rows if row.pareto} == {1, 2, 5}
    assert [row.settings["top_k"] for row in rows] == [2, 4, 3, 1, 5]


def test_replay_compares_defaults_and_always_dense() -> None:
    assert dict(parse_methods([]))["moc_fixed"] == {}
    assert dict(parse_methods([]))["dense"] == {}
    assert parse_methods(["moc:top_k=3", "moc"]) == [("dense", {}), ("moc", {"top_k": 3}), ("moc", {})]
    assert parse_methods(["moc", "dense"]) == [("moc", {}), ("dense", {})]


@pytest.mark.parametrize("command", ["ladder", "capture", "replay"])
def test_help_teaches(command: str) -> None:
    text = zoo(command, "--help").stdout
    assert "Usage" in text
    assert f"Example: zoo {command}" in text
