"""Tells the run lock and the watchdog that this process trains."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment

from mae.runtime.run_lock import RunLock
from mae.runtime.watchdog import Watchdog
from mae.training.lightning_internals import child_processes


class Alive(Callback):
    """Holds this rank's place in the lock of the run folder, and reports every batch to the watchdog.

    Args:
        lock: Of the run folder.
        minutes: How long the watchdog waits for a batch before it ends the process; None: no watchdog.
    """

    def __init__(self, lock: RunLock, minutes: float | None) -> None:
        self.lock, self.minutes = lock, minutes
        self.watchdog: Watchdog | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.global_rank > 0:  # by now rank 0 has it
            self.lock.share(trainer.global_rank)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the watchdog; not earlier, because loading all images into a device's memory may take minutes."""
        if self.minutes is None:
            return
        environment = getattr(trainer.strategy, "cluster_environment", None)
        children = [process.pid for process in child_processes(trainer)]
        started_by_rank_0 = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        parent = os.getppid() if started_by_rank_0 or isinstance(environment, TorchElasticEnvironment) else None
        relatives = [os.getppid()] if started_by_rank_0 else children
        folder = Path(trainer.default_root_dir)
        self.watchdog = Watchdog(60 * self.minutes, folder, trainer.global_rank, lambda: relatives, parent)
        self.watchdog.start()

    def beat(self, where: str) -> None:
        if self.watchdog is not None:
            self.watchdog.beat(where)

    def stop(self) -> None:
        if self.watchdog is not None:
            self.watchdog.stop()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.beat(f"step {trainer.global_step}, in training")

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.beat(f"step {trainer.global_step}, in validation")

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        self.beat(f"step {trainer.global_step}, between epochs")
