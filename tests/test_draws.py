"""Draws are uniform, and independent over everything that they are a function of."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_zoo import Call, Layout, Shot
from sparse_zoo.draws import uniform

FILM = Layout.film([Shot(4, 10, 20)])


def call(heads: int = 8, **context: Any) -> Call:
    length = len(context["q_rows"]) if "q_rows" in context else len(FILM)
    q, k = torch.empty(1, heads, length, 1), torch.empty(1, heads, len(FILM), 1)
    return Call(q, k, k, FILM, **({"seed": 3, "step": 5, "layer": 1} | context))


def chi_square(counts: Tensor) -> float:
    """How far counts of equally likely bins are from their mean, in standard deviations of the statistic."""
    mean, free = counts.double().mean(), counts.numel() - 1
    return float((((counts - mean) ** 2 / mean).sum() - free) / math.sqrt(2 * free))


def test_draws_are_uniform_in_every_bit() -> None:
    draws = uniform(call(), "a", 32)
    assert (draws.dtype, draws.shape) == (torch.float32, (8, 800, 32))
    whole = (draws.double() * 2**24).long()
    assert torch.equal(whole.double() * 2.0**-24, draws.double())
    assert 0 <= int(whole.min()) <= int(whole.max()) < 2**24
    assert abs(chi_square(torch.bincount(whole.flatten() >> 14, minlength=1024))) < 4
    assert abs(chi_square(torch.bincount(whole.flatten() & 1023, minlength=1024))) < 4
    for bit in range(24):
        ones = float(((whole >> bit) & 1).double().mean())
        assert abs(ones - 0.5) < 4 * 0.5 / math.sqrt(whole.numel())


BESIDE: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "indices": lambda draws: (draws[..., :-1], draws[..., 1:]),
    "tokens": lambda draws: (draws[:, :-1], draws[:, 1:]),
    "heads": lambda draws: (draws[:-1], draws[1:]),
    "a token's index and the next token's": lambda draws: (draws[:, :-1, 1:], draws[:, 1:, :-1]),
    "a head's token and the next head's": lambda draws: (draws[:-1, 1:], draws[1:, :-1]),
    "purposes": lambda draws: (draws, uniform(call(), "b", 32)),
    "seeds": lambda draws: (draws, uniform(call(seed=4), "a", 32)),
    "steps": lambda draws: (draws, uniform(call(step=6), "a", 32)),
    "no step": lambda draws: (draws, uniform(call(step=None), "a", 32)),
    "layers": lambda draws: (draws, uniform(call(layer=2), "a", 32)),
    "step and layer exchanged": lambda draws: (draws, uniform(call(step=1, layer=5), "a", 32)),
}


@pytest.mark.parametrize("what", BESIDE)
def test_draws_that_differ_in_one_thing_are_independent(what: str) -> None:
    one, other = (x.double().flatten() for x in BESIDE[what](uniform(call(), "a", 32)))
    correlation = float(torch.corrcoef(torch.stack([one, other]))[0, 1])
    assert abs(correlation) < 4 / math.sqrt(one.numel())
    pairs = (one * 16).long() * 16 + (other * 16).long()
    assert abs(chi_square(torch.bincount(pairs, minlength=256))) < 4


def test_sums_over_a_token_or_a_head_vary_as_those_of_independent_draws() -> None:
    draws = uniform(call(), "a", 32).double() - 0.5
    for sums, number in ((draws.sum(-1), 32), (draws.sum(1), 800), (draws.sum(0), 8)):
        want = number / 12
        assert abs(float(sums.var()) / want - 1) < 4 * math.sqrt(2 / sums.numel())


def test_any_part_of_the_draws_is_that_part_of_them_all() -> None:
    whole = uniform(call(), "a", 5)
    assert torch.equal(uniform(call(), "a", 5), whole)
    assert torch.equal(uniform(call(), "a", 9)[..., :5], whole)
    assert torch.equal(uniform(call(heads=3, head_offset=4), "a", 5), whole[4:7])
    assert torch.equal(uniform(call(), "a", 5, slice(100, 103)), whole[:, 100:103])
    rows = torch.tensor([7, 790, 2])
    assert torch.equal(uniform(call(q_rows=rows), "a", 5), whole[:, rows])
    assert torch.equal(uniform(call(q_rows=rows), "a", 5, slice(1, 9)), whole[:, rows[1:]])


def test_draws_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    want = torch.rand(2)
    torch.manual_seed(1)
    uniform(call(), "a", 3)
    assert torch.equal(torch.rand(2), want)


def test_draws_are_these_numbers_on_every_machine() -> None:
    """Plain Python integers, reduced by hand: the same on any device and in any version."""
    import hashlib

    def mix(x: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            x = ((x ^ (x >> shift)) * factor) % 2**64
        return x

    gamma = 0x9E3779B97F4A7C15
    named = int.from_bytes(hashlib.blake2b(repr(("a", 3, 5, 1)).encode(), digest_size=8).digest(), "little")
    draws = uniform(call(), "a", 4)
    for head, token, index in ((0, 0, 0), (3, 17, 2), (7, 799, 3)):
        key = mix((named + head * gamma) % 2**64)
        key = mix((key + token * gamma) % 2**64)
        key = mix((key + index * gamma) % 2**64)
        assert float(draws[head, token, index]) == (key >> 40) / 2**24
