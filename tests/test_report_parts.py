"""The parts of a report work alone: sentences from dataclasses, rows from results, JSON with the promised keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_up import write_full_sweep

from experiments.analysis.metrics import Measure
from experiments.analysis.seed_groups import Group
from experiments.analysis.significance import paired_differences
from experiments.reporting.comparison import Comparison, compare
from experiments.reporting.leaderboard import choose_columns, rank_groups
from experiments.reporting.loading import SweepResults
from experiments.reporting.report import build_report
from experiments.reporting.report_json import to_json
from experiments.reporting.sentences import word_caution, word_conclusion, word_task, word_verdict, write_sentences
from experiments.tracking.store import Result

RECALL = Measure.of("identity_recall")


def results(recalls: dict[str, tuple[float, ...]], chance: float | None = None) -> SweepResults:
    """A sweep that was never on disk."""
    groups = []
    for name, values in recalls.items():
        runs = [
            Result(
                f"{name}-s{seed}",
                {"name": "moc"},
                "finished",
                seed,
                metrics={RECALL.name: value},
                chance={} if chance is None else {RECALL.name: chance},
            )
            for seed, value in enumerate(values)
        ]
        groups.append(Group(name, tuple(runs)))
    return SweepResults("s", "", tuple(groups), RECALL)


def compared(sweep: SweepResults) -> Comparison:
    return compare(sweep, rank_groups(sweep))


def test_a_winner_needs_every_difference_to_be_significant() -> None:
    clear = results({"a": (0.90, 0.91, 0.92), "b": (0.10, 0.12, 0.11)})
    assert word_conclusion(clear, compared(clear)).startswith("Best identity recall: 0.910, by a;")
    close = results({"a": (0.90, 0.91, 0.92), "b": (0.89, 0.93, 0.90), "c": (0.10, 0.12, 0.11)})
    assert compared(close).winner is None
    assert "a and b differ by" in word_conclusion(close, compared(close))
    assert "is not significant" in word_conclusion(close, compared(close))


@pytest.mark.parametrize(
    ("recalls", "chance", "reason"),
    [
        ({"a": (0.0, 0.0), "b": (0.0, 0.0)}, None, "a and b differ by +0.000, which is not significant"),
        ({"a": (0.0,), "b": (0.0,)}, None, "no test is possible, because each method has one seed"),
        ({"a": (0.9,), "b": (0.1,)}, None, "no test is possible, because each method has one seed"),
        ({"a": (0.9, 0.8)}, None, "only one method has identity recall"),
        ({"a": (0.0040, 0.0042, 0.0041), "b": (0.0, 0.0001, 0.0001)}, 1 / 192, "a, does not beat chance (0.005)"),
    ],
)
def test_no_winner_is_named_and_the_reason_is(
    recalls: dict[str, tuple[float, ...]], chance: float | None, reason: str
) -> None:
    sweep = results(recalls, chance)
    comparison = compared(sweep)
    assert comparison.winner is None
    sentence = word_conclusion(sweep, comparison)
    assert sentence.startswith("No significant winner: ")
    assert reason in sentence


def test_the_verdict_counts_significant_pairs_and_the_caution_gives_the_smallest_p() -> None:
    sweep = results({"a": (0.90, 0.91, 0.92), "b": (0.89, 0.93, 0.90), "c": (0.10, 0.12, 0.11)})
    comparison = compared(sweep)
    pairs = paired_differences({group.name: group.values(RECALL.name) for group in sweep.groups})
    count = sum(pair.significant for pair in pairs)
    assert 0 < count < len(pairs)
    assert word_verdict("identity recall", comparison).startswith(f"{count} of 3 differences in identity recall are")
    assert word_caution(comparison).endswith("its smallest possible p is 0.25.")
    alone = compared(results({"a": (0.9,), "b": (0.1,)}))
    assert word_caution(alone) == "Set `seeds: 3` or more in the sweep file."


def test_sentences_without_results_are_empty_or_say_so() -> None:
    sweep = SweepResults("s", "", (), RECALL)
    board = rank_groups(sweep)
    sentences = write_sentences(sweep, board, choose_columns(sweep), compare(sweep, board))
    assert sentences.conclusion == sentences.deviation == sentences.shortened == sentences.task == ""
    assert sentences.verdict == "No two methods have two seeds in common, so no difference can be tested."


def test_the_task_says_which_shots_are_judged() -> None:
    sweep = results({"a": (0.5,)})
    assert "measured on the last shot" in word_task(sweep, choose_columns(sweep))
    sweep.groups[0].results[0].config["data"] = {"name": "shot_world", "judged": "returns"}
    assert "measured on all returns of a film" in word_task(sweep, choose_columns(sweep))


def test_json_keeps_its_keys_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    plain: dict[str, Any] = to_json(build_report(write_full_sweep()))
    assert [*plain] == [
        "name", "cells", "groups", "headline", "command", "verdict", "caution", "drift", "differences", "films",
        "effects", "winner", "conclusion", "shortened", "version", "costs", "timing", "power", "tuning",
    ]  # fmt: skip
    assert [*plain["groups"][0]] == ["name", "cells", "control", "letters", "figures"]
    assert [*plain["groups"][0]["figures"]["identity_recall"]] == ["mean", "sd", "n", "low", "high"]
    assert [*plain["differences"][0]] == ["a", "b", "n", "mean", "low", "high", "p", "p_exact", "p_holm", "holds"]
    assert [*plain["films"][0]] == ["a", "b", "seeds", "films", "better", "worse", "p", "p_holm", "holds"]
    assert [*plain["effects"][0]] == ["keys", "levels", "crossed", "combinations"]
    assert [*plain["effects"][0]["levels"][0]] == ["value", "figure", "cells", "values"]
    controls = {group["name"]: group["control"] for group in plain["groups"]}
    assert controls["random_shot"] == "random null"
    assert controls["dense"] == "dense ceiling"
