"""The table of docs/benchmark.md says what the results of the memory benchmark hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def row(group: dict[str, Any]) -> str:
    """A line of the table; FLOPs are those of attention in one training step."""

    def spread(key: str) -> str:
        mean, sd = group[key]
        return f"{mean:.3f} ± {sd:.3f}"

    cells = [f"`{group['name']}`", f"{100 * group['density'][0]:.1f} %", f"{group['attention_flops'][0] / 1e9:.2f}"]
    cells += [spread("identity_recall"), spread("whole_identity_recall"), f"{group['val_loss'][0]:.3f}"]
    return f"| {' | '.join(cells)} |"


def expected() -> list[str]:
    """Both sweeps in one table, best first."""
    files = [ROOT / "experiments" / "results" / f"{name}.json" for name in ("benchmark", "benchmark_baselines")]
    groups = [group for file in files for group in json.loads(file.read_text())["groups"]]
    return [row(group) for group in sorted(groups, key=lambda group: -group["identity_recall"][0])]


def test_the_table_is_that_of_the_results() -> None:
    page = (ROOT / "docs" / "benchmark.md").read_text()
    rows = expected()
    assert len(rows) == 14
    assert "\n".join(rows) in page
