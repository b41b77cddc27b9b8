"""Several devices in one run: who holds what, and checkpoints of weights that no device holds as a whole.

Data parallelism alone is Lightning's DDP: every device has all weights. With sequence parallelism the weights,
gradients, optimizer states and averages are sharded over all devices of the run (FSDP2, a block at a time).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lit_modules.settings import Parallel
from lit_modules.sharded_checkpoint import load_shards, read_metadata

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""Backend of the exchange by type of device; on GPUs what is decided on the host is agreed upon by gloo."""
META = "meta.pt"
"""File of a sharded checkpoint for all that is no tensor of the model or its optimizer."""


def strategy(parallel: Parallel, device: str, resume: Path) -> Strategy:
    """Lightning's strategy for a run on several devices.

    Args:
        parallel: How many devices, and what they share.
        device: "cpu" or "cuda".
        resume: The path of the checkpoint to resume from, which sharded runs save in shards.

    Returns:
        DDP where every device has all weights, else `Shards`.
    """
    if parallel.sequence == 1:
        # A schedule may leave out parameters in some of its phases.
        return DDPStrategy(process_group_backend=BACKENDS[device], find_unused_parameters=True)
    return Shards(parallel, BACKENDS[device], resume)


class Shards(ModelParallelStrategy):
    """FSDP2 over all devices of a run, some of which share the tokens of each film.

    The checkpoint to resume from is a folder: each device writes its shards, and the folder takes the place of the one
    before when all have. It can be loaded by any number of devices. Every other checkpoint is one file with the whole
    weights, as of a run on one device, without optimizer states.

    Args:
        parallel: How many devices, and what they share.
        backend: Backend of torch.distributed.
        resume: The path of the checkpoint to resume from.
    """

    def __init__(self, parallel: Parallel, backend: str, resume: Path) -> None:
        # Lightning's name for the second dimension; here its devices share tokens, not matrices.
        super().__init__(parallel.data, parallel.sequence, process_group_backend=backend)
        self.sequence, self.resume = parallel.sequence, resume

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        return dict(get_model_state_dict(self.model))

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.model is not None
        return dict(get_optimizer_state_dict(self.model, getattr(optimizer, "_optimizer", optimizer)))

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        path = Path(self.broadcast(filepath))
        if path != self.resume:
            for key in ("optimizer_states", "current_model_state", "averaging_state"):
                checkpoint.pop(key, None)
            checkpoint["state_dict"] = {name: _whole(x) for name, x in checkpoint["state_dict"].items()}
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, path)
            self.barrier()
            return
        optimizers = checkpoint.pop("optimizer_states", [])
        kinds = ("state_dict", "current_model_state")
        tensors: dict[str, Any] = {name: checkpoint.pop(name) for name in kinds if name in checkpoint}
        tensors |= {f"optimizer_{i}": state for i, state in enumerate(optimizers)}
        part = path.with_name(f"{path.name}.part")
        if self.is_global_zero:
            shutil.rmtree(part, ignore_errors=True)
        self.barrier()
        save(tensors, checkpoint_id=part)
        if self.is_global_zero:
            torch.save(checkpoint, part / META)
            replace_folder(part, path)
        self.barrier()

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        saved = read_metadata(path).state_dict_metadata
        averaged = any(name.startswith("current_model_state.") for name in saved)
        model: dict[str, Any] = dict(get_model_state_dict(self.model))
        tensors: dict[str, Any] = {"current_model_state" if averaged else "state_dict": model}
        if averaged:
            names = {name.removeprefix("state_dict.") for name in saved if name.startswith("state_dict.")}
            tensors["state_dict"] = {name: torch.empty_like(x) for name, x in model.items() if name in names}
        load_shards(tensors, path)
        for i, optimizer in enumerate(self.optimizers):
            state = get_optimizer_state_dict(self.model, optimizer)
            load_shards({f"optimizer_{i}": state}, path)
            set_optimizer_state_dict(self.model, optimizer, state)
        meta = torch.load(path / META, map_location="cpu", weights_only=True)
        return dict(meta) | tensors


def replace_folder(part: Path, path: Path) -> None:
    """Put a folder that is written whole in the place of another; `recover_folder` ends this where it was cut short."""
    old = path.with_name(f"{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.is_dir():
        path.rename(old)
    else:
        path.unlink(missing_ok=True)
    part.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Bring back the folder that stood at `path`, where replacing it ended between its two steps."""
    old = path.with_name(f"{path.name}.old")
    if old.is_dir() and not path.exists():
        old.rename(path)


def shard(model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Shard a model's parameters over all devices of a mesh, each block by itself and the rest together.

    Args:
        model: The model; outside of its forward pass its parameters are shards (DTensors) from then on.
        blocks: Its blocks, whose parameters are whole only while they run.
        mesh: The devices, of any number of dimensions.
    """
    flat = init_device_mesh(mesh.device_type, (mesh.size(),), mesh_dim_names=("world",))
    for block in blocks:
        fully_shard(block, mesh=flat)
    # Outside of a pass the root's are shards too: averages and checkpoints are made of those.
    fully_shard(model, mesh=flat, reshard_after_forward=True)


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean over all devices of the run; x itself where there is one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def _whole(x: Any) -> Any:
    return x.full_tensor().cpu() if isinstance(x, DTensor) else x
