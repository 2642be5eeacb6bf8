"""Classifiers: timm's VisionTransformer, its encoder pre-trained or random, and which parts of it are trained."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mae.errors import UserError
from mae.models.blocks import Block, CheckpointedBlock
from mae.models.mae import as_pair, init_linear, init_stem

MAKERS = {torch.empty, torch.ones, torch.randn, torch.zeros}  # of parameters, here, in torch's layers and in timm's

Pool = Literal["mean", "class"]  # of tokens, before a classifier's head


class Unallocated(TorchFunctionMode):
    """Networks made in it have parameters without memory, on the meta device: to be replaced by weights that are there.

    `torch.device("meta")` would do, but for the rates of drop path, which older versions of timm take from a tensor.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if function in MAKERS and given.get("device") is None:
            given = {**given, "device": "meta"}
        return function(*args, **given)


Head = Literal["linear", "batchnorm", "plain"]

POOLING = {"mean": "avg", "class": "token"}  # timm's names


class LayeredViT(VisionTransformer):
    """timm's, with the final norm in the top layer of layer decay, as the reference has it; timm's is a layer lower."""

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


@torch.no_grad()
def frozen_features(network: VisionTransformer, images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, D): what the head sees, unmasked."""
    pooled: Tensor = network.forward_head(network.forward_features(images), pre_logits=True)
    return pooled
