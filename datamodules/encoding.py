"""Encodes the rows of a manifest: videos into VAE latents shot by shot, captions into text embeddings.

Every entry has a key that hashes all that it is computed from: of latents the content of the video, the span of frames,
size and rate, the VAE; of text the caption and the text encoder. So nothing can be stale, what two rows share is
encoded once, and a changed caption encodes itself alone.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from datamodules.checking import cut_at_the_end, past_the_end
from datamodules.encoders import (
    WEIGHTS,
    TextEncoder,
    VideoVAE,
    read_config,
    read_json,
    text_encoder_folder,
    text_folders,
    vae_folder,
)
from datamodules.footage import DETECTORS, Decoding, Frames, need_file, probe, read_footage
from datamodules.manifest import ROUNDING, Row
from datamodules.shards import SHARD_BYTES, Index, Writer, restore_indexes
from datamodules.storage import write_atomically
from sparse_zoo.errors import ZooError, refuse, unknown

_log = logging.getLogger(__name__)
_FORMAT = 1  # part of every key: raised with every change of what encoding gives
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Encoding:
    """What to encode and how; everything but `folder` and `shard_bytes` goes into the keys that it concerns."""

    folder: Path
    """Where the shards go."""
    vae: Path
    """Folder of a diffusers video VAE, or of a pipeline with one."""
    text_encoder: Path
    """Folder of a transformers text encoder with its tokenizer, or of a pipeline with both; or "minilm"."""
    sizes: tuple[tuple[int, int], ...] = ((480, 832),)
    """(height, width) in pixels; a video takes the one whose shape is nearest to its own."""
    fps: float | None = None
    """Frames a second to keep; None: the file's own rate."""
    max_frames: int = 81
    """Frames of video that are encoded together; a longer shot is cut there."""
    max_tokens: int = 512
    """Tokens kept of a caption."""
    detector: Literal["content", "adaptive"] = "content"
    """PySceneDetect's detector, where the manifest has no times."""
    threshold: float | None = None
    """Of the detector; None: its own default."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of what is stored."""
    shard_bytes: int = SHARD_BYTES
    """Bytes at which a shard is finished."""

    def __post_init__(self) -> None:
        counts = {"max_frames": self.max_frames, "max_tokens": self.max_tokens, "shard_bytes": self.shard_bytes}
        refuse(
            "encode",
            [f"{name} must be at least 1, got {value}" for name, value in counts.items() if value < 1]
            + [
                f"fps must be above 0, got {self.fps}" if not (self.fps is None or 0 < self.fps < math.inf) else "",
                f"threshold must be a number, got {self.threshold}" if not math.isfinite(self.threshold or 0.0) else "",
                unknown("detector", self.detector, DETECTORS) if self.detector not in DETECTORS else "",
                unknown("dtype", self.dtype, DTYPES) if self.dtype not in DTYPES else "",
                "" if self.sizes else "size must be given",
            ],
        )


def key_of(*parts: Any) -> str:
    """32 hex digits that name what is computed from `parts`, which are ready for JSON."""
    return hashlib.sha256(json.dumps([_FORMAT, *parts], sort_keys=True).encode()).hexdigest()[:32]


class Digests:
    """SHA-256 of whole files, kept by what a file's system says of it, so that a file is read for it once.

    Path, size and time of its last writing can be those of another file before, say after `cp --preserve`. The inode
    and the time at which that changed cannot.

    Args:
        folder: Where they are kept, one small file a file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, path: Path) -> str:
        """The digest of one file."""
        stat = path.stat()
        asked = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        kept = self.folder / f"{key_of(asked)}.sha256"
        try:
            found = kept.read_text(encoding="ascii")
            if len(found) == 64:
                return found
        except FileNotFoundError:
            pass
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        write_atomically(kept, digest)
        return digest

    def model(self, folder: Path) -> str:
        """A digest of a model's config and weights; of the config what does not change the model is left out."""
        config = read_config(folder)
        plain = {key: value for key, value in config.items() if key == "_class_name" or not _incidental(key)}
        weights = sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS)
        return key_of(plain, [(path.name, self.file(path)) for path in weights])

    def text_encoder(self, folder: Path) -> str:
        """A digest of a text encoder and its tokenizer: of every file but weights, config and texts about them."""
        model, tokenizer = text_folders(folder)
        files = sorted(path for path in tokenizer.iterdir() if path.is_file() and path.suffix not in (*WEIGHTS, ".md"))
        parts = [(path.name, self.file(path)) for path in files if path.name != "config.json"]
        return key_of(self.model(model), parts)


def _incidental(key: str) -> bool:
    return key.startswith("_") or key in ("transformers_version", "torch_dtype", "dtype")


class Claims:
    """Who works on what, among all processes that share a folder: locks on bytes of one file, by key.

    The kernel frees a lock when its process ends, however it ends.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "claims").open("a+b")

    @contextmanager
    def claim(self, key: str, *, wait: bool) -> Iterator[bool]:
        """Whether this process has the key to itself meanwhile; unless `wait`, False at once where another has it."""
        at = int(key[:15], 16)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, at)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):  # a disk without locks: no other process would ever end
                raise
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, at)


@dataclass(frozen=True)
class Piece:
    """Kept frames [first, last) of a video that are encoded together, and the caption of their shot."""

    key: str
    shot: int
    first: int
    last: int
    start: float
    end: float
    caption: str


@dataclass(frozen=True)
class Plan:
    """What a row comes to before anything is encoded; `notes` are lines on what is left out or cut."""

    row: Row
    source: str
    size: tuple[int, int]
    rate: float
    pieces: tuple[Piece, ...]
    notes: tuple[str, ...]


class Encoder:
    """Encodes rows into the shards of a folder, beside other processes that do the same.

    Args:
        encoding: What to encode and how.
        device: Where the models compute.

    Raises:
        ZooError: if a model does not load, a size does not fit the VAE, or the folder holds latents of another VAE.
    """

    def __init__(self, encoding: Encoding, device: torch.device | None = None) -> None:
        self.encoding = encoding
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        folder = encoding.folder
        folder.mkdir(parents=True, exist_ok=True)
        self.digests, self.claims = Digests(folder / "cache"), Claims(folder)
        self.latents, self.texts = Index(folder, "latents"), Index(folder, "text")
        self.vae_digest = self.digests.model(vae_folder(encoding.vae))
        self.text_folder = text_encoder_folder(encoding.text_encoder, folder / "cache")
        self.text_digest = self.digests.text_encoder(self.text_folder)
        self.vae = VideoVAE(encoding.vae, self.device)
        refuse(
            "encode",
            [
                f"size {height}x{width} is not in whole latents of {self.vae.pixels} pixels; "
                f"the nearest is {_nearest(height, self.vae.pixels)}x{_nearest(width, self.vae.pixels)}"
                for height, width in encoding.sizes
                if height % self.vae.pixels or width % self.vae.pixels or min(height, width) < 1
            ],
        )
        self.settings = self._settle()
        with self.claims.claim(hashlib.sha256(b"indexes").hexdigest(), wait=True):
            for note in (note for kind in ("latents", "text") for note in restore_indexes(folder, kind)):
                _log.warning(note)

    @cached_property
    def text(self) -> TextEncoder:
        """The text encoder, loaded when a caption needs it: it may be large."""
        return TextEncoder(self.text_folder, self.device, self.encoding.max_tokens)

    def _settle(self) -> dict[str, Any]:
        """Write down what the folder's latents are of, or refuse what does not fit those that are there."""
        about = {
            "format": _FORMAT,
            "vae": self.vae.name,
            "vae_digest": self.vae_digest,
            "channels": self.vae.channels,
            "frames": self.vae.frames,
            "pixels": self.vae.pixels,
            "dtype": self.encoding.dtype,
        }
        path = self.encoding.folder / "latents.json"
        if path.is_file():
            there = read_json(path)
            differ = [
                f"{key} is {there.get(key)} there and {about[key]} here"
                for key in about
                if there.get(key) != about[key]
            ]
            refuse(f"{self.encoding.folder} holds latents of another VAE or dtype, give another --out", differ)
        else:
            write_atomically(path, json.dumps(about, indent=1) + "\n")
        return about

    def text_key(self, caption: str) -> str:
        """The key of a caption's embeddings."""
        return key_of("text", caption, self.text_digest, self.encoding.max_tokens, self.encoding.dtype)

    def plan(self, row: Row) -> Plan:
        """Where a row's shots lie and what they are called; finds cuts in a first pass, which is kept.

        Raises:
            ZooError: if the video cannot be read, or the shots that the row names are not there.
        """
        e = self.encoding
        header = probe(row.path)
        refuse(row.name, past_the_end(row, header.seconds))  # before anything is decoded
        source = self.digests.file(row.path)
        detector = None if row.timed else e.detector
        decoding = Decoding(e.fps, (16, 16), detector, e.threshold if detector else None)
        footage = self._footage(row.path, source, decoding)
        times, notes = footage["times"], list(footage["notes"])
        rate = min(e.fps or footage["rate"], footage["rate"])
        spans = _spans(row, footage)
        size = min(e.sizes, key=lambda size: abs(np.log(size[1] / size[0] / (header.width / header.height))))
        longest = self.vae.usable(e.max_frames)
        pieces: list[Piece] = []
        for number, (first, last, caption) in enumerate(spans):
            for at, stop in self._parts(first, last, longest):
                end = times[stop] if stop < len(times) else footage["end"]
                key = key_of("latents", source, e.fps, [at, stop], size, self.vae_digest, e.dtype)
                pieces.append(Piece(key, number, at, stop, round(times[at], 4), round(end, 4), caption))
        notes += cut_at_the_end(row, footage["end"])
        cut = Counter(piece.shot for piece in pieces)
        if long := [count for count in cut.values() if count > 1]:
            notes.append(
                f"{len(long)} shots of more than {longest} frames are cut into {sum(long)} parts, which are encoded "
                "apart (--max-frames)"
            )
        if left := sum(last - first for first, last, _ in spans) - sum(piece.last - piece.first for piece in pieces):
            notes.append(f"{left} frames at the ends of shots are left out: the VAE takes 1 + n · {self.vae.frames}")
        if empty := sum(first == last for first, last, _ in spans):
            notes.append(f"{empty} shots have no frame{f' at fps {e.fps:g}' if e.fps else ''} and are left out")
        if not pieces:
            raise ZooError(f"{row.name}: it has no shot with a frame")
        return Plan(row, source, size, rate, tuple(pieces), tuple(notes))

    def _parts(self, first: int, last: int, longest: int) -> Iterator[tuple[int, int]]:
        """Spans [first, last) of frames that the VAE takes: as few and as even as can be.

        Each has 1 + n · `vae.frames` frames. What is left over is at the end of the shot, not of each part.
        """
        parts = -(-(last - first) // longest)
        units = (last - first - parts) // self.vae.frames
        for part in range(parts):
            stop = first + 1 + self.vae.frames * (units * (part + 1) // parts - units * part // parts)
            yield first, stop
            first = stop

    def _footage(self, path: Path, source: str, decoding: Decoding) -> dict[str, Any]:
        """What a first pass over a file finds: the times of kept frames and where shots begin among them."""
        kept = self.encoding.folder / "cache" / f"{key_of('footage', source, asdict(decoding))}.json"
        try:
            found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            if {"times", "end", "starts", "rate", "notes"} <= found.keys():
                return found
        except (FileNotFoundError, ValueError, AttributeError):
            pass
        footage = read_footage(path, decoding, None)
        found = {
            "times": [round(time, 6) for time in footage.times],
            "end": footage.end,
            "starts": [bisect_left(footage.source, cut) for cut in footage.cuts],
            "rate": footage.rate,
            "notes": list(footage.notes),
        }
        write_atomically(kept, json.dumps(found))
        return found

    def attempt(self, row: Row, told: Callable[[int, int], object] = lambda *_: None) -> Film | None:
        """Encode what of a row is missing.

        Args:
            row: Of a manifest.
            told: Called with the frames that are encoded so far and those of the whole row.

        Returns:
            The row's film, or None where another process works on the same video.

        Raises:
            ModelError: if no row can be encoded, because the text encoder does not load.
            ZooError: if the row cannot be encoded.
            OSError: if the disk is full.
        """
        try:
            need_file(row.path)
            source = self.digests.file(row.path)
        except OSError as error:
            raise ZooError(f"it cannot be read: {error.strerror}") from error
        with self.claims.claim(source, wait=False) as mine:
            if not mine:
                return None
            plan = self.plan(row)
            # First, because they are quick: what is wrong with the text encoder is known before hours are spent.
            texts = {caption: self._text(caption) for caption in dict.fromkeys(row.texts())}
            self.latents.refresh()
            lost = sum(piece.key in self.latents.lost for piece in plan.pieces)
            total, done = sum(piece.last - piece.first for piece in plan.pieces), 0
            todo = {piece.first: piece for piece in plan.pieces if piece.key not in self.latents}
            done = total - sum(piece.last - piece.first for piece in todo.values())
            told(done, total)
            if todo:

                def encode(piece: Piece, frames: Frames) -> None:
                    nonlocal done
                    self._encode(plan, piece, frames)
                    done += piece.last - piece.first
                    told(done, total)

                decoding = Decoding(self.encoding.fps, plan.size, None)
                _cut(row.path, decoding, sorted(todo.values(), key=lambda piece: piece.first), encode)
        notes = [*plan.notes, f"{lost} shots were encoded again: their shard was cut short or removed" if lost else ""]
        cut = [self.texts[key].meta["shape"][0] for key, short in texts.values() if short]
        notes.append(f"{len(cut)} captions are longer than {cut[0]} tokens and cut there" if cut else "")
        return Film(
            line=row.line,
            name=row.name,
            source=plan.source,
            rate=plan.rate,
            caption=row.caption if row.caption in texts else "",
            text=texts[row.caption][0] if row.caption in texts else None,
            shots=tuple(
                FilmShot(
                    piece.key,
                    texts[piece.caption][0] if piece.caption in texts else None,
                    piece.caption if piece.caption in texts else "",
                    piece.start,
                    piece.end,
                )
                for piece in plan.pieces
            ),
            notes=tuple(filter(None, notes)),
        )

    def _encode(self, plan: Plan, piece: Piece, frames: Frames) -> None:
        video = torch.from_numpy(frames).to(self.device).permute(3, 0, 1, 2)[None].float().div_(127.5).sub_(1)
        latents = self.vae.encode(video)[0].to(DTYPES[self.encoding.dtype]).cpu()
        if not latents.isfinite().all():
            raise ZooError(
                f"{plan.row.name}: {self.vae.name} made latents that are not finite in {self.encoding.dtype}"
            )
        wanted = 1 + (piece.last - piece.first - 1) // self.vae.frames
        refuse(
            plan.row.name,
            [f"{self.vae.name} made {latents.shape[1]} latent frames of {len(frames)}, not {wanted}"]
            if latents.shape[1] != wanted
            else [],
        )
        about = {
            "shape": list(latents.shape),
            "video": plan.row.name,
            "source": plan.source,
            "start": piece.start,
            "end": piece.end,
            "rate": plan.rate,
            "size": list(plan.size),
            "caption": piece.caption or plan.row.caption,
        }
        self._latent_shards.add(piece.key, {"latents": latents}, about)

    def _text(self, caption: str) -> tuple[str, bool]:
        """The key of a caption, encoded if it is not there, and whether it was cut."""
        key = self.text_key(caption)
        with self.claims.claim(hashlib.sha256(key.encode()).hexdigest(), wait=True):
            if key not in self.texts.refresh():
                embeddings, cut = self.text.encode(caption)
                about = {"shape": list(embeddings.shape), "caption": caption, "cut": cut}
                self._text_shards.add(key, {"text": embeddings.to(DTYPES[self.encoding.dtype])}, about)
                self.texts.refresh()
        return key, bool(self.texts[key].meta["cut"])

    @cached_property
    def _latent_shards(self) -> Writer:
        return Writer(self.encoding.folder, "latents", self.encoding.shard_bytes)

    @cached_property
    def _text_shards(self) -> Writer:
        return Writer(self.encoding.folder, "text", self.encoding.shard_bytes)

    def finish(self) -> None:
        """End the shards that this process writes."""
        for name in ("_latent_shards", "_text_shards"):
            if name in vars(self):
                getattr(self, name).finish()


@dataclass(frozen=True)
class FilmShot:
    """A shot of an encoded film: the keys of its latents and text, its caption, its seconds in the video."""

    latents: str
    text: str | None
    caption: str
    start: float
    end: float


@dataclass(frozen=True)
class Film:
    """An encoded row: a line of `films.jsonl`.

    `source` is the digest of the video; `rate` frames a second; `text` the key of the film's caption; `notes` what was
    left out or cut.
    """

    line: int
    name: str
    source: str
    rate: float
    caption: str
    text: str | None
    shots: tuple[FilmShot, ...]
    notes: tuple[str, ...] = ()


def write_films(folder: Path, films: Sequence[Film]) -> Path:
    """Write the list of films that `LatentFilms` reads."""
    path = folder / "films.jsonl"
    write_atomically(path, "".join(json.dumps(asdict(film)) + "\n" for film in sorted(films, key=lambda x: x.line)))
    return path


class _Left(Exception):
    """Carries what ends a pass over a file before its end past those who read it."""


def _cut(path: Path, decoding: Decoding, pieces: Sequence[Piece], give: Callable[[Piece, Frames], object]) -> None:
    """Decode a file once and give the frames (F, H, W, 3) of each piece in turn; those of one are in memory."""
    waiting, number, clip = deque(pieces), -1, np.empty(0, np.uint8)

    def keep(frame: Frames) -> None:
        nonlocal number, clip
        number += 1
        piece = waiting[0]
        if not piece.first <= number < piece.last:
            return
        if number == piece.first:
            clip = np.empty((piece.last - piece.first, *frame.shape), np.uint8)
        clip[number - piece.first] = frame
        if number + 1 == piece.last:
            waiting.popleft()
            try:
                give(piece, clip)
            except OSError as error:  # of the disk that is written to, not of the file that is read
                raise _Left from error
            if not waiting:
                raise _Left

    try:
        read_footage(path, decoding, keep)
    except _Left as left:
        if left.__cause__ is not None:
            raise left.__cause__ from None
    if waiting:
        raise ZooError(f"{path}: it ended at frame {number + 1}, before a shot that it had when its cuts were found")


def _spans(row: Row, footage: Mapping[str, Any]) -> list[tuple[int, int, str]]:
    """Kept frames [first, last) of each shot, and its caption."""
    times, starts = footage["times"], footage["starts"]
    if row.timed:
        shots = row.shots or ()
        refuse(row.name, past_the_end(row, footage["end"]))
        begins = [bisect_left(times, (shot.start or 0.0) - ROUNDING) for shot in shots]
        ends = [bisect_left(times, (shot.end or 0.0) - ROUNDING) for shot in shots]
        return [(a, max(a, b), shot.caption) for a, b, shot in zip(begins, ends, shots, strict=True)]
    captions = [""] * len(starts) if row.shots is None else [shot.caption for shot in row.shots]
    if len(captions) != len(starts):
        where = ", ".join(f"{times[start]:.2f}" for start in starts[:10])
        raise ZooError(
            f"it has captions for {len(captions)} shots, but {len(starts)} were found, beginning at {where} s; give "
            "times, or change the captions, --detector or --threshold"
        )
    return list(zip(starts, [*starts[1:], len(times)], captions, strict=True))


def _nearest(length: int, unit: int) -> int:
    return max(unit, round(length / unit) * unit)
