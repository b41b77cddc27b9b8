import copy
import pickle

import pytest
import torch

from sparse_zoo import Layout, Shot, ZooError
from sparse_zoo.testing import slow


def test_stream_order() -> None:
    layout = Layout.film([Shot(2, 1, 2, text=1), Shot(1, 2, 1)], caption=2)
    table = [
        (0, -1, -1, -1, -1, True, -1),
        (0, -1, -1, -1, -1, True, -1),
        (0, 0, -1, -1, -1, True, -1),
        (0, 0, 0, 0, 0, False, 0),
        (0, 0, 0, 0, 1, False, 0),
        (0, 0, 1, 0, 0, False, 1),
        (0, 0, 1, 0, 1, False, 1),
        (0, 1, 2, 0, 0, False, 0),
        (0, 1, 2, 1, 0, False, 0),
    ]
    names = ("sample", "shot", "frame", "row", "col", "is_text", "shot_frame")
    assert len(layout) == len(table)
    for name, column in zip(names, zip(*table, strict=True), strict=True):
        assert getattr(layout, name).tolist() == list(column), name
    assert layout.rows.tolist() == [-1, -1, -1, 1, 1, 1, 1, 2, 2]
    assert layout.dense_pairs == 81


def test_pack_numbers_samples_and_compares_by_content() -> None:
    a, b = Layout.film([Shot(1, 2, 2)]), Layout.film([Shot(2, 1, 1, 1)], caption=1)
    packed = Layout.pack([a, b])
    assert packed.sample.tolist() == [0] * 4 + [1] * 4
    assert packed == Layout.pack([Layout.film([Shot(1, 2, 2)]), b])
    assert hash(packed) == hash(Layout.pack([a, b]))
    assert packed.dense_pairs == 16 + 16


def test_chunks_never_cross_bounds(film: Layout) -> None:
    for by in ("shot", "frame"):
        chunks = film.chunks(by, frames=2)
        assert int(chunks.sizes.sum()) == len(film)
        for piece in range(chunks.count):
            tokens = chunks.piece_of[0, 0] == piece
            assert (
                len(
                    {
                        (int(s), int(h), bool(t))
                        for s, h, t in zip(film.sample[tokens], film.shot[tokens], film.is_text[tokens], strict=True)
                    }
                )
                == 1
            )
            frames = film.shot_frame[tokens]
            if by == "frame" and not film.is_text[tokens].any():
                assert int(frames.max() - frames.min()) <= 1
                assert int(frames.min()) % 2 == 0
    fixed = film.chunks("fixed", tokens=7)
    lengths = [len(f) for f in film.films]
    assert fixed.sizes[0, 0].tolist() == [min(7, n - i) for n in lengths for i in range(0, n, 7)]


@pytest.mark.parametrize("tokens", [1, 5, 12, 17, 33, 48, 200])
def test_chunks_by_tokens_are_even_whole_frames_of_a_shot(tokens: int, film: Layout) -> None:
    chunks = film.chunks("tokens", tokens=tokens)
    want = slow.chunk_names(film, "tokens", 1, tokens)
    order = list(dict.fromkeys(want))
    assert chunks.piece_of[0, 0].tolist() == [order.index(name) for name in want]
    per_frame, video = chunks.of(film.rows * film.cols), chunks.is_text == 0
    size = chunks.sizes[0, 0]
    assert bool((size[video] % per_frame[video] == 0).all())
    assert bool((size[video] <= per_frame[video].clamp(min=tokens)).all())


@pytest.mark.parametrize(
    ("frames", "tokens", "sizes"),
    [
        (24, 11 * 6, [8, 8, 8]),
        (24, 11 * 6 + 5, [8, 8, 8]),
        (24, 12 * 6 - 1, [8, 8, 8]),
        (24, 12 * 6, [12, 12]),
        (10, 4 * 6, [4, 3, 3]),
        (7, 2 * 6, [2, 2, 2, 1]),
        (23, 5 * 6, [5, 5, 4, 5, 4]),
        (3, 5, [1, 1, 1]),
        (3, 999, [3]),
    ],
)
def test_chunks_by_tokens_are_the_fewest_and_as_even_as_frames_allow(
    frames: int, tokens: int, sizes: list[int]
) -> None:
    film = Layout.film([Shot(frames, 2, 3, 4), Shot(1, 1, 1)], caption=3)
    video = [6 * size for size in sizes]
    assert slow.even_chunks(frames, 6, tokens) == sizes
    assert film.chunks("tokens", tokens=tokens).sizes[0, 0].tolist() == [3, 4, *video, 1]


def test_chunk_longer_than_the_film_is_one_chunk() -> None:
    film = Layout.film([Shot(2, 2, 2)])
    assert film.chunks("frame", frames=99).count == 1
    assert film.chunks("tokens", tokens=9999).count == 1
    assert film.chunks("fixed", tokens=9999).count == 1


def test_captions_inside_join_their_shot() -> None:
    film = Layout.film([Shot(1, 2, 2, 3), Shot(1, 1, 1, 1)], caption=2)
    pieces = film.chunks("shot", captions="inside")
    assert pieces.sizes[0, 0].tolist() == [2, 7, 2]
    assert pieces.shot.tolist() == [-1, 0, 1]
    assert pieces.is_text.tolist() == [1, -1, -1]


def test_tiles_are_ragged_and_restart_at_shots() -> None:
    film = Layout.film([Shot(3, 3, 3, 2), Shot(2, 3, 3)])
    assert film.tiles((2, 2, 3)).sizes[0, 0].tolist() == [12, 6, 6, 3, 12, 6]
    through = film.tiles((2, 2, 3), stop_at_shots=False)
    assert through.sizes[0, 0].tolist() == [12, 6, 12, 6, 6, 3]
    assert int(through.sizes.sum()) == int((~film.is_text).sum())


def test_partition_by_tensor_and_where() -> None:
    film = Layout.film([Shot(1, 2, 2)])
    pieces = film.partition(torch.tensor([5, 3, 5, 3]), where=torch.tensor([True, True, True, False]))
    assert pieces.piece_of.tolist() == [[[0, 1, 0, -1]]]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Shot(0, -1, 2), ["frames must be at least 1", "rows must be at least 1"]),
        (lambda: Layout.film([], caption=0), ["at least one token"]),
        (lambda: Layout.film([Shot(1, 1, 1)], caption=-1), ["caption must be at least 0, got -1"]),
        (lambda: Layout.film([Shot(1, 1, 1)]).chunks("frames"), ["did you mean 'frame'"]),
        (lambda: Layout.film([Shot(1, 1, 1)]).chunks("fixed"), ["tokens must be at least 1, got None"]),
        (lambda: Layout.film([Shot(1, 1, 1)]).chunks("tokens", tokens=0), ["tokens must be at least 1, got 0"]),
        (lambda: Layout.film([Shot(1, 1, 1)]).partition("shots"), ["did you mean 'shot'"]),
        (lambda: Layout.film([Shot(1, 1, 1)]).tiles((1, 0, 1)), ["got (1, 0, 1)"]),
        (lambda: Layout.pack([]), ["at least one layout"]),
    ],
)
def test_errors_say_what_and_what_is_allowed(make, said) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ZooError) as error:
        make()
    for words in said:
        assert words in str(error.value)


def test_pickles_copies_and_moves() -> None:
    layout = Layout.film([Shot(2, 2, 2, 1)], caption=1)
    for other in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout), layout.to("cpu")):
        assert other == layout
        assert torch.equal(other.row, layout.row)
    assert layout.to("meta") != layout
