"""The untrained network beside a trained one: how much of a score is the architecture's, and how much was learnt."""

from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer

from mae.errors import UserError
from mae.models.mae import MaskedAutoencoder
from mae.runtime.run_files import read_yaml
from mae.weights.weights import Weights

Choice = bool | Literal["auto"]

MOST_IMAGES = 20_000  # to encode once more without being asked

BASELINE_HELP = f"Score the same network untrained, too: true, false, or auto (up to {MOST_IMAGES:,} images)."


def wanted(choice: Choice, images: int) -> bool:
    """Whether the untrained network is scored, too, on so many images in all."""
    return images <= MOST_IMAGES if choice == "auto" else choice


def untrained_encoder(weights: Weights) -> tuple[VisionTransformer, str]:
    """The encoder of `weights` before any training, in eval mode and frozen, and in words which weights it has.

    They are the initial weights of the run itself where its folder tells its seed, else random ones of seed 0. torch's
    global generator is left as it is.
    """
    seed = seed_of_run(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        encoder = MaskedAutoencoder(**weights.config).encoder
    which = "random weights, seed 0" if seed is None else f"the run's weights before its first step, seed {seed}"
    return encoder.eval().requires_grad_(False), which


def seed_of_run(weights: Weights) -> int | None:
    """The seed of the pre-training that wrote the weights, from its config.yaml; None where its start is not known.

    A run that started from other weights (`--model.init`) has no random start to go back to, nor has a classifier.
    """
    if weights.format != "mae" or weights.classifier:
        return None
    parent = weights.source.parent
    try:
        settings = read_yaml((parent.parent if parent.name == "checkpoints" else parent) / "config.yaml")
    except UserError:
        return None
    model, seed = settings.get("model"), settings.get("seed_everything")
    return seed if type(seed) is int and isinstance(model, dict) and model.get("init") is None else None
