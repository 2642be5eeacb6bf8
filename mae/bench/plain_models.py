"""The network with what it saves put back: what tests and `mae bench step` compare it with, and no run uses.

Same parameters, same loss, same gradients to rounding.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from mae.models.mae import Loss, MaskedAutoencoder, normalize_patches, patchify, take

SAVINGS = {
    "embedding": "the visible patches alone are embedded, by a linear layer; else all, by a convolution",
    "order": "decoder tokens stay in the order [visible, hidden]; else a gather puts them back in raster order",
    "last block": "in the decoder's last block, queries and MLP of the hidden patches alone; else of all tokens",
    "head": "the prediction head sees the hidden patches alone; else all, and the mask weighs the loss",
}


class Plain(MaskedAutoencoder):
    """`MaskedAutoencoder` without some of its savings; arguments as there.

    Attributes:
        without: Names among `SAVINGS`.
    """

    without: Collection[str] = frozenset(SAVINGS)

    def forward(self, images: Tensor, noise: Tensor | None = None, mask_ratio: float = 0.75) -> Loss:
        masking = self.make_mask(images, noise, mask_ratio)
        ids_keep, ids_hide, mask = masking
        encoder, off = self.encoder, self.without
        patches = patchify(images, self.patch_size)

        if "embedding" in off:
            x = encoder.patch_embed(images) + self.pos_embed[:, 1:]
            cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
            latent = encoder.norm(encoder.blocks(torch.cat([cls, take(x, ids_keep)], dim=1)))
        else:
            latent = self.encode_visible(take(patches, ids_keep), ids_keep)

        hidden_only = "last block" not in off
        if "order" in off:
            x = self.decoder_embed(latent)
            hidden = self.mask_token.to(x.dtype).expand(len(x), ids_hide.shape[1], -1)
            restored = take(torch.cat([x[:, 1:], hidden], dim=1), masking.ids_restore)
            x = torch.cat([x[:, :1], restored], dim=1) + self.decoder_pos_embed
            *blocks, last = self.decoder_blocks
            for block in blocks:
                x = block(x)
            if hidden_only:  # the order is needed for that: hidden patches last
                ids = torch.cat([ids_keep, ids_hide], dim=1)
                x = last(torch.cat([x[:, :1], take(x[:, 1:], ids)], dim=1), first=1 + ids_keep.shape[1])
            else:
                x = last(x)[:, 1:]
            tokens = self.decoder_norm(x)
        else:
            tokens = self.decode(latent, masking, hidden_only)
            if not hidden_only:
                tokens = take(tokens, masking.ids_restore)

        if not hidden_only and "head" not in off:
            tokens = take(tokens, ids_hide)
        pred = self.decoder_pred(tokens).float()
        whole = pred.shape[1] == self.num_patches
        target = patches if whole else take(patches, ids_hide)
        if self.norm_pix_loss:
            target = normalize_patches(target)
        per_patch = (pred - target).square().mean(dim=2)
        per_image = (per_patch * mask).sum(dim=1) / mask.sum(dim=1) if whole else per_patch.mean(dim=1)
        return Loss(per_image.mean(), mask, per_image)
