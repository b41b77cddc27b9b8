"""The host's share of attention on a GPU as a row of its own: planning and launching, which no kernel shortens."""

from __future__ import annotations

from typing import Any

import sparse_zoo as zoo
from sparse_zoo.bench.suites import ROUTING_DIM, Entry, Round
from sparse_zoo.errors import ZooError
from sparse_zoo.host_time import host_seconds
from sparse_zoo.kernels.triton.configs import HEAD_DIMS

PASS = "host"
REPEATS = 3


def host_row(round_: Round, entry: Entry) -> dict[str, Any]:
    """Seconds of the host for forward + backward of an entry on kernel `triton`, whatever kernel the entry is timed on.

    Needs no GPU: launches are recorded, not made. "skipped" says why there is no time.
    """
    row: dict[str, Any] = {
        "method": entry.method,
        "settings": entry.settings,
        "kernel": "triton",
        "tokens": len(round_.film),
        "shots": sum(len(film.shots) for film in round_.film.films),
        "heads": round_.heads,
        "head_dim": round_.head_dim,
        "dtype": "bfloat16",
        "pass": PASS,
    }
    if round_.head_dim not in HEAD_DIMS:
        return row | {"skipped": f"head dim {round_.head_dim} is not {' or '.join(map(str, HEAD_DIMS))}"}
    own = {"heads": round_.heads, "head_dim": round_.head_dim, "dim": ROUTING_DIM, **entry.settings}
    try:
        attention = zoo.build(entry.method, kernel="triton", **own)
        found = host_seconds(attention, round_.film, round_.heads, round_.head_dim, repeats=REPEATS)
    except (ZooError, RuntimeError) as error:  # a method that reads values back cannot be played without a GPU
        return row | {"skipped": str(error).splitlines()[0]}
    return row | {
        "seconds": found["forward+backward"],
        "forward_seconds": found["forward"],
        "first_seconds": found["first"],
    }
