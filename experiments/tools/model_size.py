"""What a pretrained model takes: memory of its parts, and what a method's attention costs at a size, without weights.

    python -m experiments.tools.model_size FOLDER [FRAMESxROWSxCOLUMNS …] [--method METHOD[:key=value,…]]

FOLDER is a pipeline of diffusers or its transformer; config.json of each part is enough. Sizes are of latents: Wan's
VAE makes 21x60x104 of 81 frames of 480 × 832. Everything is counted on the meta device from the configs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import sparse_zoo as zoo
from experiments.config.names import parse_method
from experiments.tools.tiny_models import installed
from lit_modules.pretrained import _transformer_class
from sparse_zoo.errors import ZooError, refuse

GB = 1e9


def count(folder: Path, sizes: Sequence[tuple[int, int, int]], method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Parameters and bytes of a model's parts, and the cost of a layer's attention at each size of latents.

    Args:
        folder: A pipeline of diffusers, or its transformer; weights are not read.
        sizes: Frames, rows and columns of latents.
        method: The method's name.
        settings: Its settings.

    Returns:
        {"parts": [{"part", "parameters", "bytes"}], "layers": number of self-attentions, "sizes": [{"latent",
        "tokens", "bytes": of q, k, v and output of one layer, "density", "flops": of one layer}]}; bytes in bfloat16.
    """
    kind, inner = _transformer_class(folder)
    with installed("accelerate").init_empty_weights():
        model = kind.from_config(kind.load_config(inner))
    parameters = sum(p.numel() for p in model.parameters())
    parts = [("transformer", parameters, 2), ("transformer, weights, gradients, AdamW in float32", parameters, 16)]
    parts.append(("a frozen copy in float32, teacher of full fine-tuning", parameters, 4))
    encoder = _encoder(folder / "text_encoder")
    parts += [("text encoder", encoder, 2)] if encoder else []
    bridge = zoo.attach(model, method, **settings)
    found = []
    for size in sizes:
        cost = bridge.simulate(size)[0].cost
        _, heads, head_dim, _ = len(bridge.sites), *bridge.family.shape(bridge.sites[0].module)
        patch = bridge.family.patch(model)
        tokens = (size[0] // patch[0]) * (size[1] // patch[1]) * (size[2] // patch[2])
        held = {"bytes": 4 * tokens * heads * head_dim * 2, "density": cost.density, "flops": cost.flops}
        found.append({"latent": list(size), "tokens": tokens, **held})
    rows = [{"part": name, "parameters": number, "bytes": each * number} for name, number, each in parts]
    return {"parts": rows, "layers": len(bridge.sites), "sizes": found}


def _encoder(folder: Path) -> int:
    """Parameters of a text encoder; 0 where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return 0
    transformers = installed("transformers")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    name = json.loads(path.read_text(encoding="utf-8"))["architectures"][0]
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    return sum(p.numel() for p in model.parameters())


def main(arguments: Sequence[str]) -> None:
    """Print the memory of a model's parts, and the memory and FLOPs of a method at each size."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tools.model_size", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("sizes", nargs="*", default=["21x60x104"])
    parser.add_argument("--method", default="dense")
    given = parser.parse_args(arguments)
    sizes = [tuple(int(x) for x in text.split("x") if x.isdigit()) for text in given.sizes]
    wrong = [text for text, size in zip(given.sizes, sizes, strict=True) if len(size) != 3 or not all(size)]
    refuse("model_size", [f"a size must be frames x rows x columns of latents: 21x60x104; got {x!r}" for x in wrong])
    found = count(given.folder, [(f, h, w) for f, h, w in sizes], *parse_method(given.method))
    for row in found["parts"]:
        print(f"{row['part']}: {row['parameters'] / 1e9:.2f} billion parameters, {row['bytes'] / GB:.1f} GB")
    for row in found["sizes"]:
        latent = " × ".join(map(str, row["latent"]))
        print(
            f"{latent} latents, {row['tokens']:,} tokens: q, k, v and output of a layer {row['bytes'] / GB:.1f} GB; "
            f"{given.method}: density {100 * row['density']:.2f} %, {row['flops'] / 1e15:.4f} PFLOP a layer"
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ZooError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
