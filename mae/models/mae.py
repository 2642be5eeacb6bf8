"""The masked autoencoder: hide patches, encode the rest, reconstruct the hidden pixels (arXiv:2111.06377, Sec. 3).

Shapes: B images of C channels and H x W pixels; N patches an image, of P = ph * pw * C values; K of them visible;
D encoder width, E decoder width. `mask` is True where a patch is hidden, here and everywhere in the package.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.models.blocks import Block, CheckpointedBlock

Pair = tuple[int, int]  # (height, width)


class Size(NamedTuple):
    """Width, depth and heads of an encoder."""

    embed_dim: int
    depth: int
    num_heads: int


SIZES = {
    "nano": Size(96, 4, 3),  # for images of 28 or 32 pixels on a laptop
    "micro": Size(192, 6, 3),
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
    "huge": Size(1280, 32, 16),
}


class Masking(NamedTuple):
    """Which patches are hidden, three ways. `ids_*` are positions in raster order."""

    ids_keep: Tensor  # (B, K) int64, visible patches in shuffled order
    ids_hide: Tensor  # (B, N - K) int64, hidden patches in shuffled order
    mask: Tensor  # (B, N) bool, True = hidden

    @property
    def ids_restore(self) -> Tensor:
        """(B, N) int64: sorts [visible, hidden] back to raster order."""
        return torch.cat([self.ids_keep, self.ids_hide], dim=1).argsort(dim=1)


class Loss(NamedTuple):
    loss: Tensor  # scalar, mean over the hidden patches of the batch
    mask: Tensor  # (B, N) bool, True = hidden
    per_image: Tensor  # (B,), mean over the image's hidden patches


class Prediction(NamedTuple):
    pred: Tensor  # (B, N, P), every patch, in the space of the target: normalised by patch where norm_pix_loss
    mask: Tensor  # (B, N) bool, True = hidden


def as_pair(value: int | Pair) -> Pair:
    """An int means a square."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def patchify(images: Tensor, patch_size: Pair) -> Tensor:
    """(B, C, H, W) -> (B, N, P): patches in raster order, the values of each in the order (row, column, channel)."""
    b, c, h, w = images.shape
    ph, pw = patch_size
    x = images.reshape(b, c, h // ph, ph, w // pw, pw)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // ph) * (w // pw), ph * pw * c)


def unpatchify(patches: Tensor, image_size: Pair, patch_size: Pair) -> Tensor:
    """(B, N, P) -> (B, C, H, W), the inverse of `patchify`."""
    b, _, p = patches.shape
    (h, w), (ph, pw) = image_size, patch_size
    c = p // (ph * pw)
    x = patches.reshape(b, h // ph, w // pw, ph, pw, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


def normalize_patches(patches: Tensor) -> Tensor:
    """Zero mean and unit variance within each patch: the paper's better target (Table 1d)."""
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # unbiased, as the reference
    return (patches - mean) / (var + 1e-6).sqrt()


def random_masking(noise: Tensor, mask_ratio: float) -> Masking:
    """Hide the patches of highest noise, the same number in every image (Sec. 3, "Masking").

    Args:
        noise: (B, N) float, one score a patch, the class token not counted. Uniform noise makes every subset of K
            patches equally likely.
        mask_ratio: Fraction of patches to hide, in (0, 1). The paper uses 0.75 (Fig. 5).

    Raises:
        ValueError: The ratio would leave no patch visible or none hidden.
    """
    num_patches = noise.shape[1]
    num_keep = int(num_patches * (1 - mask_ratio))  # truncates, as the reference: 196 -> 49
    if not 0 < num_keep < num_patches:
        raise ValueError(f"mask_ratio {mask_ratio} leaves {num_keep} of {num_patches} patches visible")
    # Stable: float32 noise has ties every few hundred images, which devices would otherwise break differently.
    ids = noise.argsort(dim=1, stable=True)
    ids_keep, ids_hide = ids[:, :num_keep], ids[:, num_keep:]
    mask = torch.zeros(noise.shape, dtype=torch.bool, device=noise.device).scatter_(1, ids_hide, True)
    return Masking(ids_keep, ids_hide, mask)


def sincos_positions(dim: int, grid: Pair) -> Tensor:
    """Fixed 2-D sin-cos positions, (1, 1 + N, dim) float32, the class token's row (zeros) first.

    The first half of each row encodes the column, the second half the row; each half is [sin, cos] over dim / 4
    frequencies from 1 down to 1/10000.
    """
    if dim % 4:
        raise ValueError(f"a width of {dim} is not divisible by 4, which 2-D sin-cos positions need")
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [coordinate.flatten()[:, None] * omega for coordinate in (columns, rows)]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return F.pad(table, (0, 0, 1, 0))[None].float()


@torch.no_grad()
def init_linear(module: nn.Module) -> None:
    """The reference's initialisation of every linear layer; timm's own would be truncated normals."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def init_stem(encoder: VisionTransformer, grid: Pair) -> None:
    """Patch embedding as a linear layer, class token, sin-cos positions."""
    assert encoder.cls_token is not None  # timm has encoders without them
    assert encoder.pos_embed is not None
    nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.view(encoder.embed_dim, -1))
    nn.init.normal_(encoder.cls_token, std=0.02)
    encoder.pos_embed.copy_(sincos_positions(encoder.embed_dim, grid))


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """(B, N, D), (B, K) -> (B, K, D): the tokens at those positions, copied row by row."""
    b, n, d = tokens.shape
    rows = ids + n * torch.arange(b, device=ids.device)[:, None]
    return tokens.reshape(b * n, d).index_select(0, rows.flatten()).view(b, -1, d)


class MaskedAutoencoder(nn.Module):
    """A ViT encoder that sees only the visible patches, and a light decoder that fills in the hidden ones.

    `encoder` is timm's VisionTransformer without a head: its state_dict loads strictly into `timm.create_model`.
    The defaults are ViT-B/16 of the paper (Sec. 4, Table 1).

    Args:
        image_size: Pixels, a side or (height, width).
        patch_size: Pixels, a side or (height, width); divides image_size.
        in_chans: Channels of an image.
        embed_dim: Encoder width, divisible by 4 and by num_heads.
        depth: Encoder blocks.
        num_heads: Encoder attention heads.
        decoder_embed_dim: Decoder width, divisible by 4 and by decoder_num_heads.
        decoder_depth: Decoder blocks.
        decoder_num_heads: Decoder attention heads.
        mlp_ratio: Hidden width of every MLP over the width of its block.
        norm_pix_loss: Reconstruct pixels normalised within each patch, else pixels as they come in.
        activation_checkpointing: In training, compute the blocks' activations twice instead of keeping them.

    Raises:
        ValueError: A patch that does not divide the image, or a width that its heads do not divide.
    """

    def __init__(
        self,
        image_size: int | Pair = 224,
        patch_size: int | Pair = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = True,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.image_size = h, w = as_pair(image_size)
        self.patch_size = ph, pw = as_pair(patch_size)
        # All that is needed to build this network again; plain types, stored with every checkpoint.
        self.config: dict[str, Any] = {
            "image_size": [h, w],
            "patch_size": [ph, pw],
            "in_chans": in_chans,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "decoder_embed_dim": decoder_embed_dim,
            "decoder_depth": decoder_depth,
            "decoder_num_heads": decoder_num_heads,
            "mlp_ratio": mlp_ratio,
            "norm_pix_loss": norm_pix_loss,
        }
        for name, value in self.config.items():
            if name not in ("mlp_ratio", "norm_pix_loss") and min(value if isinstance(value, list) else [value]) < 1:
                raise ValueError(f"{name} {value}: at least 1")
        if h % ph or w % pw:
            raise ValueError(f"image_size {h}x{w} is not divisible by patch_size {ph}x{pw}")
        for width, heads, whose in ((embed_dim, num_heads, ""), (decoder_embed_dim, decoder_num_heads, "decoder_")):
            if width % heads:
                raise ValueError(f"{whose}embed_dim {width} is not divisible by {whose}num_heads {heads}")
        self.in_chans = in_chans
        self.grid = h // ph, w // pw
        self.num_patches = self.grid[0] * self.grid[1]
        self.norm_pix_loss = norm_pix_loss

        block = CheckpointedBlock if activation_checkpointing else Block
        self.encoder = VisionTransformer(
            img_size=self.image_size,
            patch_size=self.patch_size,
            in_chans=in_chans,
            num_classes=0,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            block_fn=block,
        )
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(
            block(decoder_embed_dim, decoder_num_heads, mlp_ratio, qkv_bias=True) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, ph * pw * in_chans)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        init_linear(self)
        init_stem(self.encoder, self.grid)
        nn.init.normal_(self.mask_token, std=0.02)
        self.decoder_pos_embed.copy_(sincos_positions(self.decoder_pos_embed.shape[2], self.grid))
        for positions in (self.pos_embed, self.decoder_pos_embed):
            positions.requires_grad_(False)

    @property
    def cls_token(self) -> Tensor:
        assert self.encoder.cls_token is not None  # timm has encoders without one
        return self.encoder.cls_token

    @property
    def pos_embed(self) -> Tensor:
        assert self.encoder.pos_embed is not None
        return self.encoder.pos_embed

    def forward(self, images: Tensor, noise: Tensor | None = None, mask_ratio: float = 0.75) -> Loss:
        """The training loss.

        Args:
            images: (B, C, H, W) float, normalised.
            noise: (B, N) float, one score a patch: the lowest int(N * (1 - mask_ratio)) stay visible. None draws it
                from torch's global generator, which no stage of this package does.
            mask_ratio: Fraction of patches to hide, in (0, 1).
        """
        masking = self.draw_mask(images, noise, mask_ratio)
        patches = patchify(images, self.patch_size)  # (B, N, P)
        latent = self.encode_visible(take(patches, masking.ids_keep), masking.ids_keep)
        pred = self.decoder_pred(self.decode(latent, masking, hidden_only=True))  # (B, N - K, P)
        return self.hidden_loss(pred, patches, masking)

    def hidden_loss(self, pred: Tensor, patches: Tensor, masking: Masking) -> Loss:
        """(B, N - K, P) predictions of the hidden patches, beside those among (B, N, P) patches."""
        target = take(patches, masking.ids_hide)
        if self.norm_pix_loss:
            target = normalize_patches(target)
        per_image = (pred.float() - target).square().mean(dim=(1, 2))
        return Loss(per_image.mean(), masking.mask, per_image)

    def predict(self, images: Tensor, noise: Tensor | None = None, mask_ratio: float = 0.75) -> Prediction:
        """Every patch as the decoder sees it; arguments as in `forward`."""
        masking = self.draw_mask(images, noise, mask_ratio)
        latent = self.encode_visible(take(patchify(images, self.patch_size), masking.ids_keep), masking.ids_keep)
        pred = self.decoder_pred(self.decode(latent, masking))
        return Prediction(take(pred, masking.ids_restore), masking.mask)

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1 + N, D): the final-norm tokens of the whole image, class token first, never masked."""
        self.check_images(images)
        tokens: Tensor = self.encoder.forward_features(images)
        return tokens

    def embed(self, visible: Tensor, ids_keep: Tensor) -> Tensor:
        """(B, K, P), (B, K) -> (B, K, D): the visible patches with their positions."""
        proj = self.encoder.patch_embed.proj
        # The convolution as a linear layer, channel last.
        weight = proj.weight.flatten(1) if self.in_chans == 1 else proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(visible, weight, proj.bias) + self.pos_embed[0, 1:][ids_keep]

    def encode_visible(self, visible: Tensor, ids_keep: Tensor) -> Tensor:
        """(B, K, P), (B, K) -> (B, 1 + K, D): what the encoder makes of the visible patches, seeing no others."""
        encoder, x = self.encoder, self.embed(visible, ids_keep)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls, x], dim=1)  # (B, 1 + K, D)
        normed: Tensor = encoder.norm(encoder.blocks(x))
        return normed

    def decode(self, latent: Tensor, masking: Masking, hidden_only: bool = False) -> Tensor:
        """(B, 1 + K, D) -> (B, N, E): decoder tokens, before the prediction head, in the order [visible, hidden].

        To attention the order of tokens means nothing, and positions are added to each: so they are never put back in
        raster order, which would cost a gather, and another backward, of the widest tensors.

        Args:
            hidden_only: (B, N - K, E): nobody will ask for the visible patches, so the last block leaves them out.
        """
        positions = self.decoder_pos_embed
        x = self.decoder_embed(latent)
        hidden = self.mask_token + positions[0, 1:][masking.ids_hide]
        seen = torch.cat([positions[:, :1].expand(len(x), -1, -1), positions[0, 1:][masking.ids_keep]], dim=1)
        x = torch.cat([x + seen, hidden], dim=1)  # (B, 1 + N, E)
        first = x.shape[1] - masking.ids_hide.shape[1] if hidden_only else 0
        *blocks, last = self.decoder_blocks
        for block in blocks:
            x = block(x)
        x = last(x, first=first)
        normed: Tensor = self.decoder_norm(x if hidden_only else x[:, 1:])
        return normed

    def draw_mask(self, images: Tensor, noise: Tensor | None, mask_ratio: float) -> Masking:
        """`random_masking` of a batch, with its shapes checked."""
        self.check_images(images)
        if noise is None:
            noise = torch.rand(images.shape[0], self.num_patches, device=images.device)
        if noise.shape != (images.shape[0], self.num_patches):
            raise ValueError(
                f"noise is {tuple(noise.shape)}; {images.shape[0]} images of {self.num_patches} patches are given"
            )
        return random_masking(noise, mask_ratio)

    def check_images(self, images: Tensor) -> None:
        wanted = (self.in_chans, *self.image_size)
        if images.shape[1:] != wanted:
            raise ValueError(f"images are {tuple(images.shape)}; this model takes (B, C, H, W) of (C, H, W) = {wanted}")
