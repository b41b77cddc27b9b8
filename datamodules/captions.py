"""Captions of videos: read from JSON and matched to the video files."""

from __future__ import annotations

import json
import os.path
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import normalize

from datamodules.discovery import listed, printable
from sparse_zoo.errors import ZooError, refuse

KEYS = ("caption", "shots")


@dataclass(frozen=True)
class Caption:
    """The text of a whole video and, where given, of each of its shots."""

    whole: str = ""
    shots: Sequence[str] | None = None

    def texts(self) -> list[str]:
        """The texts that are not blank."""
        return [text for text in (self.whole, *(self.shots or ())) if text.strip()]


@dataclass(frozen=True)
class Captions:
    """Captions by the name of their video, keys that match none, and lines about what was left out."""

    by_video: dict[str, Caption]
    unmatched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_captions(files: Sequence[Path], videos: Collection[str]) -> Captions:
    """Read `files` and match their keys to the names of `videos`.

    A key is a video's name, with or without its suffix, in any Unicode normal form, with "/" or a backslash between
    folders, and with or without a leading "./". Upper and lower case must agree.

    Raises:
        ZooError: For files that are not captions, keys that fit several videos, and videos that several keys fit.
    """
    given, notes = list[tuple[Path, str, Caption]](), list[str]()
    for path in files:
        entries, ignored = _read(path)
        given += [(path, key, caption) for key, caption in entries.items()]
        if ignored:
            notes.append(f"captions {path}: keys not read ({' and '.join(KEYS)} are): {listed(ignored)}")
    by_name, by_stem, by_case = (defaultdict[str, list[str]](list) for _ in range(3))
    for name in sorted(videos):
        by_name[_normal(name)].append(name)
        by_stem[os.path.splitext(_normal(name))[0]].append(name)
        by_case[_normal(name).casefold()].append(name)
        by_case[os.path.splitext(_normal(name))[0].casefold()].append(name)
    problems, unmatched, other_case = list[str](), list[str](), list[str]()
    taken: dict[str, tuple[Path, str]] = {}
    found: dict[str, Caption] = {}
    for path, key, caption in given:
        plain = _normal(key)
        fits = [key] if key in videos else by_name.get(plain) or by_stem.get(plain) or []
        if len(fits) > 1:
            problems.append(f"captions {path}: {key!r} fits several videos: {listed(fits)}; give the whole name")
        elif not fits:
            unmatched.append(key)
            near = by_case.get(plain.casefold())
            other_case += [f"{key} (is it {near[0]}? case must agree)"] if near else []
        elif fits[0] in taken:
            first, earlier = taken[fits[0]]
            problems.append(
                f"captions {path}: {key!r} is for the video {fits[0]!r}, as is {earlier!r} of {first}; keep one"
            )
        else:
            taken[fits[0]] = (path, key)
            found[fits[0]] = caption
    refuse("VideoFilms", problems)
    if unmatched:
        notes.append(f"{len(unmatched)} captions match no video: {listed(unmatched)}")
    if other_case:
        notes.append(f"captions that differ from a video's name in case alone: {listed(other_case)}")
    silent = [name for name in videos if name not in found or not found[name].texts()]
    if silent:
        notes.append(f"{len(silent)} of {len(videos)} videos have no caption: {listed(silent)}")
    return Captions(found, sorted(map(printable, unmatched)), notes)


def _normal(name: str) -> str:
    """A name in the form in which keys and files are compared."""
    return os.path.normpath(normalize("NFC", name).replace("\\", "/"))


def _read(path: Path) -> tuple[dict[str, Caption], set[str]]:
    """The entries of one file, and the unknown keys in them."""
    try:
        entries = json.loads(path.read_bytes(), object_pairs_hook=_distinct)  # in any UTF, byte-order mark or not
    except (OSError, ValueError, RecursionError) as error:
        raise ZooError(f"captions {path}: it cannot be read: {error}") from error
    if not isinstance(entries, Mapping):
        raise ZooError(f"captions {path}: it must be an object of videos' names, got {json.dumps(entries)[:80]}")
    captions, ignored, problems = dict[str, Caption](), set[str](), list[str]()
    for name, entry in entries.items():
        whole, shots = (entry.get("caption", ""), entry.get("shots")) if isinstance(entry, Mapping) else (None, None)
        texts = shots is None or (isinstance(shots, list) and all(isinstance(shot, str) for shot in shots))
        if isinstance(whole, str) and texts:
            captions[name] = Caption(whole, shots)
            ignored |= entry.keys() - set(KEYS)
        else:
            problems.append(
                f'{printable(name)}: must be {{"caption": "text", "shots": ["text", ...]}}, '
                f"got {json.dumps(entry)[:80]}"
            )
    refuse(f"captions {path}", problems)
    return captions, ignored


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is given twice")
        found[key] = value
    return found
