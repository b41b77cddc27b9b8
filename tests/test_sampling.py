"""Shot-by-shot sampling: what a prefix of shots is, what is kept of it, which shots enter."""

import warnings
from itertools import pairwise

import pytest
import torch
from toy_films import FIRST, PACKED, SECOND, SILENT, batch, open_model

import sparse_zoo as zoo
from lit_modules import Euler, RectifiedFlow, VideoDiT
from lit_modules.dit import Past
from lit_modules.flow import generator
from lit_modules.sampling import Generated
from lit_modules.stream import stream

FLOW = RectifiedFlow(shift=2.0)
FRAMES = {"name": "moc", "causal": "strict", "top_k": 1}
FIXED = {"name": "moc", "causal": "strict", "top_k": 2, "chunk": "fixed", "chunk_tokens": 8}
STRICT = {
    "frames": FRAMES,
    "fixed": FIXED,
    "text reads text": {**FRAMES, "text_reads": "text"},
    "layers": [FRAMES, FIXED],
    "scheduled": {**FRAMES, "schedule": {"top_k": {5: 3}}},
    "moc_fixed": {"name": "moc_fixed", "causal": "strict", "top_k": 2, "chunk_tokens": 8},
    "rolling": {"name": "rolling", "window": 2, "chunk_frames": 2},
    "rolling without sinks": {"name": "rolling", "window": 1, "sinks": 0, "chunk_frames": 1},
}
LONG = zoo.Layout.film(
    [zoo.Shot(2, 3, 3, 4), zoo.Shot(1, 2, 4), zoo.Shot(3, 2, 3, 2), zoo.Shot(1, 3, 3, 1), zoo.Shot(2, 2, 2, 3)],
    caption=3,
)
FORMS = [("joint", "adaln"), ("joint", "tokens"), ("cross", "adaln")]


def double(films):
    return {**films, "clips": [clip.double() for clip in films["clips"]]}


def first_shots(films, count):
    """The same film, less what follows its first shots."""
    (film,) = films["layout"].films
    layout = zoo.Layout((zoo.Film(film.caption, film.shots[:count]),))
    return {"layout": layout, "clips": films["clips"][:count], "text": films["text"][:, : int(layout.is_text.sum())]}


class Rows:
    """How many query rows attention ran, pass by pass."""

    def __init__(self, model):
        self.counts = []
        model.blocks[0].attention.register_forward_hook(lambda _, args, __: self.counts.append(args[0].shape[2]))


def test_every_method_that_can_be_strict_is_sampled_with_a_cache():
    own = [name for name in zoo.names() if zoo.get(name).__module__.startswith("sparse_zoo.methods.")]
    sampled = {layer["name"] for given in STRICT.values() for layer in (given if isinstance(given, list) else [given])}
    assert {name for name in own if not isinstance(zoo.get(name).strict, str)} == sampled


@pytest.mark.parametrize(("text", "pooled"), FORMS)
@pytest.mark.parametrize("attention", STRICT.values(), ids=STRICT)
def test_a_prefix_of_shots_is_what_it_is_in_the_whole_film(attention, text, pooled):
    model = open_model(attention=attention, text=text, pooled_text=pooled).double().eval()
    films, time = double(batch(LONG, size=2)), torch.linspace(0.1, 0.9, 5, dtype=torch.float64).expand(2, -1)
    whole = model(model.patchify(films["clips"]), films["text"], time, LONG, step=6).velocity
    for count in (1, 3, 4):
        part = first_shots(films, count)
        video = model.patchify(part["clips"])
        alone = model(video, part["text"], time[:, :count], part["layout"], step=6).velocity
        torch.testing.assert_close(alone, whole[:, : video.shape[1]], rtol=0, atol=1e-9)


def test_a_global_caption_is_conditioned_by_its_words_at_time_0():
    told = []
    for layout, time in ((LONG, 0.2), (LONG, 0.9), (zoo.Layout.film([LONG.films[0].shots[0]], caption=3), 0.2)):
        model, films = open_model(), batch(layout)
        model.modulation.register_forward_pre_hook(lambda _, args: told.append(args[0]))
        model(
            model.patchify(films["clips"]),
            torch.arange(20)[None, : films["text"].shape[1]],
            torch.tensor([time]),
            layout,
        )
    captions = [condition[:, -1] for condition in told]
    assert torch.equal(captions[0], captions[1])
    torch.testing.assert_close(captions[0], captions[2])
    assert not torch.equal(told[0][:, 0], told[1][:, 0])


@pytest.mark.parametrize("attention", STRICT.values(), ids=STRICT)
@pytest.mark.parametrize(("text", "pooled", "predicts"), [("joint", "adaln", "velocity"), ("cross", "tokens", "clean")])
def test_what_is_kept_of_earlier_shots_changes_nothing(attention, text, pooled, predicts):
    model = open_model(attention=attention, text=text, pooled_text=pooled, predicts=predicts).double().eval()
    films, time = double(batch(LONG, size=2)), torch.tensor([[0.0, 0.0, 0.0, 0.3, 0.8]] * 2, dtype=torch.float64)
    x = model.patchify(films["clips"])
    whole = model(x, films["text"], time, LONG, step=6).velocity
    rows, past, start = Rows(model), Past(), 0
    for count in (2, 3, 5):
        part = first_shots(films, count)
        video = model.patchify(part["clips"])
        out = model(video, part["text"], time[:, :count], part["layout"], step=6, past=past)
        torch.testing.assert_close(out.velocity, whole[:, start : video.shape[1]], rtol=0, atol=1e-9)
        past, start = out.past, video.shape[1]
    seen = len(LONG) if text == "joint" else x.shape[1]
    assert sum(rows.counts) == past.tokens == seen
    assert past.video == x.shape[1]


def test_a_model_that_looks_ahead_keeps_nothing():
    model, films = open_model(attention=[FRAMES, {"name": "moc"}]), batch(FIRST)
    assert not model.strict
    with pytest.raises(zoo.ZooError, match="only where every layer's attention is strictly causal"):
        model(model.patchify(films["clips"]), films["text"], torch.tensor([0.5]), FIRST, past=Past())


@pytest.mark.parametrize(
    ("attention", "text", "context", "guidance"),
    [
        ("frames", "joint", None, 2.0),
        ("frames", "joint", 2, 1.0),
        ("fixed", "joint", 2, 2.0),
        ("fixed", "cross", None, 1.0),
        ("text reads text", "joint", None, 1.0),
        ("layers", "cross", 0, 2.0),
        ("rolling", "joint", None, 2.0),
        ("rolling without sinks", "cross", 2, 1.0),
    ],
)
def test_kept_keys_give_the_film_that_recomputing_gives(monkeypatch, attention, text, context, guidance):
    euler, films = Euler(2, guidance, "shots", context), double(batch(LONG, size=2))
    known = torch.tensor([True, False, False, True, False])
    model = open_model(attention=STRICT[attention], text=text).double()
    rows = Rows(model)
    kept = euler.generate(model, FLOW, films, known=known, seed=4)
    ran, rows.counts[:] = sum(rows.counts), []
    with monkeypatch.context() as patched:
        patched.setattr(VideoDiT, "strict", False)
        recomputed = euler.generate(model, FLOW, films, known=known, seed=4)
    for a, b in zip(kept.clips, recomputed.clips, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert kept.context == recomputed.context
    if context == 0:
        assert ran == sum(rows.counts)
    else:
        assert ran < 0.8 * sum(rows.counts)


def test_each_row_runs_once_a_step_and_once_to_be_kept():
    model, films, steps = open_model(attention=FRAMES), batch(LONG), 2
    rows = Rows(model)
    Euler(steps, order="shots").sample(model, FLOW, films)
    sizes = [len(shot) for shot in LONG.films[0].shots]
    first = 3 + sizes[0]  # the global caption with the first shot
    wanted = [first] * steps + [row for i in range(1, 5) for row in ([first, *sizes[1:]][i - 1], *[sizes[i]] * steps)]
    assert rows.counts == wanted


@pytest.mark.parametrize("method", ["dense", "moc", "moga"])
def test_without_strict_causality_earlier_shots_are_recomputed_in_every_step(method):
    model, films, steps = open_model(attention={"name": method}), batch(LONG), 2
    rows = Rows(model)
    Euler(steps, order="shots").sample(model, FLOW, films)
    sizes = [3 + sum(len(shot) for shot in LONG.films[0].shots[:count]) for count in range(1, 6)]
    assert rows.counts == [size for size in sizes for _ in range(steps)]


@pytest.mark.parametrize("attention", [FRAMES, {"name": "dense"}])
def test_each_shot_is_sampled_with_clean_earlier_shots(attention):
    """Against whole-film sampling of each prefix with the shots before given."""
    model, films = open_model(attention=attention).double(), double(batch(LONG, size=2))
    drawn = Euler(2, 1.5, "shots").sample(model, FLOW, films, seed=7)
    noise = torch.randn(2, len(stream(LONG).video), 24, generator=generator("sample", 7)).double()
    clips: list = []
    for shot in range(5):
        part = first_shots({**films, "clips": [*clips, *films["clips"][shot:]]}, shot + 1)
        x, own = model.patchify(part["clips"]), stream(part["layout"]).shot_of_video == shot
        x[:, own] = noise[:, : x.shape[1]][:, own]
        time = torch.zeros(2, shot + 1, dtype=torch.float64)
        grid = FLOW.warp(torch.linspace(1, 0, 3)).tolist()
        for now, then in pairwise(grid):
            time[:, -1] = now
            with torch.no_grad():
                guided, plain = (
                    model(x, text, time, part["layout"]).velocity
                    for text in (part["text"], torch.full_like(part["text"], 20))
                )
            x[:, own] += (then - now) * (plain + 1.5 * (guided - plain))[:, own]
        clips.append(model.unpatchify(x, part["layout"])[-1])
    for got, want in zip(drawn, clips, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_films_of_a_stream_are_sampled_as_alone():
    model = open_model(attention=FRAMES).double()
    packed = double(batch(zoo.Layout.pack([LONG, SECOND, SILENT])))
    known = torch.tensor([True] + [False] * 9)
    euler = Euler(1, 2.0, "shots", 1)
    found = euler.generate(model, FLOW, packed, known=known, seed=1)
    assert [list(film[0]) for film in found.context] == [[1, 2, 3, 4], [0, 1, 2], [0, 1]]
    assert all(len(before) == min(1, shot) for film in found.context for shot, before in film[0].items())
    again = {**packed, "clips": [*found.clips[:5], *packed["clips"][5:]]}  # a film drawn does not move the next one
    later = euler.generate(model, FLOW, again, known=torch.tensor([True] * 5 + [False] * 5), seed=1)
    for a, b in zip(found.clips, later.clips, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_chosen_shots_make_a_film_of_their_own(monkeypatch):
    model, films, seen = open_model(attention={"name": "dense"}), batch(LONG, size=2), []
    wanted = {1: [[0], [0]], 2: [[1], [0]], 3: [[0], [2]], 4: [[3], [1]]}
    told = iter([wanted[shot][item] for item in range(2) for shot in (2, 3, 4)])
    asked = []

    def top_shots(x, layout, shot, count):
        asked.append((x, layout, shot, count))
        return torch.tensor([next(told)])

    monkeypatch.setattr("lit_modules.sampling.top_shots", top_shots)
    model.register_forward_pre_hook(lambda _, args: seen.append((args[1], args[3])))
    drawn = Euler(1, order="shots", context=1).generate(model, FLOW, films)
    assert drawn.context == [[{0: []} | {shot: wanted[shot][item] for shot in (1, 2, 3, 4)} for item in range(2)]]
    shots, bounds = LONG.films[0].shots, [3, 7, 7, 9, 10, 13]
    for item in range(2):
        for shot in range(5):
            text, layout = seen[5 * item + shot]
            members = [*drawn.context[0][item][shot], shot]
            assert layout.films == (zoo.Film(3, tuple(shots[i] for i in members)),)
            ids = [films["text"][item, :3], *(films["text"][item, bounds[i] : bounds[i + 1]] for i in members)]
            assert torch.equal(text[0], torch.cat(ids))
    # X is what enters the first block of the film so far: the drawn shots, and the new one still noise.
    for item in range(2):
        for x, layout, shot, count in asked[3 * item : 3 * item + 3]:
            assert (len(layout.films[0].shots), count) == (shot + 1, 1)
            noise = torch.randn(2, len(stream(LONG).video), 24, generator=generator("sample", 0))
            table, length = stream(layout), len(stream(layout).video)
            clips = [clip[item : item + 1] for clip in drawn.clips[: shot + 1]]
            video, own = model.patchify(clips), table.shot_of_video == shot
            video[:, own] = noise[item : item + 1, :length][:, own]
            words = model.words(films["text"][item : item + 1, : len(table.text)])
            torch.testing.assert_close(x, model.embed(video, words, layout)[0])


@pytest.mark.slow
def test_more_context_than_there_is_takes_all_and_says_so_once():
    model, films = open_model(attention=FRAMES), batch(PACKED)
    with pytest.warns(UserWarning, match="context 5 takes every earlier shot; the longest film has 3 shots") as told:
        some = Euler(1, order="shots", context=5).generate(model, FLOW, films)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        every = Euler(1, order="shots").generate(model, FLOW, films)
        Euler(1, order="shots", context=1).generate(model, FLOW, films)
    assert some.context == every.context == [[{0: [], 1: [0]}], [{0: [], 1: [0], 2: [0, 1]}], [{0: [], 1: [0]}]]
    for a, b in zip(some.clips, every.clips, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_film_longer_than_any_before_can_be_sampled():
    layout = zoo.Layout.film([zoo.Shot(1, 2, 2, 1)] * 9, caption=1)
    drawn: Generated = Euler(1, order="shots", context=2).generate(
        open_model(attention=FRAMES), FLOW, batch(layout, size=2)
    )
    for film in drawn.context[0]:
        assert [len(film[shot]) for shot in range(9)] == [0, 1, 2, 2, 2, 2, 2, 2, 2]
        assert all(before == sorted(set(before)) and max(before, default=-1) < shot for shot, before in film.items())


@pytest.mark.parametrize(("order", "context"), [("film", None), ("shots", None), ("shots", 1)])
def test_it_counts_its_steps(order, context):
    calls, films = [], batch(PACKED, size=2)
    euler, known = Euler(2, order=order, context=context), ~stream(PACKED).last_shots
    for given in (None, known):
        calls.clear()
        euler.generate(open_model(depth=1), FLOW, films, known=given, on_step=lambda: calls.append(1))
        assert len(calls) == euler.count(films, given)


@pytest.mark.parametrize("order", ["film", "shots"])
def test_half_precision_draws_too(order):
    films, drawn = batch(LONG), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = open_model(attention=FRAMES).to(dtype)
        drawn[dtype] = Euler(2, order=order).sample(model, FLOW, films)
        assert all(clip.dtype == torch.float32 for clip in drawn[dtype])
    for a, b in zip(*drawn.values(), strict=True):
        assert (a - b).abs().mean() < 0.1 * a.abs().mean()


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(zoo.ZooError) as error:
        Euler(0, order="shot", context=-1)  # type: ignore[arg-type]
    for part in ("steps must be at least 1", "did you mean 'shots'", "context must be at least 0, got -1"):
        assert part in str(error.value)
    with pytest.raises(zoo.ZooError, match="context is for order 'shots'"):
        Euler(context=2)
