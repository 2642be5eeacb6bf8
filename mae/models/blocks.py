"""Transformer blocks: timm's parameters under timm's names, with a forward pass that can skip unwanted tokens.

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


# Up to this many tokens torch's fused kernel is slower on CPUs in float32 than two matrix products (measured at 17 to
# 197 tokens).
PLAIN_TOKENS = 80


@cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 matrix products (AVX-512 BF16 or AMX); others emulate them."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def faster_kernel(device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel:
    """The faster way to compute attention over this many tokens; both give the same result up to rounding.

    On GPUs the fused kernel is faster: it never writes the (N, N) weights to memory. On CPUs it is faster in float32
    from some length on; in bfloat16 it is slower at every length if the CPU has bfloat16 matrix products.
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
    """timm's block, with the faster attention kernel in training and the option to compute only the last tokens.

    `compile()` takes effect in training only: without gradients or in eval mode a block runs uncompiled, as held-out
    batches come in other sizes and each would be compiled anew.

    Attributes:
        kernel: The attention kernel of all blocks. None: the faster one in training; in eval mode the fused one, which
            timm uses, so that results equal timm's.
    """

    kernel: ClassVar[Kernel | None] = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            kwargs["scales"] = self.branch_scales(x)
            if torch.is_grad_enabled():
                return super().__call__(x, *args, **kwargs)
        return self._call_impl(x, *args, **kwargs)

    def branch_scales(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The factors of drop path for the two branches, (B, 1, 1) each: 0, or 1 / (1 - rate) for kept images.

        They are drawn here and not in `forward`, which would otherwise be compiled anew for the rate of each block.
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
        """(B, N, D) -> (B, N - first, D): the tokens from `first` on, which still attend to all N.

        Args:
            scales: Factors of the two branches, (B, 1, 1) each; None means 1.
        """
        assert attn_mask is None
        assert not is_causal
        branch = self.ls1(self.attention(self.norm1(x), first))
        x = x[:, first:] + (branch if scales is None else branch * scales[0])
        branch = self.ls2(self.mlp(self.norm2(x)))
        return x + (branch if scales is None else branch * scales[1])

    def attention(self, x: Tensor, first: int) -> Tensor:
        """(B, N, D) -> (B, N - first, D)"""
        b, n, d = x.shape
        attn: Any = self.attn
        if first:
            # Queries of the tokens from `first` on, keys and values of all: rows of the same weight matrix.
            weight, bias = attn.qkv.weight, attn.qkv.bias
            q = F.linear(x[:, first:], weight[:d], bias[:d]).reshape(b, n - first, 1, attn.num_heads, -1)
            kv = F.linear(x, weight[d:], bias[d:]).reshape(b, n, 2, attn.num_heads, -1)
            (q,), (k, v) = q.permute(2, 0, 3, 1, 4), kv.permute(2, 0, 3, 1, 4)
        else:
            q, k, v = attn.qkv(x).reshape(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        # q: (B, H, N - first, D / H); k, v: (B, H, N, D / H)
        kernel = self.kernel or (faster_kernel(x.device, q.dtype, n) if self.training else "fused")
        out: Tensor = attn.proj(attend(q, k, v, kernel).transpose(1, 2).reshape(b, n - first, d))
        return out


class CheckpointedBlock(Block):
    """A block that recomputes its activations in the backward pass instead of keeping them: less memory, same bits.

    The checkpoint is inside `forward`, so that hooks on the block, such as FSDP's, surround both computations.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.training and torch.is_grad_enabled():
            # Drop path was drawn in `__call__`, so both computations drop the same branches.
            out: Tensor = checkpoint(super().forward, x, *args, use_reentrant=False, **kwargs)
        else:
            out = super().forward(x, *args, **kwargs)
        return out


@contextmanager
def kernel(name: Kernel | None) -> Iterator[None]:
    """Use this attention kernel in all blocks; None restores the default of `Block.kernel`."""
    before, Block.kernel = Block.kernel, name
    try:
        yield
    finally:
        Block.kernel = before
