"""The rows of a run as one page: what failed, then the checks, the timings and the stages. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from experiments.tools.gpu.rows import Row

WORDS = {"passed": "passed", "failed": "**failed**", "skipped": "skipped"}


def summary(rows: Sequence[Row], seconds: float) -> str:
    """Markdown."""
    return "\n".join(_lines(rows, seconds))


def _lines(rows: Sequence[Row], seconds: float) -> Iterator[str]:
    machine = next((row for row in rows if row["kind"] == "fact" and row["name"] == "machine"), {})
    yield f"# {machine.get('device') or 'no GPU'}, {seconds:.0f} s"
    versions = machine.get("versions", {})
    yield ""
    yield ", ".join(f"{name} {version}" for name, version in versions.items())
    yield ""
    yield from _table("time | ms | detail", [_timed(row) for row in rows if row["kind"] == "time"])
    facts = [row for row in rows if row["kind"] == "fact" and row["name"] != "machine"]
    yield from _table("fact | | value", [f"{row['name']} | | {_detail(row)}" for row in facts])
    checks = [row for row in rows if row["kind"] == "check"]
    passed = sum(row["status"] == "passed" for row in checks)
    yield f"Checks: {passed} of {len(checks)} passed."
    yield ""
    lines = [f"{row['name']} | {_status(row)}" for row in checks if row["status"] != "passed"]
    yield from _table("check | status", lines)
    ends = [row for row in rows if row["kind"] == "end"]
    lines = [f"{row['name']} | {row['seconds']:.0f} | {row.get('compiled', 0)} | {_status(row)}" for row in ends]
    yield from _table("stage | s | kernels compiled | status", lines)
    bad = [row["name"] for row in ends if row["status"] == "failed"]
    left = [row["name"] for row in ends if row["status"] == "skipped"]
    yield f"Failed stages: {', '.join(bad) or 'none'}. Skipped stages: {', '.join(left) or 'none'}."


def _status(row: Row) -> str:
    return WORDS[row["status"]] + (f": {_cell(row['reason'])}" if row["reason"] else "")


def _timed(row: Row) -> str:
    if "not_timed" in row:
        return f"{row['name']} | – | {_cell(row['not_timed'])}"
    return f"{row['name']} | {row['seconds'] * 1e3:.3g} | {_detail(row)}"


def _detail(row: Row) -> str:
    kept = {key: value for key, value in row.items() if key not in ("stage", "kind", "name", "seconds")}
    return _cell(", ".join(f"{key} {_number(value)}" for key, value in kept.items()))


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        return "–".join(map(_number, value))
    return str(value)


def _cell(text: str, most: int = 240) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= most else text[: most - 1] + "…"


def _table(head: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield f"| {head} |"
        yield "|" + "---|" * (head.count("|") + 1)
        yield from (f"| {line} |" for line in lines)
        yield ""
