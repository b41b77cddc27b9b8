"""The picture must show the plan: its averages are those of the dense mask."""

import pytest
import torch

from sparse_zoo.errors import ZooError
from sparse_zoo.layout import Layout, Shot
from sparse_zoo.picture import INK, PAPER, RULER, coverage, picture
from sparse_zoo.plan import Plan

FILM = Layout.film([Shot(2, 3, 3, 2), Shot(1, 3, 3, 1), Shot(3, 2, 2, 4)], caption=3)
LAYOUT = Layout.pack([FILM, Layout.film([Shot(1, 2, 2), Shot(1, 2, 3, 1)])])


def averaged(mask: torch.Tensor, bins: int) -> torch.Tensor:
    """The obvious way: the mask, then the mean over each pair of bins."""
    rows, cols = (torch.arange(n) * bins // n for n in mask.shape)
    return torch.stack(
        [torch.stack([mask[rows == r][:, cols == c].double().mean() for c in range(bins)]) for r in range(bins)]
    ).float()


def plans() -> dict[str, Plan]:
    torch.manual_seed(0)
    length = len(LAYOUT)
    chunks = LAYOUT.chunks("frame")
    scores = torch.rand(2, 3, length, len(chunks))
    chosen = scores.topk(3).indices.masked_fill(torch.rand(2, 3, length, 3) < 0.3, -1)
    by_head = torch.randint(-1, 4, (2, 3, length))
    shots = LAYOUT.chunks("shot", captions="inside")
    return {
        "dense": Plan.dense(LAYOUT),
        "routed": Plan.routed(chunks, chosen),
        "routed by table": Plan.routed(chunks, scores > 0.6),
        "groups by head": Plan.groups(by_head),
        "blocks": Plan.blocks(shots, chunks, torch.rand(len(shots), len(chunks)) > 0.5),
        "union": Plan.within(shots) | Plan.routed(chunks, chosen),
    }


@pytest.mark.parametrize("name", plans())
@pytest.mark.parametrize("bins", [1, 7, len(LAYOUT)])
def test_coverage_is_the_averaged_mask(name: str, bins: int) -> None:
    plan = plans()[name]
    mask = plan.dense_mask()
    for batch in range(mask.shape[0]):
        for head in range(mask.shape[1]):
            want = averaged(mask[batch, head], bins)
            torch.testing.assert_close(coverage(plan, bins, batch=batch, head=head), want)


def test_coverage_refuses_more_bins_than_tokens() -> None:
    with pytest.raises(ZooError, match="bins must be"):
        coverage(Plan.dense(LAYOUT), len(LAYOUT) + 1)


@pytest.mark.parametrize("pixels", [16, len(LAYOUT), 200])
def test_picture_size_and_ink(pixels: int) -> None:
    image = picture(Plan.dense(FILM), FILM, pixels=pixels)
    assert image.shape == (pixels + RULER, pixels + RULER, 3)
    assert image.dtype == torch.uint8
    inside = image[RULER:, RULER:].reshape(-1, 3)
    assert (inside == torch.tensor(INK)).all(-1).any()  # a dense film is all ink but for its lines
    assert not (inside == torch.tensor(PAPER)).all(-1).any()


def test_picture_marks_every_shot_and_film() -> None:
    pixels = 2 * len(LAYOUT)
    blank = Plan.groups(torch.full((len(LAYOUT),), -1), count=1)
    inside = picture(blank, LAYOUT, pixels=pixels)[RULER:, RULER:]
    line = (inside != torch.tensor(PAPER)).any(-1)
    row = line.all(dim=1).nonzero()[:, 0]
    begins = torch.cat([LAYOUT.shot, LAYOUT.sample + 10]).view(2, -1).diff(dim=1).ne(0).any(0).nonzero()[:, 0] + 1
    assert row.tolist() == (2 * begins).tolist()
    assert torch.equal(line, line.T)


def test_picture_refuses_another_layout() -> None:
    with pytest.raises(ZooError, match="layout has"):
        picture(Plan.dense(LAYOUT), FILM)
