"""Arrays in a run's folder, as `.npz` files: data for pictures, which are drawn when they are shown.

A run folder of somebody else is data: reading unpickles nothing, allocates no more than a file of its size can hold,
and follows no link out of the folder.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.tracking.schema import find_file
from experiments.tracking.store import atomic_write

MAX_FILE_BYTES = 1 << 23  # 8 MiB
MAX_ARRAY_BYTES = 1 << 27  # 128 MiB, of the arrays of a file together


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Write named arrays as a compressed `.npz` file and return its path."""
    with atomic_write(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    return path


def read_arrays(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Read the named arrays of a `.npz` file.

    Args:
        folder: The run's folder.
        name: The file's name in it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file may not or cannot be read; the message is one line.
    """
    path = find_file(folder, name)
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"it has {size} bytes; at most {MAX_FILE_BYTES} are read")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            total = sum(member.file_size for member in members)
            if total > MAX_ARRAY_BYTES:
                raise ValueError(f"its arrays have {total} bytes; at most {MAX_ARRAY_BYTES} are read")
            return {member.filename.removesuffix(".npy"): _read_array(archive, member) for member in members}
    except (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError("it cannot be read as an .npz file") from error


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """Read one array; `np.load` would allocate whatever size the header claims."""
    with archive.open(member) as file:
        try:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("another version of the format")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        except ValueError as error:
            raise ValueError(f"its array {member.filename!a} has a header that cannot be read") from error
        count = math.prod(shape)
        if dtype.hasobject or min(shape, default=0) < 0 or count * dtype.itemsize > member.file_size:
            raise ValueError(f"its array {member.filename!a} is not an array of numbers of the size that it states")
        data = file.read(count * dtype.itemsize)
    return np.frombuffer(data, dtype, count).reshape(shape, order="F" if fortran else "C")
