"""Equal runs are equal, bit for bit: no gradient is summed in an order that depends on threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_module import lit, loader, trainer
from tiers import cases
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy_films import METHODS, PACKED, attention, batch, open_model

from lit_modules import RectifiedFlow
from lit_modules.flow import generator
from sparse_zoo import Layout, Shot
from sparse_zoo.gather import add_at, take

MODELS: dict[str, dict[str, Any]] = {
    "joint": {"text": "joint", "pooled_text": "tokens"},
    "cross": {"text": "cross", "pooled_text": "adaln", "predicts": "clean", "checkpoint": True},
}


class UnorderedSums(TorchDispatchMode):
    """Refuses what adds floating-point values that share an index in any order, on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "index_put" in func.overloadpacket.__name__ and (
            (len(args) > 3 and args[3]) or (kwargs or {}).get("accumulate")
        ):
            x, indices = args[0], [index for index in args[1] if index is not None]
            if x.is_floating_point() and repeated(indices):
                node = torch._C._current_autograd_node()
                raise AssertionError(f"{func} adds to repeated indices, in {node.name() if node else 'forward'}")
        return func(*args, **(kwargs or {}))


def repeated(indices: list[Tensor]) -> bool:
    if indices[0].dtype == torch.bool:
        return False
    flat = torch.stack([index.flatten() for index in torch.broadcast_tensors(*indices)])
    return flat.unique(dim=1).shape[1] < flat.shape[1]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", cases(METHODS))
def test_training_step_has_no_unordered_sums(method: str, model: str) -> None:
    given = batch(PACKED, size=2)
    dit = open_model(attention=attention(method) | {"text_reads": "text"}, **MODELS[model])
    with UnorderedSums():
        found = RectifiedFlow(per_shot=True, drop_text=0.5).training_loss(dit, given, generator(), step=3, seed=1)
        torch.stack([found.loss, *found.output.losses.values()]).sum().backward()


def test_unordered_sums_of_advanced_indexing_are_found() -> None:
    table = torch.zeros(2, 3, requires_grad=True)
    with UnorderedSums(), pytest.raises(AssertionError, match="index_put"):
        table[:, torch.tensor([0, 0, 1])].sum().backward()


def test_take_and_add_at_equal_indexing() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[4, 0, 4], [1, 1, 1]])
    assert torch.equal(take(x, 1, index), x[:, index])
    assert torch.equal(take(x, -2, index), x[:, index])
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    (given,) = torch.autograd.grad((take(x, 1, index) * weight).sum(), x)
    expected = torch.zeros_like(x)
    for row, token in enumerate(index.flatten()):
        expected[:, token] += weight.flatten(1, 2)[:, row]
    torch.testing.assert_close(given, expected)
    summed = add_at(torch.zeros_like(x), 1, index.flatten(), weight.flatten(1, 2))
    torch.testing.assert_close(summed, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("text", ["joint", "cross"])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_equal_runs_on_films_of_one_shot_are_equal(threads: int, text: str) -> None:
    """One shot fills the stream, so that all its tokens read one row of the modulation."""
    films = batch(Layout.film([Shot(8, 10, 10, 4)], caption=3))
    before, kept = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            module, training = lit(text=text, pooled_text="tokens", attention={"name": "moc", "top_k": 2}), trainer(3)
            training.fit(module, loader(films, times=3))
            kept.append(module.state_dict())
    finally:
        torch.set_num_threads(before)
    for other in kept[1:]:
        assert [name for name, tensor in kept[0].items() if not torch.equal(tensor, other[name])] == []
