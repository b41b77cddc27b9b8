"""What is measured: films, methods and their settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import sparse_zoo as zoo
from sparse_zoo.errors import refuse, unknown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUTING_DIM = 64
"""Width of what moga's router reads here: its product is no attention's cost."""


@dataclass(frozen=True)
class Entry:
    """A method, its settings and the requested kernel."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    kernel: str = "auto"


@dataclass(frozen=True)
class Round:
    """What is timed turn by turn: entries and every dense engine, on one film."""

    film: zoo.Layout
    entries: tuple[Entry, ...]
    heads: int = 2
    head_dim: int = 64
    dtype: str = "float32"


def film_of(tokens: int, shots: int = 8) -> zoo.Layout:
    """Equal shots of whole frames of 16 × 32, or of 16 × 16 where less fits into `tokens`; at least one frame each."""
    cols = 32 if tokens >= shots * 16 * 32 else 16
    return zoo.Layout.film([zoo.Shot(max(1, tokens // (shots * 16 * cols)), 16, cols)] * shots)


MOC = Entry("moc", {"top_k": 4, "anchors": ["shot"], "causal": None})
CPU_ENTRIES = (
    MOC,
    Entry("moc_fixed", {"top_k": 4, "chunk_tokens": 512, "anchors": ["shot"], "causal": None}),
    Entry("moga", {"groups": 5}),
    Entry("window", {"tile": [2, 8, 8], "window": [3, 3, 3]}),
)
QUICK_FILM = zoo.Layout.film([zoo.Shot(2, 8, 16, text=8)] * 6, caption=8)
# Blocks of 32 to 64 tokens where the papers have 64 to 512: so that there is something to choose in 1,592 tokens.
QUICK: dict[str, dict[str, Any]] = {
    "bsa": {"tile": [2, 4, 4], "threshold": 0.3},
    "llsa": {"block_tokens": 8},
    "moba": {"block_tokens": 64, "top_k": 4},
    "moc_fixed": {"chunk_tokens": 64},
    "nabla": {"tile": [1, 4, 8], "window": [3, 1, 1], "threshold": 0.2},
    "nsa": {"block_tokens": 32, "top_k": 4, "window": 3},
    "psa": {"query_tokens": 32, "block_tokens": 32},
    "radial": {"block_tokens": 16, "decay": 0.1},
    "sla": {"block_tokens": 32, "top_fraction": 0.2},
    "sla2": {"block_tokens": 32, "top_fraction": 0.2},
    "sol": {"block_tokens": 32},
    "sparge2": {"query_tokens": 32, "block_tokens": 32, "top_p": 0.2},
    "sta": {"tile": [2, 4, 4]},
    "subblock": {"block_tokens": 32},
    "svg": {"width": 1},
    "svg2": {"top_p": 0.3, "query_clusters": 24, "key_clusters": 48, "first_rounds": 10},
    "vmoba": {"temporal": 1, "spatial": [4, 4], "spatiotemporal": [2, 4, 4]},
    "vsa": {"tile": [2, 4, 4], "top_k": 8},
    "window": {"tile": [2, 4, 4]},
    "xattention": {"block_tokens": 32, "stride": 4, "threshold": 0.2},
}
PAPER_MOC = {"top_k": 5, "chunk": "frame", "anchors": ["text", "shot"], "causal": None}
# 141 chunks of 1280 tokens in 8 shots of about 22.5k, as in the paper's final setting, and 200 words to each caption.
PAPER_FILM = zoo.Layout.film([zoo.Shot(17 if i < 3 else 18, 32, 40, text=200) for i in range(8)])
SPARSE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("moc", PAPER_MOC),
    ("window", {"tile": [4, 8, 8], "window": [3, 3, 3]}),
    ("sta", {}),
    ("vsa", {}),
    ("moba", {"block_tokens": 2560, "top_k": 12}),  # as many pairs as moc has in the paper's film
    ("moga", {"groups": 5}),
)
GPU_LAYOUTS: tuple[tuple[zoo.Layout, tuple[tuple[str, dict[str, Any]], ...]], ...] = (
    (PAPER_FILM, (*SPARSE, ("moc", {**PAPER_MOC, "anchors": []}))),
    (zoo.Layout.film([zoo.Shot(2, 32, 44, text=25)] * 64), (("moc", PAPER_MOC),)),
    (zoo.Layout.film([zoo.Shot(12 if i < 4 else 13, 32, 40, text=200) for i in range(8)]), SPARSE),
    (zoo.Layout.film([zoo.Shot(3, 32, 40, text=200)] * 8), SPARSE),
    (zoo.Layout.film([zoo.Shot(30, 30, 52)] * 4), (("moga", {"groups": 5}),)),
)
"""Films of 182k tokens in 8 shots and in 64, of 130k and 32k in 8, and moga's of 187k; and the methods on each."""


def suite(name: str) -> Iterator[Round]:
    """The rounds of a suite of `SUITES`.

    Raises:
        ZooError: For an unknown suite.
    """
    refuse("bench", [unknown("suite", name, SUITES)] if name not in SUITES else [])
    if name == "quick":
        yield Round(QUICK_FILM, tuple(Entry(name, QUICK.get(name, {})) for name in zoo.names() if name != "dense"))
    elif name == "cpu":
        for tokens in (2048, 4096, 16384, 32768):
            yield Round(film_of(tokens), CPU_ENTRIES)
        yield Round(film_of(65536), (MOC,))
    elif name == "shots":
        for shots in (1, 2, 4, 8, 16, 32):
            yield Round(film_of(1024 * shots, shots), (MOC,))
    else:
        kernels = [kernel for kernel, reasons in zoo.kernels().items() if not reasons and kernel not in NOT_FOR_SPEED]
        for dtype in ("bfloat16", "float16"):
            for film, methods in GPU_LAYOUTS:
                entries = (Entry(method, settings, kernel) for method, settings in methods for kernel in kernels)
                yield Round(film, tuple(entries), heads=24, head_dim=128, dtype=dtype)
        yield Round(PAPER_FILM, tuple(Entry("moc", PAPER_MOC, kernel) for kernel in kernels), 24, 64, "bfloat16")


NOT_FOR_SPEED = ("reference", "cpu")
SUITES = {
    "quick": "every registered method on 1,592 tokens, plug-ins with their defaults: under a minute",
    "cpu": "the CPU's marks, 2k to 64k tokens, float32: about 15 minutes on two cores",
    "shots": "moc on 1 to 32 shots of 1,024 tokens: time against length",
    "gpu": "180k tokens, 24 heads, half precision, every kernel that runs: minutes on a GPU",
}


def chosen(
    suite_name: str, methods: Sequence[str], tokens: Sequence[int], kernel: str | None, dtype: str | None
) -> list[Round]:
    """A suite's rounds, narrowed to some methods, film lengths (for the CPU's entries), kernel and dtype.

    Raises:
        ZooError: With every reason, also when nothing is left.
    """
    refuse(
        "bench",
        [unknown("method", method, zoo.names()) for method in methods if method not in zoo.names()]
        + [f"tokens must be at least 1, got {length}" for length in tokens if length < 1]
        + ([unknown("dtype", dtype, DTYPES)] if dtype is not None and dtype not in DTYPES else [])
        + ([unknown("kernel", kernel, zoo.kernels())] if kernel not in (None, "auto", *zoo.kernels()) else []),
    )
    rounds = [Round(film_of(length), CPU_ENTRIES) for length in tokens] if tokens else list(suite(suite_name))
    narrowed = [
        Round(
            round_.film,
            tuple(
                Entry(entry.method, entry.settings, kernel or entry.kernel)
                for entry in round_.entries
                if not methods or entry.method in methods
            ),
            round_.heads,
            round_.head_dim,
            dtype or round_.dtype,
        )
        for round_ in rounds
    ]
    narrowed = [round_ for round_ in narrowed if round_.entries]
    refuse("bench", ["nothing is left to measure: see --suite, --methods"] if not narrowed else [])
    return narrowed
