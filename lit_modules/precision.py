"""The precision of training where none is asked for."""

from __future__ import annotations

import torch


def default_precision(accelerator: str = "auto") -> str:
    """Lightning's name of it: bf16-mixed on a GPU that has bfloat16, 16-mixed on an older one, 32-true elsewhere.

    Flash attention takes half precision alone; float32 has to be asked for there. `accelerator` is the Trainer's.
    """
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
