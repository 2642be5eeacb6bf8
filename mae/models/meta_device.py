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
