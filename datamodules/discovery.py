"""The video files of a folder, and what in it is left out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sparse_zoo.errors import ZooError, refuse

SUFFIXES = frozenset(
    [
        ".3g2",
        ".3gp",
        ".3gpp",
        ".amv",
        ".apng",
        ".asf",
        ".avi",
        ".divx",
        ".dv",
        ".f4v",
        ".flv",
        ".gif",
        ".gxf",
        ".h264",
        ".h265",
        ".hevc",
        ".ivf",
        ".m1v",
        ".m2t",
        ".m2ts",
        ".m2v",
        ".m4v",
        ".mj2",
        ".mjpeg",
        ".mjpg",
        ".mk3d",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpe",
        ".mpeg",
        ".mpg",
        ".mpv",
        ".mts",
        ".mxf",
        ".nut",
        ".ogm",
        ".ogv",
        ".qt",
        ".rm",
        ".rmvb",
        ".tod",
        ".trp",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
        ".wtv",
        ".y4m",
    ]
)
_ARCHIVE_LITTER = "__MACOSX"  # macOS puts a shadow of every file there when it packs an archive
_SHOWN = 5  # names in a line; the others are counted


@dataclass(frozen=True)
class Discovery:
    """Video files by name, which is their path inside the given folder, and lines about what was left out."""

    files: dict[str, Path]
    notes: list[str]


def resolve(place: str | Path) -> Path:
    """A path; "package:name/inside" is a path inside an installed package, which is found but not imported."""
    if not str(place).startswith("package:"):
        try:
            return Path(place).expanduser()
        except RuntimeError as error:
            raise ZooError(f"{place}: {error}; write the whole path") from error
    name, _, inside = str(place).removeprefix("package:").partition("/")
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ZooError(f"{place}: no package {name!r} is installed")
    return Path(next(iter(spec.submodule_search_locations))) / inside


def printable(name: str) -> str:
    """A file's name as text that every screen and encoding can show, with odd characters as backslash escapes."""
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape", "surrogatepass").decode("ascii") for sign in name
    )


def listed(names: Iterable[str]) -> str:
    """The first few names in order, and the number of further names."""
    ordered = sorted(names)
    more = len(ordered) - _SHOWN
    return ", ".join(map(printable, ordered[:_SHOWN])) + (f" and {more} more" if more > 0 else "")


def find_videos(places: Sequence[str], used: Iterable[Path] = ()) -> Discovery:
    """The videos in `places` (folders, searched recursively, or files).

    A linked folder is searched like any other, but each folder once. Hidden files and folders are left out, as are
    files without a video suffix; `used` are files of the latter kind that serve another purpose and are not reported.

    Raises:
        ZooError: For every place that is missing or without a video, and for names that two videos share.
    """
    files: dict[str, Path] = {}
    notes: list[str] = []
    problems: list[str] = []
    for place in places:
        path = resolve(place)
        if path.is_dir():
            named, left_out = _search(path, {file.resolve() for file in used})
            notes += [f"{place}: {line}" for line in left_out]
            if not named:
                told = "".join(f"; {line}" for line in left_out)
                suffixes = ", ".join(sorted(SUFFIXES))
                problems.append(f"{place}: no file in this folder ends with one of {suffixes}{told}")
        else:
            named = {printable(path.name): path}
            if not path.is_file():
                what = "it is neither a folder nor a regular file"
                problems.append(f"{place}: {what if path.exists() else 'there is no such folder or file'}")
        problems += [
            f"two videos are called {name!r}: {files[name]} and {named[name]}" for name in named.keys() & files
        ]
        files |= named
    refuse("VideoFilms", problems)
    return Discovery(files, notes)


def _search(root: Path, used: set[Path]) -> tuple[dict[str, Path], list[str]]:
    hidden, others, again, unreadable = list[str](), list[str](), list[str](), list[str]()
    files: dict[str, Path] = {}
    seen: set[tuple[int, int]] = set()
    folders = deque([root])
    while folders:
        folder = folders.popleft()
        inside = folder.relative_to(root).as_posix()
        try:
            stat = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            unreadable.append(f"{inside} ({error.strerror})")
            continue
        if (stat.st_dev, stat.st_ino) in seen:
            again.append(inside)
            continue
        seen.add((stat.st_dev, stat.st_ino))
        real = list[Path]()
        for entry in entries:
            path = Path(entry.path)
            name = path.relative_to(root).as_posix()
            if entry.name.startswith(".") or entry.name == _ARCHIVE_LITTER:
                hidden.append(name)
            elif path.is_dir():
                # Links come last, so that a folder that is also linked keeps its own name.
                (folders if entry.is_symlink() else real).append(path)
            elif not path.exists():
                unreadable.append(f"{name} (a link to nothing)")
            elif path.suffix.lower() in SUFFIXES:
                if path.is_file():
                    files[printable(name)] = path
                else:  # to open a pipe would wait for ever
                    unreadable.append(f"{name} (not a regular file)")
            elif path.resolve() not in used:
                others.append(name)
        folders.extendleft(reversed(real))
    lines = (
        (hidden, "hidden, left out"),
        (others, "not taken, because the suffix is not a video's"),
        (again, "linked folders left out, because they were searched already"),
        (unreadable, "cannot be read"),
    )
    return dict(sorted(files.items())), [f"{len(names)} {what}: {listed(names)}" for names, what in lines if names]
