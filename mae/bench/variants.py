"""Who takes part in `mae bench step`: our network in several forms and Hugging Face's, each with its training step."""

import gc
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from mae.bench.plain_models import MaskTokenEncoder, Plain
from mae.errors import UserError
from mae.models import compilation
from mae.models.blocks import kernel
from mae.models.flops import training_flops
from mae.models.mae import SIZES, MaskedAutoencoder
from mae.runtime import memory
from mae.training import optim

OTHERS = ("plain", "hf-eager", "hf-sdpa")

COMPILED = "-compiled"  # behind the name of one of ours

MASK_RATIO = 0.75

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Setting(NamedTuple):
    """What all contenders have in common; plain values, for other processes."""

    size: str
    image_size: int
    patch_size: int
    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int
    batch: int
    dtype: str
    device: str


class Contender:
    """A network and its training step: forward, backward, AdamW, gradients forgotten, on a batch of random images.

    Args:
        name: `ours`, `ours-depth-1` (a decoder of one block) or `mask-tokens` (the ablation), each with `-compiled` or
            without; or among `OTHERS`.

    Raises:
        UserError: A network that cannot be, or that cannot be compiled here.
    """

    def __init__(self, name: str, setting: Setting):
        self.name, self.setting = name, setting
        self.device, self.dtype = torch.device(setting.device), DTYPES[setting.dtype]
        torch.manual_seed(0)
        kind = name.removesuffix(COMPILED)
        with self.device:
            self.network = build(kind, setting).train()
            self.images = torch.randn(setting.batch, *self.image_shape)
        self.trainable = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer: AdamW
        if kind in OTHERS:
            self.optimizer = AdamW(self.trainable)  # as torch has it by default
        else:
            self.optimizer = optim.adamw(self.network, lr=1.5e-4, weight_decay=0.05, betas=(0.9, 0.95))
        # A scale that does not overflow at first: a step that the scaler leaves out would be too fast.
        scaled = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=1024.0, enabled=scaled)
        if name.endswith(COMPILED) and (why := compilation.attempt(self.network, self.step)):
            raise UserError(f"{name}: {why}; --compile false measures without")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.setting.image_size, self.setting.image_size

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.trainable)

    def step(self) -> None:
        with kernel("plain" if self.name == "plain" else None):
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss: Tensor = self.network(self.images).loss
            self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def flops(self) -> int:
        """Of a training step, per image: those that this network executes."""
        return training_flops(self.network, lambda network, images: network(images).loss, *self.image_shape)


def build(kind: str, setting: Setting) -> nn.Module:
    """A network with new weights.

    Raises:
        UserError: Its widths, heads or patches do not go together.
    """
    if kind.startswith("hf-"):
        return hugging_face(setting, kind.removeprefix("hf-"))
    classes = {"plain": Plain, "mask-tokens": MaskTokenEncoder}
    try:
        return classes.get(kind, MaskedAutoencoder)(
            image_size=setting.image_size,
            patch_size=setting.patch_size,
            **SIZES[setting.size]._asdict(),
            decoder_embed_dim=setting.decoder_embed_dim,
            decoder_depth=1 if kind == "ours-depth-1" else setting.decoder_depth,
            decoder_num_heads=setting.decoder_num_heads,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def hugging_face(setting: Setting, attention: str) -> nn.Module:
    """ViTMAEForPreTraining of the same shape. Its new position embeddings are zeros: the same work as any others, but
    nothing to compare the result of training with."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    size = SIZES[setting.size]
    settings: dict[str, Any] = dict(
        image_size=setting.image_size,
        patch_size=setting.patch_size,
        num_channels=3,
        hidden_size=size.embed_dim,
        num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads,
        intermediate_size=4 * size.embed_dim,
        decoder_hidden_size=setting.decoder_embed_dim,
        decoder_num_hidden_layers=setting.decoder_depth,
        decoder_num_attention_heads=setting.decoder_num_heads,
        decoder_intermediate_size=4 * setting.decoder_embed_dim,
        layer_norm_eps=1e-6,
        mask_ratio=MASK_RATIO,
        norm_pix_loss=True,
        attn_implementation=attention,
    )
    network: nn.Module = ViTMAEForPreTraining(ViTMAEConfig(**settings))
    return network


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch computes with so many, and compiles for so many: from its cache it might take programs for others."""
    import torch._inductor.config as inductor

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with inductor.patch({"cpp.threads": count}):
            yield
    finally:
        torch.set_num_threads(before)


def forget() -> None:
    """Networks that are gone leave neither memory nor compiled programs."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory(name: str, setting: Setting, count: int) -> int | None:
    """Bytes that a process of its own takes for a contender; None: the system does not tell.

    Raises:
        UserError: There is not so much memory.
    """
    context = get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=report_growth, args=(there, name, setting, count))
    process.start()
    there.close()
    try:
        found: int | UserError | None = here.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:  # so the system ends what is too large
            raise too_large(name, setting) from None
        raise RuntimeError(f"{name}: the process that measures memory ended with {process.exitcode}") from None
    finally:
        here.close()
        process.join()
    if isinstance(found, UserError):
        raise found
    return found


def report_growth(pipe: Connection, name: str, setting: Setting, count: int) -> None:
    try:
        pipe.send(growth(name, setting, count))
    except UserError as error:
        pipe.send(error)


def growth(name: str, setting: Setting, count: int) -> int | None:
    """Bytes at most in two steps, over what this process had before.

    A step of a small network comes first: what libraries take once is not the network's.
    """
    device = torch.device(setting.device)
    with threads(count), enough_memory(name, setting):
        Contender(name, setting._replace(size="nano", decoder_depth=1, batch=1)).step()
        forget()
        memory.keep_freed_memory()  # from here on: that of the small network went back to the system
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else memory.resident()
        memory.reset_peak(device)
        contender = Contender(name, setting)
        for _ in range(2):
            contender.step()
        peak = memory.peak(device)
        return peak - before if peak else None


@contextmanager
def enough_memory(name: str, setting: Setting) -> Iterator[None]:
    """Raises:
    UserError: In place of an error that tells of too little memory.
    """
    try:
        yield
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        raise too_large(name, setting) from None


def too_large(name: str, setting: Setting) -> UserError:
    return UserError(
        f"{name}, {setting.size}, {setting.dtype}: out of memory at --batch {setting.batch}; a smaller one, or fewer "
        "contenders (--against, --compile): all that are compared are in memory at once"
    )
