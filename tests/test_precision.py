"""Training with default settings runs in a precision that the device's attention takes."""

import pytest
import torch

from lit_modules.precision import default_precision


@pytest.mark.parametrize(
    ("gpu", "bfloat16", "accelerator", "want"),
    [
        (False, False, "auto", "32-true"),
        (True, True, "auto", "bf16-mixed"),
        (True, True, "gpu", "bf16-mixed"),
        (True, False, "auto", "16-mixed"),
        (True, True, "cpu", "32-true"),
    ],
)
def test_default_precision_follows_the_device(
    gpu: bool, bfloat16: bool, accelerator: str, want: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bfloat16)
    assert default_precision(accelerator) == want
