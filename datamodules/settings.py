"""The settings of the datamodules: one documented line a field, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sparse_zoo.errors import refuse, unknown

Detector = Literal["content", "adaptive"]
OnBad = Literal["raise", "skip"]
Batches = Literal["packed", "pretrained"]
Judged = Literal["last", "returns"]


@dataclass(frozen=True, kw_only=True)
class VideoFilmsSettings:
    """The settings of `VideoFilms`."""

    folder: str | Sequence[str]
    """Folder, searched with all folders in it; or a video file, "package:name/inside", or a list of these."""
    fps: float | None = 8.0
    """Frames a second to keep, null for all; a file with fewer keeps its own rate."""
    size: Sequence[int] = (64, 96)
    """Height and width in pixels; frames are resized, keeping their aspect ratio, then centre-cropped."""
    patch: Sequence[int] = (1, 8, 8)
    """Frames, rows and columns of one token; `size` and `frames_per_shot` are multiples of it."""
    frames_per_shot: int = 8
    """Largest number of frames that a film takes from one shot."""
    shots_per_film: int = 8
    """Number of consecutive shots in a film."""
    films_per_batch: int = 1
    """Number of films packed into one stream."""
    films_per_epoch: int | None = None
    """Number of films in an epoch; null takes each film once."""
    val_fraction: float = 0.25
    """Share of each shot's frames, its last ones, that is kept for validation."""
    detector: Detector = "content"
    """PySceneDetect's detector of cuts."""
    threshold: float | None = None
    """Threshold of the detector; null is PySceneDetect's default, 27 for "content" and 3 for "adaptive"."""
    captions: str | None = None
    """JSON file with the captions; null takes captions.json of each folder, where there is one."""
    max_words: int = 16
    """Number of words kept of each caption."""
    vocabulary: int = 1024
    """Number of token ids."""
    cache: str | None = None
    """Folder for decoded frames, which are read from disk when needed; null keeps them in memory."""
    on_bad: OnBad = "raise"
    """What to do with a video that cannot be decoded: "raise", or "skip" it and list it in the result."""
    flip: bool = False
    """Mirrors half of the training films; captions that say "left" or "right" become false."""
    num_workers: int = 0
    """Number of processes that load batches; with 0 the training process loads them."""
    seed: int = 0
    """Seed of the order of the films and of the frames that training takes from each shot."""

    def __post_init__(self) -> None:
        """Refuse settings out of range, all at once; raises `ZooError`."""
        size, patch = [*self.size], [*self.patch]
        sized = len(size) == 2 and len(patch) == 3 and min(*size, *patch) >= 1
        least = {
            "frames_per_shot": 1,
            "shots_per_film": 1,
            "films_per_batch": 1,
            "films_per_epoch": 1,
            "max_words": 1,
            "vocabulary": 1,
            "num_workers": 0,
            "seed": 0,
        }
        refuse(
            "VideoFilms",
            [
                *_too_small(self, least),
                "" if sized else f"size must be 2 and patch 3 lengths of at least 1, got {size} and {patch}",
                f"size {size} is not in whole patches of {patch[1:]}"
                if sized and (size[0] % patch[1] or size[1] % patch[2])
                else "",
                f"frames_per_shot {self.frames_per_shot} is not in whole patches of {patch[0]} frames"
                if sized and self.frames_per_shot % patch[0]
                else "",
                f"fps must be above 0, or null for all frames, got {self.fps}"
                if self.fps is not None and self.fps <= 0
                else "",
                f"val_fraction must be between 0 and 1, got {self.val_fraction}"
                if not 0 < self.val_fraction < 1
                else "",
                f"threshold must be above 0, got {self.threshold}"
                if self.threshold is not None and self.threshold <= 0
                else "",
                *(
                    unknown(name, given, get_args(allowed))
                    for name, given, allowed in (("detector", self.detector, Detector), ("on_bad", self.on_bad, OnBad))
                    if given not in get_args(allowed)
                ),
                "folder must name at least one folder or file" if not self.folder else "",
            ],
        )


@dataclass(frozen=True, kw_only=True)
class ShotWorldSettings:
    """The settings of `ShotWorld`."""

    subjects: int | Sequence[int] = 3
    """Number of subjects in a film, each introduced by a shot; or a range [least, most], sampled per film."""
    returns: int | None = None
    """Number of shots after the introductions; null returns to each subject once."""
    frames_per_shot: int | Sequence[int] = 2
    """Number of frames in a shot, a multiple of the patch's; or a range [least, most], sampled per shot."""
    grid: Sequence[int] = (3, 3)
    """Rows and columns of a frame, in patches."""
    patch: Sequence[int] = (1, 4, 4)
    """Frames, rows and columns of one token; as many rows as columns."""
    subject_size: int = 2
    """Side of a subject, in patches; subjects lie on whole patches."""
    shapes: int = 6
    """Number of shapes."""
    colours: int = 8
    """Number of colours."""
    textures: int = 4
    """Number of textures."""
    backgrounds: int = 4
    """Number of backgrounds."""
    tags: int = 6
    """Number of tags that name the subjects in captions; at least as many as subjects."""
    poses: int = 1
    """Number of poses, of 8: upright, turned by 90, 180 or 270 degrees, and these mirrored; captioned if above 1."""
    scales: int = 1
    """Number of sizes, of 2: the whole of `subject_size`, and three quarters of it; captioned if above 1."""
    screens: int = 1
    """Number of ways to hide a subject, of 5: not at all, or a quarter behind a screen; captioned if above 1."""
    distractors: int = 0
    """Other objects in an introduction, behind the subject, each of its shape or of its colour; never captioned."""
    scenery: bool = False
    """Stripes on backgrounds, of a direction for each background, which move by a pixel a frame."""
    least_subjects: int | None = None
    """Training films have from so many subjects to `subjects`, and as many more returns; null: as the judged films."""
    judged: Judged = "last"
    """Shots to generate and judge: the "last" of a film, or all "returns" at once, beside the true introductions."""
    batch_size: int = 16
    """Number of films in a batch."""
    films_per_epoch: int = 1600
    """Number of films in an epoch of training."""
    val_films: int = 64
    """Number of films for validation."""
    test_films: int = 0
    """Number of films for a test after training; 0 for no test."""
    num_workers: int = 0
    """Number of processes that make batches; with 0 the training process makes them."""
    seed: int = 0
    """Seed of the training films."""

    def __post_init__(self) -> None:
        """Refuse settings out of range, all at once; raises `ZooError`."""
        (_, most), (shortest, longest) = ends(self.subjects), ends(self.frames_per_shot)
        grid, patch = [*self.grid], [*self.patch]
        sized = len(grid) == 2 and len(patch) == 3 and min(*grid, *patch) >= 1
        least = {
            "subject_size": 1,
            "batch_size": 1,
            "films_per_epoch": 1,
            "val_films": 1,
            "returns": 1,
            "least_subjects": 1,
            "test_films": 0,
            "distractors": 0,
            "num_workers": 0,
            "seed": 0,
        }
        refuse(
            "ShotWorld",
            [
                *_too_small(self, least),
                unknown("judged", self.judged, get_args(Judged)) if self.judged not in get_args(Judged) else "",
                "" if most else f"subjects must be a count or a range [least, most] from 1, got {self.subjects}",
                ""
                if longest
                else f"frames_per_shot must be a count or a range [least, most] from 1, got {self.frames_per_shot}",
                f"least_subjects must be at most subjects, one number, got {self.least_subjects} and {self.subjects}"
                if self.least_subjects is not None
                and not (isinstance(self.subjects, int) and self.least_subjects <= self.subjects)
                else "",
                f"distractors need at least 2 shapes and 2 colours, got {self.shapes} and {self.colours}"
                if self.distractors and min(self.shapes, self.colours) < 2
                else "",
                f"{most} subjects need as many tags, got {self.tags}" if self.tags < most else "",
                "" if sized else f"grid must be 2 and patch 3 lengths of at least 1, got {grid} and {patch}",
                f"a patch must be as high as wide, got {patch}" if sized and patch[1] != patch[2] else "",
                f"a subject of {self.subject_size} patches does not fit into a grid of {grid}"
                if sized and self.subject_size > min(grid)
                else "",
                f"frames_per_shot {self.frames_per_shot} is not in whole patches of {patch[0]} frames"
                if sized and (shortest % patch[0] or longest % patch[0])
                else "",
            ],
        )


@dataclass(frozen=True, kw_only=True)
class LatentFilmsSettings:
    """The settings of `LatentFilms`."""

    folder: str
    """Folder that `zoo encode` wrote, or its address, such as https://host/latents; nothing is copied to the disk."""
    patch: Sequence[int] = (1, 2, 2)
    """Latent frames, rows and columns of one token."""
    batches: Batches = "packed"
    """Form of a batch: "packed" into one stream for `LitVideoDiT`, "pretrained" for `LitPretrained`."""
    films_per_batch: int = 1
    """Number of films in a batch; those that are left over make smaller ones."""
    shots_per_film: int = 8
    """Largest number of consecutive shots in a film."""
    frames_per_shot: int | None = None
    """Largest number of latent frames that a film takes of a shot, its first ones; null takes all."""
    max_tokens: int = 512
    """Largest number of tokens of a caption; with "pretrained" the length of the text."""
    drop_captions: float = 0.0
    """Share of the captions, a film's and each shot's apart, that training leaves out."""
    val_fraction: float = 0.1
    """Share of the videos that are kept for validation, one at least."""
    vae: str | None = None
    """Folder of the VAE that made the latents, to decode samples; null leaves samples as latents."""
    num_workers: int = 0
    """Number of processes that load batches; with 0 the training process loads them."""
    seed: int = 0
    """Seed of the split, of the order of films and of the captions that are left out."""

    def __post_init__(self) -> None:
        """Refuse settings out of range, all at once; raises `ZooError`."""
        least = {
            "films_per_batch": 1,
            "shots_per_film": 1,
            "max_tokens": 1,
            "frames_per_shot": 1,
            "seed": 0,
            "num_workers": 0,
        }
        patch = [*self.patch]
        refuse(
            "LatentFilms",
            [
                *_too_small(self, least),
                f"patch must be 3 lengths of at least 1, got {patch}" if len(patch) != 3 or min(patch) < 1 else "",
                unknown("batches", self.batches, get_args(Batches)) if self.batches not in get_args(Batches) else "",
                f"drop_captions must be in [0, 1], got {self.drop_captions}"
                if not 0 <= self.drop_captions <= 1
                else "",
                f"val_fraction must be between 0 and 1, got {self.val_fraction}"
                if not 0 < self.val_fraction < 1
                else "",
                "folder must name the folder that zoo encode wrote" if not self.folder else "",
            ],
        )


def ends(value: int | Sequence[int]) -> tuple[int, int]:
    """Return (least, most) of a count or of a range [least, most]; (0, 0) for anything else."""
    pair = [value, value] if isinstance(value, int) else [*value]
    return (pair[0], pair[1]) if len(pair) == 2 and 1 <= pair[0] <= pair[1] else (0, 0)


def _too_small(settings: object, least: dict[str, int]) -> list[str]:
    given = {name: getattr(settings, name) for name in least}
    return [
        f"{name} must be at least {low}, got {given[name]}"
        for name, low in least.items()
        if given[name] is not None and given[name] < low
    ]
