"""Films as MP4 files that browsers play, with their captions beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_zoo.errors import refuse


def write_mp4(path: Path, clips: Iterable[Tensor], rate: float, captions: Sequence[str] = ()) -> Path:
    """Write one film as H.264, 4:2:0, and its captions, if any is not blank, as WebVTT beside it.

    Clips are taken one after the other, so that a generator of them may be longer than memory. Equal films are equal
    files.

    Args:
        path: Of the MP4; its folder is made. The captions have the suffix .vtt.
        clips: One a shot, (F, C, H, W) in [-1, 1], C 1 or 3, all of one H and W; odd ones gain a row or column. At
            least one.
        rate: Frames a second.
        captions: The film's, then each shot's; or none.

    Returns:
        The path.

    Raises:
        ZooError: for clips that are no film.
    """
    refuse(path.name, [f"rate must be above 0, got {rate}"] if rate <= 0 else [])
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lengths = [frames / rate for frames in _write_frames(path, clips, rate)]
    except BaseException:  # an interrupt too: a film without its end must not stay; the error is raised again
        path.unlink(missing_ok=True)
        raise
    if any(text.strip() for text in captions):
        path.with_suffix(".vtt").write_text(web_vtt(lengths, captions), encoding="utf-8")
    return path


def _write_frames(path: Path, clips: Iterable[Tensor], rate: float) -> list[int]:
    """Write the frames of all clips; how many each has."""
    import av  # here: only videos need it

    rest = iter(clips)
    first = next(rest)
    shape, lengths = first.shape[1:], list[int]()
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as file:
        # With its macroblock tree, which makes smaller files, x264 makes different ones of equal films.
        same = {"x264-params": "mbtree=0"}
        stream = file.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001), options=same)
        _, height, width = shape
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        for clip in chain([first], rest):
            fits = clip.shape[1:] == shape and shape[0] in (1, 3)
            got = f"{tuple(clip.shape[1:])} after {tuple(shape)}" if lengths else f"{tuple(shape)}"
            refuse(path.name, [] if fits else [f"clips must be of one size and 1 or 3 channels, got {got}"])
            for frame in clip.detach():
                picture = F.pad(frame[None].float().cpu(), (0, width % 2, 0, height % 2), mode="replicate")[0]
                pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(3, -1, -1)
                array = pixels.permute(1, 2, 0).contiguous().numpy()
                file.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            lengths.append(len(clip))
        file.mux(stream.encode())
    return lengths


def web_vtt(lengths: Sequence[float], captions: Sequence[str]) -> str:
    """WebVTT with a cue a shot.

    Args:
        lengths: Seconds of each shot.
        captions: The film's, which goes into a note at the top, then each shot's.

    Returns:
        The text of the file.
    """
    film, *shots = captions
    parts = ["WEBVTT"] + ([f"NOTE {_line(film)}"] if film.strip() else [])
    start = 0.0
    for number, (length, text) in enumerate(zip(lengths, shots, strict=True)):
        shown = text if text.strip() else film
        if shown.strip():
            parts.append(f"{number}\n{_clock(start)} --> {_clock(start + length)}\n{_line(shown)}")
        start += length
    return "\n\n".join(parts) + "\n"


def _line(text: str) -> str:
    """One line, in which nothing is markup."""
    plain = " ".join(text.split())
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _clock(seconds: float) -> str:
    thousandths = round(seconds * 1000)
    minutes, rest = divmod(thousandths, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}.{rest % 1000:03d}"
