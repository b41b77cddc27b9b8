"""What code, packages and machine a result comes from."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sparse_zoo import __version__


def provenance() -> dict[str, Any]:
    """Where and on what this process computes."""
    commit, changed = _code()
    return {
        "commit": commit or "not in a git checkout",
        "changed since": changed,
        "sparse-zoo": __version__,
        **{package: version(package) for package in ("torch", "lightning", "torchmetrics", "mlflow")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def _code() -> tuple[str, bool | None]:
    """The commit of the code, and whether files changed since: once, as this process has imported them."""
    folder = Path(__file__).parent
    commit = _git(folder, "rev-parse", "HEAD")
    return commit, bool(_git(folder, "status", "--porcelain", "--untracked-files=no")) if commit else None


def _git(folder: Path, *arguments: str) -> str:
    try:
        found = subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, encoding="utf-8", errors="replace", check=False
        )
    except FileNotFoundError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor()} × {os.cpu_count()}"
