"""`torch.compile` of a network's blocks in training, or one line that says why not.

Blocks of the same shape share one compiled program. `module.compile()` leaves the keys of checkpoints as they are.
"""

import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from mae.models.blocks import Block
from mae.runtime.memory import is_out_of_memory

Choice = bool | Literal["auto"]


# FLOPs of a whole run from which on compiling, some 40 seconds of two CPU cores or one of a GPU, wins time. Fixed
# numbers: a run that is resumed, or repeated on another machine, must not choose differently.
WORTHWHILE = {"cpu": 3e14, "cuda": 6e16}


def too_short(device: torch.device, flops: float) -> str:
    """Why a run of so many FLOPs is better not compiled; empty: it is worth it."""
    if device.type not in WORTHWHILE:
        return f"not tried on {device.type}"
    if flops < (worth := WORTHWHILE[device.type]):
        return f"the run's {flops:.1e} FLOP would not win back the time, {worth:.0e} would; true does it all the same"
    return ""


def compile_blocks(network: nn.Module, graphs: bool = False) -> None:
    """From the next step in training on; the compiler itself runs at the first one.

    Args:
        graphs: Replay each block's kernels as CUDA graphs.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it tells of CUDA without a GPU
    # Meant for whole networks: it would cut a block in two wherever a gradient bucket ends.
    torch._dynamo.config.optimize_ddp = False  # type: ignore[assignment]
    for block in blocks(network):
        # Not dynamic: encoder and decoder differ in their numbers of tokens, each of which stays what it is.
        block.compile(dynamic=False, mode="reduce-overhead" if graphs else None)


def restore(network: nn.Module) -> None:
    """Blocks compute as they are written again."""
    for block in blocks(network):
        block._compiled_call_impl = None  # type: ignore[assignment]
    torch._dynamo.reset()


def blocks(network: nn.Module) -> list[Block]:
    return [module for module in network.modules() if isinstance(module, Block)]


def attempt(network: nn.Module, step: Callable[[], None], graphs: bool = False) -> str:
    """Compile, by a step that leaves nothing; returns why it failed, and then nothing is compiled.

    Raises:
        Exception: Memory did not suffice.
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
    """What is missing, or the first words of an error that belongs to the compiler itself."""
    text = str(error)
    if "C++ compiler" in text or "C++ compile error" in text:
        return "torch.compile needs a C++ compiler that works: install g++, or name one by CXX"
    if "triton" in text.lower() or "C compiler" in text:
        return "torch.compile needs triton and a C compiler that work: install triton and gcc"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
