"""The default precision of training."""

from __future__ import annotations

import torch


def default_precision(accelerator: str = "auto") -> str:
    """Lightning's name for the default: bf16-mixed on a GPU with bfloat16, 16-mixed on an older one, 32-true elsewhere.

    Flash attention supports half precision alone, so float32 must be asked for there. `accelerator` is the Trainer's.
    """
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
