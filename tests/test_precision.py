"""Training with default settings runs in a precision that the device's attention takes."""

from typing import Any

import pytest
import torch
from tiers import cases

import sparse_zoo as zoo
from lit_modules import VideoDiT
from lit_modules.precision import default_precision
from sparse_zoo import attention


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


@pytest.mark.parametrize("method", cases(zoo.names()))
def test_autocast_reaches_the_kernel(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm of q and k gives float32 under autocast, which fast kernels refuse."""
    seen: set[torch.dtype] = set()

    def watched(name: str) -> None:
        run = getattr(attention, name)

        def watch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **named: Any) -> Any:
            seen.update(x.dtype for x in (q, k, v))
            return run(q, k, v, *args, **named)

        monkeypatch.setattr(attention, name, watch)

    watched("attend")
    watched("attend_sum")
    film = zoo.Layout.film([zoo.Shot(2, 4, 4, text=2)] * 2, caption=1)
    settings = {"name": method, **zoo.get(method).small}
    model = VideoDiT(dim=16, depth=1, heads=2, channels=1, patch=(1, 1, 1), vocabulary=3, attention=settings)
    video, text = torch.randn(1, 64, 1), torch.zeros(1, 5, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        model(video, text, torch.rand(1, 2), film, step=0)
    assert seen == {torch.bfloat16}
