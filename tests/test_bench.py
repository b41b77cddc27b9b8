import itertools
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sparse_zoo as zoo
from sparse_zoo import bench
from sparse_zoo.bench import __main__ as command
from sparse_zoo.bench import agreement, competitors, host, intervals, turns
from sparse_zoo.kernels import grouped
from sparse_zoo.simulate import simulate

CPU = torch.device("cpu")


def test_rows_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["moc", "window"]
    given = ["--tokens", "2048", "--repeats", "1", "--max-repeats", "1", "--json"]
    assert command.main([*given, "--methods", *methods]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = [row for row in found["rows"] if row["pass"] != "host"]
    assert found["threads"]
    assert found["device"]
    assert found["versions"]["torch"] == torch.__version__
    assert [(row["method"], row["pass"]) for row in rows] == [
        (method, which) for method in methods for which in bench.PASSES
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
    assert command.main(["--tokens", "2048", "--repeats", "1", "--max-repeats", "1", "--methods", "window"]) == 1
    assert "errs by" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["vsa", "nsa"])
def test_coarse_branches_are_judged_before_they_are_timed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = zoo.build(method, heads=1, head_dim=16, dim=bench.ROUTING_DIM, kernel="cpu")
    film = zoo.Layout.film([zoo.Shot(2, 6, 9, text=3)] * 8, caption=2)
    q, k, v = (torch.randn(1, 1, len(film), 16) for _ in range(3))
    hidden = torch.randn(1, len(film), bench.ROUTING_DIM)
    assert bench.gate(attention, q, k, v, film, hidden) == ""
    right = grouped._Softmax.result

    def wrong(self, dtype):  # type: ignore[no-untyped-def]
        out, lse = right(self, dtype)
        return out + 0.01 * (len(out) < 200), lse  # where queries are pooled

    monkeypatch.setattr(grouped._Softmax, "result", wrong)
    assert ("errs" in bench.gate(attention, q, k, v, film, hidden)) == (method == "vsa")


def test_what_is_wrong_on_the_timed_film_alone_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = grouped._Softmax.result

    def wrong(self, dtype):  # type: ignore[no-untyped-def]
        out, lse = right(self, dtype)
        return out + 0.01 * (len(out) > 1000), lse  # the gate's small film has 890 tokens

    monkeypatch.setattr(grouped._Softmax, "result", wrong)
    (row,) = bench.measure(bench.Round(bench.film_of(2048), bench.CPU_ENTRIES[3:]), 1, CPU)
    assert row["failed"].startswith("on 2048 tokens: out errs by")


def test_a_wrong_sum_of_branches_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """moga hands three plans to the kernel at once, by another code path than one plan takes."""
    right = grouped.Grouped.run_sum
    monkeypatch.setattr(grouped.Grouped, "run_sum", lambda self, *given: right(self, *given) * 1.01)
    attention = zoo.build("moga", heads=1, head_dim=16, dim=bench.ROUTING_DIM, kernel="cpu", groups=2)
    film = zoo.Layout.film([zoo.Shot(2, 4, 4)] * 2)
    q, k, v = (torch.randn(1, 1, len(film), 16) for _ in range(3))
    said = bench.gate(attention, q, k, v, film, torch.randn(1, len(film), bench.ROUTING_DIM))
    assert "sum of out errs" in said
    assert "sum of dq errs" in said


def test_peak_memory_is_what_is_held_at_once() -> None:
    def run() -> None:
        for _ in range(3):  # one after the other, not together
            a = torch.ones(1 << 18)
            del a
        b, c = torch.ones(1 << 18), torch.ones(1 << 17)
        del b, c

    assert bench.peak_bytes(run, CPU) == pytest.approx(4 * 3 * (1 << 17), rel=0.01)


@pytest.mark.slow
def test_out_of_memory_is_a_row_and_the_other_methods_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = turns._attend

    def full(attention, *given):  # type: ignore[no-untyped-def]
        if type(attention).__name__ == "MoC":
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")
        return attend(attention, *given)

    monkeypatch.setattr(turns, "_attend", full)
    round_ = bench.Round(bench.film_of(2048), bench.CPU_ENTRIES[:2])
    moc, *fixed = bench.measure(round_, 1, CPU)
    assert moc["method"] == "moc"
    assert "can't allocate memory" in moc["failed"]
    assert [row["pass"] for row in fixed] == list(bench.PASSES)


def test_a_kernel_that_triton_cannot_run_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = pytest.importorskip("triton.runtime.errors", reason="needs the package triton")

    def refused(*_: Any) -> None:
        raise errors.OutOfResources(250_000, 232_448, "shared memory")

    monkeypatch.setattr(turns, "_attend", refused)
    (row,) = bench.measure(bench.Round(bench.film_of(2048), bench.CPU_ENTRIES[:1]), 1, CPU)
    assert row["failed"].startswith("OutOfResources: out of resource: shared memory, Required: 250000")


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), RuntimeError("a fault of ours"), KeyError("ours")])
def test_faults_that_are_not_of_the_machine_are_raised(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*_: Any) -> None:
        raise error

    monkeypatch.setattr(turns, "_attend", faulty)
    with pytest.raises(type(error), match="ours"):
        bench.measure(bench.Round(bench.film_of(2048), bench.CPU_ENTRIES[:1]), 1, CPU)


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
        command.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_kernel_that_cannot_run_says_why() -> None:
    row = bench.measure(bench.Round(bench.film_of(2048), (bench.Entry("moc", {}, "torch"),)), 1, CPU)[0]
    assert "needs a CUDA device" in row["failed"] or "tensors are on cpu" in row["failed"]


@pytest.mark.slow
def test_every_event_is_reported() -> None:
    rounds = [bench.Round(bench.film_of(2048), bench.CPU_ENTRIES[3:])]
    seen: list[str] = []
    bench.run(rounds, 1, CPU, seen.append)
    assert len(seen) == bench.events(rounds, 1, CPU)


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
        density = simulate(name, round_.film, heads=2, head_dim=16, dim=32, settings=settings).cost.density
        if name == "holocine":
            # The first of two frames of 128 tokens in all six shots, the other frame of the own shot, and 56 of text.
            assert density == (1536 * (6 * 128 + 128 + 56) + 56 * 1592) / 1592**2
        else:
            assert density < 0.6, name  # at defaults made for long films it would be dense


# -- noise ------------------------------------------------------------------------------------------------------------


def chance_to_hold(n: int, kept: int) -> float:
    """That x(kept + 1) … x(n - kept) holds the median, counted over all ways that n values lie about it."""
    held = sum(kept + 1 <= sum(bits) <= n - kept - 1 for bits in itertools.product((0, 1), repeat=n))
    return held / 2**n


@pytest.mark.parametrize(("count", "kept"), [(2, 0), (5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (15, 3)])
def test_intervals_are_exact_order_statistics(count: int, kept: int) -> None:
    values = [float(x) for x in range(count)]
    found = bench.median_interval(random.Random(0).sample(values, count))
    assert found is not None
    assert (found.low, found.high) == (values[kept], values[count - 1 - kept])
    assert found.confidence == pytest.approx(chance_to_hold(count, kept))
    assert (found.confidence >= intervals.CONFIDENCE) == (count >= 6)
    assert count < 6 or chance_to_hold(count, kept + 1) < intervals.CONFIDENCE  # no narrower one would do


def test_one_turn_has_no_interval() -> None:
    assert bench.median_interval([1.0]) is None


class Clock:
    """Stands for the clock of the turns: dense takes 4 s, moc 2 s, each times what a machine adds in that turn."""

    def __init__(self, disturbed: Callable[[int, str], float]) -> None:
        self.disturbed, self.turns = disturbed, 0

    def turn(self, timed: competitors.Timed, count: bool) -> str:
        name = "dense" if timed.route is None else "moc"
        if count:
            number = len(timed.seconds["forward"])
            self.turns = max(self.turns, number + 1)
            seconds = (4.0 if name == "dense" else 2.0) * self.disturbed(number, name)
            for which in timed.seconds:
                timed.seconds[which].append(seconds)
        timed.memory = {"forward": 1, "forward+backward": 1}
        return ""


FILM = zoo.Layout.film([zoo.Shot(2, 4, 4)] * 4)


def timed_by(clock: Clock, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[dict[str, Any]]:
    monkeypatch.setattr(competitors.Timed, "_turn", lambda timed, count: clock.turn(timed, count))
    monkeypatch.setattr(agreement, "_wrong", lambda *_: "")
    return bench.measure(
        bench.Round(FILM, (bench.Entry("moc", {"top_k": 1, "chunk": "shot", "causal": None}),), 1, 16),
        6,
        CPU,
        **options,
    )


def test_what_disturbs_both_alike_disturbs_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every turn ten times as slow as the one before: medians of turns say nothing, ratios are right."""
    clock = Clock(lambda turn, _: 10.0**turn)
    row = timed_by(clock, monkeypatch, most=30)[0]
    assert clock.turns == 6
    assert row["spread"] > 10
    assert row["interval"] == pytest.approx([2.0 / row["bound"]] * 2)
    assert row["ratio_over_bound"] == row["fastest_over_bound"] == pytest.approx(2.0 / row["bound"])
    assert not row["noisy"]
    assert bench.headline([row]) == ""
    assert not next(iter(bench.table([row]))).startswith("The machine")


def test_turns_are_added_until_the_interval_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the first turns are disturbed; eleven further ones outvote them."""
    clock = Clock(lambda turn, name: 1.15 if name == "moc" and turn in (2, 4) else 1.0)
    row = timed_by(clock, monkeypatch, most=30)[0]
    assert 6 < clock.turns < 30
    assert row["turns"] == clock.turns
    assert not row["noisy"]
    assert row["confidence"] >= intervals.CONFIDENCE


def test_repeats_that_would_not_help_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(lambda turn, name: 1.0 + 3.0 * (turn % 2) * (name == "moc"))
    rows = timed_by(clock, monkeypatch, most=8)
    assert clock.turns == 6
    assert all(row["noisy"] for row in rows)
    said = bench.headline(rows)
    assert said.startswith("The machine was too noisy for 2 of 2 rows")
    lines = list(bench.table(rows))
    assert lines[0] == said
    assert lines[2].split()[-2].endswith("!")


def test_no_turns_are_added_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(lambda turn, name: 1.15 if name == "moc" and turn in (2, 4) else 1.0)
    assert timed_by(clock, monkeypatch, most=30, seconds=0.0)[0]["noisy"]
    assert clock.turns == 6


def test_rows_measured_before_there_were_intervals_are_no_noise() -> None:
    assert bench.headline([{"method": "moc"}, {"method": "moga", "failed": "out of memory"}]) == ""


# -- the host's share -------------------------------------------------------------------------------------------------


def test_the_host_has_a_row_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured without a GPU, planning and launching, forward and with the backward."""
    pytest.importorskip("triton", reason="needs the package triton")
    monkeypatch.setattr(turns, "measure", lambda *_, **__: [])
    round_ = bench.Round(bench.film_of(2048), (bench.MOC, bench.Entry("window", {"tile": [2, 8, 8]})))
    rows = bench.run([round_], 1, CPU)["rows"]
    assert [(row["method"], row["pass"], row["kernel"]) for row in rows] == [
        ("moc", "host", "triton"),
        ("window", "host", "triton"),
    ]
    assert all(row[seconds] > 0 for row in rows for seconds in ("forward_seconds", "seconds", "first_seconds"))
    lines = list(bench.table(rows))
    assert [line.split()[:1] + line.split()[4:5] for line in lines[1:]] == [["moc", "host"], ["window", "host"]]


def test_where_the_host_cannot_be_measured_a_row_says_why() -> None:
    row = host.host_row(bench.Round(FILM, (bench.MOC,), 1, 16), bench.MOC)
    assert row["skipped"] == "head dim 16 is not 64 or 128"
    assert next(line for line in bench.table([row]) if line.startswith("moc")).endswith("head dim 16 is not 64 or 128")
