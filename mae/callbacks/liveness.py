"""A callback that keeps the run lock and the watchdog informed."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment

from mae.data.datasets import images_under_way
from mae.runtime.run_lock import RunLock
from mae.runtime.watchdog import Watchdog, beat


class Alive(Callback):
    """Adds this rank to the lock of the run folder, and tells its watchdog of every batch.

    Args:
        lock: The lock of the run folder.
        minutes: Time without a batch after which the watchdog ends the process; None for no watchdog.
    """

    def __init__(self, lock: RunLock, minutes: float | None) -> None:
        self.lock, self.minutes = lock, minutes
        self.watchdog: Watchdog | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.global_rank > 0:  # rank 0 has the lock by now
            self.lock.take(trainer.global_rank)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the watchdog. Not earlier: loading all images into memory takes long, and rendezvous has timeouts."""
        if self.minutes is None:
            return
        environment = getattr(trainer.strategy, "cluster_environment", None)
        started_by_rank_0 = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        parent = os.getppid() if started_by_rank_0 or isinstance(environment, TorchElasticEnvironment) else None
        folder = Path(trainer.default_root_dir)
        self.watchdog = Watchdog(60 * self.minutes, folder, trainer.global_rank, parent, reading=images_under_way)
        self.watchdog.start()

    def stop(self) -> None:
        if self.watchdog is not None:
            self.watchdog.stop()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        beat(f"step {trainer.global_step}, in training")

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        beat(f"step {trainer.global_step}, in validation")

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        beat(f"step {trainer.global_step}, between epochs")
