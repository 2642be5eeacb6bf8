"""ViT-MAE on PyTorch Lightning: masked autoencoders are scalable vision learners (arXiv:2111.06377)."""

from mae.checkpoint import load, load_encoder
from mae.errors import UserError
from mae.model import MaskedAutoencoder

__all__ = ["MaskedAutoencoder", "UserError", "load", "load_encoder"]
__version__ = "0.1.0"
