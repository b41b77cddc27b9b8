import json

import pytest
import torch

import sparse_zoo as zoo
from sparse_zoo import bench
from sparse_zoo.kernels import grouped
from sparse_zoo.simulate import simulate

CPU = torch.device("cpu")


def test_rows_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--tokens", "2048", "--repeats", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    assert found["threads"]
    assert found["device"]
    assert found["versions"]["torch"] == torch.__version__
    assert [(row["method"], row["pass"]) for row in rows] == [
        (entry.method, which) for entry in bench.CPU_ENTRIES for which in bench.PASSES
    ]
    for row in rows:
        assert row["attained"] == pytest.approx(row["dense_seconds"] / row["seconds"])
        assert row["dense_seconds"] == min(row["dense_all"].values())
        assert row["bound"] == pytest.approx(1 / row["density"])
        assert row["padded_share"] >= 0
        assert row["routing_share"] >= 0


def test_a_wrong_kernel_gets_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = grouped._Softmax.result

    def wrong(self, dtype):  # type: ignore[no-untyped-def]
        out, lse = right(self, dtype)
        return out + 0.01, lse

    monkeypatch.setattr(grouped._Softmax, "result", wrong)
    assert bench.main(["--tokens", "2048", "--repeats", "1", "--methods", "window"]) == 1
    assert "differs from the oracle" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["vsa", "nsa"])
def test_coarse_branches_are_judged_before_they_are_timed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = zoo.build(method, heads=1, head_dim=16, dim=bench.ROUTING_DIM, kernel="cpu")
    assert bench.gate(attention, 16, torch.float32, CPU) == ""
    right = grouped._Softmax.result

    def wrong(self, dtype):  # type: ignore[no-untyped-def]
        out, lse = right(self, dtype)
        return out + 0.01 * (len(out) < 200), lse  # where queries are pooled

    monkeypatch.setattr(grouped._Softmax, "result", wrong)
    assert ("differs" in bench.gate(attention, 16, torch.float32, CPU)) == (method == "vsa")


def test_peak_memory_is_what_is_held_at_once() -> None:
    def run() -> None:
        for _ in range(3):  # one after the other, not together
            a = torch.ones(1 << 18)
            del a
        b, c = torch.ones(1 << 18), torch.ones(1 << 17)
        del b, c

    assert bench.peak_bytes(run, CPU) == pytest.approx(4 * 3 * (1 << 17), rel=0.01)


def test_out_of_memory_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = bench._attend

    def full(attention, *given):  # type: ignore[no-untyped-def]
        if type(attention).__name__ == "MoC":
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")
        return attend(attention, *given)

    monkeypatch.setattr(bench, "_attend", full)
    round_ = bench.Round(bench.film_of(2048), bench.CPU_ENTRIES[:2])
    moc, *fixed = bench.measure(round_, 1, CPU)
    assert moc["method"] == "moc"
    assert "can't allocate memory" in moc["failed"]
    assert [row["pass"] for row in fixed] == list(bench.PASSES)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "gpus"], "unknown suite 'gpus'"),
        (["--methods", "mocc"], "unknown method 'mocc'"),
        (["--tokens", "0"], "tokens must be at least 1"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--suite", "cpu", "--methods", "dense"], "nothing is left"),
    ],
)
def test_refusals(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_kernel_that_cannot_run_says_why() -> None:
    row = bench.measure(bench.Round(bench.film_of(2048), (bench.Entry("moc", {}, "torch"),)), 1, CPU)[0]
    assert "needs a CUDA device" in row["failed"] or "tensors are on cpu" in row["failed"]


def test_every_event_is_told() -> None:
    rounds = [bench.Round(bench.film_of(2048), bench.CPU_ENTRIES[3:])]
    told: list[str] = []
    bench.run(rounds, 1, CPU, told.append)
    assert len(told) == bench.events(rounds, 1, CPU)


def test_every_suite_can_be_made() -> None:
    for name in bench.SUITES:
        for round_ in bench.suite(name):
            assert round_.dtype in bench.DTYPES
            assert len(round_.film) > 0


def test_the_quick_suite_has_every_method_at_work() -> None:
    (round_,) = bench.suite("quick")
    entries = {entry.method: entry.settings for entry in round_.entries}
    assert [*entries] == [name for name in zoo.names() if name != "dense"]
    for name, settings in entries.items():
        if not zoo.get(name).__module__.startswith("sparse_zoo.methods."):
            continue  # a plug-in goes with its defaults
        counted = simulate(name, round_.film, heads=2, head_dim=16, dim=32, settings=settings)
        assert counted.cost.density < 0.6, name  # at defaults made for long films it would be dense
