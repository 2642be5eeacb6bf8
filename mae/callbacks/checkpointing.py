"""Checkpoints while a run trains, and its stop at the end of a step when a signal has asked for it."""

import time
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from mae.errors import Stopped, TrainingFailed, UserError
from mae.options import check_ranges
from mae.runtime import checkpoint_files, signals, slurm
from mae.runtime.checkpoint_files import step_file
from mae.runtime.rank_flags import Agreement
from mae.runtime.signals import Wish
from mae.training.checkpoint_io import CheckpointFiles
from mae.training.module import Stage


class Checkpoints(Checkpoint):
    """Saves a run so that `--ckpt_path last` continues it to the same bits, and stops it when a signal asks for that.

    A checkpoint is taken at the end of an optimiser step, never inside an accumulation window, when the step's row is
    in `metrics.csv`, and before the validation at the end of an epoch: a run that is resumed there validates first. The
    last step is always saved, and so is the step after which a signal stops the run. Training waits while the state is
    copied in memory, and continues while the copy is written.

    Args:
        every_n_epochs: Save at the end of each so many epochs.
        every_n_steps: Also save after each so many optimiser steps.
        every_n_minutes: Also save when so many minutes have passed since the last checkpoint; null: never.
        keep: How many checkpoints to keep in `checkpoints/`, the newest; `last.ckpt` is a link to the newest.
    """

    ATTEMPTS = 3  # to save, before a run that cannot save is stopped

    def __init__(
        self,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = 30,
        keep: int = 3,
    ):
        check_ranges("checkpoint", "[1, inf)", every_n_epochs=every_n_epochs, every_n_steps=every_n_steps, keep=keep)
        check_ranges("checkpoint", "(0, inf)", every_n_minutes=every_n_minutes)
        self.every_n_epochs, self.every_n_steps, self.every_n_minutes = every_n_epochs, every_n_steps, every_n_minutes
        self.keep = keep
        self.saved_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        files = trainer.strategy.checkpoint_io
        assert isinstance(files, CheckpointFiles)
        self.files = files
        self.agreement = Agreement()
        self.clock = time.monotonic()

    def after_step(self, trainer: Trainer, stage: Stage) -> None:
        step = trainer.global_step
        # Validation follows the end of an epoch and may take minutes, so signals must be heard of before it.
        validates = stage.at_epoch_end or step >= stage.total_steps
        flags = [signals.wished, int(self.overdue()), self.files.failures]
        wished, overdue, failures = self.agreement.hear(flags, wait=validates)
        if failures >= self.ATTEMPTS:
            raise TrainingFailed(f"{failures} checkpoints in a row could not be written{self.why()}")
        intervals = [self.every_n_epochs * stage.steps_per_epoch, stage.total_steps, self.every_n_steps]
        if wished or overdue or any(interval and step % interval == 0 for interval in intervals):
            self.save(trainer)
        if wished:
            self.stop(trainer, Wish(wished))

    def overdue(self) -> bool:
        """Whether a checkpoint is due by the clock; the writing rank decides, since each knows only its own clock."""
        if self.files.busy:
            return False
        passed = time.monotonic() - self.clock
        if self.files.failed is not None:
            return passed > checkpoint_files.RETRY_SECONDS
        return self.every_n_minutes is not None and passed > 60 * self.every_n_minutes

    def save(self, trainer: Trainer) -> None:
        if self.files.failed is not None and not self.files.busy:
            print(f"mae: warning: a checkpoint could not be written{self.why()}; trying again", flush=True)
        self.saved_step = trainer.global_step
        trainer.save_checkpoint(step_file(trainer.default_root_dir, self.saved_step), weights_only=False)
        self.clock = time.monotonic()

    def why(self) -> str:
        """The reason of the last failure as the end of a sentence, on the rank that knows it; else empty."""
        if self.files.failed is None:
            return ""
        path, error = self.files.failed
        try:
            whole, complaints = checkpoint_files.newest(path.parent.parent)
            kept = "; ".join([*complaints, f"the last good one is {whole.name}" if whole else "there is none yet"])
        except UserError as all_damaged:
            kept = str(all_damaged)
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        # A checkpoint waits for metrics.csv: then it is that file that cannot be written.
        blamed = Path(getattr(error, "filename", None) or path)
        return f": {blamed}: {reason}; {kept}; make room or repair {blamed.parent}"

    def stop(self, trainer: Trainer, wish: Wish) -> None:
        """Wait for the checkpoint, go back to the batch system's queue where possible, and end the run.

        Raises:
            Stopped: On every rank, when the checkpoint is on the disk.
            TrainingFailed: The checkpoint could not be written.
        """
        result: tuple[str, int] = ("", 1)
        if trainer.is_global_zero:
            self.files.wait()
            if self.files.failed is None:
                requeued, outcome = (False, "") if wish == Wish.INTERRUPT else slurm.requeue()
                clauses = [f"stopped at step {trainer.global_step}, saved", outcome]
                message = "; ".join(filter(None, [*clauses, "--ckpt_path last goes on from there"]))
                result = message, 0 if requeued else signals.EXIT_CODES[wish]
                # Printed now, because a requeued job gets SIGTERM, and then SIGKILL if it is slow to end.
                print(message, flush=True)
        message, code = trainer.strategy.broadcast(result)
        if not message:
            raise TrainingFailed(f"asked to stop, but the checkpoint could not be written{self.why()}")
        raise Stopped(message, code)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Stage)
        if self.saved_step != trainer.global_step and trainer.global_step != pl_module.resumed_at:
            pl_module.step_metrics.write_last_row()  # a callback has ended the run early
            self.save(trainer)
        if self.lost(trainer):
            self.save(trainer)
            if self.lost(trainer):
                raise TrainingFailed(f"the last checkpoint could not be written{self.why()}")

    def lost(self, trainer: Trainer) -> bool:
        """Whether writing the last checkpoint has failed; all ranks call it together."""
        self.files.wait()
        return bool(trainer.strategy.broadcast(self.files.failed is not None))
