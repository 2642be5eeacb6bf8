"""Checks of converted weights: read back bit by bit, and run in the software that they are for."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae.errors import TrainingFailed
from mae.weights import model_card
from mae.weights.classifier import build_classifier
from mae.weights.detect import usable_weights
from mae.weights.weights import Weights

TOLERANCE = 1e-4  # between what two programs compute from the same weights, relative to the largest number


def check_same_tensors(weights: Weights, path: Path) -> str:
    """Read back what was written.

    Raises:
        TrainingFailed: It is not the same, bit by bit.
    """
    back = usable_weights(path)
    different = [key for key, value in back.config.items() if value != weights.config[key]]
    if back.state.keys() != weights.state.keys() or different:
        raise TrainingFailed(f"{path.name} does not read back as what was written: nothing is kept")
    for key, value in weights.state.items():
        if not torch.equal(back.state[key], value):
            raise TrainingFailed(f"{path.name}: {key} does not read back as it was written: nothing is kept")
    return f"read back: {len(weights.state)} tensors, the same to the bit"


@torch.no_grad()
def own_outputs(weights: Weights) -> dict[str, Tensor]:
    """What this package computes: logits of a classifier; features; prediction and loss of an autoencoder."""
    images, noise = random_inputs(weights)
    if weights.classifier:
        return {"logits": build_classifier(weights)(images)}
    outputs = {"features": weights.encoder().forward_features(images)}
    if weights.has_decoder:
        model, ratio = weights.build(), weights.description["mask_ratio"]
        model.visible_loss_weight = 0.0  # of training, which other software knows nothing of
        outputs |= {"loss": model(images, noise, ratio).loss, "prediction": model.predict(images, noise, ratio).pred}
    return outputs


@torch.no_grad()
def timm_outputs(weights: Weights, path: Path) -> dict[str, Tensor]:
    """What timm computes from the file or folder at `path`."""
    import timm

    if path.is_dir():
        config, path = json.loads((path / "config.json").read_text()), path / "model.safetensors"
    else:
        config = model_card.timm_config(weights)
    # Not by timm's "local-dir:", which cannot read .safetensors files in older versions.
    network: Any = timm.create_model(config["architecture"], checkpoint_path=str(path), **config["model_args"])
    images, _ = random_inputs(weights)
    network.eval()
    return {"logits": network(images)} if weights.classifier else {"features": network.forward_features(images)}


@torch.no_grad()
def transformers_outputs(weights: Weights, path: Path) -> dict[str, Tensor]:
    """What transformers computes from the folder at `path`."""
    import transformers

    images, noise = random_inputs(weights)
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        network_class = getattr(transformers, model_card.hf_config(weights)["architectures"][0])
        network: Any = network_class.from_pretrained(path).eval()
    finally:
        transformers.logging.set_verbosity(before)
    if weights.classifier:
        return {"logits": network(images).logits}
    if not weights.has_decoder:
        return {"features": network(images).last_hidden_state}
    outputs = network(images, noise=noise)
    network.vit.config.mask_ratio = 0.0  # all patches stay visible, in the order of this noise
    order = torch.arange(noise.shape[1]).expand_as(noise) / noise.shape[1]
    features = network.vit(images, noise=order).last_hidden_state
    return {"loss": outputs.loss, "prediction": outputs.logits, "features": features}


def random_inputs(weights: Weights) -> tuple[Tensor, Tensor]:
    """Two random images (2, C, H, W) and the noise (2, N) of their patches."""
    generator = torch.Generator().manual_seed(0)
    config = weights.config
    images = torch.randn(2, config["in_chans"], *config["image_size"], generator=generator)
    return images, torch.rand(2, weights.grid[0] * weights.grid[1], generator=generator)


def check_same_outputs(program: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """Compare what two programs compute from the same images.

    Raises:
        TrainingFailed: They differ by more than TOLERANCE.
    """
    gaps = []
    for name, value in theirs.items():
        gap = float((value - ours[name]).abs().max())
        if not gap <= TOLERANCE * max(1.0, float(ours[name].abs().max())):
            raise TrainingFailed(f"{program} computes other {name} from it, {gap:.2g} apart: nothing is kept")
        gaps.append(f"{name} {gap:.1g}")
    return f"run in {program}, greatest difference: {', '.join(gaps)}"


def check_gap(program: str, gap: float, limit: float) -> str:
    """Raise a TrainingFailed if a graph's outputs differ from ours by more than `limit`."""
    if not gap <= limit:
        raise TrainingFailed(
            f"{program} computes something else, {gap:.2g} apart where {limit:g} is allowed: nothing is kept"
        )
    return f"run in {program}, greatest difference: {gap:.1g}"
