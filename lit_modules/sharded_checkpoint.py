"""Reads checkpoints of torch.distributed without running what they name: one may be somebody else's.

The metadata of such a checkpoint is a pickle, and so is each of its values that is no tensor.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as kinds
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from typing_extensions import override

_NEEDED: Iterable[Any] = (
    Metadata,
    kinds.MetadataIndex,
    kinds.StorageMeta,
    kinds.TensorStorageMetadata,
    kinds.TensorProperties,
    kinds.ChunkStorageMetadata,
    kinds.BytesStorageMetadata,
    kinds._MEM_FORMAT_ENCODING,
    _StorageInfo,
    torch.Size,
    torch.serialization._get_layout,
    type(Path()),
)
_ALLOWED = {(one.__module__, one.__qualname__): one for one in _NEEDED}


def read_metadata(path: Path) -> Metadata:
    """What a sharded checkpoint says of itself.

    Raises:
        ValueError: If it is damaged, names code to be run, or a file of it is cut short; with the reason.
    """
    metadata = _Reader(path).read_metadata()
    for info in (metadata.storage_data or {}).values():
        file = path / info.relative_path
        if not file.is_file() or file.stat().st_size < info.offset + info.length:
            raise ValueError(f"{info.relative_path} in it is {'cut short' if file.is_file() else 'missing'}")
    return metadata


def load_shards(tensors: dict[str, Any], path: Path) -> None:
    """Fill in nested dicts of tensors and plain values, on every rank its own shards, from a sharded checkpoint.

    Raises:
        ValueError: If it is damaged, lacks what is asked for, or names code to be run; with the reason.
    """
    try:
        load(tensors, storage_reader=_Reader(path), planner=_Planner())
    except CheckpointException as error:  # no Exception, so that nobody would record it
        reasons = dict.fromkeys(str(failure[0]).partition("\n")[0] for failure in error.failures.values())
        raise ValueError(f"checkpoint {path}: {'; '.join(reasons)}") from error


class _Unpickler(pickle.Unpickler):
    """Knows the classes of a checkpoint's metadata, and no others."""

    @override
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        named = getattr(torch, global_name, None) if module_name == "torch" else None
        if isinstance(named, torch.dtype):
            return named
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise ValueError(f"would run code when loaded ({module_name}.{global_name}), so it is refused") from None


class _Reader(FileSystemReader):
    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError("its metadata is damaged")
        metadata.storage_meta = metadata.storage_meta or kinds.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # refuses what the parent's own loading would run
        value.seek(0)
        super().load_bytes(read_item, value)
