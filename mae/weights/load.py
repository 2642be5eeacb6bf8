"""Weights on disk: loading them, writing them so that timm can read the encoder, starting from them."""

import functools
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from mae.errors import UserError
from mae.models.mae import MaskedAutoencoder, Pair, as_pair
from mae.runtime.environment import is_first_rank
from mae.runtime.storage import sync
from mae.weights import detect
from mae.weights.detect import ArchOverrides, merge_lora
from mae.weights.state_dict_keys import ENCODER, State, official_name, official_to_ours
from mae.weights.weights import Weights

EXPORTS = ("model.safetensors", "encoder.safetensors")  # what a run leaves at its end, in this order


def load(
    src: str | Path,
    *,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    norm_pix_loss: bool | None = None,
    grid: Pair | None = None,
) -> MaskedAutoencoder:
    """The whole autoencoder, in eval mode. What had to be assumed of it is a warning.

    Args:
        src: A run folder, a .ckpt or .safetensors file of this project, an official .pth with decoder, or a folder in
            which transformers has saved a ViTMAE.
        num_heads: Attention heads, where the file does not tell and the width is an unusual one; decoder_num_heads too.
        norm_pix_loss: What the decoder predicts, where the file does not tell: patches normalised, or plain pixels.
        grid: Rows and columns of patches, where they are neither told nor square.

    Raises:
        UserError: There is no such file, it is damaged or of another kind, or it has no decoder.
    """
    weights = read_warning(src, ArchOverrides(num_heads, decoder_num_heads, norm_pix_loss, grid))
    weights.require_decoder()
    return weights.build()


def load_encoder(
    src: str | Path,
    allow_finetuned: bool = False,
    *,
    image_size: int | Pair | None = None,
    in_chans: int | None = None,
    num_heads: int | None = None,
    grid: Pair | None = None,
) -> VisionTransformer:
    """The encoder, ready for features: timm's VisionTransformer in eval mode, frozen; `forward_features(images)` gives
    (B, 1 + N, D), class token first; never masked.

    Args:
        src: As in `load`; or an encoder without decoder, of any of these formats or timm's.
        allow_finetuned: Take the encoder of a classifier, too.
        image_size: Another than its own: positions are resampled.
        in_chans: Others than its own three: the patch embedding is adapted by timm's rule.
        num_heads: As in `load`, as is `grid`.
    """
    weights = read_warning(src, ArchOverrides(num_heads=num_heads, grid=grid))
    weights.require_pretrained(allow_finetuned, "allow_finetuned=True")
    return weights.adapted(image_size, in_chans).encoder()


def read_warning(src: str | Path, told: ArchOverrides) -> Weights:
    """As `read`, for those who call from Python: what had to be assumed is a warning."""
    weights = detect.read(src, told)
    for note in weights.notes:
        warnings.warn(f"{weights.source}: {note}", stacklevel=3)
    return weights


def read_weights(src: str | Path) -> Weights:
    """Recognise SRC by its content, and say what had to be assumed of it.

    Raises:
        UserError: It does not exist, or holds no weights that can be used.
    """
    weights = detect.read(src)
    say(weights)
    return weights


def say(weights: Weights) -> None:
    for note in weights.notes if is_first_rank() else ():
        say_once(f"{weights.source}: {note}")


@functools.cache
def say_once(line: str) -> None:
    """Weights may be read several times."""
    print(line, flush=True)


def export(state: State, description: dict[str, Any], folder: Path) -> list[Path]:
    """Write encoder.safetensors (timm's names and layout) and model.safetensors (encoder and decoder)."""
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    encoder = {key.removeprefix(ENCODER): value for key, value in state.items() if key.startswith(ENCODER)}
    paths = [folder / name for name in EXPORTS]
    for kind, tensors, path in zip(("model", "encoder"), (state, encoder), paths, strict=True):
        save(tensors, {"kind": kind, **description}, path)
    return paths


def export_classifier(state: State, description: dict[str, Any], folder: Path) -> list[Path]:
    """Write model.safetensors: a classifier under timm's names, with classes, pool, mean, std and crop described."""
    path = folder / "model.safetensors"
    merged = merge_lora(state, description["classifier"]["lora_scale"])
    plain = {key: value.detach().cpu().contiguous() for key, value in merged.items()}
    save(plain, {"kind": "classifier", **description}, path)
    return [path]


def save(tensors: State, description: dict[str, Any], path: Path) -> None:
    unfinished = path.with_suffix(".partial")
    save_file(tensors, unfinished, {"format": "pt", "mae": json.dumps(description)})
    os.umask(umask := os.umask(0))  # which can only be read by setting it
    unfinished.chmod(0o666 & ~umask)  # safetensors lets nobody else read its files
    sync(unfinished)
    unfinished.replace(path)


def warm_start(model: MaskedAutoencoder, src: str | Path) -> str:
    """Copy the weights of `src` into `model`; returns what was loaded, resampled or left random, in words.

    Encoder and, where it fits, decoder are copied. Positions of another grid are not copied: ours are fixed and
    computed for the grid at hand.

    Raises:
        UserError: The encoder of src is of another architecture.
    """
    weights = read_weights(src)
    weights.require_pretrained(False, None)
    own, given = model.config, weights.config
    for key in ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "in_chans"):
        if own[key] != given[key]:
            raise UserError(
                f"--model.init {weights.source} is another architecture: {key} {given[key]}, this model has {own[key]}"
            )
    state, said = dict(weights.state), ["encoder loaded"]
    if own["image_size"] != given["image_size"]:
        state = {key: value for key, value in state.items() if not key.endswith("pos_embed")}
        said.append(f"positions recomputed for {own['image_size']} (were {given['image_size']})")
    same_decoder = all(own[key] == given[key] for key in own if key.startswith("decoder_"))
    if weights.has_decoder and same_decoder:
        said.append("decoder loaded")
    else:
        state = {key: value for key, value in state.items() if key.startswith(ENCODER)}
        said.append("decoder left random: " + ("of another size" if weights.has_decoder else "the file has none"))
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise UserError(f"{weights.source} holds unknown tensors: {', '.join(unexpected[:3])}")
    return f"--model.init {weights.source}: {', '.join(said)}"


def require_resumable(src: Path, architecture: dict[str, Any]) -> dict[str, Any]:
    """The description of the run that wrote `src`: its recipe by key of the command line, step, devices.

    Raises:
        UserError: It is no checkpoint of a run, one of a newer version, or one of another network.
    """
    weights = read_weights(src)
    if src.suffix == ".safetensors" or "recipe" not in weights.description:
        raise UserError(f"--ckpt_path {src} holds weights without the state of a run; --model.init starts from weights")
    given = {**weights.config, **(weights.classifier or {})}
    for key, own in architecture.items():
        if key not in given or given[key] != own:
            raise UserError(
                f"--ckpt_path {src} is of another architecture: {key} {given.get(key, 'is missing')}, here {own}"
            )
    return weights.description


def load_official_state_dict(model: MaskedAutoencoder, state_dict: State) -> None:
    """Copy tensors under the official names (`blocks.0...`, `decoder_blocks.0...`) into `model`, strictly.

    Raises:
        ValueError: Names what is missing, extra or of another shape.
    """
    given = {official_to_ours(key): value for key, value in state_dict.items()}
    own = model.state_dict()
    wrong = [f"missing {official_name(key)}" for key in own if key not in given]
    wrong += [f"extra {official_name(key)}" for key in given if key not in own]
    wrong += [
        f"{official_name(key)} is {tuple(given[key].shape)}, wanted {tuple(own[key].shape)}"
        for key in own
        if key in given and given[key].shape != own[key].shape
    ]
    if wrong:
        raise ValueError(f"official weights do not fit: {'; '.join(wrong[:10])}" + (" ..." if len(wrong) > 10 else ""))
    model.load_state_dict(given)


def fitted(settings: dict[str, Any], own: dict[str, Any], src: str, fixed: Sequence[str]) -> dict[str, Any]:
    """Settings of the data, those not given filled from `own`.

    Raises:
        UserError: One of `fixed` is given and another than in `own`, which belongs to `src`.
    """
    for key in fixed:
        if (given := settings[key]) is not None and as_pair(given) != as_pair(own[key]):
            raise UserError(f"--data.{key} {given} does not fit {src}, which takes {own[key]}")
    return settings | {key: value for key, value in own.items() if settings.get(key) is None}


def image_settings(description: dict[str, Any]) -> dict[str, Any]:
    """What images these weights were trained on, as settings of the data."""
    model = description["model"]
    own = {"image_size": tuple(model["image_size"]), "in_chans": model["in_chans"]}
    return own | {key: description[key] for key in ("mean", "std")}
