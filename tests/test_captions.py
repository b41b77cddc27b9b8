"""Captions match their videos or are named; any language gives words."""

import codecs
import json
import re
from pathlib import Path
from typing import Any
from unicodedata import normalize
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_videos import SMALL, three_shots

from datamodules import VideoFilms
from datamodules.captions import read_captions
from datamodules.discovery import printable
from datamodules.text import tokenize, words
from sparse_zoo.errors import ZooError


def matched(tmp_path: Path, entries: dict[str, Any], *videos: str) -> dict[str, str]:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(entries))
    return {name: caption.whole for name, caption in read_captions([path], videos).by_video.items()}


@pytest.mark.parametrize(
    ("key", "video"),
    [
        ("a.mp4", "a.mp4"),
        ("./a.mp4", "a.mp4"),
        ("a", "a.mp4"),
        ("./sub/a", "sub/a.mp4"),
        ("sub\\a.mp4", "sub/a.mp4"),
        (".\\sub\\a", "sub/a.mp4"),
        ("sub//a.mp4", "sub/a.mp4"),
        (normalize("NFC", "café.mp4"), normalize("NFD", "café.mp4")),
        (normalize("NFD", "café"), normalize("NFC", "café.mp4")),
        ("scene.01", "scene.01.mp4"),
        ("a\\b.mp4", "a\\b.mp4"),
    ],
)
def test_key_matches_its_video(tmp_path: Path, key: str, video: str) -> None:
    assert matched(tmp_path, {key: {"caption": "red"}}, video, "other.mp4") == {video: "red"}


def test_whole_name_wins_over_an_equivalent_one(tmp_path: Path) -> None:
    names = [normalize(form, "café.mp4") for form in ("NFC", "NFD")]
    entries = {name: {"caption": name} for name in names}
    assert matched(tmp_path, entries, *names) == {name: name for name in names}


def test_ambiguous_keys_are_rejected_by_name(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"'a' fits several videos: a\.mkv, a\.mp4; give the whole name"):
        matched(tmp_path, {"a": {"caption": "red"}}, "a.mp4", "a.mkv")
    with pytest.raises(ZooError, match=r"'a' is for the video 'a\.mp4', as is 'a\.mp4' of .*; keep one"):
        matched(tmp_path, {"a.mp4": {"caption": "red"}, "a": {"caption": "blue"}}, "a.mp4")

    composed, split = (normalize(form, "café") for form in ("NFC", "NFD"))
    with pytest.raises(ZooError, match="keep one"):
        matched(tmp_path, {composed: {"caption": "red"}, split: {"caption": "blue"}}, "café.mp4")


@pytest.mark.parametrize(
    "key", ["../a.mp4", "..\\a", "/clips/a.mp4", "sub/../../a.mp4", "C:\\clips\\a.mp4", "\ud83d.mp4"]
)
def test_key_outside_the_folder_is_named(tmp_path: Path, key: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({key: {"caption": "red"}}))
    captions = read_captions([path], ["a.mp4"])
    assert captions.by_video == {}
    assert captions.unmatched == [printable(key)]
    assert f"1 captions match no video: {printable(key)}" in captions.notes


def test_what_does_not_match_is_counted_and_named(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"A.mp4": {"caption": "x"}, "gone": {"caption": "x"}, "b.mp4": {"caption": " "}}))
    captions = read_captions([path], ["a.mp4", "b.mp4", "c.mp4"])
    assert captions.unmatched == ["A.mp4", "gone"]
    assert captions.notes == [
        "2 captions match no video: A.mp4, gone",
        "captions that differ from a video's name in case alone: A.mp4 (is it a.mp4? case must agree)",
        "3 of 3 videos have no caption: a.mp4, b.mp4, c.mp4",
    ]


def test_unknown_settings_of_an_entry_are_named(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"a.mp4": {"captoin": "x", "caption": "y"}}))
    assert read_captions([path], ["a.mp4"]).notes == [
        f"captions {path}: keys not read (caption and shots are): captoin"
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_byte_order_marks_are_understood(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "captions.json"
    path.write_bytes(json.dumps({"猫.mp4": {"caption": "猫"}}, ensure_ascii=False).encode(encoding))
    assert encoding != "utf-8-sig" or path.read_bytes().startswith(codecs.BOM_UTF8)
    assert read_captions([path], ["猫.mp4"]).by_video["猫.mp4"].whole == "猫"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "it cannot be read"),
        ("", "it cannot be read"),
        ("[" * 100_000, "it cannot be read"),
        ('{"a.mp4": {"caption": "x"}, "a.mp4": {"caption": "y"}}', "'a.mp4' is given twice"),
        ("[]", r"it must be an object of videos' names, got \[\]"),
        ('"a"', "it must be an object"),
        ('{"a.mp4": 3}', r"a\.mp4: must be .*got 3"),
        ('{"a.mp4": "red"}', r'a\.mp4: must be .*got "red"'),
        ('{"a.mp4": {"caption": 3}}', r"a\.mp4: must be"),
        ('{"a.mp4": {"caption": null}}', r"a\.mp4: must be"),
        ('{"a.mp4": {"shots": "red"}}', r"a\.mp4: must be"),
        ('{"a.mp4": {"shots": [1]}}', r"a\.mp4: must be"),
    ],
)
def test_bad_caption_files_are_rejected(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(ZooError, match=said):
        read_captions([path], ["a.mp4"])


def test_films_say_which_captions_they_lack(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    three_shots(tmp_path / "a.mp4")
    three_shots(tmp_path / "b.mp4")
    entries = {"a": {"caption": "one two three four"}, "c.mp4": {"caption": "elsewhere"}}
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    data = VideoFilms(str(tmp_path), **SMALL, max_words=3)
    data.setup()
    assert data.summary()["captions_without_video"] == ["c.mp4"]
    for line in (
        "1 captions match no video: c.mp4",
        "1 of 2 videos have no caption: b.mp4",
        "1 captions are longer than max_words 3 and cut there",
    ):
        assert f"data: {line}" in caplog.messages


# Words


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("一只猫，坐在沙发上。", "一 只 猫 坐 在 沙 发 上"),
        ("猫がソファーに", "猫 が ソ フ ァ ー に"),
        ("แมวนั่ง", "แ ม ว นั่ ง"),
        ("ແມວ", "ແ ມ ວ"),
        ("नमस्ते दुनिया", "नमस्ते दुनिया"),
        ("Tiếng Việt", "tiếng việt"),
        ("مُحَمَّد هنا", "مُحَمَّد هنا"),
        ("می\u200cروم", "میروم"),
        ("한국어 문장", "한국어 문장"),
        ("Straße STRASSE", "strasse strasse"),
        ("cat猫cat", "cat 猫 cat"),
        ("👨\u200d👩\u200d👧 walk 👍🏽 ❤\ufe0f ❤", "👨👩👧 walk 👍🏽 ❤ ❤"),
        ("🇩🇪🇫🇷", "🇩🇪 🇫🇷"),
        ("٣ cats", "٣ cats"),
    ],
)
def test_captions_of_any_language_give_words(caption: str, expected: str) -> None:
    for form in ("NFC", "NFD"):
        assert words(normalize(form, caption)) == [normalize("NFC", word) for word in expected.split()]


def test_khmer_and_burmese_are_not_one_word() -> None:
    for caption in ("ឆ្មាអង្គុយលើសាឡុង", "ကြောင်ထိုင်နေသည်"):
        assert len(words(caption)) >= 5
        assert "".join(words(caption)) == normalize("NFC", caption)


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_captions_keep_their_ids(caption: str) -> None:
    expected = [crc32(word.encode()) % 1024 for word in re.findall(r"\w+", caption.lower())[:16]]
    assert tokenize(caption, 1024, 16).tolist() == expected


@given(st.text(st.characters(categories=["L", "M", "N", "S", "P", "Z", "C"])))
def test_any_text_gives_words_in_one_normal_form(caption: str) -> None:
    assert words(caption) == words(normalize("NFD", caption)) == words(normalize("NFC", caption))
    assert len(tokenize(caption, 1024, 8)) == min(8, len(words(caption)))


def test_lone_surrogate_has_an_id_and_changes_no_other_word() -> None:
    assert tokenize("cat \ud83d dog", 1024, 8).tolist() == tokenize("cat dog", 1024, 8).tolist()
