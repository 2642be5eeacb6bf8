"""Attention maps: where the class token looks."""

import timm.models.vision_transformer as timm_vit
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


@torch.no_grad()
def attention_maps(encoder: VisionTransformer, images: Tensor, block: int = -1) -> Tensor:
    """(B, C, H, W) -> (B, heads, rows, columns): the class token's attention weights on the patches, without masking.

    The softmax runs over all tokens, so the map of a head sums to 1 minus the weight of the class token itself (and of
    register tokens, if the encoder has them).

    Args:
        encoder: A timm encoder, with its blocks or ours, in eval mode.
        images: Normalised images of the size that the encoder takes.
        block: Index of the block: 0 is the first, -1 the last.

    Raises:
        ValueError: The encoder has no such block, no class token, another kind of attention, or is in training mode.
    """
    depth = len(encoder.blocks)
    if not -depth <= block < depth:
        raise ValueError(f"block {block} must be in 0 to {depth - 1}, or in -{depth} to -1")
    if encoder.cls_token is None:
        raise ValueError("this encoder has no class token, so it has no attention map of one")
    if encoder.training:
        raise ValueError("the encoder is in training mode, in which maps may differ each time: call encoder.eval()")
    chosen = encoder.blocks[block]
    attn = getattr(chosen, "attn", None)
    if not isinstance(chosen, timm_vit.Block) or not isinstance(attn, timm_vit.Attention):
        raise ValueError(f"block {block} is a {type(chosen).__name__}; it must be timm's Block with its Attention")

    # Fused attention never materialises the weights, so they are computed here from the input of the attention. It is
    # caught behind the norm, because our blocks call the layers of `attn` and not `attn` itself.
    normed: list[Tensor] = []
    hook = chosen.norm1.register_forward_hook(lambda _module, _args, out: normed.append(out))
    try:
        encoder.forward_features(images)
    finally:
        hook.remove()
    (tokens,) = normed  # (B, 1 + N, D)
    q, k, _ = attn.qkv(tokens).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, 1 + N, d)
    q, k = attn.q_norm(q[:, :, :1]), attn.k_norm(k)
    weights = (q @ k.transpose(2, 3) * attn.scale).softmax(dim=-1)  # (B, heads, 1, 1 + N)
    rows, columns = encoder.patch_embed.dynamic_feat_size((images.shape[2], images.shape[3]))
    return weights[:, :, 0, encoder.num_prefix_tokens :].unflatten(2, (rows, columns))
