"""Manifests: rows of three formats and folders, every fault with its line, a check that is quick and small."""

import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_decoding import film
from typer.testing import CliRunner

from datamodules.checking import check
from datamodules.manifest import Fault, Manifest, Row, ShotRow
from experiments.cli import app
from sparse_zoo.errors import ZooError

SHOTS = [{"start": 0, "end": 0.5, "caption": "one"}, {"start": 0.5, "end": 1}]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(
        tmp_path_factory.mktemp("clips") / "clip.mp4", [np.full((32, 48, 3), 9 * i, np.uint8) for i in range(10)]
    )


def lines(path: Path, *rows: Any) -> Manifest:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return Manifest(str(path))


def test_three_formats_give_the_same_rows(tmp_path: Path) -> None:
    rows = [{"video": "a.mp4", "caption": "ein Zug, grün", "shots": SHOTS}, {"video": "/b.mp4"}]
    found = [list(lines(tmp_path / "m.jsonl", *rows))]
    (tmp_path / "m.csv").write_text(
        'video,caption,shots\na.mp4,"ein Zug, grün","' + json.dumps(SHOTS).replace('"', '""') + '"\n/b.mp4,,\n'
    )
    found.append(list(Manifest(str(tmp_path / "m.csv"))))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    found.append(list(Manifest(str(tmp_path / "m.parquet"))))
    shots = (ShotRow(0.0, 0.5, "one"), ShotRow(0.5, 1.0, ""))
    for own, first in zip(found, (1, 2, 1), strict=True):
        assert own == [
            Row(first, "a.mp4", tmp_path / "a.mp4", "ein Zug, grün", shots),
            Row(first + 1, "/b.mp4", Path("/b.mp4")),
        ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{\n", "not JSON"),
        ([1], "must be an object"),
        ({"caption": "x"}, "it has no video"),
        ({"video": 3}, "video must be a path, got 3"),
        ({"video": "a\0b"}, "null character"),
        ({"video": "a", "caption": ["x"]}, "caption must be text"),
        ({"video": "a", "shots": []}, "at least one"),
        ({"video": "a", "shots": ["x"]}, "shot 0 must be an object"),
        ({"video": "a", "shots": [{"start": 1}]}, "shot 0 has no end"),
        ({"video": "a", "shots": [{"start": -1, "end": 2}]}, "start must be seconds"),
        ({"video": "a", "shots": [{"start": 0, "end": float("nan")}]}, "end must be seconds"),
        ({"video": "a", "shots": [{"start": 0, "end": 10**400}]}, "end must be seconds"),
        ({"video": "a", "shots": [{"start": 1, "end": 1}]}, "shot 0 ends at 1 s, where it begins"),
        ({"video": "a\nb", "caption": 1}, r"(a\nb)"),
        ('{"video": "a", "caption": "x", "caption": "y"}\n', "'caption' given more than once"),
        ('{"video": "a", "shots": [{"caption": "x", "caption": "y"}]}\n', "'caption' given more than once"),
        ("[" * 100000 + "\n", "nested too deeply"),
        ({"video": "a", "shots": [{"start": 2, "end": 1}]}, "shot 0 ends at 1 s, before it begins at 2 s"),
        ({"video": "a", "shots": [{"start": 0, "end": 2}, {"start": 1, "end": 3}]}, "shots must follow one another"),
        ({"video": "a", "shots": [{"start": 0, "end": 2}, {"caption": "x"}]}, "some shots have times"),
    ],
)
def test_each_fault_is_one_line_and_the_other_rows_are_read(tmp_path: Path, row: Any, reason: str) -> None:
    good = {"video": "good.mp4"}
    first, bad, last = lines(tmp_path / "m.jsonl", good, row, {"video": "other.mp4"})
    assert isinstance(first, Row)
    assert isinstance(last, Row)
    assert last.line == 3
    assert isinstance(bad, Fault)
    assert str(bad).startswith("line 2")
    assert reason in str(bad)
    assert "\n" not in str(bad)


def test_all_reasons_of_a_row_are_given(tmp_path: Path) -> None:
    (bad,) = lines(tmp_path / "m.jsonl", {"caption": 3, "shots": [{"start": "x", "end": 1}]})
    assert isinstance(bad, Fault)
    assert len(bad.reasons) == 3


def test_repeated_rows_and_unread_columns_are_named(tmp_path: Path) -> None:
    manifest = lines(
        tmp_path / "m.jsonl", {"video": "a", "title": "t"}, "\n", {"video": "a"}, {"video": "b", "title": 0}
    )
    assert [str(row) for row in manifest if isinstance(row, Fault)] == ["line 3 (a): it repeats line 1"]
    assert manifest.notes == ["not read: title (2 rows); video, caption, shots are, and of a shot start, end, caption"]


@pytest.mark.parametrize("name", ["m.json", "m.txt"])
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ZooError, match=r"end with \.jsonl, \.csv, \.parquet"):
        list(Manifest(str(tmp_path / name)))


def test_csv_without_videos_is_refused_and_bad_rows_are_not_fatal(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("path,caption\na,b\n")
    with pytest.raises(ZooError, match="no column 'video'; its columns: path, caption"):
        list(Manifest(str(path)))
    path.write_bytes(b"video,caption\na,b,c\nb,\xff\nc,fine\n")
    assert [isinstance(row, Fault) for row in Manifest(str(path))] == [True, True, False]


def test_folder_is_a_manifest_with_its_captions(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "clip.mp4").symlink_to(clip)
    (tmp_path / "captions.json").write_text('{"clip": {"caption": "c", "shots": ["one"]}}')
    (row,) = Manifest(str(tmp_path))
    assert row == Row(1, "clip.mp4", tmp_path / "clip.mp4", "c", (ShotRow(None, None, "one"),))


def test_check_names_what_cannot_be_used(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    manifest = lines(
        tmp_path / "m.jsonl",
        {"video": str(clip), "caption": "x"},
        {"video": "missing.mp4"},
        {"video": "text.mp4"},
        {"video": str(clip), "shots": [{"start": 50, "end": 60}]},
    )
    found = check(manifest)
    assert (found.rows, found.usable, found.captions, found.sizes) == (4, 1, 1, {"48x32": 1})
    told = [str(fault) for fault in found.faults]
    assert [line.split(" ")[1].rstrip(":") for line in told] == ["2", "3", "4"]
    for line, reason in zip(told, ("No such file", "cannot be decoded", "shot 0 begins at 50 s"), strict=True):
        assert reason in line


def test_check_command_tells_by_its_exit_code(tmp_path: Path, clip: Path) -> None:
    good = lines(tmp_path / "good.jsonl", {"video": str(clip)})
    done = CliRunner().invoke(app, ["data", "check", good.place, "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["usable"] == 1
    bad = lines(tmp_path / "bad.jsonl", {"video": str(clip)}, {"video": "none.mp4"})
    done = CliRunner().invoke(app, ["data", "check", bad.place])
    assert done.exit_code == 1
    assert "line 2 (none.mp4): it cannot be read: No such file" in done.stdout
    assert CliRunner().invoke(app, ["data", "check", str(tmp_path / "not-there")]).exit_code == 2


def test_shots_may_overlap_by_what_rounding_takes(tmp_path: Path) -> None:
    shots = [{"start": 0, "end": 1.0004}, {"start": 1, "end": 2}]
    assert isinstance(next(iter(lines(tmp_path / "m.jsonl", {"video": "a", "shots": shots}))), Row)
    shots[0]["end"] = 1 + 1 / 24  # a frame
    assert isinstance(next(iter(lines(tmp_path / "m.jsonl", {"video": "a", "shots": shots}))), Fault)


def test_tables_as_other_programs_write_them(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes("\ufeffvideo,caption\r\n\r\na b.mp4,grün\r\n".encode())
    assert list(Manifest(str(path))) == [Row(3, "a b.mp4", tmp_path / "a b.mp4", "grün")]
    for text, reason in (
        ("video;caption\na;b\n", "its columns: video;caption. Separate columns with commas"),
        ("video,caption,caption\na,b,c\n", "more than one column 'caption'"),
        ("", "its columns: none"),
    ):
        path.write_text(text)
        with pytest.raises(ZooError, match=reason):
            list(Manifest(str(path)))
    path.write_text('video,caption\na,fine\nb,"not closed\nc,x\nd,y\n')
    first, rest = Manifest(str(path))
    assert isinstance(first, Row)
    assert str(rest) == "line 5: it is not CSV, from line 3 on: unexpected end of data"
    path.write_text(f"video,shots\na,{'[' * 100000}\nb,\n")
    assert [isinstance(row, Fault) for row in Manifest(str(path))] == [True, False]


def test_parquet_of_other_types_is_a_fault_of_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    columns = {"video": pa.array([b"a.mp4", None]), "caption": pa.array([None, "x"]), "shots": [None, None]}
    pq.write_table(pa.table(columns), path)
    assert [str(row) for row in Manifest(str(path))] == [
        "line 1: video must be a path, got \"b'a.mp4'\"",
        "line 2: it has no video",
    ]
    pq.write_table(pa.table({"video": pa.array([1], pa.timestamp("s"))}), path)
    assert "video must be a path" in str(next(iter(Manifest(str(path)))))
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["x"]), pa.array(["y"])], ["video", "x", "x"]), path)
    with pytest.raises(ZooError, match="more than one column 'x'"):
        list(Manifest(str(path)))


def test_what_is_no_file_is_not_read(tmp_path: Path, clip: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "endless.mp4").symlink_to("/dev/zero")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    names = ["pipe.mp4", "endless.mp4", "folder.mp4", "loop.mp4"]
    found = check(lines(tmp_path / "m.jsonl", *({"video": name} for name in names), {"video": str(clip)}))
    assert (found.usable, len(found.faults)) == (1, 4)
    for fault, reason in zip(found.faults, ["a pipe or a device", "a pipe", "a folder", "symbolic links"], strict=True):
        assert reason in str(fault)


def test_shots_that_end_after_their_video_are_named(tmp_path: Path, clip: Path) -> None:
    found = check(lines(tmp_path / "m.jsonl", {"video": str(clip), "shots": [{"start": 0, "end": 9}]}))
    (note,) = found.notes
    assert "shot 0 ends at 9 s and is cut at " in note
    assert found.usable == 1


@pytest.mark.slow
def test_ten_thousand_rows_are_checked_in_bounded_time_and_memory(tmp_path: Path, clip: Path) -> None:
    """A tenth of the rows, so that it is quick; memory beyond the rows themselves must not grow with them."""
    manifest = lines(tmp_path / "m.jsonl", *({"video": str(clip), "caption": f"film {i}"} for i in range(1000)))
    start = time.process_time()
    tracemalloc.start()
    assert check(manifest).usable == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
    assert time.process_time() - start < 20
