"""A sweep whose drivers are killed at random moments, again and again, loses, repeats and doubles nothing."""

from pathlib import Path

import pytest
from crash_harness import CELLS, FILMS, torture

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("films", FILMS)
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_sweep_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int, films: str) -> None:
    for name in ("ZOO_HOME", "STARTS", "ZOO_SAVE_SECONDS", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")  # put back at the end
    found = torture(tmp_path, kills, seed=1, films=films)
    assert found.wrong == []
    assert found.kills == kills
    assert CELLS <= found.starts <= CELLS + 2 * kills  # each kill ends at most one cell of each driver
