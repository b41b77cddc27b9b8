"""Tar shards that WebDataset reads, each with an index beside it for random access; torch and safetensors alone.

A folder holds shards of one or more kinds: `latents-00000.tar` with `latents-00000.jsonl`, `text-00000.tar`, and so on.
An entry is two members of a tar, `<key>.json` (what it is) and `<key>.safetensors` (its tensors), and one line of the
index. While a shard is written it is called `.tar.part` and its writer holds a lock on the index. An entry counts once
its line is there, and the line is written after the bytes are on the disk. So a killed writer loses the entry that it
was writing: whoever opens the shard next cuts the tar and the index back to the last whole entry, and goes on. An index
that is lost is written again from its shard.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from zlib import crc32

from safetensors.torch import load, save
from torch import Tensor

from datamodules.storage import storage, write_atomically
from sparse_zoo.errors import ZooError

END = b"\0" * (2 * tarfile.BLOCKSIZE)  # of an archive
SHARD_BYTES = 2**30


@dataclass(frozen=True)
class Entry:
    """Where the tensors of a key lie: `size` bytes at `offset` of `shard` (its name without suffix)."""

    key: str
    shard: str
    offset: int
    size: int
    crc32: int
    meta: dict[str, Any]


class Index:
    """The entries of one kind in a folder, by key; `refresh` takes in what any process has finished since.

    Args:
        place: The folder where the shards lie, or an address that fsspec reads.
        kind: "latents" or "text".
    """

    def __init__(self, place: Path | str, kind: str) -> None:
        self.files, self.kind = storage(place), kind
        self.entries: dict[str, Entry] = {}
        self.lost: dict[str, str] = {}
        """Key -> why an entry that the index names is not there: its shard was cut short or removed."""
        self._read: dict[str, int] = {}  # bytes of each index that were taken in
        self._whole: set[str] = set()  # shards that were finished when they were looked for

    def refresh(self) -> Index:
        """Read what is new; entries are kept in memory, tensors are not."""
        for name in self.files.names(f"{self.kind}-", ".jsonl"):
            before, shard = self._read.get(name, 0), name.removesuffix(".jsonl")
            try:
                if self.files.size(name) == before:
                    continue
                tar = self._tar(shard)
                there = self.files.size(tar)
            except FileNotFoundError:
                tar, there = f"{shard}.tar", 0
            for entry, stop in _entries(self.files.lines(name, before), shard, before):
                self._read[name] = stop
                if entry.offset + entry.size > there:
                    missing = "is cut short" if there else "is missing"
                    self.lost.setdefault(entry.key, f"{tar} {missing}")
                else:
                    self.entries.setdefault(entry.key, entry)
        for key in self.lost.keys() & self.entries.keys():  # written again since
            del self.lost[key]
        return self

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def __getitem__(self, key: str) -> Entry:
        return self.entries[key]

    def __len__(self) -> int:
        return len(self.entries)

    def tensors(self, key: str) -> dict[str, Tensor]:
        """The tensors of a key, on the CPU.

        Raises:
            ZooError: if the bytes that are read are not those that were written.
        """
        entry = self.entries[key]
        data = self.files.read(self._tar(entry.shard), entry.offset, entry.size)
        if len(data) != entry.size or crc32(data) != entry.crc32:
            raise ZooError(
                f"{self.files}/{entry.shard}.tar: the entry {key} is damaged; delete the shard and its .jsonl, and "
                "give the command zoo encode again, which encodes what was in it"
            )
        return load(data)

    def _tar(self, shard: str) -> str:
        """The name of a shard's file, finished or being written; FileNotFoundError where there is none."""
        if shard not in self._whole:
            try:
                self.files.size(f"{shard}.tar")
            except FileNotFoundError:
                self.files.size(f"{shard}.tar.part")
                return f"{shard}.tar.part"
            self._whole.add(shard)
        return f"{shard}.tar"


def _entries(lines: Iterable[bytes], shard: str, start: int = 0) -> Iterator[tuple[Entry, int]]:
    """The entries of an index from byte `start` on, each with where its line ends; a half-written last line is none."""
    for line in lines:
        start += len(line)
        if not line.endswith(b"\n"):
            return
        with suppress(ValueError, TypeError):
            yield Entry(shard=shard, **json.loads(line)), start


class Writer:
    """Appends entries to shards of one kind; each process has its own, and they share a folder.

    Args:
        folder: Where the shards lie.
        kind: "latents" or "text".
        most: Bytes at which a shard is finished and the next one begun.
    """

    def __init__(self, folder: Path, kind: str, most: int = SHARD_BYTES) -> None:
        self.folder, self.kind, self.most = folder, kind, most
        self._tar: io.BufferedRandom | None = None
        self._index: io.BufferedRandom | None = None
        self._name = ""
        self._end = 0  # of the last whole entry in the tar

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def add(self, key: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Write one entry; when this returns, it is on the disk.

        Args:
            key: Without a dot or slash, for a member's name up to its first dot is what WebDataset groups by.
            tensors: By name.
            meta: Ready for JSON; also in the index.

        Raises:
            OSError: if the disk takes no more. What was finished before stays.
        """
        if self._tar is None or self._index is None:
            self._open()
        assert self._tar is not None
        assert self._index is not None
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        about = _member(f"{key}.json", json.dumps(meta).encode())
        member = _member(f"{key}.safetensors", data)
        entry = Entry(key, self._name, self._end + len(about) + tarfile.BLOCKSIZE, len(data), crc32(data), dict(meta))
        try:
            self._tar.seek(self._end)
            self._tar.write(about + member)
            _sync(self._tar)
            self._index.write(_line(entry).encode())
            _sync(self._index)
        except OSError:
            self._close()  # as a kill would leave it: whoever opens it next cuts it back
            raise
        self._end += len(about) + len(member)
        if self._end >= self.most:
            self.finish()

    def finish(self) -> None:
        """End the shard that is being written, if any: from now on it is a `.tar`."""
        if self._tar is None or self._index is None:
            return
        try:
            if self._end:
                self._tar.seek(self._end)
                self._tar.write(END)
                _sync(self._tar)
                os.replace(self._tar.name, self.folder / f"{self._name}.tar")
            else:
                os.unlink(self._tar.name)
                os.unlink(self._index.name)
        finally:
            self._close()

    def _close(self) -> None:
        for file in (self._tar, self._index):
            if file is not None:
                with suppress(OSError):  # what did not fit on the disk is still in the buffer
                    file.close()  # which also gives up the lock
        self._tar = self._index = None

    def _open(self) -> None:
        """Go on with a shard that a killed writer left, or begin a new one."""
        for part in sorted(self.folder.glob(f"{self.kind}-*.tar.part")):
            if self._adopt(part):
                return
        names = [path.name.partition(".")[0] for path in self.folder.glob(f"{self.kind}-*")]
        number = max((int(name.rpartition("-")[2]) for name in names), default=-1) + 1
        while True:
            self._name = f"{self.kind}-{number:05d}"
            try:  # the index is the claim: it is never renamed
                index = (self.folder / f"{self._name}.jsonl").open("x+b")
            except FileExistsError:
                number += 1
                continue
            fcntl.flock(index, fcntl.LOCK_EX)
            self._index, self._tar, self._end = index, (self.folder / f"{self._name}.tar.part").open("w+b"), 0
            return

    def _adopt(self, part: Path) -> bool:
        """Take over a shard whose writer is gone."""
        name = part.name.partition(".")[0]
        try:
            index = (self.folder / f"{name}.jsonl").open("r+b")
        except FileNotFoundError:  # see `restore_indexes`
            return False
        try:
            fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            tar = part.open("r+b")
        except (BlockingIOError, FileNotFoundError):  # it is being written, or was finished meanwhile
            index.close()
            return False
        there, line, end = part.stat().st_size, 0, 0
        for entry, stop in _entries(index, name):
            if _padded(entry.offset + entry.size) > there:
                break
            line, end = stop, _padded(entry.offset + entry.size)
        index.truncate(line)
        index.seek(line)
        tar.truncate(end)
        self._name, self._index, self._tar, self._end = name, index, tar, end
        return True


def finish_orphans(folder: Path, kind: str) -> None:
    """End every shard whose writer is gone."""
    for part in sorted(folder.glob(f"{kind}-*.tar.part")):
        writer = Writer(folder, kind)
        if writer._adopt(part):
            writer.finish()


def restore_indexes(folder: Path, kind: str) -> list[str]:
    """Write the index of each shard that has none, and of each finished one whose index ends before it, from its tar.

    One process at a time may do so.

    Returns:
        A line on each.
    """
    notes = []
    for tar in sorted(folder.glob(f"{kind}-*.tar*")):
        name = tar.name.partition(".")[0]
        index = folder / f"{name}.jsonl"
        if index.exists():
            with index.open("rb") as lines:
                end = max((_padded(entry.offset + entry.size) for entry, _ in _entries(lines, name)), default=0)
            if tar.suffix == ".part" or end + len(END) >= tar.stat().st_size:
                continue
        found = list(_members(tar, name))
        write_atomically(index, "".join(_line(entry) for entry in found))
        notes.append(f"{index} was missing or cut short: it was written again from {len(found)} entries of {tar.name}")
    return notes


def _members(tar: Path, shard: str) -> Iterator[Entry]:
    """The whole entries of a tar."""
    about: dict[str, Any] = {}
    with suppress(tarfile.ReadError), tarfile.open(tar) as file:
        for member in file:
            key, _, suffix = member.name.partition(".")
            data = opened.read() if (opened := file.extractfile(member)) else b""
            if suffix == "json":
                with suppress(ValueError):
                    about[key] = json.loads(data)
            elif suffix == "safetensors" and key in about and len(data) == member.size:
                yield Entry(key, shard, member.offset_data, member.size, crc32(data), about[key])


def _line(entry: Entry) -> str:
    """An entry's line of the index."""
    return json.dumps({name: value for name, value in asdict(entry).items() if name != "shard"}) + "\n"


def _member(name: str, data: bytes) -> bytes:
    """One member of a tar: header, data and padding."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + b"\0" * (_padded(len(data)) - len(data))


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _sync(file: io.BufferedRandom) -> None:
    file.flush()
    os.fsync(file.fileno())
