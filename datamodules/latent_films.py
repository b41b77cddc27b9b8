"""Films of latents and text embeddings that `zoo encode` wrote: any film at any time, from shards on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric

from datamodules.discovery import listed, resolve
from datamodules.loading import Batch, ResumableLoader, train_loader, val_loader
from datamodules.settings import LatentFilmsSettings
from datamodules.shards import Index
from datamodules.storage import Folder, Storage, need, storage
from sparse_zoo.errors import refuse
from sparse_zoo.layout import Layout, Shot

if TYPE_CHECKING:
    from datamodules.encoders import VideoVAE

_log = logging.getLogger(__name__)
ABOUT, FILMS = "latents.json", "films.jsonl"  # files that `zoo encode` writes beside its shards


@dataclass(frozen=True)
class LatentShot:
    """A shot: the key of its latents and how many of their frames are used, rows and columns; its text, if any."""

    latents: str
    frames: int
    rows: int
    cols: int
    text: str | None
    caption: str


@dataclass(frozen=True)
class LatentFilm:
    """Consecutive shots of one video, with the video's caption; `source` names the video by its content."""

    name: str
    source: str
    rate: float
    text: str | None
    caption: str
    shots: tuple[LatentShot, ...]

    @property
    def numbers(self) -> int:
        """Latent frames times rows times columns, over all shots."""
        return sum(shot.frames * shot.rows * shot.cols for shot in self.shots)


class LatentFilms(LightningDataModule):
    """Films of VAE latents and text embeddings, from the folder of `zoo encode`; needs no VAE and no text encoder.

    A video gives films of `shots_per_film` consecutive shots. Whole videos, told apart by their content, are for
    training or for validation: no video is in both, under whatever name. An epoch is each film once, in batches of
    films of alike sizes and lengths, in an order that follows from `seed` and the epoch.

    With batches "packed", for `LitVideoDiT`, a batch is `films_per_batch` films in one stream (B = 1): "clips" are
    latents (1, F, C, H, W), "text" embeddings (1, Nt, width). With "pretrained", for `LitPretrained`, it is that many
    films of equal shots: "latents" (B, C, F, H, W), the shots one after the other in time, and "arguments" with
    `encoder_hidden_states` (B, max_tokens, width), the captions one after the other and zeros, as Wan's are.

    Args:
        folder: What `zoo encode` wrote, or its address ("https://…", "s3://…"): shards are then read over the network.
        **settings: Further fields of `LatentFilmsSettings`.

    Raises:
        ZooError: for settings out of range, a folder without films, and sizes that are not in whole patches.
    """

    vocabulary = 0  # text is embeddings, `text_dim` wide, not ids

    def __init__(self, folder: str, **settings: Any) -> None:
        super().__init__()
        given = LatentFilmsSettings(folder=folder, **settings)
        patch = given.patch
        self.files, self.patch, self.batches = storage(folder), (patch[0], patch[1], patch[2]), given.batches
        self.films_per_batch, self.shots_per_film = given.films_per_batch, given.shots_per_film
        self.frames_per_shot, self.max_tokens = given.frames_per_shot, given.max_tokens
        self.drop_captions, self.val_fraction = given.drop_captions, given.val_fraction
        self.num_workers, self.seed = given.num_workers, given.seed
        self.vae_folder = None if given.vae is None else resolve(given.vae)
        why = "it is a folder that zoo encode wrote to its end"
        need(f"LatentFilms {self.files}", self.files, (ABOUT, FILMS), why)
        self.about = _parse(b"".join(self.files.lines(ABOUT)), self.files, ABOUT, ("channels", "vae_digest"))
        self.channels = int(self.about["channels"])
        self.notes: list[str] = []
        self.train_films: list[LatentFilm] = []
        self.val_films: list[LatentFilm] = []
        self._vae: VideoVAE | None = None
        self.text_dim = 1

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002  # Lightning passes it by name
        """Read the list of films and split it; no tensor is read. Further calls do nothing."""
        if self.train_films:
            return
        self.notes = []
        self.latents, self.texts = (Index(str(self.files), kind).refresh() for kind in ("latents", "text"))
        films, missing, short, widths = list[LatentFilm](), list[str](), 0, set[int]()
        for number, line in enumerate(self.files.lines(FILMS), 1):
            given = _parse(line, self.files, f"{FILMS} line {number}", ("name", "source", "rate", "text", "shots"))
            shots = []
            for shot in given["shots"]:
                if shot["latents"] not in self.latents or (shot["text"] and shot["text"] not in self.texts):
                    missing.append(given["name"])
                    continue
                _, frames, rows, cols = self.latents[shot["latents"]].meta["shape"]
                frames = min(frames, self.frames_per_shot or frames) // self.patch[0] * self.patch[0]
                if not frames:
                    short += 1
                    continue
                shots.append(LatentShot(shot["latents"], frames, rows, cols, shot["text"], shot["caption"]))
                widths.add(self.texts[shot["text"]].meta["shape"][1] if shot["text"] else 0)
            text = given["text"]
            if text is not None and text not in self.texts:
                missing.append(given["name"])
                text = None
            widths.add(self.texts[text].meta["shape"][1] if text else 0)
            for first in range(0, len(shots), self.shots_per_film):
                part = tuple(shots[first : first + self.shots_per_film])
                name = (
                    given["name"]
                    if len(part) == len(shots)
                    else f"{given['name']} shots {first}-{first + len(part) - 1}"
                )
                films.append(LatentFilm(name, given["source"], given["rate"], text, given["caption"], part))
        if missing:
            why = "; ".join(sorted({*self.latents.lost.values(), *self.texts.lost.values()})) or "they were not encoded"
            self._note(
                f"{len(missing)} shots or captions are not there and left out ({listed(dict.fromkeys(missing))}): "
                f"{why}; give the command zoo encode again"
            )
        if short:
            self._note(f"{short} shots are shorter than a patch ({self.patch[0]} latent frames) and dropped")
        _, rows, cols = self.patch
        odd = sorted({(s.rows, s.cols) for film in films for s in film.shots if s.rows % rows or s.cols % cols})
        sources = sorted(
            {film.source for film in films}, key=lambda x: hashlib.sha256(f"{self.seed} {x}".encode()).hexdigest()
        )
        refuse(
            f"LatentFilms {self.files}",
            [f"latents of {a}x{b} are not in whole patches of {rows}x{cols}" for a, b in odd]
            + [
                f"training and validation need a video each, and there {'is' if len(sources) == 1 else 'are'} "
                f"{len(sources)}"
                if len(sources) < 2
                else ""
            ],
        )
        self.text_dim = max(1, *widths)
        if self.vae_folder is not None:
            self._check_vae(self.vae_folder)
        elif self.channels not in (1, 3) and self.batches == "packed":  # a pretrained pipeline has its VAE
            self._note("vae is not given: what a model samples stays latents, without pictures or videos")
        held = set(sources[: min(len(sources) - 1, max(1, round(len(sources) * self.val_fraction)))])
        self.train_films = [film for film in films if film.source not in held]
        self.val_films = [film for film in films if film.source in held]

    def train_dataloader(self) -> ResumableLoader:
        """Return a resumable loader of shuffled batches of training films; the order follows from `seed` and epoch."""
        films = _Batches(self, self.train_films, training=True)
        return train_loader(films, 1, self.seed, self.num_workers, self.trainer)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return a loader of the validation films: the same batches in the same order each time, all captions kept."""
        return val_loader(_Batches(self, self.val_films, training=False), 1, self.num_workers)

    def sample_metrics(self) -> dict[str, Metric]:
        """None: of real film no truth is known."""
        return {}

    @property
    def decoder(self) -> Callable[[Tensor], Tensor] | None:
        """What decodes the latents of a shot for pictures and videos; None without `vae`."""
        return None if self.vae_folder is None else self.decode

    def decode(self, shot: Tensor) -> Tensor:
        """Latents (f, C, h, w) of one shot -> video (F, 3, H, W) in [-1, 1], by `vae`."""
        if self._vae is None:
            from datamodules.encoders import VideoVAE

            refuse("LatentFilms", ["vae must be given to decode latents"] if self.vae_folder is None else [])
            assert self.vae_folder is not None
            self._vae = VideoVAE(self.vae_folder, shot.device)
        return self._vae.decode(shot.transpose(0, 1)[None])[0].transpose(0, 1)

    def _check_vae(self, folder: Path) -> None:
        from datamodules.encoders import vae_folder
        from datamodules.encoding import Digests

        with TemporaryDirectory() as once:  # an address has no place for a cache
            cache = self.files.path / "cache" if isinstance(self.files, Folder) else Path(once)
            own = Digests(cache).model(vae_folder(folder))
        refuse(
            "LatentFilms",
            [f"vae {folder} did not make these latents: its digest is {own}, theirs {self.about['vae_digest']}"]
            if own != self.about["vae_digest"]
            else [],
        )

    def summary(self) -> dict[str, Any]:
        """What the films are, ready for JSON."""
        self.setup()
        return {
            split: {
                "films": len(films),
                "videos": len({film.source for film in films}),
                "shots": sum(len(film.shots) for film in films),
                "latent_frames": sum(shot.frames for film in films for shot in film.shots),
                "buckets": len(_buckets(self, films)),
            }
            for split, films in (("train", self.train_films), ("validation", self.val_films))
        } | {"encoded": self.about, "notes": self.notes}

    def _note(self, line: str) -> None:
        self.notes.append(line)
        _warn(line)


def _parse(text: bytes, files: Storage, name: str, needed: Sequence[str]) -> dict[str, Any]:
    """What `zoo encode` wrote as JSON."""
    try:
        found = json.loads(text)
        missing = [key for key in needed if key not in found]
    except (ValueError, TypeError, RecursionError) as error:
        missing = [str(error)]
    refuse(
        f"LatentFilms {files}",
        [f"{name} is damaged ({', '.join(missing)}); give the command zoo encode again"] if missing else [],
    )
    return dict(found)


def _buckets(data: LatentFilms, films: Sequence[LatentFilm]) -> list[list[int]]:
    """Numbers of films that may share a batch: of one size, and of a length within a factor of two, or equal."""
    found: dict[Any, list[int]] = {}
    for number, film in enumerate(films):
        grid = tuple((shot.frames, shot.rows, shot.cols) for shot in film.shots)
        alike = (film.shots[0].rows, film.shots[0].cols, film.numbers.bit_length())
        found.setdefault(alike if data.batches == "packed" else grid, []).append(number)
    return [found[key] for key in sorted(found)]


class _Batches:
    """One split of a `LatentFilms`: batch n of epoch e is item e · len + n."""

    def __init__(self, data: LatentFilms, films: Sequence[LatentFilm], training: bool) -> None:
        self.data, self.films, self.training = data, films, training
        self.buckets = _buckets(data, films)
        self.length = sum(-(-len(bucket) // data.films_per_batch) for bucket in self.buckets)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Batch:
        epoch, item = divmod(number, self.length)
        chosen = [(self.films[i], self._kept(epoch, i)) for i in self._of_epoch(epoch)[item]]
        make = _packed if self.data.batches == "packed" else _for_pretrained
        return make(self.data, chosen)

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        (number,) = numbers
        return self[number]

    def _of_epoch(self, epoch: int) -> list[list[int]]:
        """The films of each batch of an epoch."""
        if self._epoch[0] != epoch:
            size, made = self.data.films_per_batch, []
            for which, bucket in enumerate(self.buckets):
                draw = np.random.default_rng([self.data.seed, epoch, which])
                order = draw.permutation(bucket).tolist() if self.training else bucket
                made += [order[first : first + size] for first in range(0, len(order), size)]
            self._epoch = (epoch, made)
        return self._epoch[1]

    def _kept(self, epoch: int, film: int) -> list[bool]:
        """Which captions of a film are kept: its own, then each shot's."""
        count = 1 + len(self.films[film].shots)
        if not self.training or not self.data.drop_captions:
            return [True] * count
        draw = np.random.default_rng([self.data.seed, epoch, film, 1])
        return [bool(kept) for kept in draw.random(count) >= self.data.drop_captions]


Chosen = Sequence[tuple[LatentFilm, Sequence[bool]]]


def _packed(data: LatentFilms, films: Chosen) -> Batch:
    layouts, clips, texts = [], [], []
    frames, rows, cols = data.patch
    for film, kept in films:
        own = _texts(data, film, kept)
        shots = [
            Shot(shot.frames // frames, shot.rows // rows, shot.cols // cols, len(text))
            for shot, text in zip(film.shots, own[1:], strict=True)
        ]
        layouts.append(Layout.film(shots, caption=len(own[0])))
        clips += [_latents(data, shot).transpose(0, 1)[None] for shot in film.shots]
        texts += own
    return {"layout": Layout.pack(layouts), "clips": clips, "text": torch.cat(texts)[None], **_about(films)}


def _for_pretrained(data: LatentFilms, films: Chosen) -> Batch:
    latents = [torch.cat([_latents(data, shot) for shot in film.shots], dim=1) for film, _ in films]
    text = torch.zeros(len(films), data.max_tokens, data.text_dim)
    for row, (film, kept) in zip(text, films, strict=True):
        own = torch.cat(_texts(data, film, kept))[: data.max_tokens]
        row[: len(own)] = own
    shots = [shot.frames // data.patch[0] for shot in films[0][0].shots]
    return {
        "latents": torch.stack(latents),
        "arguments": {"encoder_hidden_states": text},
        "shots": shots,
        **_about(films),
    }


def _about(films: Chosen) -> Mapping[str, Any]:
    return {
        "names": [film.name for film, _ in films],
        "rates": [film.rate for film, _ in films],
        "captions": [[film.caption, *(shot.caption for shot in film.shots)] for film, _ in films],
    }


def _latents(data: LatentFilms, shot: LatentShot) -> Tensor:
    """float32 (C, F, H, W)."""
    return data.latents.tensors(shot.latents)["latents"][:, : shot.frames].float()


def _texts(data: LatentFilms, film: LatentFilm, kept: Sequence[bool]) -> list[Tensor]:
    """Embeddings (n, width), float32, of the film's caption and each shot's; n is 0 where there is none."""
    keys = [film.text, *(shot.text for shot in film.shots)]
    return [
        data.texts.tensors(key)["text"][: data.max_tokens].float() if key and keep else torch.zeros(0, data.text_dim)
        for key, keep in zip(keys, kept, strict=True)
    ]


@rank_zero_only
def _warn(line: str) -> None:
    _log.warning("data: %s", line)
