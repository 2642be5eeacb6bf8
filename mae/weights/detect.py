"""What the weights in a file are: whose format, an encoder, an autoencoder or a classifier, of which architecture.

All by content: names tell the format, shapes the architecture. What they cannot tell stands in a configuration beside
them, follows from the width as with the published models, or is asked for.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from torch import Tensor

from mae.errors import UserError
from mae.models.mae import SIZES, MaskedAutoencoder, Pair, as_pair, sincos_positions
from mae.models.vit import Pool, Unallocated
from mae.weights.read_file import Opened, open_weights
from mae.weights.state_dict_keys import DECODER, ENCODER, Dialect, State, dialect_of, to_ours
from mae.weights.weights import Format, Weights, folded_head

HEADS = {size.embed_dim: size.num_heads for size in SIZES.values()}

DECODER_HEADS = {512: 16}  # of all published models

UNUSED = (f"{ENCODER}head_drop", "vit.pooler.", "pooler.", "vit.embeddings.mask_token")  # of Hugging Face's encoders

NAMED = 3  # tensors, in an error

SIZES_OF = ("image_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")  # an encoder

SINCOS_TOLERANCE = 5e-3  # positions stored as bfloat16 are off by up to 2e-3


class ArchOverrides(NamedTuple):
    """What a caller says of weights whose file does not."""

    num_heads: int | None = None
    decoder_num_heads: int | None = None
    norm_pix_loss: bool | None = None
    grid: Pair | None = None  # rows and columns of patches
    pool: Pool | None = None  # what a classifier judges by


NO_OVERRIDES = ArchOverrides()


def overrides_from(config: Namespace) -> ArchOverrides:
    """What these options say."""
    grid = None if config.grid is None else (config.grid[0], config.grid[1])
    return ArchOverrides(config.num_heads, config.decoder_num_heads, config.norm_pix_loss, grid, config.pool)


def examine(src: str | Path, told: ArchOverrides = NO_OVERRIDES) -> Weights:
    """What SRC holds; `problems` says why it cannot be used, if so.

    Args:
        src: A run folder, .ckpt or .safetensors file of this project; an official .pth, a checkpoint of the official
            scripts; a state dict of timm; a folder that transformers has saved. Prefixes of wrappers do not matter.
        told: What the file does not say; it may say the same.

    Raises:
        UserError: It cannot be read, is none of these, or something must be told.
    """
    return recognised(open_weights(src), told)


def recognised(opened: Opened, told: ArchOverrides) -> Weights:
    """`examine`, of a file that has been opened."""
    state, description = opened.state, opened.description
    if description is not None and opened.about.get("key") == "state_dict":
        weights = complete(Weights(opened.path, floats(state_of_run(state, description)), description))
    else:
        weights = complete(by_names(opened, told))
    refuse_other(weights, told)
    return weights


def by_names(opened: Opened, told: ArchOverrides) -> Weights:
    """Of all files but a run's own checkpoints."""
    state, description = opened.state, opened.description
    dialect = dialect_of(state)
    if dialect is None:
        raise UserError(
            f"{opened.path} holds no ViT that is known here: its tensors are {', '.join(list(state)[:NAMED])}, ...; "
            "wanted are the names of this project, of the official code, of timm or of transformers' ViTMAE"
        )
    if whole := [key for key, v in state.items() if not v.is_floating_point() and not key.endswith("batches_tracked")]:
        raise UserError(
            f"{opened.path}: {whole[0]} is {state[whole[0]].dtype}, where floating-point numbers are wanted"
        )
    state, left_out = used(floats(to_ours(state, dialect)))
    notes = [*opened.notes, *left_out, *stored(opened.state)]
    if description is None and f"{ENCODER}fc_norm.weight" in state and f"{ENCODER}head.1.weight" in state:
        state = folded_head(state)
        notes.append("a probe of the mean of tokens: its BatchNorm is folded into the linear layer")
    if description is None:
        try:
            description = described(opened, state, told, notes)
        except UserError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{opened.path}: the settings that are stored with it cannot be used ({type(error).__name__}: {error})"
            ) from None
    return Weights(opened.path, state, description, format_of(opened, dialect), tuple(notes))


def refuse_other(weights: Weights, told: ArchOverrides) -> None:
    """What a caller says must not be other than what is found.

    Raises:
        UserError: It is.
    """
    for key, value in told._asdict().items():
        found = weights.grid if key == "grid" else weights.config.get(key)
        if key == "pool":
            found = weights.classifier and weights.classifier["pool"]
        if value is not None and found is not None and value != found:  # None: of a decoder, which is not there
            raise UserError(f"{key} {value}: {weights.source} has {found}")


def read(src: str | Path, told: ArchOverrides = NO_OVERRIDES) -> Weights:
    """`examine`, for those who want to use the weights.

    Raises:
        UserError: They cannot be used, too.
    """
    weights = examine(src, told)
    problems = list(weights.problems)
    problems += [f"{key} has numbers that are not finite" for key, v in weights.state.items() if non_finite(v)]
    if problems:
        raise UserError(f"{weights.source} cannot be used: {'; '.join(problems[:NAMED])}; `mae inspect` tells more")
    return weights


def floats(state: State) -> State:
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def stored(state: State) -> list[str]:
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point()})
    return [] if kinds in ([], ["float32"]) else [f"stored as {' and '.join(kinds)}, used as float32"]


def used(state: State) -> tuple[State, list[str]]:
    """Without tensors that are neither encoder's, decoder's nor head's, and known to be so."""
    unused = [key for key in state if key.startswith(UNUSED)]
    kept = {key: value for key, value in state.items() if key not in unused}
    return kept, [f"not used: {', '.join(unused[:NAMED])}"] if unused else []


def format_of(opened: Opened, dialect: Dialect) -> Format:
    """timm's names are the official ones of an encoder: then the dictionary around them tells."""
    if "architecture" in opened.about.get("config", {}):
        return "timm"
    if dialect == "official" and opened.about.get("key") != "model":
        whole = any(key.startswith(DECODER) for key in opened.state)
        return "mae" if opened.description else "official" if whole else "timm"
    return dialect


# ---- our own checkpoints ---------------------------------------------------------------------------------------------


def state_of_run(state: State, description: dict[str, Any]) -> State:
    """From a run's .ckpt: of a classifier the averaged weights where there are any, with adapters merged."""
    averaged = {key.removeprefix("ema.module."): value for key, value in state.items() if key.startswith("ema.module.")}
    if "classifier" not in description:
        return averaged or state
    merged = merge_lora(averaged or state, description["classifier"]["lora_scale"])
    return {ENCODER + key: value for key, value in merged.items()}


def merge_lora(state: State, scale: float) -> State:
    """Low-rank adapters, as peft names them, added to the weights that they adapt; other states come back as they are.

    Args:
        scale: lora_alpha / rank.
    """
    merged = {}
    for key, value in state.items():
        if ".lora_" in key:
            continue
        if key.endswith(".base_layer.weight"):
            layer = key.removesuffix(".base_layer.weight")
            down, up = state[f"{layer}.lora_A.default.weight"], state[f"{layer}.lora_B.default.weight"]
            value = value + scale * up @ down
        merged[key.replace(".base_layer.", ".")] = value
    return merged


# ---- the architecture of others' -------------------------------------------------------------------------------------


def described(opened: Opened, state: State, told: ArchOverrides, notes: list[str]) -> dict[str, Any]:
    """What our own files say of themselves, found out for another's; `notes` grows by what had to be assumed."""
    hints = hints_of(opened)
    model = architecture(opened.path, state, hints, told, notes)
    description: dict[str, Any] = {"model": model, "mask_ratio": hints.get("mask_ratio", 0.75)}
    for key, usual, neutral in (("mean", IMAGENET_DEFAULT_MEAN, 0.0), ("std", IMAGENET_DEFAULT_STD, 1.0)):
        description[key] = list(hints.get(key) or (usual if model["in_chans"] == 3 else [neutral] * model["in_chans"]))
    if not hints.get("mean"):
        what = "ImageNet's" if model["in_chans"] == 3 else "0 and 1"
        notes.append(f"mean and std of its images are not told: taken to be {what}")
    if "norm_pix_loss" in model and "mask_ratio" not in hints:
        notes.append("its mask ratio is not told: taken to be 0.75")
    if any(key.startswith(f"{ENCODER}head.") for key in state):
        description["classifier"] = classifier(state, hints, told, notes)
    if licence := licence_of(opened, hints):
        description["licence"] = licence
    return description


def hints_of(opened: Opened) -> dict[str, Any]:
    """What a configuration, the settings of a script or the name of an architecture says."""
    hints: dict[str, Any] = {}
    config, args = opened.about.get("config") or {}, opened.about.get("args")
    args = args if isinstance(args, dict) else {}
    name = config.get("architecture") or opened.about.get("arch") or args.get("model")
    if isinstance(name, str) and (match := re.search(r"(?:^|_)(tiny|small|base|large|huge)(?:_|$)", name)):
        hints["num_heads"] = SIZES[match[1]].num_heads
        if name.startswith("mae_vit_"):
            hints["decoder_num_heads"] = 16
    for key in ("norm_pix_loss", "mask_ratio"):
        if key in args:
            hints[key] = args[key]
    if "model_type" in config:  # transformers
        theirs = {
            "num_heads": "num_attention_heads",
            "decoder_num_heads": "decoder_num_attention_heads",
            "norm_pix_loss": "norm_pix_loss",
            "mask_ratio": "mask_ratio",
            "image_size": "image_size",
            "eps": "layer_norm_eps",
            "activation": "hidden_act",
        }
        hints |= {ours: config[key] for ours, key in theirs.items() if key in config}
        hints["pool"] = "class"
        if labels := config.get("id2label"):
            hints["classes"] = [labels[key] for key in sorted(labels, key=int)]
        processor = config.get("processor", {})
        hints |= {key: processor[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in processor}
    elif "architecture" in config:  # timm
        model_args, cfg = config.get("model_args") or {}, config.get("pretrained_cfg") or {}
        hints |= {key: model_args[key] for key in ("num_heads",) if key in model_args}
        if config.get("global_pool") == "avg":
            hints["pool"] = "mean"
        if "img_size" in model_args:
            hints["image_size"] = model_args["img_size"]
        hints |= {key: cfg[key] for key in ("mean", "std", "license", "crop_pct") if key in cfg}
        if cfg.get("label_names"):
            hints["classes"] = cfg["label_names"]
    if hints.get("norm_pix_loss") is None and re.match(r"mae_(visualize_vit|pretrain_vit_\w+_full)", opened.path.name):
        hints["named_target"] = "pretrain" in opened.path.name
    return {key: value for key, value in hints.items() if value is not None}


def architecture(
    path: Path, state: State, hints: dict[str, Any], told: ArchOverrides, notes: list[str]
) -> dict[str, Any]:
    """Arguments of MaskedAutoencoder, from shapes."""
    projection = shape(path, state, f"{ENCODER}patch_embed.proj.weight", 4)
    width, in_chans, patch = projection[0], projection[1], (projection[2], projection[3])
    model: dict[str, Any] = {"patch_size": list(patch), "in_chans": in_chans, "embed_dim": width}
    model |= {"depth": depth(path, state, f"{ENCODER}blocks.")}
    model["num_heads"] = heads(path, "num_heads", width, hints, told.num_heads, HEADS, notes)
    model["mlp_ratio"] = ratio(state, f"{ENCODER}blocks.0.mlp.fc1.weight", width)
    grid = grid_of(path, state, patch, hints, told, width, notes)
    model["image_size"] = [grid[0] * patch[0], grid[1] * patch[1]]
    if hints.get("activation", "gelu") != "gelu":
        raise UserError(f"{path} computes with {hints['activation']}; this network has gelu alone")
    if hints.get("eps", 1e-6) != 1e-6:
        notes.append(f"its norms add {hints['eps']:g} to variances, where this network adds 1e-06")
    if not any(key.startswith(DECODER) for key in state):
        return model
    decoder_width = shape(path, state, "decoder_embed.weight", 2)[0]
    named, given = "decoder_num_heads", told.decoder_num_heads
    model |= {"decoder_embed_dim": decoder_width, "decoder_depth": depth(path, state, "decoder_blocks.")}
    model[named] = heads(path, named, decoder_width, hints, given, DECODER_HEADS, notes)
    target = hints.get("norm_pix_loss", told.norm_pix_loss)
    if target is None:
        target = hints.get("named_target", True)
        by = "by its file's name it is" if "named_target" in hints else "taken to be"
        what = "pixels normalised within each patch" if target else "plain pixels"
        notes.append(f"what its decoder predicts is not told: {by} {what} (norm_pix_loss {str(target).lower()})")
    model["norm_pix_loss"] = target
    return model


def shape(path: Path, state: State, key: str, dimensions: int) -> list[int]:
    if key not in state:
        raise UserError(f"{path} lacks {key}: without it the architecture cannot be told")
    found = list(state[key].shape)
    if len(found) != dimensions or 0 in found:
        raise UserError(f"{path}: {key} is {tuple(found)}; wanted are {dimensions} dimensions")
    return found


def depth(path: Path, state: State, prefix: str) -> int:
    numbers = {int(m[1]) for key in state if (m := re.match(rf"{re.escape(prefix)}(\d+)\.", key))}
    if not numbers:
        raise UserError(f"{path} lacks {prefix}0: it has no blocks")
    if max(numbers) >= len(state):
        raise UserError(f"{path} names block {max(numbers)}, with {len(state)} tensors in all: it is damaged")
    return 1 + max(numbers)


def ratio(state: State, key: str, width: int) -> float:
    return state[key].shape[0] / width if key in state and state[key].ndim == 2 else 4.0


def heads(
    path: Path, name: str, width: int, hints: dict[str, Any], told: int | None, usual: dict[int, int], notes: list[str]
) -> int:
    """Attention heads, which no shape tells."""
    found: int | None = hints.get(name, told)
    if found is None:
        if width not in usual:
            raise UserError(
                f"{path} does not tell how many attention heads go with width {width}: `mae convert` and `mae inspect` "
                f"take --{name}, mae.load and mae.load_encoder {name}="
            )
        found = usual[width]
        notes.append(f"{name} is not told: taken to be {found}, as of ViTs of width {width}")
    if found < 1 or width % found:
        raise UserError(f"{path}: {name} {found} does not divide its width {width}")
    return found


def grid_of(
    path: Path, state: State, patch: Pair, hints: dict[str, Any], told: ArchOverrides, width: int, notes: list[str]
) -> Pair:
    """Rows and columns: told, or those whose sin-cos positions these are, or a square."""
    if f"{ENCODER}reg_token" in state:
        raise UserError(f"{path} has register tokens (reg_token), which this network has not")
    rows = shape(path, state, f"{ENCODER}pos_embed", 3)[1]
    count = rows - 1
    if "image_size" in hints:
        height, width_ = as_pair(hints["image_size"])
        found = height // patch[0], width_ // patch[1]
        if found[0] * found[1] == count:
            return found
    if told.grid is not None:
        if told.grid[0] * told.grid[1] != count or min(told.grid) < 1:
            raise UserError(f"--grid {told.grid[0]} {told.grid[1]}: {path} has {count} patches")
        return told.grid
    if width % 4 == 0:
        for height in (h for h in range(1, count + 1) if count % h == 0):
            grid = height, count // height
            positions = state[f"{ENCODER}pos_embed"]
            if torch.allclose(sincos_positions(width, grid), positions, rtol=0, atol=SINCOS_TOLERANCE):
                return grid
    side = math.isqrt(count)
    if math.isqrt(rows) ** 2 == rows and side * side != count and f"{ENCODER}cls_token" not in state:
        raise UserError(f"{path}: {rows} positions leave none for a class token, which this network has")
    if side * side != count:
        other = ", or its positions leave out the class token, which this network's do not"
        raise UserError(
            f"{path} has {count} patches, which is no square: tell --grid ROWS COLUMNS (mae convert)"
            + (other if math.isqrt(rows) ** 2 == rows else "")
        )
    return side, side


def classifier(state: State, hints: dict[str, Any], told: ArchOverrides, notes: list[str]) -> dict[str, Any]:
    """classes, pool and head of a classifier."""
    batchnorm = f"{ENCODER}head.1.weight" in state
    head = state.get(f"{ENCODER}head.1.weight" if batchnorm else f"{ENCODER}head.weight", torch.empty(0))
    count = len(head)
    classes = hints.get("classes") or []
    info = ImageNetInfo("imagenet-1k")
    if len(classes) == count == 1000 and classes == [info.index_to_description(i) for i in range(count)]:
        classes = info.label_names()  # the folders of the data set
    if len(classes) != count or classes == [f"LABEL_{i}" for i in range(count)]:
        classes = info.label_names() if count == 1000 else [str(i) for i in range(count)]
        what = "ImageNet's" if count == 1000 else f"0 to {count - 1}"
        notes.append(f"the names of its {count} classes are not told: taken to be {what}")
    after = f"{ENCODER}fc_norm.weight" in state  # the norm comes after the pool
    pool = "mean" if after else hints.get("pool", told.pool)
    if pool is None:
        pool = "class"
        notes.append("what it judges by is not told: taken to be the class token (pool class)")
    if "crop_pct" not in hints:
        notes.append("its crop is not told: taken to be 0.875 of the shorter side")
    return {
        "classes": list(classes),
        "pool": pool,
        "head": "batchnorm" if batchnorm else "plain" if pool == "mean" and not after else "linear",
        "crop_pct": hints.get("crop_pct", 0.875),
        "lora_scale": 1.0,
    }


def licence_of(opened: Opened, hints: dict[str, Any]) -> str | None:
    """Known or likely, of weights that are not this project's."""
    if "license" in hints:
        return str(hints["license"])
    if re.match(r"mae_(pretrain|finetuned|visualize)_vit_", opened.path.name):
        return "CC BY-NC 4.0"  # of those that the authors of the paper published under these names
    if opened.about.get("key") == "model" and not opened.optimizer:
        return "not told: CC BY-NC 4.0, if the authors of the paper published these weights"
    return None


# ---- is it all there? ------------------------------------------------------------------------------------------------


def complete(weights: Weights) -> Weights:
    """With what is missing, unknown or of another shape among the problems."""
    try:
        sound(weights)
        wanted = shapes(weights)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{weights.source} does not fit its own description: {error}") from None
    state = weights.state
    missing = [key for key in wanted if key not in state]
    extra = [key for key in state if key not in wanted]
    wrong = [key for key in wanted if key in state and tuple(state[key].shape) != wanted[key]]
    problems = list(weights.problems)
    for what, keys in (("lacks", missing), ("holds unknown tensors:", extra)):
        if keys:
            problems.append(f"it {what} {named(keys)}")
    problems += [f"{key} is {tuple(state[key].shape)}, wanted {wanted[key]}" for key in wrong[:NAMED]]
    return weights._replace(problems=tuple(problems))


def named(keys: Sequence[str]) -> str:
    """The first few, and how many there are besides."""
    return ", ".join(keys[:NAMED]) + (f" and {len(keys) - NAMED} more" if len(keys) > NAMED else "")


def shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """Of every tensor that weights of this description have."""
    with Unallocated():
        model = MaskedAutoencoder(**weights.config)
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    about, width = weights.classifier, model.encoder.embed_dim
    if about is None and any(key.startswith(DECODER) for key in weights.state):
        return found
    found = {key: value for key, value in found.items() if key.startswith(ENCODER)}
    if about is None:
        return found
    classes, batchnorm = len(about["classes"]), about["head"] == "batchnorm"
    if about["pool"] == "mean" and about["head"] == "linear":
        for part in ("weight", "bias"):
            found[f"{ENCODER}fc_norm.{part}"] = found.pop(f"{ENCODER}norm.{part}")
    if batchnorm:
        found |= {f"{ENCODER}head.0.running_{key}": (width,) for key in ("mean", "var")}
        found[f"{ENCODER}head.0.num_batches_tracked"] = ()
    linear = f"{ENCODER}head.1" if batchnorm else f"{ENCODER}head"
    return found | {f"{linear}.weight": (classes, width), f"{linear}.bias": (classes,)}


def sound(weights: Weights) -> None:
    """Of what a configuration may say and no tensor shows.

    Raises:
        ValueError: Nothing can be computed with it.
    """
    model, description = weights.config, weights.description
    if absent := [key for key in SIZES_OF if key not in model]:
        raise ValueError(f"{absent[0]} is missing")
    for key in ("mean", "std"):
        values = description.get(key, [0.5] * model["in_chans"])
        if len(values) != model["in_chans"] or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            raise ValueError(f"{key} is {values}, its images have {model['in_chans']} channels")
    if not 0 < (ratio := description.get("mask_ratio", 0.75)) < 1:
        raise ValueError(f"mask_ratio is {ratio}")
    if not isinstance(target := model.get("norm_pix_loss", True), bool):
        raise ValueError(f"norm_pix_loss is {target!r}")


def non_finite(tensor: Tensor) -> int:
    """How many of its numbers are NaN or infinite."""
    return int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
