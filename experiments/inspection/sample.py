"""Films drawn from a run that was trained before, over data that may be longer than what it has seen."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from experiments.analysis.metrics import Measure
from experiments.inspection.trained import Batch, Trained
from experiments.tracking.store import write_json
from lit_modules import Euler, SampleFilms
from lit_modules.callbacks import write_picture
from lit_modules.mp4 import write_mp4
from lit_modules.strips import film_strip, shown, some_frames, stack_rows
from sparse_zoo.errors import refuse

FPS = 8.0  # of videos where the data knows no rate


@dataclass(frozen=True)
class Sampled:
    """What was drawn, ready for JSON.

    `films`: {"name", "shots", "given", "strip" and "video" (paths), "taken"} each; "taken" maps each shot that was
    drawn to the earlier ones it was drawn beside, and is None where all were drawn at once. `metrics` are those of the
    datamodule, with those of whole films where no shot was given; `by_shot` are the means of each shot, by name, where
    the datamodule has a metric for it (`ShotDrift`); `notes` what was warned of.
    """

    checkpoint: str
    step: int
    folder: str
    sampling: dict[str, Any]
    data: dict[str, Any]
    films: list[dict[str, Any]]
    metrics: dict[str, float | None]
    by_shot: dict[str, list[float | None]]
    notes: list[str]
    seconds: float


class Drawing:
    """A trained model and the validation films that it is to draw.

    Args:
        run: A run's folder, or one of its checkpoints.
        overrides: "data.key=value" over the run's config.
        films: How many films; where several are packed in a stream, all of a stream are drawn.
        given: How many first shots of each film are given instead of drawn.
        sampling: Fields of `Euler` that differ from the run's.
        plugins: Files of the user, see `Trained`.

    Raises:
        ZooError: if there is no checkpoint or no config beside it, or the data does not fit the model.
    """

    def __init__(
        self,
        run: Path,
        overrides: Sequence[str],
        *,
        films: int,
        given: int,
        sampling: Mapping[str, Any],
        plugins: Sequence[Path] = (),
    ) -> None:
        trained = Trained("zoo sample", run, overrides, films, plugins)
        self.trained, self.module, self.batches = trained, trained.module, trained.batches
        self.given, self.settings = given, trained.config["data"]
        of_run = {key: value for key, value in trained.config["sampling"].items() if key != "every"}
        order = {"order": "shots"} if sampling.get("context") is not None else {}
        self.euler = Euler(**{**of_run, **order, **sampling})
        # Where nothing is given a film is right if it agrees with itself.
        whole = dict[str, Metric]() if given else getattr(trained.data, "whole_metrics", dict)()
        self.metrics = MetricCollection({**trained.data.sample_metrics(), **whole}, compute_groups=False)
        self.drift: Metric | None = trained.data.drift() if hasattr(trained.data, "drift") else None
        latents = self.module.model.channels not in (1, 3) and getattr(trained.data, "decoder", None) is None
        refuse("zoo sample", ["the model makes latents; give data.vae=FOLDER to decode them"] if latents else [])
        every = all(bool(self._known(batch).all()) for batch in self.batches)
        refuse("zoo sample", [f"with {given} shots given there is nothing left to draw"] if every else [])

    @property
    def steps(self) -> int:
        """Euler steps in all."""
        return sum(self.euler.count(batch, self._known(batch)) for batch in self.batches)

    def draw(self, out: Path | None, told: Callable[[], object]) -> Sampled:
        """Draw every film, write strips, MP4s and `sample.json` into `out`; `told` is called once a step.

        By default `out` is a new folder in the run's `samples`. A strip shows the real film, the model's guess of it
        from half noise, and what was drawn.
        """
        start = time.perf_counter()
        folder = out or self.trained.folder / "samples" / f"{datetime.now():%Y%m%d-%H%M%S}"
        module, device = self.trained.ready()
        metrics, precision, step = self.metrics.to(device), self.trained.trainer.precision_plugin, self.trained.step
        drift = None if self.drift is None else self.drift.to(device)
        films: list[dict[str, Any]] = []
        caught: list[warnings.WarningMessage] = []
        for number, cpu in enumerate(self.batches):
            batch, known = move_data_to_device(cpu, device), self._known(cpu)
            with precision.forward_context(), warnings.catch_warnings(record=True) as new:
                warnings.simplefilter("always")
                guess = module.flow.denoise(module.model, batch, SampleFilms.GUESS_FROM, step=step, seed=number)
                drawn = self.euler.generate(
                    module.model, module.flow, batch, seed=number, known=known, step=step, on_step=told
                )
            caught += new
            metrics.update(drawn.clips, batch)
            if drift is not None:
                drift.update(drawn.clips, batch)
            for item in range(len(batch["text"])):
                first = 0
                for i, film in enumerate(batch["layout"].films):
                    shots = len(film.shots)
                    versions = [
                        [clip[item] for clip in clips[first : first + shots]]
                        for clips in (batch["clips"], guess, drawn.clips)
                    ]
                    first += shots
                    strip, video = write_film(
                        folder / f"film_{len(films):03d}",
                        versions,
                        getattr(self.trained.data, "decoder", None),
                        _of_film(batch, "rates", item, i) or FPS,
                        _of_film(batch, "captions", item, i) or (),
                    )
                    films.append(
                        {
                            "name": _of_film(batch, "names", item, i) or f"film {len(films)}",
                            "shots": shots,
                            "given": min(self.given, shots),
                            "strip": str(strip),
                            "video": str(video),
                            "taken": drawn.context[i][item] if drawn.context else None,
                        }
                    )
        found = {name: float(value) for name, value in metrics.compute().items()} if len(metrics) else {}
        by_shot: dict[str, list[float]] = {} if drift is None else drift.compute()
        sampled = Sampled(
            str(self.trained.checkpoint),
            step,
            str(folder),
            asdict(self.euler),
            self.settings,
            films,
            {name: _finite(value) for name, value in found.items()},
            {name: [*map(_finite, values)] for name, values in by_shot.items()},
            [*self.trained.notes, *dict.fromkeys(str(warning.message) for warning in caught)],
            time.perf_counter() - start,
        )
        write_json(folder / "sample.json", asdict(sampled))
        return sampled

    def _known(self, batch: Batch) -> torch.Tensor:
        number = torch.cat([torch.arange(len(film.shots)) for film in batch["layout"].films])
        return number < self.given


def write_film(
    path: Path,
    versions: Sequence[Sequence[Tensor]],
    decode: Callable[[Tensor], Tensor] | None,
    rate: float,
    captions: Sequence[str],
) -> tuple[Path, Path]:
    """Write the strip of all versions of a film and the MP4 of the last one.

    Latents are decoded shot by shot: of a long film only the frames that its strip shows are kept.

    Args:
        path: Of both files, without a suffix.
        versions: Clips (F, C, H, W) of each version, one a shot; the last version is the generated one.
        decode: Makes a clip with pixels in [-1, 1] of a clip; None: they are pixels.
        rate: Frames a second.
        captions: The film's, then each shot's; or none.

    Returns:
        The paths of the strip and of the MP4.
    """
    decode = decode or (lambda clip: clip)
    *others, made = versions
    numbers, frames = shown(len(made))
    rows = [[some_frames(decode(clips[number]), frames) for number in numbers] for clips in others]
    own: list[Tensor] = []

    def decoded() -> Iterator[Tensor]:
        for number, clip in enumerate(made):
            video = decode(clip)
            if number in numbers:
                own.append(some_frames(video, frames))
            yield video

    film = write_mp4(path.with_suffix(".mp4"), decoded(), rate, captions)
    strips = [film_strip(clips) for clips in (*rows, own)]
    return write_picture(path.with_suffix(".png"), stack_rows(strips)), film


def plot(sampled: Sampled, path: Path) -> Path:
    """Recall against shots back, and what each shot shows by its number, as PNG, SVG or PDF by the name's end.

    Raises:
        ZooError: If the films were not judged by shots.
    """
    refuse("zoo sample --plot", [] if sampled.by_shot else ["this data does not judge films shot by shot"])
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), dpi=130, layout="constrained")
    distance, number = figure.subplots(1, 2)
    places = {name: found for name in sampled.metrics if (found := Measure.of(name).distance)}
    for base in dict.fromkeys(base for base, _ in places.values()):
        points = sorted((back, sampled.metrics[name]) for name, (of, back) in places.items() if of == base)
        distance.plot(*zip(*points, strict=True), marker="o", ms=3, label=Measure.of(base).label)
    distance.set(xlabel="shots back to the subject", ylabel="recall", ylim=(-0.03, 1.03))
    for name, values in sampled.by_shot.items():
        if name not in ("shot", "films"):
            given = [math.nan if value is None else value for value in values]
            number.plot(sampled.by_shot["shot"], given, marker="o", ms=3, label=name.replace("_", " "))
    number.set(xlabel="number of the shot", ylim=(-0.03, None))
    for axis in (distance, number):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _of_film(batch: Batch, what: str, item: int, film: int) -> Any:
    """What our datamodules say of a film, None where they do not: batch items or the films of a stream are many."""
    given: list[Any] = batch.get(what, [])
    number = item * len(batch["layout"].films) + film
    return given[number] if number < len(given) else None
