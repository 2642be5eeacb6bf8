"""Compile the blocks of a network for training with `torch.compile`, or say in one line why that is not possible.

Blocks of the same shape share one compiled program. `module.compile()` does not change the keys of checkpoints.
"""

import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from mae.models.blocks import Block
from mae.runtime.memory import is_out_of_memory

Choice = bool | Literal["auto"]


# FLOPs of a whole run above which compiling (about 40 seconds on two CPU cores or with a GPU) saves time. The numbers
# are fixed: a run that is resumed, or repeated on another machine, must not choose differently.
WORTHWHILE = {"cpu": 3e14, "cuda": 6e16}


def too_short(device: torch.device, flops: float) -> str:
    """The reason not to compile a run of this many FLOPs; empty if compiling is worth it."""
    if device.type not in WORTHWHILE:
        return f"not tried on {device.type}"
    if flops < WORTHWHILE[device.type]:
        return "the run is too short to pay for it (--model.compile true forces it)"
    return ""


def compile_blocks(network: nn.Module, graphs: bool = False) -> None:
    """Compile the blocks for training; the compiler itself runs in the next training step.

    Args:
        graphs: Replay each block's kernels as CUDA graphs.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of CUDA on machines without a GPU
    # DDPOptimizer is meant for whole networks: it would cut a block in two wherever a gradient bucket ends.
    torch._dynamo.config.optimize_ddp = False  # type: ignore[assignment]
    for block in blocks(network):
        # Not dynamic: encoder and decoder have different numbers of tokens, but each keeps its own.
        block.compile(dynamic=False, mode="reduce-overhead" if graphs else None)


def restore(network: nn.Module) -> None:
    """Undo `compile_blocks`."""
    for block in blocks(network):
        block._compiled_call_impl = None  # type: ignore[assignment]
    torch._dynamo.reset()


def blocks(network: nn.Module) -> list[Block]:
    return [module for module in network.modules() if isinstance(module, Block)]


def attempt(network: nn.Module, step: Callable[[], None], graphs: bool = False) -> str:
    """Compile the blocks and run `step`, which must leave no trace; if that fails, undo it and return the reason.

    Raises:
        Exception: The error of `step`, if it ran out of memory.
    """
    compile_blocks(network, graphs)
    try:
        step()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        restore(network)
        return reason(error)
    return ""


def reason(error: BaseException) -> str:
    """The missing tool, or the first line of an error of the compiler itself."""
    text = str(error)
    if "C++ compiler" in text or "C++ compile error" in text:
        return "torch.compile needs a C++ compiler that works: install g++, or name one by CXX"
    if "triton" in text.lower() or "C compiler" in text:
        return "torch.compile needs triton and a C compiler that work: install triton and gcc"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
