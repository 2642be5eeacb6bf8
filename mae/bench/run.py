"""`mae bench run`: what limits a pre-training run, its loader or its optimiser step, and what to change."""

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from torch.utils.data import DataLoader

from mae.bench.figures import Figure, consecutive_groups, figure, write_json
from mae.bench.measured_run import UNMEASURED, MeasuredRunCLI
from mae.data.datamodule import ImageData
from mae.data.datasets import Batch
from mae.data.sampling import EpochSampler
from mae.data.sources import FileSource
from mae.data.tar_shards import RecordSource
from mae.errors import UserError
from mae.options import plural
from mae.runtime.device_clock import Clock, idle, wait_for
from mae.runtime.machine import available_cores, machine_details

WARM_UP = 2  # optimiser steps, at least

STEPS = 3  # optimiser steps to measure, at least

LATE = 0.05  # share of the step that may be spent waiting for data without a remark


class Feed:
    """The training loader, or one of its batches repeated; notes when each batch was requested and when it arrived.

    Attributes:
        repeated: The batch to repeat; None: the batches of the loader.
        waits: (requested, arrived) of each batch, by the clock `time.perf_counter`.
    """

    def __init__(self, loader: DataLoader[Batch]) -> None:
        self.loader = loader
        self.sampler: EpochSampler = loader.sampler  # type: ignore[assignment]
        self.repeated: Batch | None = None
        self.waits: list[tuple[float, float]] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = None
        for _ in range(len(self)):
            asked = time.perf_counter()
            if self.repeated is not None:
                batch = self.repeated
            else:
                if batches is None:
                    batches = iter(self.loader)
                batch = next(batches)
            self.waits.append((asked, time.perf_counter()))
            yield batch


class FedData(ImageData):
    """Data with one training loader that is measured alone first and then in training."""

    feed: Feed | None = None

    def train_dataloader(self) -> Any:
        if self.feed is None:
            self.feed = Feed(super().train_dataloader())
        return self.feed


class RunCLI(MeasuredRunCLI):
    """A pre-training run that is measured and leaves nothing."""

    command, description = (
        "bench run",
        "What limits a run of `mae pretrain` with these settings, on one device: loader or step.",
    )
    data = FedData

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--seconds", type=float, default=20.0, help="Shortest time of each of three measurements.")

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        if not self.config.seconds > 0:
            raise UserError(f"--seconds {self.config.seconds}: it must be above 0")


class Watch(Callback):
    """Measures steps on one batch, then steps on the loader's batches, and ends the run."""

    def __init__(self, feed: Feed, batch: Batch, seconds: float) -> None:
        self.feed, self.batch, self.seconds = feed, batch, seconds
        self.steps: list[list[tuple[float, float]]] = []  # for each of the two phases, as `steps_of` gives them

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only the pixels: the other tensors are read on the CPU in every step.
        self.feed.repeated = self.batch._replace(images=self.batch.images.to(pl_module.device))
        self.clock = Clock(pl_module.device)
        self.begin()

    def begin(self) -> None:
        self.marks: list[Any] = []
        self.warm, self.started = False, time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        window = trainer.accumulate_grad_batches
        self.marks.append(self.clock.mark())
        if (batch_idx + 1) % window:
            return
        now = time.perf_counter()
        if not self.warm:
            # Loader processes have prefetched 2 batches each, which are used up here.
            prefetched = 0 if self.feed.repeated else 2 * self.feed.loader.num_workers
            enough = len(self.marks) >= prefetched or now - self.started > self.seconds
            if enough and len(self.marks) >= WARM_UP * window:
                self.marks, self.warm, self.started = self.marks[-1:], True, now
                self.feed.waits.clear()
            return
        if now - self.started < self.seconds or len(self.marks) <= STEPS * window:
            return
        self.steps.append(steps_of(self.clock.times(self.marks), self.feed.waits, window))
        if len(self.steps) == 2:
            trainer.should_stop = True
        self.feed.repeated = None
        self.begin()


def steps_of(done: Sequence[float], waits: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Of each optimiser step of `window` batches, its seconds and those in which the device lacked data.

    Args:
        done: When the device had finished each batch, after the time for the batch before the first.
        waits: When each batch was requested and when it arrived.
    """
    waited = idle(done[:-1], waits)
    firsts = range(0, len(waited), window)
    return [(done[i + window] - done[i], sum(waited[i : i + window])) for i in firsts]


def run_command(args: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        forced = [
            *(*UNMEASURED, f"--run_dir={folder}", "--trainer.devices=1", "--trainer.num_nodes=1"),
            *("--trainer.max_time=null", "--trainer.min_epochs=null", "--trainer.min_steps=null"),
        ]
        cli = RunCLI([*args, *forced])
        write_json(cli.config.json, bench_run(cli))


def bench_run(cli: RunCLI) -> dict[str, Any]:
    """Measure the loader, the step and both together; print and return the figures."""
    trainer, module, seconds = cli.trainer, cli.datamodule, cli.config.seconds
    device = trainer.strategy.root_device
    module.trainer = trainer
    feed: Feed = module.train_dataloader()
    first, loader = loader_alone(feed, seconds)
    per_step = module.batch_size * trainer.accumulate_grad_batches
    where = machine_details(device)
    workers = 0 if module.device_resident else module.num_workers
    how = "images on the device" if module.device_resident else plural(workers, "worker")
    print(f"loader     {loader.median:>10,.0f} images/s  ({how})", flush=True)

    watch = Watch(feed, first, seconds)
    cli.fit_with(watch)
    alone, full = (consecutive_groups(steps) for steps in watch.steps)
    step, loop = (figure([per_step / statistics.fmean(s for s, _ in block) for block in b]) for b in (alone, full))
    wait = figure([sum(waited for _, waited in block) / sum(s for s, _ in block) for block in full])
    threads = plural(where["threads"], "thread") if device.type == "cpu" else where["device"]
    print(f"step       {step.median:>10,.0f} images/s  (batch {per_step}, {trainer.precision}, {threads})")
    print(
        f"full loop  {loop.median:>10,.0f} images/s, data wait {wait.median:.1%} of the step "
        f"({wait.low:.1%} to {wait.high:.1%})"
    )
    named, advice = find_bottleneck(
        loader.median, step.median, loop.median, wait.median, workers, device.type == "cpu", module
    )
    print(*advice, sep="\n", flush=True)
    return {
        "machine": where,
        "batch": per_step,
        "workers": workers,
        "device_resident": module.device_resident,
        "precision": str(trainer.precision),
        "loader": loader,
        "step": step,
        "full_loop": loop,
        "data_wait": wait,
        "steps": {"step": len(watch.steps[0]), "full_loop": len(watch.steps[1])},
        "bottleneck": named,
        "advice": advice,
    }


def loader_alone(feed: Feed, seconds: float) -> tuple[Batch, Figure]:
    """A batch, and the images/s of the loader when nothing else runs; epochs begin and end as in training."""
    arrivals: list[float] = []
    first, warm, started = None, False, time.perf_counter()
    for epoch in itertools.count():
        feed.sampler.seek(epoch * feed.sampler.steps_per_epoch)
        for batch in feed.loader:
            wait_for(batch.images.device)
            arrivals.append(now := time.perf_counter())
            first = batch if first is None else first
            if not warm:
                if len(arrivals) > 2 * feed.loader.num_workers or now - started > seconds:
                    arrivals, warm, started = [now], True, now
            elif now - started >= seconds and len(arrivals) > STEPS:
                spans = consecutive_groups(np.diff(arrivals).tolist())
                return first, figure([feed.sampler.batch_size / statistics.fmean(span) for span in spans])
    raise AssertionError("epochs do not end")


# ---- what to change --------------------------------------------------------------------------------------------------


def find_bottleneck(
    loader: float, step: float, loop: float, wait: float, workers: int, on_cpu: bool, module: ImageData
) -> tuple[str, list[str]]:
    """Which of loader and step is the bottleneck, and lines of advice.

    Args:
        loader, step, loop: Images/s.
        wait: Share of the step that waits for data.
    """
    cores, each = available_cores(), loader / max(1, workers)  # images/s of one worker
    needed = math.ceil(step / each)
    if step <= loader:
        lines = [f"the step is the bottleneck: the loader has {loader / step:.1f} times its rate"]
        if wait <= LATE:
            if workers:
                lines[0] += f", so more workers would do nothing ({needed} would do)"
            if loop < 0.9 * step:
                why = "do other programs use this machine?"
                if on_cpu and workers * loop / loader > 0.1:  # cores that loader processes keep from the step
                    why = f"loader processes and step share {cores} cores"
                slower = f"the full loop has {loop / step:.2f} of the step's rate, and does not wait for data"
                lines.append(f"{slower}: {why}")
        elif module.device_resident:
            lines.append("they take turns on the device; larger batches cost less an image")
        elif not workers:
            lines.append(f"they take turns: --data.num_workers 1 would load during the step ({cores} cores)")
        else:
            lines.append(f"yet data is waited for: {workers + 1} processes share {cores} cores, or images differ much")
            if workers + 1 < cores:
                lines.append(f"--data.num_workers {workers + 1} would smooth it")
        return "step", lines
    lines = [f"the loader is the bottleneck: it has {loader / step:.2f} of the step's rate"]
    if module.device_resident:
        return "loader", [*lines, "images are on the device already; larger batches cost less an image"]
    text = f"to keep up it takes {plural(needed, 'worker')} of {each:,.0f} images/s each"
    if needed <= cores - on_cpu:
        lines.append(f"{text}: --data.num_workers {needed} ({cores} cores)")
    else:
        lines.append(f"{text}, but there are {cores} cores" + (", which the step needs, too" if on_cpu else ""))
    if isinstance(module.train_source, FileSource):
        if not isinstance(module.train_source, RecordSource):
            lines.append("`mae pack` makes few large files of many small ones")
        if not module.jpeg_scaling:
            lines.append(
                "--data.jpeg_scaling true decodes large photographs faster, with other pixels: see `mae bench data`"
            )
    return "loader", [*lines, "--data.device_resident true would keep images of one size on the device"]
