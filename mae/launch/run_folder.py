"""The run folder at the start of training: nothing in it is changed before every check has passed."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mae.callbacks.metrics_csv import MetricsCSV
from mae.errors import UserError
from mae.launch.resume import ResumePoint
from mae.runtime import checkpoint_files
from mae.runtime.checkpoint_files import SUPERSEDED
from mae.runtime.processes import gather
from mae.training.module import Stage
from mae.weights.load import EXPORTS


class RunFolder(Callback):
    """Checks that the run can go on as planned, and then prepares its folder, just before the first step.

    Args:
        resume: Where the run goes on from.
        metrics: `metrics.csv`, which is cut back to there.
        write_config: Writes config.yaml.
        start_recording: Begins what is recorded elsewhere.
    """

    def __init__(
        self,
        resume: ResumePoint,
        metrics: MetricsCSV,
        write_config: Callable[[], None],
        start_recording: Callable[[], None],
    ) -> None:
        self.resume, self.metrics = resume, metrics
        self.write_config, self.start_recording = write_config, start_recording
        self.planned_steps: int | None = None  # the length of the run when its checkpoint was written
        self.warmup_steps: float | None = None  # of its schedule then

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if len(steps := {step for (step,) in gather((self.resume.step,))}) > 1:
            raise UserError(
                f"the processes would go on from different steps, {sorted(steps)}: do all of them see the same "
                "--run_dir?"
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.planned_steps = checkpoint["mae_counts"].get("total_steps")
        self.warmup_steps = checkpoint["mae_counts"].get("warmup_steps")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Stage)
        # Before the stage writes its recipe.
        self.check_length(trainer, pl_module)
        on_first_rank(trainer, self.check_writable, self.resume.run_dir)

    def before_first_step(self, trainer: Trainer, stage: Stage) -> None:
        self.prepare_run_dir(trainer, stage)
        self.start_recording()

    def check_length(self, trainer: Trainer, stage: Stage) -> None:
        """A run may be made longer, and says so; a shorter one would have had other learning rates from the start.

        Raises:
            UserError: It is to be shorter.
        """
        now, before = stage.total_steps, self.planned_steps
        if before is None or now == before:
            return
        message = f"the run is to have {now} optimiser steps, and was to have {before}"
        if self.warmup_steps not in (None, stage.warmup_steps) and not self.resume.allow_changes:
            raise UserError(
                f"{message}; its warm-up was shortened to {self.warmup_steps:g} steps and would have "
                f"{stage.warmup_steps:g}: start a new run in another --run_dir; --allow_changes true goes on"
            )
        if now < before and not self.resume.allow_changes:
            raise UserError(
                f"{message}: give --trainer.max_epochs and --trainer.max_steps as before; --allow_changes true goes on"
            )
        if trainer.is_global_zero:
            print(f"{message}: from step {self.resume.step} on the learning rate follows the new schedule", flush=True)

    def prepare_run_dir(self, trainer: Trainer, stage: Stage) -> None:
        """Write the settings, and clear away what earlier starts have left; all ranks call it.

        Raises:
            UserError: The folder cannot be written.
        """

        def prepare() -> None:
            self.write_config()
            self.clear_leftovers(stage.total_steps)
            self.metrics.cut_back()

        on_first_rank(trainer, prepare, self.resume.run_dir)

    def check_writable(self) -> None:
        """What would otherwise show at the first checkpoint, or at the end of the run.

        Raises:
            OSError: A folder cannot be written to, or a folder is in the place of a file.
        """
        run_dir = self.resume.run_dir
        for folder in (run_dir, checkpoint_files.folder_of(run_dir)):
            if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        for name in ("config.yaml", checkpoint_files.NEWEST, *EXPORTS):
            if (run_dir / name).is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(run_dir / name))

    def clear_leftovers(self, total_steps: int) -> None:
        """Remove unfinished checkpoints, and put aside checkpoints and weights of later steps than the start."""
        run_dir, step = self.resume.run_dir, self.resume.step
        for path in checkpoint_files.clear_unfinished(run_dir):
            print(f"{path} was being written when the run was killed: removed", flush=True)
        if self.resume.path is None:
            return
        print(f"goes on from step {step} ({self.resume.path})", flush=True)
        later = checkpoint_files.supersede(run_dir, step)
        if step < total_steps:  # else they would be taken for the weights that come out in the end
            exports = [path for name in EXPORTS if (path := run_dir / name).exists()]
            later += [path.rename(path.with_name(path.name + SUPERSEDED)) for path in exports]
        for path in later:
            print(f"{path.name} is of a later step: kept as *{SUPERSEDED}", flush=True)


def on_first_rank(trainer: Trainer, write: Callable[[], None], run_dir: Path) -> None:
    """Do something in the run folder, on rank 0; all ranks call it, and end together where it fails.

    Raises:
        UserError: Names the file that cannot be written.
    """
    problem = ""
    if trainer.is_global_zero:
        try:
            write()
        except OSError as error:
            problem = f"--run_dir {run_dir} cannot be written: {error.filename}: {error.strerror}"
    if problem := trainer.strategy.broadcast(problem):
        raise UserError(problem)
