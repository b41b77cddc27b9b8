"""Shared by all tests: one thread each, since pytest-xdist runs several, and films of awkward sizes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from sparse_zoo import Layout, Shot, registry
from sparse_zoo.kernels import _kernels

torch.set_num_threads(1)

FILMS = {
    "captioned": Layout.film([Shot(3, 4, 4, 3), Shot(1, 5, 3), Shot(4, 4, 4, 2)], caption=2),
    "packed": Layout.pack(
        [Layout.film([Shot(3, 3, 4, 2), Shot(2, 2, 5, 1)], caption=1), Layout.film([Shot(1, 3, 3), Shot(2, 4, 4, 1)])]
    ),
    "plain": Layout.film([Shot(3, 4, 4)]),
    "one_frame_shots": Layout.film([Shot(1, 3, 3, 1) for _ in range(4)]),
    "one_token": Layout.film([Shot(1, 1, 1)]),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fail-skipped", action="store_true", help="a test that is skipped fails; for `make test-all`")


def fail_skipped(report: pytest.TestReport | pytest.CollectReport, config: pytest.Config) -> None:
    if report.skipped and not hasattr(report, "wasxfail") and config.getoption("--fail-skipped"):
        report.outcome = "failed"
        assert isinstance(report.longrepr, tuple)
        report.longrepr = f"{report.nodeid} was skipped, and --fail-skipped was given. {report.longrepr[2]}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    fail_skipped(report, item.config)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    fail_skipped(report, collector.config)
    return report


@pytest.fixture(params=FILMS, ids=FILMS)
def film(request: pytest.FixtureRequest) -> Layout:
    return FILMS[request.param]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    before = set(sys.modules)
    with patch.dict(_kernels):
        yield
    for name in set(sys.modules) - before:
        if name.startswith("sparse_zoo_plugin_"):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _reset_process() -> Iterator[None]:
    """Workers of sweeps set levels and threads for their whole process, and some tests run a worker in this one."""
    notes = logging.getLogger("datamodules")
    level = notes.level
    yield
    notes.setLevel(level)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline: VAE, text encoder and tokenizer."""
    pytest.importorskip("diffusers", reason="needs the extra pretrained")
    from experiments.tools import tiny_models

    return tiny_models.write(tmp_path_factory.mktemp("models"), ["wan"])[0]


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """A manifest of two videos of two shots, with and without times."""
    from toy_encoding import two_films

    return two_films(tmp_path)
