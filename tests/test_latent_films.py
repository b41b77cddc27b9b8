"""Films of latents: batches of shards, whole videos on either side of the split, training that resumes bit for bit."""

import json
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from datamodules import LatentFilms
from datamodules.shards import Writer
from experiments.config.datamodule import build
from lit_modules import LitPretrained, LitVideoDiT
from sparse_zoo.errors import ZooError

WIDTH, CHANNELS = 6, 4
MODEL: dict[str, Any] = {"dim": 24, "depth": 1, "heads": 2, "attention": {"name": "dense"}}


def latents(seed: int, frames: int, rows: int, cols: int) -> Tensor:
    return torch.randn(CHANNELS, frames, rows, cols, generator=torch.Generator().manual_seed(seed)).bfloat16()


def text(caption: str, width: int = WIDTH) -> Tensor:
    """A token a letter."""
    generator = torch.Generator().manual_seed(sum(map(ord, caption)))
    return torch.randn(len(caption), width, generator=generator).bfloat16()


Grids = tuple[tuple[int, int], ...]


def write(folder: Path, videos: int = 8, *, same: int = 0, grids: Grids = ((4, 6),), width: int = WIDTH) -> Path:
    """A folder as `zoo encode` writes it: videos of two shots; `same` more are the first under other names."""
    folder.mkdir()
    films = []
    with Writer(folder, "latents") as shots, Writer(folder, "text") as texts:
        for caption in ("film", "one"):
            texts.add(caption, {"text": text(caption, width)}, {"shape": [len(caption), width]})
        for i in range(videos):
            rows, cols = grids[i % len(grids)]
            for shot in range(2):
                frames = 2 + (i + shot) % 2
                one = latents(10 * i + shot, frames, rows, cols)
                shots.add(f"{i}-{shot}", {"latents": one}, {"shape": list(one.shape)})
        for i in range(videos + same):
            own = i if i < videos else 0
            each = [
                {"latents": f"{own}-{shot}", "text": "one" if shot else None, "caption": "one" if shot else ""}
                for shot in range(2)
            ]
            films.append(
                {"name": f"{i}.mp4", "source": f"s{own}", "rate": 8.0, "text": "film", "caption": "film", "shots": each}
            )
    (folder / "films.jsonl").write_text("".join(json.dumps(film) + "\n" for film in films))
    about = {"channels": CHANNELS, "vae_digest": "x", "frames": 4, "pixels": 8}
    (folder / "latents.json").write_text(json.dumps(about))
    return folder


def made(folder: Path | str, **settings: Any) -> LatentFilms:
    data = LatentFilms(str(folder), **settings)
    data.setup()
    return data


def names(data: LatentFilms, epoch: int = 0) -> list[list[str]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return [batch["names"] for batch in loader]


def test_a_packed_batch_holds_what_the_shards_do(tmp_path: Path) -> None:
    data = made(write(tmp_path / "a"), films_per_batch=2)
    batch = next(iter(data.val_dataloader()))
    (name,) = batch["names"]
    i = int(name[0])
    assert [tuple(clip.shape) for clip in batch["clips"]] == [
        (1, 2 + (i + shot) % 2, CHANNELS, 4, 6) for shot in (0, 1)
    ]
    for shot, clip in enumerate(batch["clips"]):
        assert torch.equal(clip[0].transpose(0, 1), latents(10 * i + shot, 2 + (i + shot) % 2, 4, 6).float())
    (film,) = batch["layout"].films
    assert (film.caption, [shot.text for shot in film.shots]) == (4, [0, 3])
    assert [(shot.rows, shot.cols) for shot in film.shots] == [(2, 3)] * 2
    assert torch.equal(batch["text"][0], torch.cat([text("film"), text("one")]).float())
    assert batch["captions"] == [["film", "", "one"]]


def test_no_video_is_on_both_sides_under_whatever_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", 5, same=4)
    seen = set()
    for seed in range(6):
        data = made(folder, val_fraction=0.4, seed=seed)
        train, held = ({film.source for film in films} for films in (data.train_films, data.val_films))
        assert not train & held
        assert len(held) == 2
        assert len(data.train_films) + len(data.val_films) == 9
        seen.add(frozenset(held))
    assert len(seen) > 1


def test_one_video_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="training and validation need a video each, and there is 1"):
        made(write(tmp_path / "a", 1, same=3))


def test_an_epoch_gives_each_film_once_in_batches_of_one_size(tmp_path: Path) -> None:
    data = made(write(tmp_path / "a", 12, grids=((4, 6), (6, 4))), films_per_batch=3)
    first, second = names(data), names(data, 1)
    every = sorted(film.name for film in data.train_films)
    for epoch in (first, second):
        assert sorted(name for batch in epoch for name in batch) == every
    assert first != second
    for batch in first:
        assert len({int(name.split(".")[0]) % 2 for name in batch}) == 1
    assert names(data) == first


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_resumes_where_it_stopped(tmp_path: Path, workers: int) -> None:
    data = made(write(tmp_path / "a", 9), films_per_batch=2, num_workers=workers)
    whole = names(data)
    loader = data.train_dataloader()
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    state = loader.state_dict()
    again = data.train_dataloader()
    again.load_state_dict(state)
    assert [batch["names"] for batch in again] == whole[2:]


def test_dropped_captions_are_a_function_of_seed_epoch_and_film(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", 12)

    def lengths(seed: int) -> list[int]:
        data = made(folder, drop_captions=0.5, val_fraction=0.1, seed=seed)
        return [batch["text"].shape[1] for batch in data.train_dataloader()]

    assert lengths(1) == lengths(1)
    assert set(lengths(1)) <= {0, 3, 4, 7}
    assert len(set(lengths(1))) > 1
    assert lengths(1) != lengths(2)
    data = made(folder, drop_captions=1.0)
    assert {batch["text"].shape[1] for batch in data.train_dataloader()} == {0}
    assert {batch["text"].shape[1] for batch in data.val_dataloader()} == {7}


def test_pretrained_batches_have_equal_shots_and_text_of_the_given_length(tmp_path: Path) -> None:
    data = made(write(tmp_path / "a", 9), batches="pretrained", films_per_batch=2, max_tokens=10)
    for batch in data.train_dataloader():
        assert batch["latents"].shape[1:] == (CHANNELS, 5, 4, 6)
        assert sum(batch["shots"]) == 5
        words = batch["arguments"]["encoder_hidden_states"]
        assert words.shape == (len(batch["names"]), 10, WIDTH)
        assert torch.equal(words[0, :7], torch.cat([text("film"), text("one")]).float())
        assert not words[:, 7:].any()


def test_shots_that_are_not_there_are_left_out_with_a_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / "latents-00000.tar").write_bytes((folder / "latents-00000.tar").read_bytes()[:16000])
    data = made(folder)
    (line, _) = data.notes
    assert "latents-00000.tar is cut short; give the command zoo encode again" in line
    assert data.train_films


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"patch": (1, 4, 4)}, "latents of 4x6 are not in whole patches of 4x4"),
        ({"films_per_batch": 0, "val_fraction": 2}, "films_per_batch must be at least 1"),
        ({"batches": "pack"}, "unknown batches 'pack'; did you mean 'packed'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ZooError, match=reason):
        made(write(tmp_path / "a"), **settings)


def test_another_vae_than_that_of_the_latents_is_refused(tmp_path: Path, wan: Path) -> None:
    folder = write(tmp_path / "a")
    with pytest.raises(ZooError, match=r"vae .* did not make these latents: its digest is \w+, theirs x"):
        made(folder, vae=str(wan))


def test_batches_of_the_other_kind_of_model_are_refused(tmp_path: Path) -> None:
    settings = {"name": "latent_films", "folder": str(write(tmp_path / "a"))}
    with pytest.raises(ZooError, match="batches must be pretrained for a pretrained model=DIR, got packed"):
        build(settings, pretrained=True)
    with pytest.raises(ZooError, match="batches must be packed for a model of ours, got pretrained"):
        build({**settings, "batches": "pretrained"})
    assert build({**settings, "batches": "pretrained"}, pretrained=True)
    assert build(settings)


@pytest.mark.parametrize("line", [b"{", b"3", b"[]", b'{"name": "x"}', b"\xff"])
def test_damaged_lists_are_one_line(tmp_path: Path, line: bytes) -> None:
    folder = write(tmp_path / "a")
    about, films = folder / "latents.json", folder / "films.jsonl"
    whole = about.read_bytes()
    about.write_bytes(line)
    with pytest.raises(ZooError, match=r"latents\.json is damaged \(.*; give the command zoo encode again"):
        made(folder)
    about.write_bytes(whole)
    films.write_bytes(films.read_bytes() + line)
    with pytest.raises(ZooError, match=r"films\.jsonl line 9 is damaged \(.*; give the command zoo encode again"):
        made(folder)


def test_a_folder_that_is_not_encoded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"latents.json is missing; it is a folder that zoo encode wrote"):
        LatentFilms(str(tmp_path))


class Ranges(SimpleHTTPRequestHandler):
    """Answers with the part of a file that is asked for, and counts what it sends; with `whole`, always with all."""

    sent, whole = 0, False

    def do_GET(self) -> None:
        path, asked = Path(self.translate_path(self.path)), self.headers.get("Range")
        if asked is None or self.whole or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        first, _, last = asked.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        type(self).sent += len(part)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server that sends the files of the test's folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tmp_path))) as running:
        thread = Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_at_an_address_give_the_batches_of_a_folder(tmp_path: Path, server: str, workers: int) -> None:
    folder = write(tmp_path / "a", 9)
    given: dict[str, Any] = {"films_per_batch": 2, "drop_captions": 0.3, "num_workers": workers}
    here, there = made(folder, **given), made(f"{server}/a", **given)
    for own, other in zip(here.train_dataloader(), there.train_dataloader(), strict=True):
        assert own["names"] == other["names"]
        assert own["captions"] == other["captions"]
        assert torch.equal(own["text"], other["text"])
        assert all(map(torch.equal, own["clips"], other["clips"]))
    before = Ranges.sent
    there.latents.tensors("0-0")
    assert Ranges.sent - before == there.latents["0-0"].size  # and nothing else of its shard
    loader = there.train_dataloader()
    next(iter(loader))
    again = there.train_dataloader()
    again.load_state_dict(loader.state_dict())
    assert [batch["names"] for batch in again] == names(here)[1:]


def test_addresses_that_do_not_serve_are_refused(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a")
    with pytest.raises(ZooError, match=r"latents.json is missing(?s:.*)films.jsonl is missing"):
        LatentFilms(f"{server}/b")
    with pytest.raises(ZooError, match=r"latents.json cannot be read: Cannot connect"):
        LatentFilms("http://127.0.0.1:1/a")
    with pytest.raises(ZooError, match="none://a: Protocol not known"):
        LatentFilms("none://a")
    data = made(f"{server}/a")
    monkeypatch.setattr(Ranges, "whole", True)
    with pytest.raises(ZooError, match="it must answer HTTP range requests"):
        data.latents.tensors("0-0")


def trainer(folder: Path, steps: int, **more: Any) -> pl.Trainer:
    return pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing="callbacks" in more,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        **more,
    )


def module(data: LatentFilms) -> LitVideoDiT:
    pl.seed_everything(0)
    shape = {"channels": data.channels, "patch": data.patch, "vocabulary": 0, "text_dim": data.text_dim}
    return LitVideoDiT({**MODEL, **shape}, optim={"warmup_steps": 1, "ema_decay": 0.5}, flow={"drop_text": 0.5})


def test_training_on_latents_resumes_bit_for_bit_within_an_epoch(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", 9)
    settings: dict[str, Any] = {"films_per_batch": 2, "drop_captions": 0.3}

    class Save(Checkpoint):  # after other callbacks, as those of runs
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 6:  # within the second epoch: one has 4 batches
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def train(resume: Path | None = None) -> LitVideoDiT:
        data = made(folder, **settings)
        trained = module(data)
        trainer(tmp_path, 9, callbacks=[Save()]).fit(trained, datamodule=data, ckpt_path=resume, weights_only=True)
        return trained

    whole, resumed = train(), train(tmp_path / "half.ckpt")
    for own, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(own, other)


def test_text_embeddings_reach_the_model_and_guidance_drops_them(tmp_path: Path) -> None:
    data = made(write(tmp_path / "a"))
    model, batch = module(data).model, next(iter(data.val_dataloader()))
    for parameter in model.parameters():  # at the start gates are closed
        torch.nn.init.normal_(parameter, std=0.3)
    video, time = model.patchify(batch["clips"]), torch.full((1,), 0.5)

    def out(words: Tensor) -> Tensor:
        velocity: Tensor = model(video, words, time, batch["layout"]).velocity
        return velocity

    words = batch["text"]
    assert not torch.equal(out(words), out(words.flip(1)))
    dropped = model.drop_text(words, torch.ones(words.shape[:2], dtype=torch.bool))
    assert torch.equal(dropped, model.null_text.expand_as(words))
    with pytest.raises(ZooError, match=r"text must be \(B, Nt, 6\), got \(1, 7\)"):
        model(video, torch.zeros(1, 7, dtype=torch.int64), time, batch["layout"])


def test_a_pretrained_model_trains_on_latents(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="needs the extra pretrained")
    from experiments.tools import tiny_models

    folder = write(tmp_path / "a", width=16)
    (wan,) = tiny_models.write(tmp_path / "models", ["wan"])
    data = made(folder, batches="pretrained", films_per_batch=2, max_tokens=8)
    lit = LitPretrained(
        {"folder": str(wan)},
        {"name": "moc", "top_k": 1},
        optim={"lr": 1e-3, "warmup_steps": 1},
        sampling={"steps": 1},
    )
    runner = trainer(tmp_path, 2)
    runner.fit(lit, datamodule=data)
    assert runner.global_step == 2
    assert torch.isfinite(runner.callback_metrics["train/loss"])
