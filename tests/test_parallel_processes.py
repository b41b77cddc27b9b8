"""Several processes over gloo: every method on 2 and 4 ranks gives what one process gives."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import sparse_zoo as zoo
from sparse_zoo.parallel import BACKENDS, Ulysses, exchanged_elements
from sparse_zoo.testing.parallel import joined_gradient, mean_gradient, run_pass
from sparse_zoo.testing.subject import STORY, Subject, make

OWN = [name for name in zoo.names() if zoo.get(name).__module__.startswith("sparse_zoo.methods.")]

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def enter(rank: int, size: int, port: int) -> None:
    """Join the processes of a test; one thread each."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)


def _all_methods(rank: int, size: int, port: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    enter(rank, size, port)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("sequence",))
    found: dict[str, Any] = {}
    for name in OWN:
        attention = Subject(name, zoo.get(name)).build().train()
        call = make(STORY, step=3, seed=7, layer=2, layers=4, noise=0.5)
        for own in (mesh["sequence"], flat):
            peers = Ulysses(own).peers
            found[f"{name} {peers.size}"] = run_pass(attention, call, peers)
    torch.save({name: tuple(passed) for name, passed in found.items()}, folder / f"{rank}.pt")
    with pytest.raises(zoo.ZooError, match="the mesh has 2 dimensions"):
        Ulysses(mesh)
    counted = Counted(flat, call)
    want = exchanged_elements(len(STORY), 4, rank, heads=4, key_heads=2, head_dim=8, batch=2)
    assert counted.elements == list(want)
    dist.destroy_process_group()


class Counted:
    """Elements that dense attention sends to others in its forward and backward pass, as torch.distributed is told."""

    def __init__(self, mesh: Any, call: zoo.Call) -> None:
        self.rank, self.now, self.elements = mesh.get_local_rank(), 0, list[int]()
        plain, dist.all_to_all_single = dist.all_to_all_single, self.count
        self.plain = plain
        try:
            attention = Subject("dense", zoo.get("dense")).build()
            engine = Ulysses(mesh)
            own = [x[:, :, engine.own(len(STORY))].detach().requires_grad_() for x in (call.q, call.k, call.v)]
            out = engine.run(attention, *own, STORY).out
            self.elements.append(self.now)
            out.sum().backward()
            self.elements.append(self.now - self.elements[0])
        finally:
            dist.all_to_all_single = plain

    def count(self, got: torch.Tensor, sent: torch.Tensor, outs: list[int], ins: list[int], group: Any) -> None:
        self.now += sum(ins) - ins[self.rank]
        self.plain(got, sent, outs, ins, group=group)


def test_all_methods_on_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(_all_methods, (4, free_port(), tmp_path), nprocs=4)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(4)]
    for name in OWN:
        attention = Subject(name, zoo.get(name)).build().train()
        whole = run_pass(attention, make(STORY, step=3, seed=7, layer=2, layers=4, noise=0.5), None)
        for size in (2, 4):
            parts = [ranks[rank][f"{name} {size}"] for rank in range(size)]
            for out, inputs, parameters, losses in parts:
                torch.testing.assert_close(out, whole.out, rtol=0, atol=1e-9)
                assert len(inputs) == 4
                assert len(parameters) == len(whole.parameters)
                for loss, value in whole.losses.items():
                    torch.testing.assert_close(losses[loss], value.detach(), rtol=0, atol=1e-6)
            for i, dim in enumerate((2, 2, 2, 1)):
                got, want = joined_gradient([part[1][i] for part in parts], dim), whole.inputs[i]
                assert (got is None) == (want is None)
                if got is not None:
                    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
            for i, want in enumerate(whole.parameters):
                torch.testing.assert_close(mean_gradient([part[2][i] for part in parts]), want, rtol=0, atol=1e-6)


def _fake(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
    with pytest.raises(zoo.ZooError, match="the backend 'fake' cannot exchange parts of unequal sizes"):
        Ulysses(init_device_mesh("cpu", (2,), mesh_dim_names=("sequence",)))
    dist.destroy_process_group()


def test_a_backend_without_the_exchange_is_refused() -> None:
    assert "fake" not in BACKENDS
    mp.spawn(_fake, nprocs=1)
