"""ViT-MAE on PyTorch Lightning: masked autoencoders are scalable vision learners (arXiv:2111.06377)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mae.checkpoint import load, load_encoder
    from mae.errors import UserError
    from mae.model import MaskedAutoencoder

__all__ = ["MaskedAutoencoder", "UserError", "load", "load_encoder"]
__version__ = "0.1.0"

# Loaded when asked for: the program must hear signals before torch is there, which takes seconds.
HOMES = {"MaskedAutoencoder": "model", "UserError": "errors", "load": "checkpoint", "load_encoder": "checkpoint"}


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"mae.{HOMES[name]}"), name)
    try:
        return import_module(f"mae.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"mae.{name}":
            raise
        raise AttributeError(f"module 'mae' has no attribute {name!r}") from None
