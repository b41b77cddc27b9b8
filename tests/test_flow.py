"""The flow: distribution of times, exact losses and samples on known fields, no draw from ambient state."""

import math
from types import SimpleNamespace

import pytest
import torch
from toy_films import FIRST, PACKED, SECOND, VOCABULARY, arguments, batch, open_model

import sparse_zoo as zoo
from lit_modules import DiTOutput, Euler, RectifiedFlow, VideoDiT
from lit_modules.flow import generator
from lit_modules.stream import stream

DRAWS = 20_000


class Field(VideoDiT):
    """A model whose velocity is a given function of x, text and t, the time of each token."""

    def __init__(self, velocity):
        super().__init__(**arguments())
        self.field, self.calls = velocity, []

    def forward(self, video, text, time, layout, **context):
        self.calls.append({"time": time, "text": text, "training": self.training, **context})
        at = SimpleNamespace(x=video, text=text, t=time[:, stream(layout).shot_of_video, None])
        return DiTOutput(self.field(at), {}, [])


def straight_to(clean):
    """The exact velocity where all films are `clean` (B, Nv, P): x_t = (1 - t)·clean + t·noise."""
    return lambda at: (at.x - clean) / at.t


def logit(t):
    return torch.log(t / (1 - t))


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (0.5, 0.7, 1.0), (-0.3, 1.5, 3.0)])
def test_times_are_logit_normal(mean, std, shift):
    flow = RectifiedFlow("logistic", mean, std, shift, per_shot=True)
    found = logit(flow.draw_times(DRAWS // 2, FIRST, generator("times")).double().flatten())
    # A shift by s adds log s to the logit. Bounds: four standard errors of the mean and of the deviation.
    assert abs(found.mean() - mean - math.log(shift)) < 4 * std / math.sqrt(DRAWS)
    assert abs(found.std() - std) < 4 * std / math.sqrt(2 * DRAWS)
    third = ((found - found.mean()) / found.std()).pow(3).mean()
    assert abs(third) < 4 * math.sqrt(6 / DRAWS)


def test_uniform_times_are_uniform_before_the_shift():
    flow = RectifiedFlow("uniform", shift=3.0, per_shot=True)
    time = flow.draw_times(DRAWS // 2, FIRST, generator("times")).double().flatten()
    before = (time / (3 - 2 * time)).sort().values  # u of 3u / (1 + 2u)
    # Kolmogorov and Smirnov: 1.95 / √n is passed once in a thousand times.
    assert (before - (torch.arange(len(before)) + 0.5) / len(before)).abs().max() < 1.95 / len(before) ** 0.5


@pytest.mark.parametrize("per_shot", [False, True])
def test_history_gives_the_first_shots_clean(per_shot):
    batch, share = 4000, 0.7
    layout = zoo.Layout.pack([PACKED, zoo.Layout.film([zoo.Shot(1, 2, 2)])])  # a film of one shot too
    drawn = RectifiedFlow(per_shot=per_shot, history=share).draw_times(batch, layout, generator("times"))
    for film, shots in enumerate(stream(layout).shots_of_film.tolist()):
        time = drawn[:, stream(layout).film_of_shot == film]
        given = (time == 0).sum(-1)
        assert torch.equal(time == 0, torch.arange(shots) < given[:, None])  # the first ones, and no others
        rates = [(given == count).double().mean() for count in range(shots)]
        assert sum(rates) == 1  # never all
        expected = [1 - share] + [share / (shots - 1)] * (shots - 1) if shots > 1 else [1.0]
        for rate, p in zip(rates, expected, strict=True):
            assert abs(rate - p) <= 4 * (p * (1 - p) / batch) ** 0.5
    assert not (RectifiedFlow(per_shot=per_shot).draw_times(batch, PACKED, generator("times")) == 0).any()


def test_known_shots_are_the_clean_ones_in_their_share_of_films():
    batch, known = 4000, torch.arange(7) % 3 == 0
    flow = RectifiedFlow(per_shot=True, history=0.5, known=0.6)
    clean = flow.draw_times(batch, PACKED, generator("times"), known) == 0
    chosen = torch.stack(
        [
            (clean[:, film == stream(PACKED).film_of_shot] == known[film == stream(PACKED).film_of_shot]).all(-1)
            for film in range(2)
        ],
        -1,
    ).double()
    assert bool(((chosen.mean(0) - 0.6).abs() < 0.2).all())
    only = RectifiedFlow(per_shot=True, known=1.0).draw_times(batch, PACKED, generator("times"), known)
    assert torch.equal(only == 0, known.expand(batch, -1))
    before = RectifiedFlow(per_shot=True, history=0.5)
    assert torch.equal(
        before.draw_times(batch, PACKED, generator("times"), known),
        before.draw_times(batch, PACKED, generator("times")),
    )


def test_clean_tokens_are_left_out_of_the_loss():
    films, table = batch(PACKED, size=2), stream(PACKED)
    model = Field(lambda at: torch.zeros_like(at.x))
    time = torch.full((2, len(table.film_of_shot)), 0.5)
    time[0, [0, 2]] = 0.0
    time[1, 6] = 0.0
    found = RectifiedFlow().loss(model, films["clips"], films["text"], time, PACKED, generator("a"))
    noisy = time[:, table.shot_of_video] > 0
    torch.testing.assert_close(found.loss, found.per_token[noisy].mean())
    assert (found.loss - found.per_token.mean()).abs() > 1e-4


def test_shots_share_their_films_time_unless_asked():
    films = stream(PACKED).film_of_shot
    for per_shot, distinct in ((False, 3), (True, len(films))):
        time = RectifiedFlow(per_shot=per_shot).draw_times(2, PACKED, generator("times"))
        assert time.shape == (2, len(films))
        assert len(time.unique()) == 2 * distinct
        if not per_shot:
            assert all(len(time[0, films == film].unique()) == 1 for film in range(3))


def test_the_exact_velocity_has_no_loss():
    films, flow = batch(PACKED, size=2), RectifiedFlow()
    clean = VideoDiT(**arguments()).patchify(films["clips"])
    found = flow.training_loss(Field(straight_to(clean)), films, generator("a"), step=3, seed=5)
    assert found.loss < 1e-8
    assert found.per_token.shape == clean.shape[:2]


def test_every_token_weighs_the_same():
    films, flow = batch(PACKED, size=2), RectifiedFlow()
    model = Field(lambda at: torch.zeros_like(at.x))
    clean = model.patchify(films["clips"])
    found = flow.training_loss(model, films, generator("a"), step=0, seed=0)
    per_token = found.per_token
    assert not per_token.requires_grad
    torch.testing.assert_close(found.loss, per_token.mean())
    # E (noise - clean)² = 1 + clean²; 2·66·24 squares, so four standard errors are below 0.15.
    assert abs(found.loss - 1 - clean.square().mean()) < 0.15


def test_draws_depend_on_their_purpose_alone():
    films, flow, model = batch(PACKED), RectifiedFlow(per_shot=True, drop_text=0.5), open_model()
    losses = []
    for ambient, purpose in ((1, "a"), (2, "a"), (2, "b")):
        torch.manual_seed(ambient)
        before = torch.get_rng_state()
        losses.append(flow.training_loss(model, films, generator(purpose), step=0, seed=0).loss)
        assert torch.equal(before, torch.get_rng_state())
    assert losses[0] == losses[1] != losses[2]
    assert generator("train", 1, 2).initial_seed() != generator("train", 12, "").initial_seed()


def test_captions_are_dropped_film_by_film():
    layout = zoo.Layout.pack([FIRST, SECOND])
    films = batch(layout, size=64)
    of_text = stream(layout).film_of_text
    seen = {}
    for rate in (0.0, 0.5, 1.0):
        model = Field(lambda at: torch.zeros_like(at.x))
        RectifiedFlow(drop_text=rate).training_loss(model, films, generator("a"), step=0, seed=0)
        seen[rate] = model.calls[0]["text"]
    assert torch.equal(seen[0.0], films["text"])
    assert (seen[1.0] == VOCABULARY).all()
    null = seen[0.5] == VOCABULARY
    dropped = torch.stack([null[:, of_text == film].all(1) for film in (0, 1)])
    kept = torch.stack([(~null[:, of_text == film]).all(1) for film in (0, 1)])
    assert (dropped ^ kept).all()
    assert 40 < dropped.sum() < 88  # of 128, four standard deviations
    assert (dropped[0] != dropped[1]).any()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7])
def test_sampling_a_straight_field_is_exact(steps, shift):
    films = batch(PACKED, size=2)
    clean = VideoDiT(**arguments()).patchify(films["clips"])
    clips = Euler(steps).sample(Field(straight_to(clean)), RectifiedFlow(shift=shift), films)
    for got, want in zip(clips, films["clips"], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("at", [0.2, 1.0])
def test_one_step_of_a_straight_field_is_exact(at):
    films = batch(PACKED, size=2)
    clean = VideoDiT(**arguments()).patchify(films["clips"])
    field = Field(straight_to(clean))
    for got, want in zip(RectifiedFlow().denoise(field, films, at), films["clips"], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert bool((field.calls[0]["time"] == at).all())
    assert not field.calls[0]["training"]


def test_sampling_takes_the_steps_it_says():
    films, steps = batch(FIRST), 5
    still, moving = (Field(lambda at, rate=rate: rate * at.x) for rate in (0.0, 1.0))
    noise = Euler(steps).sample(still, RectifiedFlow(), films)
    drawn = Euler(steps).sample(moving, RectifiedFlow(), films)  # dx = x dt: each of 5 steps keeps 4/5
    for start, end in zip(noise, drawn, strict=True):
        torch.testing.assert_close(end, start * 0.8**5)
    assert [round(float(call["time"][0, 0]), 6) for call in moving.calls] == [1.0, 0.8, 0.6, 0.4, 0.2]
    assert {call["step"] for call in moving.calls} == {None}
    assert not any(call["training"] for call in moving.calls)
    shifted = Field(lambda at: at.x)
    Euler(2).sample(shifted, RectifiedFlow(shift=3.0), films)
    assert [float(call["time"][0, 0]) for call in shifted.calls] == [1.0, 0.75]


def test_samples_are_a_function_of_the_seed():
    films, model = batch(FIRST), open_model()
    a, b, c = (Euler(2).sample(model, RectifiedFlow(), films, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert model.training


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guidance_goes_so_many_times_as_far(guidance):
    def velocity(at):
        return torch.full_like(at.x, 1.0 if (at.text == VOCABULARY).all() else 3.0)

    films, model = batch(FIRST), Field(velocity)
    still = Euler(3).sample(Field(lambda at: torch.zeros_like(at.x)), RectifiedFlow(), films)
    drawn = Euler(3, guidance).sample(model, RectifiedFlow(), films)
    for start, end in zip(still, drawn, strict=True):
        torch.testing.assert_close(end, start - (1 + guidance * 2))
    assert len(model.calls) == (3 if guidance == 1 else 6)
    memories = {id(call["memory"]) for call in model.calls}
    assert len(memories) == (1 if guidance == 1 else 2)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_known_shots_stay_as_given_at_time_zero(guidance):
    films, known = batch(PACKED, size=2), ~stream(PACKED).last_shots
    assert known.tolist() == [True, False, True, True, False, True, False]
    model = Field(lambda at: at.x + at.t)
    clips = Euler(3, guidance).sample(model, RectifiedFlow(), films, known=known)
    for given, clip, real in zip(known, clips, films["clips"], strict=True):
        assert torch.equal(clip, real) == bool(given)
    for call in model.calls:
        assert not call["time"][:, known].any()
        assert (call["time"][:, ~known] > 0).all()
    with pytest.raises(zoo.ZooError, match="known is for 3 shots, the layout has 7"):
        Euler(3).sample(model, RectifiedFlow(), films, known=known[:3])


def test_bad_settings_are_refused():
    with pytest.raises(zoo.ZooError) as error:
        RectifiedFlow("uniformly", std=-1, shift=0, drop_text=1.5, history=-0.5)
    for part in (
        "unknown times 'uniformly'",
        "history must be in [0, 1], got -0.5",
        "std must be at least 0, got -1",
        "shift must be above 0, got 0",
        "drop_text must be in [0, 1], got 1.5",
    ):
        assert part in str(error.value)
    with pytest.raises(zoo.ZooError, match="steps must be at least 1, got 0"):
        Euler(0)
