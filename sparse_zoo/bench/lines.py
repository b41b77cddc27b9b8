"""Rows of a benchmark as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sparse_zoo.bench.host import PASS
from sparse_zoo.bench.intervals import NARROW
from sparse_zoo.bench.turns import Row


def headline(rows: Sequence[Row]) -> str:
    """The warning above the table if the machine was too noisy; empty if it was quiet.

    Rows without the key were measured before intervals existed.
    """
    timed = [row for row in rows if "noisy" in row]
    noisy = [row for row in timed if row["noisy"]]
    if not noisy:
        return ""
    return (
        f"The machine was too noisy for {len(noisy)} of {len(timed)} rows: the interval of attained ÷ bound is wider "
        f"than {NARROW:g}. Measure again on a quiet machine, or with more turns (--max-repeats)."
    )


def host(row: Row) -> str:
    """Milliseconds of the host for forward + backward on a GPU, or why they are not known."""
    return f"{row['seconds'] * 1e3:9.1f}" if "seconds" in row else f"not measured: {row['skipped']}"


def interval(row: Row) -> str:
    """The interval of attained ÷ bound, turn by turn, "!" where it is too wide."""
    ends = row.get("interval")
    if not ends:
        return "–"
    return f"{ends[0]:.2f}–{ends[1]:.2f}{'!' * row['noisy']}"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines for a terminal; the first one is the warning, if the machine was too noisy."""
    if headline(rows):
        yield headline(rows)
    yield (
        f"{'method':10} {'kernel':9} {'tokens':>7} {'dtype':8} {'pass':16} {'ms':>9} {'dense ms':>9} {'bound':>6} "
        f"{'attained':>8} {'÷ bound':>7} {'routing':>7} {'memory':>6} {'spread':>6} {'interval':>11} {'fastest':>7}"
    )
    for row in rows:
        name = f"{row['method']:10} {row['kernel']:9} {row['tokens']:7} {row['dtype']:8}"
        if "failed" in row:
            yield f"{name} {row['failed']}"
            continue
        if row["pass"] == PASS:
            yield f"{name} {PASS:16} {host(row)}"
            continue
        yield (
            f"{name} {row['pass']:16} {row['seconds'] * 1e3:9.1f} {row['dense_seconds'] * 1e3:9.1f} "
            f"{row['bound']:6.2f} {row['attained']:8.2f} {row['attained_over_bound']:7.2f} "
            f"{row['routing_share']:7.1%} {row['peak_memory_ratio']:6.2f} {row['spread']:6.1%} "
            f"{interval(row):>11} {row['fastest_over_bound']:7.2f}"
        )
