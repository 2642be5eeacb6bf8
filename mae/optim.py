"""Learning rate, schedule and parameter groups of the paper's recipes (Tables 8 to 10)."""

import math

from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler


def scaled_lr(base_lr: float, images_per_step: int) -> float:
    """The linear scaling rule (Sec. A.1): recipes give learning rates for 256 images."""
    return base_lr * images_per_step / 256


def adamw(model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]) -> AdamW:
    """AdamW as in pre-training: biases and norms are not decayed; class and mask token are, as in the reference."""
    return AdamW(param_groups_weight_decay(model, weight_decay), lr=lr, betas=betas)


class WarmupCosine(LRScheduler):
    """Linear warm-up from 0, then half a cosine down to `min_lr`; to be stepped once an optimiser step.

    Args:
        optimizer: Its groups' `lr` are the peaks.
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
        return [self.lr_at(self.last_epoch, float(peak)) for peak in self.base_lrs]

    def lr_at(self, step: int, peak: float) -> float:
        """The learning rate of the optimiser step number `step`, counted from 0."""
        whole, rest = divmod(step, self.steps_per_epoch)
        epoch = rest / self.steps_per_epoch + whole  # in the reference's order of operations, to the last bit
        if epoch < self.warmup_epochs:
            return peak * epoch / self.warmup_epochs
        progress = min((epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs), 1.0)
        return self.min_lr + (peak - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
