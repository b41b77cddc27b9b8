"""The outer loop's choice of shots, against plain Python."""

import warnings

import pytest
import torch

from sparse_zoo import Layout, Shot, ZooError
from sparse_zoo.routing import top_shots

FILM = Layout.film([Shot(2, 2, 3, 2), Shot(1, 1, 1), Shot(3, 2, 2, 1), Shot(1, 3, 3, 4), Shot(2, 1, 2)], caption=3)


def slow_top_shots(x: torch.Tensor, layout: Layout, shot: int, count: int) -> list[int]:
    """x (L, dim): tokens are summed one by one."""
    means = []
    for number in range(shot + 1):
        mine = [x[i].double() for i in range(len(layout)) if int(layout.shot[i]) == number]
        means.append(sum(mine) / len(mine))
    ranked = sorted(range(shot), key=lambda s: (-float(means[s] @ means[shot]), s))
    return sorted(ranked[:count])


@pytest.mark.parametrize(("shot", "count"), [(0, 0), (1, 1), (3, 1), (3, 2), (4, 2), (4, 4)])
def test_top_shots_are_the_slow_ones(shot: int, count: int) -> None:
    x = torch.randn(5, len(FILM), 7, dtype=torch.float64)
    got = top_shots(x, FILM, shot, count)
    assert (got.dtype, got.shape) == (torch.int64, (5, count))
    assert got.tolist() == [slow_top_shots(item, FILM, shot, count) for item in x]


def test_top_shots_are_chosen_by_captions_too_but_not_by_the_global_one() -> None:
    x = torch.zeros(1, len(FILM), 2)
    x[:, (FILM.shot == 4) | (FILM.shot == 2) & FILM.is_text] = 1.0
    x[:, FILM.shot == -1] = 100.0
    x[:, FILM.shot == 0] = -1.0
    assert top_shots(x, FILM, 4, 1).tolist() == [[2]]


def test_top_shots_ties_go_to_the_earlier_and_the_order_is_the_films() -> None:
    assert top_shots(torch.zeros(2, len(FILM), 3), FILM, 4, 2).tolist() == [[0, 1]] * 2
    x = (FILM.shot == 3).float()[None, :, None] + (FILM.shot == 4).float()[None, :, None]
    assert top_shots(x, FILM, 4, 2).tolist() == [[0, 3]]


def test_top_shots_says_that_there_are_fewer() -> None:
    x = torch.randn(2, len(FILM), 3)
    with pytest.warns(UserWarning, match="5 shots before shot 2 were asked for, there are 2"):
        assert top_shots(x, FILM, 2, 5).tolist() == [[0, 1]] * 2
    with pytest.warns(UserWarning, match="there are 0"):
        assert top_shots(x, FILM, 0, 1).shape == (2, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        top_shots(x, FILM, 2, 2)


def test_top_shots_refuses_what_does_not_fit() -> None:
    with pytest.raises(ZooError) as error:
        top_shots(torch.zeros(1, 3, 2), Layout.pack([FILM, FILM]), 5, -1)
    for words in ("one film, got 2", "got (1, 3, 2)", "shot must be 0 … 4, got 5", "at least 0, got -1"):
        assert words in str(error.value)
