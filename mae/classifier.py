"""Classifiers: timm's VisionTransformer, its encoder pre-trained or random, and which parts of it are trained."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae import checkpoint
from mae.blocks import Block, CheckpointedBlock
from mae.errors import UserError
from mae.model import SIZES, Pair, as_pair, init_linear, init_stem
from mae.weights import Pool, Unallocated, Weights, resample_positions

Head = Literal["linear", "batchnorm", "plain"]
ENCODER_KEYS = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
POOLING = {"mean": "avg", "class": "token"}  # timm's names


class LayeredViT(VisionTransformer):
    """timm's, with the final norm in the top layer of layer decay, as the reference has it; timm's is a layer lower."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stem: dict[str, Any] = super().group_matcher(coarse)
        return {"stem": stem["stem"], "blocks": [(r"^blocks\.(\d+)", None)]}


class Classifier(NamedTuple):
    """A trained classifier, to be used."""

    network: VisionTransformer  # (B, C, H, W) normalised -> logits (B, classes); eval mode
    classes: list[str]
    description: dict[str, Any]  # model: the encoder's sizes; mean, std, classifier: pool, crop_pct, ...


def build(
    config: dict[str, Any],
    num_classes: int,
    pool: Pool,
    head: Head,
    drop_path: float = 0.0,
    activation_checkpointing: bool = False,
) -> VisionTransformer:
    """A timm VisionTransformer with the reference's initialisation.

    Args:
        config: The encoder: image_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio.
        pool: "mean": of the patch tokens; "class": the class token.
        head: "linear": for fine-tuning; by mean pooling the norm comes after the pool (fc_norm), and the encoder's own
            is dropped (Sec. A.1). "batchnorm": for the linear probe, BatchNorm without affine before the linear layer,
            on features after the encoder's own norm (Sec. A.1, Table 10). "plain": such a probe with its BatchNorm
            folded into the linear layer.
        drop_path: Stochastic depth of the last block; it rises linearly from 0 at the first.
        activation_checkpointing: In training, compute the blocks' activations twice instead of keeping them.
    """
    network = LayeredViT(
        img_size=as_pair(config["image_size"]),
        patch_size=as_pair(config["patch_size"]),  # type: ignore[arg-type]  # a pair is fine
        in_chans=config["in_chans"],
        num_classes=num_classes,
        global_pool=POOLING[pool],  # type: ignore[arg-type]
        fc_norm=pool == "mean" and head == "linear",
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        drop_path_rate=drop_path,
        block_fn=CheckpointedBlock if activation_checkpointing else Block,
    )
    init_linear(network)
    init_stem(network, network.patch_embed.grid_size)
    linear = network.head
    assert isinstance(linear, nn.Linear)
    nn.init.trunc_normal_(linear.weight, std=0.01 if head == "batchnorm" else 2e-5)
    if head == "batchnorm":
        norm = nn.BatchNorm1d(network.embed_dim, affine=False, eps=1e-6)
        network.head = nn.Sequential(norm, linear)  # type: ignore[assignment]
    return network


def encoder_config(
    weights: Weights | None,
    image_size: int | Pair,
    in_chans: int,
    size: str | None,
    own: dict[str, Any],
) -> dict[str, Any]:
    """The sizes of an encoder: those of `weights`, which settings may repeat but not change, or those of the settings.

    Args:
        own: patch_size, embed_dim, depth, num_heads; None where the size's own or the weights' count.

    Raises:
        UserError: A setting and the weights differ; both are named.
    """
    if size is not None and size not in SIZES:
        raise UserError(f"--model.size {size!r} is none of {', '.join(SIZES)}")
    given: dict[str, Any] = {} if size is None else SIZES[size]._asdict()
    given |= {"in_chans": in_chans} | {key: value for key, value in own.items() if value is not None}
    if "patch_size" in given:
        given["patch_size"] = list(as_pair(given["patch_size"]))
    if weights is None:
        default = {"patch_size": [16, 16], "mlp_ratio": 4.0, **SIZES["base"]._asdict()}
        config = default | given
    else:
        config = {key: weights.config[key] for key in ENCODER_KEYS}
        for key, value in given.items():
            if config[key] != value:
                setting = (
                    "data.in_chans" if key == "in_chans" else "model." + (key if own.get(key) is not None else "size")
                )
                what = f"{value}" if setting.endswith(key) else f"{key} {value}"
                raise UserError(f"--{setting}: {what} does not fit {weights.source}, which has {config[key]}")
    if config["num_heads"] < 1 or config["embed_dim"] % config["num_heads"] or config["embed_dim"] % 4:
        raise UserError(
            f"--model.embed_dim {config['embed_dim']} is not divisible by 4 and by --model.num_heads "
            f"{config['num_heads']}"
        )
    if min(config["depth"], *config["patch_size"]) < 1:
        raise UserError(f"--model.depth {config['depth']}, patch_size {config['patch_size']}: at least 1")
    height, width = as_pair(image_size)
    ph, pw = config["patch_size"]
    if height % ph or width % pw:
        raise UserError(f"--data.image_size {height}x{width} is not divisible by the encoder's patch size {ph}x{pw}")
    return {"image_size": [height, width], **config}


def load_pretrained(network: VisionTransformer, weights: Weights) -> str:
    """Copy an encoder into a classifier, all but its head; returns what was done, in words.

    Raises:
        UserError: A tensor is missing, extra or of another shape.
    """
    state = {key: v for key, v in weights.timm_state.items() if not key.startswith(("head.", "fc_norm."))}
    said = [f"encoder {weights.source}"]
    assert network.pos_embed is not None
    old, new = weights.grid, network.patch_embed.grid_size
    if old != new:
        state["pos_embed"] = resample_positions(state["pos_embed"], old, new)
        said.append(f"positions resampled from {old[0]}x{old[1]} to {new[0]}x{new[1]}")
    own = network.state_dict()
    for key in [key for key in state if key.startswith("norm.") and key not in own]:
        del state[key]  # mean pooling has its own norm after the pool
    may_miss = ("head.", "fc_norm.", *(["norm."] if weights.classifier else []))
    missing = [key for key in own if key not in state and not key.startswith(may_miss)]
    wrong = [key for key in state if key not in own or own[key].shape != state[key].shape]
    if missing or wrong:
        raise UserError(f"{weights.source} does not fit this network: {', '.join((missing + wrong)[:3])}")
    network.load_state_dict(state, strict=False)
    if weights.classifier:
        said.append("which was trained with labels")
    return ", ".join(said)


def train_last(network: VisionTransformer, blocks: float) -> None:
    """Freeze all but the last `blocks` blocks, the norm after them and the head (partial fine-tuning, Fig. 9).

    Half a block is its MLP with the norm before it. A frozen branch is not dropped, either.

    Raises:
        UserError: Not a multiple of 0.5 from 0 to the encoder's depth.
    """
    depth = len(network.blocks)
    if not 0 <= blocks <= depth or (2 * blocks) % 1:
        raise UserError(f"--model.blocks {blocks}: wanted is 0, 0.5, 1, ... up to the {depth} blocks of this encoder")
    network.requires_grad_(False)
    for part in (network.norm, network.fc_norm, network.head):
        part.requires_grad_(True)
    whole = int(blocks)
    for i, block in enumerate(network.blocks):
        above = depth - i  # blocks from this one to the top
        if above <= whole:
            block.requires_grad_(True)
        elif above - whole == 1 and blocks > whole:
            for part in (block.norm2, block.mlp):
                part.requires_grad_(True)
            block.drop_path1 = nn.Identity()
        else:
            block.drop_path1 = block.drop_path2 = nn.Identity()


def add_lora(network: VisionTransformer, rank: int, alpha: float) -> None:
    """Freeze all but head and final norm, and train low-rank updates of every attention's qkv and proj (peft's LoRA).

    Raises:
        UserError: The package peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("--model.lora_rank needs the package peft: pip install peft") from None
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=r"blocks\.\d+\.attn\.(qkv|proj)"),  # type: ignore[arg-type]
        network,
    )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith(("norm.", "fc_norm.", "head.")))


def load_classifier(src: str | Path) -> Classifier:
    """A fine-tuned or probed model, ready to classify.

    Raises:
        UserError: `src` holds no classifier.
    """
    weights = checkpoint.read(src)
    return Classifier(network_of(weights), weights.require_classifier()["classes"], weights.description)


def network_of(weights: Weights) -> VisionTransformer:
    """The classifier of these weights, frozen, in eval mode.

    Raises:
        UserError: They are of none.
    """
    about = weights.require_classifier()
    with Unallocated():
        network = build(weights.config, len(about["classes"]), about["pool"], about["head"])
    network.load_state_dict(weights.timm_state, assign=True)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def frozen_features(network: VisionTransformer, images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, D): what the head sees, unmasked."""
    pooled: Tensor = network.forward_head(network.forward_features(images), pre_logits=True)
    return pooled
