"""Rows of a run as JSON lines: appended by one process after the other, kept when the next one crashes. No torch.

A row has a "stage" and a "kind": "fact", "check", "time", "error", or "end", which the parent adds for every stage. A
check has a "name", a "status" ("passed", "failed" or "skipped") and a "reason"; a time a "name", and seconds or
"not_timed".
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Rows:
    """A file of rows, and what may be timed after them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, row: Row) -> None:
        """Append a row and hand it to the system at once, on a line of its own even where a killed process stopped."""
        line = json.dumps(row, default=str).encode() + b"\n"
        with self.path.open("ab+") as file:
            size = file.seek(0, 2)
            if size:
                file.seek(size - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)

    def read(self) -> list[Row]:
        """All rows; a line that a killed process left incomplete is skipped."""
        found = []
        for line in self.path.read_text(errors="replace", encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            found.append(row)
        return found

    def untimed(self, checks: Iterable[str]) -> str:
        """Why a timing that needs these checks may not be taken; empty where all of them passed in this run."""
        status: dict[str, str] = {}
        for row in self.read():
            if row["kind"] == "check" and status.get(row["name"]) != "failed":  # once failed, failed
                status[row["name"]] = row["status"]
        words = {None: "was not run", "skipped": "was skipped", "failed": "failed"}
        wrong = [f"{check} {words[status.get(check)]}" for check in checks if status.get(check) != "passed"]
        return f"not timed: {', '.join(wrong)}" if wrong else ""


def check(name: str, reason: str = "", **more: Any) -> Row:
    """A check that passed, or failed for a reason."""
    return {"kind": "check", "name": name, "status": "failed" if reason else "passed", "reason": reason, **more}


def skipped(name: str, reason: str) -> Row:
    """A check that could not be made here."""
    return {"kind": "check", "name": name, "status": "skipped", "reason": reason}


def fact(name: str, **more: Any) -> Row:
    """Return a row with a fact: neither a check nor a time, such as what the machine has or a speedup."""
    return {"kind": "fact", "name": name, **more}


def time(name: str, seconds: float, **more: Any) -> Row:
    """Return a row with a measured time, in seconds."""
    return {"kind": "time", "name": name, "seconds": seconds, **more}


def not_timed(name: str, reason: str) -> Row:
    """Return a row for a timing that was not taken, with the reason."""
    return {"kind": "time", "name": name, "not_timed": reason}
