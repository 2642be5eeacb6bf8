"""Weights, gradients and optimiser state sharded over processes (FSDP2), for networks too large for a single device.

Every process holds a part of each tensor, as a DTensor; the weights of a block are gathered when it is computed.
Checkpoints hold whole tensors in one file, as those of other runs do: a run may be resumed in a single process or under
DDP, and the other way round.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from mae.training.lightning_internals import set_parallel_sizes

# Methods of a network, besides its forward, that compute with its weights.
ENTRANCES = ("encode", "predict")


class FSDP2(ModelParallelStrategy):
    """Lightning's strategy, over all processes of the run; the module's `configure_model` calls `shard`.

    Weights and gradients are in the precision that they have under DDP, so the losses are the same: mixed precision is
    autocast's. Accumulated gradients are reduced in each micro-batch, since keeping whole ones would cost the memory
    that is to be saved.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        set_parallel_sizes(self, data=self.num_nodes * self.num_processes, tensor=1)
        super().setup_environment()

    # Checkpoints take the way of all other strategies, through the plugin that reads and writes files. Lightning's own
    # way for this one takes the parameters of an optimiser to be in the order of the network, and ours come in groups.

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return full_state(self.lightning_module)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return gathered(plain.state_dict())

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, *args, **kwargs)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {key: part_of(value, own.get(key)) for key, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            # Places in the file are those of the groups, whatever the numbers that parameters have there.
            places = [key for group in state["param_groups"] for key in group["params"]]
            own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            parameters = dict(zip(places, own, strict=True))
            parts = {
                key: {name: part_of(value, parameters[key]) for name, value in values.items()}
                for key, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": parts})


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the parameters of `network`, in place, each transformer block apart; a second call does nothing.

    Every process must hold the same weights. Optimisers are made afterwards, of the parameters that there are then.

    Args:
        mesh: Lightning's, whose dimension `data_parallel` holds all processes.
    """
    if isinstance(network, FSDPModule):
        return
    processes = mesh["data_parallel"]
    for block in [module for module in network.modules() if isinstance(module, Block)]:
        fully_shard(block, mesh=processes, reshard_after_forward=True)
    # What is left, stem and heads, is small and needed at both ends: it stays from forward to backward.
    fully_shard(network, mesh=processes, reshard_after_forward=False)
    for name in ENTRANCES:
        if hasattr(network, name):
            register_fsdp_forward_method(network, name)


@contextmanager
def whole(network: nn.Module) -> Iterator[None]:
    """Gather all weights for the duration of the context: a forward pass inside waits for no other process.

    For evaluation, without gradients. All processes enter it together; inside, each may do as many forward passes as it
    likes, or none. Does nothing for a network that is not sharded.
    """
    parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
    # Lightning evaluates in inference mode, whose tensors could not be trained with afterwards.
    with torch.inference_mode(False), torch.no_grad():
        if parts:
            # Otherwise done in the first forward pass, and it must know the root of all parts.
            fully_shard.state(network)._lazy_init()  # type: ignore[attr-defined]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
    try:
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for part in parts:
                part.set_reshard_after_forward(part is not network, recurse=False)
                part.reshard()


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The state_dict with whole tensors; all processes call it together.

    For a sharded network the first process gets them on the CPU, and the others get none of the sharded ones.
    """
    return {key: value for key, value in gathered(module.state_dict()).items() if value is not None}


def gathered(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """`state` with whole tensors on the CPU in place of its DTensors, on the first process; None on the others."""
    result = dict(state)
    for key, value in state.items():
        if isinstance(value, dict):
            result[key] = gathered(value)
        elif isinstance(value, DTensor):
            full = value.full_tensor().detach()  # one at a time: no more is whole on the device
            result[key] = full.cpu() if dist.get_rank() == 0 else None
    return result


def part_of(value: Any, own: Any) -> Any:
    """What this process keeps of `value`, a whole tensor: the part that it has of `own`, or all where that is whole."""
    if not isinstance(own, DTensor) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value  # a step's number, or what does not fit and is refused by who loads it
    assert own.placements == (Shard(0),)
    mesh = own.device_mesh
    parts = value.chunk(mesh.size())  # may be fewer than processes
    rank = mesh.get_local_rank()
    mine = parts[rank] if rank < len(parts) else value[:0]
    # A copy, else a part would keep all of the file in memory.
    local = torch.empty_like(mine, device=own.device, memory_format=torch.contiguous_format).copy_(mine)
    return DTensor.from_local(local, mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride())
