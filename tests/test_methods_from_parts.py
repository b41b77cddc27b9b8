"""Methods made from parts, at other settings than the conformance suite's, against their slow rules; and the parts."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_zoo as zoo
from sparse_zoo import Layout, Partition, Plan, Shot, scorers, selectors
from sparse_zoo.testing import oracle, slow_blocks, slow_blockwise, slow_coarse
from sparse_zoo.testing.subject import PACKED, SILENT, make

RULES = {
    name: getattr(module, name)
    for module, names in (
        (slow_blocks, "bsa holocine llsa nabla psa rolling sla2 sol sparge2 subblock"),
        (slow_blockwise, "xattention"),
        (slow_coarse, "sla"),
    )
    for name in names.split()
}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("holocine", {"frames": 2}),
    ("rolling", {"sinks": 0, "window": 3, "chunk_frames": 1}),
    ("rolling", {"sinks": 2, "window": 0, "chunk_frames": 5}),
    ("subblock", {"query_parts": 1, "key_parts": 1, "block_tokens": 3}),
    ("subblock", {"query_parts": 6, "key_parts": 2, "block_tokens": 6, "top_fraction": 0.5}),
    ("sparge2", {"query_tokens": 3, "block_tokens": 7, "top_fraction": 0.15, "top_p": 0.7}),
    ("nabla", {"stop_at_shots": False, "tile": (2, 2, 3), "window": (1, 3, 3)}),
    ("nabla", {"threshold": 0.2, "tile": (1, 1, 2), "window": (5, 1, 1)}),
    ("bsa", {"stop_at_shots": False, "keep_queries": 0.2, "threshold": 0.4}),
    ("bsa", {"keep_queries": 1.0, "threshold": 0.3, "tile": (1, 2, 3)}),
    ("sol", {"spread": "exact", "tau": 0.3}),
    ("sol", {"tau": -0.5, "block_tokens": 3}),
    ("psa", {"top_fraction": 0.1, "pooled_fractions": (0.2, 0.3, 0.0)}),
    ("psa", {"query_tokens": 5, "pooled_fractions": (0.0, 0.0, 0.9)}),
    ("llsa", {"levels": 3, "block_tokens": 2, "top_k": 1}),
    ("llsa", {"levels": 3, "block_tokens": 2, "top_k": 3}),
    ("llsa", {"levels": 1, "block_tokens": 5}),
    ("llsa", {"enrich": False, "block_tokens": 3}),
    ("sla2", {"top_fraction": 0.6, "block_tokens": 4}),
    ("sla", {"top_fraction": 0.2, "negligible": 0.5, "block_tokens": 3}),
    ("xattention", {"threshold": 0.4, "block_tokens": 60, "stride": 6}),
]


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
def test_other_settings_give_what_the_slow_rule_gives(name: str, settings: dict[str, Any]) -> None:
    given = dict(zoo.get(name).small) | settings
    attention: Any = zoo.build(name, heads=2, head_dim=8, dim=6, kernel="reference", **given).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    for layout in (PACKED, SILENT):
        for tied in (False, True):
            call = make(layout, batch=1, heads=2, kv_heads=1)
            if tied:
                call.q.zero_()
            with torch.no_grad():
                got, want = attention.run(call).out, RULES[name](attention, call)
            if isinstance(want, list):
                want = sum(w * oracle.masked_softmax(call.q, call.k, call.v, mask)[0] for mask, w in want)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


# -- their files -----------------------------------------------------------------------------------------------------


def code_lines(source: str) -> int:
    """Lines that are neither blank nor of a docstring."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            documented.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return sum(bool(line.strip()) and i not in documented for i, line in enumerate(source.splitlines(), 1))


def test_lines_are_counted_without_docstrings_and_blank_lines() -> None:
    assert code_lines('"""Of the file."""\n\nx = 1\n\ndef f():\n    """Two\n\n    lines."""\n    return "text"\n') == 3


def test_a_method_takes_at_most_120_lines_of_code() -> None:
    """What methods have in common is in scorers, selectors, blockwise and their neighbours."""
    for file in (Path(zoo.__file__).parent / "methods").glob("[!_]*.py"):
        source = file.read_text(encoding="utf-8")
        methods = source.count("\n@register(")
        assert methods, file
        assert code_lines(source) <= 120 * methods, file


# -- the parts --------------------------------------------------------------------------------------------------------


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values)[None, None]


def test_shares_are_filled_from_the_largest_down() -> None:
    scores = rows([3.0, 1.0, 3.0, 2.0, 9.0], [0.0, 0.0, 0.0, 0.0, 0.0])
    legal = torch.tensor([[True, True, True, True, False], [True] * 5])

    def counts(allowed: Tensor) -> list[Tensor]:
        assert torch.equal(allowed[0, 0], legal)
        return [torch.tensor([[1], [2]]), torch.tensor([[3], [2]])]

    share = selectors.ranked(iter([(slice(0, 2), scores)]), legal, (1, 1, 2, 5), counts)
    assert share.tolist() == [[[[0, 2, 1, 1, 2], [0, 0, 2, 2, 2]]]]  # ties to the earlier, nothing illegal


@pytest.mark.parametrize("count", [1, 3, 20])
def test_best_indices_are_those_of_a_stable_sort(count: int) -> None:
    scores = torch.randint(0, 4, (2, 1, 5, 20), generator=torch.Generator().manual_seed(0)).float()
    scores[:, :, 2, 1:] = -torch.inf
    got = selectors.first_largest(scores.clone(), count)
    for row, indices in zip(scores.flatten(0, 2).tolist(), got.flatten(0, 2).tolist(), strict=True):
        order = sorted((i for i, x in enumerate(row) if x > float("-inf")), key=lambda i: (-row[i], i))[:count]
        assert indices == order + [-1] * (count - len(order))


def test_queries_least_like_the_middle_one_are_kept_and_copied_to_their_neighbours() -> None:
    film = Layout.film([Shot(1, 1, 5), Shot(1, 1, 2)], caption=1)
    tiles = film.tiles((1, 1, 5))
    angle = torch.tensor([0.0, 1.0, 0.2, 0.0, 0.1, 2.0, 0.0, 0.0])  # of text, of five tokens about 0.0, of two
    kept = scorers.pruned(torch.stack([angle.cos(), angle.sin()], -1)[None, None], tiles, 0.4)
    assert kept.tokens[0, 0].nonzero()[:, 0].tolist() == [1, 5, 6]  # two of five, one of two: the earlier of two alike
    assert kept.rows[0, 0].tolist() == [0, 1, 1, 1, 5, 5, 6, 6]  # text its own; the third is as near to both
    torch.testing.assert_close(kept.means[0, 0, 0, 0], (angle[1].cos() + angle[5].cos()) / 2)


def test_queries_of_some_heads_may_be_kept() -> None:
    """By tables of edges, by indices, and where each query is a piece."""
    where = torch.rand(2, 3, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    halves = Partition.from_labels(torch.arange(6) // 3, 2)
    for plan in (
        Plan.within(halves),
        Plan.blocks(halves, halves, torch.tensor([[True, True], [False, True]])),
        Plan.routed(halves, torch.arange(6).view(1, 1, 6, 1) % 2),
        Plan.routed(halves, (torch.arange(12).view(1, 1, 6, 2) % 3) > 0),
    ):
        want = plan.dense_mask().expand(2, 3, -1, -1) & where[..., None]
        assert torch.equal(plan.keep(where).dense_mask(), want)
