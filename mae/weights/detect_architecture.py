"""The architecture of weights that other software wrote: from tensor shapes, recorded settings, or the caller.

Shapes give widths, depths and the patch size. What they cannot give is taken, in this order, from a configuration
beside the file or settings inside it, from the caller's `ArchOverrides`, and from published models of the same width.
"""

import math
import re
from typing import Any, NamedTuple

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from mae.data.crops import official_crop_pct
from mae.errors import UserError
from mae.models.mae import SIZES, Pair, as_pair, sincos_positions
from mae.models.meta_device import meta_parameters
from mae.models.vit import Pool
from mae.weights.claims import check_arguments, check_recorded
from mae.weights.preprocessing import by_timm, by_transformers
from mae.weights.read_file import Opened
from mae.weights.state_dict_keys import DECODER, ENCODER, State
from mae.weights.weights import target_in_words

ENCODER_HEADS = {size.embed_dim: size.num_heads for size in SIZES.values()}  # by width

DECODER_HEADS = {512: 16}  # by width; all published models have this one

TIMM_POOLS: dict[Any, Pool] = {"token": "class", "avg": "mean"}

MOST_PATCHES = 1 << 17  # of an image

SINCOS_TOLERANCE = 5e-3  # positions stored as bfloat16 are off by up to 2e-3


class ArchOverrides(NamedTuple):
    """What a caller states about weights whose file does not record it."""

    num_heads: int | None = None
    decoder_num_heads: int | None = None
    norm_pix_loss: bool | None = None
    grid: Pair | None = None  # rows and columns of patches
    pool: Pool | None = None  # the tokens that a classifier's head takes
    prefix: str | None = None  # of the encoder's tensors, where there are several encoders


NO_OVERRIDES = ArchOverrides()


def recorded_settings(opened: Opened, state: State) -> dict[str, Any]:
    """The settings that a configuration, the arguments of a script or the name of an architecture records."""
    config, args = opened.about.get("config") or {}, script_arguments(opened)
    recorded = settings_by_name(config.get("architecture") or opened.about.get("arch") or args.get("model"))
    recorded |= {key: args[key] for key in ("norm_pix_loss", "mask_ratio") if key in args}
    if isinstance(pool := args.get("global_pool"), bool):  # the official fine-tuning and probe
        recorded["pool"] = "mean" if pool else "class"
        size = args.get("input_size") or 224  # of the probe always 224
        recorded["crop_pct"] = official_crop_pct((size, size))
    more: dict[str, Any] = {}
    if "architecture" in config:
        more = timm_settings(config, opened, state)
    elif "model_type" in config:
        more = transformers_settings(config)
    elif "gp" in args and opened.about.get("arch"):  # timm's training script
        arguments = {**(args.get("model_kwargs") or {}), **({"global_pool": args["gp"]} if args["gp"] else {})}
        more = timm_settings({"architecture": opened.about["arch"], "model_args": arguments}, opened, state)
        more |= {key: args.get(key) for key in ("mean", "std", "crop_pct")}
    recorded |= {key: value for key, value in more.items() if value is not None}
    recorded |= opened.about.get("recorded") or {}
    recorded = {key: value for key, value in recorded.items() if value is not None}
    check_recorded(recorded)
    return recorded


def script_arguments(opened: Opened) -> dict[str, Any]:
    """The arguments of the script that wrote the file; empty where it holds none."""
    args = opened.about.get("args")
    return args if isinstance(args, dict) else {}


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
    return settings


def timm_settings(config: dict[str, Any], opened: Opened, state: State) -> dict[str, Any]:
    """What timm builds from a configuration, where it is of these tensors' size; else what the configuration says.

    Raises:
        UserError: It is a network that this one cannot stand for.
    """
    model_args, cfg = config.get("model_args") or {}, config.get("pretrained_cfg") or {}
    settings: dict[str, Any] = {"license": cfg.get("license")}
    settings |= {ours: model_args.get(theirs) for ours, theirs in (("num_heads",) * 2, ("image_size", "img_size"))}
    labels = config.get("label_names") or cfg.get("label_names")
    settings["classes"] = [labels[key] for key in sorted(labels, key=int)] if isinstance(labels, dict) else labels
    pool, norm_after_pool = model_args.get("global_pool", config.get("global_pool")), model_args.get("fc_norm")
    stem = state.get(f"{ENCODER}patch_embed.proj.weight", torch.empty(0))
    arguments = {"num_classes": config.get("num_classes", 1000), **model_args}
    check_arguments(arguments, len(state))
    network = timm_network(config["architecture"], arguments)
    if network is not None and (other := other_than_here(network)):
        raise UserError(f"{opened.path}: timm's {config['architecture']} {other}, other than this network")
    if isinstance(network, VisionTransformer) and network.embed_dim == len(stem):
        block: Any = network.blocks[0]
        settings |= {"num_heads": block.attn.num_heads, "image_size": network.patch_embed.img_size}
        settings |= {"eps": block.norm1.eps}
        pool, norm_after_pool = network.global_pool, not isinstance(network.fc_norm, nn.Identity)
    if f"{ENCODER}head.weight" in state and pool not in (None, *TIMM_POOLS):
        raise UserError(f"{opened.path}: its global_pool is {pool!r}; this network pools by 'avg' or 'token'")
    return settings | {"pool": TIMM_POOLS.get(pool), "norm_after_pool": norm_after_pool}


def timm_network(name: Any, arguments: dict[str, Any]) -> nn.Module | None:
    """What timm builds by this name, without values; None where it knows no such name."""
    if not isinstance(name, str) or not timm.is_model(name):
        return None
    try:
        with meta_parameters():
            return timm.create_model(name, **arguments)
    except Exception as error:  # whatever timm raises on arguments that do not go
        raise ValueError(f"timm builds no {name} with {arguments}: {error}") from None


def other_than_here(network: nn.Module) -> str | None:
    """What a network of timm's computes otherwise than the one here, where no tensor shows it; None: nothing."""
    if not isinstance(network, VisionTransformer):
        return f"is of the kind {type(network).__name__}"
    block: Any = network.blocks[0]
    activation = getattr(getattr(block, "mlp", None), "act", None)
    if type(block) is not Block:
        return f"has blocks of the kind {type(block).__name__}"
    if type(activation).__name__ != "GELU" or getattr(activation, "approximate", "none") != "none":
        return f"computes with {activation}"
    if network.global_pool == "avg" and getattr(network, "pool_include_prefix", False):
        return "averages the class token, too (pool_include_prefix)"
    return None


class ArchitectureDetector:
    """Derives for weights of other software the description that our own files carry.

    Attributes:
        notes: What had to be assumed, a sentence each.
        target_assumed_from: Why the decoder's target was assumed to be what it is; "" where it is recorded or stated.
    """

    def __init__(self, opened: Opened, state: State, overrides: ArchOverrides) -> None:
        """`state`: the tensors of `opened` under our names."""
        self.opened, self.path = opened, opened.path
        self.overrides = overrides
        self.recorded = recorded_settings(opened, state)
        if self.recorded.get("norm_after_pool") and self.recorded.get("pool") == "class":
            # Of the class token alone, a norm after the pool is the same as one before it.
            state = {key.replace(f"{ENCODER}fc_norm.", f"{ENCODER}norm."): value for key, value in state.items()}
        self.state = state
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
        self.read_preprocessing(as_pair(model["image_size"]), in_chans)
        if recorded.get("mask_ratio") == 0:
            self.notes.append("its mask_ratio is 0, as for features: where patches are hidden, it is 0.75")
        ratio = recorded.get("mask_ratio") or 0.75
        description: dict[str, Any] = {"model": model, "mask_ratio": ratio}
        for key, imagenet, neutral in (("mean", IMAGENET_DEFAULT_MEAN, 0.0), ("std", IMAGENET_DEFAULT_STD, 1.0)):
            description[key] = list(recorded.get(key) or (imagenet if in_chans == 3 else [neutral] * in_chans))
        if not recorded.get("mean"):
            assumed = "ImageNet's" if in_chans == 3 else "0 and 1"
            self.notes.append(f"the mean and std of its images are not recorded: assumed to be {assumed}")
        if "norm_pix_loss" in model and "mask_ratio" not in recorded:
            self.notes.append("its mask ratio is not recorded: assumed to be 0.75")
        if any(key.startswith(f"{ENCODER}head.") for key in self.state):
            description["classifier"] = self.classifier_settings(model["image_size"])
        elif "crop_pct" in recorded:
            description["crop_pct"] = recorded["crop_pct"]
        if licence := self.licence():
            description["licence"] = licence
        return description

    def read_preprocessing(self, image_size: Pair, in_chans: int) -> None:
        """Add to what is recorded what a configuration says of mean, std and crop, and note what is not followed."""
        config = self.opened.about.get("config") or {}
        if "architecture" in config:
            told = by_timm(config.get("pretrained_cfg") or {}, image_size)
        else:
            told = by_transformers(config.get("processor") or {}, image_size, in_chans)
        check_recorded(told.settings)
        self.recorded |= told.settings
        self.notes += told.notes

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
        one, rows, columns = self.shape(f"{ENCODER}pos_embed", 3)
        count = rows - 1
        if (one, columns) != (1, width) or not 0 < count <= MOST_PATCHES:
            raise UserError(
                f"{self.path}: {ENCODER}pos_embed is {(one, rows, columns)}, wanted (1, 1 + patches, {width}), with "
                f"{MOST_PATCHES:,} patches at most"
            )
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

    def classifier_settings(self, image_size: Pair) -> dict[str, Any]:
        """classes, pool, head, crop_pct and lora_scale of a classifier."""
        batchnorm = f"{ENCODER}head.1.weight" in self.state
        head = self.state.get(f"{ENCODER}head.1.weight" if batchnorm else f"{ENCODER}head.weight", torch.empty(0))
        norm_after_pool = f"{ENCODER}fc_norm.weight" in self.state
        classes = self.class_names(len(head))
        pool = "mean" if norm_after_pool else self.recorded.get("pool", self.overrides.pool)
        if pool is None:
            pool = "class"
            self.notes.append("its pool is not recorded: its head is assumed to take the class token (pool class)")
        crop_pct = self.recorded.get("crop_pct", official_crop_pct(image_size))
        if "crop_pct" not in self.recorded:
            self.notes.append(
                f"its crop is not recorded: assumed to be {crop_pct:g} of the shorter side, as in the official code"
            )
        return {
            "classes": classes,
            "pool": pool,
            "head": "batchnorm" if batchnorm else "plain" if pool == "mean" and not norm_after_pool else "linear",
            "crop_pct": crop_pct,
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
