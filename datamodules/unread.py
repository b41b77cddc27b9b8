"""What lies behind the end of a video file's recording: joined files, of which players read the first only."""

from __future__ import annotations

from collections.abc import Callable
from mmap import ACCESS_READ, mmap
from pathlib import Path

# How files begin that players stop reading where the next one begins: Matroska and WebM, MP4 and QuickTime (after the
# length of the box), Flash video, ASF and WMV, IVF, RealMedia.
_HEADS = (
    b"\x1aE\xdf\xa3",
    b"ftyp",
    b"FLV\x01",
    bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"),
    b"DKIF",
    b".RMF",
)
# Formats without a length of their own end with their last packet, but for indexes, sound and padding.
_TRAILER = (0.1, 4096)  # share of the file, bytes


def unread(path: Path, read: int) -> str | None:
    """Describe what a demuxer left unread at the end of a file.

    Args:
        path: The file.
        read: Where the last packet that was read ends, in bytes.

    Returns:
        A line with the share of the file that was not read, or None where everything was.
    """
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        size = len(data)
        joint = min((at for head in _HEADS if (at := data.find(head, max(read, 16))) >= 0), default=None)
        if joint is not None and any(head in data[:16] for head in _HEADS):
            share = f"{1 - joint / size:.0%}"
            return f"the last {share} of the file is another recording, joined to the first, and not read: split them"
        end = _end(data)
        if end is None:
            end = read if size - read > max(_TRAILER[0] * size, _TRAILER[1]) else size
        # Some recorders reserve space that they do not use.
        if end < read or not data[end:].strip(b"\0"):
            return None
        return f"the last {1 - end / size:.1%} of the file follows the end of the recording and is not read"


def _end(data: mmap) -> int | None:
    """Where the recording ends by the lengths in its format's own headers; None for a format without them."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return _walk(data, _box)
    if data[:4] == b"RIFF":
        return _walk(data, _riff)
    if data[:4] == b"\x1aE\xdf\xa3":
        return _walk(data, _element)
    if data[:4] == b"DKIF":
        return _walk(data, _frame)
    return None


def _walk(data: mmap, length: Callable[[mmap, int], int | None]) -> int:
    """Go from one top-level element to the next, until what lies there is none."""
    at = 0
    while at < len(data) and (step := length(data, at)):
        at += step
    return min(at, len(data))  # one that was cut short promises more than there is


def _box(data: mmap, at: int) -> int | None:
    """Length of the box of an MP4 or QuickTime file (ISO/IEC 14496-12, 4.2)."""
    size, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
    if not kind.isalnum():
        return None
    if size == 1:
        size = int.from_bytes(data[at + 8 : at + 16])
    return size if size >= 8 else len(data) - at if size == 0 else None


def _riff(data: mmap, at: int) -> int | None:
    """Length of a list of an AVI file, which may have several of up to a gigabyte (OpenDML)."""
    if data[at : at + 4] not in (b"RIFF", b"JUNK", b"idx1"):
        return None
    size = int.from_bytes(data[at + 4 : at + 8], "little")
    # What streams leave 0 or at its largest has no end of its own.
    return 8 + size + size % 2 if 0 < size < 0xFFFFFFFF else len(data) - at


def _element(data: mmap, at: int) -> int | None:
    """Length of an EBML header, a segment, or a void of a Matroska file (RFC 8794)."""
    name = next((n for n in (b"\x1aE\xdf\xa3", b"\x18S\x80g", b"\xec") if data[at : at + len(n)] == n), None)
    start = at + len(name or b"")
    if name is None or start >= len(data) or not data[start]:
        return None
    width = 9 - data[start].bit_length()
    size = int.from_bytes(data[start : start + width]) & ((1 << 7 * width) - 1)
    unknown = size == (1 << 7 * width) - 1
    return len(data) - at if unknown else start + width + size - at


def _frame(data: mmap, at: int) -> int | None:
    """Length of the header or of a frame of an IVF file; a frame that is not whole is none."""
    if at == 0:
        return int.from_bytes(data[6:8], "little")
    length = 12 + int.from_bytes(data[at : at + 4], "little")
    return length if at + length <= len(data) else None
