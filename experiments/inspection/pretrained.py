"""Pretrained pipelines on disk: sampled with any method as attention, captured, and compared with dense attention."""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import reduce
from operator import add
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import sparse_zoo as zoo
from experiments.analysis.formatting import settings
from experiments.config.budget import Budget
from experiments.inspection.capture import Captured
from experiments.sweep.budget import solve_knob
from sparse_zoo.errors import ZooError, refuse
from sparse_zoo.simulate import simulate

Note = Callable[[str], object]
FPS = 16


@dataclass(frozen=True)
class Request:
    """What a pipeline is asked for, sizes in pixels; `shots` are latent frames of each shot (None: one)."""

    frames: int = 81
    height: int = 480
    width: int = 832
    steps: int = 50
    guidance: float = 5.0
    seed: int = 0
    shots: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Compared:
    """One method. `videos` are files by prompt, beside the page; psnr and ssim are of all frames, against dense.

    density: all pairs that ran, of dense attention's, over layers, steps and prompts. psnr is None where every video is
    the dense one. seconds are of a prompt, decoding of the latents included.
    """

    method: str
    settings: dict[str, Any]
    videos: list[str]
    density: float
    seconds: float
    psnr: float | None = None
    ssim: float | None = None
    failed: str | None = None

    @property
    def label(self) -> str:
        return settings({"name": self.method, **self.settings})


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; blank lines and those that begin with # are none."""
    refuse("prompts", [f"no such file: {path}"] if not path.is_file() else [])
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    refuse("prompts", [f"{path} has no prompt; write one a line"] if not prompts else [])
    return prompts


def load_pipeline(folder: Path) -> Any:
    """The pipeline of a folder that diffusers wrote, in bfloat16 on a GPU; nothing comes from a hub."""
    refuse(
        f"model {folder}",
        ["model_index.json is missing; give the folder of a whole diffusers pipeline on disk"]
        if not (folder / "model_index.json").is_file()
        else [],
    )
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        raise ZooError(f"model {folder}: {error}. pip install 'sparse-attention-zoo[pretrained]'") from error
    cuda = torch.cuda.is_available()
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            folder, local_files_only=True, torch_dtype=torch.bfloat16 if cuda else torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ZooError(f"model {folder}: it does not load: {str(error).splitlines()[0]}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda") if cuda else pipe


@torch.no_grad()
def sample(pipe: Any, prompt: str, request: Request) -> Tensor:
    """A video (F, 3, H, W) in [0, 1], on the CPU."""
    video: Tensor = pipe(
        prompt=prompt,
        negative_prompt="",
        height=request.height,
        width=request.width,
        num_frames=request.frames,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="pt",
    ).frames[0]
    return video.float().cpu()


def capture(
    pipe: Any,
    prompts: Sequence[str],
    request: Request,
    layers: Sequence[int] | None,
    times: Sequence[float],
    note: Note,
) -> list[Captured]:
    """Calls of dense attention in sampling: of the first forward pass at or below each noise time."""
    bridge = zoo.attach(pipe.transformer, "dense")
    bridge.film(request.shots)
    found: list[Captured] = []
    try:
        for prompt in prompts:
            note(prompt)
            with bridge.capture(layers) as calls:
                sample(pipe, prompt, request)
            passes = sorted({float(one.call.noise.max()) for one in calls if isinstance(one.call.noise, Tensor)})
            for at in times:
                below = [noise for noise in passes if noise <= at]
                seen: set[int] = set()
                for one in calls:  # of the two calls of guidance, the first
                    noise = one.call.noise
                    fits = isinstance(noise, Tensor) and below and float(noise.max()) == below[-1]
                    if fits and one.call.layer not in seen:
                        seen.add(one.call.layer)
                        found.append(Captured(one.call, one.method))
    finally:
        bridge.detach()
    return found


def compare(
    pipe: Any,
    prompts: Sequence[str],
    methods: Sequence[tuple[str, Mapping[str, Any]]],
    request: Request,
    folder: Path,
    budget: Budget | None = None,
    note: Note = lambda _: None,
) -> list[Compared]:
    """Sample every prompt with every method from the same noise, dense attention first; write the videos.

    With a budget every method's knob is first solved for that density. A method that fails has its reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dense, reference, layout = _sampled(pipe, prompts, "dense", {}, request, folder, 0, note)
    rows = [dense]
    for number, (name, given) in enumerate(((name, given) for name, given in methods if name != "dense"), 1):
        try:
            own = dict(given)
            if budget is not None:
                own |= _solved(pipe.transformer, layout, name, own, budget)
            row, videos, _ = _sampled(pipe, prompts, name, own, request, folder, number, note)
            rows.append(replace(row, **_judged(videos, reference)))
        except ZooError as error:
            rows.append(Compared(name, dict(given), [], math.nan, math.nan, failed=str(error)))
    return rows


def _sampled(
    pipe: Any,
    prompts: Sequence[str],
    method: str,
    given: Mapping[str, Any],
    request: Request,
    folder: Path,
    number: int,
    note: Note,
) -> tuple[Compared, list[Tensor], zoo.Layout]:
    bridge = zoo.attach(pipe.transformer, method, **given)
    costs: list[zoo.Cost] = []
    counted = pipe.transformer.register_forward_hook(lambda *_: costs.append(bridge.cost()))
    videos, seconds = [], []
    try:
        bridge.film(request.shots)
        for prompt in prompts:
            note(f"{method}: {prompt}")
            start = time.perf_counter()
            videos.append(sample(pipe, prompt, request))
            seconds.append(time.perf_counter() - start)
        layout = bridge.results[0].layout
    finally:
        counted.remove()
        bridge.detach()
    names = [f"{number}-{method}-{i}.mp4" for i in range(len(prompts))]
    for name, video in zip(names, videos, strict=True):
        write_video(video, folder / name)
    return Compared(method, dict(given), names, reduce(add, costs).density, fmean(seconds)), videos, layout


def _solved(
    model: nn.Module, layout: zoo.Layout, method: str, given: Mapping[str, Any], budget: Budget
) -> dict[str, Any]:
    refuse("compare", [f"it matches density, got {budget.kind}"] if budget.kind != "density" else [])
    bridge = zoo.attach(model, "dense")
    heads, head_dim, dim = bridge.family.shape(bridge.sites[0].module)
    bridge.detach()
    size: dict[str, Any] = {"heads": heads, "head_dim": head_dim, "dim": dim}

    def measure(own: Mapping[str, Any]) -> float:
        return simulate(method, layout, **size, settings={**given, **own}).cost.density

    return solve_knob(method, dict(given), budget, size, measure)


def _judged(videos: Sequence[Tensor], reference: Sequence[Tensor]) -> dict[str, Any]:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    own, dense = torch.cat(list(videos)), torch.cat(list(reference))
    noise = float(peak_signal_noise_ratio(own, dense, data_range=1.0))
    likeness = structural_similarity_index_measure(own, dense, data_range=1.0)
    return {"psnr": noise if math.isfinite(noise) else None, "ssim": float(likeness)}  # type: ignore[arg-type]


def write_video(video: Tensor, path: Path) -> Path:
    """Write (F, 3, H, W) in [0, 1] as H.264 in MP4, which browsers play."""
    import av

    frames = (255 * video.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    height, width = frames.shape[1:3]
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=Fraction(FPS))
        stream.width, stream.height, stream.pix_fmt = width - width % 2, height - height % 2, "yuv420p"
        for frame in frames[:, : stream.height, : stream.width]:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame.copy(), format="rgb24")))
        file.mux(stream.encode())
    return path


def write_page(rows: Sequence[Compared], prompts: Sequence[str], request: Request, folder: Path) -> Path:
    """The page with the videos side by side, and its figures as JSON beside it."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("experiments.reporting"), autoescape=True)
    page = environment.get_template("compare.html").render(rows=rows, prompts=prompts, request=request)
    plain = {"request": asdict(request), "prompts": list(prompts), "rows": [_plain(row) for row in rows]}
    (folder / "compare.json").write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _plain(row: Compared) -> dict[str, Any]:
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in asdict(row).items()}
