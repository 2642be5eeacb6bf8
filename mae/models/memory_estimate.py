"""The peak memory of a training step, predicted from the shapes of a network before anything is run.

One part of the memory depends on the network (weights, gradients, optimiser states), the other on the batch: what each
layer keeps from its forward to its backward pass, and what its backward pass needs for itself. The layers are walked
from the last to the first, as in the backward pass: kept activations shrink, gradients grow, and the peak is the
largest sum on the way, or at the loss, or before the first trained layer.

Shapes: an image has N tokens of width D at a block's input, M of them at its output; F is the MLP's width, H the heads.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae.errors import UserError
from mae.models.blocks import Block, CheckpointedBlock, faster_kernel
from mae.models.mae import MaskedAutoencoder, hidden_patches
from mae.runtime.memory import GIB

FLOAT = 4  # bytes

PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

# Left free of a device's memory: a share of it, and 1 GiB whatever its size.
SHARE = {"cuda": 0.1, "cpu": 0.3}

MEANT_FOR = {
    "cuda": "10 % for errors of the prediction and gaps in the allocator's memory, 1 GiB for CUDA and its libraries",
    "cpu": "30 % for holes in the C library's heap, 1 GiB for Python and its libraries",
}

MOST = 2**20  # images per device that are considered


class Footprint(NamedTuple):
    """Bytes on a device at the moment of the peak."""

    weights: int  # with buffers and, where there is one, their moving average
    gradients: int
    optimiser: int
    communication: int  # gradients in the buckets by which devices exchange them, instead of elsewhere
    images: int
    activations: int  # kept for the backward pass, weights cast to half precision among them
    transient: int  # of the layer that is computed at that moment

    @property
    def total(self) -> int:
        return sum(self)


class Layer(NamedTuple):
    """Bytes of one layer; those that depend on the batch are for one image."""

    kept: int  # from its forward to its backward pass
    extra: int  # in its backward pass at most, beyond what it and the layers before it keep
    passing: int = 0  # in its forward pass at most, where nothing is kept
    cast: int = 0  # of weights in half precision, whatever the batch
    gradients: int = 0  # of weights, whatever the batch

    @property
    def frozen(self) -> bool:
        """Whether the backward pass ends before this layer."""
        return not self.kept and not self.gradients


class Numerics(NamedTuple):
    """Precision, compilation and device, as far as memory depends on them."""

    half: int  # bytes in and out of matrix products; the residual stream and norms are float32
    dtype: torch.dtype  # of matrix products
    compiled: bool
    device: torch.device

    @property
    def mixed(self) -> bool:
        return self.half != FLOAT

    def cast(self, *modules: nn.Module) -> int:
        weights = [p.numel() for m in modules for p in m.parameters() if p.ndim > 1]
        return self.half * sum(weights) if self.mixed else 0


def numerics(precision: str | int, compiled: bool, device: str) -> Numerics:
    name = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}.get(str(precision), str(precision))
    if name not in PRECISIONS:
        raise UserError(f"--precision {precision}: memory is known for {', '.join(PRECISIONS)}")
    return Numerics(PRECISIONS[name].itemsize, PRECISIONS[name], compiled, torch.device(device))


def predicted_peak(
    network: nn.Module,
    image_shape: tuple[int, int, int],
    mask_ratio: float | None,
    batch: int,
    precision: str | int = "32-true",
    compiled: bool = False,
    device: str = "cuda",
    *,
    accumulated: bool = False,
    devices: int = 1,
    averaged: bool = False,
) -> Footprint:
    """The memory that a training step takes at its peak.

    Gradients of the previous step stay until the backward pass begins: Lightning drops them only then.

    Args:
        network: A MaskedAutoencoder or a classifier of this package, on any device, torch's meta device included.
        image_shape: (C, H, W).
        mask_ratio: Fraction of patches to hide; None: a classifier.
        batch: Images a device takes at once.
        precision: In Lightning's names: 32-true, bf16-mixed or 16-mixed.
        compiled: The blocks are compiled.
        device: "cuda" or "cpu", which have different attention kernels.
        accumulated: Gradients are summed over several such batches.
        devices: Number of devices; each has all weights, and two or more exchange their gradients.
        averaged: A moving average of the weights is kept.
    """
    how = numerics(precision, compiled, device)
    layers = list(layers_of(network, mask_ratio, how))
    parameters = list(network.parameters())
    weights = sum(t.numel() * t.element_size() for t in [*parameters, *network.buffers()]) * (2 if averaged else 1)
    trained = sum(layer.gradients for layer in layers)
    states = 1 if isinstance(getattr(network, "head", None), nn.Sequential) else 2  # LARS: momentum; AdamW: two moments
    images = FLOAT * math.prod(image_shape) * batch
    buckets = trained if devices > 1 else 0  # they are there all the time, and gradients are views of them

    def add_moment(activations: int, transient: int, gradients: int) -> None:
        own = 0 if buckets else gradients
        moments.append(Footprint(weights, own, states * trained, buckets, images, activations, transient))

    moments: list[Footprint] = []
    add_moment(0, 0, trained)  # the optimiser's step

    kept = 0
    for layer in layers:
        if layer.frozen:
            add_moment(kept, batch * layer.passing + layer.cast, trained)
        else:
            kept += batch * layer.kept + layer.cast
    add_moment(kept, batch * loss_bytes(network, mask_ratio, how), trained)
    gradients = trained if accumulated else 0
    for layer in reversed(layers):
        if not layer.frozen:
            gradients += 0 if accumulated else layer.gradients
            add_moment(kept, batch * layer.extra + (layer.gradients if buckets else 0), gradients)
            kept -= batch * layer.kept + layer.cast
    return max(moments, key=lambda footprint: footprint.total)


def largest_batch(
    network: nn.Module,
    image_shape: tuple[int, int, int],
    mask_ratio: float | None,
    memory_bytes: int,
    precision: str | int,
    compiled: bool,
    device: str = "cuda",
    **more: Any,
) -> int:
    """The largest batch per device whose predicted peak leaves the reserve free; 0 if not even one image does.

    Args:
        memory_bytes: All memory of the device.
        more: Keyword arguments of `predicted_peak`; the other arguments are as there.
    """

    def fits(batch: int) -> bool:
        peak = predicted_peak(network, image_shape, mask_ratio, batch, precision, compiled, device, **more)
        return peak.total <= usable(memory_bytes, device)

    low, high = 0, 1
    while high <= MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def reserve(memory_bytes: int, device: str) -> int:
    return int(memory_bytes * SHARE[device]) + GIB


def usable(memory_bytes: int, device: str) -> int:
    """A device's memory without the reserve; negative if the reserve is larger."""
    return memory_bytes - reserve(memory_bytes, device)


# ---- layers, in the order of the forward pass ------------------------------------------------------------------------


def layers_of(network: Any, mask_ratio: float | None, how: Numerics) -> Iterator[Layer]:
    return classifier_layers(network, how) if mask_ratio is None else autoencoder_layers(network, mask_ratio, how)


def autoencoder_layers(network: MaskedAutoencoder, mask_ratio: float, how: Numerics) -> Iterator[Layer]:
    encoder, patches, patch, dim = network.encoder, network.num_patches, network.patch_values, network.encoder.embed_dim
    hidden = hidden_patches(patches, mask_ratio)
    seen = patches - hidden
    # The convolution's weight is permuted for the linear layer, which is a copy.
    yield Layer(
        kept=seen * patch * how.half,
        extra=seen * dim * (FLOAT + how.half),
        cast=dim * patch * FLOAT + how.cast(encoder.patch_embed),
        gradients=trained_bytes(encoder.patch_embed) + dim * FLOAT,
    )
    encoded = patches if network.encoder_mask_tokens else seen
    for block in encoder.blocks:
        yield block_layer(block, 1 + encoded, 0, how, True)
    yield norm_layer(encoder.norm, 1 + encoded)
    embedding = linear_layer(network.decoder_embed, 1 + encoded, how)
    yield embedding._replace(gradients=embedding.gradients + FLOAT * network.mask_token.numel())
    *blocks, last = network.decoder_blocks
    for block in blocks:
        yield block_layer(block, 1 + patches, 0, how, True)
    predicted = patches if network.visible_loss_weight else hidden
    yield block_layer(last, 1 + patches, 0 if network.visible_loss_weight else 1 + seen, how, True)
    yield norm_layer(network.decoder_norm, predicted)
    yield linear_layer(network.decoder_pred, predicted, how)
    # The difference from the target; its square's derivative is a product of two tensors of that size.
    target = network.decoder_pred.out_features
    yield Layer(predicted * target * FLOAT, 2 * predicted * target * FLOAT)


def classifier_layers(network: VisionTransformer, how: Numerics) -> Iterator[Layer]:
    embed: Any = network.patch_embed
    tokens, dim = 1 + embed.num_patches, network.embed_dim
    trained, patch = embed.proj.weight.requires_grad, embed.proj.weight[0].numel()
    yield Layer(
        # Images in float32 are there anyway.
        kept=(tokens - 1) * patch * how.half * (trained and how.mixed),
        extra=2 * tokens * dim * FLOAT,
        passing=2 * tokens * dim * FLOAT,
        cast=how.cast(network.patch_embed),
        gradients=trained_bytes(network.patch_embed)
        + sum(FLOAT * p.numel() for p in network.parameters(recurse=False) if p.requires_grad),
    )
    below = trained
    for block in network.blocks:
        yield block_layer(block, tokens, 0, how, below)
        below = below or trained_bytes(block) > 0
    norm: Any = network.norm  # nn.Identity by mean pooling, whose norm, of one token, comes after it
    if isinstance(norm, nn.LayerNorm) and (below or norm.weight.requires_grad):
        layer = norm_layer(norm, tokens)
        # The head keeps a view of its output, and so all tokens; or else a copy in half precision.
        yield layer._replace(kept=layer.kept + tokens * dim * FLOAT * (not how.mixed))
    yield Layer(
        2 * dim * FLOAT,
        2 * dim * FLOAT,
        tokens * dim * FLOAT,
        how.cast(network.head),
        trained_bytes(network.fc_norm, network.head),
    )


def norm_layer(norm: Any, tokens: int) -> Layer:
    """Its output, if a matrix product keeps it, is counted by the next layer."""
    dim = norm.normalized_shape[0]
    return Layer(tokens * (dim + 2) * FLOAT, 2 * tokens * dim * FLOAT, gradients=trained_bytes(norm))


def linear_layer(linear: nn.Linear, tokens: int, how: Numerics) -> Layer:
    grad = linear.out_features * (how.half + (FLOAT if how.mixed else 0))
    extra = tokens * (grad + linear.in_features * how.half)
    return Layer(tokens * linear.in_features * how.half, extra, 0, how.cast(linear), trained_bytes(linear))


def block_layer(block: Any, n: int, first: int, how: Numerics, below: bool) -> Layer:
    """A block that takes n tokens and returns those from `first` on.

    Args:
        below: Layers before it are trained, so that its input has a gradient.
    """
    m, d, f, h = n - first, block.norm1.normalized_shape[0], block.mlp.fc1.out_features, block.attn.num_heads
    half, gradients = how.half, trained_bytes(block)
    kernel = Block.kernel or faster_kernel(how.device, how.dtype, n)
    plain = kernel == "plain"

    inputs = n * (d + 2) * FLOAT  # of the norm, which are the residual, with mean and deviation
    normed = (n + (m if first else 0)) * d * half  # into qkv: of all tokens, and of those that ask
    qkv, out = (m + 2 * n) * d * half, m * d * half
    weights = h * m * n * half if plain else h * m * FLOAT  # of attention, or the logarithms of their sums
    attention = inputs + normed + qkv + weights + out
    residual = m * (d * (half if how.compiled else FLOAT) + 2 * FLOAT)
    mlp = residual + m * (d + 2 * f) * half  # with the inputs of fc1, of GELU and of fc2
    kept = attention + mlp

    grad = m * d * FLOAT  # of the block's output: it stays for the residual
    in_mlp = grad + m * (f + (d if how.mixed else 0)) * half  # fc2 gives GELU's gradient, all else still being kept
    in_attention = grad + out + (2 * weights + qkv if plain else 2 * qkv) - mlp
    extra = max(in_mlp, in_attention)
    passing = n * d * FLOAT + m * (d * (FLOAT + FLOAT + (half if how.mixed else 0)) + 2 * f * half)
    cast = how.cast(block)
    if not below and not gradients:
        return Layer(0, 0, passing, cast, 0)
    if not below and not trained_bytes(block.norm1, block.attn):
        kept = mlp  # half a block is trained
    if isinstance(block, CheckpointedBlock):
        kept, extra = n * d * FLOAT, kept - n * d * FLOAT + extra
    return Layer(kept, extra, passing, cast, gradients)


def loss_bytes(network: Any, mask_ratio: float | None, how: Numerics) -> int:
    """Bytes an image at the end of the forward pass, beyond what is kept: of pre-training's loss."""
    if mask_ratio is None:
        return 0
    hidden = hidden_patches(network.num_patches, mask_ratio)
    predicted = network.num_patches if network.visible_loss_weight else hidden
    encoded = network.num_patches - (0 if network.encoder_mask_tokens else hidden)
    # All patches, the target and the squares in float32, the prediction in half precision.
    images = network.num_patches * network.patch_values * FLOAT
    target = (2 * predicted * FLOAT + predicted * how.half) * network.decoder_pred.out_features
    latent = (1 + encoded) * network.encoder.embed_dim * FLOAT * how.mixed
    return int(images + target + latent)


def trained_bytes(*modules: nn.Module) -> int:
    return sum(FLOAT * p.numel() for module in modules for p in module.parameters() if p.requires_grad)
