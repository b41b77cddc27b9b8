"""The methods and kernels pass the suite that ships; and the harness tells the truth about those that do not."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_zoo as zoo
from sparse_zoo import testing
from sparse_zoo.kernels import _kernels, get
from sparse_zoo.methods.dense import Dense
from sparse_zoo.testing import kernels as kernel_suite
from sparse_zoo.testing.mutants.kernels import LocalLseBackward, Plain
from sparse_zoo.testing.mutants.methods import OneStreamOneFilm, ScalesInPlace
from sparse_zoo.testing.mutants.segments import Weighing

OWN = [name for name in zoo.names() if zoo.get(name).__module__.startswith("sparse_zoo.methods.")]


class Knobless(zoo.Attention):
    """The own shot, with a setting that buys nothing and nothing declared."""

    def __init__(self, *, colour: str = "red", **base: Any) -> None:
        super().__init__(**base)
        self.colour = colour

    def plan(self, q: torch.Tensor, k: torch.Tensor, layout: zoo.Layout) -> zoo.Plan:  # noqa: ARG002
        return zoo.Plan.within(layout.partition("shot"))


@pytest.mark.slow
@pytest.mark.parametrize("method", OWN)
def test_methods_conform(method: str) -> None:
    """Every check passes; skipped is what a method says in a sentence that it cannot be held to."""
    outcomes = testing.check_method(method)
    assert [outcome.check for outcome in outcomes] == list(testing.checks())
    limits = zoo.get(method).limits
    skipped = {outcome.check: outcome.reason for outcome in outcomes if outcome.status == "skipped"}
    assert skipped == ({"limit_is_dense": f"limits: {limits}"} if isinstance(limits, str) else {})


def test_skipped_checks_give_their_reason() -> None:
    skipped = {x.check: x.reason for x in testing.check_method(Knobless) if x.status == "skipped"}
    assert skipped == {
        "routing_is_the_papers": "no rule is given for Knobless: see sparse_zoo.testing.slow_routing",
        "prefix_invariance": "strict: none declared",
        "causality_holds": "causality: None, though nothing of a later shot was seen",
        "anchors_attended": "anchors: none declared",
        "limit_is_dense": "limits: none declared",
        "knob_buys_density": "knob: None",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("moc", {"causal": "strict", "anchors": ["text", "shot", "chunk"], "chunk": "shot"}),
        ("moc", {"causal": None, "anchors": ["chunk"], "chunk": "tokens", "chunk_tokens": 33, "drop_off": 1.0}),
        ("moc", {"anchors": [], "causal": "routing"}),
        ("moc_fixed", {"causal": "strict", "anchors": ["shot", "chunk"], "top_k": 1}),
        ("moga", {"mix": ["group", "frame"], "balance": "switch", "windows": [3, 1]}),
        ("window", {"edge": "cut", "stop_at_shots": False, "tile": [2, 2, 2], "window": [1, 3, 1]}),
        ("window", {"text_reads": "text"}),
    ],
    ids=str,
)
def test_other_settings_conform(method: str, settings: dict[str, Any]) -> None:
    slow = {"compiles", "knob_buys_density"}
    testing.check_method(method, only=set(testing.checks()) - slow, **settings)


@pytest.mark.parametrize("method", OWN)
def test_methods_pass_the_quick_checks(method: str) -> None:
    """The quick part of the suite, for each method: the rest is among the slow tests."""
    only = ["plans_in_range", "films_packed", "text_reads_text", "named_kernel_refuses"]
    testing.check_method(method, only=only)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [name for name, reasons in zoo.kernels().items() if not reasons])
def test_kernels_conform(kernel: str) -> None:
    for outcome in testing.check_kernel(kernel):
        assert outcome.status == "passed", outcome


class Narrow(Weighing):
    """Takes one dtype, as kernels on GPUs do."""

    name = "narrow"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def why_not(self, q: torch.Tensor | None = None, v: torch.Tensor | None = None) -> list[str]:
        wrong = q is not None and q.dtype != self.dtype
        return super().why_not(q, v) + ([f"takes {self.dtype} alone"] if wrong else [])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_kernels_of_one_dtype_are_judged_by_the_error_of_plain_softmax(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses = {outcome.check: outcome.status for outcome in testing.check_kernel(Narrow(dtype))}
    half = dtype != torch.float32
    assert {check for check, status in statuses.items() if status != "passed"} == (
        set() if half else {"kernel_half_precision"}
    )
    monkeypatch.setitem(_kernels, "narrow", Narrow(dtype))
    for method in ("dense", "moc", "moga", "window"):
        testing.check_method(method, only=["output_equals_oracle", "gradients_equal_oracle", "pairs_counted"])


class Wide(Plain):
    """Takes one head dim, as kernels made of tiles do; counts what it was given."""

    name = "wide"

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def why_not(self, q: torch.Tensor | None = None, v: torch.Tensor | None = None) -> list[str]:
        return super().why_not(q, v) + (["takes head dim 64 alone"] if q is not None and q.shape[-1] != 64 else [])

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: zoo.Plan, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.add(q.shape[-1])
        return super().run(q, k, v, plan, scale)


@pytest.mark.slow
def test_kernels_of_one_head_dim_are_judged_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = ["kernel_extreme_scores", "kernel_many_rectangles", "kernel_shared_keys", "kernel_tells_why_not"]
    testing.check_kernel(wide := Wide(), only=quick)
    assert wide.seen == {64}
    monkeypatch.setitem(_kernels, "wide", wide := Wide())
    testing.check_method("moga", only=["output_equals_oracle", "gradients_equal_oracle", "pairs_counted"])
    assert wide.seen == {64}


class Coarse(zoo.Attention):
    """Own shot; half of what the shot's mean key reads of all shots' means; a tenth of the own value."""

    limits = "other shots are read through their means"

    def branches(self, call: zoo.Call) -> list[zoo.Branch | zoo.Term]:
        shots, share = call.layout.chunks("shot", captions="inside"), call.q.shape[1] // call.k.shape[1]
        fine, rows, v = zoo.Plan.within(shots), shots.piece_of[0, 0], call.v.repeat_interleave(share, dim=1)
        if call.q_rows is not None:
            fine, rows, v = fine.narrow(call.q_rows), rows[call.q_rows], v[:, :, call.q_rows]
        means, of_k, of_v = zoo.Partition.singles(shots.count), shots.mean(call.k), shots.mean(call.v)
        coarse = zoo.Plan.blocks(means, means, shots.sample[:, None] == shots.sample)
        read = of_k.repeat_interleave(share, dim=1)
        return [
            zoo.Branch(fine),
            zoo.Branch(coarse, weight=0.5, q=read, k=of_k, v=of_v, rows=rows),
            zoo.Term(0.1 * v, flops=v.numel()),
        ]


@pytest.mark.slow
def test_coarse_branches_and_terms_can_be_judged() -> None:
    outcomes = {outcome.check: outcome for outcome in testing.check_method(Coarse)}
    assert outcomes["influence_equals_mask"].status == outcomes["gradients_equal_oracle"].status == "passed"
    assert outcomes["text_reads_text"].status == "passed"


# -- the harness ------------------------------------------------------------------------------------------------------


class TwiceBroken(OneStreamOneFilm, ScalesInPlace):
    """Films are mixed, and q is written to."""


def test_one_error_lists_all_failures() -> None:
    only = ["films_packed", "inputs_untouched", "leaves_no_state"]
    with pytest.raises(testing.ConformanceError) as error:
        testing.check_method(TwiceBroken, only=only)
    message = str(error.value)
    assert message.startswith("TwiceBroken fails 2 of 3 checks:\n  - films_packed: expected")
    assert "\n  - inputs_untouched: expected q untouched; came written to; to change: the operation in place" in message
    assert [outcome.status for outcome in error.value.outcomes] == ["failed", "failed", "passed"]


def test_known_failures_need_a_reason_and_must_fail() -> None:
    outcomes = testing.check_method(
        OneStreamOneFilm, only=["films_packed"], known_failures={"films_packed": "one film a stream"}
    )
    assert [outcome.status for outcome in outcomes] == ["known"]
    assert outcomes[0].reason.startswith("one film a stream (expected ")
    with pytest.raises(testing.ConformanceError, match="came passed; to change: take it out of known_failures"):
        testing.check_method("dense", only=["films_packed"], known_failures={"films_packed": "one film a stream"})
    with pytest.raises(testing.ConformanceError, match="came skipped; to change"):
        testing.check_method(Knobless, only=["knob_buys_density"], known_failures={"knob_buys_density": "none"})


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(zoo.ZooError) as error:
        testing.check_method("dense", only=["film_packed"], known_failures={"leave_no_state": "x"})
    assert "did you mean 'films_packed'" in str(error.value)
    assert "did you mean 'leaves_no_state'" in str(error.value)
    with pytest.raises(zoo.ZooError, match="unknown method 'dens'; did you mean 'dense'"):
        testing.check_method("dens")
    with pytest.raises(zoo.ZooError, match="unknown setting 'topk'; did you mean 'top_k'"):
        testing.check_method("moc", topk=3)
    with pytest.raises(zoo.ZooError, match="a method is a name or a subclass"):
        testing.check_method(int)  # type: ignore[arg-type]
    with pytest.raises(zoo.ZooError, match="unknown kernel 'cpuu'; did you mean 'cpu'"):
        testing.check_kernel("cpuu")


def test_outcomes_are_json_values_and_are_yielded_one_by_one() -> None:
    run = testing.run_checks("dense", only=["films_packed", "knob_buys_density"])
    first = next(run)
    assert json.loads(json.dumps(asdict(first))) == {
        "method": "dense",
        "check": "films_packed",
        "status": "passed",
        "reason": "",
        "seconds": first.seconds,
    }
    assert [outcome.status for outcome in run] == ["passed"]


def test_unregistered_class_is_named_and_its_small_settings_can_be_changed() -> None:
    (outcome,) = testing.check_method(Dense, only=["builds"])
    assert outcome.method == "dense"
    (outcome,) = testing.check_method(TwiceBroken, only=["builds"])
    assert outcome.method == "TwiceBroken"
    with pytest.raises(testing.ConformanceError, match="top_k must be a whole number of at least 1, got 0"):
        testing.check_method("moc", top_k=0)


def test_method_that_cannot_be_built_gives_one_outcome() -> None:
    class Broken(Dense):
        def __init__(self, **settings: Any) -> None:  # noqa: ARG002
            raise RuntimeError("no such luck")

    outcomes = list(testing.run_checks(Broken))
    assert [(outcome.check, outcome.status) for outcome in outcomes] == [("builds", "failed")]
    assert "came RuntimeError: no such luck at " in outcomes[0].reason
    assert "test_conformance.py:" in outcomes[0].reason


@pytest.mark.slow
def test_checks_leave_the_global_generator_alone() -> None:
    torch.manual_seed(4)
    want = torch.rand(3)
    torch.manual_seed(4)
    testing.check_method("moga", only=["builds", "deterministic", "knob_buys_density"])
    assert torch.equal(torch.rand(3), want)


PLUGIN = '''
import sparse_zoo as zoo
from sparse_zoo import testing


@zoo.register("own_and_previous")
class OwnAndPreviousShots(zoo.Attention):
    """Every token attends to its own shot and to the `reach` shots before it.

    Args:
        reach: How many shots back.
    """

    limits = "it never looks ahead"
    causality = "routing"
    strict = {{"reach": 2}}
    anchors = ("shot",)
    knob = zoo.Knob("reach", 0, 8)

    def __init__(self, *, reach: int = 1, **base):
        super().__init__(**base)
        self.reach = reach
        self.causality = "strict"

    def plan(self, q, k, layout):
        s = layout.chunks("shot", captions="inside")
        gap = s.shot[:, None] - s.shot
        return zoo.Plan.blocks(s, s, (s.sample[:, None] == s.sample) & (gap >= 0) & (gap <= self.reach))


@testing.slow_routing(OwnAndPreviousShots)
def rule(attention, call):
    shot, sample = call.layout.shot, call.layout.sample
    gap = shot[:, None] - shot
    return [((sample[:, None] == sample) & (gap >= 0) & (gap <= attention.reach{wrong}), 1.0)]
'''


@pytest.mark.slow
def test_a_plugin_in_a_file_is_found_and_judged(tmp_path: Path) -> None:
    right, wrong = tmp_path / "right_rule.py", tmp_path / "wrong_rule.py"
    right.write_text(PLUGIN.format(wrong=""))
    wrong.write_text(PLUGIN.format(wrong=" + 1").replace("own_and_previous", "another"))
    zoo.load_plugin(right)
    zoo.load_plugin(wrong)
    only = ["routing_is_the_papers", "prefix_invariance", "limit_is_dense"]
    outcomes = {outcome.check: outcome for outcome in testing.check_method("own_and_previous", only=only)}
    assert outcomes["routing_is_the_papers"].status == outcomes["prefix_invariance"].status == "passed"
    assert outcomes["limit_is_dense"].reason == "limits: it never looks ahead"
    with pytest.raises(testing.ConformanceError, match="another fails 1 of 1 checks:\n  - routing_is_the_papers"):
        testing.check_method("another", only=["routing_is_the_papers"])
    ids = {item.id for item in testing.parametrize_methods().mark.args[1]}
    assert {"own_and_previous-films_packed", "moc-films_packed"} <= ids
    assert len(ids) == len(testing.checks()) * len(zoo.names())


def test_method_without_a_slow_rule_is_skipped_with_advice() -> None:
    class Bare(zoo.Attention):
        """Own shot."""

        def plan(self, q: torch.Tensor, k: torch.Tensor, layout: zoo.Layout) -> zoo.Plan:  # noqa: ARG002
            return zoo.Plan.within(layout.chunks("shot", captions="inside"))

    (outcome,) = testing.check_method(Bare, only=["routing_is_the_papers"])
    assert outcome.reason == "no rule is given for Bare: see sparse_zoo.testing.slow_routing"
    reasons = [o.reason for o in testing.check_method(Bare, only=["limit_is_dense", "anchors_attended"])]
    assert reasons == ["anchors: none declared", "limits: none declared"]


def item(method: Any, name: str, **known: Any) -> Any:
    items = testing.parametrize_methods(method, **known).mark.args[1]
    (found,) = [item.values[0] for item in items if item.id.endswith(f"-{name}")]
    return found


def test_pytest_items_pass_fail_skip_and_expect_failure() -> None:
    item("dense", "films_packed")()
    with pytest.raises(testing.ConformanceError, match="q untouched"):
        item(ScalesInPlace, "inputs_untouched")()
    with pytest.raises(pytest.skip.Exception, match="knob: None"):
        item(Knobless, "knob_buys_density")()
    known = {"ScalesInPlace": {"inputs_untouched": "to save memory"}}
    with pytest.raises(pytest.xfail.Exception, match="to save memory"):
        item(ScalesInPlace, "inputs_untouched", known_failures=known)()
    with pytest.raises(testing.ConformanceError, match="take it out of known_failures"):
        item("dense", "films_packed", known_failures={"dense": {"films_packed": "never"}})()
    with pytest.raises(zoo.ZooError, match="did you mean 'dense'"):
        testing.parametrize_methods("dense", known_failures={"dens": {"films_packed": "never"}})
    with pytest.raises(zoo.ZooError, match="did you mean 'films_packed'"):
        testing.parametrize_methods("dense", known_failures={"dense": {"film_packed": "never"}})


# -- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_broken_kernel_gets_one_error() -> None:
    with pytest.raises(testing.ConformanceError) as error:
        testing.check_kernel(
            LocalLseBackward(),
            only=["kernel_outputs", "kernel_gradients", "kernel_overlapping_keys", "kernel_drawn_plans"],
        )
    failed = {outcome.check for outcome in error.value.outcomes if outcome.status == "failed"}
    assert {"kernel_gradients", "kernel_overlapping_keys", "kernel_drawn_plans"} <= failed
    assert "kernel_outputs" not in failed
    assert "final out and lse of the whole union" in str(error.value)


def test_a_kernel_that_cannot_run_here_is_refused_with_its_reasons() -> None:
    class Nowhere(Plain):
        name = "nowhere"

        def why_not(self, q: torch.Tensor | None = None, v: torch.Tensor | None = None) -> list[str]:  # noqa: ARG002
            return ["it needs a device that nobody has", "it is Sunday"]

    with pytest.raises(zoo.ZooError, match="cannot be checked here") as error:
        testing.check_kernel(Nowhere())
    assert "nobody has" in str(error.value)
    assert "Sunday" in str(error.value)


def test_kernel_without_half_precision_is_skipped_with_its_reason() -> None:
    class Wide(Plain):
        name = "wide"

        def why_not(self, q: torch.Tensor | None = None, v: torch.Tensor | None = None) -> list[str]:
            half = q is not None and q.dtype in (torch.float16, torch.bfloat16)
            return super().why_not(q, v) + (["half precision is not its thing"] if half else [])

    (outcome,) = testing.check_kernel(Wide(), only=["kernel_half_precision"])
    assert (outcome.status, outcome.reason) == ("skipped", "half precision is not its thing")


def test_random_plans_are_skipped_when_hypothesis_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_suite, "find_spec", lambda _: None)
    (outcome,) = testing.check_kernel("cpu", only=["kernel_drawn_plans"])
    assert (outcome.status, outcome.reason[:27]) == ("skipped", "hypothesis is not installed")


def test_seeded_plans_cover_every_kind_of_part() -> None:
    recipes = list(kernel_suite.recipes())
    plans = [recipe.plan("cpu") for recipe in recipes]
    masks = [plan.dense_mask() for plan in plans]
    assert {kind for recipe in recipes for kind in recipe.kinds} == set(kernel_suite.KINDS)
    assert any(len(plan.parts) == 3 for plan in plans)
    assert any(not bool(mask.any(-1).all()) for mask in masks)
    assert any(bool((part.keys.sizes == 0).any()) for plan in plans for part in plan.parts)
    assert any(plan.batch_heads == (2, 4) for plan in plans)
    assert get("cpu").executed(zoo.Plan.groups(torch.arange(65_600)), 1, 1) <= kernel_suite.AFFORDABLE
