"""What `zoo bench` measured, as a table for a page and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.escape import visible

Row = Mapping[str, Any]
PASS = "forward+backward"


def measured(found: Mapping[str, Any]) -> list[Row]:
    """The rows that have times."""
    return [row for row in found["rows"] if "failed" not in row and "skipped" not in row]


def markdown(found: Mapping[str, Any]) -> str:
    """A table of forward + backward, methods down and lengths across: speedup, bound, and their ratio."""
    rows = [row for row in measured(found) if row["pass"] == PASS]
    lengths = sorted({row["tokens"] for row in rows})
    cells = {(row["method"], row["tokens"]): row for row in rows}
    lines = ["| method | " + " | ".join(f"{length:,} tokens" for length in lengths) + " |"]
    lines.append("|---" * (len(lengths) + 1) + "|")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [cells.get((method, length)) for length in lengths]
        lines.append(f"| `{method}` | " + " | ".join(map(_cell, own)) + " |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"{row['attained']:.2f}x of {row['bound']:.2f}x: **{row['attained_over_bound']:.2f}**"


def plot(found: Mapping[str, Any], path: Path) -> Path:
    """Seconds of forward + backward against length, one line a method and kernel, dense in grey, as PNG."""
    from matplotlib.figure import Figure

    rows = [row for row in measured(found) if row["pass"] == PASS]
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, own in _lines(rows).items():
        axes.plot([row["tokens"] for row in own], [row["seconds"] for row in own], marker="o", label=name)
    dense = {row["tokens"]: row["dense_seconds"] for row in rows}
    lengths = sorted(dense)
    axes.plot(lengths, [dense[x] for x in lengths], color="0.45", marker="s", label="dense (fastest)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    shots = {row["tokens"]: row["shots"] for row in rows}
    labels = [_length(x) + (f"\n{shots[x]} shots" if len(set(shots.values())) > 1 else "") for x in lengths]
    axes.set_xticks(lengths, labels)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("tokens")
    axes.set_ylabel("seconds, forward + backward, routing included")
    axes.set_title(
        visible(f"{found['device']}, {rows[0]['heads']} heads of {rows[0]['head_dim']}, {rows[0]['dtype']}"),
        fontsize=9,
        parse_math=False,
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    kernels = {row["kernel"] for row in rows}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        name = row["method"] + (f", {row['kernel']}" if len(kernels) > 1 else "")
        lines.setdefault(name, []).append(row)
    return lines


def _length(tokens: int) -> str:
    return f"{tokens / 1024:.4g}k" if tokens >= 1024 else str(tokens)
