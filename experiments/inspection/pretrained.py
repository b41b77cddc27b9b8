"""Pretrained pipelines on disk: sampled with any method as attention, captured, and compared with dense attention."""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from importlib.util import find_spec
from operator import add
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import sparse_zoo as zoo
from experiments.analysis.formatting import settings
from experiments.config.budget import Budget
from experiments.config.names import is_pretrained
from experiments.execution.checkpointing import load_plain
from experiments.inspection import video_quality
from experiments.inspection.capture import Captured
from experiments.inspection.checkpoint import locate
from experiments.sweep.budget import solve_knob
from lit_modules.mp4 import write_mp4
from sparse_zoo.bridge import Bridge
from sparse_zoo.bridge.family import find_family
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
    """One method. `videos` are files by prompt, relative to the page; psnr, ssim and lpips are against dense attention.

    density: all pairs that ran, of dense attention's, over layers, steps and prompts. psnr is None where every video is
    the dense one. seconds are of a prompt, decoding of the latents included. frame_consistency and shot_consistency are
    similarities of EfficientNet-Lite0's features, `vbench` scores by dimension; see `inspection.video_quality`.
    """

    method: str
    settings: dict[str, Any]
    videos: list[str]
    density: float
    seconds: float
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    frame_consistency: float | None = None
    shot_consistency: float | None = None
    vbench: dict[str, float] = field(default_factory=dict)
    failed: str | None = None

    @property
    def label(self) -> str:
        """The method and its settings on one line, as `moc · top_k 2 · anchors text`."""
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
        [
            "model_index.json is missing"
            + (", it has a transformer alone" if (folder / "transformer").is_dir() else "")
            + "; give the folder of a whole diffusers pipeline on disk, with its VAE, text encoder and scheduler"
        ]
        if not (folder / "model_index.json").is_file()
        else [],
    )
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        raise ZooError(f"model {folder}: {error}. pip install 'sparse-attention-zoo[pretrained]'") from error
    cuda = torch.cuda.is_available()
    for library in (diffusers, importlib.import_module("transformers")):
        library.utils.logging.disable_progress_bar()
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            folder, local_files_only=True, dtype=torch.bfloat16 if cuda else torch.float32
        )
    except (OSError, ValueError, RuntimeError, AttributeError, ImportError) as error:  # ImportError: of a part
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ZooError(f"model {folder}: it does not load: {reason}") from error
    refuse(
        f"model {folder}",
        [f"{type(pipe).__name__} needs the package ftfy. pip install 'sparse-attention-zoo[pretrained]'"]
        if type(pipe).__name__.startswith("SkyReels") and find_spec("ftfy") is None
        else [],
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda") if cuda else pipe


@torch.no_grad()
def sample(pipe: Any, prompt: str, request: Request) -> Tensor:
    """A video (F, 3, H, W) in [0, 1], on the CPU."""
    guidance: dict[str, Any] = {"guidance_scale": request.guidance}
    if getattr(pipe, "guider", None) is not None:  # of HunyuanVideo 1.5, which is told by a component
        pipe.guider = pipe.guider.new(**guidance)
        guidance = {}
    try:
        found: Any = pipe(
            prompt=prompt,
            negative_prompt="",
            height=request.height,
            width=request.width,
            num_frames=request.frames,
            num_inference_steps=request.steps,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="pt",
            **guidance,
        )
    except ValueError as error:  # of a size that the model does not take
        raise ZooError(f"{type(pipe).__name__}: {error}") from error
    video: Tensor = found.frames[0]
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
) -> tuple[list[Compared], list[str]]:
    """Sample every prompt with every method from the same noise, dense attention first; write the videos.

    With a budget every method's knob is first solved for that density. A method that fails has its reason. Second come
    the lines that say which measures were left out, and why.
    """
    dense, reference, layout = sample_method(pipe, prompts, "dense", {}, request, folder / "0-dense", note)
    shots = video_quality.pixel_shots(_latent_shots(pipe.transformer, layout), len(reference[0]))
    notes = [video_quality.lpips_missing(), video_quality.consistency_missing()]

    def judged(row: Compared, videos: Sequence[Tensor]) -> Compared:
        scores, missing = video_quality.vbench(folder / Path(row.videos[0]).parent, row.method, folder / "vbench")
        notes.append(missing)
        alike: dict[str, Any] = video_quality.consistency(videos, shots)
        return replace(row, vbench=scores, **alike)

    rows = [judged(_beside(dense, folder), reference)]
    for number, (name, given) in enumerate(((name, given) for name, given in methods if name != "dense"), 1):
        try:
            own = dict(given)
            if budget is not None:
                own |= _solved(pipe.transformer, layout, name, own, budget)
            row, videos, _ = sample_method(pipe, prompts, name, own, request, folder / f"{number}-{name}", note)
            fidelity: dict[str, Any] = video_quality.fidelity(videos, reference)
            rows.append(judged(replace(_beside(row, folder), **fidelity), videos))
        except ZooError as error:
            rows.append(Compared(name, dict(given), [], math.nan, math.nan, failed=str(error)))
    return rows, [line for line in dict.fromkeys(notes) if line]


def _beside(row: Compared, page: Path) -> Compared:
    return replace(row, videos=[Path(name).relative_to(page.absolute()).as_posix() for name in row.videos])


def _latent_shots(model: nn.Module, layout: zoo.Layout) -> list[int]:
    """Latent frames of each shot of a film."""
    patch = find_family(model).patch(model)
    return [shot.frames * patch[0] for shot in layout.films[0].shots]


def sample_method(
    pipe: Any,
    prompts: Sequence[str],
    method: str,
    given: Mapping[str, Any],
    request: Request,
    folder: Path,
    note: Note = lambda _: None,
) -> tuple[Compared, list[Tensor], zoo.Layout]:
    """Sample every prompt with a method in the transformer, which is detached afterwards; write the videos.

    Args:
        pipe: As `load_pipeline` gives it.
        prompts: One for each video.
        method: The method's name.
        given: Its settings.
        request: Sizes, steps, guidance, seed, shots.
        folder: Gets `0.mp4`, `1.mp4`, … in the order of the prompts.
        note: Called with a line before each video.

    Returns:
        What it took, with absolute paths of the videos; the videos (F, 3, H, W) in [0, 1]; the stream's layout.
    """
    bridge = zoo.attach(pipe.transformer, method, **given)
    try:
        return sample_attached(pipe, bridge, prompts, request, folder, note)
    finally:
        bridge.detach()


def sample_attached(
    pipe: Any, bridge: Bridge, prompts: Sequence[str], request: Request, folder: Path, note: Note = lambda _: None
) -> tuple[Compared, list[Tensor], zoo.Layout]:
    """The same with the methods that a bridge has attached to the pipeline's transformer."""
    names = list(dict.fromkeys(str(layer["name"]) for layer in bridge.layers))
    method = "-".join(names)
    given = {key: value for key, value in bridge.layers[0].items() if key != "name"} if len(names) == 1 else {}
    folder.mkdir(parents=True, exist_ok=True)
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
    files = [str(write_mp4(folder / f"{i}.mp4", [2 * video - 1], FPS).absolute()) for i, video in enumerate(videos)]
    return Compared(method, given, files, reduce(add, costs).density, fmean(seconds)), videos, layout


def load_trained(run: Path) -> tuple[Any, Bridge, int]:
    """The pipeline of a run that trained a pretrained model, with the run's averaged weights and its methods attached.

    Args:
        run: The run's folder, or a checkpoint in one.

    Returns:
        The pipeline; the bridge; the step of the checkpoint.

    Raises:
        ZooError: if it is no such run, or the folder of its pretrained model is no whole pipeline.
    """
    from lit_modules import LitPretrained

    path, config = locate("zoo sample", run)
    refuse(
        "zoo sample",
        [] if is_pretrained(config.get("model")) else [f"{run} trained no pretrained model; leave --prompts out"],
    )
    folder = Path(config["model"]["folder"])
    pipe = load_pipeline(folder)
    try:
        state = load_plain(path)
        module = LitPretrained(**state["hyper_parameters"])
        module.load_state_dict(state["state_dict"])
        step = int(state["global_step"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ZooError(f"{path} is no checkpoint of a run: {type(error).__name__}: {error}") from error
    like = next(pipe.transformer.parameters())
    pipe.transformer = module.model.eval().to(like.device)
    if like.dtype != torch.float32:
        pipe.transformer = pipe.transformer.to(like.dtype)
    return pipe, module.bridge, step


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


def write_page(
    rows: Sequence[Compared], prompts: Sequence[str], request: Request, folder: Path, notes: Sequence[str] = ()
) -> Path:
    """The page with the videos side by side, and its figures as JSON beside it."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("experiments.reporting"), autoescape=True)
    page = environment.get_template("compare.html").render(
        rows=rows, prompts=prompts, request=request, notes=notes, network=video_quality.CONSISTENCY
    )
    plain = {"request": asdict(request), "prompts": list(prompts), "rows": [_plain(row) for row in rows]}
    plain["notes"] = list(notes)
    (folder / "compare.json").write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _plain(row: Compared) -> dict[str, Any]:
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in asdict(row).items()}
