"""The progress bar, or a line now and then where there is no terminal."""

import logging
import os
import sys
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm
from tqdm.utils import ObjectWrapper

from mae.runtime.text import CLEAR_LINE
from mae.training.module import Stage


class AboveBar(ObjectWrapper):  # type: ignore[misc]
    """A terminal's standard output or error while a bar is drawn: whole lines appear above the bar.

    Args:
        file: The terminal.
        bar: Drawn on the same terminal.
    """

    def __init__(self, file: TextIO, bar: "tqdm[None]") -> None:
        super().__init__(file)
        self.wrapper_setattr("bar", bar)
        self.wrapper_setattr("begun", "")  # a line that has no end yet

    def write(self, text: str) -> int:
        lines, end, begun = (self.begun + text).rpartition("\n")
        self.wrapper_setattr("begun", begun)
        if end:
            self.print(lines + end)
        return len(text)

    def print(self, text: str) -> None:
        with tqdm.external_write_mode(file=self.bar.fp):
            self.bar.fp.write(CLEAR_LINE)  # tqdm clears what it has drawn, not the ^C that the terminal adds
            self.bar.fp.flush()
            self._wrapped.write(text)
            self._wrapped.flush()

    def finish(self) -> None:
        """The bar is gone: print a line that has been begun."""
        self._wrapped.write(self.begun)


class Progress(ProgressBar):
    """Shows the progress of the whole run with loss, time left, held-out figures, images/s and learning rate.

    On a terminal this is a bar, which leaves out the last of these where they do not fit; in a log file a line, at most
    one every `LINE_SECONDS`.
    """

    LINE_SECONDS = 10.0
    BAR_COLUMNS = 10  # at least

    def __init__(self) -> None:
        super().__init__()
        self.bar: tqdm[None] | None = None
        self.enabled = True
        self.last_line = 0.0
        self.redirected = ExitStack()

    def disable(self) -> None:  # Lightning calls it on all ranks but 0
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start, self.first_step = time.perf_counter(), trainer.global_step
        assert isinstance(pl_module, Stage)
        self.total = pl_module.total_steps
        if self.enabled and sys.stderr.isatty():
            self.name = type(pl_module).__name__.lower()
            self.bar = tqdm(total=self.total, initial=self.first_step, bar_format=" ")
            self.bar.bar_format = self.bar_format(pl_module, self.first_step)
            self.redirect(self.bar)

    def redirect(self, bar: "tqdm[None]") -> None:
        """Have what is printed appear above the bar, that of loggers which hold the terminal, too."""
        for file, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if not file.isatty():
                continue
            above = AboveBar(file, bar)
            for logger in (logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))):
                for handler in logger.handlers:
                    if isinstance(handler, logging.StreamHandler) and vars(handler).get("stream") is file:
                        handler.setStream(above)
                        self.redirected.callback(handler.setStream, file)
            self.redirected.enter_context(redirect(above))
            self.redirected.callback(above.finish)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, Stage)
        step = trainer.global_step
        if self.bar is not None and step > self.bar.n:
            self.bar.bar_format = self.bar_format(pl_module, step)
            self.bar.update(step - self.bar.n)
        elif self.bar is None and self.enabled and step != self.first_step:
            now = time.perf_counter()
            if now - self.last_line > self.LINE_SECONDS or step == self.total:
                self.last_line = now
                # Of this step on this rank; reading it makes the device wait, once a line.
                loss = float(pl_module.step_metrics.step_loss)
                print(" | ".join([f"step {step}/{self.total}", *self.figures(pl_module, step, loss)]), flush=True)

    def bar_format(self, module: Stage, step: int) -> str:
        """What tqdm draws: as many figures as fit beside a bar of some columns."""
        assert self.bar is not None
        # As wide as the terminal is now, without the two columns of the ^C that it may add.
        columns = os.get_terminal_size(self.bar.fp.fileno()).columns or 80
        self.bar.ncols = columns - 3
        name, figures = f"{self.name} {step / max(1, self.total):4.0%}", self.figures(module, step)
        while True:
            text = " | ".join([f"{step}/{self.total}", *figures])
            if not figures or len(name) + len(text) + 4 + self.BAR_COLUMNS <= self.bar.ncols:
                return f"{name} |{{bar}}| {text}"
            figures.pop()

    def figures(self, module: Stage, step: int, loss: float | None = None) -> list[str]:
        """In the order of their importance.

        Args:
            loss: Of this step; by default that of the last row of the metrics.
        """
        latest = dict(module.step_metrics.latest)
        if loss is not None:
            latest["train/loss"] = loss
        seconds = (time.perf_counter() - self.start) / max(1, step - self.first_step) * (self.total - step)
        formats = {"val/acc1": "top-1 {:.2f} %", "val/loss": "held-out {:.4f}", "online/knn": "k-NN {:.1f} %"}
        formats["images_per_s"] = "{:.0f} images/s"
        return [
            *([f"loss {latest['train/loss']:.4f}"] if "train/loss" in latest else []),
            f"{tqdm.format_interval(seconds)} left",
            *(text.format(latest[key]) for key, text in formats.items() if key in latest),
            f"lr {module.step_metrics.lr:.2e}",
        ]

    def close(self) -> None:
        self.redirected.close()
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bar is not None:
            assert isinstance(pl_module, Stage)
            self.bar.bar_format = self.bar_format(pl_module, trainer.global_step)  # with the last row's figures
            self.bar.refresh()
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close()
