"""Where the class token looks: its attention weights on the patches."""

import timm.models.vision_transformer as timm_vit
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


@torch.no_grad()
def attention_maps(encoder: VisionTransformer, images: Tensor, block: int = -1) -> Tensor:
    """(B, C, H, W) -> (B, heads, rows, columns): the class token's softmax weights on the patches, nothing masked.

    The weights are over all tokens, so a head's map sums to 1 minus what the class token (and registers, where an
    encoder has them) receives.

    Args:
        encoder: timm's, with its blocks or ours, in eval mode.
        images: Normalised, of the size that the encoder takes.
        block: As an index: 0 is the first, -1 the last.

    Raises:
        ValueError: There is no such block, no class token, another kind of attention, or it is in training mode.
    """
    depth = len(encoder.blocks)
    if not -depth <= block < depth:
        raise ValueError(f"block {block}: wanted are 0 to {depth - 1}, or -{depth} to -1")
    if encoder.cls_token is None:
        raise ValueError("this encoder has no class token, whose attention is asked for")
    if encoder.training:
        raise ValueError("the encoder is in training mode, where maps may differ each time: call encoder.eval()")
    chosen = encoder.blocks[block]
    attn = getattr(chosen, "attn", None)
    if not isinstance(chosen, timm_vit.Block) or not isinstance(attn, timm_vit.Attention):
        raise ValueError(f"block {block} is a {type(chosen).__name__}; wanted is timm's Block with its Attention")

    # Fused attention never has the weights: they are computed here from what goes into the attention. It is caught
    # behind the norm, as our blocks call the parts of `attn` and not `attn` itself.
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
