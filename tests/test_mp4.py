"""MP4 files: what was written is read back, sizes are even, captions lie beside."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from lit_modules.mp4 import web_vtt, write_mp4
from sparse_zoo.errors import ZooError


def clips(height: int = 32, width: int = 48, channels: int = 3) -> list[torch.Tensor]:
    levels = torch.tensor([-0.8, 0.6])
    return [torch.full((6, channels, height, width), float(level)) for level in levels]


@pytest.mark.parametrize(("height", "width", "channels"), [(32, 48, 3), (33, 47, 3), (32, 48, 1)])
def test_frames_are_read_back_at_their_rate(tmp_path: Path, height: int, width: int, channels: int) -> None:
    path = write_mp4(tmp_path / "new" / "film.mp4", clips(height, width, channels), 12)
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.height % 2, stream.width % 2) == (0, 0)
        assert float(stream.average_rate) == 12
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
    assert len(frames) == 12
    assert frames[0].shape == (height + height % 2, width + width % 2, 3)
    for frame, level in ((frames[0], -0.8), (frames[-1], 0.6)):
        assert np.abs(frame.astype(float) - (level + 1) * 127.5).max() < 6
    assert not path.with_suffix(".vtt").exists()


def test_equal_films_are_equal_files(tmp_path: Path) -> None:
    """A moving pattern, of which x264 with its macroblock tree makes different files."""
    time, row, column = torch.meshgrid(torch.arange(9), torch.arange(64), torch.arange(96), indexing="ij")
    film = torch.stack([(2 * column + 9 * time) % 256, 3 * row % 256, (row + column) % 256], dim=1) / 127.5 - 1
    files = {write_mp4(tmp_path / f"{i}.mp4", [film], 16).read_bytes() for i in range(12)}
    assert len(files) == 1


def test_captions_are_cues_of_their_shots(tmp_path: Path) -> None:
    path = write_mp4(tmp_path / "film.mp4", clips(), 12, ["of the whole", "a < b &\nc", ""])
    assert path.with_suffix(".vtt").read_text() == (
        "WEBVTT\n\nNOTE of the whole\n\n0\n00:00:00.000 --> 00:00:00.500\na &lt; b &amp; c\n\n"
        "1\n00:00:00.500 --> 00:00:01.000\nof the whole\n"
    )


def test_long_films_have_hours() -> None:
    assert "01:01:01.500 --> 02:00:00.000" in web_vtt([3661.5, 3538.5], ["", "x", "y"])


def test_latents_are_no_film(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="1 or 3 channels"):
        write_mp4(tmp_path / "film.mp4", clips(channels=4), 12)
