"""Learning rate, schedule, parameter groups and optimisers of the paper's recipes (Tables 8 to 11)."""

import math
from collections.abc import Collection

from timm.models.vision_transformer import VisionTransformer
from timm.optim import Lars, param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler


def scaled_lr(base_lr: float, images_per_step: int) -> float:
    """The linear scaling rule (Sec. A.1): recipes give learning rates for 256 images."""
    return base_lr * images_per_step / 256


def adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    fused: bool = True,
    undecayed: Collection[str] = (),
) -> AdamW:
    """AdamW as in pre-training: biases and norms are not decayed; class and mask token are, as in the reference.

    Args:
        fused: All parameters in one kernel; the same rule, rounded differently.
        undecayed: Names of further parameters without weight decay.
    """
    return AdamW(
        param_groups_weight_decay(model, weight_decay, no_weight_decay_list=undecayed), lr=lr, betas=betas, fused=fused
    )


def adamw_by_layer(
    model: VisionTransformer,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    layer_decay: float,
    fused: bool = True,
) -> AdamW:
    """AdamW as in fine-tuning a timm ViT: each layer's rate is `layer_decay` times that of the one above (Sec. A.1).

    The stem (patch embedding, class token, positions) is layer 0, block i is layer i + 1, final norm and head are the
    top, at scale 1. Biases, norms, class token and positions are not decayed. Each group carries its `lr_scale`, which
    `WarmupCosine` multiplies into the rate: timm stores it, and no scheduler of torch reads it.
    """
    undecayed = model.no_weight_decay()  # class token, positions; registers, where there are some
    groups = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=undecayed, layer_decay=layer_decay)
    return AdamW(groups, lr=lr, betas=betas, fused=fused)


def lars(head: nn.Module, lr: float, momentum: float = 0.9, trust_coefficient: float = 0.001) -> Lars:
    """LARS as in the linear probe: the trust ratio scales matrices, not biases; no weight decay (Table 10).

    timm's rule equals the reference's where the groups say so; its default applies no trust ratio without weight decay.
    """
    matrices = [p for p in head.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in head.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "always_adapt": True}, {"params": others, "always_adapt": False}]
    return Lars(groups, lr=lr, momentum=momentum, weight_decay=0.0, trust_coeff=trust_coefficient)


class WarmupCosine(LRScheduler):
    """Linear warm-up from 0, then half a cosine down to `min_lr`; to be stepped once an optimiser step.

    Args:
        optimizer: Its groups' `lr` are the peaks; a group's `lr_scale` multiplies its whole schedule, min_lr included.
        steps_per_epoch: Optimiser steps an epoch.
        epochs: Length of the run, warm-up included; may be fractional.
        warmup_epochs: Length of the warm-up; may be fractional.
        min_lr: The rate at the end of the last step.
    """

    def __init__(
        self, optimizer: Optimizer, steps_per_epoch: int, epochs: float, warmup_epochs: float, min_lr: float = 0.0
    ):
        self.steps_per_epoch = steps_per_epoch
        self.epochs = epochs
        self.warmup_epochs = warmup_epochs
        self.min_lr = min_lr
        super().__init__(optimizer)

    def state_dict(self) -> dict[str, int]:
        """The place alone: peak and length are settings, and those of a resumed run count."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def get_lr(self) -> list[float]:  # type: ignore[override]
        return self.rates_at(self.last_epoch)

    def rates_at(self, step: int) -> list[float]:
        """Each group's rate in the optimiser step number `step`, counted from 0."""
        scales = [group.get("lr_scale", 1.0) for group in self.optimizer.param_groups]
        return [self.lr_at(step, float(peak)) * scale for peak, scale in zip(self.base_lrs, scales, strict=True)]

    def peaks(self) -> list[float]:
        """Each group's rate in the first step after the warm-up."""
        return self.rates_at(math.ceil(self.warmup_epochs * self.steps_per_epoch))

    def lr_at(self, step: int, peak: float) -> float:
        """The unscaled rate of the optimiser step number `step`."""
        whole, rest = divmod(step, self.steps_per_epoch)
        epoch = rest / self.steps_per_epoch + whole  # in the reference's order of operations, to the last bit
        if epoch < self.warmup_epochs:
            return peak * epoch / self.warmup_epochs
        after = self.epochs - self.warmup_epochs  # nothing, where a run is its warm-up
        progress = min((epoch - self.warmup_epochs) / after, 1.0) if after > 0 else 1.0
        return self.min_lr + (peak - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
