"""The progress bar, or a line now and then where there is no terminal."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from mae.training.module import Stage


class Progress(ProgressBar):
    """Shows the progress of the whole run with loss, images/s, learning rate and time left.

    On a terminal this is a bar; in a log file a line, at most one every `LINE_SECONDS`.
    """

    LINE_SECONDS = 10.0

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
        latest, lr = module.step_metrics.latest, module.step_metrics.lr
        formats = {"train/loss": "loss {:.4f}", "val/loss": "held-out {:.4f}", "val/acc1": "top-1 {:.2f} %"}
        formats["images_per_s"] = "{:.0f} images/s"
        if self.bar is None:  # of this step on this rank; reading it makes the device wait, once a line
            latest = {**latest, "train/loss": float(module.step_metrics.step_loss)}
        return " | ".join(
            [text.format(latest[key]) for key, text in formats.items() if key in latest] + [f"lr {lr:.2e}"]
        )

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
