"""The report in a real browser: on a desktop, a phone and paper, it fits, it is whole, and it fetches nothing."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from made_up import SECTIONS, write_full_sweep
from test_cli import zoo
from tiny import BASE
from toy_encoding import video

from experiments.config.resolve import load
from experiments.execution.run import run
from experiments.inspection.pretrained import Compared, Request, write_page
from experiments.reporting.html import write
from experiments.reporting.report import build_report
from experiments.tracking.mlflow_logger import Tracker
from experiments.tracking.store import Cell, Result
from lit_modules.mp4 import write_mp4

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
DESKTOP, PHONE, PAPER = 1280, 390, 690  # pixels across; the last is A4 between the margins


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_HOME", str(tmp_path_factory.mktemp("runs")))
        return write(build_report(write_full_sweep()))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra: pip install -e '.[browser]'")
    with sync_api.sync_playwright() as driver:
        own = driver.chromium.executable_path
        path = next(filter(None, map(shutil.which, BROWSERS)), own if Path(own).exists() else None)
        if path is None:
            pytest.skip("no browser: `apt-get install chromium`, or `playwright install chromium`")
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


def wider_than(page: Any, width: int) -> list[str]:
    """What reaches past the right edge, but for what scrolls in a box of its own."""
    found: list[str] = page.evaluate(
        """width => [...document.querySelectorAll("body *")]
            .filter(one => !one.parentElement.closest(".scroll, pre, svg"))
            .filter(one => one.getBoundingClientRect().right > width + 1)
            .map(one => `${one.tagName}.${one.className} in ${one.closest("section")?.id}`)""",
        width,
    )
    return found


@pytest.mark.parametrize(("width", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_page_fits_and_is_complete(browser: Any, report: Path, tmp_path: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    requests, said = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(report.as_uri())
    page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
    assert {url for url in requests if not url.startswith("data:")} == {report.as_uri()}
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width == DESKTOP:  # no need to scroll the leaderboard of a test of memory
        board = "document.querySelector('#leaderboard .scroll')"
        assert page.evaluate(f"{board}.scrollWidth <= {board}.clientWidth")
    assert wider_than(page, width) == []
    for section in SECTIONS:
        box = page.locator(f"#{section}").bounding_box()
        assert box is not None, section
        assert box["height"] > 60, section
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert page.evaluate("[...document.images].length") > 15
    drawn = page.evaluate("[...document.querySelectorAll('.plots svg')].map(svg => svg.getBoundingClientRect().width)")
    assert len(drawn) == 10
    assert min(drawn) > 200
    ink = page.evaluate("getComputedStyle(document.querySelector('.plots svg text')).fill")
    assert ink == {"light": "rgb(27, 31, 36)", "dark": "rgb(232, 234, 236)"}[scheme]  # plots follow the page
    page.close()


def test_the_videos_of_a_comparison_play(browser: Any, tmp_path: Path) -> None:
    """In the page, at both widths: a picture of the right size, time that goes on, no error of the decoder."""
    draws = torch.Generator().manual_seed(0)
    rows = []
    for name in ("dense", "moc"):
        (tmp_path / name).mkdir()
        write_mp4(tmp_path / name / "0.mp4", [2 * torch.rand(17, 3, 64, 96, generator=draws) - 1], 16)
        measured = {"psnr": 40.0, "ssim": 0.9, "frame_consistency": 0.9} if name == "moc" else {}
        rows.append(Compared(name, {"top_k": 1, "anchors": ["text", "shot"]}, [f"{name}/0.mp4"], 0.5, 1.0, **measured))
    path = write_page(rows, ["a red ball " * 20], Request(17, 64, 96), tmp_path, ["LPIPS is left out: " + "x" * 200])
    for width in (DESKTOP, PHONE):
        page = browser.new_page(viewport={"width": width, "height": 900})
        said: list[str] = []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.goto(path.as_uri())
        page.wait_for_function("[...document.querySelectorAll('video')].every(one => one.readyState >= 2)")
        page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert wider_than(page, width) == []
        playing = page.evaluate(
            """() => Promise.all([...document.querySelectorAll("video")].map(async one => {
                await one.play();
                const start = one.currentTime;
                await new Promise(done => setTimeout(done, 400));
                return [one.videoWidth, one.videoHeight, one.currentTime !== start, one.error && one.error.message];
            }))"""
        )
        assert playing == [[96, 64, True, None]] * 2
        assert said == []
        page.close()


@pytest.mark.slow
def test_a_sampled_film_plays_with_its_captions(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A film of `zoo sample` from a model of pixels, in a page that takes the captions from the file beside it."""
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    clips = tmp_path / "clips"
    clips.mkdir()
    video(clips / "a.mp4", (1, 2))
    (clips / "captions.json").write_text(json.dumps({"a.mp4": {"caption": "whole", "shots": ["a <first> shot", ""]}}))
    films: dict[str, Any] = {"folder": str(clips), "captions": str(clips / "captions.json"), "fps": 12}
    films |= {"size": [32, 48], "patch": [1, 8, 8], "frames_per_shot": 9}
    small = {name: BASE[name] for name in ("model", "trainer", "sampling")}
    result = run(Cell("dense", load([small, {"data": films, "attention": {"name": "dense"}}])), "train", *silent())
    assert result.status == "finished", result.traceback
    drawn = zoo("sample", result.folder, "data.val_fraction=0.5", "--steps", "1", "--out", tmp_path / "out")
    assert drawn.exit_code == 0, drawn.output
    assert (tmp_path / "out" / "film_000.vtt").exists()
    (tmp_path / "out" / "page.html").write_text(
        '<link rel="icon" href="data:,">'
        '<video src="film_000.mp4" muted><track kind="captions" src="film_000.vtt" default></video>'
    )
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    with served(tmp_path / "out") as address:
        page.goto(f"{address}/page.html")
        page.wait_for_function("document.querySelector('video').readyState >= 2")
        page.wait_for_function("document.querySelector('track').readyState === 2")
        seen = page.evaluate(
            """async () => {
                const one = document.querySelector("video");
                const shown = [];
                const track = one.textTracks[0];
                track.addEventListener("cuechange", () => {
                    if (track.activeCues.length) shown.push(track.activeCues[0].getCueAsHTML().textContent);
                });
                const cues = [...track.cues].map(cue => [cue.startTime, cue.endTime]);
                await one.play();
                await new Promise(done => one.addEventListener("ended", done));
                return [one.videoWidth, one.videoHeight, one.duration, cues, shown, one.error];
            }"""
        )
    assert seen == [48, 32, 1.0, [[0, 0.5], [0.5, 1]], ["a <first> shot", "whole"], None]
    assert said == []
    page.close()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which a folder is served: of a file's own address a browser takes no captions."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def silent() -> tuple[Tracker, Any]:
    """A tracker and an observer that say nothing."""
    return Tracker("train", lambda _: None), Mock()


def test_paper_is_light_and_cuts_no_table(browser: Any, report: Path) -> None:
    page = browser.new_page(viewport={"width": PAPER, "height": 1000}, color_scheme="dark")
    page.goto(report.as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 31, 36)"
    right = page.evaluate("[...document.querySelectorAll('table')].map(one => one.getBoundingClientRect().right)")
    assert max(right) <= PAPER
    assert page.locator("#differences details table").first.is_visible()  # what is folded on a screen is printed
    assert not page.locator("#provenance pre").first.is_visible()
    page.close()


def test_the_page_of_mlflow_shows_all_cells_in_columns(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the link of `zoo ui`: a row for each cell below the one of the sweep, with parameters and metrics."""
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    tracker = Tracker("shown", print)
    parent = tracker.parent("shown", "Which one?")
    params: dict[str, dict[str, Any]] = {"first": {"optim.lr": 0.5}, "second": {"optim.lr": 0.25}}
    results = []
    for loss, (name, own) in enumerate(params.items(), 1):
        log = tracker.run(name, name, parent=parent, before=None)
        log.about(own, {})
        log.log_metrics({"result/val_loss": float(loss)}, 0)
        log.end("FINISHED")
        results.append(Result(name, {"name": "dense"}, "finished", 0, val_loss=float(loss)))
    tracker.overview(parent, params, results)
    (link,) = tracker.cells_pages().values()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "experiments", "ui", "--port", str(port)]
    page = browser.new_page(viewport={"width": DESKTOP, "height": 900})
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            until = time.monotonic() + 300  # of a fresh installation, whose modules are compiled first
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert time.monotonic() < until
                time.sleep(1)
            page.goto(f"http://127.0.0.1:{port}/#/{link}", timeout=120_000)
            page.get_by_text("0.5, 0.25").wait_for(timeout=120_000)
            page.screenshot(path=tmp_path / "mlflow.png")
            for shown in ("result/val_loss", "optim.lr", "shown", "first", "second"):
                assert page.get_by_text(shown, exact=True).first.is_visible(), shown
            for value in ("1.5", "1", "2", "0.5", "0.25"):  # the mean loss, both losses, both rates
                assert page.locator(".ag-row").get_by_text(value, exact=True).count() == 1, value
        finally:
            server.terminate()
    page.close()
