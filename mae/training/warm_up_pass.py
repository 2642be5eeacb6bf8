"""What is done with a blank batch before the first step: compiling the network, and letting DDP arrange its buckets."""

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mae.data.datasets import blank_batch
from mae.errors import UserError
from mae.models import compilation
from mae.models.compilation import Choice
from mae.runtime.processes import gather
from mae.training.throughput import images_per_device


def dry_run_step(module: LightningModule, backward: Callable[[Tensor], Any], through_ddp: bool) -> None:
    """One training step on a blank batch, of which no gradient and no change of a buffer is kept.

    Args:
        module: Its `training_step` is run.
        backward: What is done with the loss.
        through_ddp: Run it through the DDP wrapper, else the bare module.
    """
    trainer = module.trainer
    buffers = [buffer.clone() for buffer in module.buffers()]
    channels, height, width = module.image_shape  # type: ignore[misc]
    batch = module.on_before_batch_transfer(blank_batch(images_per_device(trainer), channels, (height, width)), 0)
    batch = trainer.strategy.batch_to_device(batch._replace(images=batch.images.to(module.dtype)))
    if through_ddp:
        loss = trainer.strategy.training_step(batch, 0)
    else:
        with trainer.precision_plugin.train_step_context():
            loss = module.training_step(batch, 0)
    assert isinstance(loss, Tensor)
    backward(loss)
    module.zero_grad(set_to_none=True)
    for buffer, before in zip(module.buffers(), buffers, strict=True):
        buffer.copy_(before)


def warm_up_ddp_buckets(module: LightningModule) -> None:
    """Have DDP arrange its gradient buckets before the first step, so that a resumed run repeats to the bit.

    After its first backward pass DDP rearranges the gradients in its buckets, and from three ranks on the rounding of a
    sum depends on the place in a bucket: the first step after each start would differ from that of a run that was never
    stopped. A static graph is recorded in the first pass, and its buckets are rearranged after the second.
    """
    ddp = module.trainer.strategy.model
    if isinstance(ddp, DistributedDataParallel):
        for _ in range(2 if ddp.static_graph else 1):
            dry_run_step(module, lambda loss: loss.backward(), through_ddp=True)  # type: ignore[no-untyped-call]


def compile_network(
    module: LightningModule, network: nn.Module, choice: Choice, cuda_graphs: bool, work: float
) -> None:
    """Compile the network as the setting says; all ranks decide the same, by all of their networks and compilers.

    Args:
        module: Its step is tried.
        choice: `--model.compile`.
        work: FLOP of the whole run: `auto` compiles where compiling takes less time than it saves.

    Raises:
        UserError: It is to be compiled, and cannot be.
    """
    if choice is False:
        return
    start = time.perf_counter()
    if cuda_graphs and module.device_mesh is None and module.device.type != "cuda":
        raise UserError(f"--model.cuda_graphs true: there are none on {module.device.type}")
    reason = reason_against(module, network, choice, cuda_graphs, work)
    if reason and choice is True:
        raise UserError(f"--model.compile true: {reason}; --model.compile auto goes on without")
    if module.trainer.is_global_zero:
        if reason:
            print(f"torch.compile skipped: {reason}", flush=True)
        else:
            print(f"torch.compile took {time.perf_counter() - start:.0f} s (--model.compile {choice})", flush=True)


def reason_against(module: LightningModule, network: nn.Module, choice: Choice, cuda_graphs: bool, work: float) -> str:
    """Compile the network, or return why it is not compiled; arguments as in `compile_network`."""
    if module.device_mesh is not None:
        return "not with --trainer.strategy fsdp2"
    if choice is not True and (reason := compilation.too_short(module.device, work)):
        return reason
    trained = [p for p in network.parameters() if p.requires_grad]

    def step() -> None:
        # Not through DDP: a rank that fails must not leave the others waiting for its gradients.
        dry_run_step(module, lambda loss: torch.autograd.grad(loss, trained, allow_unused=True), through_ddp=False)

    failures: list[str] = gather(compilation.attempt(network, step, cuda_graphs))
    if failures:
        compilation.restore(network)
        return failures[0]
    return ""
