"""How many images a step has, and how long the device waits for them."""

import time
from typing import Any

import torch
from lightning.pytorch import Trainer

from mae.errors import UserError
from mae.runtime.device_clock import Clock, idle


def images_per_device(trainer: Trainer, data: Any = None) -> int:
    """Images of a micro-batch on one device, by the data module, the DataLoader or the module.

    Args:
        data: The data module, where the trainer has none yet.

    Raises:
        UserError: None of them says it.
    """
    data = data or trainer.datamodule  # type: ignore[attr-defined]
    module = trainer.lightning_module
    loader = trainer.train_dataloader
    size = getattr(data, "batch_size", None) or getattr(module, "batch_size_per_device", None)
    size = size or getattr(loader, "batch_size", None)
    size = size or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if not isinstance(size, int):
        raise UserError(
            "the training DataLoader does not say its batch size, which the learning rate is scaled by: set "
            "`module.batch_size_per_device = N` before trainer.fit"
        )
    return size


def images_per_step(trainer: Trainer, data: Any = None) -> int:
    """The global batch: images of an optimiser step, over all devices and accumulated micro-batches."""
    return images_per_device(trainer, data) * trainer.accumulate_grad_batches * trainer.world_size


DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}  # by the beginning of a precision's name


def product_dtype(trainer: Trainer) -> torch.dtype:
    """The type of a step's matrix products, by the precision of the run."""
    return next((t for key, t in DTYPES.items() if str(trainer.precision).startswith(key)), torch.float32)


class DataWait:
    """Measures how long the device has had nothing to do for want of a batch, without making it wait.

    For each batch `batch_wanted`, `batch_came` and `batch_done` are called, in this order.
    """

    def __init__(self, device: torch.device) -> None:
        self.clock = Clock(device)
        self.waits: list[tuple[float, float]] = []
        self.marks: list[Any] = []
        self.wanted_at: float | None = None

    def batch_wanted(self) -> None:
        self.wanted_at = time.perf_counter()

    def batch_came(self) -> None:
        if self.wanted_at is not None:
            self.waits.append((self.wanted_at, time.perf_counter()))
            self.marks.append(self.before)
            self.wanted_at = None

    def batch_done(self) -> None:
        """The device has been given all of a batch's work."""
        self.before = self.clock.mark()

    def seconds(self) -> float:
        """The sum over all batches."""
        return sum(idle(self.clock.times(self.marks), self.waits))
