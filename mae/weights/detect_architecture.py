"""The architecture of weights that other software wrote: from tensor shapes, recorded settings, or the caller.

Shapes give widths, depths and the patch size. What they cannot give is taken, in this order, from a configuration
beside the file or settings inside it, from the caller's `ArchOverrides`, and from published models of the same width.
"""

import math
import re
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo

from mae.errors import UserError
from mae.models.mae import SIZES, Pair, as_pair, sincos_positions
from mae.models.vit import Pool
from mae.weights.read_file import Opened
from mae.weights.state_dict_keys import DECODER, ENCODER, State
from mae.weights.weights import target_in_words

ENCODER_HEADS = {size.embed_dim: size.num_heads for size in SIZES.values()}  # by width

DECODER_HEADS = {512: 16}  # by width; all published models have this one

SINCOS_TOLERANCE = 5e-3  # positions stored as bfloat16 are off by up to 2e-3


class ArchOverrides(NamedTuple):
    """What a caller states about weights whose file does not record it."""

    num_heads: int | None = None
    decoder_num_heads: int | None = None
    norm_pix_loss: bool | None = None
    grid: Pair | None = None  # rows and columns of patches
    pool: Pool | None = None  # the tokens that a classifier's head takes


NO_OVERRIDES = ArchOverrides()


def recorded_settings(opened: Opened) -> dict[str, Any]:
    """The settings that a configuration, the arguments of a script or the name of an architecture records."""
    config, args = opened.about.get("config") or {}, opened.about.get("args")
    args = args if isinstance(args, dict) else {}
    recorded = settings_by_name(config.get("architecture") or opened.about.get("arch") or args.get("model"))
    recorded |= {key: args[key] for key in ("norm_pix_loss", "mask_ratio") if key in args}
    if "model_type" in config:
        recorded |= transformers_settings(config)
    elif "architecture" in config:
        recorded |= timm_settings(config)
    return {key: value for key, value in recorded.items() if value is not None}


def settings_by_name(name: Any) -> dict[str, Any]:
    """The heads of a published architecture, such as mae_vit_base_patch16."""
    if not isinstance(name, str) or not (match := re.search(r"(?:^|_)(tiny|small|base|large|huge)(?:_|$)", name)):
        return {}
    decoder = {"decoder_num_heads": 16} if name.startswith("mae_vit_") else {}
    return {"num_heads": SIZES[match[1]].num_heads, **decoder}


def transformers_settings(config: dict[str, Any]) -> dict[str, Any]:
    names = {
        "num_heads": "num_attention_heads",
        "decoder_num_heads": "decoder_num_attention_heads",
        "norm_pix_loss": "norm_pix_loss",
        "mask_ratio": "mask_ratio",
        "image_size": "image_size",
        "eps": "layer_norm_eps",
        "activation": "hidden_act",
    }
    settings = {ours: config[theirs] for ours, theirs in names.items() if theirs in config}
    settings["pool"] = "class"
    if labels := config.get("id2label"):
        settings["classes"] = [labels[key] for key in sorted(labels, key=int)]
    processor = config.get("processor", {})
    return settings | {key: processor[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in processor}


def timm_settings(config: dict[str, Any]) -> dict[str, Any]:
    model_args, cfg = config.get("model_args") or {}, config.get("pretrained_cfg") or {}
    settings = {key: cfg[key] for key in ("mean", "std", "license", "crop_pct") if key in cfg}
    for ours, theirs in (("num_heads", "num_heads"), ("image_size", "img_size")):
        if theirs in model_args:
            settings[ours] = model_args[theirs]
    if config.get("global_pool") == "avg":
        settings["pool"] = "mean"
    if cfg.get("label_names"):
        settings["classes"] = cfg["label_names"]
    return settings


class ArchitectureDetector:
    """Derives for weights of other software the description that our own files carry.

    Attributes:
        notes: What had to be assumed, a sentence each.
        target_assumed_from: Why the decoder's target was assumed to be what it is; "" where it is recorded or stated.
    """

    def __init__(self, opened: Opened, state: State, overrides: ArchOverrides) -> None:
        """`state`: the tensors of `opened` under our names."""
        self.opened, self.path = opened, opened.path
        self.state, self.overrides = state, overrides
        self.recorded = recorded_settings(opened)
        self.notes: list[str] = []
        self.target_assumed_from = ""

    def description(self) -> dict[str, Any]:
        """The model's arguments, mask ratio, mean and std; classifier and licence where there is one.

        Raises:
            UserError: Something is recorded nowhere and cannot be assumed, or tensors are missing that must be there.
        """
        recorded = self.recorded
        model = self.model_arguments()
        in_chans = model["in_chans"]
        description: dict[str, Any] = {"model": model, "mask_ratio": recorded.get("mask_ratio", 0.75)}
        for key, imagenet, neutral in (("mean", IMAGENET_DEFAULT_MEAN, 0.0), ("std", IMAGENET_DEFAULT_STD, 1.0)):
            description[key] = list(recorded.get(key) or (imagenet if in_chans == 3 else [neutral] * in_chans))
        if not recorded.get("mean"):
            assumed = "ImageNet's" if in_chans == 3 else "0 and 1"
            self.notes.append(f"the mean and std of its images are not recorded: assumed to be {assumed}")
        if "norm_pix_loss" in model and "mask_ratio" not in recorded:
            self.notes.append("its mask ratio is not recorded: assumed to be 0.75")
        if any(key.startswith(f"{ENCODER}head.") for key in self.state):
            description["classifier"] = self.classifier_settings()
        if licence := self.licence():
            description["licence"] = licence
        return description

    def model_arguments(self) -> dict[str, Any]:
        """The arguments of MaskedAutoencoder; without those of the decoder where there is none."""
        width, in_chans, *patch = self.shape(f"{ENCODER}patch_embed.proj.weight", 4)
        model: dict[str, Any] = {"patch_size": patch, "in_chans": in_chans, "embed_dim": width}
        model["depth"] = self.depth(f"{ENCODER}blocks.")
        model["num_heads"] = self.heads("num_heads", width, ENCODER_HEADS)
        hidden = self.state.get(f"{ENCODER}blocks.0.mlp.fc1.weight")
        model["mlp_ratio"] = 4.0 if hidden is None or hidden.ndim != 2 else hidden.shape[0] / width
        grid = self.grid((patch[0], patch[1]), width)
        model["image_size"] = [grid[0] * patch[0], grid[1] * patch[1]]
        if (activation := self.recorded.get("activation", "gelu")) != "gelu":
            raise UserError(f"{self.path} computes with {activation}; this network supports only gelu")
        if (eps := self.recorded.get("eps", 1e-6)) != 1e-6:
            self.notes.append(f"its norms add {eps:g} to variances, where this network adds 1e-06")
        if not any(key.startswith(DECODER) for key in self.state):
            return model
        width = self.shape("decoder_embed.weight", 2)[0]
        model |= {"decoder_embed_dim": width, "decoder_depth": self.depth("decoder_blocks.")}
        model["decoder_num_heads"] = self.heads("decoder_num_heads", width, DECODER_HEADS)
        model["norm_pix_loss"] = self.norm_pix_loss()
        return model

    def norm_pix_loss(self) -> bool:
        """Whether the decoder predicts normalised patches: recorded, stated, or by the names of published files."""
        recorded: bool | None = self.recorded.get("norm_pix_loss", self.overrides.norm_pix_loss)
        if recorded is not None:
            return recorded
        published = re.match(r"mae_(visualize_vit|pretrain_vit_\w+_full)", self.path.name)
        normalised = not published or "pretrain" in self.path.name
        self.target_assumed_from = "its file's name" if published else "the usual recipe"
        self.notes.append(
            f"what its decoder predicts is not recorded: assumed from {self.target_assumed_from} to be "
            f"{target_in_words(normalised)} (norm_pix_loss {str(normalised).lower()})"
        )
        return normalised

    def shape(self, key: str, dimensions: int) -> list[int]:
        if key not in self.state:
            raise UserError(f"{self.path} lacks {key}, without which its architecture cannot be determined")
        shape = list(self.state[key].shape)
        if len(shape) != dimensions or 0 in shape:
            raise UserError(f"{self.path}: {key} is {tuple(shape)}, but must have {dimensions} dimensions, none empty")
        return shape

    def depth(self, prefix: str) -> int:
        numbers = {int(m[1]) for key in self.state if (m := re.match(rf"{re.escape(prefix)}(\d+)\.", key))}
        if not numbers:
            raise UserError(f"{self.path} lacks {prefix}0: it has no blocks")
        if max(numbers) >= len(self.state):
            raise UserError(
                f"{self.path} names block {max(numbers)}, with {len(self.state)} tensors in all: it is damaged"
            )
        return 1 + max(numbers)

    def heads(self, name: str, width: int, published: dict[int, int]) -> int:
        """The number of attention heads, which no shape shows."""
        heads: int | None = self.recorded.get(name, getattr(self.overrides, name))
        if heads is None:
            if width not in published:
                raise UserError(
                    f"{self.path} does not record how many attention heads go with width {width}: `mae convert` and "
                    f"`mae inspect` take --{name}, mae.load and mae.load_encoder {name}="
                )
            heads = published[width]
            self.notes.append(f"{name} is not recorded: assumed to be {heads}, as in published ViTs of width {width}")
        if heads < 1 or width % heads:
            raise UserError(f"{self.path}: {name} {heads} does not divide its width {width}")
        return heads

    def grid(self, patch: Pair, width: int) -> Pair:
        """Rows and columns of patches: recorded, stated, those whose sin-cos positions are stored, or a square."""
        if f"{ENCODER}reg_token" in self.state:
            raise UserError(f"{self.path} has register tokens (reg_token), which this network does not have")
        rows = self.shape(f"{ENCODER}pos_embed", 3)[1]
        count = rows - 1
        if "image_size" in self.recorded:
            size = as_pair(self.recorded["image_size"])
            grid = size[0] // patch[0], size[1] // patch[1]
            if grid[0] * grid[1] == count:
                return grid
        if (stated := self.overrides.grid) is not None:
            if stated[0] * stated[1] != count or min(stated) < 1:
                raise UserError(f"--grid {stated[0]} {stated[1]}: {self.path} has {count} patches")
            return stated
        positions = self.state[f"{ENCODER}pos_embed"]
        for grid in ((h, count // h) for h in range(1, count + 1) if count % h == 0 and width % 4 == 0):
            if torch.allclose(sincos_positions(width, grid), positions, rtol=0, atol=SINCOS_TOLERANCE):
                return grid
        side = math.isqrt(count)
        if side * side == count:
            return side, side
        no_class_token = math.isqrt(rows) ** 2 == rows
        if no_class_token and f"{ENCODER}cls_token" not in self.state:
            raise UserError(f"{self.path}: {rows} positions leave none for a class token, which this network has")
        raise UserError(
            f"{self.path} has {count} patches, which do not form a square: state --grid ROWS COLUMNS (mae convert)"
            + (", unless its positions leave out the class token, which this network needs" if no_class_token else "")
        )

    def classifier_settings(self) -> dict[str, Any]:
        """classes, pool, head, crop_pct and lora_scale of a classifier."""
        batchnorm = f"{ENCODER}head.1.weight" in self.state
        head = self.state.get(f"{ENCODER}head.1.weight" if batchnorm else f"{ENCODER}head.weight", torch.empty(0))
        norm_after_pool = f"{ENCODER}fc_norm.weight" in self.state
        classes = self.class_names(len(head))
        pool = "mean" if norm_after_pool else self.recorded.get("pool", self.overrides.pool)
        if pool is None:
            pool = "class"
            self.notes.append("its pool is not recorded: its head is assumed to take the class token (pool class)")
        if "crop_pct" not in self.recorded:
            self.notes.append("its crop is not recorded: assumed to be 0.875 of the shorter side")
        return {
            "classes": classes,
            "pool": pool,
            "head": "batchnorm" if batchnorm else "plain" if pool == "mean" and not norm_after_pool else "linear",
            "crop_pct": self.recorded.get("crop_pct", 0.875),
            "lora_scale": 1.0,
        }

    def class_names(self, count: int) -> list[str]:
        classes = self.recorded.get("classes") or []
        info = ImageNetInfo("imagenet-1k")
        if len(classes) == count == 1000 and classes == [info.index_to_description(i) for i in range(count)]:
            return list(info.label_names())  # the names of ImageNet's folders
        if len(classes) != count or classes == [f"LABEL_{i}" for i in range(count)]:
            classes = info.label_names() if count == 1000 else [str(i) for i in range(count)]
            assumed = "ImageNet's" if count == 1000 else f"0 to {count - 1}"
            self.notes.append(f"the names of its {count} classes are not recorded: assumed to be {assumed}")
        return list(classes)

    def licence(self) -> str | None:
        """The recorded or likely licence; None where nothing points to one."""
        if "license" in self.recorded:
            return str(self.recorded["license"])
        if re.match(r"mae_(pretrain|finetuned|visualize)_vit_", self.path.name):
            return "CC BY-NC 4.0"  # the authors of the paper published their weights under these names
        if self.opened.about.get("key") == "model" and not self.opened.optimizer:
            return "not recorded: CC BY-NC 4.0, if the authors of the paper published these weights"
        return None
