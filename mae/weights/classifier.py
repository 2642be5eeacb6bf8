"""Classifiers from weights: an encoder's sizes, loading a pre-trained encoder, and reading a classifier back."""

from pathlib import Path
from typing import Any, NamedTuple

from timm.models.vision_transformer import VisionTransformer

from mae.errors import UserError
from mae.models.mae import SIZES, Pair, as_pair
from mae.models.meta_device import to_be_loaded
from mae.models.vit import build
from mae.runtime.text import printable
from mae.weights.load import read_weights
from mae.weights.weights import Weights, resample_positions

TIMM_KEYS = ("timm_encoder", "timm_args")  # of an encoder of timm's

ENCODER_KEYS = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")


class Classifier(NamedTuple):
    """A trained classifier, ready to use."""

    network: VisionTransformer  # (B, C, H, W) normalised -> logits (B, classes); eval mode
    classes: list[str]
    description: dict[str, Any]  # model: the encoder's sizes; mean, std, classifier: pool, crop_pct, ...


def encoder_config(
    weights: Weights | None,
    image_size: int | Pair,
    in_chans: int,
    size: str | None,
    overrides: dict[str, Any],
) -> dict[str, Any]:
    """The sizes of an encoder: those of `weights`, which settings may repeat but not change, or those of the settings.

    Args:
        size: One of SIZES.
        overrides: patch_size, embed_dim, depth, num_heads; None where `size` or the weights decide.

    Raises:
        UserError: A setting and the weights differ; both are named.
    """
    if size is not None and size not in SIZES:
        raise UserError(f"--model.size {size!r} is none of {', '.join(SIZES)}")
    settings: dict[str, Any] = {} if size is None else SIZES[size]._asdict()
    settings |= {"in_chans": in_chans} | {key: value for key, value in overrides.items() if value is not None}
    if "patch_size" in settings:
        settings["patch_size"] = list(as_pair(settings["patch_size"]))
    if weights is None:
        default = {"patch_size": [16, 16], "mlp_ratio": 4.0, **SIZES["base"]._asdict()}
        config = default | settings
    else:
        config = {key: weights.config[key] for key in (*ENCODER_KEYS, *TIMM_KEYS) if key in weights.config}
        for key, value in settings.items():
            if config[key] != value:
                setting = f"--model.{key} {value}"
                if key == "in_chans":
                    setting = f"--data.in_chans {value}"
                elif overrides.get(key) is None:
                    setting = f"--model.size: {key} {value}"
                raise UserError(f"{setting} does not fit {weights.source}, which has {config[key]}")
    if config["num_heads"] < 1 or config["embed_dim"] % config["num_heads"] or config["embed_dim"] % 4:
        raise UserError(
            f"--model.embed_dim {config['embed_dim']} is not divisible by 4 and by --model.num_heads "
            f"{config['num_heads']}"
        )
    if min(config["depth"], *config["patch_size"]) < 1:
        raise UserError(f"--model.depth {config['depth']}, patch_size {config['patch_size']}: at least 1")
    height, width = as_pair(image_size)
    if weights is not None and "timm_encoder" in config and [height, width] != weights.config["image_size"]:
        raise UserError(
            f"--data.image_size {height}x{width} does not fit {weights.source}, which holds timm's "
            f"{config['timm_encoder']} for images of {weights.config['image_size']}"
        )
    ph, pw = config["patch_size"]
    if height % ph or width % pw:
        raise UserError(f"--data.image_size {height}x{width} is not divisible by the encoder's patch size {ph}x{pw}")
    return {"image_size": [height, width], **config}


def load_pretrained(network: VisionTransformer, weights: Weights) -> str:
    """Copy an encoder into a classifier, all but its head; returns in words what was loaded.

    Raises:
        UserError: A tensor is missing, extra or of another shape.
    """
    state = {key: v for key, v in weights.timm_state.items() if not key.startswith(("head.", "fc_norm."))}
    actions = [f"encoder {weights.source}"]
    old, new = weights.grid, network.patch_embed.grid_size
    if old != new:
        assert network.pos_embed is not None
        state["pos_embed"] = resample_positions(state["pos_embed"], old, new)
        actions.append(f"positions resampled from {old[0]}x{old[1]} to {new[0]}x{new[1]}")
    expected = network.state_dict()
    if "norm.weight" not in expected:  # mean pooling has a norm of its own, after the pool
        state = {key: value for key, value in state.items() if not key.startswith("norm.")}
    may_be_missing = ("head.", "fc_norm.", *(["norm."] if weights.classifier else []))
    missing = [key for key in expected if key not in state and not key.startswith(may_be_missing)]
    wrong = [key for key in state if key not in expected or expected[key].shape != state[key].shape]
    if missing or wrong:
        raise UserError(f"{weights.source} does not fit this network: {', '.join((missing + wrong)[:3])}")
    network.load_state_dict(state, strict=False)
    if weights.classifier:
        actions.append("which was trained with labels")
    return ", ".join(actions)


def load_classifier(src: str | Path) -> Classifier:
    """Load a fine-tuned or probed model.

    Raises:
        UserError: `src` holds no classifier.
    """
    weights = read_weights(src)
    classes = list(map(printable, weights.require_classifier()["classes"]))
    return Classifier(build_classifier(weights), classes, weights.description)


def build_classifier(weights: Weights) -> VisionTransformer:
    """The classifier that these weights belong to, frozen, in eval mode.

    Raises:
        UserError: They belong to none.
    """
    about = weights.require_classifier()
    with to_be_loaded(weights.config):
        network = build(weights.config, len(about["classes"]), about["pool"], about["head"])
    network.load_state_dict(weights.timm_state, assign=True)
    return weights.with_preprocessing(network).eval().requires_grad_(False)
