"""The linear probe (arXiv:2111.06377, Sec. 4.1, A.1)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from mae.classify import Classify
from mae.errors import UserError
from mae.models.mae import Pair
from mae.models.vit import Head, Pool, frozen_features
from mae.options import check_ranges
from mae.training.optim import lars
from mae.training.recipe_audit import ExpectedGroups
from mae.training.throughput import images_per_device

# How far the weight of the linear layer should be able to move, in multiples of its norm; below it the recipe warns.
MIN_REACH = 20


class LinearProbe(Classify):
    """Linear probe (Table 10): BatchNorm without affine and a linear layer on frozen features, trained with LARS.

    Args:
        encoder: What to probe: a run folder or file, official, timm's, Hugging Face's; `scratch`: random weights.
        pool: Feature: the class token after the encoder's final norm (as published), or the mean of patch tokens.
        base_lr: Peak learning rate for 256 images an optimiser step; scaled linearly with the global batch.
        momentum: Of LARS.
        trust_coefficient: Of LARS.
        warmup_epochs: Linear warm-up from 0, in epochs; may be fractional.
        min_lr: Learning rate at the end of the cosine.
        size: Encoder, as in pre-training; only needed with `scratch`, else it must agree with the encoder.
        patch_size: Pixels, a side or [height, width]; as size.
        embed_dim: Encoder width, where it differs from that of `size`.
        depth: Encoder blocks, where they differ from those of `size`.
        num_heads: Encoder attention heads, where they differ from those of `size`.
        allow_finetuned: Probe the encoder of a classifier, too.
        image_size: Of the data; set by it.
        in_chans: Of the data; set by it.
        classes: Names of the classes; of the data, set by it.
        mean: Of each channel in [0, 1], by which a plain DataLoader's integer images are normalised; set by the data.
        std: As mean.
        seed: Follows seed_everything.
    """

    head: Head = "batchnorm"
    recipe_keys = ("encoder", "pool", "momentum", "trust_coefficient")

    def __init__(
        self,
        encoder: str,
        pool: Pool = "class",
        base_lr: float = 0.1,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        warmup_epochs: float = 10,
        min_lr: float = 0.0,
        size: str | None = None,
        patch_size: int | Pair | None = None,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        allow_finetuned: bool = False,
        image_size: int | Pair = 224,
        in_chans: int = 3,
        classes: list[str] = [],  # noqa: B006  # never changed; a parser shows it
        mean: list[float] | None = None,
        std: list[float] | None = None,
        seed: int = 0,
    ):
        super().__init__(base_lr, 0.0, warmup_epochs, min_lr, seed, mean=mean, std=std)
        check_ranges("model", "[0, 1)", momentum=momentum)
        check_ranges("model", "(0, inf)", trust_coefficient=trust_coefficient)
        self.momentum, self.trust_coefficient = momentum, trust_coefficient
        overrides = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
        self.make_network(encoder, pool, classes, image_size, in_chans, size, overrides, allow_finetuned)
        self.model.requires_grad_(False)
        self.model.head.requires_grad_(True)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            raise UserError("--trainer.strategy fsdp2: the probe trains one linear layer, which is small; use ddp")

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        self.model.eval()
        self.model.head.train(mode)
        return self

    def on_fit_start(self) -> None:
        if images_per_device(self.trainer) < 2:
            raise UserError("--data.batch_size_per_device 1: BatchNorm needs at least 2 images")
        super().on_fit_start()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = self.to_batch(batch, batch_idx)
        logits = self.model.head(frozen_features(self.model, batch.images))
        return self.mean_loss(F.cross_entropy(logits.float(), batch.labels, reduction="none"), batch)

    def make_optimizer(self, lr: float) -> Optimizer:
        return lars(self.model.head, lr, self.momentum, self.trust_coefficient)

    def expected_groups(self) -> ExpectedGroups:
        return ExpectedGroups(trust_ratio=True)

    def recipe_notes(self) -> dict[str, str]:
        # In each step LARS moves the weight by a share of its norm, lr x trust coefficient / (1 - momentum). A run on
        # few images has too few steps to get far at the rate of the ImageNet recipe, where the shares add up to 220.
        shares = sum(self.schedule.lr_at(step, self.peak_lr) for step in range(self.total_steps))
        reach = shares * self.trust_coefficient / (1 - self.momentum)
        text = f"the weight can move by {reach:.3g} times its norm in all"
        if reach < MIN_REACH:
            text += (
                f", which is little: a larger --model.base_lr suits so few images (x {MIN_REACH / reach:.0f} or more)"
            )
        return super().recipe_notes() | {"LARS": text}
