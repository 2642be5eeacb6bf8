"""What is measured of a run's optimiser steps, what is written to its loggers, and where its ranks agree to stop."""

import time
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

from mae.data.datasets import Batch
from mae.errors import TrainingFailed, UserError
from mae.models.flops import peak_rate
from mae.runtime import memory
from mae.runtime.checkpoint_files import all_finite, last_checkpoint
from mae.runtime.processes import all_reduce, gather
from mae.training.checkpoint_io import CheckpointFiles
from mae.training.optim import WarmupCosine
from mae.training.throughput import DataWait, images_per_step, product_dtype


class StepMetrics:
    """The figures of a run, of this rank, and the rows that are made of them.

    Nothing here makes a step wait for the device, except `measure`, which is called at the logging interval.

    Attributes:
        lr: Learning rate of the last optimiser step.
        skipped_steps: Optimiser steps that the fp16 scaler left out.
        bad_images: Unreadable images of this rank, path: reason.
        decoded: Images by decoder, of this rank since the start or restart.
        latest: Each metric as it was last written, for the progress bar.
        seconds: Duration of the training with validation, without what was lost by kills; complete when training ends.
        clock: Start of the interval of which `measure` gives the rate.
        peak_rate: FLOP/s of the device in this precision, by its maker; None: not known, and no MFU.
    """

    NAMES = ("lr", "epoch", "images_seen", "images_per_s", "data_wait", "peak_memory_gib")  # besides losses

    def __init__(self) -> None:
        self.lr = 0.0
        self.skipped_steps = 0
        self.bad_images: dict[str, str] = {}
        self.decoded = Counter[str]()
        self.latest: dict[str, float] = {}
        self.seconds = 0.0
        self.clock = time.perf_counter()
        self.data_wait: DataWait | None = None

    def start(self, trainer: Trainer, schedule: WarmupCosine, flops: float) -> None:
        """Training starts now.

        Args:
            flops: Of an image, forward and backward.
        """
        self.trainer, self.schedule, self.flops = trainer, schedule, flops
        self.device = trainer.lightning_module.device
        self.step_loss = torch.zeros((), device=self.device)  # of the last optimiser step, of this rank
        self.first_bad_step = torch.full((), torch.inf, device=self.device)  # first step with a non-finite loss
        self.peak_rate = peak_rate(self.device, product_dtype(trainer))
        self.restart_clock()
        self.start_interval(self.clock)

    def restart_clock(self) -> None:
        """The time that has gone by so far does not count."""
        self.clock = self.started = time.perf_counter()

    def start_interval(self, now: float) -> None:
        self.clock, self.clock_step = now, self.trainer.global_step
        self.data_wait = DataWait(self.device)
        self.data_wait.batch_done()

    def exclude(self, seconds: float) -> None:
        """So much of the time that has gone by does not count in the rates: validation, for example."""
        self.clock += seconds

    # ---- counting --------------------------------------------------------------------------------------------------

    def count_images(self, batch: Batch, tolerant: bool) -> None:
        """Count decoders and unreadable images; with `tolerant`, warn of each of the latter once."""
        for error in batch.errors:
            if error.path in self.bad_images:
                continue
            self.bad_images[error.path] = error.reason
            if tolerant:
                print(f"mae: warning: unreadable image, its slot has weight 0: {error}", flush=True)
        self.decoded.update(batch.decoders)

    def count_step(self, loss: Tensor, step: int, skipped: bool) -> None:
        """Note the loss of an optimiser step, on the device: reading it would make every step wait for the last."""
        self.skipped_steps += skipped
        self.step_loss = loss
        bad = ~loss.isfinite() & self.first_bad_step.isinf()
        self.first_bad_step = torch.where(bad, float(step), self.first_bad_step)

    def all_bad_images(self) -> dict[str, str]:
        """Path and reason of every unreadable image of all ranks, sorted by path."""
        return dict(sorted(item for images in gather(self.bad_images) for item in images.items()))

    def all_decoded(self) -> Counter[str]:
        """Images by decoder, of all ranks."""
        return sum(gather(self.decoded), Counter[str]())

    # ---- rows ------------------------------------------------------------------------------------------------------

    def measure(self) -> dict[str, float]:
        """Metrics of the optimiser step just taken, and the rates since the last call, validation not counted."""
        metrics = {**self.agree(), "lr": self.lr}  # reading the loss waits for the device, so the clock is right
        now, step = time.perf_counter(), self.trainer.global_step
        rate = (step - self.clock_step) * images_per_step(self.trainer) / (now - self.clock)
        metrics["images_per_s"] = rate
        if self.peak_rate is not None:
            metrics["mfu"] = rate * self.flops / self.trainer.world_size / self.peak_rate
        assert self.data_wait is not None
        metrics["data_wait"] = self.data_wait.seconds() / (now - self.clock)
        metrics["peak_memory_gib"] = memory.peak(self.device) / memory.GIB
        self.start_interval(now)
        return metrics

    def write(self, metrics: dict[str, float]) -> dict[str, float]:
        """Write a row to every logger, under the number of optimiser steps taken; returns all that it holds."""
        step = self.trainer.global_step
        epoch, images = step / self.schedule.steps_per_epoch, step * images_per_step(self.trainer)
        metrics = {**metrics, "epoch": epoch, "images_seen": images}
        if getattr(self.trainer.precision_plugin, "scaler", None):
            metrics["skipped_steps"] = self.skipped_steps
        self.latest.update(metrics)
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=step)
        return metrics

    def write_last_row(self) -> None:
        """Write the row of the last step, where the logging interval has not done so."""
        if self.trainer.global_step != self.clock_step:
            self.write(self.measure())

    # ---- where all ranks stop together -----------------------------------------------------------------------------

    def agree(self) -> dict[str, float]:
        """The last step's loss over all ranks; every rank stops here if one of them has a reason to.

        Raises:
            TrainingFailed: A loss since the last call was not finite.
            UserError: More than `max_bad_images` images could not be read.
        """
        counts = [float(len(self.bad_images)), float(self.decoded["Pillow"])]
        sums = torch.stack([self.step_loss, *self.step_loss.new_tensor(counts)])
        all_reduce(sums)
        step = self.first_bad_step.clone()
        all_reduce(step, dist.ReduceOp.MIN)
        loss, bad, pillow = sums.tolist()
        if step.isfinite():
            self.stop(f"the loss is not finite at step {int(step)}", int(step))
        paths = self.all_bad_images() if bad else {}
        allowed: int = getattr(self.trainer.datamodule, "max_bad_images", 0)  # type: ignore[attr-defined]
        if len(paths) > allowed:
            listed = "; ".join(f"{path}: {reason}" for path, reason in list(paths.items())[:20])
            raise UserError(f"{len(paths)} unreadable training images, --data.max_bad_images is {allowed}: {listed}")
        return {
            "train/loss": loss / self.trainer.world_size,
            "bad_images": float(len(paths)),
            "pillow_images": pillow,
        }

    def require_finite(self, checkpoint: dict[str, Any]) -> None:
        """Stop every rank where the state of the run is not finite after its last step, though that step's loss was.

        Raises:
            TrainingFailed: Weights or the optimiser's state hold NaN or infinity.
        """
        parts = {"weights": checkpoint["state_dict"], "optimiser's state": checkpoint.get("optimizer_states")}
        bad = torch.stack([~all_finite(part).to(self.device) for part in parts.values()]).float()
        all_reduce(bad)  # where the network is sharded, one rank holds the whole of it
        step = self.trainer.global_step
        for name, count in zip(parts, bad.tolist(), strict=True):
            if count:
                self.stop(f"the {name} {'are' if name == 'weights' else 'is'} not finite after step {step}", step)

    def stop(self, reason: str, step: int) -> None:
        lr = self.schedule.lr_at(step - 1, float(self.schedule.base_lrs[0]))
        files = self.trainer.strategy.checkpoint_io
        if isinstance(files, CheckpointFiles):
            files.wait()
            path = last_checkpoint(self.trainer.default_root_dir)
            last: Any = path.resolve() if path.is_file() else "none was written"
        else:
            last = getattr(self.trainer.checkpoint_callback, "best_model_path", "") or "none was written"
        raise TrainingFailed(
            f"{reason} (learning rate {lr:g}); last good checkpoint: {last}. Lower --model.base_lr, lengthen "
            "--model.warmup_epochs or use --trainer.precision 32-true"
        )

    # ---- in checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counts over all ranks; all call it together."""
        return {
            "bad_images": self.all_bad_images(),
            "decoded": dict(self.all_decoded()),
            "skipped_steps": self.skipped_steps,
            "seconds": self.seconds + (time.perf_counter() - self.started if self.trainer.training else 0.0),
        }

    def load_state_dict(self, state: dict[str, Any], first_rank: bool) -> None:
        self.bad_images, self.skipped_steps = state["bad_images"], state["skipped_steps"]
        self.seconds = state["seconds"]
        if first_rank:  # summed over the ranks again
            self.decoded = Counter(state["decoded"])

    def finish(self) -> None:
        """Training ends; all ranks call it."""
        self.seconds += time.perf_counter() - self.started
        decoded = self.all_decoded()
        del decoded["memory"]
        if decoded and self.trainer.is_global_zero:
            counts = ", ".join(f"{count} by {decoder}" for decoder, count in decoded.most_common())
            print(f"images decoded: {counts}", flush=True)
