"""What watches a run: metrics.csv, the progress bar, reconstruction pictures, features while they are learnt."""

import csv
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

from mae import features, heads, watchdog
from mae.data import ImageData, raise_errors
from mae.errors import UserError
from mae.labelled import Part
from mae.pictures import panel, reconstruct
from mae.pretrain import HELD_OUT_SEED, Pretrain
from mae.randomness import HELD_OUT_EPOCH, sample_noise
from mae.samples import WholeSamples
from mae.sharding import whole
from mae.sources import Source
from mae.storage import sync
from mae.tracking import log_panel
from mae.training import Stage, gather


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
        self.behind: OSError | None = None  # why the file lacks rows
        if path.exists():
            # A line without an end was torn by a full disk, and no checkpoint knows of it.
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            reader = csv.DictReader(lines)
            self.rows = [row for row in reader if int(row["step"]) <= step]
            self.columns = list(reader.fieldnames or self.columns)

    def begin(self) -> None:
        """Cut the file back to where the run goes on.

        Raises:
            OSError: It cannot be written.
        """
        if self.path.exists():
            self.rewrite()

    def sync(self) -> None:
        """To the disk.

        Raises:
            OSError: Rows are missing in the file.
        """
        if self.behind:
            raise self.behind
        if self.path.exists():
            sync(self.path)

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
            self.behind = None
        except OSError as error:
            if not self.behind:
                print(f"mae: warning: {self.path} cannot be written: {error.strerror}; trying again", flush=True)
            self.behind = error

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
            self.draw_whole(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Pretrain)
        self.draw_whole(trainer, pl_module)

    def draw_whole(self, trainer: Trainer, module: Pretrain) -> None:
        with whole(module.model):
            self.draw(trainer, module)

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
        indices = [int(batch.indices) for batch in self.batches]
        noise = sample_noise(HELD_OUT_SEED, [HELD_OUT_EPOCH] * len(indices), indices, module.model.num_patches)
        model = module.model
        was_training = model.training
        model.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            images = torch.cat([batch.images for batch in self.batches]).to(module.device)
            columns = reconstruct(model, images, noise.to(module.device), module.mask_ratio, data.mean, data.std)
        model.train(was_training)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            panel(columns, path)
        except OSError as error:  # a picture is not worth a run
            print(f"mae: warning: {path} cannot be written: {error.strerror}", flush=True)
            return
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
        with whole(module.model), trainer.precision_plugin.forward_context(), torch.no_grad():
            for batch in data.readable(part, trainer.global_rank, trainer.world_size):
                watchdog.beat(f"step {trainer.global_step}, in the online evaluation")
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
