"""Random numbers that are a function of their purpose: no generator, no state, no order of calls.

Each number is a hash of (seed, step, layer, purpose, head, token, index). Recomputation, some of the queries and some
of the heads therefore see the same numbers as all together, on every device. All batch items share the numbers.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from sparse_zoo.attention import Call

BITS = 24
"""Bits of a draw: what float32 holds of [0, 1) evenly."""

GAMMA = -0x61C8_8646_80B5_83EB  # 2^64 / golden ratio, odd, as int64
FACTORS = (-0x40A7_B892_E31B_1A47, -0x6B2F_B644_ECCE_EE15)


def uniform(call: Call, purpose: str, n: int, rows: slice = slice(None)) -> Tensor:
    """`n` uniform numbers in [0, 1) for each head and each query token of `rows`: float32 (H, rows, n).

    They are multiples of 2^-24. They depend on call.seed, step, layer, head_offset + head, the token's place in the
    stream (q_rows), and `purpose`, a name that separates one use from another; nothing else, not even `n`.
    """
    device = call.q.device
    heads = call.head_offset + torch.arange(call.q.shape[1], device=device)
    tokens = torch.arange(call.q.shape[2], device=device) if call.q_rows is None else call.q_rows
    return numbers((purpose, call.seed, call.step, call.layer), heads, tokens[rows], n)


def numbers(of: object, heads: Tensor, tokens: Tensor, n: int) -> Tensor:
    """`n` uniform numbers in [0, 1) for each of `heads` and `tokens`, int64: float32 (heads, tokens, n).

    They are multiples of 2^-24, and a function of `of` (printed, then hashed), head, token and index alone.
    """
    named = hashlib.blake2b(repr(of).encode(), digest_size=8).digest()
    key = _mix(heads * GAMMA + int.from_bytes(named, "little", signed=True))
    key = _mix(key[:, None] + tokens * GAMMA)
    key = _mix(key[..., None] + torch.arange(n, device=tokens.device) * GAMMA)
    return _right(key, 64 - BITS).float().mul_(2.0**-BITS)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose products wrap: every bit of the result depends on all of x. In place."""
    x ^= _right(x, 30)
    x *= FACTORS[0]
    x ^= _right(x, 27)
    x *= FACTORS[1]
    x ^= _right(x, 31)
    return x


def _right(x: Tensor, bits: int) -> Tensor:
    """Shift right without copying the sign bit of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
