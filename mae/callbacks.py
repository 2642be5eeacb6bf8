"""What watches a run: metrics.csv, the progress bar, checkpoints and reconstruction pictures."""

import csv
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

from mae import features, heads, signals, slurm
from mae.agreement import Agreement
from mae.data import ImageData, raise_errors
from mae.errors import Stopped, TrainingFailed, UserError
from mae.labelled import Part
from mae.lock import RunLock
from mae.pictures import panel, reconstruct
from mae.pretrain import HELD_OUT_SEED, Pretrain
from mae.randomness import HELD_OUT_EPOCH, sample_noise
from mae.samples import WholeSamples
from mae.saving import CheckpointFiles, last_checkpoint, step_file
from mae.signals import Wish
from mae.sources import Source
from mae.tracking import log_panel
from mae.training import Stage, gather
from mae.watchdog import Watchdog


class MetricsCSV(Logger):
    """`metrics.csv`: one row an optimiser step that was logged, one column a metric, empty where not measured.

    Args:
        path: The file.
        step: The optimiser step that the run goes on from: rows up to it are kept, later ones are measured again.
    """

    def __init__(self, path: Path, step: int = 0):
        super().__init__()
        self.path = path
        self.columns = ["step"]
        self.rows: list[dict[str, Any]] = []
        self.behind = False  # the file lacks rows that could not be written
        if path.exists():
            self.cut(step)

    @rank_zero_only
    def cut(self, step: int) -> None:
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            # A line that was cut off by a full disk has no end, and is measured again.
            self.rows = [row for row in reader if None not in row.values() and int(row["step"]) <= step]
            self.columns = list(reader.fieldnames or self.columns)
        self.rewrite()

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Settings are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        new_columns = [key for key in metrics if key not in self.columns]
        self.columns += new_columns
        same_row = bool(self.rows) and int(self.rows[-1]["step"]) == step
        if same_row:
            self.rows[-1].update(metrics)
        else:
            self.rows.append({"step": step, **metrics})
        try:
            if same_row or new_columns or self.behind:
                self.rewrite()
            else:
                with self.path.open("a", newline="") as file:
                    csv.DictWriter(file, self.columns).writerow(self.rows[-1])
            self.behind = False
        except OSError as error:
            if not self.behind:
                print(f"mae: warning: {self.path} cannot be written: {error.strerror}; trying again", flush=True)
            self.behind = True

    def rewrite(self) -> None:
        unfinished = self.path.with_suffix(".partial")
        with unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
        unfinished.replace(self.path)


class Progress(ProgressBar):
    """A bar over the whole run: loss, images/s, learning rate, time left; in a log file, a line now and then."""

    LINE_SECONDS = 10.0  # at most one line in this time

    def __init__(self) -> None:
        super().__init__()
        self.bar: tqdm[None] | None = None
        self.enabled = True
        self.last_line = 0.0

    def disable(self) -> None:  # Lightning calls it on all ranks but 0
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start, self.first_step = time.perf_counter(), trainer.global_step
        assert isinstance(pl_module, Stage)
        self.total = pl_module.total_steps
        if self.enabled and sys.stderr.isatty():
            self.bar = tqdm(
                total=self.total,
                initial=self.first_step,
                unit="step",
                dynamic_ncols=True,
                desc=type(pl_module).__name__.lower(),
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, Stage)
        step = trainer.global_step
        if self.bar is not None and step > self.bar.n:
            self.bar.set_postfix_str(self.figures(pl_module), refresh=False)
            self.bar.update(step - self.bar.n)
        elif self.bar is None and self.enabled and step != self.first_step:
            now = time.perf_counter()
            if now - self.last_line > self.LINE_SECONDS or step == self.total:
                self.last_line = now
                left = (now - self.start) / (step - self.first_step) * (self.total - step)
                figures = self.figures(pl_module)
                print(f"step {step}/{self.total} | {figures} | {tqdm.format_interval(left)} left", flush=True)

    def figures(self, module: Stage) -> str:
        seen = module.metrics
        names = {"train/loss": "loss {:.4f}", "val/loss": "held-out {:.4f}", "val/acc1": "top-1 {:.2f} %"}
        names["images_per_s"] = "{:.0f} images/s"
        return " | ".join([t.format(seen[k]) for k, t in names.items() if k in seen] + [f"lr {module.lr:.2e}"])

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        tqdm.write(" ".join(map(str, args)))


class Checkpoints(Checkpoint):
    """Saves the run as it goes, so that `--ckpt_path last` goes on to the same bits; stops it where a signal asks.

    Always at the end of an optimiser step, never inside an accumulation window, when the step's row is in `metrics.csv`
    and before the look at held-out images that an epoch ends with: a run that goes on from there takes it first. The
    last step is always saved, and so is the one after which a signal stops the run. Training waits while the state is
    copied in memory; writing goes on beside it.

    Args:
        every_n_epochs: Save at the end of each so many epochs.
        every_n_steps: Save after each so many optimiser steps, too.
        every_n_minutes: Save when so many minutes have gone by since the last time, too; null: never for that reason.
        keep: So many checkpoints stay in `checkpoints/`, the newest; `last.ckpt` is a link to the newest.
    """

    ATTEMPTS = 3  # to save, in a row, before a run that cannot save is stopped
    RETRY_SECONDS = 60.0

    def __init__(
        self,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = 30,
        keep: int = 3,
    ):
        if every_n_epochs < 1 or (every_n_steps is not None and every_n_steps < 1) or keep < 1:
            raise UserError(
                f"--checkpoint.every_n_epochs {every_n_epochs}, every_n_steps {every_n_steps}, keep {keep}: at least 1"
            )
        if every_n_minutes is not None and not every_n_minutes > 0:
            raise UserError(f"--checkpoint.every_n_minutes {every_n_minutes}: above 0, or null")
        self.every_n_epochs, self.every_n_steps, self.every_n_minutes = every_n_epochs, every_n_steps, every_n_minutes
        self.keep = keep
        self.saved_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        files = trainer.strategy.checkpoint_io
        assert isinstance(files, CheckpointFiles)
        self.files = files
        self.agreement = Agreement(3)
        self.clock = time.monotonic()

    def after_step(self, trainer: Trainer, stage: Stage) -> None:
        step = trainer.global_step
        # Between epochs comes the look at held-out images, which may take minutes: signals are heard before it.
        border = stage.at_epoch_end or step >= stage.total_steps
        said = [signals.wished, int(self.overdue()), self.files.failures]
        wished, overdue, failures = self.agreement.hear(said, wait=border)
        if failures >= self.ATTEMPTS:
            raise TrainingFailed(f"{failures} checkpoints in a row could not be written{self.why()}")
        intervals = [self.every_n_epochs * stage.steps_per_epoch, stage.total_steps, self.every_n_steps]
        if wished or overdue or any(interval and step % interval == 0 for interval in intervals):
            self.save(trainer)
        if wished:
            self.stop(trainer, Wish(wished))

    def overdue(self) -> bool:
        """For the rank that writes to say: the others do not know its clock or its disk."""
        if self.files.busy:
            return False
        passed = time.monotonic() - self.clock
        if self.files.failures:
            return passed > self.RETRY_SECONDS
        return self.every_n_minutes is not None and passed > 60 * self.every_n_minutes

    def save(self, trainer: Trainer) -> None:
        if self.files.failures and not self.files.busy:
            print(f"mae: warning: a checkpoint could not be written{self.why()}; trying again", flush=True)
        self.saved_step = trainer.global_step
        trainer.save_checkpoint(step_file(trainer.default_root_dir, self.saved_step), weights_only=False)
        self.clock = time.monotonic()

    def why(self) -> str:
        """Of the last failure, on the rank that knows it."""
        if self.files.failed is None:
            return ""
        path, error = self.files.failed
        whole = last_checkpoint(path.parent.parent)
        kept = f"the last good one is {whole.resolve().name}" if whole.exists() else "there is none yet"
        return f": {path}: {error.strerror or error}; {kept}; make room or repair {path.parent}"

    def stop(self, trainer: Trainer, wish: Wish) -> None:
        """
        Raises:
            Stopped: On every rank, when the checkpoint is on the disk and, where it can be, the job in the queue again.
            TrainingFailed: The checkpoint could not be written.
        """
        said: tuple[str, int] = ("", 1)
        if trainer.is_global_zero:
            self.files.wait()
            if self.files.failed is None:
                requeued, how = (False, "") if wish == Wish.INTERRUPT else slurm.requeue()
                parts = [f"stopped at step {trainer.global_step}, saved", how, "--ckpt_path last goes on from there"]
                said = "; ".join(filter(None, parts)), 0 if requeued else signals.EXIT_CODES[wish]
        words, code = trainer.strategy.broadcast(said)
        if not words:
            raise TrainingFailed(f"asked to stop, but the checkpoint could not be written{self.why()}")
        raise Stopped(words, code)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.saved_step != trainer.global_step and trainer.global_step != pl_module.resumed_at:
            self.save(trainer)  # a callback has ended the run early
        self.files.wait()
        if self.files.failed is not None:
            raise TrainingFailed(f"the last checkpoint could not be written{self.why()}")


class Alive(Callback):
    """While this process trains, its rank is in the lock of the run folder, and its watchdog hears of every batch."""

    def __init__(self, lock: RunLock, minutes: float | None) -> None:
        self.lock, self.minutes = lock, minutes
        self.watchdog: Watchdog | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        rank = trainer.global_rank
        if rank > 0:  # by now rank 0 has it
            self.lock.share(rank)
        if stage != "fit" or self.minutes is None:
            return
        environment = getattr(trainer.strategy, "cluster_environment", None)
        children = [process.pid for process in getattr(trainer.strategy.launcher, "procs", [])]
        started_by_rank_0 = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        parent = os.getppid() if started_by_rank_0 or isinstance(environment, TorchElasticEnvironment) else None
        relatives = [os.getppid()] if started_by_rank_0 else children
        folder = Path(trainer.default_root_dir)
        self.watchdog = Watchdog(60 * self.minutes, folder, rank, lambda: relatives, parent)
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
        self.beat(f"step {trainer.global_step}, looking at held-out images")

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        self.beat(f"step {trainer.global_step}, between epochs")


def spread(source: Source, count: int) -> list[int]:
    """`count` indices of a source, or all where it has fewer, evenly from first to last."""
    count = min(count, len(source))
    return [i * len(source) // count for i in range(count)]


class Panels(Callback):
    """Reconstruction pictures of the same images under the same masks all run: PNG files, and W&B.

    Args:
        every_n_epochs: How often; one is made at the end of training, too.
        images: How many, spread over the held-out images (or the training images where there are none).
    """

    def __init__(self, every_n_epochs: int = 20, images: int = 8):
        if every_n_epochs < 1 or images < 1:
            raise UserError(f"--panels.every_n_epochs {every_n_epochs}, images {images}: at least 1")
        self.every_n_epochs, self.images = every_n_epochs, images
        self.drawn = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        source = data.val_source or data.train_source
        assert source is not None
        samples = WholeSamples(source, data.image_size, data.crop_pct)
        loaded = [samples[[index]] for index in spread(source, self.images)]
        if data.val_source:
            for batch in loaded:
                raise_errors(batch)
        # Of training images some may be unreadable, and tolerated.
        self.batches = [data.prepare(batch) for batch in loaded if not batch.errors]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Pretrain)
        if trainer.global_step % (self.every_n_epochs * pl_module.steps_per_epoch) == 0:
            self.draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.draw(trainer, pl_module)

    @rank_zero_only
    def draw(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, Pretrain)
        data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        assert data.mean is not None
        assert data.std is not None
        path = Path(trainer.default_root_dir) / "reconstructions" / f"step_{trainer.global_step:07d}.png"
        if self.drawn == trainer.global_step or not self.batches:
            return  # drawn a moment ago, at the end of the last epoch; or nothing to draw
        self.drawn = trainer.global_step
        path.parent.mkdir(parents=True, exist_ok=True)
        indices = [int(batch.indices) for batch in self.batches]
        noise = sample_noise(HELD_OUT_SEED, [HELD_OUT_EPOCH] * len(indices), indices, module.model.num_patches)
        model = module.model
        was_training = model.training
        model.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            images = torch.cat([batch.images for batch in self.batches]).to(module.device)
            columns = reconstruct(model, images, noise.to(module.device), module.mask_ratio, data.mean, data.std)
        model.train(was_training)
        panel(columns, path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                log_panel(logger, "reconstructions", path, "; ".join(columns), trainer.global_step)


class Online(Callback):
    """Looks at features while they are learnt: k-NN and a linear probe on labelled images, in `metrics.csv` and W&B.

    Features are the mean of patch tokens: the encoder sees whole images, unmasked, in eval mode. No gradient and no
    random number of the training is touched. Off where a split has no labels, or there is only one class.

    Args:
        every_n_epochs: How often.
        train_images: How many, spread over the training images, vote in k-NN and fit the probe.
        held_out_images: How many, spread over the held-out images, are classified.
    """

    RATE = 0.1  # of the probe; a choice would need labels held out of the few that there are
    EPOCHS = 20

    def __init__(self, every_n_epochs: int = 20, train_images: int = 10_000, held_out_images: int = 5_000):
        if min(every_n_epochs, train_images, held_out_images) < 1:
            raise UserError(
                f"--online.every_n_epochs {every_n_epochs}, train_images {train_images}, held_out_images "
                f"{held_out_images}: at least 1"
            )
        self.every_n_epochs, self.train_images, self.held_out_images = every_n_epochs, train_images, held_out_images

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Pretrain)
        data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        sources = (data.train_source, data.val_source)
        labelled = all(source is not None and source.labels is not None for source in sources)
        if not labelled or trainer.global_step % (self.every_n_epochs * pl_module.steps_per_epoch):
            return
        assert data.train_source is not None
        assert data.val_source is not None
        classes = len(data.train_source.classes)
        if classes < 2:
            return
        start = time.perf_counter()
        train = self.encoded(trainer, pl_module, data, data.train_source, self.train_images)
        test = self.encoded(trainer, pl_module, data, data.val_source, self.held_out_images)
        if trainer.is_global_zero:
            both = features.Features(*train, *test, classes)
            probe = heads.fit_and_score(
                train[0], train[1], test[0], test[1], classes, self.RATE, self.EPOCHS, device=pl_module.device
            )
            pl_module.write({"online/knn": features.knn(features.scaled(both, "whiten")), "online/probe": probe})
        pl_module.clock += time.perf_counter() - start  # as looks at the held-out loss, not counted in images/s

    def encoded(
        self, trainer: Trainer, module: Pretrain, data: ImageData, source: Source, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and labels of `count` images, in the same order whatever the number of processes."""
        part = Part(source, spread(source, count))
        was_training = module.model.training
        module.model.eval()
        mine, errors = [], []
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            for batch in data.readable(part, trainer.global_rank, trainer.world_size):
                if batch.errors:
                    errors += [str(error) for error in batch.errors]
                    continue
                found, labels = features.extract(
                    lambda images: features.mean_of_patches(module.model.encode(images.to(module.dtype))),
                    data,
                    [batch],
                    module.device,
                )
                mine.append((batch.indices, found, labels))
        module.model.train(was_training)
        # Of training images some may be unreadable: the training counts them, and tolerates them or not.
        if source is data.val_source and (bad := gather(errors)):
            raise UserError(f"held-out images must all be readable: {bad[0][0]}")
        parts = list(itertools.chain(*gather(mine)))
        if not parts:
            raise UserError("online evaluation found no readable training image: look at them with `mae doctor`")
        indices, found, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        order = indices.argsort()
        return found[order], labels[order]
