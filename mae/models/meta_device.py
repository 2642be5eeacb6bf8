"""Networks on the meta device: every parameter has its shape, none has memory or values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _LinspaceOnCPU(TorchFunctionMode):
    """Older versions of timm read the drop path rate of each block from a `linspace`; a meta tensor has no values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = {"device": "cpu"} if func is torch.linspace else {}
        return func(*args, **device | (kwargs or {}))


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Create networks whose parameters and buffers lie on the meta device.

    They cost no memory and no time for initialisation. Use them for their shapes, or give them values with
    `load_state_dict(..., assign=True)`.
    """
    with torch.device("meta"), _LinspaceOnCPU():
        yield


@contextmanager
def to_be_loaded(config: dict[str, Any]) -> Iterator[None]:
    """Create a network that `load_state_dict(..., assign=True)` fills, without touching torch's global generator.

    Args:
        config: Of the network. An encoder of timm's is created with values, since some are in no file: RoPE's table.
    """
    with torch.random.fork_rng(devices=[]) if "timm_encoder" in config else meta_parameters():
        yield
