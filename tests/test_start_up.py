"""What the zoo command imports before it answers. Modules are counted, because times depend on the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_zoo as zoo

AFTER = """
import json, sys
from typer.testing import CliRunner
from experiments.cli import app
done = CliRunner().invoke(app, sys.argv[1:])
assert done.exit_code == 0, done.output
print(json.dumps([*sys.modules]))
"""
HEAVY = {"lightning", "torchmetrics", "mlflow", "scipy", "matplotlib", "pandas", "diffusers", "transformers", "triton"}
HEAVY |= {"torch._dynamo", "torch._inductor", "flash_attn", "xformers", "omegaconf", "av", "scenedetect"}


@pytest.mark.parametrize(
    ("arguments", "late"),
    [
        (["--help"], {"torch", "numpy", "pydantic", *HEAVY}),
        (["train", "--help"], {"torch", "numpy", *HEAVY}),
        (["settings"], {"torch", "numpy", *HEAVY}),
        (["list"], HEAVY),
    ],
)
def test_commands_import_only_what_they_need(arguments: list[str], late: set[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AFTER, *arguments], capture_output=True, encoding="utf-8", check=False,
        env=os.environ | {"PYTHONPATH": str(Path(zoo.__file__).parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(late & {*json.loads(done.stdout)}) == []
