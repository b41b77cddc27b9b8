"""Shards: WebDataset's format, an index that tells what is whole, and writers that are killed at any byte."""

import json
import os
import tarfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from safetensors.torch import load

from datamodules.shards import Index, Writer, finish_orphans, restore_indexes
from sparse_zoo.errors import ZooError


def tensors(seed: int, size: int = 40) -> dict[str, torch.Tensor]:
    return {"latents": torch.randn(4, size, generator=torch.Generator().manual_seed(seed)).bfloat16()}


def written(folder: Path, keys: range, **settings: Any) -> None:
    with Writer(folder, "latents", **settings) as writer:
        for i in keys:
            writer.add(f"{i:04x}", tensors(i), {"number": i})


def test_entries_are_read_back_bit_for_bit_from_several_shards(tmp_path: Path) -> None:
    written(tmp_path, range(9), most=6000)
    index = Index(tmp_path, "latents").refresh()
    assert len(list(tmp_path.glob("*.tar"))) > 2
    assert len(index) == 9
    for i in range(9):
        assert torch.equal(index.tensors(f"{i:04x}")["latents"], tensors(i)["latents"])
        assert index[f"{i:04x}"].meta == {"number": i}


def test_a_tar_has_two_members_an_entry_and_ends_as_tars_do(tmp_path: Path) -> None:
    written(tmp_path, range(3))
    with tarfile.open(tmp_path / "latents-00000.tar") as tar:
        assert tar.getnames() == [f"{i:04x}.{suffix}" for i in range(3) for suffix in ("json", "safetensors")]
        member: IO[bytes] | None = tar.extractfile("0001.safetensors")
        assert member is not None
        assert torch.equal(load(member.read())["latents"], tensors(1)["latents"])


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset", reason="needs the extra dev")
    written(tmp_path, range(7), most=6000)
    shards = sorted(map(str, tmp_path.glob("*.tar")))
    found = list(wds.WebDataset(shards, shardshuffle=False))
    assert [one["__key__"] for one in found] == [f"{i:04x}" for i in range(7)]
    for i, one in enumerate(found):
        assert json.loads(one["json"]) == {"number": i}
        assert torch.equal(load(one["safetensors"])["latents"], tensors(i)["latents"])


def killed(folder: Path, after: int, half: Callable[[Writer], object]) -> None:
    """A writer that dies without a word after some entries."""

    def run() -> None:
        writer = Writer(folder, "latents")
        for i in range(after):
            writer.add(f"{i:04x}", tensors(i), {"number": i})
        half(writer)
        os._exit(9)

    process = get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == 9


HALVES: dict[str, Callable[[Any], object]] = {
    "between entries": lambda _: None,
    "within the tar": lambda writer: (
        writer._tar.seek(writer._end),
        writer._tar.write(b"x" * 700),
        writer._tar.flush(),
    ),
    "within the index": lambda writer: (writer._index.write(b'{"key": "dead", "off'), writer._index.flush()),
}


@pytest.mark.parametrize("half", HALVES)
def test_a_killed_writer_loses_at_most_the_entry_in_progress(tmp_path: Path, half: str) -> None:
    killed(tmp_path, 3, HALVES[half])
    assert [path.name for path in tmp_path.glob("*.tar*")] == ["latents-00000.tar.part"]
    assert sorted(Index(tmp_path, "latents").refresh().entries) == ["0000", "0001", "0002"]
    written(tmp_path, range(3, 6))  # goes on with the same shard
    assert [path.name for path in tmp_path.glob("*.tar*")] == ["latents-00000.tar"]
    index = Index(tmp_path, "latents").refresh()
    assert sorted(index.entries) == [f"{i:04x}" for i in range(6)]
    assert all(torch.equal(index.tensors(f"{i:04x}")["latents"], tensors(i)["latents"]) for i in range(6))
    with tarfile.open(tmp_path / "latents-00000.tar") as tar:
        assert len(tar.getnames()) == 12


def test_orphans_are_ended_and_shards_that_are_written_are_left_alone(tmp_path: Path) -> None:
    killed(tmp_path, 2, HALVES["between entries"])
    with Writer(tmp_path, "latents") as first, Writer(tmp_path, "latents") as second:
        first.add("aaaa", tensors(1), {})
        second.add("bbbb", tensors(2), {})
        finish_orphans(tmp_path, "latents")
        assert len(list(tmp_path.glob("*.tar.part"))) == 2
    index = Index(tmp_path, "latents").refresh()
    assert sorted(index.entries) == ["0000", "0001", "aaaa", "bbbb"]


def test_index_takes_in_what_others_finish(tmp_path: Path) -> None:
    index = Index(tmp_path, "latents").refresh()
    with Writer(tmp_path, "latents") as writer:
        for i in range(3):
            writer.add(f"{i:04x}", tensors(i), {})
            assert len(index.refresh()) == i + 1
            assert torch.equal(index.tensors(f"{i:04x}")["latents"], tensors(i)["latents"])


def test_a_shard_cut_short_loses_its_last_entries_alone(tmp_path: Path) -> None:
    written(tmp_path, range(4))
    path = tmp_path / "latents-00000.tar"
    os.truncate(path, Index(tmp_path, "latents").refresh()["0002"].offset + 10)
    index = Index(tmp_path, "latents").refresh()
    assert sorted(index.entries) == ["0000", "0001"]
    assert index.lost == dict.fromkeys(("0002", "0003"), "latents-00000.tar is cut short")
    path.unlink()
    assert set(Index(tmp_path, "latents").refresh().lost.values()) == {"latents-00000.tar is missing"}
    written(tmp_path, range(4))
    index = Index(tmp_path, "latents").refresh()
    assert (len(index), index.lost) == (4, {})


@pytest.mark.parametrize(("suffix", "left"), [(".tar", 0), (".tar", 0.5), (".tar.part", 0)])
def test_a_lost_index_is_written_again_from_its_shard(tmp_path: Path, suffix: str, left: float) -> None:
    written(tmp_path, range(4))
    index, shard = tmp_path / "latents-00000.jsonl", tmp_path / "latents-00000.tar"
    before = index.read_bytes()
    if suffix == ".tar.part":  # as a kill leaves it, within an entry
        os.truncate(shard, Index(tmp_path, "latents").refresh()["0003"].offset + 10)
        shard.rename(tmp_path / "latents-00000.tar.part")
        before = b"".join(before.splitlines(keepends=True)[:3])
    if left:
        os.truncate(index, int(len(before) * left))
    else:
        index.unlink()
    (note,) = restore_indexes(tmp_path, "latents")
    assert f"{len(before.splitlines())} entries of latents-00000{suffix}" in note
    assert index.read_bytes() == before
    assert restore_indexes(tmp_path, "latents") == []
    written(tmp_path, range(4, 6))
    found = Index(tmp_path, "latents").refresh()
    for key in found.entries:
        assert torch.equal(found.tensors(key)["latents"], tensors(int(key, 16))["latents"])


def test_shards_that_are_whole_cut_or_empty_keep_their_index(tmp_path: Path) -> None:
    written(tmp_path, range(4))
    assert restore_indexes(tmp_path, "latents") == []
    os.truncate(tmp_path / "latents-00000.tar", 5000)
    assert restore_indexes(tmp_path, "latents") == []
    (tmp_path / "latents-00001.tar.part").touch()
    assert "0 entries" in restore_indexes(tmp_path, "latents")[0]
    written(tmp_path, range(4, 5))
    assert "0004" in Index(tmp_path, "latents").refresh()


def test_damaged_bytes_are_named(tmp_path: Path) -> None:
    written(tmp_path, range(2))
    entry = Index(tmp_path, "latents").refresh()["0001"]
    with (tmp_path / "latents-00000.tar").open("r+b") as file:
        file.seek(entry.offset + entry.size - 3)
        file.write(b"\0\1\2")
    index = Index(tmp_path, "latents").refresh()
    index.tensors("0000")
    with pytest.raises(ZooError, match=r"latents-00000.tar: the entry 0001 is damaged; delete the shard"):
        index.tensors("0001")


def test_a_full_disk_keeps_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, fsync, calls = Writer(tmp_path, "latents"), os.fsync, []

    def full(number: int) -> None:
        calls.append(number)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    writer.add("aaaa", tensors(0), {})
    writer.add("bbbb", tensors(1), {})
    with pytest.raises(OSError, match="No space left"):
        writer.add("cccc", tensors(2), {})
    monkeypatch.setattr(os, "fsync", fsync)
    writer.finish()
    assert sorted(Index(tmp_path, "latents").refresh().entries) == ["aaaa", "bbbb"]
    with Writer(tmp_path, "latents") as again:
        again.add("cccc", tensors(2), {})
    assert sorted(Index(tmp_path, "latents").refresh().entries) == ["aaaa", "bbbb", "cccc"]
    assert len(list(tmp_path.glob("*.tar"))) == 1
