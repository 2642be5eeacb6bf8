"""Loading weights, writing them so that timm can read the encoder, and starting from them."""

import functools
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from mae.errors import UserError
from mae.models.mae import MaskedAutoencoder, Pair, as_pair
from mae.runtime import checkpoint_files
from mae.runtime.environment import is_first_rank
from mae.runtime.files import atomic_write
from mae.weights import read_file
from mae.weights.detect import NotFinite, detect_opened, require_usable, usable_weights
from mae.weights.detect_architecture import NO_OVERRIDES, ArchOverrides
from mae.weights.state_dict_keys import ENCODER, State, official_name, official_to_ours
from mae.weights.weights import Weights, merge_lora

EXPORTS = ("model.safetensors", "encoder.safetensors")  # what a pre-training writes at its end, in this order


def load(
    src: str | Path,
    *,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    norm_pix_loss: bool | None = None,
    grid: Pair | None = None,
    prefix: str | None = None,
) -> MaskedAutoencoder:
    """Load the whole autoencoder, in eval mode. Whatever had to be assumed about it is a warning.

    Args:
        src: A run folder, a .ckpt or .safetensors file of this project, an official .pth with decoder, or a folder in
            which transformers has saved a ViTMAE.
        num_heads: Attention heads, where the file does not record them and the width is unusual.
        decoder_num_heads: The same for the decoder.
        norm_pix_loss: Whether the decoder predicts normalised patches or plain pixels, where the file does not record
            it.
        grid: Rows and columns of patches, where they are neither recorded nor equal.
        prefix: Of the tensors to take, such as "teacher", where the file holds several encoders.

    Raises:
        UserError: The file does not exist, is damaged or of another kind, or has no decoder.
    """
    weights = read_with_warnings(src, ArchOverrides(num_heads, decoder_num_heads, norm_pix_loss, grid, prefix=prefix))
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
    prefix: str | None = None,
) -> VisionTransformer:
    """Load the encoder for features: timm's VisionTransformer in eval mode, frozen.

    `forward_features(images)` gives (B, 1 + N, D), class token first; nothing is masked.

    Args:
        src: As in `load`, or an encoder without decoder, in any of these formats or timm's.
        allow_finetuned: Also accept the encoder of a classifier.
        image_size: Another size than its own; positions are resampled.
        in_chans: Another number of channels than its own three; the patch embedding is adapted by timm's rule.
        num_heads: As in `load`.
        grid: As in `load`.
        prefix: As in `load`.

    Raises:
        UserError: As in `load`, or it is a classifier's encoder.
    """
    weights = read_with_warnings(src, ArchOverrides(num_heads=num_heads, grid=grid, prefix=prefix))
    weights.require_pretrained(allow_finetuned, "allow_finetuned=True")
    return weights.adapted(image_size, in_chans).encoder()


def read_with_warnings(src: str | Path, overrides: ArchOverrides) -> Weights:
    """The usable weights of SRC, for callers from Python: what had to be assumed is a warning."""
    weights = usable_weights(src, overrides)
    for note in weights.notes:
        warnings.warn(f"{weights.source}: {note}", stacklevel=3)
    return weights


def read_weights(src: str | Path) -> Weights:
    """The usable weights of SRC, recognised by its content; what had to be assumed about them is printed.

    Raises:
        UserError: It does not exist, or holds no weights that can be used.
    """
    weights = usable_weights(src)
    print_notes(weights)
    return weights


def print_notes(weights: Weights) -> None:
    """Print on the first rank what had to be assumed about weights."""
    if is_first_rank():
        for note in weights.notes:
            print_once(f"{weights.source}: {note}")


@functools.cache
def print_once(line: str) -> None:
    """Print a line unless it has been printed before: weights may be read several times."""
    print(line, flush=True)


def export_autoencoder(state: State, description: dict[str, Any], folder: Path) -> list[Path]:
    """Write model.safetensors (encoder and decoder) and encoder.safetensors (timm's names and layout)."""
    encoder = {key.removeprefix(ENCODER): value for key, value in state.items() if key.startswith(ENCODER)}
    paths = [folder / name for name in EXPORTS]
    save_safetensors(state, {"kind": "model", **description}, paths[0])
    save_safetensors(encoder, {"kind": "encoder", **description}, paths[1])
    return paths


def export_classifier(state: State, description: dict[str, Any], folder: Path) -> list[Path]:
    """Write model.safetensors: a classifier under timm's names, described by its classes, pool, mean, std and crop."""
    path = folder / "model.safetensors"
    merged = merge_lora(state, description["classifier"]["lora_scale"])
    save_safetensors(merged, {"kind": "classifier", **description}, path)
    return [path]


def save_safetensors(tensors: State, description: dict[str, Any], path: Path) -> None:
    """Write a file with its description in the metadata; it gets its name once it is complete."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with atomic_write(path) as partial:
        save_file(tensors, partial, {"format": "pt", "mae": json.dumps(description)})
        sort_metadata(partial)


def sort_metadata(path: Path) -> None:
    """Bring the metadata of a safetensors file into order, which its writer leaves to chance: same content, same bytes.

    The header keeps its length, as it holds the same text in another order.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def warm_start(model: MaskedAutoencoder, src: str | Path) -> str:
    """Copy the weights of `src` into `model`; returns in words what was loaded, resampled or left random.

    The encoder and, where it fits, the decoder are copied. Positions of another grid are not copied: ours are fixed and
    computed for the model's own grid.

    Raises:
        UserError: The encoder of src has another architecture.
    """
    weights = read_weights(src)
    weights.require_pretrained(False, None)
    ours, theirs = model.config, weights.config
    for key in ("timm_encoder", "timm_args", "embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "in_chans"):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"--model.init {weights.source} is another architecture: {key} {theirs.get(key)}, "
                f"this model has {ours.get(key)}"
            )
    state, actions = dict(weights.state), ["encoder loaded"]
    if ours["image_size"] != theirs["image_size"]:
        state = {key: value for key, value in state.items() if not key.endswith("pos_embed")}
        actions.append(f"positions recomputed for {ours['image_size']} (were {theirs['image_size']})")
    if weights.has_decoder and all(ours[key] == theirs[key] for key in ours if key.startswith("decoder_")):
        actions.append("decoder loaded")
    else:
        state = {key: value for key, value in state.items() if key.startswith(ENCODER)}
        actions.append("decoder left random: " + ("of another size" if weights.has_decoder else "the file has none"))
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise UserError(f"{weights.source} holds unknown tensors: {', '.join(unexpected[:3])}")
    return f"--model.init {weights.source}: {', '.join(actions)}"


def read_checkpoint(path: Path, architecture: dict[str, Any]) -> dict[str, Any]:
    """The content of a run's checkpoint, to go on with the run; its checksum is not looked at again.

    Tensors are on the CPU, mapped from the file. The weights among them are checked as in `read_weights`.

    Args:
        path: A file whose bytes are known to be those that were written (`checkpoint_files.damage`).
        architecture: Of the network that goes on, as `Stage.architecture` gives it.

    Raises:
        UserError: It holds no state of a run, or that of another network.
        NotFinite: Numbers in it are not finite.
    """
    content = read_file.load_pickle(path)
    weights = require_usable(detect_opened(read_file.open_torch(path, content), NO_OVERRIDES))
    print_notes(weights)
    if "recipe" not in weights.description:
        raise not_a_checkpoint(path)
    stored = {**weights.config, **(weights.classifier or {})}
    for key, value in architecture.items():
        if key not in stored or stored[key] != value:
            raise UserError(
                f"--ckpt_path {path} is of another architecture: {key} {stored.get(key, 'is missing')}, here {value}"
            )
    checkpoint: dict[str, Any] = content
    if not checkpoint_files.all_finite(checkpoint.get("optimizer_states")):
        raise NotFinite(f"{path} cannot be used: the optimiser's state has numbers that are not finite")
    return checkpoint


def not_a_checkpoint(path: Path) -> UserError:
    return UserError(f"--ckpt_path {path} holds weights without the state of a run; --model.init starts from weights")


def load_official_state_dict(model: MaskedAutoencoder, state_dict: State) -> None:
    """Copy tensors under the official names (`blocks.0...`, `decoder_blocks.0...`) into `model`, strictly.

    Raises:
        ValueError: Names what is missing, extra or of another shape.
    """
    state = {official_to_ours(key): value for key, value in state_dict.items()}
    expected = model.state_dict()
    wrong = [f"missing {official_name(key)}" for key in expected if key not in state]
    wrong += [f"extra {official_name(key)}" for key in state if key not in expected]
    wrong += [
        f"{official_name(key)} is {tuple(state[key].shape)}, wanted {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if wrong:
        raise ValueError(f"official weights do not fit: {'; '.join(wrong[:10])}" + (" ..." if len(wrong) > 10 else ""))
    model.load_state_dict(state)


def fill_data_settings(
    settings: dict[str, Any], trained: dict[str, Any], src: str, fixed: Sequence[str]
) -> dict[str, Any]:
    """Settings of the data, with those that are None filled from what the weights were trained on.

    Args:
        trained: As `trained_data_settings` returns them.
        src: Where the weights come from, for errors.
        fixed: Settings that must not be other than in training.

    Raises:
        UserError: One of `fixed` is set to another value.
    """
    for key in fixed:
        if (value := settings[key]) is not None and as_pair(value) != as_pair(trained[key]):
            raise UserError(f"--data.{key} {value} does not fit {src}, which takes {trained[key]}")
    return settings | {key: value for key, value in trained.items() if settings.get(key) is None}


def trained_data_settings(description: dict[str, Any]) -> dict[str, Any]:
    """Size, channels, mean and std of the images that weights were trained on, as settings of the data.

    Files of other software may tell the crop of evaluation, too.
    """
    model = description["model"]
    settings = {"image_size": tuple(model["image_size"]), "in_chans": model["in_chans"]}
    return settings | {key: description[key] for key in ("mean", "std", "crop_pct") if key in description}
