"""Classifiers: a timm VisionTransformer with a head, and the choice of which of its parameters are trained."""

from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.errors import UserError
from mae.models.blocks import Block, CheckpointedBlock
from mae.models.mae import as_pair, init_linear, init_stem
from mae.models.timm_encoder import build_encoder

Pool = Literal["mean", "class"]  # how tokens are pooled before the head

Head = Literal["linear", "batchnorm", "plain"]

POOLING = {"mean": "avg", "class": "token"}  # timm's names


class LayeredViT(VisionTransformer):
    """timm's network; for layer decay the final norm counts as the top layer, as in the reference code.

    timm itself counts it one layer lower.
    """

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stem: dict[str, Any] = super().group_matcher(coarse)
        return {"stem": stem["stem"], "blocks": [(r"^blocks\.(\d+)", None)]}


def build(
    config: dict[str, Any],
    num_classes: int,
    pool: Pool,
    head: Head,
    drop_path: float = 0.0,
    activation_checkpointing: bool = False,
) -> VisionTransformer:
    """A timm VisionTransformer with the initialisation of the reference code.

    An encoder of timm's, that `config` names, keeps its own initialisation and its final norm before the pooling.

    Args:
        config: The encoder: image_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio; timm_encoder
            and timm_args of one of timm's.
        pool: "mean" averages the patch tokens; "class" takes the class token.
        head: "linear" is for fine-tuning; with mean pooling the norm follows the pooling (fc_norm) and the encoder's
            final norm is dropped (Sec. A.1). "batchnorm" is for linear probing: BatchNorm without affine parameters,
            then the linear layer, on features behind the encoder's final norm (Sec. A.1, Table 10). "plain" is such a
            probe with its BatchNorm folded into the linear layer.
        drop_path: Stochastic depth rate of the last block; it rises linearly from 0 at the first.
        activation_checkpointing: In training, recompute the blocks' activations in the backward pass instead of
            keeping them.
    """
    size, patch_size = as_pair(config["image_size"]), as_pair(config["patch_size"])
    network: VisionTransformer
    if "timm_encoder" in config:
        arguments = {**(config["timm_args"] or {}), "drop_path_rate": drop_path}
        network = build_encoder(config["timm_encoder"], size, patch_size, config["in_chans"], arguments)
        if pool == "class" and network.cls_token is None:
            raise UserError(f"--model.pool class: timm's {config['timm_encoder']} has no class token; use mean")
        network.reset_classifier(num_classes, POOLING[pool])
        network.set_grad_checkpointing(activation_checkpointing)
    else:
        network = LayeredViT(
            img_size=size,
            patch_size=patch_size,  # type: ignore[arg-type]  # a pair is fine
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
    nn.init.zeros_(linear.bias)
    nn.init.trunc_normal_(linear.weight, std=0.01 if head == "batchnorm" else 2e-5)
    if head == "batchnorm":
        norm = nn.BatchNorm1d(network.embed_dim, affine=False, eps=1e-6)
        network.head = nn.Sequential(norm, linear)  # type: ignore[assignment]
    return network


def train_last(network: VisionTransformer, blocks: float) -> None:
    """Freeze all but the last `blocks` blocks, the norm after them and the head (partial fine-tuning, Fig. 9).

    Half a block is its MLP with the norm before it. Frozen branches have no drop path.

    Raises:
        UserError: `blocks` is not a multiple of 0.5 between 0 and the encoder's depth.
    """
    depth = len(network.blocks)
    if not 0 <= blocks <= depth or (2 * blocks) % 1:
        raise UserError(f"--model.blocks {blocks} must be 0, 0.5, 1, ... up to the {depth} blocks of this encoder")
    network.requires_grad_(False)
    for module in (network.norm, network.fc_norm, network.head):
        module.requires_grad_(True)
    for i, block in enumerate(network.blocks):
        trained = blocks - (depth - 1 - i)  # how much of this block is trained: 1 or more, 0.5, or 0 or less
        if trained >= 1:
            block.requires_grad_(True)
        elif trained == 0.5:
            for module in (block.norm2, block.mlp):
                module.requires_grad_(True)
            block.drop_path1 = nn.Identity()
        else:
            block.drop_path1 = block.drop_path2 = nn.Identity()


def add_lora(network: VisionTransformer, rank: int, alpha: float) -> None:
    """Train low-rank updates of every attention's qkv and proj (peft's LoRA), the head and the final norm only.

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


@torch.no_grad()
def frozen_features(network: VisionTransformer, images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, D): the pooled features that the head takes, without masking and without gradients."""
    pooled: Tensor = network.forward_head(network.forward_features(images), pre_logits=True)
    return pooled
