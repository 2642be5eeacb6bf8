"""The masked autoencoder: hide patches, encode the rest, reconstruct the hidden pixels (arXiv:2111.06377, Sec. 3).

Shapes:
    B        images in a batch, each (C, H, W): channels, height and width in pixels
    N        patches of an image, in raster order
    K        visible patches of an image; N - K are hidden
    P        values of a patch, ph * pw * C for a patch of ph x pw pixels
    D, E     width of the encoder, width of the decoder

`mask` is True where a patch is hidden, here and everywhere in this package.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.models.blocks import Block, CheckpointedBlock
from mae.models.timm_encoder import A_MODULE, build_encoder, encode_visible

Pair = tuple[int, int]  # (height, width)


class Size(NamedTuple):
    """The size of an encoder."""

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
    """Which patches are visible and which are hidden. `ids_*` are places in raster order."""

    ids_keep: Tensor  # (B, K) int64, the visible patches in shuffled order
    ids_hide: Tensor  # (B, N - K) int64, the hidden patches in shuffled order
    mask: Tensor  # (B, N) bool, True = hidden

    @property
    def ids_restore(self) -> Tensor:
        """(B, N) int64: `take(tokens, ids_restore)` puts tokens ordered [visible, hidden] back in raster order."""
        return torch.cat([self.ids_keep, self.ids_hide], dim=1).argsort(dim=1)


class Loss(NamedTuple):
    """The loss; stages average `per_image`, `loss` is its plain mean."""

    loss: Tensor  # scalar, mean over the hidden patches of the batch
    mask: Tensor  # (B, N) bool, True = hidden
    per_image: Tensor  # (B,), mean over the image's hidden patches


class Prediction(NamedTuple):
    """The reconstruction of every patch."""

    pred: Tensor  # (B, N, P), in the space of the target: normalised within each patch if norm_pix_loss
    mask: Tensor  # (B, N) bool, True = hidden


def as_pair(value: int | Pair) -> Pair:
    """(height, width); a single number means a square."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def patchify(images: Tensor, patch_size: Pair) -> Tensor:
    """(B, C, H, W) -> (B, N, P): patches in raster order, the values of each in the order (row, column, channel)."""
    b, c, h, w = images.shape
    ph, pw = patch_size
    rows, columns = h // ph, w // pw
    x = images.reshape(b, c, rows, ph, columns, pw)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, rows, columns, ph, pw, C)
    return x.reshape(b, rows * columns, ph * pw * c)  # (B, N, P)


def unpatchify(patches: Tensor, image_size: Pair, patch_size: Pair) -> Tensor:
    """(B, N, P) -> (B, C, H, W), the inverse of `patchify`."""
    b, _, p = patches.shape
    (h, w), (ph, pw) = image_size, patch_size
    c = p // (ph * pw)
    x = patches.reshape(b, h // ph, w // pw, ph, pw, c)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, rows, ph, columns, pw)
    return x.reshape(b, c, h, w)


def normalize_patches(patches: Tensor) -> Tensor:
    """(..., P) -> (..., P), each patch with zero mean and unit variance: the paper's better target (Table 1d)."""
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # the unbiased variance, as in the reference code
    return (patches - mean) / (var + 1e-6).sqrt()


def hidden_patches(num_patches: int, mask_ratio: float) -> int:
    """How many patches are hidden, which is rounded up, as in the reference code: of 196 at 0.75 147."""
    return num_patches - int(num_patches * (1 - mask_ratio))


def random_masking(noise: Tensor, mask_ratio: float) -> Masking:
    """Hide the patches with the highest noise, the same number in every image (Sec. 3, "Masking").

    Args:
        noise: (B, N) float, one score per patch (there is none for the class token). With uniform noise every subset
            of K patches is equally likely to stay visible.
        mask_ratio: Fraction of patches to hide, in (0, 1). The paper uses 0.75 (Fig. 5).

    Raises:
        ValueError: The ratio would leave no patch visible or none hidden.
    """
    num_patches = noise.shape[1]
    num_keep = num_patches - hidden_patches(num_patches, mask_ratio)
    if not 0 < num_keep < num_patches:
        raise ValueError(f"mask_ratio {mask_ratio} leaves {num_keep} of {num_patches} patches visible")
    # Stable, because in about one image of 900 two float32 scores tie, and devices would break ties differently.
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_keep, ids_hide = ids_shuffle[:, :num_keep], ids_shuffle[:, num_keep:]
    mask = torch.zeros(noise.shape, dtype=torch.bool, device=noise.device).scatter_(1, ids_hide, True)
    return Masking(ids_keep, ids_hide, mask)


def sincos_positions(dim: int, grid: Pair) -> Tensor:
    """Fixed 2-D sin-cos position embedding, (1, 1 + N, dim) float32; the class token's row comes first and is zero.

    The first half of each row encodes the column of the patch, the second half its row; each half is [sin, cos] over
    dim / 4 frequencies from 1 down to 1/10000.
    """
    if dim % 4:
        raise ValueError(f"a width of {dim} is not divisible by 4, as the 2-D sin-cos position embedding needs")
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [coordinate.flatten()[:, None] * omega for coordinate in (columns, rows)]  # (N, dim / 4) each
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)  # (N, dim)
    return F.pad(table, (0, 0, 1, 0))[None].float()


@torch.no_grad()
def init_linear(module: nn.Module) -> None:
    """Initialise every linear layer as the reference code does; timm itself uses truncated normals."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def init_stem(encoder: VisionTransformer, grid: Pair) -> None:
    """Initialise the patch embedding (as if it were a linear layer), the class token and the position embedding."""
    assert encoder.cls_token is not None  # timm has encoders without one
    assert encoder.pos_embed is not None
    nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.view(encoder.embed_dim, -1))
    nn.init.normal_(encoder.cls_token, std=0.02)
    encoder.pos_embed.copy_(sincos_positions(encoder.embed_dim, grid))


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """(B, N, D), (B, K) -> (B, K, D): the tokens of each image at the places `ids`.

    The same as `torch.gather` with expanded indices, but whole rows are copied, which is faster.
    """
    b, n, d = tokens.shape
    rows = ids + n * torch.arange(b, device=ids.device)[:, None]  # (B, K), of the batch as one table of B * N rows
    return tokens.reshape(b * n, d).index_select(0, rows.flatten()).view(b, -1, d)


# Of the arguments below.
NOT_COUNTS = ("mlp_ratio", "norm_pix_loss", "timm_encoder", "timm_args", "visible_loss_weight", "encoder_mask_tokens")


def check_config(config: dict[str, Any]) -> None:
    """Check the arguments of a `MaskedAutoencoder`.

    Raises:
        ValueError: A size is below 1, the patch does not divide the image, or the heads do not divide a width.
    """
    for name, value in config.items():
        if name not in NOT_COUNTS and min(value if isinstance(value, list) else [value]) < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    (h, w), (ph, pw) = config["image_size"], config["patch_size"]
    if h % ph or w % pw:
        raise ValueError(f"image_size {h}x{w} is not divisible by patch_size {ph}x{pw}")
    if not 0 <= config.get("visible_loss_weight", 0) <= 1:
        raise ValueError(f"visible_loss_weight {config['visible_loss_weight']} must be at least 0 and at most 1")
    if config.get("pca_target", 1) > (values := ph * pw * config["in_chans"]):
        raise ValueError(f"pca_target {config['pca_target']} is more than the {values} values of a patch")
    for prefix in ("", "decoder_"):
        width, heads = config[f"{prefix}embed_dim"], config[f"{prefix}num_heads"]
        if width % heads:
            raise ValueError(f"{prefix}embed_dim {width} is not divisible by {prefix}num_heads {heads}")


class MaskedAutoencoder(nn.Module):
    """A ViT encoder that sees only the visible patches, and a light decoder that reconstructs the hidden ones.

    `encoder` is a timm VisionTransformer without a head: its state_dict loads strictly into `timm.create_model`.
    The defaults are the ViT-B/16 of the paper (Sec. 4, Table 1). With an encoder of timm's, tokens before the patches
    (none, a class token, registers) all go through the decoder, with the class token's position.

    Args:
        image_size: Pixels, one side of a square or (height, width).
        patch_size: Pixels, one side of a square or (height, width); must divide image_size.
        in_chans: Channels of an image.
        embed_dim: Encoder width, divisible by 4 and by num_heads.
        depth: Encoder blocks.
        num_heads: Encoder attention heads.
        decoder_embed_dim: Decoder width, divisible by 4 and by decoder_num_heads.
        decoder_depth: Decoder blocks.
        decoder_num_heads: Decoder attention heads.
        mlp_ratio: Hidden width of every MLP divided by the width of its block.
        norm_pix_loss: Reconstruct pixels normalised within each patch; otherwise the pixels of the input.
        activation_checkpointing: In training, recompute the blocks' activations in the backward pass instead of
            keeping them.
        visible_loss_weight: Weight of a visible patch in the loss, where a hidden one has 1. Above 0 the decoder
            predicts all patches; 1 is the loss on all patches that costs the paper 0.5 points (Sec. 3, footnote 1).
        pca_target: Reconstruct so many of a patch's principal components instead of its pixels (Table 1d: 96, and worse
            than pixels); 0: pixels. `fit_target` finds them before training.
        encoder_mask_tokens: Let the encoder process mask tokens in the place of hidden patches, as in BERT: 3.3 times
            the work and worse (Table 1c).
        timm_encoder: Instead of the paper's: the name of a timm model, or a timm model without a head. embed_dim, depth
            and num_heads are then its own.
        timm_args: Arguments for the model of that name.

    Raises:
        ValueError: A size is below 1, the patch does not divide the image, or the heads do not divide a width; or the
            encoder cannot be used.
    """

    target_mean: Tensor  # (P,), with pca_target
    target_basis: Tensor  # (P, pca_target)

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
        timm_encoder: str | nn.Module | None = None,
        timm_args: dict[str, Any] | None = None,
        visible_loss_weight: float = 0.0,
        encoder_mask_tokens: bool = False,
        pca_target: int = 0,
    ):
        super().__init__()
        self.image_size = h, w = as_pair(image_size)
        self.patch_size = ph, pw = as_pair(patch_size)
        self.is_timms = timm_encoder is not None
        if timm_encoder is not None:
            made = build_encoder(timm_encoder, self.image_size, self.patch_size, in_chans, timm_args)
            made.set_grad_checkpointing(activation_checkpointing)
            embed_dim, depth, num_heads = made.embed_dim, len(made.blocks), made.blocks[0].attn.num_heads
        # Everything that is needed to build this network again, in plain types; stored with every checkpoint.
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
        if timm_encoder is not None:
            name = timm_encoder if isinstance(timm_encoder, str) else f"{A_MODULE}{type(timm_encoder).__name__}"
            self.config |= {"timm_encoder": name, "timm_args": timm_args}
        # Only where they are set, so that the config of the paper's network stays what it was.
        switches = {
            "visible_loss_weight": visible_loss_weight,
            "encoder_mask_tokens": encoder_mask_tokens,
            "pca_target": pca_target,
        }
        self.config |= {name: value for name, value in switches.items() if value}
        check_config(self.config)
        if encoder_mask_tokens and self.is_timms:
            raise ValueError("encoder_mask_tokens are for the paper's encoder, not for one of timm's")
        self.visible_loss_weight, self.encoder_mask_tokens = visible_loss_weight, encoder_mask_tokens
        self.pca_target = pca_target
        self.in_chans = in_chans
        self.grid = h // ph, w // pw
        self.num_patches = self.grid[0] * self.grid[1]
        self.norm_pix_loss = norm_pix_loss

        block = CheckpointedBlock if activation_checkpointing else Block
        if self.is_timms:
            self.encoder: VisionTransformer = made
        else:
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
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim if encoder_mask_tokens else decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(
            block(decoder_embed_dim, decoder_num_heads, mlp_ratio, qkv_bias=True) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, self.target_values)
        if pca_target:
            self.register_buffer("target_mean", torch.zeros(self.patch_values))
            self.register_buffer("target_basis", torch.zeros(self.patch_values, pca_target))  # columns: the components
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise all parameters as the reference code does, but for an encoder of timm's; positions stay fixed."""
        for name, module in self.named_children():
            if name != "encoder" or not self.is_timms:
                init_linear(module)
        if not self.is_timms:
            init_stem(self.encoder, self.grid)
        nn.init.normal_(self.mask_token, std=0.02)
        self.decoder_pos_embed.copy_(sincos_positions(self.decoder_pos_embed.shape[2], self.grid))
        self.fix_positions()

    def fix_positions(self) -> None:
        """Leave the position embeddings out of training; those of an encoder of timm's are trained as timm does."""
        self.decoder_pos_embed.requires_grad_(False)
        if not self.is_timms:
            self.pos_embed.requires_grad_(False)

    @property
    def cls_token(self) -> Tensor:
        assert self.encoder.cls_token is not None  # timm has encoders without one
        return self.encoder.cls_token

    @property
    def pos_embed(self) -> Tensor:
        assert self.encoder.pos_embed is not None
        return self.encoder.pos_embed

    def forward(self, images: Tensor, noise: Tensor | None = None, mask_ratio: float = 0.75) -> Loss:
        """The training loss: mean squared error of the hidden patches (Sec. 3, "Reconstruction target").

        Args:
            images: (B, C, H, W) float, normalised.
            noise: (B, N) float, one score per patch: the lowest int(N * (1 - mask_ratio)) of each row stay visible.
                None draws it from torch's global generator, which no stage of this package does.
            mask_ratio: Fraction of patches to hide, in (0, 1).
        """
        masking = self.make_mask(images, noise, mask_ratio)
        patches = patchify(images, self.patch_size)  # (B, N, P)
        latent = self.latent(images, patches, masking)  # (B, 1 + K, D)
        if not self.visible_loss_weight:
            pred = self.decoder_pred(self.decode(latent, masking, hidden_only=True))  # (B, N - K, P)
            return self.hidden_loss(pred, patches, masking)
        pred = self.decoder_pred(self.decode(latent, masking))  # (B, N, P), in the order [visible, hidden]
        return self.weighted_loss(pred, patches, masking)

    def predict(self, images: Tensor, noise: Tensor | None = None, mask_ratio: float = 0.75) -> Prediction:
        """The reconstruction of every patch, visible ones included; arguments as in `forward`."""
        masking = self.make_mask(images, noise, mask_ratio)
        patches = patchify(images, self.patch_size)  # (B, N, P)
        latent = self.latent(images, patches, masking)  # (B, 1 + K, D)
        pred = self.decoder_pred(self.decode(latent, masking))  # (B, N, P), in the order [visible, hidden]
        return Prediction(take(pred, masking.ids_restore), masking.mask)

    def latent(self, images: Tensor, patches: Tensor, masking: Masking) -> Tensor:
        """(B, C, H, W), (B, N, P) -> (B, 1 + K, D): the encoder's output for the visible patches, class token first.

        With mask tokens in the encoder (B, 1 + N, D), the hidden patches at the end.
        """
        if self.is_timms:
            return encode_visible(self.encoder, images, masking.ids_keep)
        return self.encode_visible(take(patches, masking.ids_keep), masking.ids_keep, masking.ids_hide)

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1 + N, D): the encoder's output for unmasked images, class token first."""
        self.check_images(images)
        tokens: Tensor = self.encoder.forward_features(images)
        return tokens

    def encode_visible(self, visible: Tensor, ids_keep: Tensor, ids_hide: Tensor | None = None) -> Tensor:
        """(B, K, P), (B, K), and with mask tokens in the encoder (B, N - K) -> as `latent`."""
        x = self.embed(visible, ids_keep)  # (B, K, D)
        if self.encoder_mask_tokens:
            assert ids_hide is not None
            x = torch.cat([x, self.mask_token + self.pos_embed[0, 1:][ids_hide]], dim=1)  # (B, N, D)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)  # (B, 1, D)
        x = torch.cat([cls_token, x], dim=1)  # (B, 1 + K, D), or (B, 1 + N, D)
        latent: Tensor = self.encoder.norm(self.encoder.blocks(x))
        return latent

    def embed(self, visible: Tensor, ids_keep: Tensor) -> Tensor:
        """(B, K, P), (B, K) -> (B, K, D): patch embedding and position embedding of the visible patches."""
        proj = self.encoder.patch_embed.proj
        # timm's patch embedding is a convolution, (D, C, ph, pw); on patches it is a linear layer, channel last.
        weight = proj.weight.flatten(1) if self.in_chans == 1 else proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P)
        return F.linear(visible, weight, proj.bias) + self.pos_embed[0, 1:][ids_keep]

    def decode(self, latent: Tensor, masking: Masking, hidden_only: bool = False) -> Tensor:
        """(B, 1 + K, D) -> (B, N, E): the decoder's tokens in the order [visible, hidden], before `decoder_pred`.

        The reference code puts the tokens back in raster order first. Attention does not depend on their order, only on
        their position embeddings, so this saves a gather of the widest tensors and its backward pass.

        Args:
            hidden_only: Return the hidden patches only, (B, N - K, E); the last block then skips the visible ones.
        """
        positions = self.decoder_pos_embed  # (1, 1 + N, E)
        x = self.decoder_embed(latent)  # (B, 1 + K, E)
        prefix = self.encoder.num_prefix_tokens
        seen = torch.cat([positions[:, :1].expand(len(x), prefix, -1), positions[0, 1:][masking.ids_keep]], dim=1)
        hidden = positions[0, 1:][masking.ids_hide]  # (B, N - K, E)
        if self.encoder_mask_tokens:  # then the encoder gives a token for each hidden patch
            x = x + torch.cat([seen, hidden], dim=1)
        else:
            x = torch.cat([x + seen, self.mask_token + hidden], dim=1)  # (B, 1 + N, E)
        first = x.shape[1] - masking.ids_hide.shape[1] if hidden_only else 0
        *blocks, last = self.decoder_blocks
        for block in blocks:
            x = block(x)
        x = last(x, first=first)  # (B, 1 + N - first, E)
        tokens: Tensor = self.decoder_norm(x if hidden_only else x[:, prefix:])
        return tokens

    def hidden_loss(self, pred: Tensor, patches: Tensor, masking: Masking) -> Loss:
        """Target and loss: squared error between `pred` (B, N - K, P) and the hidden ones of `patches` (B, N, P)."""
        per_image = self.loss(pred, self.target(take(patches, masking.ids_hide)))  # (B,)
        return Loss(per_image.mean(), masking.mask, per_image)

    def weighted_loss(self, pred: Tensor, patches: Tensor, masking: Masking) -> Loss:
        """As `hidden_loss`, of predictions of all patches, (B, N, P) in the order [visible, hidden].

        An image's loss is (sum over hidden + weight * sum over visible) / (N - K + weight * K).
        """
        visible, hidden = masking.ids_keep.shape[1], masking.ids_hide.shape[1]
        parts = zip(pred.split([visible, hidden], dim=1), (masking.ids_keep, masking.ids_hide), strict=True)
        of_visible, of_hidden = (self.loss(part, self.target(take(patches, ids))) for part, ids in parts)  # (B,) each
        weight = self.visible_loss_weight * visible
        per_image = (hidden * of_hidden + weight * of_visible) / (hidden + weight)
        return Loss(per_image.mean(), masking.mask, per_image)

    def target(self, patches: Tensor) -> Tensor:
        """(B, n, P) -> (B, n, P): what the decoder predicts of patches; override it, and `target_values`, for another.

        `predict` returns patches in this space, and pictures of reconstructions undo what is done here.
        """
        patches = normalize_patches(patches) if self.norm_pix_loss else patches
        if not self.pca_target:
            return patches
        with torch.autocast("cuda" if patches.is_cuda else "cpu", enabled=False):  # 8 bits are too few for a target
            return (patches.float() - self.target_mean.float()) @ self.target_basis.float()

    def target_pixels(self, pred: Tensor) -> Tensor:
        """(B, n, V) -> (B, n, P): predicted patches as pixels, which `norm_pix_loss` has normalised patch by patch."""
        return pred @ self.target_basis.T + self.target_mean if self.pca_target else pred

    @torch.no_grad()
    def fit_target(self, images: Iterable[Tensor]) -> None:
        """Find the principal components of patches, for `pca_target`.

        Args:
            images: Batches of training images, (B, C, H, W) float, normalised. All patches of all images count.
        """
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for batch in images:
            patches = patchify(batch.double(), self.patch_size)
            patches = (normalize_patches(patches) if self.norm_pix_loss else patches).flatten(0, 1)
            count, total, squares = count + len(patches), total + patches.sum(0), squares + patches.T @ patches
        mean = total / count
        _, vectors = torch.linalg.eigh(squares / count - torch.outer(mean, mean))  # by ascending variance
        basis = vectors.flip(1)[:, : self.pca_target]
        # A component's sign is arbitrary: here its largest entry is positive.
        sign = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        self.target_mean.copy_(mean)
        self.target_basis.copy_(basis * sign)

    def loss(self, pred: Tensor, target: Tensor) -> Tensor:
        """(B, n, P), (B, n, P) -> (B,): the loss of each image over its hidden patches; override it for another."""
        return (pred.float() - target).square().mean(dim=(1, 2))

    @property
    def target_values(self) -> int:
        """Values that the decoder predicts of a patch: those of its pixels, or its principal components."""
        return self.pca_target or self.patch_values

    @property
    def patch_values(self) -> int:
        """P, the values of a patch's pixels."""
        ph, pw = self.patch_size
        return ph * pw * self.in_chans

    def make_mask(self, images: Tensor, noise: Tensor | None, mask_ratio: float) -> Masking:
        """Check the shapes, then choose the hidden patches by `random_masking`; without noise, draw it."""
        self.check_images(images)
        if noise is None:
            noise = torch.rand(images.shape[0], self.num_patches, device=images.device)
        if noise.shape != (images.shape[0], self.num_patches):
            raise ValueError(
                f"noise is {tuple(noise.shape)}; {images.shape[0]} images of {self.num_patches} patches need "
                f"({images.shape[0]}, {self.num_patches})"
            )
        return random_masking(noise, mask_ratio)

    def check_images(self, images: Tensor) -> None:
        c, h, w = self.in_chans, *self.image_size
        if images.shape[1:] != (c, h, w):
            raise ValueError(f"images are {tuple(images.shape)}; this model takes (B, {c}, {h}, {w})")
