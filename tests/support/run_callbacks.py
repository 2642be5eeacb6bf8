"""Callbacks for runs in processes of their own, by class path: `--trainer.callbacks+=run_callbacks.Gradients`.

Such a process finds this file by `PYTHONPATH`.
"""

import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn


class Gradients(Callback):
    """Leaves the gradients of some optimiser steps in files `STEP.pt`: {name of the tensor: gradient}.

    Args:
        folder: Of the files; is made.
        steps: Which, counted from 1; of all devices and accumulated micro-batches.
    """

    def __init__(self, folder: str, steps: list[int]):
        self.folder, self.steps = Path(folder), steps

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        step = trainer.global_step + 1
        if trainer.is_global_zero and step in self.steps:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
            torch.save(found, self.folder / f"{step}.pt")


class FixedNorm(Callback):
    """BatchNorm by the statistics that it starts with, so that no image counts in the output of another."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        for module in pl_module.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()


class SignalAt(Callback):
    """A rank sends itself a signal when so many optimiser steps are taken.

    Args:
        step: So many.
        number: Of the signal.
        rank: Which; the first one by default.
    """

    def __init__(self, step: int, number: int, rank: int = 0):
        self.step, self.number, self.rank = step, number, rank

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            trainer.strategy.checkpoint_io.wait()  # which checkpoints there are does not depend on the disk's speed
            os.kill(os.getpid(), self.number)


class HoldAt(Callback):
    """Every rank leaves a file `rank_R`, and waits, when so many optimiser steps are taken: until there is `go`.

    Args:
        step: So many.
        folder: Of the files.
        seconds: To wait at most.
    """

    def __init__(self, step: int, folder: str, seconds: float = 300):
        self.step, self.folder, self.seconds = step, Path(folder), seconds

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step != self.step:
            return
        (self.folder / f"rank_{trainer.global_rank}").touch()
        deadline = time.monotonic() + self.seconds
        while not (self.folder / "go").exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no file {self.folder / 'go'}")
            time.sleep(0.05)


class HangAt(Callback):
    """A rank goes to sleep when so many optimiser steps are taken.

    Args:
        step: So many.
        rank: Which; -1 is the last.
    """

    def __init__(self, step: int, rank: int = -1):
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank % trainer.world_size:
            time.sleep(600)
