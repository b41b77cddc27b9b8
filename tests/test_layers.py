"""A list of attention: written out for the layers, or refused with every reason."""

import pytest

from experiments.analysis.formatting import settings
from experiments.config.resolve import load
from sparse_zoo.errors import ZooError
from sparse_zoo.layers import per_layer

DENSE, MOC, WINDOW = {"name": "dense"}, {"name": "moc", "top_k": 1}, {"name": "window"}


@pytest.mark.parametrize(
    ("entries", "depth", "wanted"),
    [
        (["dense", MOC], 2, [DENSE, MOC]),
        ([{**DENSE, "layers": 2}, {**MOC, "layers": "rest"}], 5, [DENSE, DENSE, MOC, MOC, MOC]),
        ([{**MOC, "layers": "rest"}, "dense"], 3, [MOC, MOC, DENSE]),
        ([{"cycle": ["dense", MOC]}, "window"], 3, [DENSE, MOC, WINDOW]),
        (["window", {"cycle": ["dense", MOC], "layers": 3}], 4, [WINDOW, DENSE, MOC, DENSE]),
        (
            ["window", {"cycle": ["dense", MOC, "window"], "layers": "rest"}, "dense"],
            7,
            [WINDOW, DENSE, MOC, WINDOW, DENSE, MOC, DENSE],
        ),
    ],
)
def test_a_list_is_written_out(entries, depth, wanted):
    layers, reasons = per_layer(entries, depth)
    assert reasons == []
    assert layers == wanted
    assert len({id(layer) for layer in layers}) == depth  # none is changed with another


@pytest.mark.parametrize(
    ("entries", "depth", "message"),
    [
        (["dense", "moc"], 3, "a list for 2 layers, the model has 3"),
        ([{**DENSE, "layers": 4}], 3, "a list for 4 layers, the model has 3"),
        (
            [{**DENSE, "layers": 3}, {**MOC, "layers": "rest"}],
            3,
            "a list for 3 layers and 1 × 'rest', the model has 3",
        ),
        ([{**DENSE, "layers": "rest"}] * 2, 3, "a list for 0 layers and 2 × 'rest', the model has 3"),
        (["dense"], "1", "a list for 1 layers, the model has '1'"),
        ([{**DENSE, "layers": 0}], 3, "attention[0]: layers must be a whole number of at least 1 or 'rest', got 0"),
        ([{**DENSE, "layers": True}], 1, "got True"),
        ([{"cycle": ["moc"], "layers": "all"}], 1, "got 'all'"),
        ([3], 1, "attention[0]: a method is its name or a mapping with a name, got {'name': 3}"),
        ([{"top_k": 3}], 1, "a mapping with a name, got {'top_k': 3}"),
        ([{"cycle": [MOC, {"cycle": ["moc"]}]}], 1, "a mapping with a name, got {'cycle': ['moc']}"),
        ([{"cycle": []}], 1, "attention[0] must be {cycle: [methods], layers: how many}, got {'cycle': []}"),
        ([{"cycle": "moc"}], 1, "attention[0] must be {cycle:"),
        ([{"cycle": ["moc"], "top_k": 3}], 1, "attention[0] must be {cycle:"),
    ],
)
def test_a_list_that_does_not_fit_says_why(entries, depth, message):
    assert any(message in reason for reason in per_layer(entries, depth)[1])


def test_a_config_takes_the_short_form_and_keeps_the_long_one():
    config = load(["model.depth=5", "attention=[{name: dense, layers: 2}, {cycle: [moc, window], layers: rest}]"])
    assert config["attention"] == [DENSE, DENSE, {"name": "moc"}, WINDOW, {"name": "moc"}]
    assert config == load(["model.depth=5", "attention=[dense, dense, moc, window, moc]"])


def test_every_reason_comes_at_once_those_of_the_methods_too():
    wrong = "attention=[{name: dense, layers: none}, {cycle: 3}, mocc, {cycle: [{name: moc, top_k: 0}]}]"
    with pytest.raises(ZooError) as error:
        load([wrong, "model.dim=130"])
    for message in ("got 'none'", "attention[1] must be", "'mocc'", "top_k must be", "heads 4 must divide"):
        assert message in str(error.value)
    with pytest.raises(ZooError, match=r"attention must be a method's name.*got \[\]"):
        load(["attention=[]"])
    with pytest.raises(ZooError, match="unknown setting 'layers'"):
        load(["model.depth=1", "attention=[{cycle: [{name: moc, layers: 2}]}]"])


def test_equal_neighbouring_layers_are_described_once():
    assert settings([DENSE, DENSE, MOC, DENSE]) == "dense ×2 / moc · top_k 1 / dense"
