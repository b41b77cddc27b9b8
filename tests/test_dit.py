"""The model: shapes, what reaches what, and that packing, batching and recomputing change nothing."""

from dataclasses import replace

import pytest
import torch
from tiers import cases
from toy_films import FIRST, METHODS, PACKED, SECOND, SILENT, arguments, attention, batch, open_model

import sparse_zoo as zoo
from lit_modules import Euler, RectifiedFlow, VideoDiT, dit
from lit_modules.stream import stream, video_only

SHOTS = len(stream(PACKED).film_of_shot)
TEXTS = ("joint", "cross")


def run(model, films, time=None):
    layout = films["layout"]
    time = torch.linspace(0.1, 0.9, len(stream(layout).film_of_shot)) if time is None else time
    x = model.patchify(films["clips"])
    return model(x, films["text"], time.expand(len(x), -1), layout)


def shots_that_differ(layout, a, b):
    """Shots of the stream in which two outputs (B, Nv, P) differ at all."""
    return stream(layout).shot_of_video[(a - b).abs().amax((0, 2)) > 1e-5].unique().tolist()


def test_each_patch_is_where_the_layout_says():
    films, model = batch(PACKED, size=2), VideoDiT(**arguments())
    patches = model.patchify(films["clips"])
    table = stream(PACKED)
    assert patches.shape == (2, len(table.video), 3 * 8)
    for token in range(0, len(table.video), 5):
        where = table.video[token]
        clip = films["clips"][table.shot_of_video[token]]
        f, h, w = (2 * int(axis[where]) for axis in (PACKED.shot_frame, PACKED.row, PACKED.col))
        patch = clip[:, f : f + 2, :, h : h + 2, w : w + 2].transpose(1, 2)
        assert torch.equal(patches[:, token], patch.flatten(1))
    for clip, back in zip(films["clips"], model.unpatchify(patches, PACKED), strict=True):
        assert torch.equal(clip, back)


def test_positions_tell_shots_and_words_apart():
    layout = zoo.Layout.film([zoo.Shot(2, 1, 2, 2), zoo.Shot(3, 1, 1, 1)], caption=2)
    assert stream(layout).positions.tolist() == [
        [-3, 0, 0], [-3, 1, 1],                          # global caption
        [-1, 0, 0], [-1, 1, 1],                          # caption of shot 0
        [0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1],      # shot 0
        [3, 0, 0],                                       # caption of shot 1
        [4, 0, 0], [5, 0, 0], [6, 0, 0],                 # shot 1, after a gap of two
    ]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_only_differences_of_positions_matter_and_they_do(monkeypatch, text):
    model, films = open_model(text=text), batch(FIRST)
    velocity = run(model, films).velocity
    for move, same in ((lambda x: x + 7, True), (lambda x: -x, False), (lambda x: 0 * x, False)):
        table = stream(FIRST), stream(video_only(FIRST))
        moved = {len(each.row_of): replace(each, positions=move(each.positions)) for each in table}
        monkeypatch.setattr(dit, "stream", lambda layout, moved=moved: moved[len(layout)])
        change = (run(model, films).velocity - velocity).abs().max()
        assert change < 1e-4 if same else change > 1e-2


@pytest.mark.parametrize("text", TEXTS)
def test_a_new_model_says_zero_and_an_open_one_does_not(text):
    films = batch(PACKED, size=2)
    assert not run(VideoDiT(**arguments(text=text)), films).velocity.any()
    output = run(open_model(text=text), films)
    assert output.velocity.shape == (2, len(stream(PACKED).video), 24)
    assert output.velocity.abs().mean() > 0.05
    assert len(output.results) == 2


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("method", cases(METHODS))
def test_packed_films_give_what_they_give_alone(method, text):
    model = open_model(text=text, attention=attention(method)).double()
    parts = [batch(layout, seed=i) for i, layout in enumerate((FIRST, SECOND, SILENT))]
    packed = {
        "layout": PACKED,
        "clips": [clip.double() for part in parts for clip in part["clips"]],
        "text": torch.cat([part["text"] for part in parts], dim=1),
    }
    times = torch.linspace(0.1, 0.9, SHOTS, dtype=torch.float64)
    shots = [len(part["clips"]) for part in parts]
    alone = []
    for part, time in zip(parts, times.split(shots), strict=True):
        part["clips"] = [clip.double() for clip in part["clips"]]
        alone.append(run(model, part, time).velocity)
    torch.testing.assert_close(run(model, packed, times).velocity, torch.cat(alone, dim=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", cases(METHODS))
def test_batch_items_do_not_meet(method):
    model, films = open_model(attention=attention(method)), batch(FIRST, size=3)
    whole = run(model, films).velocity
    one = {"layout": FIRST, "clips": [clip[1:2] for clip in films["clips"]], "text": films["text"][1:2]}
    torch.testing.assert_close(whole[1:2], run(model, one).velocity, rtol=0, atol=1e-5)


def test_a_shot_time_stays_within_its_film():
    model, films = open_model(), batch(PACKED)
    time = torch.full((SHOTS,), 0.5)
    changed = time.clone()
    changed[3] = 0.9  # a shot of the second film, whose shots are 2, 3, 4
    a, b = run(model, films, time).velocity, run(model, films, changed).velocity
    assert shots_that_differ(PACKED, a, b) == [2, 3, 4]


def test_one_time_for_all_shots_may_be_given_once():
    model, films = open_model(), batch(PACKED, size=2)
    x, time = model.patchify(films["clips"]), torch.tensor([0.2, 0.7])
    once = model(x, films["text"], time, PACKED).velocity
    assert torch.equal(once, model(x, films["text"], time[:, None].expand(-1, SHOTS), PACKED).velocity)


@pytest.mark.parametrize(
    ("word", "reached"),
    [(0, [0, 1]), (3, [0]), (7, [1]), (9, [3]), (10, [4])],
    ids=["global caption", "shot 0", "shot 1", "second film, shot 1", "second film, shot 2"],
)
def test_cross_attention_reads_own_caption_and_global_caption(word, reached):
    model, films = open_model(text="cross", pooled_text="none", depth=1), batch(PACKED)
    other = {**films, "text": films["text"].clone()}
    other["text"][:, word] = (other["text"][:, word] + 1) % 20
    a, b = run(model, films).velocity, run(model, other).velocity
    assert shots_that_differ(PACKED, a, b) == reached


def test_cross_attention_tells_the_order_of_words():
    model, films = open_model(text="cross", pooled_text="none", depth=1), batch(FIRST)
    films["text"] = torch.arange(9)[None]
    swapped = {**films, "text": films["text"].clone()}
    swapped["text"][:, [3, 5]] = films["text"][:, [5, 3]]  # two words of the caption of shot 0
    assert shots_that_differ(FIRST, run(model, films).velocity, run(model, swapped).velocity) == [0]


@pytest.mark.parametrize("text", TEXTS)
def test_films_without_any_text_work(text):
    output = run(open_model(text=text), batch(SILENT))
    assert output.velocity.isfinite().all()


def test_conditions_pool_own_and_global_caption_of_shots_and_the_latter_of_films():
    table = stream(PACKED)
    words = torch.randn(2, len(table.text), 5, generator=torch.Generator().manual_seed(0))
    captions = {(0, -1): words[:, 0:3], (0, 0): words[:, 3:7], (0, 1): words[:, 7:9], (1, 1): words[:, 9:10]}
    captions[1, 2] = words[:, 10:11]
    shots = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    none = words[:, :0]
    wanted = [captions.get(at, none).sum(1) + captions.get((at[0], -1), none).sum(1) for at in shots]
    wanted += [captions.get((film, -1), none).sum(1) for film in range(3)]
    torch.testing.assert_close(dit._pool(words, table), torch.stack(wanted, dim=1))


def test_attention_receives_all_of_its_inputs():
    model, films = open_model(), batch(PACKED, size=2)
    told = []
    for block in model.blocks:
        block.attention.register_forward_pre_hook(lambda _, args, kwargs: told.append((args, kwargs)), with_kwargs=True)
        block.qkv.register_forward_pre_hook(lambda _, args: told.append(args[0]))
    x, time, memory = model.patchify(films["clips"]), torch.rand(2, SHOTS), {}
    model(x, films["text"], time, PACKED, step=4, seed=9, memory=memory)
    for layer, (projected, (args, kwargs)) in enumerate(zip(told[::2], told[1::2], strict=True)):
        assert [tuple(part.shape) for part in args[:3]] == [(2, 2, len(PACKED), 16)] * 3
        assert args[3] == PACKED
        assert kwargs["hidden"] is projected
        assert kwargs["memory"] is memory
        assert torch.equal(kwargs["noise"], time)
        assert {name: kwargs[name] for name in ("layer", "layers", "step", "seed")} == {
            "layer": layer, "layers": 2, "step": 4, "seed": 9,
        }  # fmt: skip


def test_a_clean_prediction_is_turned_into_the_velocity_that_leads_to_it():
    model, films, said = open_model(predicts="clean"), batch(PACKED), []
    model.final.register_forward_hook(lambda *call: said.append(call[2]))
    time = torch.tensor([0.0, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0])
    velocity = run(model, films, time).velocity
    t = time.clamp(min=0.05)[stream(PACKED).shot_of_video, None]  # below 0.05 noise is too little to divide by
    torch.testing.assert_close(model.patchify(films["clips"]) - t * velocity, said[0], rtol=0, atol=1e-5)
    clips = Euler(4).sample(model, RectifiedFlow(), films)  # the last step starts at 1/4 and ends at what was said
    torch.testing.assert_close(model.patchify(clips), said[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", cases(METHODS))
@pytest.mark.parametrize("text", TEXTS)
def test_training_may_follow_inference_on_the_same_layout(method, text):
    sizes = 2 + list(METHODS).index(method), 1 + TEXTS.index(text)  # a layout that no other test has met
    films = batch(zoo.Layout.film([zoo.Shot(2, 3, sizes[0], 3), zoo.Shot(2, sizes[1], 5, 2)], caption=4))
    model = open_model(attention=attention(method), text=text)
    with torch.inference_mode():
        run(model, films)
    run(model, films).velocity.sum().backward()


def test_pooled_captions_reach_the_model_as_configured():
    films = batch(FIRST)
    other = {**films, "text": (films["text"] + 1) % 20}
    for pooled, differs in (("none", False), ("adaln", True), ("tokens", True)):
        model = open_model(text="cross", pooled_text=pooled)
        for block in model.blocks:
            torch.nn.init.zeros_(block.captions.out.weight)
        assert bool(shots_that_differ(FIRST, run(model, films).velocity, run(model, other).velocity)) == differs
    run(model, films).velocity.sum().backward()
    assert model.pooled.weight.grad.any()


@pytest.mark.parametrize("method", cases(METHODS))
def test_recomputing_activations_changes_no_gradient(method):
    gradients = []
    for checkpoint in (False, True):
        model, films = open_model(checkpoint=checkpoint, attention=attention(method)), batch(PACKED)
        output = run(model, films)
        loss = output.velocity.square().mean() + sum(output.losses.values(), torch.zeros(()))
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None)
        assert gradient is None or torch.equal(gradient, gradients[1][name]), name


def test_recomputing_saves_activations():
    kept = []
    for checkpoint in (False, True):
        model, films, sizes = open_model(checkpoint=checkpoint, depth=4), batch(PACKED), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.numel()), x)[1], lambda x: x):
            run(model, films)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


def test_each_layer_may_have_its_own_attention():
    layers = [attention("dense"), attention("dense") | {"text_reads": "text"}]
    output = run(open_model(attention=layers), batch(PACKED))
    dense, apart = (result.cost() for result in output.results)
    assert dense.density == 1 > apart.density


def test_results_hold_no_graph():
    output = run(open_model(attention=attention("moga")), batch(PACKED, size=2))
    assert output.losses
    for result in output.results:
        assert result.out.is_meta
        assert result.out.grad_fn is None
        assert not any(loss.requires_grad for loss in result.losses.values())
        assert result.cost().dense_pairs == 2 * 2 * PACKED.dense_pairs
    total = sum(loss for result in output.results for loss in result.losses.values())
    torch.testing.assert_close(sum(output.losses.values()), total)
    assert all(loss.requires_grad for loss in output.losses.values())


def test_all_misfits_of_sizes_are_reported_at_once():
    bad = arguments(
        dim=30,
        heads=4,
        patch=(1, 0),
        vocabulary=-1,
        attention=[{"top_k": 1}],
        text="crss",
        pooled_text="adalm",
        predicts="noise",
    )
    with pytest.raises(zoo.ZooError) as error:
        VideoDiT(**bad)
    for part in (
        "dim 30 and 4 heads",
        "[1, 0]",
        "got -1",
        "depth = 2 mappings, got 1",
        "'name'",
        "'cross'",
        "'adaln'",
        "'noise'",
    ):
        assert part in str(error.value)
    with pytest.raises(zoo.ZooError, match="even and at least 6 for 3D RoPE, got 4"):
        VideoDiT(**arguments(dim=8))
    with pytest.raises(zoo.ZooError, match="dense"):
        VideoDiT(**arguments(attention={"name": "dens"}))


def test_inputs_that_do_not_match_the_layout_are_refused_with_both_counts():
    model, films = VideoDiT(**arguments()), batch(FIRST)
    x = model.patchify(films["clips"])
    with pytest.raises(zoo.ZooError) as error:
        model(x[:, 1:, 1:], films["text"][:, 1:], torch.zeros(2, 3), FIRST)
    for part in (
        "got 44 video tokens, the layout has 45",
        "got 8 text tokens, the layout has 9",
        "got 3 shot times, the layout has 2",
        "patches have 23 numbers, the model's have 24",
        "{'video': 1, 'text': 1, 'time': 2}",
    ):
        assert part in str(error.value)
    with pytest.raises(zoo.ZooError, match="got 45 video tokens, the layout has 21"):
        model.unpatchify(x, SECOND)
    with pytest.raises(zoo.ZooError, match=r"clip 1 must be \(B, a multiple of 2, 3,.*got \(1, 3, 3, 4, 4\)"):
        model.patchify([torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 3, 3, 4, 4)])
