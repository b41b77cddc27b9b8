import json

import pytest

from sparse_zoo import bench
from sparse_zoo.kernels import grouped


def test_rows_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--tokens", "2048", "--heads", "1", "--repeats", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["method"], row["pass"]) for row in rows] == [
        (method, which) for method in bench.CPU_SUITE for which in ("forward", "forward+backward")
    ]
    for row in rows:
        assert row["attained"] == pytest.approx(row["dense_seconds"] / row["seconds"])
        assert row["bound"] == pytest.approx(1 / row["density"])
        assert row["padded_share"] >= 0


def test_a_wrong_kernel_gets_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = grouped._merge_into

    def wrong(out, lse, parts, first):  # type: ignore[no-untyped-def]
        right(out, lse, parts, first)
        out += 0.01

    monkeypatch.setattr(grouped, "_merge_into", wrong)
    assert bench.main(["--tokens", "2048", "--heads", "1", "--repeats", "1", "--methods", "window"]) == 1
    assert "differs from the oracle" in capsys.readouterr().out
