"""Transformer blocks: timm's parameters under timm's names, in a forward pass that leaves out what nobody asks for.

Shapes: B images, N tokens, D width, H heads of D / H values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, Literal

import timm.models.vision_transformer as timm_vit
import torch
import torch.nn.functional as F
from timm.layers import drop_path
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Kernel = Literal["fused", "plain"]


# On CPUs torch's fused kernel is slower than two matrix products up to here, in float32: measured at 17 to 197 tokens.
PLAIN_TOKENS = 80


@cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 by itself (AVX-512 BF16 or AMX); others go a long way round."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def faster_kernel(device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel:
    """How attention over so many tokens is computed: the result is the same, to rounding.

    On GPUs fused: it never writes the (N, N) weights to memory. On CPUs that gain begins at some length, in float32; in
    bfloat16 torch's kernel is slower at every length where the CPU has such products.
    """
    if device.type != "cpu":
        return "fused"
    if dtype in (torch.bfloat16, torch.float16):
        return "plain" if cpu_has_bfloat16() else "fused"
    return "plain" if tokens <= PLAIN_TOKENS else "fused"


def attend(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, for (B, H, Q, d) queries over (B, H, N, d) keys and values: (B, H, Q, d)."""
    if kernel == "fused":
        return F.scaled_dot_product_attention(q, k, v)
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


class Block(timm_vit.Block):
    """timm's block, in training with its attention by the faster kernel, and only for the tokens that are wanted.

    `compile()` is for training: without gradients, or in eval mode, a block computes as it is written. Held-out images
    come in other batches, and each would be compiled for anew.

    Attributes:
        kernel: Of all blocks; None: in training the faster one, in eval mode timm's own, whose results are then timm's.
    """

    kernel: ClassVar[Kernel | None] = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            kwargs["scales"] = self.branch_scales(x)
            if torch.is_grad_enabled():
                return super().__call__(x, *args, **kwargs)
        return self._call_impl(x, *args, **kwargs)

    def branch_scales(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """What drop path multiplies the two branches of each image with, (B, 1, 1) each: 0, or 1 over the rest.

        Drawn here, not in `forward`: each block has another rate, and would be compiled anew for it.
        """
        rate = getattr(self.drop_path1, "drop_prob", 0.0)
        if not rate:
            return None
        first, second = (drop_path(x.new_ones(len(x), 1, 1), rate, training=True) for _ in range(2))
        return first, second

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        first: int = 0,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, N, D) -> (B, N - first, D): the tokens from `first` on, which still see those before them.

        Args:
            scales: Of the two branches, (B, 1, 1) each; None: 1.
        """
        assert attn_mask is None
        assert not is_causal
        branch = self.ls1(self.attention(self.norm1(x), first))
        x = x[:, first:] + (branch if scales is None else branch * scales[0])
        branch = self.ls2(self.mlp(self.norm2(x)))
        return x + (branch if scales is None else branch * scales[1])

    def attention(self, x: Tensor, first: int) -> Tensor:
        b, n, d = x.shape
        attn: Any = self.attn
        if first:
            # The rows of one matrix: queries of some tokens, keys and values of all.
            weight, bias = attn.qkv.weight, attn.qkv.bias
            q = F.linear(x[:, first:], weight[:d], bias[:d]).reshape(b, n - first, 1, attn.num_heads, -1)
            kv = F.linear(x, weight[d:], bias[d:]).reshape(b, n, 2, attn.num_heads, -1)
            (q,), (k, v) = q.permute(2, 0, 3, 1, 4), kv.permute(2, 0, 3, 1, 4)
        else:
            q, k, v = attn.qkv(x).reshape(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        own = faster_kernel(x.device, q.dtype, n) if self.training else "fused"
        out: Tensor = attn.proj(attend(q, k, v, self.kernel or own).transpose(1, 2).reshape(b, n - first, d))
        return out


class CheckpointedBlock(Block):
    """With its activations computed again in the backward pass instead of kept: less memory, same bits.

    Inside `forward`, so that what others hook to the block, as FSDP does, stays around both computations.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.training and torch.is_grad_enabled():
            # Drop path has drawn before, in `__call__`: both computations drop the same branches.
            out: Tensor = checkpoint(super().forward, x, *args, use_reentrant=False, **kwargs)
        else:
            out = super().forward(x, *args, **kwargs)
        return out


@contextmanager
def kernel(name: Kernel | None) -> Iterator[None]:
    """Attention of all blocks by this kernel; None: as in training and eval mode it is."""
    before, Block.kernel = Block.kernel, name
    try:
        yield
    finally:
        Block.kernel = before
