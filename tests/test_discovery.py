"""Nothing in a folder is left out without a line that says so."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_videos import SMALL, three_shots

from datamodules import VideoFilms
from datamodules.decoding import Decoding, decode
from datamodules.discovery import find_videos, listed, printable, resolve
from sparse_zoo.errors import ZooError

NOBODY = 65534  # a user id without rights of its own


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_hidden_files_and_archive_litter_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    three_shots(tmp_path / "clip.mp4")
    for name in (".DS_Store", "._clip.mp4", "__MACOSX/._clip.mp4", "__MACOSX/clip.mp4", ".thumbs/clip.mp4"):
        touch(tmp_path / name)
    data = VideoFilms(str(tmp_path), **SMALL)
    with caplog.at_level(logging.WARNING):
        data.setup()
    assert list(data.videos) == ["clip.mp4"]
    (line,) = [line for line in data.summary()["notes"] if "hidden" in line]
    assert line.endswith("4 hidden, left out: .DS_Store, ._clip.mp4, .thumbs, __MACOSX")
    assert f"data: {line}" in caplog.messages


def test_files_of_every_video_suffix_in_any_case_are_found(tmp_path: Path) -> None:
    suffixes = (
        "3gp",
        "MTS",
        "gif",
        "M4V",
        "webm",
        "mkv",
        "AVI",
        "ts",
        "mov",
        "mpg",
        "wmv",
        "OGV",
        "M2TS",
        "vob",
        "3G2",
    )
    names = [f"a.{suffix}" for suffix in suffixes]
    for name in names:
        touch(tmp_path / name)
    assert list(find_videos([str(tmp_path)]).files) == sorted(names)


def test_other_files_are_counted_and_named(tmp_path: Path) -> None:
    for name in ("a.mp4", "notes.txt", "b.mp4.part", "noend", "sub/c.jpg", "sub/d.jpg", "e.mp3", "captions.json"):
        touch(tmp_path / name)
    found = find_videos([str(tmp_path)], [tmp_path / "captions.json"])
    assert list(found.files) == ["a.mp4"]
    assert found.notes == [
        f"{tmp_path}: 6 not taken, because the suffix is not a video's: "
        "b.mp4.part, e.mp3, noend, notes.txt, sub/c.jpg and 1 more"
    ]


def test_linked_folders_are_searched_once(tmp_path: Path) -> None:
    outside, data = tmp_path / "outside", tmp_path / "data"
    touch(outside / "deep" / "a.mp4")
    touch(data / "own" / "b.mp4")
    (data / "linked").symlink_to(outside)
    (data / "also").symlink_to(data / "own")  # sorts before the folder itself, which keeps its name
    (outside / "deep" / "loop").symlink_to(data)
    (data / "gone.mp4").symlink_to(tmp_path / "nothing")
    found = find_videos([str(data)])
    assert list(found.files) == ["linked/deep/a.mp4", "own/b.mp4"]
    assert found.notes == [
        f"{data}: 2 linked folders left out, because they were searched already: also, linked/deep/loop",
        f"{data}: 1 cannot be read: gone.mp4 (a link to nothing)",
    ]


def test_pipes_are_named_and_not_opened(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4")
    os.mkfifo(tmp_path / "b.mp4")
    found = find_videos([str(tmp_path)])
    assert list(found.files) == ["a.mp4"]
    assert found.notes == [f"{tmp_path}: 1 cannot be read: b.mp4 (not a regular file)"]
    with pytest.raises(ZooError, match=r"b\.mp4: it is neither a folder nor a regular file"):
        find_videos([str(tmp_path / "b.mp4")])


def test_folder_with_a_videos_suffix_is_searched(tmp_path: Path) -> None:
    touch(tmp_path / "x.mp4" / "a.mp4")
    assert list(find_videos([str(tmp_path)]).files) == ["x.mp4/a.mp4"]


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read everything: inside, it is nobody."""
    user = os.geteuid()
    os.seteuid(NOBODY if user == 0 else user)
    try:
        yield
    finally:
        os.seteuid(user)


def test_unreadable_folder_and_file_are_named() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to nobody
        folder = Path(name)
        folder.chmod(0o755)
        touch(folder / "a.mp4").chmod(0)
        touch(folder / "shut" / "b.mp4").parent.chmod(0)
        with unprivileged():
            assert find_videos([name]).notes == [f"{name}: 1 cannot be read: shut (Permission denied)"]
            with pytest.raises(ZooError, match=r"a\.mp4: it cannot be .*Permission denied"):
                decode(folder / "a.mp4", Decoding(None, (32, 32)))
        (folder / "shut").chmod(0o755)


def test_linked_files_are_found(tmp_path: Path) -> None:
    touch(tmp_path / "outside.mp4")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.mp4").symlink_to(tmp_path / "outside.mp4")
    assert list(find_videos([str(tmp_path / "data")]).files) == ["a.mp4"]


def test_folder_without_videos_says_what_it_holds(tmp_path: Path) -> None:
    touch(tmp_path / "._a.mp4")
    with pytest.raises(ZooError, match=r"(?s)no file in this folder ends with.*1 hidden, left out: \._a\.mp4"):
        find_videos([str(tmp_path)])


def test_names_that_are_no_text_can_be_shown(tmp_path: Path) -> None:
    try:
        touch(tmp_path / os.fsdecode(b"a\xff.mp4"))
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    touch(tmp_path / "b\n\x1b[31m.mp4")
    names = list(find_videos([str(tmp_path)]).files)
    assert names == ["a\\udcff.mp4", "b\\n\\x1b[31m.mp4"]
    assert all(name.isprintable() for name in names)
    assert printable("猫 é.mp4") == "猫 é.mp4"


def test_few_names_are_listed_and_the_rest_counted() -> None:
    assert listed("cab") == "a, b, c"
    assert listed("abcdefgh") == "a, b, c, d, e and 3 more"


def test_home_is_expanded_in_folder_and_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    three_shots(tmp_path / "clips" / "a.mp4")
    (tmp_path / "texts.json").write_text('{"a": {"caption": "red"}}')
    data = VideoFilms("~/clips", cache="~/decoded", captions="~/texts.json", **SMALL)
    data.setup()
    assert data.train_films[0].caption == "red"
    assert list(data.videos) == ["a.mp4"]
    assert [*(tmp_path / "decoded").glob("*.npy")]
    assert not (tmp_path / "~").exists()
    with pytest.raises(ZooError, match="nobody-of-this-name"):
        resolve("~nobody-of-this-name/clips")


@pytest.mark.slow
def test_name_with_a_colon_in_a_relative_folder_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three_shots(tmp_path / "clips" / "plain.mp4").rename(tmp_path / "clips" / "scene:01.mp4")
    monkeypatch.chdir(tmp_path / "clips")
    for place, name in ((".", "scene:01.mp4"), ("scene:01.mp4", "scene:01.mp4")):
        data = VideoFilms(place, **SMALL)
        data.setup()
        assert list(data.videos) == [name]
