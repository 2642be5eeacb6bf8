"""An encoder of timm's in place of the paper's ViT: any that can see a subset of its patches."""

import difflib
import inspect
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

Pair = tuple[int, int]

A_MODULE = "a module given in Python: "  # begins what is recorded of an encoder that no name can build again

# What may be set by name: arguments of timm's networks, not of `create_model`, which would read files.
ARGUMENTS = {
    name for network in (VisionTransformer, Eva) for name in inspect.signature(network.__init__).parameters
} - {"self", "img_size", "in_chans", "num_classes", "global_pool", "patch_drop_rate", "device", "dtype"}


class KeepVisible(nn.Module):
    """Stands where timm would drop random patches, and keeps those of `ids`; all where that is None.

    Attributes:
        ids: (B, K) int64, the visible patches in raster order, set for one forward pass.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.prefix: int = encoder.num_prefix_tokens  # type: ignore[assignment]
        self.returns_ids = isinstance(encoder, Eva)  # it turns the positions of RoPE with them
        self.ids: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        if self.ids is not None:
            patches = x[:, self.prefix :].gather(1, self.ids[..., None].expand(-1, -1, x.shape[2]))
            x = torch.cat([x[:, : self.prefix], patches], dim=1)
        return (x, self.ids) if self.returns_ids else x


def build_encoder(
    encoder: str | nn.Module, image_size: Pair, patch_size: Pair, in_chans: int, arguments: dict[str, Any] | None = None
) -> Any:
    """A timm network without head, which `encode_visible` shows a subset of the patches.

    Weights and positions are as timm initialises them, or as the module has them, and all of them are trained.

    Args:
        encoder: A name of `timm.list_models`, or a module.
        image_size: Pixels (height, width).
        patch_size: Pixels (height, width).
        in_chans: Channels of an image.
        arguments: Further arguments of the named network, such as reg_tokens or embed_dim.

    Raises:
        ValueError: timm has no such network, it takes other images or patches, or it cannot see a subset of them.
    """
    network: Any = create(encoder, image_size, in_chans, arguments or {}) if isinstance(encoder, str) else encoder
    name = type(network).__name__
    if not isinstance(network, VisionTransformer | Eva):
        raise ValueError(
            f"a {name} computes on the whole grid of patches; timm's networks that can see a subset are "
            "VisionTransformer and Eva (RoPE)"
        )
    if network.num_classes:
        raise ValueError(f"it has a head of {network.num_classes} classes: create it with num_classes=0")
    if isinstance(network.norm, nn.Identity):
        raise ValueError("it has no norm behind its blocks, but one behind the pooling: create it with global_pool=''")
    embed = network.patch_embed
    for what, found, wanted in (
        ("patch_size", tuple(embed.patch_size), tuple(patch_size)),
        ("image_size", tuple(embed.img_size), tuple(image_size)),
        ("in_chans", next(p for p in embed.parameters() if p.ndim == 4).shape[1], in_chans),
    ):
        if found != wanted:
            raise ValueError(f"it has {what} {found}, where {what} {wanted} is set")
    network.patch_drop = KeepVisible(network)  # type: ignore[assignment]  # its annotation knows timm's own alone
    if not any(p.is_meta for p in network.parameters()):
        check_by_trial(network, image_size, in_chans)
    return network


def create(name: str, image_size: Pair, in_chans: int, arguments: dict[str, Any]) -> nn.Module:
    """timm's network of this name, whose final norm stands before any pooling; raises ValueError."""
    if name.startswith(A_MODULE):
        raise ValueError(f"it was {name}; give such a module again, no file can build it")
    if not timm.is_model(name):
        known = timm.list_models()
        near = difflib.get_close_matches(name.partition(".")[0], known, n=3) or ["vit_base_patch16_224"]
        raise ValueError(f"timm {timm.__version__} has no model of this name; it has {', '.join(near)}")
    if unknown := sorted(arguments.keys() - ARGUMENTS):
        raise ValueError(f"timm_args {unknown[0]} is no argument of timm's VisionTransformer or Eva that can be set")
    try:
        return timm.create_model(
            name, img_size=image_size, in_chans=in_chans, num_classes=0, global_pool="", **arguments
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"timm cannot build it for these images: {' '.join(str(error).split())}") from None


@torch.no_grad()
def check_by_trial(network: Any, image_size: Pair, in_chans: int) -> None:
    """
    Raises:
        ValueError: What the hidden patches hold changes what the encoder gives for the visible one, as with a stem of
            overlapping convolutions.
    """
    training = network.training
    network.eval()
    parameter = next(network.parameters())
    image = torch.zeros(1, in_chans, *image_size, dtype=parameter.dtype, device=parameter.device)
    other = image + 1
    rows, columns = network.patch_embed.grid_size
    height, width = image_size[0] // rows, image_size[1] // columns
    other[..., :height, :width] = 0  # the first patch is the same
    ids = torch.zeros(1, 1, dtype=torch.int64, device=parameter.device)
    tokens = [encode_visible(network, pixels, ids) for pixels in (image, other)]
    network.train(training)
    if tokens[0].shape[1] != network.num_prefix_tokens + 1 or not torch.equal(*tokens):
        raise ValueError(f"hidden patches reach the encoder: {type(network).__name__} does not drop them at once")


def encode_visible(network: Any, images: Tensor, ids: Tensor) -> Tensor:
    """(B, C, H, W), (B, K) -> (B, prefix + K, D): the encoder's output for the visible patches, class token first."""
    network.patch_drop.ids = ids
    try:
        tokens: Tensor = network.forward_features(images)
    finally:
        network.patch_drop.ids = None
    return tokens
