"""Routed parts by cuDNN's variable-length attention: gathered queries × the slices of keys that they chose.

Queries are gathered in the order of the lists; keys and values stay where they are. A segment is some queries of one
list and the chunk that they chose. cuDNN takes where segments begin and how long they are as separate tables, so that
segments may share a chunk: the forward cuts long lists into segments of at most SEGMENT queries, or its grid would be
as long as the longest possible list. In the backward each chunk has one segment: two would both write its dk and dv.

The package nvidia-cudnn-frontend builds the graphs: torch's own variable-length operators take one table of cumulated
lengths, with which segments cannot share a chunk. Segments without keys have no queries here, since cuDNN below 9.25
returns NaN for them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_zoo.errors import refuse
from sparse_zoo.kernels.triton.work import PartWork, tiles_of_pieces

SEGMENT = 4096
"""Queries of a segment in the forward: many tiles each, and few segments that are mostly empty."""
MOST_ELEMENTS = 2**31 - 1
"""Offsets are int32 and count elements."""


class Segments(NamedTuple):
    """For each segment, int32 (S,): its first row of queries and of keys, and how many rows of each it has."""

    query: Tensor
    queries: Tensor
    key: Tensor
    keys: Tensor


def forward(
    rows: Tensor, k: Tensor, v: Tensor, first_key: Tensor, work: PartWork, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of listed queries to the chunk of their list.

    Args:
        rows: queries (B, H, n, D), contiguous, gathered in the order of `work.by_query.tokens`.
        k: contiguous (…, D), the rows of any number of heads.
        v: contiguous, of the shape of k.
        first_key: int64 (B, H), the row of k at which each head's stream begins.
        work: of a part whose tiles meet one slice of the stream.
        longest: tokens of the longest chunk.
        scale: multiplies the products of queries and keys.

    Returns:
        out (B, H, n, D) and natural lse, float32 (B, H, n). Where a query chose no chunk, or one without keys, lse is
        -inf and out undefined.
    """
    _fits(rows, k)
    batch, heads, length, dim = rows.shape
    tiles = tiles_of_pieces(_starts(work), length, SEGMENT).expand(batch, heads, -1, -1)
    segments = _segments(tiles[..., 0], tiles[..., 1], tiles[..., 2].long(), length, first_key, work)
    out = torch.empty_like(rows)
    lse = torch.full((batch, heads, length), -torch.inf, dtype=torch.float32, device=rows.device)
    graph = _graph(False, rows.device, rows.dtype, dim, len(segments.query), SEGMENT, longest, scale, False)
    graph.run(q=rows, k=k, v=v, out=out, lse=lse, **_tables(segments, dim))
    return out, lse


def backward(
    grad: Tensor,
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    first_key: Tensor,
    work: PartWork,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`, given the union's output and natural log-sum-exp of the listed queries.

    grad and out (B, H, n, D) and lse (B, H, n) are gathered as `rows` are. Returns dq (B, H, n, D) and, for
    each query head, dk and dv (B, H, L, D): 0 in rows that no chunk holds.
    """
    _fits(rows, k)
    batch, heads, length, dim = rows.shape
    starts = _starts(work).expand(batch, heads, -1)
    chunk = torch.arange(starts.shape[-1] - 1, device=rows.device).expand(batch, heads, -1)
    stream = work.by_key.tokens.shape[-1]
    own = torch.arange(batch * heads, device=rows.device).view(batch, heads) * stream
    segments, grads = (
        _segments(starts[..., :-1], starts.diff(dim=-1), chunk, length, first, work) for first in (first_key, own)
    )
    dq = torch.zeros_like(rows)  # of queries whose chunk holds no key too
    dk, dv = (torch.zeros(batch, heads, stream, dim, dtype=k.dtype, device=k.device) for _ in "kv")
    deterministic = torch.are_deterministic_algorithms_enabled()
    graph = _graph(
        True, rows.device, rows.dtype, dim, len(segments.query), length, longest, scale, deterministic, batch * heads
    )
    graph.run(
        q=rows, k=k, v=v, out=out, grad=grad, lse=lse, dq=dq, dk=dk, dv=dv,
        **_tables(segments, dim), grad_keys_at=_ends(grads.key, dim),
    )  # fmt: skip
    return dq, dk, dv


# -- tables -----------------------------------------------------------------------------------------------------------


def _fits(rows: Tensor, k: Tensor) -> None:
    most = max(rows.numel(), k.numel())
    refuse("kernel 'cudnn'", [f"{most} elements; at most {MOST_ELEMENTS}" if most > MOST_ELEMENTS else ""])


def _starts(work: PartWork) -> Tensor:
    """Where the list of each chunk begins, and where the last ends: (B|1, H|1, C + 1)."""
    bounds = work.by_key.segments
    return torch.cat([bounds[..., 0], bounds[..., -1:, 1]], dim=-1)


def _segments(first: Tensor, count: Tensor, chunk: Tensor, length: int, first_key: Tensor, work: PartWork) -> Segments:
    """Segments of `count` listed queries from `first` on and a chunk: all (B, H, S)."""
    batch, heads = first.shape[:2]
    bounds = work.by_query.segments.expand(batch, heads, -1, -1)
    begin, end = (bounds[..., i].gather(-1, chunk) for i in range(2))
    group = torch.arange(batch * heads, device=first.device).view(batch, heads, 1)
    found = (
        group * length + first,
        count.where(begin < end, 0),
        first_key[..., None] + begin,
        end - begin,
    )
    return Segments(*(x.flatten().int() for x in found))


def _tables(segments: Segments, dim: int) -> dict[str, Tensor]:
    return {
        "queries_at": _ends(segments.query, dim),
        "rows_at": _ends(segments.query, 1),
        "queries": segments.queries,
        "keys_at": _ends(segments.key, dim),
        "keys": segments.keys,
    }


def _ends(first: Tensor, dim: int) -> Tensor:
    """Offsets in elements. cuDNN's tables have one entry more, which lengths of their own leave unused."""
    return torch.nn.functional.pad(first * dim, (0, 1))


# -- graphs -----------------------------------------------------------------------------------------------------------


class _Graph:
    """A built graph of cuDNN, its named tensors and its workspace's size."""

    def __init__(self, graph: Any, tensors: dict[str, Any], device: torch.device) -> None:
        import cudnn

        self.handle = cudnn.create_handle() if device.type == "cuda" else None
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        self.graph, self.tensors, self.device = graph, tensors, device

    def run(self, **given: Tensor) -> None:
        import cudnn

        if self.handle is not None:
            cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream(self.device).cuda_stream)
        workspace = torch.empty(self.graph.get_workspace_size(), dtype=torch.uint8, device=self.device)
        self.graph.execute({self.tensors[name]: x for name, x in given.items()}, workspace, handle=self.handle)


@lru_cache(maxsize=64)
def _graph(
    learns: bool,
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    segments: int,
    queries: int,
    keys: int,
    scale: float,
    deterministic: bool,
    groups: int = 1,
) -> _Graph:
    """The graph for `segments` segments of at most `queries` × `keys` rows."""
    import cudnn

    kinds = cudnn.data_type
    half = kinds.BFLOAT16 if dtype == torch.bfloat16 else kinds.HALF
    keys = max(keys, 2)  # cuDNN 9.19 refuses a graph of one query and one key
    graph = cudnn.pygraph(io_data_type=half, intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT)
    tensors: dict[str, Any] = {}

    def table(name: str, count: int) -> Any:
        tensors[name] = graph.tensor(name=name, data_type=kinds.INT32, dim=[count, 1, 1, 1], stride=[1, 1, 1, 1])
        return tensors[name]

    def described(length: int, width: int) -> dict[str, list[int]]:
        return {"dim": [segments, 1, length, width], "stride": [length * width, width, width, 1]}

    def rows(name: str, length: int, at: Any, width: int = dim, kind: Any = half) -> Any:
        tensors[name] = graph.tensor(name=name, data_type=kind, ragged_offset=at, **described(length, width))
        return tensors[name]

    def result(name: str, x: Any, length: int, at: Any, width: int = dim, kind: Any = half) -> None:
        shape = described(length, width)
        x.set_output(True).set_data_type(kind).set_dim(shape["dim"]).set_stride(shape["stride"]).set_ragged_offset(at)
        tensors[name] = x

    queries_at, rows_at, keys_at = (table(name, segments + 1) for name in ("queries_at", "rows_at", "keys_at"))
    lengths = {"seq_len_q": table("queries", segments), "seq_len_kv": table("keys", segments)}
    q, k, v = rows("q", queries, queries_at), rows("k", keys, keys_at), rows("v", keys, keys_at)
    common = {"attn_scale": scale, "use_padding_mask": True, **lengths}
    if not learns:
        out, lse = graph.sdpa(q=q, k=k, v=v, generate_stats=True, **common)
        result("out", out, queries, queries_at)
        result("lse", lse, queries, rows_at, width=1, kind=kinds.FLOAT)
        return _Graph(graph, tensors, device)
    dq, dk, dv = graph.sdpa_backward(
        q=q, k=k, v=v, o=rows("out", queries, queries_at), dO=rows("grad", queries, queries_at),
        stats=rows("lse", queries, rows_at, width=1, kind=kinds.FLOAT),
        max_total_seq_len_q=groups * queries, use_deterministic_algorithm=deterministic, **common,
    )  # fmt: skip
    grad_keys_at = table("grad_keys_at", segments + 1)
    result("dq", dq, queries, queries_at)
    result("dk", dk, keys, grad_keys_at)
    result("dv", dv, keys, grad_keys_at)
    return _Graph(graph, tensors, device)
