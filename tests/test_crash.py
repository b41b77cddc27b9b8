"""A sweep whose drivers are killed at random moments, again and again, loses, repeats and doubles nothing."""

from pathlib import Path

import pytest
from crash_harness import CELLS, FILMS, torture

KILLS = 20
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("films", FILMS)
def test_killed_sweep_loses_repeats_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, films: str
) -> None:
    for name in ("ZOO_HOME", "STARTS", "ZOO_SAVE_SECONDS", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")  # put back at the end
    found = torture(tmp_path, KILLS, seed=1, films=films)
    assert found.wrong == []
    assert found.kills == KILLS
    assert CELLS <= found.starts <= CELLS + 2 * KILLS  # each kill ends at most one cell of each driver
