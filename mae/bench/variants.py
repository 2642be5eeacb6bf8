"""The networks that `mae bench step` trains: ours in several forms and Hugging Face's, each with its training step."""

import gc
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from mae.bench.figures import torch_threads
from mae.bench.plain_models import Plain
from mae.errors import UserError
from mae.models import compilation
from mae.models.blocks import kernel
from mae.models.flops import training_flops
from mae.models.mae import SIZES, MaskedAutoencoder, hidden_patches
from mae.runtime import memory
from mae.runtime.fresh_process import ProcessEnded, call_in_fresh_process
from mae.training import optim

PEERS = ("plain", "hf-eager", "hf-sdpa")  # what ours is compared with

COMPILED = "-compiled"  # the end of the name of one of ours

MASK_RATIO = 0.75

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Setting(NamedTuple):
    """What all variants have in common; plain values, so that it can be sent to other processes."""

    size: str
    image_size: int
    patch_size: int
    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int
    batch: int
    dtype: str
    device: str
    mask_ratio: float = MASK_RATIO
    depth: int | None = None  # encoder blocks; None: as the size has

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def visible(self) -> int:
        return self.patches - hidden_patches(self.patches, self.mask_ratio)


class Variant:
    """A network and its training step (forward, backward, AdamW, gradients dropped) on a batch of random images.

    Args:
        name: `ours`, `ours-depth-1` (a decoder of one block) or `mask-tokens` (the ablation), each with or without
            `-compiled`; or one of `PEERS`.

    Raises:
        UserError: The network cannot be built, or cannot be compiled here.
    """

    def __init__(self, name: str, setting: Setting):
        self.name, self.setting = name, setting
        self.device, self.dtype = torch.device(setting.device), DTYPES[setting.dtype]
        torch.manual_seed(0)
        base_name = name.removesuffix(COMPILED)
        with self.device:
            self.network = build_network(base_name, setting).train()
            self.images = torch.randn(setting.batch, 3, setting.image_size, setting.image_size)
        # Hugging Face's network has its ratio from its config.
        self.arguments = {} if name.startswith("hf-") else {"mask_ratio": setting.mask_ratio}
        self.trainable = [p for p in self.network.parameters() if p.requires_grad]
        if base_name in PEERS:
            self.optimizer = AdamW(self.trainable)  # with torch's defaults
        else:
            self.optimizer = optim.adamw(self.network, lr=1.5e-4, weight_decay=0.05, betas=(0.9, 0.95))
        # The first scale must not overflow: a step that the scaler skips would be too fast.
        scaled = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=1024.0, enabled=scaled)
        if name.endswith(COMPILED) and (reason := compilation.attempt(self.network, self.step)):
            raise UserError(f"{name}: {reason}; --compile false measures without")

    @property
    def parameters(self) -> int:
        """The number of trained parameters."""
        return sum(p.numel() for p in self.trainable)

    def step(self) -> None:
        with kernel("plain" if self.name == "plain" else None):
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss: Tensor = self.network(self.images, **self.arguments).loss
            self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def flops(self) -> int:
        """FLOPs of a training step per image, as this network executes them."""
        loss = lambda network, images: network(images, **self.arguments).loss  # noqa: E731
        return training_flops(self.network, loss, *self.images.shape[1:])


def build_network(name: str, setting: Setting) -> nn.Module:
    """A network with new weights.

    Raises:
        UserError: Its widths, heads or patches do not fit together.
    """
    if name.startswith("hf-"):
        return hugging_face(setting, name.removeprefix("hf-"))
    size = SIZES[setting.size]
    try:
        return (Plain if name == "plain" else MaskedAutoencoder)(
            image_size=setting.image_size,
            patch_size=setting.patch_size,
            **size._replace(depth=setting.depth or size.depth)._asdict(),
            decoder_embed_dim=setting.decoder_embed_dim,
            decoder_depth=1 if name == "ours-depth-1" else setting.decoder_depth,
            decoder_num_heads=setting.decoder_num_heads,
            encoder_mask_tokens=name == "mask-tokens",  # Table 1c, Table 2
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def hugging_face(setting: Setting, attention: str) -> nn.Module:
    """ViTMAEForPreTraining of the same shape.

    Its new position embeddings are zeros: the work is the same, but what it learns must not be compared.
    """
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    size = SIZES[setting.size]
    settings: dict[str, Any] = dict(
        image_size=setting.image_size,
        patch_size=setting.patch_size,
        num_channels=3,
        hidden_size=size.embed_dim,
        num_hidden_layers=setting.depth or size.depth,
        num_attention_heads=size.num_heads,
        intermediate_size=4 * size.embed_dim,
        decoder_hidden_size=setting.decoder_embed_dim,
        decoder_num_hidden_layers=setting.decoder_depth,
        decoder_num_attention_heads=setting.decoder_num_heads,
        decoder_intermediate_size=4 * setting.decoder_embed_dim,
        layer_norm_eps=1e-6,
        mask_ratio=setting.mask_ratio,
        norm_pix_loss=True,
        attn_implementation=attention,
    )
    network: nn.Module = ViTMAEForPreTraining(ViTMAEConfig(**settings))
    return network


def forget_networks() -> None:
    """Free the memory and the compiled programs of networks that are no longer used."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory(name: str, setting: Setting, count: int) -> int | None:
    """Bytes that a variant takes in a process of its own with `count` threads; None where the system does not say.

    Raises:
        UserError: The memory does not suffice.
    """
    try:
        return call_in_fresh_process(memory_growth, name, setting, count)
    except ProcessEnded as error:
        if error.exit_code == -signal.SIGKILL:  # Linux ends processes that take too much in this way
            raise out_of_memory_error(name, setting) from None
        raise


def memory_growth(name: str, setting: Setting, count: int) -> int | None:
    """The peak of two steps in bytes, less what this process had before.

    A step of a small network comes first: what libraries allocate once does not belong to the network.
    """
    device = torch.device(setting.device)
    with torch_threads(count), enough_memory(name, setting):
        Variant(name, setting._replace(size="nano", depth=None, decoder_depth=1, batch=1)).step()
        forget_networks()
        memory.keep_freed_memory()  # only from here on, so that the small network's memory went back to the system
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else memory.resident()
        memory.reset_peak(device)
        variant = Variant(name, setting)
        for _ in range(2):
            variant.step()
        peak = memory.peak(device)
        return peak - before if peak else None


@contextmanager
def enough_memory(name: str, setting: Setting) -> Iterator[None]:
    """Raises:
    UserError: In place of any error that reports too little memory.
    """
    try:
        yield
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        raise out_of_memory_error(name, setting) from None


def out_of_memory_error(name: str, setting: Setting) -> UserError:
    return UserError(
        f"{name}, {setting.size}, {setting.dtype}: out of memory at --batch {setting.batch}; take a smaller one, or "
        "fewer variants (--against, --compile, --sweep): all that are compared are in memory at once"
    )
