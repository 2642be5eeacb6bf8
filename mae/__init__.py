"""ViT-MAE on PyTorch Lightning: masked autoencoders are scalable vision learners (arXiv:2111.06377)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mae.data.datamodule import ImageData
    from mae.errors import UserError
    from mae.evaluation.transform import transform
    from mae.finetune import Finetune
    from mae.launch.api import embed_images, run_linprobe, run_pretrain
    from mae.linprobe import LinearProbe
    from mae.models.mae import MaskedAutoencoder
    from mae.pretrain import Pretrain
    from mae.weights.load import load, load_encoder

__all__ = [
    "Finetune",
    "ImageData",
    "LinearProbe",
    "MaskedAutoencoder",
    "Pretrain",
    "UserError",
    "embed_images",
    "load",
    "load_encoder",
    "run_linprobe",
    "run_pretrain",
    "transform",
]
__version__ = "0.1.0"

# Where each public name is defined. They are imported when first used: `import mae` alone must not load torch, since
# the program has to answer, and to hear signals, at once.
_MODULES = {
    "Finetune": "finetune",
    "ImageData": "data.datamodule",
    "LinearProbe": "linprobe",
    "MaskedAutoencoder": "models.mae",
    "Pretrain": "pretrain",
    "UserError": "errors",
    "embed_images": "launch.api",
    "load": "weights.load",
    "load_encoder": "weights.load",
    "run_linprobe": "launch.api",
    "run_pretrain": "launch.api",
    "transform": "evaluation.transform",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mae' has no attribute {name!r}; its names are {', '.join(__all__)}")
    return getattr(import_module(f"mae.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
