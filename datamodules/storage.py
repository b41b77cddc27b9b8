"""Where files lie: in a folder of this machine, or at an address that fsspec reads, such as https:// or s3://."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from datamodules.discovery import resolve
from sparse_zoo.errors import ZooError, refuse


class Storage(Protocol):
    """Files by name, read whole or in part; FileNotFoundError where there is no such file."""

    def names(self, start: str, end: str) -> list[str]:
        """The files whose names start and end like this, sorted."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file."""
        ...

    def lines(self, name: str, start: int = 0) -> Iterator[bytes]:
        """The lines of a file from byte `start` on, with their ends."""
        ...

    def read(self, name: str, start: int, size: int) -> bytes:
        """`size` bytes of a file from byte `start` on; fewer where it ends."""
        ...


class Folder:
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def names(self, start: str, end: str) -> list[str]:
        """See `Storage`."""
        return sorted(path.name for path in self.path.glob(f"{start}*{end}"))

    def size(self, name: str) -> int:
        """See `Storage`."""
        return (self.path / name).stat().st_size

    def lines(self, name: str, start: int = 0) -> Iterator[bytes]:
        """See `Storage`."""
        with (self.path / name).open("rb") as file:
            file.seek(start)
            yield from file

    def read(self, name: str, start: int, size: int) -> bytes:
        """See `Storage`."""
        with (self.path / name).open("rb") as file:
            file.seek(start)
            return file.read(size)


class Address:
    """What fsspec reads at a URL: only the bytes that are asked for are fetched, and none are kept on the disk."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            _ = self._files
        except (ImportError, ValueError) as error:
            raise ZooError(f"{url}: {error}") from error

    def __str__(self) -> str:
        return self.url

    @property
    def _files(self) -> Any:
        """fsspec keeps one for each process: after a fork it makes a new one."""
        from fsspec.core import url_to_fs

        return url_to_fs(self.url)[0]

    def names(self, start: str, end: str) -> list[str]:
        """See `Storage`."""
        found = self._files.ls(self.url, detail=False)
        names = {str(path).rstrip("/").rpartition("/")[2] for path in found}
        return sorted(name for name in names if name.startswith(start) and name.endswith(end))

    def size(self, name: str) -> int:
        """See `Storage`."""
        return int(self._files.size(f"{self.url}/{name}"))

    def lines(self, name: str, start: int = 0) -> Iterator[bytes]:
        """See `Storage`."""
        if self.size(name) > start:
            yield from self._files.cat_file(f"{self.url}/{name}", start=start).splitlines(keepends=True)

    def read(self, name: str, start: int, size: int) -> bytes:
        """See `Storage`."""
        found: bytes = self._files.cat_file(f"{self.url}/{name}", start=start, end=start + size)
        refuse(
            self.url, ["its server sends whole files alone; it must answer HTTP range requests"][: len(found) > size]
        )
        return found


def storage(place: str | Path) -> Folder | Address:
    """Where the files of a folder, or of an address with "://", are read."""
    return Address(str(place)) if "://" in str(place) else Folder(resolve(place))


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, also if several processes write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def need(what: str, there: Storage, names: tuple[str, ...], why: str) -> None:
    """Raise `ZooError`, with `why`, for each of the files that is not there."""
    missing = []
    for name in names:
        try:
            there.size(name)
        except OSError as error:
            cause = error.__cause__ or error  # to fsspec, what a server does not answer for is not there
            absent = isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404
            reason = f"is missing; {why}" if absent else f"cannot be read: {cause}"
            missing.append(f"{name} {' '.join(reason.split())}")
    refuse(what, missing)
